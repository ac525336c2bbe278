"""Sensitivity of single layers, and the highest sparsity of a model."""

import random

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, GRANULARITIES, layers_of, small_net
from soundness import counted
from torch import nn

from sparsifai import Sparsifier, highest_sparsity, sensitivity


def remaining_weights(model):
    """A metric that is easy to compute by hand."""
    return sum(int(layer.weight.count_nonzero()) for layer in (model[0], model[2]))


def measured(model, metric, levels=(0.5,), **options):
    return sensitivity(model, metric, levels, progress=False, **options)


def state_of(model):
    """All that must not change: names, objects, bits, modes, gradients, random generators."""
    parameters = dict(model.named_parameters())
    return (
        {name: (id(each), each.requires_grad, id(each.grad)) for name, each in parameters.items()},
        {name: each.detach().numpy().tobytes() for name, each in parameters.items()},
        {name: (id(each), each.numpy().tobytes()) for name, each in model.named_buffers()},
        [part.training for part in model.modules()],
        (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()),
    )


def unusual(model):
    """Freeze a part, set a gradient, a NaN, and a layer to evaluation mode."""
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    model[1].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].eval()
    return model


# --- Measuring ----------------------------------------------------------------------------------------------------


def test_by_hand(mlp):
    answer = measured(mlp, remaining_weights, [0.75, 0.5, 0.5])
    assert (answer.layers, answer.sizes, answer.levels) == (("0.weight", "2.weight"), (32, 16), (0.5, 0.75))
    assert answer.values == ((32, 24), (40, 36))
    assert (answer.baseline, answer.metric, answer.lower_is_better) == (48.0, "remaining_weights", False)


def test_one_layer_is_pruned_at_a_time_by_the_lowest_magnitudes():
    model, seen = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False)), []
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0]]))
        model[1].weight.copy_(torch.tensor([[6.0], [5.0]]))
    measured(model, lambda model: seen.append([*model[0].weight[0].tolist(), *model[1].weight[:, 0].tolist()]) or 0)
    assert seen == [[1, -4, 3, 2, 6, 5], [0, -4, 3, 0, 6, 5], [1, -4, 3, 2, 6, 0]]


def test_every_level_is_measured_from_the_dense_weights():
    # The criterion depends on all weights of the layer, so zeros of an earlier level would change it.
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))

    def furthest_from_the_mean(weight):
        return -(weight - weight.mean()).abs()

    one_by_one = [measured(model, lambda model: model.weight.sum(), [level], criteria=furthest_from_the_mean).values[0]
                  for level in (0.25, 0.75)]  # fmt: skip
    both = measured(model, lambda model: model.weight.sum(), [0.25, 0.75], criteria=furthest_from_the_mean)
    assert [*both.values[0]] == [one_by_one[0][0], one_by_one[1][0]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.filterwarnings("ignore:sparsity .* no group can be pruned")
def test_every_granularity(net, granularity):
    sparsifier = Sparsifier(net, granularity)
    answer = measured(net, lambda model: float(model(EXAMPLE).sum()), granularity=granularity)
    assert list(answer.layers) == list(layers_of(sparsifier))
    assert set(answer.budget(0.4)) == set(layers_of(sparsifier))


def test_layers_and_exclude_mean_the_same_as_for_the_sparsifier(mlp):
    assert measured(mlp, remaining_weights, exclude="2").layers == ("0.weight",)
    assert measured(mlp, remaining_weights, layers="2").layers == ("2.weight",)


def test_every_measurement_starts_with_the_same_random_numbers(mlp):
    answer = measured(mlp, lambda model: random.random() + np.random.rand() + torch.rand(1), [0.5, 0.9])
    assert {value for row in answer.values for value in row} == {answer.baseline}


def meddling(model):
    """A metric that changes everything."""
    model.train()
    with torch.enable_grad():
        model(torch.randn(2, 2, 8, 8)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model[0].weight.requires_grad_(False)
    model[3].weight = nn.Parameter(torch.zeros(2))
    model[4].half().double()
    random.random(), np.random.rand()
    return 1.0


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel"])
@pytest.mark.parametrize(
    "search", [measured, lambda *args, **options: highest_sparsity(args[0], 1, args[1], **options)]
)
def test_the_model_is_not_changed(net, granularity, search):
    before = state_of(unusual(net))
    search(net, meddling, granularity=granularity)
    assert state_of(net) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_the_model_is_not_changed_if_the_metric_fails(net, error, granularity):
    before, calls = state_of(unusual(net)), []

    def failing(model):
        calls.append(model)
        meddling(model)
        if len(calls) == 3:
            raise error("in the middle")
        return 1.0

    for search in (measured, lambda model, metric, **options: highest_sparsity(model, 1, metric, **options)):
        calls.clear()
        with pytest.raises(error, match="in the middle"):
            search(net, failing, granularity=granularity)
        assert state_of(net) == before


def test_a_converted_model_is_converted_back(mlp):
    before = state_of(mlp)
    measured(mlp, lambda model: model.half()[0].weight.abs().sum())
    assert state_of(mlp) == before


def test_pruned_filters_zero_their_norm_parameters_in_the_measurement(net):
    answer = measured(net, lambda model: int(model[1].weight.count_nonzero()), granularity="filter")
    assert dict(zip(answer.layers, answer.values, strict=True))["0.weight"] == (4,)
    assert answer.baseline == 8


def test_zeros_of_a_sparse_model_are_pruned_first_and_stay(mlp):
    Sparsifier(mlp, context="local").sparsify(0.5)
    before = state_of(mlp)
    assert measured(mlp, remaining_weights, [0.5, 0.75]).values == ((24, 16), (24, 20))
    assert state_of(mlp) == before


def test_criteria_of_data_see_the_calibration_batches(mlp):
    batches, options = [(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))], {"criteria": "snip"}
    before = state_of(mlp)
    answer = measured(mlp, remaining_weights, calibration=batches, loss_func=nn.functional.cross_entropy, **options)
    assert answer.values == ((32,), (40,))
    options |= {"calibration": batches, "loss_func": nn.functional.cross_entropy}
    assert highest_sparsity(mlp, 12, remaining_weights, **options) == 12 / 48
    assert state_of(mlp) == before


def test_a_progress_bar_names_the_layers_if_it_is_wanted(mlp, open_terminal):
    pytest.importorskip("fastprogress", reason="comes with fastai")
    terminal = open_terminal()
    sensitivity(mlp, remaining_weights, [0.5], progress=False)
    assert terminal.read() == ""
    sensitivity(mlp, remaining_weights, [0.5])
    assert all(f"sensitivity: {name} |" in terminal.read() for name in ("0.weight", "2.weight"))


# --- The whole model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [0.005, 0.01, 0.03, 0.25])
@pytest.mark.parametrize("tolerance", [0, 0.3, 4, 17.5, 40, 100])
@pytest.mark.filterwarnings("ignore:the sparsity that was asked for cannot be reached")
def test_highest_sparsity_equals_the_one_found_by_trying_all(precision, tolerance):
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 5))

    def magnitude_left(model):
        return sum(layer.weight.abs().sum() for layer in (model[0], model[2]))

    dense, good = magnitude_left(model), []
    for step in range(int(1 / precision + 1e-9) + 1):
        copy = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 5))
        copy.load_state_dict(model.state_dict())
        sparsifier = Sparsifier(copy)
        sparsifier.sparsify(min(step * precision, 1.0))
        good += [sparsifier.sparsity] if dense - magnitude_left(copy) <= tolerance else []
    before = state_of(model)
    assert highest_sparsity(model, tolerance, magnitude_left, precision=precision) == max(good)
    assert state_of(model) == before


def test_highest_sparsity_of_a_loss_and_of_values_that_are_not_finite(mlp):
    def zeros_loss(model):
        return 48 - remaining_weights(model)

    assert highest_sparsity(mlp, 12, zeros_loss, precision=0.25) == 0.25
    assert highest_sparsity(mlp, 12, zeros_loss, precision=0.25, context="local") == 0.25
    assert highest_sparsity(mlp, 12, lambda model: left if (left := remaining_weights(model)) > 40 else np.nan) < 0.18
    for broken in (float("inf"), -float("inf")):
        found = highest_sparsity(mlp, 0, lambda model, value=broken: 1 if remaining_weights(model) > 40 else value)
        assert found == 7 / 48
    assert highest_sparsity(mlp, 0, zeros_loss, precision=0.25) == 0.0
    assert highest_sparsity(mlp, 100, zeros_loss) == 46 / 48  # each layer keeps its best weight


@pytest.mark.filterwarnings("ignore:the sparsity that was asked for cannot be reached")
def test_highest_sparsity_is_counted_and_obeys_the_limit_of_the_context(mlp):
    met = lambda model: 1.0  # noqa: E731
    assert highest_sparsity(mlp, 0.1, met, context="2:4") == 0.5
    tiles = highest_sparsity(mlp, 0.1, met, granularity="2x2")
    sparsifier = Sparsifier(mlp, "2x2")
    sparsifier.sparsify(1.0)
    assert tiles == sparsifier.sparsity < 1


def test_the_highest_level_is_checked_before_anything_is_measured(mlp):
    seen = []
    with pytest.raises(ValueError, match="0.5"):
        measured(mlp, lambda model: seen.append(1) or 1.0, [0.3, 0.9], context="2:4")
    assert not seen


def test_rounding_does_not_exceed_the_tolerance():
    model = nn.Linear(10, 10)  # 0.9 - 0.88 is more than 0.02 in floats
    assert highest_sparsity(model, 0.02, lambda model: 0.9 if model.weight.all() else 0.88) == 0.99


# --- Learners -----------------------------------------------------------------------------------------------------


def state_of_learner(learn):
    """The attributes of a Learner and its callbacks, and the state of its model."""
    return (
        state_of(learn.model),
        {**vars(learn), "cbs": list(learn.cbs)},
        {id(each): dict(vars(each)) for each in learn.cbs},
        # Metrics and means change in place.
        [str(vars(each)) for each in (learn.recorder.smooth_loss, learn.recorder.loss, *learn.metrics)],
    )


@pytest.fixture
def learn(make_learner):
    from fastai.vision.all import accuracy, error_rate

    return make_learner(metrics=[accuracy, error_rate])


@pytest.mark.fastai
@pytest.mark.parametrize("search", ["sensitivity", "highest_sparsity"])
def test_a_learner_is_not_changed(learn, search, capsys):
    learn.fit(1)
    capsys.readouterr()
    learn.dls.valid.shuffle = True
    draws = learn.dls.valid.rng.getstate(), learn.dls.train.rng.getstate()
    before = state_of_learner(learn)
    if search == "sensitivity":
        answer = sensitivity(learn, levels=[0.5, 0.9], progress=False, granularity="filter")
        assert (answer.metric, answer.lower_is_better, len(answer.layers)) == ("valid_loss", True, 4)
        assert len({value for row in answer.values for value in row}) > 4
    else:
        assert highest_sparsity(learn, 100.0) > 0.98
    assert state_of_learner(learn) == before
    assert (learn.dls.valid.rng.getstate(), learn.dls.train.rng.getstate()) == draws
    assert capsys.readouterr().out == ""
    loss = learn.validate()[0]
    if search == "sensitivity":
        assert answer.baseline == loss


@pytest.mark.fastai
def test_a_learner_is_not_changed_if_its_metric_fails(learn):
    learn.fit(1)
    before, calls = state_of_learner(learn), []

    def failing(predictions, targets):
        calls.append(1)
        if len(calls) == 6:  # in the third measurement, of two batches each
            raise KeyboardInterrupt
        return 1.0

    learn.metrics = [failing]
    before = state_of_learner(learn)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(learn, "failing")
    assert len(calls) == 6
    assert state_of_learner(learn) == before


@pytest.mark.fastai
def test_criteria_of_data_see_the_training_data_and_the_loss_of_the_learner(learn):
    rng = learn.dls.train.rng.getstate()
    *_, batch = learn.dls.train
    learn.dls.train.rng.setstate(rng)
    before = state_of_learner(learn)
    options = {"levels": [0.5], "criteria": lambda weight, grad: weight * grad, "progress": False}
    own = sensitivity(learn, **options)
    assert own == sensitivity(learn, loss_func=learn.loss_func, **options)
    given = sensitivity(learn, calibration=[batch], **options)
    assert given != own
    assert given == sensitivity(learn, calibration=[batch], loss_func=learn.loss_func, **options)
    assert state_of_learner(learn) == before


@pytest.mark.fastai
def test_a_batch_of_the_learner_is_the_example_input_of_a_model_that_cannot_be_traced(make_learner):
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x if x.sum() > 0 else -x)

    answer = sensitivity(make_learner(Untraceable()), levels=[0.5], progress=False, granularity="filter")
    assert "net.12.weight" not in answer.layers


@pytest.mark.fastai
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_sparse_learner_keeps_its_sparsity(make_learner, granularity):
    from sparsifai import KeepSparsity, SparsifyCallback

    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(0.5, granularity, "local"))
    assert learn._grab_cbs(KeepSparsity)
    learn.metrics = [lambda predictions, targets: counted(learn.model), *learn.metrics]
    learn.metrics[0].func.__name__ = "zeros"
    loss, zeros = learn.validate()
    before = state_of(learn.model)
    answer = sensitivity(learn, "zeros", [0.1, 0.9], progress=False)
    assert answer.baseline == zeros == counted(learn.model)
    # Zeros are pruned first, so a level below the present sparsity changes nothing.
    assert {low for low, _ in answer.values[:-1]} == {zeros}  # with filters, the last layer is still dense
    assert all(high > zeros for _, high in answer.values)
    assert sensitivity(learn, levels=[0.1], progress=False).baseline == loss
    highest_sparsity(learn, 0.1)
    assert state_of(learn.model) == before
    learn.fit(1)
    assert learn.keep_sparsity.report().selected.sparsity == pytest.approx(0.5, abs=0.1)


@pytest.mark.fastai
def test_trackers_and_loggers_see_nothing(make_learner, tmp_path):
    from fastai.vision.all import CSVLogger, EarlyStoppingCallback, SaveModelCallback, ShowGraphCallback

    callbacks = [CSVLogger(), SaveModelCallback(), EarlyStoppingCallback(patience=5)]
    learn = make_learner(cbs=callbacks, path=tmp_path)
    learn.fit(2)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) == 2
    learn.add_cb(ShowGraphCallback())
    before = state_of_learner(learn)
    sensitivity(learn, levels=[0.5], progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written
    assert state_of_learner(learn) == before


@pytest.mark.fastai
def test_measuring_does_not_change_later_training(make_learner):
    finals = []
    for measures in (False, True):
        learn = make_learner()
        learn.fit(1)
        if measures:
            sensitivity(learn, levels=[0.5], progress=False, criteria="snip")
            highest_sparsity(learn, 0.1)
        learn.fit(1)
        finals.append([parameter.detach() for parameter in learn.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


@pytest.mark.fastai
def test_texts_keep_their_order():
    """A loader of texts shuffles them in place when a batch is drawn."""
    text = pytest.importorskip("fastai.text.all", reason="needs fastai's language models")
    texts = text.TensorBase(torch.arange(60)).split(6)
    loader = text.LMDataLoader([text.LMTensorText(each) for each in texts], bs=2, seq_len=5, shuffle=True)
    dls = text.DataLoaders(loader, loader)
    model = nn.Sequential(nn.Embedding(60, 4), nn.Linear(4, 60))
    learn = text.Learner(dls, model, loss_func=text.CrossEntropyLossFlat())
    before = list(loader.items.idxs)
    sensitivity(learn, lambda model: 1.0, [0.5], criteria="snip", progress=False)
    assert list(loader.items.idxs) == before
