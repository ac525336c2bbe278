"""Seconds of the imports: of the package alone, of torch, and of the core after torch; medians of fresh interpreters.

python -m benchmarks.import_time
"""

import subprocess
import sys
from statistics import median

SCRIPT = """
import time
start = time.perf_counter()
import sparsifai
face = time.perf_counter()
import torch
middle = time.perf_counter()
sparsifai.Sparsifier
print(face - start, middle - face, time.perf_counter() - middle)
"""


def main(runs=7):
    seconds = [
        tuple(map(float, subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True).stdout.split()))
        for _ in range(runs)
    ]
    face, torch, core = (median(each) for each in zip(*seconds, strict=True))
    print(f"import sparsifai {face:.3f} s")
    print(f"import torch after it {torch:.2f} s")
    print(f"first use of a name of sparsifai after that {core:.3f} s")


if __name__ == "__main__":
    main()
