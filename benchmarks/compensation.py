"""What weights that stay gain by making up for those that are pruned: a small language model, pruned once.

    python -m benchmarks.compensation --reviews PATH [--quick]

--reviews is as in `python -m benchmarks.accuracy`. A Llama of 4 layers is trained on the bytes of film reviews. Then it
is pruned at once by every setting, without training after, and its perplexity on reviews that it was not trained on is
measured, and the error of its outputs there, relative to their variance.
"""

import argparse
import time
import warnings
from copy import deepcopy

import torch
from torch.nn import functional

from benchmarks.accuracy.decoder import LAYERS, TEST, LanguageModel, perplexity_of, sequences
from benchmarks.accuracy.pictures import Batches
from benchmarks.report import Table
from sparsifai import Sparsifier

CALIBRATION = 128  # sequences of 128 bytes
LOCAL, HALF = ({"context": "local"}, 0.5), ({"context": "2:4"}, 0.5)
COLUMNS = {"50 %": LOCAL, "60 %": ({"context": "local"}, 0.6), "80 %": ({"context": "local"}, 0.8), "2:4": HALF}
SETTINGS = {
    "magnitude": {"compensate": False},
    "wanda": {"criteria": "wanda"},
    "magnitude, compensated": {"compensate": True},
    "wanda, compensated": {"criteria": "wanda", "compensate": True},
    "sparsegpt": {"criteria": "sparsegpt"},
    "obs": {"criteria": "obs"},
    "obs, scores alone": {"criteria": "obs", "compensate": False},
}


def measure(net, setting, column, data):
    "Perplexity and relative error of the outputs of a pruned copy, and the seconds that pruning takes"
    codes, following, calibration, outputs = data
    arguments, sparsity = column
    if setting.get("criteria") == "wanda" and arguments["context"] == "local":
        arguments = {"context": "per_output"}  # as published
    # Gradients of few sequences; inputs are the same in batches of any size.
    size = 4 if setting.get("criteria") == "obs" else 32
    pruned, start = deepcopy(net), time.process_time()
    sparsifier = Sparsifier(pruned, layers=list(LAYERS), **arguments, **setting)
    sparsifier.calibrate(list(Batches(*calibration, size)), functional.cross_entropy)
    sparsifier.sparsify(sparsity)
    seconds = time.process_time() - start
    with torch.no_grad():
        error = (pruned(codes[:64]) - outputs).square().mean() / outputs.var()
    return perplexity_of(pruned, codes, following), float(error), seconds


def main(options):
    "Train, prune and print"
    task = LanguageModel(options)
    task.size = 32
    train, test = task.data
    cell = next(iter(task.cells(0, options.quick)))
    net = task._trained(cell, *sequences(train[: cell.pictures]))
    codes, following = (part[:TEST] for part in sequences(test))
    with torch.no_grad():
        outputs = net(codes[:64])
    calibration = [part[:CALIBRATION] for part in sequences(train)]
    data = codes, following, calibration, outputs
    rows = [{"setting": "dense", **dict.fromkeys(COLUMNS, f"{perplexity_of(net, codes, following):.2f}")}]
    for name, setting in SETTINGS.items():
        row = {"setting": name}
        for column, of_column in COLUMNS.items():
            perplexity, error, seconds = measure(net, setting, of_column, data)
            row[column] = f"{perplexity:.2f} ({error:.3f}, {seconds:.0f} s)"
        rows.append(row)
        print(row, flush=True)
    print(
        Table(
            "compensation",
            "Perplexity of a byte (relative error of outputs, seconds of pruning on one CPU thread), pruned once",
            rows,
            "Ranked in each layer, wanda in each output; obs with the gradients of 32 batches of 4 sequences.",
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compensation", description=__doc__)
    parser.add_argument("--reviews", required=True)
    parser.add_argument("--quick", action="store_true")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    main(parser.parse_args())
