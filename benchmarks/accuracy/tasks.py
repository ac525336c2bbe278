"""The tasks: which cells each has, and how one cell is run.

A task is a class with `cells(seed, quick)`, all cells of one seed in the order of its table, and `run(cell)`, what was
measured. It is made with the options of the command line.
"""

from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from benchmarks.accuracy import nets, pictures, settings
from benchmarks.accuracy.cells import Cell, cells_of
from benchmarks.accuracy.decoder import LanguageModel
from benchmarks.accuracy.pictures import Batches
from benchmarks.accuracy.settings import FasterAI
from benchmarks.accuracy.text import Text
from benchmarks.accuracy.training import Measured, accuracy_of, fit, reproducible, zeros_of


class Digits:
    "A small convolution net trained on scikit-learn's digits; only convolutions are pruned"

    title = "scikit-learn's digits, conv net 32-64-64, one cycle at 1e-2, convolutions only"
    seeds = 5

    def __init__(self, options):
        pass

    @staticmethod
    def cells(seed, quick):
        "All settings at all sparsities, in each case; and the dense net"
        epochs = 2 if quick else 6
        sparsities = (0.9,) if quick else settings.DIGITS_SPARSITIES
        yield Cell("digits", "dense", "dense", 0.0, seed, epochs, 1437)
        for setting in settings.DIGITS:
            for case in settings.DIGITS_CASES:
                for sparsity in sparsities:
                    yield Cell("digits", case, setting, sparsity, seed, epochs, 1437)

    def run(self, cell):
        "Train and validate; the seed also divides the digits"
        measured = Measured()
        (images, labels), validation = pictures.digits(cell.seed)
        reproducible(cell.seed)
        net = nets.digits_net()
        batches = Batches(images, labels, 64, shuffle=True)
        setting = None if cell.case == "dense" else settings.DIGITS[cell.setting]
        if isinstance(setting, FasterAI):
            setting = replace(setting, **settings.DIGITS_CASES[cell.case])
        elif setting is not None:
            setting = {**settings.DIGITS_CASES[cell.case], **setting}
        fit(net, batches, cell.epochs, 1e-2, setting, cell.sparsity, kinds=(nn.Conv2d,))
        return measured.of(accuracy_of(net, *validation), zeros_of(net, (nn.Conv2d,)))


class Cifar10:
    "ResNet-20 trained on a part of CIFAR-10 from scratch"

    title = "CIFAR-10, ResNet-20 from scratch, one cycle, random flips and crops"
    seeds = 3
    rate, size = 5e-3, 64

    def __init__(self, options):
        self.folder = options.data

    @staticmethod
    def cells(seed, quick):
        "All settings, each at its sparsities"
        epochs, count = (1, 1000) if quick else (6, 10_000)
        sparsities = (0.0, 0.5, 0.9) if quick else (0.0, 0.9, 0.5, 0.95, 0.98, 0.8)
        return cells_of("cifar10", settings.CIFAR10, sparsities, seed, epochs, count)

    @cached_property
    def data(self):
        "Training and test pictures, normalized by channel"
        return tuple((_standardized(images), labels) for images, labels in pictures.cifar10(self.folder))

    def run(self, cell):
        "Train and test"
        (images, labels), test = self.data
        measured = Measured()
        reproducible(cell.seed)
        net = nets.resnet20().to(memory_format=torch.channels_last)
        augment = pictures.flip_and_crop(4)
        batches = Batches(images[: cell.pictures], labels[: cell.pictures], self.size, augment, shuffle=True)
        setting, _ = settings.CIFAR10[cell.setting]
        fit(net, batches, cell.epochs, self.rate, setting, cell.sparsity, bfloat16=True)
        return measured.of(accuracy_of(net, *test, bfloat16=True), zeros_of(net))


class OneShot:
    "EfficientNet-Lite0 with ImageNet weights, pruned once, without training"

    title = "EfficientNet-Lite0 on ImageNet pictures of 192 px, pruned once, without training"
    seeds = 1

    def __init__(self, options):
        self.folder = options.imagenet

    @staticmethod
    def cells(seed, quick):
        "Those without data, and those calibrated: on every fifth picture"
        yield Cell("one_shot", "dense", "dense", 0.0, seed, 0, 0)
        both = (("without data", settings.ONE_SHOT, 0), ("calibrated", settings.CALIBRATED, 200))
        for sparsity in (0.3,) if quick else settings.ONE_SHOT_SPARSITIES:
            for case, table, count in both:
                for setting in list(table)[:2] if quick else table:
                    yield Cell("one_shot", case, setting, sparsity, seed, 0, count)

    @cached_property
    def data(self):
        "(images, labels) to test on and to calibrate with: every fifth class is left for the latter"
        images, labels = pictures.imagenet(self.folder, 192)
        fifth = labels % 5 == 0
        return (images[~fifth], labels[~fifth]), (images[fifth], labels[fifth])

    def run(self, cell):
        "Prune and test, in bfloat16; scores are computed in float32"
        from sparsifai import Sparsifier

        test, calibration = self.data
        measured = Measured()
        reproducible(cell.seed)
        net = nets.efficientnet_lite0().to(memory_format=torch.channels_last)
        if cell.sparsity:
            table = settings.CALIBRATED if cell.pictures else settings.ONE_SHOT
            sparsifier = Sparsifier(net, **table[cell.setting], seed=cell.seed)
            if cell.pictures:
                batches = list(zip(*(part[: cell.pictures].split(25) for part in calibration), strict=True))
                sparsifier.calibrate(batches, nn.functional.cross_entropy)
            sparsifier.sparsify(cell.sparsity)
        return measured.of(accuracy_of(net, *test, size=50, bfloat16=True), zeros_of(net))


class FineTune:
    """EfficientNet-Lite0 with ImageNet weights, trained and pruned on CIFAR-10 at 96 px; only convolutions are pruned.

    A ranking of all layers together would empty the new last layer, whose weights begin much smaller than the others.
    """

    title = "EfficientNet-Lite0 with ImageNet weights, fine-tuned on CIFAR-10 at 96 px, convolutions only"
    seeds = 2
    rate, size = 1e-3, 20

    def __init__(self, options):
        self.folder = options.data

    @staticmethod
    def cells(seed, quick):
        "All settings, each at its sparsities"
        epochs, count = (1, 320) if quick else (3, 1500)
        sparsities = (0.0, 0.9) if quick else (0.0, 0.9, 0.8, 0.95)
        return cells_of("fine_tune", settings.FINE_TUNE, sparsities, seed, epochs, count)

    @cached_property
    def data(self):
        "Training and test pictures"
        return pictures.cifar10(self.folder)

    def run(self, cell):
        "Train all weights in one fit, the last layer with them; test on 1,000 pictures"
        (images, labels), (test, wanted) = self.data
        measured = Measured()
        reproducible(cell.seed)
        net = nets.efficientnet_lite0(classes=10).to(memory_format=torch.channels_last)
        augment = _enlarged(pictures.flip_and_crop(4))
        batches = Batches(images[: cell.pictures], labels[: cell.pictures], self.size, augment, shuffle=True)
        setting, _ = settings.FINE_TUNE[cell.setting]
        fit(net, batches, cell.epochs, self.rate, setting, cell.sparsity, kinds=(nn.Conv2d,))
        test = pictures.normalized(pictures.resized(test[:1000], 96))
        accuracy = accuracy_of(net, test, wanted[:1000], size=50, bfloat16=True)
        return measured.of(accuracy, zeros_of(net, (nn.Conv2d,)))


def _standardized(images):
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)


def _enlarged(augment):
    return lambda images: pictures.normalized(pictures.resized(augment(images), 96))


TASKS = {
    "digits": Digits,
    "cifar10": Cifar10,
    "one_shot": OneShot,
    "fine_tune": FineTune,
    "text": Text,
    "decoder": LanguageModel,
}
# The page of the docs that has the tables of a task.
PAGES = {name: "transformers.md" if name in ("text", "decoder") else "accuracy.md" for name in TASKS}
