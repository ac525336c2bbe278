"""The moments of pruned weights are found in any optimizer and wrapper, or the optimizer is refused."""

import pytest
import torch
from torch import nn

from sparsifai import Sparsifier


class Wrapper:
    """Holds an optimizer under a name that nobody knows."""

    def __init__(self, inner):
        self.engine, self.param_groups, self.state = inner, inner.param_groups, {}

    def step(self):
        self.engine.step()

    def zero_grad(self):
        self.engine.zero_grad()


class InList(Wrapper):
    def __init__(self, inner):
        self.engines, self.param_groups, self.state = {"all": [inner]}, inner.param_groups, {}

    def step(self):
        self.engines["all"][0].step()

    def zero_grad(self):
        self.engines["all"][0].zero_grad()


class ByItsStep(Wrapper):
    def __init__(self, inner):
        self.step, self.zero_grad = inner.step, inner.zero_grad
        self.param_groups, self.state = inner.param_groups, {}


class SlowOutside(Wrapper):
    """Keeps slow weights in its own state, and the optimizer as `optimizer`."""

    def __init__(self, inner):
        super().__init__(inner)
        self.optimizer = self.engine
        self.slow = {p: {"slow": p.detach().clone()} for group in inner.param_groups for p in group["params"]}
        self.state = self.slow

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        for parameter, state in self.slow.items():
            state["slow"].lerp_(parameter, 0.5)
            parameter.copy_(state["slow"])


def lookahead(inner):
    return pytest.importorskip("timm.optim", reason="timm has this optimizer").Lookahead(inner, k=2)


WRAPPERS = {
    "none": lambda inner: inner,
    "timm's Lookahead": lookahead,
    "another name": Wrapper,
    "a list": InList,
    "a bound method": ByItsStep,
    "two wrappers": lambda inner: Wrapper(InList(inner)),
    "a state of its own": SlowOutside,
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.1),
}


class ComplexNet(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 4, dtype=dtype)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x.to(self.one.weight.dtype)))).abs()


def net_of(dtype):
    if dtype.is_complex:
        return ComplexNet(dtype)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def train(model, optimizer, sparsifier=None, steps=3):
    for _ in range(steps):
        dtype = next(model.parameters()).dtype
        optimizer.zero_grad()
        model(torch.randn(5, 6, dtype=torch.float32 if dtype.is_complex else dtype)).square().sum().backward()
        if sparsifier is not None:
            sparsifier.mask_gradients()
        optimizer.step()


def held(sparsifier):
    model = sparsifier.model
    masks = [(model.get_parameter(name), mask) for name, mask in sparsifier.masks.items()]
    return all(bool((parameter[~mask] == 0).all()) for parameter, mask in masks)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_are_found_in_any_wrapper(kind, wrapper):
    model = net_of(torch.float32)
    optimizer = WRAPPERS[wrapper](OPTIMIZERS[kind](model.parameters()))
    train(model, optimizer)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.9)
    sparsifier.mask_moments(optimizer)
    train(model, optimizer, sparsifier, 5)
    assert sparsifier.sparsity == pytest.approx(0.9, abs=0.01)
    assert held(sparsifier)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_of_any_dtype_are_masked(kind, dtype):
    model = net_of(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.5)
    sparsifier.mask_moments(optimizer)
    train(model, optimizer, sparsifier, 5)
    assert held(sparsifier)
    sparsifier.update_masks(0.8, optimizer)
    train(model, optimizer, sparsifier, 5)
    assert held(sparsifier)
    assert sparsifier.sparsity == pytest.approx(0.8, abs=0.01)


def test_the_activation_of_a_complex_input_is_the_root_of_its_mean_squared_magnitude():
    layer, inputs = nn.Linear(3, 2, dtype=torch.complex64), torch.randn(5, 3, dtype=torch.complex64)
    sparsifier = Sparsifier(nn.Sequential(layer), criteria="wanda", layers="0")
    sparsifier.calibrate([inputs])
    seen = sparsifier.collected.value("activation", "0.weight")
    assert torch.allclose(seen, inputs.abs().square().mean(0).sqrt())


class ByName(torch.optim.SGD):
    """Keeps its state by name, as optimizers of named parameters do."""

    def step(self):
        super().step()
        self.state = {f"weight {number}": values for number, values in enumerate(self.state.values())}


class Hidden(Wrapper):
    """Holds an optimizer where nobody can find it."""

    def __init__(self, inner):
        self.param_groups, self.state = inner.param_groups, {}
        self.step = lambda: [inner.step(), self.param_groups[0].update(step=1)]
        self.zero_grad = lambda: inner.zero_grad()


class Codes(torch.optim.SGD):
    def step(self):
        super().step()
        for values in self.state.values():
            values["codes"] = values["momentum_buffer"].to(torch.uint8)


REFUSED = {
    "state by name": (ByName, "mask_moments: ByName keeps its state by str, not by parameter"),
    "state out of reach": (
        lambda parameters, *given, **options: Hidden(torch.optim.SGD(parameters, *given, **options)),
        "mask_moments: Hidden has made steps, but has no `state` of any parameter",
    ),
    "codes": (Codes, r"mask_moments: Codes keeps `codes` of a weight as codes \(torch.uint8\)"),
}


def test_directions_of_lbfgs_are_refused():
    model = net_of(torch.float32)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    sparsifier, inputs = Sparsifier(model), torch.randn(5, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    sparsifier.mask_moments(optimizer)
    optimizer.step(closure)
    with pytest.raises(TypeError, match="mask_moments: LBFGS keeps `d` of all weights in one vector"):
        sparsifier.mask_moments(optimizer)


@pytest.mark.parametrize("kind", ["adafactor", "lamb", "lion", "novograd", "adabelief", "muon"])
def test_optimizers_of_timm_are_not_refused(kind):
    timm = pytest.importorskip("timm.optim", reason="timm has these optimizers")
    model = net_of(torch.float32)
    optimizer = timm.create_optimizer_v2(model, kind, lr=0.01)
    sparsifier = Sparsifier(model)
    for _ in range(2):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.sparsify(0.5)
    sparsifier.mask_moments(optimizer)
    assert held(sparsifier)


@pytest.mark.parametrize("case", REFUSED)
def test_state_that_cannot_be_masked_is_refused_after_a_step(case):
    kind, message = REFUSED[case]
    model = net_of(torch.float32)
    optimizer = kind(model.parameters(), 0.1, momentum=0.9)
    sparsifier = Sparsifier(model)
    sparsifier.mask_moments(optimizer)  # there is no state yet
    train(model, optimizer, steps=1)
    with pytest.raises(TypeError, match=message):
        sparsifier.mask_moments(optimizer)


def test_a_scheduler_tells_that_steps_were_made():
    model = net_of(torch.float32)

    class Lost(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner_step = lambda: inner.step()

        def step(self, closure=None):
            self.inner_step()

    optimizer = Lost(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    train(model, optimizer, steps=1)
    scheduler.step()
    with pytest.raises(TypeError, match="Lost has made steps"):
        Sparsifier(model).mask_moments(optimizer)


def test_an_optimizer_without_moments_is_not_refused():
    model = net_of(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    sparsifier = Sparsifier(model)
    sparsifier.sparsify(0.5)
    train(model, optimizer, sparsifier, 2)
    scheduler.step()
    sparsifier.mask_moments(optimizer)
    assert held(sparsifier)
