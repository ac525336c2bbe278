"""What the defaults are chosen by: accuracy on the digits, over seeds, levels and ways to train.

    python -m benchmarks.defaults [--seeds 6] [--epochs 6]

Varies one axis at a time around weight, global, large_final, and prints one table per axis: mean accuracy over the
seeds, per level and way to train. Takes about half an hour on two cores.
"""

import argparse
from collections import defaultdict
from statistics import mean, stdev

from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, set_seed, torch

from examples.digits import accuracy_of, conv_net, digits_loaders
from sparsifai.all import SparsifyCallback, between

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.98)
AXES = {
    "schedule": (
        *("one_shot", "iterative", "lin", "cos", "agp", "one_cycle"),
        *(between(schedule, 0, end) for schedule in ("agp", "one_cycle") for end in (0.5, 0.75)),
    ),
    "context": ("local", "global"),
    "criteria": ("large_final", "movement", "magnitude_increase", "large_init_large_final", "random"),
}


def fitted(fit, epochs, seed, **options):
    "Accuracy of a net trained from scratch, `fit` one of 'fit_one_cycle' and 'fit'"
    set_seed(seed, reproducible=True)
    learn = Learner(digits_loaders(seed), conv_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        # A flat rate as high as the peak of one cycle would not settle.
        getattr(learn, fit)(epochs, 1e-2 if fit == "fit_one_cycle" else 3e-3, cbs=SparsifyCallback(**options))
    return accuracy_of(learn)


def main(seeds, epochs, axes):
    torch.set_num_threads(1)
    for axis in axes:
        scores = defaultdict(list)
        for fit in ("fit_one_cycle", "fit"):
            for level in LEVELS:
                for value in AXES[axis]:
                    for seed in range(seeds):
                        score = fitted(fit, epochs, seed, sparsity=level, **{axis: value})
                        scores[value, fit, level].append(score)
        print(
            f"\n| {axis} | " + " | ".join(f"{fit} {level:.0%}" for fit in ("fit_one_cycle", "fit") for level in LEVELS)
        )
        print("|---" * (1 + 2 * len(LEVELS)) + "|")
        for value in AXES[axis]:
            cells = [scores[value, fit, level] for fit in ("fit_one_cycle", "fit") for level in LEVELS]
            print(
                f"| {getattr(value, '__name__', value)} | "
                + " | ".join(f"{mean(cell):.3f}±{stdev(cell):.3f}" for cell in cells)
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.epochs, arguments.axes)
