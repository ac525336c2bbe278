"""Heads and neurons in a fastai Learner, in plans, recipes and measurements of sensitivity."""

import pytest
import torch

fastai = pytest.importorskip("fastai.vision.all", reason="the callbacks are fastai's")
pytestmark = pytest.mark.fastai

from attentions import BLOCKS, WIDTH, Fused, FusedGatedMlp, Net, Separate  # noqa: E402
from conftest import small_learner  # noqa: E402

from sparsifai.all import (  # noqa: E402
    KeepSparsity,
    Recipe,
    SparsifyCallback,
    compare,
    highest_sparsity,
    lottery_ticket,
    sensitivity,
)
from sparsifai.training.lottery_run import LotteryRun  # noqa: E402


def learner(kind=lambda: Separate(6), **options):
    return small_learner(Net(kind), shape=(4, WIDTH), **options)


@pytest.mark.parametrize("schedule", ["one_shot", "lin", "cos", "agp", "one_cycle"])
def test_a_fit_ends_at_the_target_and_keeps_what_it_pruned(schedule):
    learn = learner()
    callback = SparsifyCallback(0.5, "head", schedule=schedule)
    learn.fit(2, 1e-3, cbs=callback)
    assert callback.sparsifier.sparsity == 0.5
    report = callback.sparsifier.report()
    assert sum(pruned for pruned, _ in report.joint.values()) == 6
    zero = {name: parameter == 0 for name, parameter in learn.model.named_parameters()}
    learn.fit(1, 1e-3, cbs=KeepSparsity())
    assert all((parameter[zero[name]] == 0).all() for name, parameter in learn.model.named_parameters())


@pytest.mark.filterwarnings("ignore:(?s).*compares with an earlier value, and nothing has changed")
@pytest.mark.parametrize("kind", ["separate", "torch", "fused gated mlp"])
@pytest.mark.parametrize("criterion", ["gate_importance", "taylor", "movement", "wanda", "random"])
def test_criteria_in_a_fit(kind, criterion):
    if (kind, criterion) == ("torch", "wanda"):
        pytest.skip("nobody calls the output projection of nn.MultiheadAttention, so its inputs are not seen")
    make, granularity, _, _ = BLOCKS[kind]
    learn = learner(make)
    callback = SparsifyCallback(0.5, granularity, "local", criterion, schedule="cos")
    learn.fit(2, 1e-5, cbs=callback)
    assert {pruned for pruned, _ in callback.sparsifier.report().joint.values()} == {2}  # of 3, or of 4


@pytest.mark.parametrize("criterion", ["large_final", "gate_importance"])
def test_the_callback_prunes_what_the_sparsifier_prunes(criterion):
    from sparsifai import Sparsifier

    learn = learner()
    batch = learn.dls.one_batch()
    direct = Sparsifier(Net(lambda: Separate(6)), "head", "local", criterion)
    batches = [batch] if criterion == "gate_importance" else None
    if batches:
        direct.calibrate(batches, learn.loss_func)
    direct.sparsify(0.5)
    callback = SparsifyCallback(0.5, "head", "local", criterion, schedule="one_shot", calibration=batches)
    learn.fit(1, 0.0, cbs=callback)
    assert callback.sparsifier.report().joint == direct.report().joint
    assert all(torch.equal(mask, direct.masks[name]) for name, mask in callback.sparsifier.masks.items())


def test_a_plan_says_how_many_heads_will_be_pruned():
    callback = SparsifyCallback(0.5, "head", "local")
    plan = callback.plan(learner().model, 2, 4)
    assert {layer.note for layer in plan.layers if not layer.why_dense} == {"3 of 6 heads pruned"}
    assert plan.selected.sparsity == 0.5
    with_data = SparsifyCallback(0.5, "head", "local", "gate_importance").plan(learner().model, 2, 4)
    assert with_data.selected.sparsity == 0.5


def test_recipes_know_heads_and_neurons():
    by_name = {"sparsity": 0.5, "granularity": "head", "context": "local", "criteria": "gate_importance"}
    with_option = {**by_name, "criteria": {"gate_importance": {"normalize": False}}}
    for step in (by_name, with_option):
        learn = learner()
        recipe = Recipe({"epochs": 2, "steps": [{"sparsify": step}]})
        learn.fit(recipe.epochs, 1e-5, cbs=recipe.callbacks())
        assert [(block.q.weight == 0).sum() for block in learn.model.blocks] == [30, 30]
    with pytest.raises(ValueError, match="heads"):
        Recipe({"epochs": 2, "steps": [{"sparsify": {"sparsity": 0.5, "granularity": "heads"}}]})


def test_sensitivity_prunes_one_attention_at_a_time():
    learn = learner()
    measured = sensitivity(learn, levels=(0.34, 0.5), granularity="head", context="local", progress=False)
    assert measured.layers == ("blocks.0", "blocks.1")
    assert measured.sizes == (240, 240)
    assert all(value != measured.baseline for row in measured.values for value in row)
    budget = measured.budget(0.4)
    assert set(budget) == {f"blocks.{block}.{name}.weight" for block in range(2) for name in "qkvo"}
    callback = SparsifyCallback(budget, "head", "local")
    learn.fit(1, 1e-3, cbs=callback)
    assert callback.sparsifier.sparsity == pytest.approx(0.4, abs=0.1)
    assert 0 < highest_sparsity(learn, 10.0, granularity="head") < 1


def test_lottery_tickets_of_heads_and_a_control_whose_heads_are_others(monkeypatch):
    seen = []
    shuffled = LotteryRun._shuffled
    monkeypatch.setattr(LotteryRun, "_shuffled", lambda *given: seen.append(shuffled(*given)) or seen[-1])
    learn = learner()
    lottery_ticket(learn, 0.5, rounds=1, granularity="head", context="local", controls=["shuffled"])
    for masks in (seen[0], {name: parameter != 0 for name, parameter in learn.model.named_parameters()}):
        for block in range(2):
            rows = [masks[f"blocks.{block}.{name}.weight"].any(1).tolist() for name in "qkv"]
            assert rows[0] == rows[1] == rows[2] == masks[f"blocks.{block}.o.weight"].any(0).tolist()
            assert sum(rows[0]) == 6
    assert not torch.equal(seen[0]["blocks.0.q.weight"].any(1), (learn.model.blocks[0].q.weight != 0).any(1))


def test_a_schedule_that_falls_and_a_second_fit():
    learn = learner(FusedGatedMlp)
    learn.fit(1, 1e-3, cbs=SparsifyCallback(0.25, "neuron", "local"))
    callback = SparsifyCallback(0.5, "neuron", "local")
    learn.fit(1, 1e-3, cbs=callback)
    assert callback.sparsifier.sparsity == 0.5


def test_the_comparison_counts_the_zeros_of_heads():
    learn = learner(Fused)
    dense = Net(Fused)
    learn.fit(1, 1e-3, cbs=SparsifyCallback(0.34, "head", "local"))
    masked = compare(dense, learn.model, learn.dls.one_batch()[0], repeats=3).forms[1]
    assert masked.nonzeros == sum(int(parameter.count_nonzero()) for parameter in learn.model.parameters())
