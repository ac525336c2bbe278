"""`learn.shrink()` replaces the model of a Learner, and later fits train the smaller one."""

from functools import partial

import pytest
import torch
from conftest import small_learner
from fastai.vision.all import Adam, Callback, L, MixedPrecision, OptimWrapper, params
from torch import nn

pytest.importorskip("torch_pruning", reason="shrink needs it")

from sparsifai import KeepSparsity, SparsifyCallback, shrink  # noqa: E402
from sparsifai.support.table import percent  # noqa: E402


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def sparse_learner(model=None, **options):
    learn = small_learner(net() if model is None else model, **options)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=SparsifyCallback(0.5, "filter", "local", coupled=True))
    return learn


def weights(learn):
    """Copies of the weights, without biases: before a norm layer these have no gradient."""
    return [each.detach().clone() for name, each in learn.model.named_parameters() if name.endswith("weight")]


def fit(learn, epochs=1, **options):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2, **options)


@pytest.mark.parametrize("opt_func", [None, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_a_fit_after_it_trains_the_smaller_model(opt_func):
    learn = sparse_learner(opt_func=opt_func)
    larger, optimizer = learn.model, learn.opt
    expected = shrink(larger.eval(), torch.randn(2, 2, 8, 8))
    table = learn.shrink()
    assert (table.zeros, table.removed, table.zeros_left) == (7, 7, 0)
    assert [layer.weight.shape for layer in (learn.model[0][0], learn.model[1])] == [(4, 2, 3, 3), (3, 4, 3, 3)]
    assert all(torch.equal(each, expected.get_parameter(name)) for name, each in learn.model.named_parameters())
    assert learn.opt is not optimizer
    before, of_larger = weights(learn), [parameter.detach().clone() for parameter in larger.parameters()]
    fit(learn)
    assert all(not torch.equal(old, new) for old, new in zip(before, weights(learn), strict=True))
    assert all(map(torch.equal, of_larger, larger.parameters()))


def test_a_fit_after_replacing_the_model_by_hand_trains_nothing():
    learn = sparse_learner()
    learn.model = shrink(learn.model.eval(), torch.randn(2, 2, 8, 8))
    before = weights(learn)
    try:
        fit(learn)
    except ValueError:
        return  # refused
    assert all(map(torch.equal, before, weights(learn)))


def test_it_goes_before_the_first_fit_too():
    model = net()
    with torch.no_grad():
        model[0][0].weight[:4] = model[0][0].bias[:4] = 0
    learn = small_learner(model)
    assert learn.shrink(torch.randn(3, 2, 8, 8)).removed == 4
    before = weights(learn)
    fit(learn)
    assert not any(map(torch.equal, before, weights(learn)))


def test_groups_that_are_frozen_stay_frozen():
    learn = sparse_learner(splitter=lambda model: L(model[0], model[1:]).map(params))
    learn.freeze()
    learn.shrink()
    assert learn.opt.frozen_idx == 1
    before = weights(learn)
    fit(learn)
    moved = [not torch.equal(old, new) for old, new in zip(before, weights(learn), strict=True)]
    assert moved == [False, True, True, True]  # norm layers train
    learn.unfreeze()
    fit(learn)
    assert not torch.equal(before[0], weights(learn)[0])


def test_callbacks_of_the_learner_go_on():
    learn = sparse_learner(cbs=KeepSparsity())
    learn.shrink()
    fit(learn)
    fit(learn, cbs=SparsifyCallback(0.5, "filter", "local", coupled=True))
    assert learn.shrink().removed == 4
    assert [learn.model[0][0].out_channels, learn.model[1].out_channels] == [2, 1]


def test_zeros_that_stay_are_kept_in_later_fits():
    learn = sparse_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=SparsifyCallback(0.8, layers="1"))
    learn.shrink()
    zeros = learn.model[1].weight == 0
    assert 0 < zeros.float().mean() < 1
    fit(learn, 2)
    assert torch.equal(learn.model[1].weight == 0, zeros)


def test_what_is_kept_is_known_right_after_it():
    learn = sparse_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=SparsifyCallback(0.8, layers="1"))
    table = learn.shrink()
    report = learn.keep_sparsity.report()
    zeros = int((learn.model[1].weight == 0).sum())
    assert report.selected.zeros == learn.sparsity_report().selected.zeros == zeros > 0
    assert f"KeepSparsity keeps the {percent(report.selected.sparsity)} of zeros that it has" in str(table)


def test_the_table_tells_what_comes_next():
    learn = sparse_learner(splitter=lambda model: L(model[0], model[1:]).map(params))
    learn.freeze()
    told = "later fits train the smaller model, with a new optimizer; 1 of 2 parameter groups are frozen, as before\n"
    assert told in str(learn.shrink())
    model = net()
    with torch.no_grad():
        model[0][0].weight[:4] = model[0][0].bias[:4] = model[1].weight[:, :, 0] = 0
    learn = small_learner(model)
    with pytest.warns(UserWarning, match="nothing is removed"):
        assert "0.00% removed\nlater fits have a new optimizer\n" in str(small_learner(net()).shrink())
    told = "nothing keeps the {} of zeros that it has: learn.add_cb(KeepSparsity()) does"
    assert told.format(percent(72 / 306)) in str(learn.shrink())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_fits_right_after_it_keep_what_is_left(frozen, mixed):
    """Of an unfrozen or frozen Learner, in mixed precision or not, with the SparsifyCallback of the earlier fit."""
    learn = small_learner(net(), splitter=lambda model: L(model[0], model[1:]).map(params), cbs=[InBfloat16()] * mixed)
    callback = SparsifyCallback(0.5, "filter", "local", coupled=True)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=callback)
        learn.sparsify(0.75, 1, layers="1")
        if frozen:
            learn.freeze()
        learn.shrink()
        zeros = learn.model[1].weight == 0
        before = weights(learn)
        learn.fine_tune(1, 1e-2)
    assert torch.equal(learn.model[1].weight == 0, zeros)
    assert not any(map(torch.equal, before, weights(learn)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=callback)
    assert callback.sparsifier.model is learn.model


class InBfloat16(MixedPrecision):
    """Mixed precision of the CPU."""

    def before_fit(self):
        self.autocast, self.learn.scaler = torch.autocast("cpu", torch.bfloat16), torch.amp.GradScaler("cpu")
        self.scales = L()


def test_no_callback_has_its_name():
    import sparsifai.all

    kinds = [value for value in vars(sparsifai.all).values() if isinstance(value, type) and issubclass(value, Callback)]
    assert kinds
    names = {kind.__new__(kind).name if isinstance(kind.name, property) else kind.name for kind in kinds}
    assert not names & {"shrink", "sparsify", "sparsity_report"}


def test_errors_change_nothing():
    made = OptimWrapper(opt=torch.optim.SGD(net().parameters(), lr=0.1))
    learn = small_learner(net(), opt_func=made)
    model, optimizer = learn.model, learn.opt
    with pytest.raises(ValueError, match="^learn.shrink: opt_func is an OptimWrapper that was already made for the"):
        learn.shrink()
    learn.opt_func = Adam
    with pytest.raises(ValueError, match="^example_input does not run through Sequential"):
        learn.shrink(torch.randn(2, 5, 8, 8))
    learn.splitter = lambda model: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learn.shrink()
    assert learn.model is model
    assert learn.opt is optimizer


def test_an_interrupt_while_its_callbacks_are_told_leaves_the_larger_model(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    learn = sparse_learner()
    model, optimizer = learn.model, learn.opt
    with monkeypatch.context() as patched:
        patched.setattr("sparsifai.callbacks.keep.recovered_masks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn.shrink()
    assert learn.model is model
    assert learn.opt is optimizer
    fit(learn)  # KeepSparsity knows the model
    learn.shrink()


def test_zero_filters_that_stay_are_told_at_the_line_of_the_caller():
    model = net()
    with torch.no_grad():
        model[5].weight[:2] = 0
    with pytest.warns(UserWarning, match=r"^shrink: 2 of 2 zero filters cannot be removed: 5 \(2: yields") as warned:
        small_learner(model).shrink()
    assert warned[0].filename == __file__
