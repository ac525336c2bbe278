"""Several threads at once, and interrupts at every line, of what traces, hooks or runs a model."""

import math
import threading
import warnings

import pytest
import torch
from conftest import EXAMPLE, changed_in_process, dense_of, followers_of, random_state, small_net
from interrupts import LIBRARY, WITH_TORCH, interrupted, places
from torch import nn

from sparsifai import Sparsifier, shrink
from sparsifai.model.flops import count_flops
from sparsifai.model.layers import find_weights
from sparsifai.model.tracing import traced_flow

ROUNDS = 6
SAFETY_NET = 120  # seconds until a test that hangs fails


def at_once(*functions):
    """Call functions in threads of their own, which begin together. Returns what they have returned."""
    begin, results, errors = threading.Barrier(len(functions)), [None] * len(functions), []

    def work(place, function):
        try:
            begin.wait(SAFETY_NET)
            results[place] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SAFETY_NET)
        assert not thread.is_alive()
    assert errors == []
    return results


class Branching(nn.Sequential):
    """torch.fx cannot trace it."""

    def forward(self, x):
        return super().forward(x * 2 if x.sum() > 1e9 else x)


class Scaled(nn.Module):
    """What torch.fx replaces for the whole process to trace it: parameters, calls, functions of math."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.stem(x) * self.factor
        return self.head(x / math.sqrt(x.size(-1)))


def attending():
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))


def forwards_until(done, model, given):
    """Run a model again and again; the outputs and the values of math must stay the same."""
    expected, count = model(given), 0
    while not done.is_set() or not count:
        assert torch.allclose(model(given), expected, atol=1e-6)
        assert math.sqrt(16) == 4
        assert isinstance(model[0].weight, nn.Parameter)
        count += 1
    return count


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (small_net, {}),
        (Scaled, {}),
        (lambda: Branching(*small_net()), {"example_input": EXAMPLE}),
        (attending, {"example_input": torch.ones(2, 5, 6)}),
    ],
)
def test_other_threads_run_their_models_while_one_makes_a_sparsifier(make, options):
    done, other = threading.Event(), small_net().eval()
    expected = dense_of(Sparsifier(make(), "filter", **options))

    def make_some():
        try:
            return [dense_of(Sparsifier(make(), "filter", **options)) for _ in range(ROUNDS)]
        finally:
            done.set()

    with torch.no_grad():
        made, *_ = at_once(make_some, *[lambda: forwards_until(done, other, EXAMPLE)] * 2)
    assert made == [expected] * ROUNDS


def test_sparsifiers_that_threads_make_at_once_are_those_of_one_thread():
    def made():
        found = []
        for _ in range(ROUNDS):
            torch.manual_seed(0)
            for model, options in ((small_net(), {}), (Branching(*small_net()), {"example_input": EXAMPLE})):
                sparsifier = Sparsifier(model, "filter", **options)
                found.append((dense_of(sparsifier), followers_of(sparsifier)))
        return found

    expected = made()
    assert at_once(made, made, made) == [expected] * 3


def test_flops_that_threads_count_at_once_are_those_of_one_thread():
    def counted():
        model = attending()
        return [count_flops(model, find_weights(model), torch.ones(2, 5, 6)) for _ in range(ROUNDS)]

    assert at_once(counted, counted, counted) == [counted()] * 3


def test_a_transformer_in_another_thread_keeps_its_fast_path_while_flops_are_counted():
    done, other = threading.Event(), attending().eval()

    def count():
        try:
            model = attending()
            return [count_flops(model, find_weights(model), torch.ones(2, 5, 6)) for _ in range(ROUNDS)]
        finally:
            done.set()

    def look():
        seen = set()
        while not done.is_set():
            seen.add(torch.backends.mha.get_fastpath_enabled())
        return seen

    with torch.no_grad():
        _, seen, _ = at_once(count, look, lambda: forwards_until(done, other, torch.ones(2, 5, 6)))
    assert seen <= {True}


def test_threads_that_ignore_warnings_at_once_restore_the_filters():
    pytest.importorskip("torch_pruning", reason="coupled=True needs torch-pruning")
    before = list(warnings.filters)

    def couple():
        net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2))
        return [list(Sparsifier(net, "filter", coupled=True, example_input=SMALL).masks) for _ in range(ROUNDS)]

    at_once(couple, couple, couple)
    assert warnings.filters == before


# --- Interrupts -----------------------------------------------------------------------------------------------------


def state_of(model):
    """All that may be changed on a model for a while."""
    modules = list(model.modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "hooks": [len(getattr(module, kind)) for module in modules for kind in kinds],
        "modes": [module.training for module in modules],
        "attributes": [list(vars(module)) for module in modules],
        "tensors": [id(each) for each in (*model.parameters(), *model.buffers())],
        "values": [each.tolist() for each in model.state_dict().values()],
        "gradients": [id(each.grad) for each in model.parameters()],
        "trained": [each.requires_grad for each in model.parameters()],
    }


def unlike(before, now):
    return [part for part in before if before[part] != now[part]]


def tiny():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    net[2].eval()
    net(SMALL).sum().backward()
    return net


SMALL = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3)
BATCHES = [(SMALL, torch.tensor([0, 1]))]


def calibrating(criterion):
    def prepare():
        sparsifier = Sparsifier(net := tiny(), criteria=criterion)
        return net, lambda: sparsifier.calibrate(BATCHES, nn.functional.cross_entropy)

    return prepare


def tracing():
    return (net := tiny()), lambda: Sparsifier(net, "filter")


def recording():
    return (net := Branching(*tiny())), lambda: Sparsifier(net, "filter", example_input=SMALL)


def flowing():
    sparsifier = Sparsifier(net := tiny(), criteria="synflow", example_input=SMALL)
    return net, lambda: sparsifier.check(0.5)


def counting():
    return (net := tiny()), lambda: count_flops(net, find_weights(net), SMALL)


def shrinking():
    pytest.importorskip("torch_pruning", reason="shrink needs torch-pruning")
    net = tiny()
    Sparsifier(net, "filter").sparsify(0.5)
    return net, lambda: shrink(net, SMALL)


@pytest.mark.parametrize("folders", [LIBRARY, WITH_TORCH], ids=["own lines", "and those of torch"])
@pytest.mark.parametrize(
    "prepare",
    [calibrating("wanda"), calibrating("snip"), tracing, recording, flowing, counting, shrinking],
    ids=["calibrate inputs", "calibrate gradients", "trace", "record", "synflow", "count FLOPs", "shrink"],
)
def test_an_interrupt_at_any_line_leaves_model_and_process_as_they_were(prepare, folders):
    prepare()[1]()  # what is imported or cached at the first time runs no lines later
    lines = interrupted(prepare()[1], folders=folders).lines
    assert lines > 300
    left = {}
    for at in places(lines, 10 if prepare is shrinking else 60):
        net, function = prepare()
        before, random_before = state_of(net), random_state()
        tracer = interrupted(function, at, folders)
        assert tracer.where is not None
        changed = unlike(before, state_of(net)) + changed_in_process()
        torch.set_grad_enabled(True)  # the next ones are not to fail, too
        if changed == ["grad mode"] and tracer.where.startswith(("_contextlib.py", "_tensor.py")):
            continue  # torch's own no_grad(), as a decorator or in the copy of a tensor, was interrupted at its ends
        if changed or random_state() != random_before:
            left[tracer.where] = changed
    assert left == {}


def test_an_interrupt_at_any_line_of_tracing_leaves_the_process_as_it_was():
    net = Scaled()
    lines = interrupted(lambda: traced_flow(net), folders=WITH_TORCH).lines
    before = state_of(net)
    for at in places(lines, 250):
        tracer = interrupted(lambda: traced_flow(net), at, WITH_TORCH)
        assert (changed_in_process(), unlike(before, state_of(net))) == ([], []), tracer.where
    assert traced_flow(net).last(find_weights(net)) == {"head.weight"}
