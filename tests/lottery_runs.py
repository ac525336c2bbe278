"""Runs of lottery_ticket for the tests: quick ones, with the weights and moments of every batch."""

import torch
from fastai.callback.core import Callback

from sparsifai import lottery_ticket


def weights_of(model):
    """A copy of the state_dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    """Whether two state_dicts are equal bit by bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Look(Callback):
    "Stores weights, moments and learning rate before every batch of training"

    order = 80
    __module__ = "fastai.look"  # so that KeepSparsity trusts it not to change weights

    def __init__(self):
        self.batches = []

    def before_batch(self):
        if self.learn.training:
            state = getattr(self.learn.opt, "opt", self.learn.opt).state
            moments = [
                {name: kept.clone() for name, kept in state[parameter].items() if torch.is_tensor(kept)}
                for parameter in self.learn.model.parameters()
            ]
            self.batches.append((weights_of(self.learn.model), moments, float(self.learn.opt.hypers[-1]["lr"])))


def run(learn, look=None, **options):
    """Run lottery_ticket silently, with three rounds of two epochs unless `options` say otherwise."""
    options = {"sparsity": 0.8, "rounds": 3, "fit": 2, "granularity": "weight", **options}
    with learn.no_bar(), learn.no_logging(), learn.added_cbs([look] if look else []):
        return lottery_ticket(learn, **options)
