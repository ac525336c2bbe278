"""Seconds that `import sparsifai` takes beyond `import torch`: median of fresh interpreters.

python -m benchmarks.import_time
"""

import subprocess
import sys
from statistics import median

SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import sparsifai
print(middle - start, time.perf_counter() - middle)
"""


def main(runs=7):
    seconds = [
        tuple(map(float, subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True).stdout.split()))
        for _ in range(runs)
    ]
    print(f"import torch {median(first for first, _ in seconds):.2f} s")
    print(f"import sparsifai after it {median(second for _, second in seconds):.3f} s")


if __name__ == "__main__":
    main()
