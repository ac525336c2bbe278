"""What a teacher gains for a sparse net: accuracy on the digits, by loss, sparsity and number of labels.

    python -m benchmarks.distillation [--seeds 3] [--labels 100 1437]

The teacher is dense and has all 1,437 labels; the student has the same layers, 90 or 95 % zeros, and 100 labels or all
of them. Each loss of features has the weight of its paper, and one that was chosen among a few at 100 labels and 95 %
zeros with the seeds 10 and 11. Prints one table per number of labels: the accuracy without a teacher, and the
differences to it, seed by seed, in points. Takes about four minutes of one core.
"""

import argparse
from functools import partial
from statistics import mean, stdev

from fastai.vision.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, set_seed, torch

from examples.digits import accuracy_of, conv_net, digits_loaders
from sparsifai.all import DistillCallback, SparsifyCallback, relational

LEVELS = (0.9, 0.95)
EPOCHS = {100: 40, 1437: 8}  # labels -> epochs: 200 and 176 batches
# The convolutions are the layers 0 to 2 and the pooling is 3. weight=0 leaves the outputs to the labels.
POOLED = {"weight": 0, "features": "3"}
MAP = {"weight": 0, "features": "2", "feature_loss": "similarity"}
MAPS = {"weight": 0, "features": ["0", "1", "2"], "feature_loss": "attention_transfer"}
LOSSES = {
    "no teacher": None,
    "`soft_targets`, weight 0.9": {"weight": 0.9},
    "`relational`, 5 and 10": POOLED | {"feature_loss": partial(relational, distance_weight=5, angle_weight=10)},
    "`relational`, 25 and 50 as published": POOLED
    | {"feature_loss": partial(relational, distance_weight=25, angle_weight=50)},
    "`similarity`, 100": MAP | {"feature_weight": 100},
    "`similarity`, 3000 as published": MAP | {"feature_weight": 3000},
    "`attention_transfer`, 10": MAPS | {"feature_weight": 10},
    "`attention_transfer`, 3 x 500 as published": MAPS | {"feature_weight": 3 * 500},
}


def trained(seed, labels, *callbacks, split):
    "A net that was trained from scratch, in its Learner; split: the seed of the labels that it has"
    set_seed(seed, reproducible=True)  # first, as the DataLoaders draw the order of the batches from the seed
    loaders = digits_loaders(split)
    if labels < 1437:
        few = DataLoader(loaders.train.dataset[:labels], bs=20, shuffle=True, drop_last=True)
        loaders = DataLoaders(few, loaders.valid)
    learn = Learner(loaders, conv_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(EPOCHS[labels], 1e-2, cbs=callbacks)
    return learn


def scores_of(seed, labels):
    "Accuracy in percent by loss and sparsity; the teacher has other initial weights than the students"
    teacher = trained(seed + 100, 1437, split=seed)
    scores = {"teacher": accuracy_of(teacher)}
    for loss, options in LOSSES.items():
        for level in LEVELS:
            teaching = [] if options is None else [DistillCallback(teacher, **options)]
            scores[loss, level] = accuracy_of(trained(seed, labels, SparsifyCallback(level), *teaching, split=seed))
    return {key: 100 * value for key, value in scores.items()}


def main(seeds, numbers_of_labels):
    torch.set_num_threads(1)
    for labels in numbers_of_labels:
        scores = [scores_of(seed, labels) for seed in range(seeds)]
        teachers = ", ".join(f"{each['teacher']:.1f}" for each in scores)
        print(f"\n{labels} labels, {EPOCHS[labels]} epochs, {seeds} seeds; the teachers have {teachers} %\n")
        print("| loss | " + " | ".join(f"{level:.0%} zeros" for level in LEVELS) + " |")
        print("|---" * (1 + len(LEVELS)) + "|")
        for loss in LOSSES:
            cells = []
            for level in LEVELS:
                base = [each["no teacher", level] for each in scores]
                if loss == "no teacher":
                    cells.append(f"{mean(base):.1f} ± {stdev(base):.1f}")
                else:
                    gains = [each[loss, level] - own for each, own in zip(scores, base, strict=True)]
                    cells.append(f"{mean(gains):+.1f} ± {stdev(gains):.1f}")
            print(f"| {loss} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--labels", type=int, nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.labels)
