"""Criteria of data on attention heads and neurons, against numbers that are computed by their definitions."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attentions import BLOCKS, WIDTH, Interleaved, Mlp, Net, Separate, Torch, weights_of
from torch import nn

from sparsifai import Sparsifier, criteria

GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(4, 6, WIDTH, generator=GENERATOR), torch.tensor([0, 2, 1, 2])
BATCHES = [(X[:3], Y[:3]), (X[3:], Y[3:])]
KINDS = [kind for kind in BLOCKS if not kind.startswith("torch")]


def scores_of(sparsifier):
    """The scores by which groups are ranked: name of a weight -> score per group of its module."""
    seen = {}

    def context(layers, sparsity):
        seen.update({layer.target.name: torch.from_numpy(layer.score.copy()) for layer in layers})
        return [layer.alive for layer in layers]

    other = copy.copy(sparsifier.ranking.options)
    object.__setattr__(other, "context", context)
    object.__setattr__(sparsifier.ranking, "options", other)
    sparsifier.check(0.5)
    return seen


def gradients_of_gates(model, x, y):
    """|dL/dξ| of every gate of every block, one example after the other: the mean over examples."""
    total = [0 for _ in model.blocks]
    for example, target in zip(x, y, strict=True):
        for block in model.blocks:
            block.gates = torch.ones(block.num_heads if hasattr(block, "num_heads") else 4, requires_grad=True)
        gates = [block.gates for block in model.blocks]
        loss = F.cross_entropy(model(example[None]), target[None])
        total = [sum_ + each.abs() for sum_, each in zip(total, torch.autograd.grad(loss, gates), strict=True)]
    for block in model.blocks:
        block.gates = None
    return [each / len(x) for each in total]


@pytest.mark.parametrize("batches", [[(X, Y)], BATCHES])
@pytest.mark.parametrize("kind", ["separate", "gated", "multi-query", "cross", "fused", "transposed", "interleaved",
                                  "mlp", "gated mlp", "fused gated mlp"])  # fmt: skip
def test_gate_importance_is_the_gradient_of_explicit_gates(kind, batches):
    make, granularity, groups, _ = BLOCKS[kind]
    model = Net(make)
    expected = gradients_of_gates(model, X, Y)
    for normalize in (False, True):
        sparsifier = Sparsifier(model, granularity, criteria=partial(criteria["gate_importance"], normalize=normalize))
        sparsifier.calibrate(batches, F.cross_entropy)
        scores = list(scores_of(sparsifier).values())
        for score, gates in zip(scores, expected, strict=True):
            assert torch.allclose(score.float(), gates / gates.norm() if normalize else gates, rtol=1e-4)


def test_gates_of_grouped_queries_multiply_all_query_heads_of_a_group():
    model = Net(lambda: Separate(4, 2))
    sparsifier = Sparsifier(model, "head", criteria=lambda weight, gate_grad: gate_grad.expand_as(weight))
    sparsifier.calibrate([(X, Y)], F.cross_entropy)
    expected = []
    for block in model.blocks:
        per_example = []
        for example, target in zip(X, Y, strict=True):
            gates = torch.ones(2, requires_grad=True)
            block.gates = gates.repeat_interleave(2)
            loss = F.cross_entropy(model(example[None]), target[None])
            per_example.append(torch.autograd.grad(loss, gates)[0].abs())
            block.gates = None
        expected.append(torch.stack(per_example).mean(0))
    for score, gates in zip(scores_of(sparsifier).values(), expected, strict=True):
        assert torch.allclose(score.float(), gates, rtol=1e-4)


def of_gated_columns(model, projection, heads, x, y):
    """|dL/dξ| of heads that are gated by the columns of an output projection, given by its name."""
    weight, per_example = model.get_parameter(f"{projection}.weight").detach(), []
    for example, target in zip(x, y, strict=True):
        gates = torch.ones(heads, requires_grad=True)
        gated = {f"{projection}.weight": weight * gates.repeat_interleave(weight.shape[1] // heads)}
        output = torch.func.functional_call(model, gated, (example[None],))
        loss = F.cross_entropy(getattr(output, "logits", output), target[None])
        per_example.append(torch.autograd.grad(loss, gates)[0].abs())
    return torch.stack(per_example).mean(0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gate_importance_of_the_attention_of_torch(batch_first):
    model = Net(lambda: Torch(batch_first))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = [of_gated_columns(model, f"blocks.{block}.attention.out_proj", 3, X, Y) for block in range(2)]
    sparsifier = Sparsifier(model, "head", criteria=lambda weight, gate_grad: gate_grad.expand_as(weight))
    sparsifier.calibrate(BATCHES, F.cross_entropy)
    for score, gates in zip(scores_of(sparsifier).values(), expected, strict=True):
        assert torch.allclose(score.float(), gates, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_module_that_runs_twice_has_one_gate():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks, self.classifier = nn.ModuleList([Mlp()]), nn.Linear(WIDTH, 3)

        def forward(self, x):
            return self.classifier(self.blocks[0](self.blocks[0](x)).mean(1))

    model = Twice()
    expected = gradients_of_gates(model, X, Y)
    sparsifier = Sparsifier(model, "neuron", criteria=lambda weight, gate_grad: gate_grad.expand_as(weight))
    sparsifier.calibrate([(X, Y)], F.cross_entropy)
    assert torch.allclose(next(iter(scores_of(sparsifier).values())).float(), expected[0], rtol=1e-4)


def gradients(model):
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def groups_of(values, kind):
    """For each block and group, all of some values, in one vector. values: parameter name -> tensor."""
    _, _, groups, _ = BLOCKS[kind]
    return [
        [
            torch.cat([
                values[f"blocks.{block}.{name}"].index_select(axis, torch.tensor(at)).flatten()
                for name, (axis, at) in group.items()
            ]).double()
            for group in groups
        ]
        for block in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize("pool", [None, "mean", "sum", "max", "l2"])
@pytest.mark.parametrize("criterion", ["taylor", "snip", "fisher", "large_final"])
@pytest.mark.parametrize("kind", ["separate", "fused", "interleaved grouped", "transposed", "fused gated mlp"])
def test_scores_are_pooled_over_all_weights_of_a_group(kind, criterion, pool):
    make, granularity, _, _ = BLOCKS[kind]
    model = Net(make)
    values = dict(model.named_parameters())
    gradient = gradients(model)
    formula = {
        "taylor": lambda w, g: w * g,
        "snip": lambda w, g: (w * g).abs(),
        "fisher": lambda w, g: w**2 * g**2 / 2,
        "large_final": lambda w, g: w.abs(),
    }[criterion]
    of_weights = {name: formula(values[name].detach(), gradient[name]) for name in values}
    pooled = {
        None: (lambda each: each.sum() ** 2) if criterion == "taylor" else torch.mean,
        "mean": torch.mean, "sum": torch.sum, "max": torch.max, "l2": torch.norm,
    }[pool]  # fmt: skip
    sparsifier = Sparsifier(model, granularity, criteria=criterion, pool=pool)
    if criterion != "large_final":
        sparsifier.calibrate([(X, Y)], F.cross_entropy)
    for score, groups in zip(scores_of(sparsifier).values(), groups_of(of_weights, kind), strict=True):
        assert torch.allclose(score, torch.stack([pooled(each) for each in groups]), rtol=1e-4, atol=1e-12)


def test_a_pooling_of_your_own_sees_one_layer_and_its_scores_are_averaged():
    model = Net(Separate)

    def smallest(grouping, scores):
        return grouping.members(scores, fill=math.inf).amin(1)

    sparsifier = Sparsifier(model, "head", pool=smallest)
    block = model.blocks[0]
    layers = [(block.q.weight, 0), (block.k.weight, 0), (block.v.weight, 0), (block.o.weight, 1)]
    minima = torch.stack([weight.detach().abs().amin(1 - axis).view(3, 2).amin(1) for weight, axis in layers])
    assert torch.allclose(scores_of(sparsifier)["blocks.0.q.weight"].float(), minima.mean(0))


def test_wanda_on_heads():
    model = Net(Separate)
    sparsifier = Sparsifier(model, "head", "local", "wanda")
    sparsifier.calibrate([X])
    block = model.blocks[0]
    inputs = X.flatten(0, 1).square().mean(0).sqrt()
    heads = block.attend(block.q(X), block.k(X), block.v(X)).flatten(0, 1).square().mean(0).sqrt()
    of_weights = {
        "q.weight": block.q.weight.abs() * inputs, "k.weight": block.k.weight.abs() * inputs,
        "v.weight": block.v.weight.abs() * inputs, "o.weight": block.o.weight.abs() * heads,
    }  # fmt: skip
    expected = [
        torch.cat(
            [of_weights[name].index_select(axis, torch.tensor(at)).flatten() for name, (axis, at) in group.items()]
        )
        for group in BLOCKS["separate"][2]
    ]
    scores = scores_of(sparsifier)["blocks.0.q.weight"]
    assert torch.allclose(scores.float(), torch.stack([each.mean() for each in expected]).detach(), rtol=1e-4)


@pytest.mark.parametrize("criterion", [name for name in criteria if name != "sparsegpt"])  # it sweeps single weights
def test_every_criterion_ranks_heads_and_neurons(criterion):
    options = {"compensate": False} if criterion == "obs" else {}  # of a whole head nothing stays to make up for it
    for kind in ("separate", "fused gated mlp"):
        make, granularity, groups, _ = BLOCKS[kind]
        model = Net(make)
        sparsifier = Sparsifier(model, granularity, "local", criterion, example_input=X, **options)
        if sparsifier.looks_at_data:
            sparsifier.calibrate(BATCHES, F.cross_entropy)
        with torch.no_grad():  # for criteria that compare with an earlier value
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        sparsifier.sparsify(0.34)
        for block in range(2):
            kept = [any(each.any() for each in weights_of(model, block, group).values()) for group in groups]
            assert sum(kept) == len(groups) - 1


def test_gates_need_groups_of_several_layers():
    with pytest.raises(ValueError, match="gate_importance needs gate_grad.*give granularity 'head' or 'neuron'"):
        Sparsifier(Net(Separate), "weight", criteria="gate_importance")
    with pytest.raises(ValueError, match="gate_grad.*, but no layer reads the units of weight_ih_l0; give granularity"):
        Sparsifier(nn.LSTM(3, 4), "unit", criteria="gate_importance")
    with pytest.raises(TypeError, match="gate_importance needs gate_grad; give it a loss_func"):
        Sparsifier(Net(Separate), "head", criteria="gate_importance").calibrate([X])
    with pytest.raises(ValueError, match="needs gate_grad, but has seen no batch; call calibrate"):
        Sparsifier(Net(Separate), "head", criteria="gate_importance").sparsify(0.5)
    with pytest.raises(ValueError, match="regrow=gate_importance needs gate_grad, which a backward pass does not give"):
        Sparsifier(Net(Separate), "weight", regrow="gate_importance")


def test_gate_importance_of_a_head_that_was_pruned_is_zero_and_the_others_go_on():
    model = Net(Interleaved)
    sparsifier = Sparsifier(model, "head", criteria="gate_importance")
    sparsifier.calibrate(BATCHES, F.cross_entropy)
    sparsifier.sparsify(0.3)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    sparsifier.calibrate(BATCHES, F.cross_entropy)
    sparsifier.sparsify(0.6)
    assert all((mask <= first[name]).all() for name, mask in sparsifier.masks.items())
    assert sparsifier.sparsity == pytest.approx(4 / 6)


def test_gates_without_any_gradient_have_scores_of_zero():
    zero = criteria["gate_importance"](torch.ones(4, 2), torch.zeros(4, 1), 2)
    assert zero.tolist() == [[0.0, 0.0]] * 4


def _models():
    """Small models of other libraries with a batch of four examples, which may be cut into windows inside."""
    torchvision = pytest.importorskip("torchvision")
    pictures = torch.randn(4, 3, 8, 8)
    for version in ({}, {"block": torchvision.models.swin_transformer.SwinTransformerBlockV2}):
        yield torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 4], [2, 2], **version), pictures
    yield torchvision.models.VisionTransformer(8, 4, 1, 4, 16, 24, num_classes=3), pictures
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
    yield transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=3)), pictures
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 30, "pad_token_id": 0, "num_labels": 3}
    yield transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes)), torch.randint(1, 30, (4, 5))


def test_gate_importance_of_models_that_cut_pictures_into_windows_and_others():
    for model, examples in _models():
        model.eval()
        sparsifier = Sparsifier(model, "head", criteria=lambda weight, gate_grad: gate_grad.expand_as(weight))
        sparsifier.calibrate([(examples, Y)], lambda output, y: F.cross_entropy(getattr(output, "logits", output), y))
        readers = [name for name, (_, part) in sparsifier.ranking.coupling.joint.items() if part.role == "reader"]
        for name, score in zip(readers, scores_of(sparsifier).values(), strict=True):
            layer = name.removesuffix(".weight")
            if type(model).__name__.startswith("GPT2"):  # its projection has the inputs first
                continue
            expected = of_gated_columns(model, layer, len(score), examples, Y)
            assert torch.allclose(score.float(), expected, rtol=1e-3, atol=1e-9), (type(model).__name__, name)


@pytest.mark.parametrize("granularity", ["head", "neuron"])
def test_examples_in_one_batch_count_as_examples_by_themselves(granularity):
    for model, examples in _models():
        found = []
        for batches in ([(examples, Y)], [(examples[n : n + 1], Y[n : n + 1]) for n in range(4)]):
            sparsifier = Sparsifier(model.eval(), granularity, criteria="gate_importance")
            sparsifier.calibrate(batches, lambda output, y: F.cross_entropy(getattr(output, "logits", output), y))
            found.append(sparsifier.collected.stored["gate_grad"])
        for name, gates in found[0].items():
            assert torch.allclose(gates, found[1][name], rtol=1e-2, atol=1e-9), (type(model).__name__, name)
