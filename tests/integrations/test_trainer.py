"""SparsifyCallback for transformers' Trainer, with the real library, on a model of a few hundred weights."""

import copy

import pytest
import torch
from conftest import misses_sparsity
from torch import nn

transformers = pytest.importorskip("transformers", reason="tests the Trainer of transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402

from sparsifai import Distil, Freeze, Quantize, Recipe, Regularize, Sparsify  # noqa: E402
from sparsifai.integrations.trainer import SparsifyCallback  # noqa: E402
from sparsifai.support.stand_in import StandIn  # noqa: E402

pytestmark = [misses_sparsity, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(autouse=True)
def _without_collections(monkeypatch):
    """accelerate collects garbage when a training begins, which takes longer than the training."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


class Net(nn.Module):
    """Takes and returns what models of transformers do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inputs, labels=None):
        logits = self.two(torch.relu(self.one(inputs)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


generator = torch.Generator().manual_seed(1)
DATA = [{"inputs": torch.randn(6, generator=generator), "labels": torch.tensor(each % 3)} for each in range(24)]
OTHERS = DATA[:6]


def hooked(model):
    return any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


class Check(TrainerCallback):
    """Looks for weights that are not zero where they are masked, and for hooks, whenever somebody could see them."""

    def __init__(self, callback):
        self.callback, self.looked = callback, 0

    def _look(self, model):
        if self.callback.manager is not None:
            named = dict(model.named_parameters())
            masks = self.callback.manager.masks
            assert all(not named[name][~mask.expand_as(named[name])].any() for name, mask in masks.items())
            self.looked += 1

    def on_step_begin(self, args, state, control, model=None, **rest):
        self._look(model)

    def on_prediction_step(self, args, state, control, model=None, **rest):
        self._look(model)
        assert not hooked(model)

    def on_save(self, args, state, control, model=None, **rest):
        self._look(model)
        assert not hooked(model)


def trainer(folder, callback, *others, model=None, evaluates="epoch", loss=None, **arguments):
    options = {
        "num_train_epochs": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "logging_steps": 2,
        "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.05, "log_level": "error",
    }  # fmt: skip
    options |= {"label_names": ["labels"], "eval_strategy": evaluates, **arguments}
    return Trainer(
        model or net(), TrainingArguments(str(folder), **options), train_dataset=DATA, eval_dataset=OTHERS,
        callbacks=[callback, Check(callback), *others], compute_loss_func=loss,
    )  # fmt: skip


def is_left_alone(trainer):
    model = trainer.model
    assert not hooked(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    step = vars(trainer.optimizer).get("step")  # schedulers of torch replace it, too
    assert not isinstance(step, StandIn)
    assert not hasattr(trainer.optimizer, "_sparsified_by")
    return True


def test_the_logs_have_the_measured_sparsity_and_the_end_is_exact(tmp_path):
    callback = SparsifyCallback(0.75, context="local", schedule="lin")
    training = trainer(tmp_path, callback)
    parameters = list(training.model.parameters())
    training.train()
    history = training.state.log_history
    losses, evaluations = ([each for each in history if name in each] for name in ("loss", "eval_loss"))
    assert [each["sparsity"] for each in losses] == pytest.approx([0.0625 * each for each in range(1, 13)], abs=0.01)
    assert [each["eval_sparsity"] for each in evaluations] == pytest.approx([0.1875, 0.375, 0.5625, 0.75], abs=0.01)
    assert training.evaluate()["eval_sparsity"] == callback.manager.sparsity == 0.75
    assert callback.report().selected.sparsity == 0.75
    assert training.callback_handler.callbacks[-2].looked >= 28
    assert all(one is other for one, other in zip(training.model.parameters(), parameters, strict=True))
    assert is_left_alone(training)


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **rest):
        self.seen.append(dict(logs))


def test_other_callbacks_see_the_sparsity_if_they_come_later(tmp_path):
    logs, callback = Logs(), SparsifyCallback(0.75, context="local")
    training = trainer(tmp_path, logs, num_train_epochs=2)
    training.callback_handler.callbacks = [
        each for each in training.callback_handler.callbacks if not isinstance(each, Check)
    ]
    training.callback_handler.callbacks.insert(0, callback)
    training.train()
    assert all("sparsity" in each or "eval_sparsity" in each for each in logs.seen)
    assert logs.seen[-1]["sparsity"] == 0.75


KINDS = {
    "weights": lambda: [Sparsify(0.6)],
    "RigL": lambda: [Sparsify(0.6, regrow="grad", every=2, initial_sparsity=0.3)],
    "straight-through": lambda: [Sparsify(0.6, straight_through=True, gradient_sparsity=0.2)],
    "all": lambda: [
        Sparsify(0.6, criteria="movement_pruning", layers="one"), Regularize(0.01), Freeze("two", end=0.4),
        Distil(net(7), features=["one"]), Quantize(0.2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_resumes_exactly(tmp_path, kind):
    arguments = {"save_strategy": "steps", "save_steps": 7, "evaluates": "no"}
    training = trainer(tmp_path, SparsifyCallback(KINDS[kind]()), **arguments)
    training.train()
    resumed = trainer(tmp_path, SparsifyCallback(KINDS[kind]()), model=net(3), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert all(map(torch.equal, training.model.parameters(), resumed.model.parameters()))
    assert is_left_alone(resumed)
    if kind != "weights":
        return
    (tmp_path / "checkpoint-21" / "sparsify_callback.pt").unlink()
    lost = trainer(tmp_path, SparsifyCallback(0.6), model=net(3), **arguments)
    with pytest.raises(
        ValueError, match="resumes at step 21, but there is no .*sparsify_callback.pt; pass resume_from="
    ):
        lost.train(resume_from_checkpoint=str(tmp_path / "checkpoint-21"))
    wrong = SparsifyCallback(0.6, resume_from=tmp_path / "checkpoint-7")
    with pytest.raises(ValueError, match="is that of another training"):
        trainer(tmp_path, wrong, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))


class Seen(TrainerCallback):
    """Keeps the norms that gradients had when they were clipped, and what the gradients were in the step."""

    def __init__(self, callback):
        self.callback, self.norms = callback, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
        manager = self.callback.manager
        gradients = {name: each.grad for name, each in model.named_parameters()}
        assert all(not gradients[name][~mask].any() for name, mask in manager.masks.items())
        self.norms.append(torch.stack([each.norm() for each in gradients.values()]).norm().item())


@pytest.mark.parametrize("parts", [1, 3])
def test_masked_gradients_do_not_count_when_gradients_are_clipped(tmp_path, parts):
    callback = SparsifyCallback(0.9, schedule="one_shot")
    seen = Seen(callback)
    training = trainer(tmp_path, callback, seen, max_grad_norm=0.01, gradient_accumulation_steps=parts)
    training.train()
    assert seen.norms == pytest.approx([0.01] * len(seen.norms), rel=1e-3)  # it is the norm of those that are left
    assert callback.manager.steps_done == callback.manager.steps == len(seen.norms) == (24 if parts == 1 else 8)


def test_the_steps_are_those_of_a_plain_loop(tmp_path):
    parts = [Sparsify(0.6, regrow="grad", every=2, schedule="lin"), Regularize(0.02), Distil(net(7), features=["one"])]
    callback = SparsifyCallback([*parts, Quantize(0.5)])
    training = trainer(tmp_path, callback, num_train_epochs=2, max_grad_norm=0.1, lr_scheduler_type="constant")
    model = copy.deepcopy(training.model)
    batches = []

    forward = Net.forward

    def noted(self, inputs, labels=None):
        if self is training.model and self.training:
            batches.append((inputs, labels))
        return forward(self, inputs, labels)

    Net.forward = noted
    try:
        training.train()
    finally:
        Net.forward = forward
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.0)
    manager = Recipe({"epochs": 2, "steps": [
        {"sparsify": {"sparsity": 0.6, "regrow": "grad", "every": 2, "schedule": "lin"}},
        {"regularize": {"weight": 0.02}}, {"distil": {"features": ["one"]}}, {"quantize": {"start": "50%"}},
    ]}).manager(model, optimizer, 6, teacher=net(7))  # fmt: skip
    for inputs, labels in batches:
        optimizer.zero_grad()
        output = model(inputs, labels)
        manager.loss(output.loss, output, {"inputs": inputs}).backward()
        manager.before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        manager.step()
    assert manager.is_done
    for one, other in zip(model.parameters(), training.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Counts(Net):
    """Divides the loss by the number of labels in all batches of a step, as language models do."""

    def forward(self, inputs, labels=None, num_items_in_batch=None, **rest):
        output = super().forward(inputs, labels)
        if num_items_in_batch is None:
            return output
        return ModelOutput(loss=output.loss * len(labels) / num_items_in_batch, logits=output.logits)


def test_penalties_and_a_teacher_have_their_share_in_a_loss_that_several_batches_divide(tmp_path):
    weights = []
    for kind in (Net, Counts):
        torch.manual_seed(0)
        callback = SparsifyCallback([Sparsify(0.5), Regularize(0.1), Distil(net(7), 0.7)])
        training = trainer(tmp_path, callback, model=kind(), evaluates="no", gradient_accumulation_steps=3)
        assert training.model_accepts_loss_kwargs == (kind is Counts)
        training.train()
        weights.append(list(training.model.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


class Metric:
    """A metric that is best at the first evaluation, and second best at the last but one."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, predictions):
        return {"score": next(self.values)}


def test_the_best_model_is_looked_for_among_the_sparse_ones(tmp_path):
    callback = SparsifyCallback(0.6)  # its schedule ends with the third epoch
    training = trainer(
        tmp_path, callback, EarlyStoppingCallback(1), num_train_epochs=6, save_strategy="epoch", save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    training.compute_metrics = Metric([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    training.train()
    # The masks are final after 27 of 36 steps, so in the fifth epoch; its evaluation is the first that counts.
    assert training.state.best_model_checkpoint.endswith("checkpoint-30")
    assert training.state.best_metric == 0.5
    assert callback.manager.steps_done == 36  # it has stopped after the sixth, not before
    zeros = sum(int((each == 0).sum()) for each in training.model.parameters())
    assert zeros == round(0.6 * (96 + 48))


def test_without_an_evaluation_of_the_sparse_model_the_last_one_is_kept(tmp_path):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            control.should_training_stop = state.global_step == 23

    callback = SparsifyCallback(0.6, schedule="lin")
    training = trainer(
        tmp_path, callback, Ends(), evaluates="steps", eval_steps=11, save_strategy="steps", save_steps=11,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no evaluation came after the masks had their final form"):
        training.train()
    assert callback.manager.sparsity == pytest.approx(0.6, abs=0.01)
    assert (training.model.one.weight == 0).sum() + (training.model.two.weight == 0).sum() == round(0.6 * 144)


def test_bfloat16(tmp_path):
    callback = SparsifyCallback([Sparsify(0.6, straight_through=True), Distil(net(7))])
    trainer(tmp_path, callback, bf16=True).train()
    assert callback.manager.sparsity == pytest.approx(0.6, abs=0.01)


class Stops(TrainerCallback):
    """Interrupts a training, at an event and a step."""

    def __init__(self, event, step):
        self.event, self.step = event, step

        def stop(args, state, control, **rest):
            if state.global_step == step:
                raise KeyboardInterrupt

        setattr(self, event, stop)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_an_interrupted_training_leaves_a_sparse_model_and_the_next_one_begins_anew(tmp_path, event):
    callback = SparsifyCallback([Sparsify(0.6), Freeze("two")])
    stop = Stops(event, 9)
    training = trainer(tmp_path, callback, stop)
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert callback.manager.sparsity > 0.2
    # A hook is there from the beginning of a step to the end of its forward.
    assert len(training.model._forward_hooks) == (event == "on_step_begin")
    callback.close()
    callback.close()
    assert is_left_alone(training) or event == "on_pre_optimizer_step"
    training.remove_callback(stop)
    training.train()
    assert is_left_alone(training)
    assert callback.manager.sparsity == pytest.approx(0.6, abs=0.01)


def test_a_recipe_is_given_the_batches_that_its_criteria_need(tmp_path):
    recipe = Recipe({"epochs": 4, "steps": [{"sparsify": {"sparsity": 0.5, "criteria": "obs", "every": 4}}]})
    batch = {name: torch.stack([each[name] for each in DATA]) for name in DATA[0]}
    callback = SparsifyCallback(recipe, calibration=[batch])
    trainer(tmp_path, callback).train()
    assert callback.manager.sparsity == pytest.approx(0.5, abs=0.01)


def test_early_errors(tmp_path):
    recipe = Recipe({"epochs": 3, "steps": [{"sparsify": {"sparsity": 0.5}}]})
    with pytest.raises(ValueError, match="the recipe says 3 epochs, but the training has 4"):
        trainer(tmp_path, SparsifyCallback(recipe)).train()
    with pytest.raises(TypeError, match="a recipe or parts say all that is pruned; write 0.5, context into them"):
        SparsifyCallback(recipe, 0.5, context="erk")
    with pytest.raises(TypeError, match="teacher= is for a recipe"):
        SparsifyCallback(0.5, teacher=net())
    with pytest.raises(ValueError, match="there are no parts"):
        SparsifyCallback([])
    with pytest.raises(ValueError, match="pass 0.5 for 50 %"):
        SparsifyCallback(50)
    with pytest.raises(TypeError, match=r"SparsifyCallback: give a Recipe, not its file: Recipe.load\('a.yaml'\)"):
        SparsifyCallback("a.yaml")
    with pytest.raises(ValueError, match="a compiled model does not run what Quantize puts around its layers"):
        trainer(tmp_path, SparsifyCallback([Quantize()]), torch_compile=True).train()
    with pytest.raises(ValueError, match="there is no manager before a training"):
        SparsifyCallback(0.5).report()
    with pytest.raises(ValueError, match="two SparsifyCallbacks in one Trainer would undo each other"):
        trainer(tmp_path, SparsifyCallback(0.5), SparsifyCallback(0.5)).train()
    with pytest.raises(TypeError, match="has no optimizer that accelerate has prepared, but NoneType"):
        SparsifyCallback(0.5).on_train_begin(None, None, None)
    with pytest.raises(RuntimeError, match="distil adds to the loss; call loss = manager.loss"):
        trainer(tmp_path, SparsifyCallback(Distil(net(7))), loss=lambda output, *_, **__: output.logits.mean()).train()
