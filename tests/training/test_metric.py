"""Metrics: of a model, of a Learner by name, and their direction."""

import pytest
import torch
from conftest import EXAMPLE

from sparsifai import sensitivity
from sparsifai.training.metric import Metric


@pytest.fixture
def learn(make_learner):
    from fastai.vision.all import accuracy, error_rate

    return make_learner(metrics=[accuracy, error_rate])


def measured(model, metric, **options):
    return sensitivity(model, metric, [0.5], progress=False, **options)


def test_the_metric_is_called_in_evaluation_mode_without_gradients(net):
    modes = []
    measured(net, lambda model: modes.append((model.training, torch.is_grad_enabled())) or 0)
    assert set(modes) == {(False, False)}


def test_the_name_tells_the_direction_unless_it_is_given(mlp):
    def score(model):
        return 1

    def my_loss(model):
        return 1

    def error_rate(model):
        return 1

    assert measured(mlp, my_loss).lower_is_better
    assert measured(mlp, error_rate).lower_is_better
    assert not measured(mlp, score).lower_is_better
    assert not measured(mlp, my_loss, lower_is_better=False).lower_is_better
    assert measured(mlp, score, lower_is_better=True).lower_is_better


@pytest.mark.fastai
@pytest.mark.parametrize("metric", ["rmse", "mae", "mse", "exp_rmspe", "msle", "error_rate", "Perplexity", "accuracy"])
def test_the_direction_of_fastai_s_metrics(make_learner, metric):
    import fastai.metrics

    metric = getattr(fastai.metrics, metric)
    metric = metric() if isinstance(metric, type) else metric
    name = fastai.metrics.mk_metric(metric).name
    measure = Metric.of(make_learner(metrics=metric), name, None)
    assert measure.lower_is_better == (name != "accuracy")


@pytest.mark.fastai
def test_a_metric_by_name_by_function_and_of_the_model(learn):
    from fastai.vision.all import accuracy

    loss, right, wrong = learn.validate()
    by_name, given = (sensitivity(learn, metric, [0.5], progress=False) for metric in ("accuracy", accuracy))
    assert (by_name.baseline, by_name.metric, by_name.lower_is_better) == (right, "accuracy", False)
    assert given == by_name
    by_name = sensitivity(learn, "error_rate", [0.5], progress=False)
    assert (by_name.baseline, by_name.lower_is_better) == (wrong, True)
    assert by_name.values == tuple((pytest.approx(1 - value),) for (value,) in given.values)
    of_model = sensitivity(learn, lambda model: model(EXAMPLE).sum(), [0.5], progress=False)
    assert len(of_model.layers) == 5
    assert sensitivity(learn, "valid_loss", [0.5], progress=False).baseline == loss


@pytest.mark.fastai
def test_a_function_of_the_model_needs_no_training_data(learn):
    from fastai.vision.all import DataLoader, DataLoaders

    learn.dls = DataLoaders(DataLoader([], bs=2), learn.dls.valid)
    answer = sensitivity(learn, lambda model: 1.0, (0.5,), progress=False)
    assert answer.layers
    with pytest.raises(ValueError, match="no data to train on"):
        sensitivity(learn, lambda model: 1.0, (0.5,), criteria="snip", progress=False)
