"""Pictures as tensors: read once, kept whole, and augmented a batch at a time."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits


class MissingError(Exception):
    "Data or weights are not there; the message says where to get them"


SUFFIXES = {".jpg", ".jpeg", ".png"}


class Batches:
    """Batches of a set of pictures that is kept as one tensor; what fastai's DataLoaders are made of here.

    images: (n, channels, height, width). size: pictures in a batch. augment: function of a batch of images. shuffle:
    draw a new order in each pass and leave out an incomplete last batch.
    """

    def __init__(self, images, labels, size, augment=None, shuffle=False):
        self.images, self.labels, self.size = images, labels, size
        self.augment, self.shuffle = augment, shuffle

    def __len__(self):
        return len(self.labels) // self.size if self.shuffle else -(-len(self.labels) // self.size)

    def __iter__(self):
        order = torch.randperm(len(self.labels)) if self.shuffle else torch.arange(len(self.labels))
        for number in range(len(self)):
            places = order[number * self.size : (number + 1) * self.size]
            images = self.images[places]
            yield self.augment(images) if self.augment else images, self.labels[places]


def flip_and_crop(padding):
    "Augmentation of CIFAR: each picture is flipped or not, padded, and cropped at a random place"

    def augment(images):
        count, _, height, width = images.shape
        flipped = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
        padded = torch.nn.functional.pad(flipped, (padding,) * 4)
        places = torch.randint(0, 2 * padding + 1, (2, count))
        rows = places[0][:, None] + torch.arange(height)
        columns = places[1][:, None] + torch.arange(width)
        cropped = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        # Batch, height, width, channels as they come; that is the memory that convolutions are fastest on.
        return cropped.permute(0, 3, 1, 2)

    return augment


def digits(seed):
    "The digits of scikit-learn: ((images, labels) to train, to validate), 1,437 and 360, divided by `seed`"
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return (images[order[360:]], labels[order[360:]]), (images[order[:360]], labels[order[:360]])


def cifar10(folder):
    """CIFAR-10, or a part of it: ((images, labels) to train, to test), in [0, 1], in an order drawn with seed 0.

    folder: has train/CLASS/*.jpg (or .png) and test/CLASS/*.jpg, as fastai's untar_data(URLs.CIFAR). None downloads
        these.
    """
    if folder is None:
        from fastai.data.external import URLs, untar_data

        try:
            folder = untar_data(URLs.CIFAR)
        except OSError as error:
            raise MissingError(f"CIFAR-10 could not be downloaded ({error}): pass its folder as --data PATH") from error
    return tuple(_classes(Path(folder) / part) for part in ("train", "test"))


def _classes(folder):
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    paths = [(path, number) for number, name in enumerate(names) for path in pictures_of(folder / name)]
    if not paths:
        raise MissingError(f"There are no pictures in {folder}/CLASS/: pass the folder of CIFAR-10 as --data PATH")
    images = torch.stack([_tensor(path) for path, _ in paths])
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor([number for _, number in paths])[order]


def pictures_of(folder):
    "The pictures of a folder, sorted by name"
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)


def imagenet(folder, side):
    """One ImageNet picture of each class: images (1000, 3, side, side), normalized, and labels 0 to 999.

    folder: 1,000 pictures, which are classes 0 to 999 when they are sorted by name; for instance those of
        https://github.com/EliSchwartz/imagenet-sample-images.
    """
    paths = pictures_of(folder) if folder is not None and Path(folder).is_dir() else []
    if len(paths) != 1000:
        raise MissingError(
            f"one_shot needs 1,000 pictures, one of each ImageNet class, and {folder} has {len(paths)}: pass "
            "--imagenet PATH, for instance a copy of https://github.com/EliSchwartz/imagenet-sample-images"
        )
    return normalized(torch.stack([_tensor(path, side) for path in paths])), torch.arange(1000)


def normalized(images):
    "Images in [0, 1] as EfficientNet-Lite was trained on them; with the usual means of channels it loses 11 points"
    return (images * 255 - 127) / 128


def resized(images, side):
    "Images at another size, bicubic"
    return torch.nn.functional.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)


def _tensor(path, side=None):
    "A picture as (3, height, width) in [0, 1]; with `side`, its center square at that size"
    with Image.open(path) as file:
        picture = file.convert("RGB")
    if side is not None:
        short = min(picture.size)
        left, top = (picture.width - short) // 2, (picture.height - short) // 2
        picture = picture.resize((side, side), Image.BICUBIC, (left, top, left + short, top + short))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
