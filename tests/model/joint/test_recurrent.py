"""Units of LSTM, GRU and RNN: which weights are theirs, how they are pruned, and how they are removed."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sparsifai import Sparsifier, load_shrunk, save_shrunk, shrink, shrinkage
from sparsifai.model.channels.smaller_copy import SmallerCopy
from sparsifai.model.joint.recurrent import find_units
from sparsifai.model.joint.unit_removal import find_zero_units, remove_all_units

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def removed(model, example):
    """The smaller copy, and what has been removed from each module. The outputs are the same up to 1e-5."""
    small = SmallerCopy(model, example)
    rows = remove_all_units(small)
    model = model.eval()
    inputs = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        expected, outputs = model(*inputs), small.model(*inputs)
    assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6)
    return small.model, rows


def pruned(model, sparsity=0.5, context="local", **options):
    sparsifier = Sparsifier(model, "unit", context, **options)
    sparsifier.sparsify(sparsity)
    return sparsifier


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class Net(nn.Module):
    """A recurrent module and a Linear layer behind it."""

    def __init__(self, kind=nn.LSTM, size=8, inputs=5, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(inputs, size, **options)
        width = (options.get("proj_size") or size) * (1 + options.get("bidirectional", False))
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


def example(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- Which weights belong to a unit -----------------------------------------------------------------------------------


def test_units_of_a_bidirectional_lstm():
    (units,) = find_units(Net(num_layers=2, bidirectional=True))
    assert (units.name, units.what, units.count) == ("rnn", "unit", 4 * 8)
    assert units.cells.tolist() == np.repeat(range(4), 8).tolist()
    parts = {(part.name, part.axis): part for part in units.parts}
    rows = parts["rnn.weight_hh_l1", 0]
    assert rows.role == "weight"
    assert rows.groups.tolist() == list(range(16, 24)) * 4
    assert parts["rnn.bias_ih_l0_reverse", 0].role == "follower"
    columns = parts["rnn.weight_ih_l1_reverse", 1]
    assert (columns.role, columns.groups.tolist()) == ("table", list(range(16)))
    assert parts["rnn.weight_hh_l0_reverse", 1].groups.tolist() == list(range(8, 16))


def test_units_with_a_projection_are_read_by_it_alone():
    (units,) = find_units(Net(num_layers=2, proj_size=3))
    parts = {(part.name, part.axis): part.role for part in units.parts}
    assert parts["rnn.weight_hr_l1", 1] == "reader"
    assert ("rnn.weight_ih_l1", 1) not in parts


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_pruned_units_stay_zero_and_all_layers_lose_as_many(kind):
    model = Net(kind, num_layers=2, bidirectional=True)
    sparsifier = pruned(model)
    assert {name for name, layer in sparsifier.layers.items() if not layer.is_selected} == {"out.weight"}
    for name, mask in sparsifier.masks.items():
        kept = mask.reshape(-1, 8)
        assert (kept == kept[0]).all()  # of all gates
        assert kept[0].sum() == 4
        bias = name.replace("weight", "bias")
        assert torch.equal(getattr(model.rnn, bias.removeprefix("rnn.")) != 0, mask.flatten())
    states = model.rnn(example(6, 2, 5))[0]
    assert ((states == 0).flatten(0, 1).all(0)).sum() == 8
    sparsifier.sparsify(0.75)
    assert {int(mask.reshape(-1, 8)[0].sum()) for mask in sparsifier.masks.values()} == {2}


def test_each_layer_loses_its_own_lowest_units():
    model = Net(num_layers=2, bias=False)
    with torch.no_grad():
        for parameter, order in ((model.rnn.weight_ih_l0, 1), (model.rnn.weight_ih_l1, -1)):
            parameter.copy_(
                (torch.arange(8.0)[::order] if order == 1 else torch.arange(8.0).flip(0)).repeat(4)[:, None]
            )
        model.rnn.weight_hh_l0.fill_(1.0)
        model.rnn.weight_hh_l1.fill_(1.0)
    masks = pruned(model).masks
    assert masks["rnn.weight_hh_l0"].flatten()[:8].tolist() == [False] * 4 + [True] * 4
    assert masks["rnn.weight_hh_l1"].flatten()[:8].tolist() == [True] * 4 + [False] * 4


def test_the_context_ranks_units_of_modules_together():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.out = nn.GRU(4, 8), nn.GRU(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.second(self.first(x)[0])[0])

    model = Two()
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter.mul_(0.01)
    sparsifier = pruned(model, 0.45, "global")
    assert sparsifier.masks["first.weight_hh_l0"].sum() == 3 * 1  # a module keeps its best unit
    small, rows = removed(model, example(6, 2, 4))
    assert (small.first.hidden_size, small.second.input_size) == (1, 1)
    assert [len(row.removed) for row in rows] == [7, 8 - small.second.hidden_size]


def test_a_model_without_recurrent_layers_is_refused_by_name():
    with pytest.raises(ValueError, match="no units are found in Sequential; it has no LSTM, GRU or RNN of torch"):
        Sparsifier(nn.Sequential(nn.Linear(4, 4)), "unit")


def test_computed_weights_are_refused_by_name():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 is computed from other parameters"):
        Sparsifier(model, "unit")
    lstm = nn.Sequential(nn.LSTM(4, 6, bias=False))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        nn.utils.parametrizations.weight_norm(lstm[0], name)
    assert find_zero_units(lstm, find_units(lstm)[0], torch.randn(2, 3, 4)).zeros == ()


def test_a_weight_that_is_excluded_keeps_the_units():
    model = nn.Sequential(nn.LSTM(4, 8))
    with pytest.raises(ValueError, match="no unit is left to prune .*its units also need 0.weight_hh_l0, which stays"):
        Sparsifier(model, "unit", exclude="0.weight_hh_l0")


# --- Removal ----------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    projection=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_masked_and_removed_have_the_same_outputs(
    kind, layers, bidirectional, bias, batch_first, projection, sparsity, seed
):
    options = {"proj_size": 3} if projection and kind is nn.LSTM else {}
    model = Net(
        kind, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first, **options
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    pruned(model, sparsity)
    zero = int(model.rnn.weight_ih_l0.reshape(-1, 8, 5).eq(0).all(2).all(0).sum())
    small, (row,) = removed(model, example(4, 3, 5))
    size = max(8 - zero, 4) if options else 8 - zero  # a projection is smaller than the hidden size
    assert bool(row.why_kept) == (size > 8 - zero)
    assert small.rnn.hidden_size == size
    wanted = kind(5, size, num_layers=layers, bidirectional=bidirectional, bias=bias, **options)
    shapes = {name: parameter.shape for name, parameter in wanted.named_parameters()}
    assert {name: parameter.shape for name, parameter in small.rnn.named_parameters()} == shapes
    read = (3 if options else size) * (1 + bidirectional)
    assert small.out.in_features == small.out.weight.shape[1] == read
    small.train()(example(4, 3, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(example(4, 3, 5)), small(example(4, 3, 5)))


class Classifier(nn.Module):
    """An embedding, a packed bidirectional LSTM, and the last states side by side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.rnn = nn.Embedding(20, 6), nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.hidden, self.out = nn.Linear(16, 7), nn.Linear(7, 2)

    def forward(self, ids):
        lengths = torch.arange(ids.shape[1], ids.shape[1] - len(ids), -1)
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True)
        _, (hidden, _) = self.rnn(packed)
        return self.out(F.relu(self.hidden(torch.cat([hidden[-2], hidden[-1]], 1))))


def test_last_states_of_packed_sequences_are_read():
    model = Classifier()
    pruned(model)
    before = parameters(model)
    small, (row,) = removed(model, torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0)))
    assert list(row.readers) == ["hidden"]
    assert (small.rnn.hidden_size, small.hidden.in_features) == (4, 8)
    assert parameters(small) < 0.5 * before


def test_shrink_removes_units_and_its_file_is_loaded(tmp_path):
    model = Net(num_layers=2, bidirectional=True)
    pruned(model)
    table = shrinkage(model, example(4, 2, 5))
    assert [(row.name, row.what, row.count, row.zeros, row.removed) for row in table.groups] == [
        ("rnn", "unit", 32, 16, 16)
    ]
    small = shrink(model, example(4, 2, 5))
    assert (small.rnn.hidden_size, small.out.in_features) == (4, 8)
    save_shrunk(small.eval(), tmp_path / "small.safetensors")
    loaded = load_shrunk(Net(num_layers=2, bidirectional=True).eval(), tmp_path / "small.safetensors")
    assert torch.equal(loaded(example(4, 2, 5)), small(example(4, 2, 5)))


def test_all_outputs_and_padded_sequences_are_read():
    class Tagger(Net):
        def forward(self, x):
            packed = pack_padded_sequence(x, torch.tensor([5, 3]), enforce_sorted=False)
            output, _ = pad_packed_sequence(self.rnn(packed)[0])
            return self.out(torch.tanh(output))

    model = Tagger(nn.GRU)
    pruned(model)
    small, _ = removed(model, example(5, 2, 5))
    assert (small.rnn.hidden_size, small.out.in_features) == (4, 4)


def test_a_linear_layer_that_reads_all_time_steps():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.out = nn.LSTM(5, 8, batch_first=True), nn.Linear(6 * 8, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0].flatten(1))

    model = Flat()
    pruned(model)
    small, _ = removed(model, example(3, 6, 5))
    assert small.out.in_features == 6 * 4


def test_two_modules_side_by_side_and_one_behind_the_other():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.last = nn.LSTM(5, 8), nn.GRU(5, 6), nn.GRU(14, 4, bidirectional=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.last(torch.cat([self.left(x)[0], self.right(x)[0]], -1))[0])

    model = Several()
    pruned(model)
    small, _ = removed(model, example(4, 2, 5))
    assert (small.left.hidden_size, small.right.hidden_size, small.last.hidden_size) == (4, 3, 2)
    assert (small.last.input_size, small.out.in_features) == (7, 4)
    assert small.last.weight_ih_l0_reverse.shape == (6, 7)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.out = kind(5, 8), nn.Linear(8, 2)

        def forward(self, x):
            state = None
            for step in x:
                state = self.cell(step, state)
            return self.out(state[0] if isinstance(state, tuple) else state)

    model = Loop()
    pruned(model)
    small, (row,) = removed(model, example(4, 2, 5))
    assert row.why_kept == ""
    assert (small.cell.hidden_size, small.cell.weight_hh.shape[1], small.out.in_features) == (4, 4, 4)


def test_units_that_are_zero_in_one_layer_only_are_removed_as_far_as_all_layers_can():
    model = Net(num_layers=2)
    with torch.no_grad():
        for name, units in (("l0", [0, 1, 2]), ("l1", [4, 5])):
            rows = torch.tensor(units)[:, None] + torch.arange(4) * 8
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(model.rnn, f"{kind}_{name}")[rows.flatten()] = 0
    small, (row,) = removed(model, example(4, 2, 5))
    assert (row.zeros, row.removed) == ((0, 1, 2, 12, 13), (0, 1, 12, 13))
    assert row.why_kept.startswith("all layers and directions of rnn must keep equal numbers of units")
    assert small.rnn.hidden_size == 6


def test_the_last_unit_stays():
    model = Net(nn.GRU, bias=False)
    with torch.no_grad():
        model.rnn.weight_ih_l0.zero_()
        model.rnn.weight_hh_l0.zero_()
    small, (row,) = removed(model, example(4, 2, 5))
    assert (small.rnn.hidden_size, row.why_kept) == (1, "at least 1 unit must be kept")


def test_a_unit_with_a_bias_is_not_zero():
    model = Net()
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(model.rnn, name)[torch.arange(4) * 8] = 0
    _, (row,) = removed(model, example(4, 2, 5))
    assert row.zeros == ()


# --- What is refused --------------------------------------------------------------------------------------------------


class GivenState(Net):
    def forward(self, x):
        state = x.new_zeros(1, x.shape[1], 8)
        return self.out(self.rnn(x, (state, state))[0])


class Returned(Net):
    def forward(self, x):
        return self.rnn(x)[0]


class Mixed(Net):
    def forward(self, x):
        return self.out(F.layer_norm(self.rnn(x)[0], (8,)))


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.out(self.norm(self.rnn(x)[0].permute(1, 2, 0)).permute(2, 0, 1))


class Decoder(Net):
    def __init__(self):
        super().__init__()
        self.decoder = nn.LSTM(5, 8)

    def forward(self, x):
        return self.out(self.decoder(x, self.rnn(x)[1])[0])


class Tied(Net):
    def __init__(self):
        super().__init__(inputs=8)
        self.out, self.encoder = nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
        self.out.weight = self.encoder.weight

    def forward(self, x):
        return self.out(self.rnn(x)[0]) + self.encoder(x)


@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (GivenState, 5, "rnn is given an initial state, whose size is that of all units"),
        (Returned, 5, "yields the model's output, or goes where it is not followed"),
        (Mixed, 5, "mixed with others before out reads them"),
        (Normed, 5, "goes through norm (BatchNorm1d)"),
        (Decoder, 5, "read as the initial state of decoder"),
        (Tied, 8, "read by out, which shares its weight"),
    ],
)
def test_zero_units_that_have_to_stay_are_named(model, inputs, why):
    model = model()
    pruned(model)
    small, rows = removed(model, example(4, 2, inputs))
    assert (rows[0].removed, rows[0].why_kept) == ((), why)
    assert small.rnn.hidden_size == 8


def test_a_size_in_the_forward_keeps_the_units():
    class Fixed(Net):
        def forward(self, x):
            return self.out(self.rnn(x)[0].reshape(-1, 8))

    model = Fixed()
    pruned(model)
    _, (row,) = removed(model, example(4, 2, 5))
    assert row.why_kept.startswith("the model fails without it")


# --- fastai -----------------------------------------------------------------------------------------------------------


@pytest.mark.fastai
def test_awd_lstm_is_pruned_and_its_removal_refused_by_name():
    text = pytest.importorskip("fastai.text.all", reason="its AWD_LSTM is the test")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = text.AWD_LSTM(30, 6, 8, 2, hidden_p=0.1, input_p=0.1, embed_p=0.1, weight_p=0.1)
    sparsifier = pruned(model)
    raw = sparsifier.masks["rnns.0.weight_hh_l0_raw"].flatten()
    assert raw.sum() == 16
    assert torch.equal(sparsifier.masks["rnns.0.module.weight_ih_l0"].flatten(), raw)
    for bias in ("bias_ih_l0", "bias_hh_l0"):
        assert torch.equal(getattr(model.rnns[0].module, bias) != 0, raw)
    model.train()
    model.reset()
    ids = torch.randint(30, (2, 7))
    first = []
    model.rnns[0].register_forward_hook(lambda module, inputs, output: first.append(output[0]))
    for _ in range(2):  # the state of the first batch is that of the second
        model(ids).sum().backward()
    assert all(((output == 0).flatten(0, 1).all(0) == ~raw[:8]).all() for output in first)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.out = model, nn.Linear(6, 2)

        def forward(self, ids):
            self.encoder.reset()
            return self.out(self.encoder(ids))

    _, rows = removed(Encoder(), ids)
    for number, row in enumerate(rows):
        assert row.removed == ()
        assert f"encoder.rnns.{number}.module is given an initial state" in row.why_kept
