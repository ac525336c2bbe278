"""A teacher in a training loop of one's own, and the registry of losses."""

import copy
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import small_net
from interrupts import LIBRARY, interrupted, places
from torch import nn

from sparsifai import Distillation, distillation_losses, relational, similarity, soft_targets


@pytest.fixture
def nets():
    torch.manual_seed(7)
    return small_net(), small_net()


def batch(number=4):
    return torch.randn(number, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def hooks_of(*models):
    return [hook for model in models for module in model.modules() for hook in module._forward_hooks.values()]


def loss_of(distillation, model, inputs, t=0.5, loss=0.0):
    distillation.begin(model)
    with distillation.recording(model):
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return distillation.loss(torch.tensor(loss), output, inputs, t)


# --- In a loop ----------------------------------------------------------------------------------------------------


def test_the_loss_of_a_batch(nets):
    model, teacher = nets
    x = batch()
    distillation = Distillation(
        teacher, 0.8, 2.0, features={"0": "4"}, feature_weight=3.0, feature_loss="similarity", schedule="lin"
    )
    found = loss_of(distillation, model, x, t=0.25, loss=5.0)
    sage = copy.deepcopy(teacher).eval()
    outputs = soft_targets(model(x), sage(x), 2.0, 1)
    expected = 0.8 * 5 + 0.2 * outputs + 0.75 * similarity(model[0](x), sage[:5](x))
    torch.testing.assert_close(found, expected)
    assert not hooks_of(model, teacher)
    assert teacher.training


def test_at_weight_zero_the_teacher_does_not_run(nets):
    model, teacher = nets
    teacher.register_forward_pre_hook(lambda module, inputs: pytest.fail("it ran"))
    own = torch.tensor(2.0)
    assert Distillation(teacher, schedule="lin").loss(own, model(batch()), batch(), 0.0) is own


@pytest.mark.fastai
def test_a_loop_trains_the_model_as_the_callback_does(make_learner, nets):
    pytest.importorskip("fastai", reason="DistillCallback is fastai's")
    from sparsifai import DistillCallback

    model, teacher = nets
    arguments = {"weight": 0.4, "features": ["1", "4"], "feature_loss": "relational", "schedule": "cos"}
    learn = make_learner(copy.deepcopy(model), opt_func=torch_sgd(), steps=3)
    batches = []
    learn.fit(2, 0.1, cbs=[kept(batches), DistillCallback(teacher, **arguments)])
    model.train()
    distillation, optimizer = Distillation(teacher, **arguments), torch.optim.SGD(model.parameters(), 0.1)
    distillation.begin(model)
    for step, (x, y) in enumerate(batches):
        with distillation.recording(model):
            logits = model(x)
        distillation.loss(F.cross_entropy(logits, y), logits, x, step / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 6
    for ours, theirs in zip(model.parameters(), learn.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def torch_sgd():
    from fastai.optimizer import OptimWrapper

    return partial(OptimWrapper, opt=torch.optim.SGD)


def kept(batches):
    from fastai.callback.core import Callback

    class Keep(Callback):
        run_valid = False

        def before_batch(self):
            batches.append((self.x, self.y))

    return Keep()


def test_an_interrupt_at_any_line_leaves_no_hook(nets):
    model, teacher = nets
    distillation = Distillation(teacher, features=["0", "4"])
    distillation.begin(model)

    def step():
        with distillation.recording(model):
            output = model(batch())
        distillation.loss(torch.tensor(1.0), output, batch(), 0.0)

    step()
    left = []
    for at in places(interrupted(step).lines, 60):
        where = interrupted(step, at, LIBRARY).where
        if hooks_of(model, teacher) or not teacher.training or not torch.is_grad_enabled():
            left.append(where)
    assert left == []


def test_a_model_that_fails_keeps_no_hook(nets):
    model, teacher = nets
    distillation = Distillation(teacher, features=["0"])
    with pytest.raises(RuntimeError), distillation.recording(model):
        model(torch.zeros(1, 7, 8, 8))
    assert not hooks_of(model)


def test_a_copy_shares_the_teacher_and_a_pickled_one_has_none(nets):
    model, teacher = nets
    distillation = Distillation(teacher, features=["0"])
    distillation.start(model)
    assert copy.deepcopy(distillation).teacher is teacher
    pickled = pickle.loads(pickle.dumps(distillation))
    distillation.release()
    assert pickled.features == {"0": "0"}
    with pytest.raises(ValueError, match="has no teacher"):
        pickled.begin(model)


# --- Dictionaries of inputs, outputs with logits ------------------------------------------------------------------


@dataclass
class Output:
    """An output as in transformers: with labels, the loss comes first."""

    loss: torch.Tensor
    logits: torch.Tensor


class OfTokens(nn.Module):
    """Tokens -> logits (batch, tokens, classes), as a dictionary or an object."""

    def __init__(self, as_dictionary=False):
        super().__init__()
        self.embedding, self.head, self.as_dictionary = nn.Embedding(10, 6), nn.Linear(6, 3), as_dictionary

    def forward(self, input_ids, attention_mask=None):
        logits = self.head(self.embedding(input_ids))
        return {"loss": logits.sum(), "logits": logits} if self.as_dictionary else Output(logits.sum(), logits)


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_logits_of_tokens_are_compared_where_no_padding_is(as_dictionary):
    torch.manual_seed(0)
    model, teacher = OfTokens(as_dictionary), OfTokens()
    inputs = {"input_ids": torch.randint(10, (2, 5)), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    distillation = Distillation(teacher, 1.0)
    found = loss_of(distillation, model, inputs)
    kept = inputs["attention_mask"].bool()
    ours, theirs = (net.head(net.embedding(inputs["input_ids"]))[kept] for net in (model, teacher))
    torch.testing.assert_close(found, soft_targets(ours, theirs, 4.0, 1))
    found.backward()
    assert model.head.weight.grad.isfinite().all()
    without = {"input_ids": inputs["input_ids"]}
    ours, theirs = (net.head(net.embedding(inputs["input_ids"])) for net in (model, teacher))
    torch.testing.assert_close(loss_of(distillation, model, without), soft_targets(ours, theirs, 4.0, -1))


class OfAnswers(nn.Module):
    """Tokens -> logits of where an answer starts and ends, (batch, tokens) each."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 2)

    def forward(self, input_ids):
        start, end = self.head(self.embedding(input_ids)).unbind(-1)
        return {"loss": start.sum(), "start_logits": start, "end_logits": end}


def test_all_logits_are_compared_if_there_are_several():
    torch.manual_seed(0)
    model, teacher, tokens = OfAnswers(), OfAnswers(), torch.randint(10, (3, 5))
    ours, theirs = model(tokens), teacher(tokens)
    expected = [soft_targets(ours[name], theirs[name]) for name in ("start_logits", "end_logits")]
    found = loss_of(Distillation(teacher, 1.0), model, tokens)
    torch.testing.assert_close(found, sum(expected) / 2)
    assert not torch.isclose(expected[0], expected[1])


def test_a_model_that_returns_a_tensor_may_have_a_teacher_that_returns_logits():
    model, teacher, tokens = OfTokens(), OfTokens(), torch.randint(10, (3, 5))
    distillation = Distillation(teacher, 1.0, axis=2)
    expected = soft_targets(model(tokens).logits, teacher(tokens).logits, axis=2)
    torch.testing.assert_close(distillation.loss(torch.tensor(0.0), model(tokens).logits, tokens, 0.0), expected)


def test_other_losses_of_logits_are_given_no_mask():
    model, teacher = OfTokens(), OfTokens()
    inputs = {"input_ids": torch.randint(10, (3, 5)), "attention_mask": torch.ones(3, 5)}
    found = loss_of(Distillation(teacher, 1.0, loss="relational"), model, inputs)
    torch.testing.assert_close(found, relational(model(**inputs).logits, teacher(**inputs).logits))


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the nets are of transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, teacher = (transformers.BertForSequenceClassification(config) for _ in range(2))
    labels = torch.tensor([0, 2])
    inputs = {"input_ids": torch.randint(20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    layer = "bert.encoder.layer.1"
    distillation = Distillation(teacher, 0.5, features=layer, feature_loss="attention_transfer", feature_weight=7.0)
    found = loss_of(distillation, model, {**inputs, "labels": labels}, loss=2.0)
    with torch.no_grad():
        outputs = [net(**inputs, output_hidden_states=True) for net in (model, teacher)]
    expected = 1 + 0.5 * soft_targets(*(each.logits for each in outputs))
    expected += 7 * distillation_losses["attention_transfer"](*(each.hidden_states[-1] for each in outputs))
    torch.testing.assert_close(found.detach(), expected)


# --- Losses by name, by function, registered ----------------------------------------------------------------------


def test_the_registry():
    assert list(distillation_losses)[:2] == ["mean_squared_error", "soft_targets"]
    assert {"relational", "similarity", "attention_transfer"} <= set(distillation_losses)
    assert distillation_losses["mean_squared_error"] is F.mse_loss


@pytest.mark.parametrize("name", ["mean_squared_error", "soft_targets", "relational", "similarity"])
def test_a_loss_of_outputs_by_name_and_by_function(nets, name):
    model, teacher = nets
    function = distillation_losses[name]
    by_name, by_function = (loss_of(Distillation(teacher, 1.0, loss=each), model, batch()) for each in (name, function))
    assert by_name == by_function
    torch.testing.assert_close(by_name, function(model(batch()), copy.deepcopy(teacher).eval()(batch())))


def test_options_that_a_partial_sets_come_before_those_of_the_distillation(nets):
    model, teacher = nets
    half, own = (
        loss_of(Distillation(teacher, 1.0, **options), model, batch())
        for options in ({"temperature": 2.0}, {"loss": partial(soft_targets, temperature=2.0), "temperature": 9.0})
    )
    assert half == own


def test_soft_targets_of_features_have_the_temperature(nets):
    model, teacher = nets
    distillation = Distillation(teacher, 0.0, 2.0, features="12", feature_loss="soft_targets")
    last = Distillation(teacher, 1.0, 2.0)
    assert loss_of(distillation, model, batch()) == loss_of(last, model, batch())


def test_a_registered_loss_works_by_its_name(nets, monkeypatch):
    model, teacher = nets
    monkeypatch.setattr(distillation_losses, "_functions", dict(distillation_losses._functions))

    @distillation_losses.register
    def mean_absolute_error(student, teacher, power=1):
        return (student - teacher).abs().pow(power).mean()

    found = loss_of(
        Distillation(teacher, 1.0, loss="mean_absolute_error", features="0", feature_loss="mean_absolute_error"),
        model, batch(),
    )  # fmt: skip
    sage = copy.deepcopy(teacher).eval()
    expected = F.l1_loss(model(batch()), sage(batch())) + F.l1_loss(model[0](batch()), sage[0](batch()))
    torch.testing.assert_close(found, expected)


def test_features_with_other_channels_are_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(108, 3))
    teacher = nn.Sequential(nn.Conv2d(2, 5, 5), nn.Flatten(), nn.Linear(80, 3))
    for name in ("relational", "similarity", "attention_transfer"):
        found = loss_of(Distillation(teacher, 0.0, features="0", feature_loss=name), model, batch())
        torch.testing.assert_close(found, distillation_losses[name](model[0](batch()), teacher[0](batch())))
    with pytest.raises(ValueError, match="such as 'similarity'"):
        loss_of(Distillation(teacher, features="0"), model, batch())
