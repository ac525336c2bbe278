"""The ranking for GPUs: the same masks as the other one, and no value is read by the host.

Run on the CPU here. Tensors without values (of torch's `meta` device) show that nothing is read: whatever would wait
for a GPU raises there.
"""

import copy
import functools
import itertools
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    CRITERIA,
    EXAMPLE,
    as_on_device,
    has_ties,
    masked_of,
    misses_sparsity,
    show_data,
    small_net,
    without_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from updates import no_waiting

from sparsifai import Sparsifier, blocks, bounded
from sparsifai.axes.ranking.device_layer import DeviceLayer
from sparsifai.axes.ranking.on_device import select_on_device
from sparsifai.axes.ranking.scored_layer import ScoredLayer
from sparsifai.axes.ranking.selection import select_groups
from sparsifai.sparsifier.notices import notices_of_host

groups = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, float("inf")]), st.integers(1, 5), st.booleans()),
    min_size=1,
    max_size=12,
)


class Weights:
    def __init__(self, count):
        self.parameter = torch.empty(count)


@settings(max_examples=400, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.floats(0, 1), st.booleans(), st.booleans(), st.booleans())
def test_the_same_groups_stay_as_on_the_host(layers, sparsity, equal, whole, revives):
    if whole:
        layers = [rows[:1] for rows in layers]
    # No update leaves a layer empty, so none begins with an empty one.
    layers = [[*rows[:-1], (*rows[-1][:2], False)] for rows in layers]
    host, device = [], []
    for rows in layers:
        score = np.array([row[0] for row in rows], np.float32)
        size = 3 if equal else np.array([row[1] for row in rows])
        alive = np.array([not row[2] for row in rows])
        count = 3 * len(rows) if equal else int(size.sum())
        host.append(ScoredLayer(None, score.__getitem__, alive, size, whole, revives or not host))
        size = size if equal else torch.tensor(size)
        device.append(
            DeviceLayer(Weights(count), torch.tensor(score), torch.tensor(alive), size, whole, host[-1].revives)
        )
    expected = [stays.tolist() for stays in select_groups(host, sparsity)]
    assert [stays.tolist() for stays in select_on_device([device], sparsity)] == expected


def test_a_joint_ranking_takes_no_more_operations_for_more_layers():
    # Each operation is a launch on a GPU.
    counts = []
    for number in (4, 40):
        layers = [
            DeviceLayer(Weights(6 * size), torch.randn(6, device="meta"), torch.ones(6, device="meta") > 0, size)
            for size in range(1, number + 1)
        ]
        with Operations() as operations:
            select_on_device([layers], 0.5)
        counts.append(operations.count)
    assert counts[0] == counts[1]


class Operations(TorchDispatchMode):
    """Counts operations, but not views."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += not function.is_view
        return function(*arguments, **(keywords or {}))


@pytest.mark.filterwarnings("ignore:a falling sparsity revives")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "channel", "layer", "row"])
@pytest.mark.parametrize("context", ["local", "global"])
@misses_sparsity
@has_ties
def test_masks_are_the_same_through_rising_and_falling_levels(context, granularity, dtype):
    models = []
    for make in (lambda sparsifier: sparsifier, as_on_device):
        torch.manual_seed(0)
        model = small_net().to(dtype)
        with torch.no_grad():
            model[3].weight.mul_(20).round_().div_(20)  # many ties
        if granularity == "layer" and context == "local":
            pytest.skip("whole layers cannot fall alone")
        models.append(make(Sparsifier(model, granularity, context, exclude="12" if granularity == "row" else None)))
    for level in (0.1, 0.3, 0.3, 0.55, 0.9, 0.5, 0.2, 0.25, 0.0):
        for sparsifier in models:
            sparsifier.sparsify(level)
        host, device = models
        assert all(torch.equal(host.masks[name], device.masks[name]) for name in host.masks)
        for one, other in zip(host.model.parameters(), device.model.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["large_final", "magnitude_increase"])
@pytest.mark.parametrize(
    ("context", "granularity"),
    [
        *itertools.product(("2:4", "1:3", blocks(10), blocks(2, "out"), "per_output"), ("weight", "kernel", "row")),
        (blocks(3, "out"), "filter"),
        (blocks(2, "h"), "row"),
    ],
)
def test_masks_within_rows_and_blocks_are_the_same(context, granularity, criterion, dtype):
    models = []
    for make in (lambda sparsifier: sparsifier, as_on_device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, (3, 2), groups=2)).to(dtype)
        models.append(make(Sparsifier(model, granularity, context, criterion, example_input=torch.zeros(1, 4, 9, 9))))
        with torch.no_grad():
            model[0].weight.add_(0.1).mul_(10).round_().div_(10)  # many ties
            model[1].weight.add_(torch.randn_like(model[1].weight) * 0.1)
    host, device = models
    for level in (0.1, 0.3, 0.5, 0.4, 0.2, 0.5, 0.0):
        for sparsifier in models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of outputs that come back, of levels at which nothing can be pruned
                sparsifier.sparsify(level)
        assert all(torch.equal(host.masks[name], device.masks[name]) for name in host.masks), level


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_masks_are_the_same_with_every_criterion(criterion):
    # random draws on the host, so that it gives the same numbers everywhere, and sends them to the GPU.
    both = []
    for make in (lambda sparsifier: sparsifier, as_on_device):
        torch.manual_seed(0)
        model = small_net()
        both.append(make(Sparsifier(model, criteria=criterion, example_input=EXAMPLE)))
        show_data(both[-1])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        for level in (0.3, 0.7):
            both[-1].sparsify(level)
    assert all(torch.equal(both[0].masks[name], mask) for name, mask in both[1].masks.items())


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "channel"])
@pytest.mark.parametrize("context", ["local", "global", "2:4", "2:16", "per_output"])
@pytest.mark.parametrize("criterion", ["large_final", "updating_movement"])
def test_no_value_is_read_in_a_step(granularity, context, criterion):
    model = small_net()
    if context not in ("local", "global") and granularity in ("filter", "channel"):
        return  # one output, or one input, has no blocks of these
    # The kernels of layer 5 have one input.
    sparsifier = without_values(Sparsifier(model, granularity, context, criterion, exclude="5"))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for level in (0.3, 0.5):
        model(torch.empty(2, 2, 8, 8, device="meta")).sum().backward()
        sparsifier.mask_gradients()
        optimizer.step()
        sparsifier.apply_masks()
        sparsifier.sparsify(level)
        sparsifier.mask_moments(optimizer)
    with pytest.raises((RuntimeError, ValueError), match="meta"):  # and what reads a value is found out
        sparsifier.sparsity  # noqa: B018


# torch 2.6 brings Triton 3.2, whose interpreter does not run with numpy 2 and whose compiler is called otherwise.
old_triton = pytest.mark.skipif(
    find_spec("triton") is not None and not hasattr(import_module("triton"), "set_allocator"),
    reason="the interpreter of Triton 3.2 does not run with numpy 2",
)


@old_triton
@pytest.mark.slow
@pytest.mark.parametrize("of", ["models", "scores"])
def test_the_triton_kernels_in_their_interpreter_give_the_same_masks(of):
    pytest.importorskip("triton", reason="torch brings Triton on some platforms only")
    script = Path(__file__).parents[2] / "interpreted.py"
    # The package that is tested here, and not one that is installed.
    paths = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, str(script), of], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Of every argument of the kernels, what it points to.
POINTED_TO = {
    **dict.fromkeys(("layer_of", "keys", "is_nan", "counts", "undone", "rows"), "i32"),
    **dict.fromkeys(("asked", "partial"), "fp64"),
    "out": "i8",
}


@old_triton
def test_the_triton_kernels_compile_for_an_h100():
    triton = pytest.importorskip("triton", reason="torch brings Triton on some platforms only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsifai.axes import pooling_triton as pooling
    from sparsifai.axes.ranking import on_device_kernels as finding
    from sparsifai.axes.ranking import on_device_triton as launched
    from sparsifai.axes.ranking import on_device_writing as writing
    from sparsifai.axes.ranking import rows_triton as within

    size = {"block": launched.BLOCK, "steps": launched.STEPS[0]}
    first, second = launched.BINS[:2]
    layers, sample = {"block": launched.LAYERS}, {"sample": launched.SAMPLE}
    cases = [(finding.count_alive, size), (writing.protect, layers), (writing.keep_best, {})]
    for keys, magnitude in zip(launched.KEYS.values(), (True, False, True), strict=True):
        kind = {"unsigned": keys.unsigned, "magnitude": magnitude}
        ends = {"lowest": 0 if magnitude else -keys.unsigned, "highest": keys.unsigned}
        revives = {"revives": not magnitude}
        cases += [
            (finding.ask, {"lowest": ends["lowest"], **layers}),
            (finding.draw_sample, {**kind, **revives, **sample, "block": 128}),
            (finding.bracket, {**ends, **sample, "spread": launched.SPREAD, "bins": first, "in_rows": True}),
            (finding.narrow, {**ends, "first": True, "bins": first, "next_bins": second}),
            (finding.narrow, {**ends, "first": False, "bins": second, "next_bins": launched.BINS[2]}),
            (writing.find_best, {**kind, **size}),
            (writing.count_ties, {**kind, **revives, **size, "bins": first}),
            *((kernel, {**kind, **revives, **size}) for kernel in (writing.find_last, writing.write_masks)),
        ]
        for bins, is_first, surveys in ((first, True, True), (second, True, False), (second, False, False)):
            passes = {"first": is_first, "surveys": surveys, "protects": not surveys, "bins": bins}
            cases.append((finding.count_in_bins, {**kind, **revives, **size, **passes, "infinity": keys.infinity}))
    for wide, brain, members in ((True, False, 4), (False, True, 512), (False, False, 16)):
        tile = {"groups": pooling.TILE // members, "members": members, "steps": pooling.STEPS}
        cases.append((pooling.sum_pieces, {"wide": wide, "brain": brain, **tile}))
    for members, exact in ((4, True), (4, False), (16, False), (64, True), (4096, False)):
        keys = launched.KEYS[torch.float32 if members < 64 else torch.bfloat16]
        tile = {"exact": exact, "pairs": members <= within.PAIRS[1], "members": members}
        tile |= {"rows": max(within.TILE // members, 1), **keys._asdict(), "magnitude": exact, "revives": members == 16}
        cases.append((within.rank_rows, tile))
    cases.append((finding.sum_rows, {"bins": first, "several": launched.SUMMED}))
    cases.append((pooling.sum_up, {"mean": True, "block": pooling.SUMMED}))
    for kernel, constants in cases:
        names = [name for name in kernel.arg_names if name not in constants]
        pointed_to = {**POINTED_TO, **({"out": "fp32"} if kernel is pooling.sum_up else {})}
        # What is sent to a GPU begins at multiples of 16 bytes, of which a kernel makes use.
        aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
        types = {name: "i32" if name == "programs" else f"*{pointed_to.get(name, 'i64')}" for name in names}
        types |= dict.fromkeys(constants, "constexpr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Triton, about its own defaults
            source = ASTSource(kernel, types, constants, aligned)
            target, options = GPUTarget("cuda", 90, 32), {"num_warps": launched.WARPS}
            compiled = triton.compile(source, target=target, options=options)
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared < 48 * 1024
        if constants.get("block") == launched.BLOCK and kernel is not finding.count_in_bins:
            # Scores and masks are read and written in words of several groups, not one group at a time.
            assert "global.b8" not in compiled.asm["ptx"]
            assert "global.b16" not in compiled.asm["ptx"]


def test_nan_is_told_of_when_something_is_read():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = as_on_device(Sparsifier(model))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    sparsifier.sparsify(0.5)
    with pytest.raises(ValueError, match="NaN scores for 1.weight"):
        sparsifier.sparsity  # noqa: B018


def test_nan_is_told_of_after_a_later_update_without_nan():
    model = nn.Linear(8, 8)
    sparsifier = as_on_device(Sparsifier(model))
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    sparsifier.sparsify(0.5)
    with torch.no_grad():
        model.weight.nan_to_num_(1.0)
    sparsifier.sparsify(0.75)
    with pytest.raises(ValueError, match="NaN scores for weight"):
        sparsifier.report()


def test_nan_of_what_is_masked_does_not_matter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = as_on_device(Sparsifier(model, criteria=lambda weight: weight.abs() / (weight != 0)))
    sparsifier.sparsify(0.5)
    sparsifier.sparsify(0.75)
    assert sparsifier.sparsity == 0.75
    sparsifier.sparsify(0.5)
    with pytest.raises(ValueError, match="NaN scores"):
        sparsifier.sparsity  # noqa: B018


def test_nan_in_any_scope_of_several_is_told_of():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = as_on_device(Sparsifier(model))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    sparsifier.check({"0": 0.5, "1": 0.5})
    assert sparsifier.sparsity == 0  # what was only tried leaves nothing behind
    sparsifier.sparsify({"0": 0.5, "1": 0.5})
    with pytest.raises(ValueError, match="NaN scores for 0.weight"):
        sparsifier.report()


def test_groups_of_unequal_sizes_read_nothing():
    for axes in ({"in": 3}, {"out": 3}, {"out": 3, "in": 3}):
        model = nn.Sequential(nn.Linear(10, 8), nn.Linear(10, 8))
        without_values(Sparsifier(model, lambda _, axes=axes: axes, layers=["0", "1"])).sparsify(0.5)


def test_a_context_of_ones_own_is_given_arrays_of_the_host_unless_it_declares_on_device():
    def halves(layers, sparsity):
        seen.append(type(layers[0]).__name__)
        return [*select_groups(layers[:3], sparsity), *select_groups(layers[3:], sparsity)]

    def stays_on_device(context):
        on_gpu = {"0.weight": SimpleNamespace(parameter=SimpleNamespace(device=torch.device("cuda")))}
        return Sparsifier(small_net(), context=context).ranking.stays_on_device(on_gpu)

    seen = []
    assert not stays_on_device(halves)
    halves.on_device = True
    assert stays_on_device(halves)
    without_values(Sparsifier(small_net(), context=halves)).sparsify(0.5)
    assert seen == ["DeviceLayer"]

    @functools.wraps(halves)
    def wrapped(layers, sparsity):
        return halves(layers, sparsity)

    assert not stays_on_device(wrapped)  # which is another function


def notices_on(*devices, **options):
    """What is told of the options of a Sparsifier whose layers are on these devices."""
    layers = {
        str(number): SimpleNamespace(
            parameter=SimpleNamespace(device=torch.device(device), numel=lambda: 237), is_selected=True
        )
        for number, device in enumerate(devices)
    }
    return notices_of_host(Sparsifier(small_net(), **options).ranking.options, layers)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *(({"context": each}, f"context {each}:") for each in ("lamp", "erk", "er", "uniform_plus")),
        ({"context": bounded("local", {"0": 0.1})}, "context bounded"),
        ({"round_to": 2, "granularity": "filter"}, "round_to=:"),
    ],
)
def test_what_is_ranked_on_the_host_is_told_of(options, reason):
    (notice,) = notices_on("cuda", "cuda", **options)
    assert notice.startswith(reason)
    assert "its 474 weights are scored there" in notice
    assert "contexts local, global, per_output, blocks(n) and N:M" in notice
    assert not notices_on("cpu", "cpu", **options)


def test_scores_that_are_drawn_on_the_host_and_layers_on_several_gpus_are_told_of():
    (notice,) = notices_on("cuda", "cuda", criteria="random")
    assert notice.startswith("criterion random: 474 random scores are drawn on the host")
    (notice,) = notices_on("cuda:0", "cuda:1")
    assert notice.startswith("layers on 2 devices: ")
    assert not notices_on("cuda", "cuda", context="2:4", criteria="movement")


def test_what_is_ranked_on_the_host_is_told_of_once(monkeypatch):
    monkeypatch.setattr("sparsifai.sparsifier.sparsifier.notices_of_host", lambda *_: ["it is slow"])
    sparsifier = Sparsifier(small_net())
    with pytest.warns(UserWarning, match="it is slow"):
        sparsifier.sparsify(0.3)
    sparsifier.sparsify(0.5)
    sparsifier.update_masks(0.6)


def test_a_context_of_ones_own_that_is_on_the_device_gives_the_same_masks_and_revives_nothing():
    def all_but_the_first(layers, sparsity):
        return [torch.ones_like(layers[0].alive), *select_groups(layers[1:], sparsity)]

    def on_the_host(layers, sparsity):
        return [np.ones(len(layers[0]), bool), *select_groups(layers[1:], sparsity)]

    all_but_the_first.on_device = True
    torch.manual_seed(0)
    model = small_net()
    device = as_on_device(Sparsifier(copy.deepcopy(model), context=all_but_the_first))
    host = Sparsifier(model, context=on_the_host)
    for sparsifier in (device, host):
        sparsifier.all_masks.add({"0.weight": torch.arange(8).view(8, 1, 1, 1) > 3})
        sparsifier.sparsify(0.5)
    assert all(torch.equal(mask, device.masks[name]) for name, mask in host.masks.items())
    assert not host.masks["0.weight"].all()


@pytest.mark.parametrize("answer", [lambda layers: [layer.score for layer in layers], lambda layers: [[]]])
def test_what_is_no_answer_of_a_context_on_the_device_is_an_error(answer):
    def wrong(layers, sparsity):
        return answer(layers)

    wrong.on_device = True
    with pytest.raises(ValueError, match="a bool tensor over its groups"):
        without_values(Sparsifier(small_net(), context=wrong)).sparsify(0.5)


@pytest.mark.cuda
@misses_sparsity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", lambda axes: {"out": 3, "in": 3}])
def test_on_a_gpu_masks_are_those_of_the_cpu_and_no_step_waits(granularity, context, dtype):
    models = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        models.append(Sparsifier(small_net().to(device, dtype), granularity, context))
    host, device = models
    for level in (0.3, 0.6, 0.9):
        host.sparsify(level)
        with no_waiting():
            device.sparsify(level)
            device.apply_masks()
        assert all(torch.equal(host.masks[name], mask.cpu()) for name, mask in device.masks.items())


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:a falling sparsity revives")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", ["2:4", blocks(10), blocks(40), "per_output"], ids=str)
def test_on_a_gpu_masks_within_rows_are_those_of_the_cpu_and_no_step_waits(context, dtype):
    models = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(48, 50, 3), nn.Conv2d(50, 64, (3, 2), groups=2), nn.Linear(256, 300))
        models.append(Sparsifier(model.to(device, dtype), context=context))
    host, device = models
    for level in (0.3, 0.5, 0.2):
        host.sparsify(level)
        with no_waiting():
            device.sparsify(level)
        assert all(torch.equal(host.masks[name], mask.cpu()) for name, mask in device.masks.items())


def large_layers(draw):
    """Layers of several million weights, of several thousand and of few."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1500, 2001), nn.Linear(37, 1500), nn.Linear(3, 37), nn.Linear(2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(parameter))
    return model


@pytest.mark.cuda
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        lambda weight: torch.randn_like(weight).mul(8).round().div(8),
        lambda weight: torch.randn_like(weight).exp() * (torch.rand_like(weight) < 0.05),  # nearly all alike
        lambda weight: weight.abs().flatten().sort().values.view_as(weight),
    ],
    ids=["normal", "ties", "zeros", "in order"],
)
def test_on_a_gpu_masks_of_large_layers_are_those_of_the_cpu(draw, context):
    host = Sparsifier(large_layers(draw), context=context)
    device = Sparsifier(large_layers(draw).cuda(), context=context)
    for level in (0.0001, 0.5, 0.5001, 0.999, 0.2, 1.0):
        host.sparsify(level)
        device.sparsify(level)
        assert all(torch.equal(host.masks[name], mask.cpu()) for name, mask in device.masks.items())
        for one, other in zip(host.model.parameters(), device.model.parameters(), strict=True):
            assert torch.equal(one, other.cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("criterion", ["large_final", "movement", "movement_pruning", "updating_movmag"])
def test_on_a_gpu_a_whole_step_waits_for_nothing(criterion):
    model = small_net().cuda()
    sparsifier = Sparsifier(model, criteria=criterion)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    images = torch.randn(4, 2, 8, 8, device="cuda")
    for level in (0.2, 0.3, 0.4):
        model(images).sum().backward()
        # If the first gradients are not finite, there is no earlier mean to fall back on; so the host asks once.
        with no_waiting() if level > 0.2 else nullcontext():
            sparsifier.mask_gradients()
            optimizer.step()
            sparsifier.update_masks(level, optimizer)
    assert sparsifier.sparsity == pytest.approx(0.4, abs=0.01)
    sparsifier.mask_gradients()
    sparsifier.mask_moments(optimizer)
    for parameter, mask in masked_of(sparsifier):
        kept = mask.expand_as(parameter)
        moments = optimizer.state[parameter]
        for values in (parameter, parameter.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert not values[~kept].any()
            assert values[kept].any()
