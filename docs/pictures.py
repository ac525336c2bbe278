"""Draw the pictures of the four questions from what is registered: python docs/pictures.py [FOLDER]."""

import inspect
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from PIL import Image
from torch import nn

from sparsifai import Sparsifier, agp, between, contexts, criteria, granularities, schedules

KEPT, PRUNED = "#3f51b5", "#e8eaf6"
COLOURS = ListedColormap(["white", PRUNED, KEPT])  # what is outside, pruned, kept


class Mixture(nn.Module):
    """Four experts, two of which a router chooses for each token."""

    def __init__(self, width=6):
        super().__init__()
        self.router, self.top_k = nn.Linear(width, 4), 2
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(4)
        )

    def forward(self, x):
        shares, chosen = self.router(x).topk(self.top_k)
        shares = shares.softmax(-1)
        parts = [
            (shares * (chosen == number)).sum(-1, keepdim=True) * expert(x)
            for number, expert in enumerate(self.experts)
        ]
        return torch.stack(parts).sum(0)


def encoder(layers):
    layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


# A model, and an example input, for the granularities whose groups have weights of several layers.
JOINT = {
    "head": lambda: (nn.MultiheadAttention(8, 4), None),
    "neuron": lambda: (encoder(1), None),
    "block": lambda: (encoder(4), torch.rand(1, 3, 8)),
    "expert": lambda: (Mixture(), None),
    "unit": lambda: (nn.LSTM(6, 6), None),
}


def picture_of(mask, weight):
    """The mask of a weight as a matrix of 1 and 2: a convolution has a row of kernels for each filter."""
    shown = mask.expand(weight.shape).int() + 1
    if shown.dim() == 4:
        out, into, height, width = shown.shape
        shown = shown.permute(0, 2, 1, 3).reshape(out * height, into * width)
    return shown


def beside(pictures, gap=2):
    """Matrices beside one another."""
    height = max(len(each) for each in pictures)
    padded = [nn.functional.pad(each, (0, gap, 0, height - len(each))) for each in pictures]
    return torch.cat(padded, 1)[:, :-gap].numpy()


def how():
    """The mask of every granularity, at half of the weights."""
    names = [*granularities, "4x4"]
    figure, axes = plt.subplots(3, 7, figsize=(10, 5.4), layout="constrained")
    for name, ax in zip(names, axes.flat, strict=True):
        torch.manual_seed(2)
        if name in JOINT:
            (model, example), layers = JOINT[name](), None
        else:
            model, example = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), None
            layers = ["0", "1"] if name == "layer" else "0"
        sparsifier = Sparsifier(model, name, "global", "random", layers=layers, example_input=example)
        sparsifier.sparsify(0.5)
        weights = dict(model.named_parameters())
        ax.imshow(
            beside([picture_of(mask, weights[name]) for name, mask in sparsifier.masks.items() if mask.dim() > 1]),
            cmap=COLOURS, vmin=0, vmax=2, interpolation="nearest", aspect="auto" if name in JOINT else "equal",
        )  # fmt: skip
        ax.set_title(name, fontsize=8)
        ax.axis("off")
    return figure


def where():
    """The sparsity of four layers, and the mask of one of them, for every context, at half of the weights."""
    names = [*contexts, "2:4"]
    figure, axes = plt.subplots(2, len(names), figsize=(10, 3), layout="constrained")
    for number, name in enumerate(names):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 8)
        )
        sparsifier = Sparsifier(model, context=name)
        sparsifier.sparsify(0.5)
        bars, mask = axes[:, number]
        bars.bar(range(4), [1 - each.float().mean().item() for each in sparsifier.masks.values()], color=KEPT)
        bars.set(ylim=(0, 1), xticks=range(4), xticklabels=range(1, 5), yticks=[0, 0.5, 1] if number == 0 else [])
        bars.axhline(0.5, color="grey", linewidth=0.6)
        bars.set_title(name, fontsize=8)
        bars.tick_params(labelsize=7)
        mask.imshow((sparsifier.masks["3.weight"][:16, :16].int() + 1).numpy(), cmap=COLOURS, vmin=0, vmax=2)
        mask.set(xticks=[], yticks=[])
    axes[1, 0].set_ylabel("part of layer 3", fontsize=7)
    axes[0, 0].set_ylabel("sparsity of layer", fontsize=7)
    return figure


# What criteria ask for, from the weight w and one more number x, and the name of that number.
SECOND = {
    "init": ("initial weight", lambda w, x: x),
    "previous": ("weight at last update", lambda w, x: x),
    "grad": ("gradient", lambda w, x: x),
    "grad_sq": ("gradient", lambda w, x: x**2),
    "weight_grad": ("gradient", lambda w, x: w * x),
    "activation": ("input", lambda w, x: x.abs()),
    "rng": ("", lambda w, x: torch.Generator().manual_seed(0)),
}


def what():
    """Which half of the weights every criterion keeps that is a formula of the weight and one more number."""
    drawn = {}
    for name, criterion in criteria.items():
        parameters = inspect.signature(criterion).parameters.values()
        needed = {each.name for each in parameters if each.default is each.empty}
        if needed <= {"weight", *SECOND}:
            drawn[name] = criterion, needed
    w, x = torch.meshgrid(torch.linspace(1, -1, 60), torch.linspace(-1, 1, 60), indexing="ij")
    figure, axes = plt.subplots(3, -(-len(drawn) // 3), figsize=(10, 5), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for (name, (criterion, needed)), ax in zip(drawn.items(), axes.flat, strict=False):
        given = {each: SECOND[each][1](w, x) for each in needed - {"weight"}} | (
            {"weight": w} if "weight" in needed else {}
        )
        scores = criterion(**given)
        if getattr(criterion, "pooling", None) == "squared_sum":
            scores = scores**2
        ax.axis("on")
        ax.imshow(((scores > scores.median()).int() + 1).numpy(), cmap=COLOURS, vmin=0, vmax=2, extent=(-1, 1, -1, 1))
        second = {SECOND[each][0] for each in needed & set(SECOND)}
        ax.set(xticks=[], yticks=[])
        ax.set_title(name.replace("updating_", "updating_\n"), fontsize=7)
        ax.set_xlabel(next(iter(second), ""), fontsize=6)
        ax.set_ylabel("weight", fontsize=6)
    return figure


def when():
    """The share of the target sparsity by the progress of training, for every schedule."""
    drawn = {**schedules, "between(agp, 0, 0.75)": between(agp, 0, 0.75)}
    figure, axes = plt.subplots(1, len(drawn), figsize=(10, 1.6), layout="constrained", sharey=True)
    ts = [step / 400 for step in range(401)]
    for (name, schedule), ax in zip(drawn.items(), axes.flat, strict=True):
        ax.plot(ts, [schedule(t) for t in ts], color=KEPT)
        ax.set(xlim=(0, 1), ylim=(-0.05, 1.05), xticks=[0, 1], yticks=[0, 1])
        ax.set_title(name.replace(", ", ",\n", 1), fontsize=7)
        ax.tick_params(labelsize=7)
    return figure


def update():
    """What a mask update makes of a small matrix: scores, the mask, and the masked weights."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 4)
    weight = layer.weight.detach().clone() * 2
    layer.weight.data.copy_(weight)
    sparsifier = Sparsifier(layer, "weight", "local", "large_final")
    sparsifier.sparsify(0.5)
    mask = sparsifier.masks["weight"]
    steps = {
        "weights": weight,
        "scores: |w|": criteria["large_final"](weight),
        "mask: the 10 lowest are pruned": mask.int(),
        "weights x mask": layer.weight.detach(),
    }
    figure, axes = plt.subplots(1, len(steps), figsize=(10, 2), layout="constrained")
    for number, ((title, values), ax) in enumerate(zip(steps.items(), axes, strict=True)):
        shown = mask.int() + 1 if number > 1 else torch.zeros_like(mask).int()
        ax.imshow(shown.numpy(), cmap=COLOURS, vmin=0, vmax=2, aspect="auto")
        for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
            value = values[row, column].item()
            text = f"{value:.2f}" if values.is_floating_point() and value else f"{value:.0f}"
            colour = "white" if number > 1 and mask[row, column] else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=8)
    return figure


PICTURES = {"how": how, "where": where, "what": what, "when": when, "update": update}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in PICTURES.items():
        path = folder / f"{name}.png"
        draw().savefig(path, dpi=110)
        Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)  # a quarter of the bytes
