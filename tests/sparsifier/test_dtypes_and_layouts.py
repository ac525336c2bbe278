"""Weights of every type and in every layout that can be pruned: masks, zero bits, and training."""

import copy

import pytest
import torch
from conftest import as_on_device
from kinds_of_weights import IN, OUT, PRUNED, TYPES, masked_bits, net, plain, pruned, typed, values, wide
from torch import nn

from sparsifai import Sparsifier
from sparsifai.sparsifier.recovery import recovered_masks


@pytest.fixture(autouse=True)
def _unchanged_process():
    """Modules, grad mode, default dtype and random numbers are what they were."""

    def state():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return dict(vars(nn.Module)), modes, torch.get_default_dtype()

    before = state()
    yield
    assert state() == before


AXES = [
    ("weight", "global", "large_final"), ("weight", "local", "squared_final"), ("weight", "2:4", "large_final"),
    ("weight", "local", "magnitude_increase"), ("weight", "lamp", "large_final"), ("weight", "global", "random"),
    ("filter", "local", "large_final"), ("filter", "global", "normalized_final"), (("in",), "local", "large_final"),
]  # fmt: skip


def check_zeros(sparsifier, before):
    """All bits of masked weights are zero, and no other bit has changed."""
    for name, own in sparsifier.model.named_parameters():
        mask = sparsifier.all_masks.get(name, torch.ones([1] * own.dim(), dtype=torch.bool))
        assert not masked_bits(own, mask).any(), name
        assert torch.equal(masked_bits(own, ~mask), masked_bits(before[name], ~mask)), name


@pruned
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.filterwarnings("ignore:criterion .* compares with an earlier value", "ignore:the sparsity that was asked")
def test_masks_are_those_of_the_same_numbers_in_float64(make, axes):
    model = make()
    layers = None if axes[0] == "weight" else ["0"]
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    sparsifier, reference = (Sparsifier(each, *axes, layers=layers) for each in (model, plain(model)))
    for each in (sparsifier, reference):
        each.sparsify(0.4)
    assert sparsifier.masks.keys() == reference.masks.keys()
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in reference.masks.items())
    assert all(type(mask) is torch.Tensor for mask in sparsifier.masks.values())
    check_zeros(sparsifier, before)
    report, expected = sparsifier.report(), reference.report()
    assert sparsifier.sparsity == reference.sparsity == report.selected.sparsity
    assert [row.count for row in report.rows if row.name in sparsifier.masks] == [
        row.count for row in expected.rows if row.name in reference.masks
    ]
    assert not report.not_counted


@pruned
@pytest.mark.filterwarnings("ignore:the sparsity that was asked", "ignore:[0-9]+ scores of .* are equal")
def test_every_way_to_set_masks_writes_zero_bits(make):
    model = make()
    sparsifier, before = Sparsifier(model), {name: each.detach().clone() for name, each in model.named_parameters()}
    sparsifier.recover_masks()
    recovered = sparsifier.masks
    assert all(torch.equal(mask, wide(model.get_parameter(name)) != 0) for name, mask in recovered.items())
    check_zeros(sparsifier, before)
    assert all(torch.equal(mask, recovered[name]) for name, mask in recovered_masks(model, {}).items())
    for level in (0.3, 0.301, 0.8):
        sparsifier.update_masks(level)
        check_zeros(sparsifier, before)
    state = copy.deepcopy(sparsifier.state_dict())
    with torch.no_grad(), torch.inference_mode(model[0].weight.is_inference()):
        for name, each in model.named_parameters():
            each.data.copy_(before[name])
    other = Sparsifier(model)
    other.set_masks(state["masks"])
    check_zeros(other, before)
    sparsifier.load_state_dict(state)
    check_zeros(sparsifier, before)
    sparsifier.sparsify(0.9, steps=3)
    check_zeros(sparsifier, before)
    kept = copy.deepcopy(sparsifier.masks)
    sparsifier.sparsify(0.5)  # what comes back is zero, too
    for name, mask in kept.items():
        assert not masked_bits(model.get_parameter(name), mask).any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("axes", AXES[:2] + AXES[6:7], ids=str)
@pytest.mark.filterwarnings("ignore:the sparsity that was asked", "ignore:[0-9]+ scores of .* are equal")
def test_ranking_where_the_weights_are_gives_the_same_masks(dtype, axes):
    masks = []
    for place in (lambda each: each, as_on_device):
        sparsifier = place(Sparsifier(net(typed(dtype)), *axes, layers=["0"]))
        sparsifier.sparsify(0.4)
        masks.append(sparsifier.masks["0.weight"])
    assert torch.equal(*masks)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.filterwarnings("ignore:the sparsity that was asked", "ignore:[0-9]+ scores of .* are equal")
@pytest.mark.filterwarnings("ignore:criterion .*", "ignore:context .* the model is on a GPU")
def test_masks_on_a_gpu_are_those_of_the_cpu_and_zero_bits(dtype, axes, transposed):
    masks = []
    for device in ("cpu", "cuda"):
        weight = typed(dtype, IN, OUT).t() if transposed else typed(dtype)
        model = net(weight).to(device)
        before = {name: each.detach().cpu() for name, each in model.named_parameters()}
        sparsifier = Sparsifier(model, *axes, layers=["0"])
        for level in (0.3, 0.4):
            sparsifier.update_masks(level)
        masks.append(sparsifier.masks["0.weight"].cpu())
        for name, own in model.named_parameters():
            mask = sparsifier.all_masks.get(name, torch.ones([1] * own.dim(), dtype=torch.bool)).cpu()
            assert not masked_bits(own.cpu(), mask).any()
            assert torch.equal(masked_bits(own.cpu(), ~mask), masked_bits(before[name], ~mask))
        assert sparsifier.sparsity == sparsifier.report().selected.sparsity
        sparsifier.recover_masks()
        assert not masked_bits(model[0].weight.cpu(), sparsifier.masks["0.weight"].cpu()).any()
    assert torch.equal(*masks)


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "maximize": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, maximize=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, eps=1e-4, amsgrad=True),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, eps=1e-4, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.01, eps=1e-4),
}
# Those whose products torch computes on the CPU.
TRAINED = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def two_layers(dtype):
    return nn.Sequential(nn.Linear(IN, OUT, dtype=dtype), nn.Linear(OUT, 4, dtype=dtype))


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", TRAINED, ids=str)
@pytest.mark.filterwarnings("ignore:[0-9]+ scores of .* are equal")
def test_bits_of_masked_weights_gradients_and_moments_stay_zero_in_training(dtype, make_optimizer):
    model, inputs = two_layers(dtype), typed(dtype, 8, IN)
    sparsifier, optimizer = Sparsifier(model), make_optimizer(model.parameters())
    for level in (0.3, 0.6, 0.6, 0.4):
        optimizer.zero_grad()
        model(inputs).abs().square().mean().backward()
        with torch.no_grad():
            for each in model.parameters():
                each.grad.neg_()
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.update_masks(level, optimizer)
        for name, mask in sparsifier.masks.items():
            own = model.get_parameter(name)
            moments = [each for each in optimizer.state[own].values() if each.shape == own.shape]
            assert not masked_bits(own, mask).any()
            assert all((each[~mask].abs() < 1e-6).all() for each in moments)
    sparsifier.mask_gradients()
    sparsifier.mask_moments(optimizer)
    for name, mask in sparsifier.masks.items():
        own = model.get_parameter(name)
        moments = [each for each in optimizer.state[own].values() if each.shape == own.shape]
        assert not any(masked_bits(each, mask).any() for each in (own.grad, *moments))


def test_gradients_that_are_conjugate_or_negative_views_are_masked():
    for make in (
        lambda: torch.complex(values(), values()).conj(),
        lambda: torch.complex(values(), values()).conj().imag,
    ):
        model = two_layers(make().dtype)
        sparsifier = Sparsifier(model, layers=["0"])
        sparsifier.sparsify(0.5)
        model[0].weight.grad, mask = make(), sparsifier.masks["0.weight"]
        sparsifier.mask_gradients()
        gradient, before = (each.resolve_conj().resolve_neg() for each in (model[0].weight.grad, make()))
        assert torch.equal(gradient[mask], before[mask])
        assert not masked_bits(gradient, mask).any()


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "movement_pruning"])
def test_criteria_whose_scores_of_complex_weights_are_complex_are_refused(criterion):
    model, inputs = two_layers(torch.complex64), typed(torch.complex64, 8, IN)
    sparsifier = Sparsifier(model, criteria=criterion)
    sparsifier.calibrate([(inputs, inputs)], lambda output, target: output.abs().sum())
    with pytest.raises(ValueError, match=rf"criterion {criterion} must return one real score per weight: for 0.weight"):
        sparsifier.sparsify(0.5)
    assert all(mask.all() for mask in sparsifier.masks.values())


@pytest.mark.parametrize("criterion", ["snip", "wanda"])
def test_criteria_that_look_at_data_score_complex_weights_by_magnitude(criterion):
    model, inputs = two_layers(torch.complex64), typed(torch.complex64, 8, IN)
    sparsifier = Sparsifier(model, context="local", criteria=criterion, layers=["0"])
    sparsifier.calibrate([(inputs, inputs)], lambda output, target: output.abs().sum())
    before = model[0].weight.detach().clone()
    with torch.enable_grad():
        model(inputs).abs().sum().backward()
    scores = {
        "snip": (before * model[0].weight.grad).abs(),
        "wanda": before.abs() * inputs.abs().square().mean(0).sqrt(),
    }[criterion]
    sparsifier.sparsify(0.5)
    kept = sparsifier.masks["0.weight"]
    if criterion == "wanda":
        assert kept.sum() == kept.numel() / 2
    assert scores[~kept].max() <= scores[kept].min() * (1 + 1e-5)


# --- Dense weights ------------------------------------------------------------------------------------------------


def stepping(model):
    """A function that makes a step with gradients of its own: by SGD, or by hand where torch has no arithmetic."""
    parameters = list(model.parameters())
    by_hand = any(each.dtype not in TRAINED for each in parameters)
    optimizer = None if by_hand else torch.optim.SGD(parameters, 0.5, momentum=0.9)

    def step(number):
        generator = torch.Generator().manual_seed(number)
        for each in parameters:
            moves = torch.randn(each.shape, generator=generator)
            if optimizer is None:
                each.data.copy_((wide(each) + moves).to(each.dtype))
            else:
                each.grad = moves.to(each.dtype)
        if optimizer is not None:
            optimizer.step()

    return step


def seeded(make):
    torch.manual_seed(0)
    return make()


TRAINABLE = {name: make for name, make in PRUNED.items() if name != "inference"}


@pytest.mark.parametrize("make", TRAINABLE.values(), ids=TRAINABLE)
@pytest.mark.parametrize("options", [{}, {"decay": 0, "gradient_sparsity": 0.2}], ids=str)
@pytest.mark.filterwarnings("ignore:the sparsity that was asked", "ignore:[0-9]+ scores of .* are equal")
@pytest.mark.filterwarnings("ignore:(?s).*Casting complex")
@pytest.mark.filterwarnings("ignore:straight_through. mask_gradients was not called")
def test_a_step_moves_the_dense_weights_as_those_of_a_plain_copy(make, options):
    model, twin, other = (seeded(make) for _ in range(3))
    sparsifier = Sparsifier(model, context="local", straight_through=True, **options)
    memory = {name: (each.data_ptr(), each.stride(), type(each)) for name, each in model.named_parameters()}
    step, step_of_twin = stepping(model), stepping(twin)
    for number, level in enumerate((0.3, 0.6, 0.6, 0.4)):
        with sparsifier.dense_weights():
            step(number)
        step_of_twin(number)
        for name, mask in sparsifier.masks.items():
            assert not masked_bits(model.get_parameter(name), mask).any()
        sparsifier.update_masks(level)
        reference = Sparsifier(plain(twin), context="local")
        reference.sparsify(level)
        assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in reference.masks.items())
        check_zeros(sparsifier, dict(twin.named_parameters()))
    state = copy.deepcopy(sparsifier.state_dict())
    sparsifier.settle()
    for name, each in other.named_parameters():
        each.data.copy_(model.get_parameter(name))
    loaded = Sparsifier(other, context="local", straight_through=True, **options)
    loaded.load_state_dict(state)
    assert loaded.sparsity == sparsifier.sparsity
    loaded.sparsify(0.0)
    check_zeros(loaded, dict(twin.named_parameters()))
    assert {name: (each.data_ptr(), each.stride(), type(each)) for name, each in model.named_parameters()} == memory


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.inner, self.head = kind(4, 6, 2, batch_first=True, **options), nn.Linear(12, 3)

    def forward(self, inputs):
        return self.head(self.inner(inputs)[0][..., :12])


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.inner(inputs, inputs, inputs)[0])


class TiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        return self.head(self.inner(self.embedding(inputs[..., 0].abs().mul(3).long().clamp(0, 6))))


MODULES = {
    "LSTM": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "GRU": lambda: Recurrent(nn.GRU, bidirectional=True),
    "attention": Attending,
    "attention with three projections": lambda: Attending(kdim=4, vdim=4, add_bias_kv=True),
    "tied to an embedding": TiedToEmbedding,
    "transposed convolution": lambda: nn.Sequential(nn.ConvTranspose1d(5, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 1)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.filterwarnings("ignore:(?s).*layers stay dense")
def test_gradients_at_the_sparse_weights_move_the_dense_ones_of_every_module(make, decay):
    model, twin = seeded(make), seeded(make)
    sparsifier = Sparsifier(model, context="local", straight_through=True, decay=decay)
    optimizers = [torch.optim.AdamW(each.parameters(), 0.05) for each in (model, twin)]
    dense = dict(twin.named_parameters())
    for number in range(15):
        inputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(number))
        masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        output, sparse = model(inputs), {name: each * masks.get(name, 1) for name, each in dense.items()}
        assert torch.equal(output, torch.func.functional_call(twin, sparse, (inputs,), tie_weights=True))
        output.square().mean().backward()
        for name, each in model.named_parameters():
            dense[name].grad = each.grad.clone()
            if name in masks:
                dense[name].grad.add_(dense[name].detach() * ~masks[name], alpha=decay)
        sparsifier.mask_gradients()
        with sparsifier.dense_weights():
            optimizers[0].step()
        optimizers[1].step()
        optimizers[0].zero_grad()
        sparsifier.update_masks(min(0.6, 0.1 * number), optimizers[0])
        check_zeros(sparsifier, dense)
    assert sparsifier.sparsity == pytest.approx(0.6, abs=0.03)
