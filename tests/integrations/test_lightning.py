"""SparsifyCallback for Lightning's Trainer, with the real library, on a tiny module."""

import warnings

import pytest
import torch
from conftest import misses_sparsity
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="tests the Trainer of lightning")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402

from sparsifai import Distil, Freeze, Quantize, Recipe, Regularize, Sparsify  # noqa: E402
from sparsifai.integrations.lightning import SparsifyCallback  # noqa: E402
from sparsifai.support.stand_in import StandIn  # noqa: E402

pytestmark = [
    misses_sparsity,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*srun"),
]

generator = torch.Generator().manual_seed(1)
DATA = TensorDataset(torch.randn(24, 6, generator=generator), torch.arange(24) % 3)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Module(pl.LightningModule):
    def __init__(self, seed=0, scores=(), callback=None):
        super().__init__()
        self.net, self.scores, self.norms, self.sparse = net(seed), list(scores), [], callback

    def training_step(self, batch, number):
        output = self.net(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1])
        return loss if self.sparse is None else self.sparse.loss(loss, output, batch[0])

    def on_before_zero_grad(self, optimizer):
        self.norms.append([None if each.grad is None else each.grad.clone() for each in self.parameters()])

    def validation_step(self, batch, number):
        self.log("loss_of_validation", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        if self.scores and not self.trainer.sanity_checking:
            self.log("score", self.scores[self.trainer.current_epoch])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)]


def hooked(module):
    return any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


class Check(Callback):
    """Looks for weights that are not zero where they are masked, and for hooks, whenever somebody could see them."""

    def __init__(self, callback):
        self.callback, self.looked = callback, 0

    def _look(self, module):
        if self.callback.manager is not None:
            named = {name.removeprefix("net."): each for name, each in module.named_parameters()}
            masks = {name.removeprefix("net."): mask for name, mask in self.callback.manager.masks.items()}
            assert all(not named[name][~mask.expand_as(named[name])].any() for name, mask in masks.items())
            self.looked += 1

    def on_train_batch_start(self, trainer, module, *rest):
        self._look(module)

    def on_validation_batch_start(self, trainer, module, *rest):
        self._look(module)
        assert not hooked(module)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self._look(module)
        assert not hooked(module)


class Logs(Callback):
    def __init__(self):
        self.seen, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *rest):
        if "sparsity" in trainer.logged_metrics:
            self.seen.append(float(trainer.logged_metrics["sparsity"]))

    def on_validation_end(self, trainer, module):
        if "val_sparsity" in trainer.callback_metrics:
            self.validated.append(float(trainer.callback_metrics["val_sparsity"]))


def fit(callback, *others, module=None, checkpoint=None, kind=pl.Trainer, validates=True, **options):
    options = {"max_epochs": 4, "log_every_n_steps": 2, "num_sanity_val_steps": 1, **options}
    trainer = kind(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in others),
        callbacks=[*others, callback, Check(callback)], **options,
    )  # fmt: skip
    module = module or Module()
    trainer.fit(
        module,
        DataLoader(DATA, 4),
        DataLoader(DATA, 12) if validates else None,
        ckpt_path=checkpoint,
        weights_only=True,
    )
    return trainer, module


def is_left_alone(trainer, module):
    assert not hooked(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(isinstance(vars(each).get("step"), StandIn) for each in trainer.optimizers)
    return True


def test_the_logs_have_the_measured_sparsity_and_the_end_is_exact():
    callback, logs = SparsifyCallback(0.75, context="local", schedule="lin"), Logs()
    trainer, module = fit(callback, logs)
    assert logs.seen == pytest.approx([0.0625 * (each // 2) for each in range(2, 24)], abs=0.01)
    assert float(trainer.logged_metrics["sparsity"]) == 0.75
    assert logs.validated == pytest.approx([0.1875, 0.375, 0.5625, 0.75], abs=0.01)
    assert callback.manager.sparsity == callback.report().selected.sparsity == 0.75
    assert trainer.callbacks[-1].looked > 28
    assert is_left_alone(trainer, module)


KINDS = {
    "weights": lambda: [Sparsify(0.6)],
    "RigL": lambda: [Sparsify(0.6, regrow="grad", every=2, initial_sparsity=0.3)],
    "straight-through": lambda: [Sparsify(0.6, straight_through=True, gradient_sparsity=0.2)],
    "all": lambda: [
        Sparsify(0.6, criteria="movement_pruning", layers="net.0"), Regularize(0.01), Freeze("net.2", end=0.4),
        Distil(net(7), features={"net.0": "0"}), Quantize(0.2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_resumes_exactly(tmp_path, kind):
    def trained(seed=0, checkpoint=None):
        callback = SparsifyCallback(KINDS[kind]())
        saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1)
        module = Module(seed, callback=callback)
        return fit(callback, saves, module=module, checkpoint=checkpoint, validates=False)

    _, whole = trained()
    trainer, resumed = trained(3, tmp_path / "step=12.ckpt")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert is_left_alone(trainer, resumed)


@pytest.mark.parametrize("parts", [1, 2])
def test_masked_gradients_do_not_count_when_gradients_are_clipped(parts):
    callback = SparsifyCallback(0.9, schedule="one_shot")
    _, module = fit(callback, gradient_clip_val=0.01, accumulate_grad_batches=parts)
    norms = [
        torch.stack([each.norm() for each in gradients]).norm()
        for gradients in module.norms
        if gradients[0] is not None
    ]
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    assert callback.manager.is_done
    assert callback.manager.steps == 24 // parts


def test_the_steps_are_those_of_a_plain_loop():
    given = {"sparsity": 0.6, "regrow": "grad", "every": 2, "schedule": "lin"}
    parts = [Sparsify(**given), Regularize(0.02), Distil(net(7), features={"net.0": "0"}), Quantize(0.5)]
    callback = SparsifyCallback(parts)
    _, module = fit(callback, module=Module(callback=callback), gradient_clip_val=0.1)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
    steps = [{"sparsify": given}, {"regularize": {"weight": 0.02}}, {"distil": {"features": ["0"]}}]
    steps.append({"quantize": {"start": "50%"}})
    manager = Recipe({"epochs": 4, "steps": steps}).manager(model, optimizer, 6, teacher=net(7))
    for _ in range(4):
        for inputs, labels in DataLoader(DATA, 4):
            optimizer.zero_grad()
            output = model(inputs)
            manager.loss(nn.functional.cross_entropy(output, labels), output, inputs).backward()
            manager.before_step()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            manager.step()
        scheduler.step()
    for one, other in zip(model.parameters(), module.net.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_best_model_and_early_stopping_ignore_epochs_before_the_masks_are_final(tmp_path):
    callback = SparsifyCallback(0.6)  # its schedule ends with three quarters
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_top_k=1)
    early = EarlyStopping("score", mode="max", patience=1, stopping_threshold=0.85)
    trainer, module = fit(callback, best, early, module=Module(scores=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), max_epochs=6)
    assert best.best_model_path.endswith("epoch=4.ckpt")
    assert float(best.best_model_score) == 0.5
    assert trainer.current_epoch == 6
    assert early.stopping_threshold == 0.85
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert sum(int((each == 0).sum()) for each in saved.values()) == round(0.6 * (96 + 48))


def test_without_a_validation_of_the_sparse_model_there_is_no_best_one(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="loss_of_validation")
    with pytest.warns(UserWarning, match="no validation came after the masks had their final form"):
        fit(SparsifyCallback(0.6, schedule="lin"), best, max_steps=23, max_epochs=-1, check_val_every_n_epoch=2)
    assert best.best_model_path == ""


def test_bfloat16():
    callback = SparsifyCallback([Sparsify(0.6, straight_through=True), Distil(net(7))])
    fit(callback, module=Module(callback=callback), precision="bf16-mixed")
    assert callback.manager.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("event", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
def test_an_interrupted_training_leaves_a_sparse_model_and_nothing_else(event):
    class Stops(Callback):
        pass

    def stop(self, trainer, *rest):
        if trainer.global_step == 9:
            raise OSError("the disk is full")

    setattr(Stops, event, stop)
    callback, module = SparsifyCallback([Sparsify(0.6), Freeze("net.2")]), Module()
    with pytest.raises(OSError, match="the disk is full"):
        fit(callback, Stops(), module=module)
    assert callback.manager.sparsity > 0.2
    assert all(parameter.requires_grad for parameter in module.parameters())
    trainer, _ = fit(callback, module=module)
    assert is_left_alone(trainer, module)
    assert callback.manager.sparsity == pytest.approx(0.6, abs=0.01)


def test_the_package_pytorch_lightning():
    other = pytest.importorskip("pytorch_lightning", reason="tests the package pytorch_lightning")
    from sparsifai.integrations.pytorch_lightning import SparsifyCallback as Its

    class ItsModule(other.LightningModule):
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net, self.sparse = net(), None

    callback = Its(0.6)
    trainer = other.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        enable_checkpointing=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(ItsModule(), DataLoader(DATA, 4))
    assert callback.manager.sparsity == pytest.approx(0.6, abs=0.01)


class TwoOptimizers(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(each.parameters(), 0.1) for each in (self.net[0], self.net[2])]

    automatic_optimization = False


def test_early_errors():
    recipe = Recipe({"epochs": 3, "steps": [{"sparsify": {"sparsity": 0.5}}]})
    with pytest.raises(ValueError, match="the recipe says 3 epochs, but the training has 4"):
        fit(SparsifyCallback(recipe))
    with pytest.raises(ValueError, match="there is no manager before a training"):
        SparsifyCallback(0.5).report()
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SparsifyCallback`"):
        fit(SparsifyCallback(0.5), SparsifyCallback(0.5))
    with pytest.raises(ValueError, match="the module has 2 optimizers"):
        fit(SparsifyCallback(0.5), module=TwoOptimizers())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="the training has no end"):
            fit(SparsifyCallback(0.5), max_epochs=-1)
    with pytest.raises(RuntimeError, match="regularize adds to the loss"):
        fit(SparsifyCallback(Regularize(0.1)))
