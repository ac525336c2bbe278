"""What sparsifai costs, beside a copy of the weights and beside other libraries.

    python -m benchmarks [--quick] [--section build apply straight step memory exactness scaling layouts
        shrinking heads] [--out benchmarks/results] [--threads N]

Prints a table for each section, and writes all of it to results.json and a picture to results.png. FasterAI is measured
if it is installed. --quick takes about two minutes on two cores that have nothing else to do, all sections about
fifteen. On a busy machine use --threads 1: threads of torch that wait for each other take many times as long there.
"""

import argparse
import time
import warnings
from pathlib import Path

import torch

from benchmarks.applying import apply
from benchmarks.exactness import exactness
from benchmarks.heads import heads
from benchmarks.memory import memory
from benchmarks.peers import version_of_fasterai
from benchmarks.report import write
from benchmarks.shrinking import shrinking
from benchmarks.sparse_layouts import layouts
from benchmarks.straight_through import straight
from benchmarks.timing import Others, surroundings
from benchmarks.training import step
from benchmarks.updates import build, scaling

SECTIONS = {
    "build": build,
    "apply": apply,
    "straight": straight,
    "step": step,
    "memory": memory,
    "exactness": exactness,
    "scaling": scaling,
    "layouts": layouts,
    "shrinking": shrinking,
    "heads": heads,
}


def main(names, quick, folder):
    start = time.perf_counter()
    facts = {**surroundings(), "FasterAI": version_of_fasterai()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    tables = []
    for name in names:
        others = Others()
        tables.append(SECTIONS[name](quick))
        tables[-1].busy = others.cores()
        print(f"\n{tables[-1]}", flush=True)
        write(folder, facts, tables)
    print(f"\n{time.perf_counter() - start:.0f} s; results are in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--threads", type=int, help="of torch in steps and where masks are applied; by default, torch's"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # those of other libraries, between the tables
    main(arguments.section, arguments.quick, arguments.out)
