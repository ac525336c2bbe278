"""What criteria see of the data of a Learner: its own loss on the batches of the user, whatever callbacks do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from torch import nn
from updates import batches

from sparsifai import Sparsifier

pytestmark = pytest.mark.fastai

OF_LOSS = ("snip", "grasp", "taylor", "fisher", "movement_pruning")


def learner_of(model, **options):
    from conftest import small_learner
    from fastai.losses import CrossEntropyLossFlat

    learn = small_learner(model, **options)
    learn.loss_func = CrossEntropyLossFlat()
    return learn


def mixing(kind):
    from fastai.callback.mixup import CutMix, MixUp

    return {"CutMix": lambda: [CutMix(1.0)], "MixUp": lambda: [MixUp(0.4)]}[kind]()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("criterion", OF_LOSS)
@pytest.mark.parametrize("kind", ["CutMix", "MixUp"])
def test_calibration_is_scored_by_the_own_loss_whatever_mixes(kind, criterion, size):
    from sparsifai import SparsifyCallback

    (inputs, labels), model = batches(1)[0], small_net()
    batch = inputs[:size], labels[:size]
    plain = Sparsifier(copy.deepcopy(model).train(), criteria=criterion)
    plain.calibrate([batch], F.cross_entropy)
    plain.sparsify(0.9)

    learn = learner_of(model)
    callback = SparsifyCallback(0.9, criteria=criterion, schedule="one_shot", calibration=[batch])
    masks = []

    def note(self):
        masks.append(callback.sparsifier.masks)

    from fastai.callback.core import Callback

    look = Callback(after_pred=note)
    learn.fit(1, 0.0, cbs=[*mixing(kind), callback, look])
    assert all(torch.equal(mask, plain.masks[name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("criterion", OF_LOSS)
@pytest.mark.parametrize("kind", ["CutMix", "MixUp"])
def test_without_calibration_the_mixed_batch_is_scored_by_the_mixing_loss(kind, criterion):
    from sparsifai import SparsifyCallback

    learn = learner_of(small_net())
    callback = SparsifyCallback(0.9, criteria=criterion, schedule="one_shot")
    learn.fit(1, 0.01, cbs=[*mixing(kind), callback])
    assert callback.sparsifier.sparsity == pytest.approx(0.9, abs=0.01)


def test_a_loss_that_a_callback_has_put_in_place_of_another_one_is_told():
    from fastai.callback.core import Callback

    from sparsifai import SparsifyCallback

    class Mixes(Callback):
        def before_train(self):
            self.replaced, self.learn.loss_func = self.learn.loss_func, self.mixed

        def after_train(self):
            self.learn.loss_func = self.replaced

        def mixed(self, output, *targets):
            return self.replaced(output, *targets)

    learn = learner_of(small_net())
    callback = SparsifyCallback(0.9, criteria="snip", schedule="one_shot", calibration=batches(1))
    with pytest.warns(UserWarning, match="mixes has put its own loss on the Learner"):
        learn.fit(1, 0.01, cbs=[Mixes(), callback])


class LayerDrop(nn.Module):
    """Skips layers in turn while it trains."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(128, 8))
        self.layers, self.last, self.step = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 3), 0

    def forward(self, x):
        x, self.step = self.first(x), self.step + self.training
        for number, layer in enumerate(self.layers):
            if not self.training or self.step % 3 != number:
                x = x + torch.relu(layer(x))
        return self.last(x)


@pytest.mark.filterwarnings("ignore:.*no batch so far has used")
@pytest.mark.parametrize("schedule", ["one_shot", "agp"])
@pytest.mark.parametrize("criterion", [*OF_LOSS, "wanda"])
def test_a_fit_with_layers_that_batches_skip_reaches_the_target(make_learner, criterion, schedule):
    from sparsifai import SparsifyCallback

    learn = make_learner(LayerDrop())
    callback = SparsifyCallback(0.5, criteria=criterion, schedule=schedule)
    learn.fit(2, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)
    values = [each for of_layers in callback.sparsifier.collected.stored.values() for each in of_layers.values()]
    assert all(bool(value.isfinite().all()) for value in values)


def test_regrowth_goes_on_with_layers_that_batches_skip(make_learner):
    from sparsifai import SparsifyCallback

    learn = make_learner(LayerDrop())
    callback = SparsifyCallback(0.5, schedule="one_shot", regrow="grad", every=1)
    learn.fit(2, 0.01, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)


class Routed(nn.Module):
    """Its second expert gets rows that no data has."""

    def __init__(self):
        super().__init__()
        self.flat, self.experts = nn.Flatten(), nn.ModuleList([nn.Linear(128, 3), nn.Linear(128, 3)])

    def forward(self, x):
        x = self.flat(x)
        return self.experts[int(float(x.detach().abs().max()) > 100)](x)


def test_lottery_tickets_name_an_expert_that_no_batch_uses(make_learner):
    from sparsifai import lottery_ticket

    learn = make_learner(Routed())
    with pytest.warns(UserWarning, match=r"snip: no batch so far has used experts\.1\.weight"):
        tickets = lottery_ticket(learn, 0.4, rounds=1, fit=1, criteria="snip", layers="*")
    assert tickets[-1].sparsity == pytest.approx(0.4, abs=0.01)


def overflowing(steps):
    """A callback that makes the gradients of some steps infinite, as an overflow does; the step is then skipped."""
    from fastai.callback.core import Callback, CancelStepException

    class Overflow(Callback):
        order, done = -1, 0

        def after_backward(self):
            self.done += 1
            if self.done in steps:
                self.learn.model[0].weight.grad[0, 0] = float("inf")

    class Skip(Callback):
        order = 60

        def before_step(self):
            if not self.learn.model[0].weight.grad.isfinite().all():
                raise CancelStepException

    return [Overflow(), Skip()]


@pytest.mark.parametrize("steps", [(1,), (3,), (1, 2), (8,)])
@pytest.mark.parametrize("options", [
    *({"criteria": criterion} for criterion in ("snip", "fisher", "movement_pruning")), {"regrow": "grad", "every": 1}
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore:regrow. the gradients since the last update")
def test_an_overflow_in_a_fit_poisons_nothing(make_learner, options, steps):
    from sparsifai import SparsifyCallback

    learn = make_learner()
    callback = SparsifyCallback(0.5, schedule="lin", **options)
    learn.fit(2, 0.01, cbs=[callback, *overflowing(steps)])
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.005)
    for values in callback.sparsifier.collected.stored.values():
        assert all(bool(value.isfinite().all()) for value in values.values())
