"""Models for the tests of conversion to CSR."""

from torch import nn

from sparsifai import Sparsifier


def varied():
    """A model with a layer for each reason to stay dense."""
    model = nn.ModuleDict({
        "small": nn.Linear(1024, 1023), "full": nn.Linear(1024, 1024), "precise": nn.Linear(1024, 1024).double(),
        "hooked": nn.Linear(1024, 1024), "conv": nn.Conv2d(1024, 1024, 1),
    }).eval()  # fmt: skip
    Sparsifier(model, context="local", exclude="full").sparsify(0.95)
    Sparsifier(model, context="local", layers=["full"]).sparsify(0.5)
    model["hooked"].register_forward_hook(lambda *_: None)
    return model
