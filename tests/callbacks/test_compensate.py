"""Weights that make up for others while a Learner trains."""

import copy

import pytest
import torch

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from conftest import small_learner  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from updates import batches  # noqa: E402

from sparsifai.all import Recipe, SparsifyCallback, sensitivity  # noqa: E402


class Counted(list):
    """Batches that count how often they are run."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize("options", [
    {"compensate": True}, {"criteria": "obs"}, {"criteria": "sparsegpt", "context": "local"},
    {"criteria": "wanda", "context": "2:4", "compensate": True, "layers": ["3", "10"]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("given", [True, False])
def test_masks_are_updated_ten_times_and_the_end_is_exact(options, given):
    learn = small_learner(steps=20)
    updates, data = [], Counted(batches(2)) if given else None
    callback = SparsifyCallback(0.5, schedule="lin", calibration=data, **options)

    class Watch(Callback):
        order = 70

        def after_step(self):
            updates.append(callback.sparsifier.level)

    learn.fit(1, cbs=[callback, Watch()])
    assert len(set(updates)) == 10 + (updates[0] == 0)
    assert callback.sparsifier.sparsity == pytest.approx(0.5, abs=0.02)
    for name, mask in callback.sparsifier.masks.items():
        assert ((learn.model.get_parameter(name) == 0) == ~mask).all()
    assert data is None or data.passes > 10


def test_an_update_changes_the_weights_that_stay_and_leaves_their_moments():
    learn, seen = small_learner(steps=4), {}
    initial = learn.model[3].weight.detach().clone()
    callback = SparsifyCallback(0.5, schedule="one_shot", compensate=True, every=2, calibration=batches(2))

    class Watch(Callback):
        order = callback.order - 0.1

        def after_step(self):
            seen[self.iter] = copy.deepcopy(dict(learn.model.named_parameters()))

    learn.fit(1, 0.0, cbs=[callback, Watch()])
    mask = callback.sparsifier.masks["3.weight"]
    assert not torch.equal(seen[0]["3.weight"], initial * mask)
    assert torch.equal(learn.model[3].weight, seen[0]["3.weight"])  # nothing is pruned anew, so nothing changes


@pytest.mark.parametrize("given", [True, False])
def test_batches_to_compensate_with_count_in_no_mean_of_the_training(given):
    learn = small_learner(steps=10)
    data = [(*each, None)[:2] for each in batches(2)] if given else None
    callback = SparsifyCallback(0.5, criteria="movement_pruning", compensate=True, calibration=data, schedule="lin")
    learn.fit(2, 0.05, cbs=callback)
    counts = callback.sparsifier.state_dict()["statistics"]["counts"]["weight_grad"]
    assert set(counts.values()) == {20}


def test_every_can_be_given():
    learn, data = small_learner(steps=6), Counted(batches(1))
    learn.fit(1, cbs=SparsifyCallback(0.5, compensate=True, every=6, calibration=data))
    plain = data.passes
    learn, data = small_learner(steps=6), Counted(batches(1))
    learn.fit(1, cbs=SparsifyCallback(0.5, compensate=True, every=1, calibration=data))
    assert data.passes > 3 * plain


def test_a_recipe_may_ask_for_it():
    learn = small_learner(steps=4)
    recipe = Recipe.loads("epochs: 1\nsteps:\n- sparsify: {sparsity: 0.5, compensate: true}\n")
    (callback,) = [each for each in recipe.callbacks() if isinstance(each, SparsifyCallback)]
    assert callback.pruning.options.compensate
    sparsifier = recipe.apply(learn.model, batches(2))
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.02)


def test_plans_and_sensitivity():
    learn = small_learner(steps=4)
    plan = SparsifyCallback(0.5, criteria="obs").plan(learn.model, 2, 20)
    assert "looks at data (inverse_curvature)" in str(plan)
    before = copy.deepcopy(learn.model.state_dict())
    table = sensitivity(learn, levels=[0.5], criteria="large_final", compensate=True, progress=False)
    assert len(table.layers) == 5
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
