"""Generated pictures in the folders of fastai's CIFAR-10, which stand in for it in the tests of the notebooks."""

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def draw_pictures(folder, train, test):
    """Write `train` and `test` pictures of each class: 32x32 pixels of noise, with a bright part by class."""
    random = np.random.default_rng(0)
    for part, number in (("train", train), ("test", test)):
        for place, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            row, column = divmod(place, 5)
            for index in range(number):
                pixels = random.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[16 * row :][:16, 6 * column :][:, :6] += 127
                Image.fromarray(pixels).save(folder / part / name / f"{index:04}.png")
