"""Fine-tune a pretrained ResNet-18 on the PETS data and prune half of its filters.

    python examples/pets.py

Needs the internet once: fastai downloads the Oxford-IIIT Pet images (about 800 MB) and torchvision the weights of the
network (45 MB). Meant for a GPU; on a CPU it takes about an hour.
"""

import sys
from urllib.error import URLError

from fastai.vision.all import *

from sparsifai.all import *


def is_cat(name):
    "Whether a file shows a cat: names of cat files begin with a capital letter"
    return name[0].isupper()


def main():
    try:
        path = untar_data(URLs.PETS)
    except (URLError, OSError) as error:
        sys.exit(
            f"The PETS data could not be downloaded ({error}).\n"
            "This example needs the internet once; examples/digits.py shows the same without a download."
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
