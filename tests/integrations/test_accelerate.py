"""manager_of for loops with accelerate, with the real library."""

import pytest
import torch
from conftest import misses_sparsity
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate", reason="tests loops with accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

from sparsifai import Distil, Freeze, Quantize, Recipe, Regularize, Sparsify  # noqa: E402
from sparsifai.integrations.accelerate import manager_of  # noqa: E402

pytestmark = misses_sparsity

generator = torch.Generator().manual_seed(1)
DATA = TensorDataset(torch.randn(24, 6, generator=generator), torch.arange(24) % 3)
EPOCHS = 3


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Loop:
    """A loop as accelerate's users write it."""

    def __init__(self, parts, accumulate=1, seed=0, clip=None, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
        model = net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        loader = DataLoader(DATA, 4)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.manager = manager_of(
            self.accelerator, self.model, self.optimizer, parts, epochs=EPOCHS, steps_per_epoch=6 // accumulate
        )
        self.clip, self.norms = clip, []

    def epoch(self):
        for inputs, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                output = self.model(inputs)
                loss = self.manager.loss(nn.functional.cross_entropy(output, labels), output, inputs)
                self.accelerator.backward(loss)
                if self.clip and self.accelerator.sync_gradients:
                    self.manager.before_step()
                    self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip).item())
                self.manager.step()
                self.optimizer.zero_grad()
            named = dict(self.accelerator.unwrap_model(self.model).named_parameters())
            masks = self.manager.masks
            assert all(not named[name][~mask.expand_as(named[name])].any() for name, mask in masks.items())


KINDS = {
    "RigL": lambda: [Sparsify(0.6, regrow="grad", every=2, initial_sparsity=0.3)],
    "straight-through": lambda: [Sparsify(0.6, straight_through=True, gradient_sparsity=0.2)],
    "all": lambda: [
        Sparsify(0.6, layers="0"), Regularize(0.01), Freeze("2", end=0.4), Distil(net(7), features=["0"]),
        Quantize(0.2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_resumes_exactly_from_the_states_of_an_accelerator(tmp_path, kind):
    whole = Loop(KINDS[kind]())
    for epoch in range(EPOCHS):
        if epoch == 1:
            whole.accelerator.save_state(tmp_path)
        whole.epoch()
    assert whole.manager.is_done
    resumed = Loop(KINDS[kind](), seed=3)
    resumed.accelerator.load_state(tmp_path)
    assert resumed.manager.steps_done == 6
    resumed.epoch()
    resumed.epoch()
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    assert whole.manager.sparsity == pytest.approx(0.6, abs=0.01)


def test_gradients_add_up_and_masked_ones_do_not_count_when_they_are_clipped():
    loop = Loop([Sparsify(0.6, schedule="one_shot")], accumulate=2, clip=1e9)
    for _ in range(EPOCHS):
        loop.epoch()
    assert loop.manager.is_done
    assert loop.manager.steps == 9 == len(loop.norms)
    plain = Loop([Sparsify(0.6, schedule="one_shot")], accumulate=2)
    for _ in range(EPOCHS):
        plain.epoch()
    assert all(map(torch.equal, loop.model.parameters(), plain.model.parameters()))


def scaled_steps(scaler, clip):
    """Steps of a model whose gradients a GradScaler scales, as accelerate does on a GPU in float16."""
    accelerator = Accelerator(cpu=True)
    model = net()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), 0.1))
    optimizer = AcceleratedOptimizer(optimizer.optimizer, scaler=scaler)
    part = Sparsify(0.6, criteria="movement_pruning", straight_through=True, decay=0.1, schedule="lin")
    manager = manager_of(accelerator, model, optimizer, part, epochs=1, steps_per_epoch=8)
    for number in range(8):
        inputs, labels = DATA[4 * (number % 6) : 4 * (number % 6) + 4]
        loss = nn.functional.cross_entropy(model(inputs), labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip:
            manager.before_step()
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        manager.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize("clip", [False, True])
def test_scaled_gradients_give_the_same_masks_and_weights(clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=3)
    assert all(map(torch.equal, scaled_steps(scaler, clip), scaled_steps(None, clip)))


def test_early_errors():
    accelerator, model = Accelerator(cpu=True), net()
    plain = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="must be one that accelerator.prepare has returned, not SGD"):
        manager_of(accelerator, model, plain, 0.5, epochs=1, steps_per_epoch=1)
    optimizer = accelerator.prepare(plain)
    with pytest.raises(ValueError, match="pass epochs="):
        manager_of(accelerator, model, optimizer, 0.5, steps_per_epoch=1)
    recipe = Recipe({"epochs": 3, "steps": [{"sparsify": {"sparsity": 0.5}}]})
    with pytest.raises(ValueError, match="the recipe says 3 epochs, but the training has 4"):
        manager_of(accelerator, model, optimizer, recipe, epochs=4, steps_per_epoch=1)
    manager = manager_of(accelerator, model, optimizer, recipe, steps_per_epoch=1)
    with pytest.raises(TypeError, match="calls its GradScaler itself"):
        manager.step(torch.amp.GradScaler("cpu"))
