"""The PETS example: a pretrained ResNet-18 with half of its filters zero.

    python examples/pets.py

Needs the internet once: fastai downloads the Oxford-IIIT Pet images (about 800 MB) and torchvision the weights of the
network (45 MB). Made for a GPU; on a CPU it takes an hour or so.
"""

import sys
from urllib.error import URLError

from fastai.vision.all import *

from sparsifai.all import *


def is_cat(name):
    "The files of cats begin with a capital letter"
    return name[0].isupper()


def main():
    try:
        path = untar_data(URLs.PETS)
    except (URLError, OSError) as error:
        sys.exit(
            f"The PETS data could not be downloaded ({error}).\n"
            "This example needs the internet once; examples/digits.py shows the same without any download."
        )
    dls = ImageDataLoaders.from_name_func(
        path, get_image_files(path / "images"), is_cat, valid_pct=0.2, seed=42, item_tfms=Resize(64)
    )
    learn = vision_learner(dls, resnet18, metrics=accuracy)
    learn.unfreeze()
    callback = SparsifyCallback(
        sparsity=0.5, granularity="filter", context="global", criteria=large_final, schedule=cos
    )
    learn.fit_one_cycle(5, 1e-3, cbs=callback)
    print(callback.sparsifier.report())


if __name__ == "__main__":
    main()
