"""Train a small convolutional net on handwritten digits, dense and sparse in five ways.

    python examples/digits.py [--epochs 8] [--picture digits.png]

The data are the 1,797 digits of 8 x 8 pixels that come with scikit-learn, so nothing is downloaded.
"""

import argparse
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from fastai.vision.all import *
from sklearn.datasets import load_digits

from sparsifai.all import *

# Each configuration gives other answers to the four questions: how, where, what and when.
CONFIGURATIONS = {
    "90 % of the weights": {"sparsity": 0.9, "granularity": "weight", "context": "global", "schedule": "one_cycle"},
    "half of the filters": {"sparsity": 0.5, "granularity": "filter", "context": "global", "schedule": cos},
    "70 % of the kernels": {"sparsity": 0.7, "granularity": "kernel", "context": "local", "criteria": movement},
    "60 % of the rows": {"sparsity": 0.6, "granularity": "row", "criteria": movmag, "schedule": between(lin, 0.2, 0.8)},
    "layer by layer": {
        "sparsity": {"0": 0.25, "1": 0.7, "2": 0.9, "5": 0.5},
        "context": "local",
        "criteria": magnitude_increase,
        "schedule": SchedCos(0, 1),
    },
}


def digits_loaders(seed=0):
    "DataLoaders of the digits: 1,437 for training and 360 for validation"
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pairs = [(images[index], labels[index]) for index in order]
    return DataLoaders(
        DataLoader(pairs[360:], bs=64, shuffle=True, drop_last=True), DataLoader(pairs[:360], bs=360), device="cpu"
    )


def conv_net():
    "Three of fastai's ConvLayers (convolution, norm layer, ReLU) and a linear layer"
    return nn.Sequential(
        ConvLayer(1, 16), ConvLayer(16, 32, stride=2), ConvLayer(32, 32, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def train(epochs, callback=None, seed=0):
    "Train a Learner from scratch; returns it and the seconds that it took"
    set_seed(seed, reproducible=True)  # first, as the DataLoaders draw the order of the batches from the seed
    learn = Learner(digits_loaders(), conv_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    start = time.perf_counter()
    learn.fit_one_cycle(epochs, 1e-2, cbs=callback)
    return learn, time.perf_counter() - start


def accuracy_of(learn):
    "The accuracy on the validation set"
    with learn.no_bar(), learn.no_logging():
        return float(learn.validate()[1])


def draw(results, masks, path):
    "Plot the accuracy of every configuration and the masks of one layer"
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    ax = upper.subplots()
    names = list(results)
    ax.barh(names, [results[name][0] for name in names], color=["0.6"] + ["tab:blue"] * (len(names) - 1))
    for place, name in enumerate(names):
        score, sparsity = results[name][:2]
        ax.text(score - 0.01, place, f"{score:.1%}, {sparsity:.1%} zeros", color="white", va="center", ha="right")
    ax.set(xlim=(0, 1), xlabel="accuracy on the 360 digits of the validation set")
    ax.invert_yaxis()
    axes = lower.subplots(1, len(masks))
    lower.suptitle("remaining weights of the third convolution: a row is a filter, black is zero")
    for ax, (name, mask) in zip(axes, masks.items(), strict=True):
        ax.imshow(mask.flatten(1), cmap="gray", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


def main(epochs, picture):
    torch.set_num_threads(1)  # the net is too small to gain from more
    learn, seconds = train(epochs)
    results, masks = {"dense": (accuracy_of(learn), 0.0, seconds)}, {}
    for name, configuration in CONFIGURATIONS.items():
        print(f"\n{name}")
        callback = SparsifyCallback(**configuration)
        learn, seconds = train(epochs, callback)
        results[name] = (accuracy_of(learn), callback.sparsifier.sparsity, seconds)
        masks[name] = learn.model[2][0].weight.detach() != 0
    print(f"\n{'':22}{'accuracy':>9}{'measured sparsity':>19}{'seconds':>9}")
    for name, (score, sparsity, seconds) in results.items():
        print(f"{name:22}{score:>9.1%}{sparsity:>19.2%}{seconds:>9.1f}")
    draw(results, masks, picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--picture", type=Path, default=Path(tempfile.gettempdir(), "digits.png"))
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.picture)
