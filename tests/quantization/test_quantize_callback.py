"""QuantizeCallback: what a layer sees in its forward, what is left after it, and what the tables of a fit show."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

fastai = pytest.importorskip("fastai.vision.all", reason="the callback is fastai's")
pytestmark = pytest.mark.fastai

from conftest import small_learner, small_net  # noqa: E402
from fastai.callback.fp16 import MixedPrecision  # noqa: E402
from fastai.learner import Callback  # noqa: E402
from watch import Invented  # noqa: E402

from sparsifai.all import KeepSparsity, QuantizeCallback, Sparsifier, SparsifyCallback  # noqa: E402
from sparsifai.quantization.fake_quantization import rounded_weight  # noqa: E402

LAYERS = ("0", "3", "5", "10", "12")  # of small_net


def rounded(weight, axis=0):
    """The definition, computed in float64: s round(w / s), s = max |w| / 127 of each output."""
    flat = weight.detach().double().movedim(axis, 0).flatten(1)
    scale = flat.abs().amax(1, keepdim=True) / 127
    integers = (flat / scale.clamp(min=1e-300)).round()
    return (integers * scale).view(weight.movedim(axis, 0).shape).movedim(0, axis).float()


class SeenWeights(Callback):
    """Notes the weights that layers have in their forwards, beside the parameters of that moment."""

    order = 99

    def __init__(self):
        self.seen = []

    def before_batch(self):
        def note(module, *_):
            self.seen.append((self.training, self._pct, module, module.weight.detach().clone(), own[module]))

        self._pct = (self.epoch * self.n_iter + self.iter) / (self.n_epoch * self.n_iter) if self.training else None
        layers = [self.model.get_submodule(name) for name in LAYERS]
        own = {layer: layer._parameters["weight"].detach().clone() for layer in layers}
        # Before the hooks that the callback puts on them in this batch.
        self.handles = [layer.register_forward_hook(note, prepend=True) for layer in layers]

    def after_batch(self):
        for handle in self.handles:
            handle.remove()


class Between(Callback):
    """Counts hooks, and attributes that hide parameters, whenever a batch is over."""

    order = 99

    def after_batch(self):
        for module in self.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not vars(module).keys() & module._parameters.keys()


def test_beside_pruning_zeros_stay_and_layers_see_rounded_weights_from_the_start_on():
    learn = small_learner(steps=8, opt_func=fastai.Adam)
    parameters, keys = list(learn.model.parameters()), list(learn.model.state_dict())
    sparsify, seen = SparsifyCallback(0.75), SeenWeights()
    learn.fit(4, 0.02, wd=0.1, cbs=[sparsify, QuantizeCallback(0.5), seen, Between()])
    assert all(mine is before for mine, before in zip(learn.model.parameters(), parameters, strict=True))
    assert list(learn.model.state_dict()) == keys
    assert sparsify.sparsifier.sparsity == pytest.approx(0.75, abs=2e-3)
    early = [row for row in seen.seen if row[0] and row[1] < 0.5]
    late = [row for row in seen.seen if row[0] and row[1] >= 0.5]
    assert len(early) == len(late) == 16 * len(LAYERS)
    assert all(torch.equal(weight, own) for *_, weight, own in early)
    for *_, weight, own in late:
        assert torch.allclose(weight, rounded(own), atol=1e-6)
        assert (weight[own == 0] == 0).all()
    assert any((own == 0).any() and not torch.equal(weight, own) for *_, weight, own in late)
    moved = [[own for *_, module, _, own in late if module is learn.model[number]] for number in (0, 12)]
    assert all(not torch.equal(owns[0], owns[-1]) for owns in moved)  # the optimizer goes on training them
    # A later fit, which only quantizes and keeps the zeros.
    zeros = [parameter == 0 for parameter in learn.model.parameters()]
    assert learn._grab_cbs(KeepSparsity)
    learn.fit(1, 0.02, wd=0.1, cbs=QuantizeCallback(0))
    assert all((parameter[zero] == 0).all() for parameter, zero in zip(learn.model.parameters(), zeros, strict=True))


@pytest.mark.parametrize("changing", [{"straight_through": True}, {"regrow": "grad", "schedule": "one_shot"}])
def test_masks_may_change_their_mind_beside_it(changing):
    learn, masks = small_learner(steps=8), []
    sparsify = SparsifyCallback(0.5, **changing)
    note = Callback(after_batch=lambda self: masks.append(sparsify.sparsifier.masks["3.weight"].clone()))
    learn.fit(2, 0.05, cbs=[sparsify, QuantizeCallback(0), Between(), note])
    assert sparsify.sparsifier.sparsity == pytest.approx(0.5, abs=3e-3)
    assert not all(torch.equal(masks[0], mask) for mask in masks)


def test_gradients_are_those_at_the_rounded_weights_and_inputs():
    learn = small_learner(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), steps=1)
    layer, quantize, taken = learn.model[1], QuantizeCallback(0), {}

    def note(self):
        taken.update(weight=layer._parameters["weight"].detach().clone(), gradient=layer.weight.grad.clone())
        taken.update(inputs=self.x.flatten(1), targets=self.y)

    learn.fit(1, cbs=[quantize, Callback(after_backward=note)])
    low, high = quantize.ranges["1"]
    assert (low, high) == (taken["inputs"].min(), taken["inputs"].max())
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    inputs = ((taken["inputs"] / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
    weight = rounded(taken["weight"]).requires_grad_()
    with torch.enable_grad():
        nn.functional.cross_entropy(nn.functional.linear(inputs, weight, layer.bias), taken["targets"]).backward()
    assert not torch.allclose(inputs, taken["inputs"], atol=1e-4)
    # The bias has moved in the step, which is small.
    assert torch.allclose(weight.grad, taken["gradient"], atol=2e-3)


def test_the_table_shows_the_rounded_model_and_validate_the_float_one():
    learn = small_learner(steps=8)
    quantize = QuantizeCallback(0.5)
    with pytest.raises(ValueError, match="no fit has reached start=, so no ranges are known; fit first"):
        quantize.fake_quantized().__enter__()
    learn.fit(2, 0.05, cbs=quantize)
    (shown,) = learn.recorder.values[-1][1:2]
    (plain,), ranges = learn.validate(), quantize.ranges
    with quantize.fake_quantized():
        assert learn.validate()[0] == pytest.approx(shown, abs=1e-7)
    assert quantize.ranges == ranges  # validation data do not move them
    assert learn.validate()[0] == plain != pytest.approx(shown, abs=1e-7)
    learn.add_cb(quantize)  # as one that stays on the Learner
    with quantize.fake_quantized():
        assert learn.validate()[0] == pytest.approx(shown, abs=1e-7)
    assert learn.validate()[0] == plain


def test_trackers_ignore_the_epochs_of_the_float_model(tmp_path):
    learn = small_learner(steps=2, path=tmp_path)
    learn.metrics = [Invented(learn, lambda epoch: [9.0, 8.0, 2.0, 3.0, 1.0, 0.0][epoch])]
    saved = []
    save = fastai.SaveModelCallback(monitor="invented", reset_on_fit=False)
    save.best = 100.0  # of an earlier fit of the float model
    note = Callback(after_epoch=lambda self: saved.append(save.best))
    note.order = 99
    learn.fit(6, cbs=[QuantizeCallback(0.4), save, note])
    assert saved == [100.0, 100.0, 2.0, 3.0, 3.0, 3.0]
    stop = fastai.EarlyStoppingCallback(monitor="invented", patience=1)
    learn.fit(6, cbs=[QuantizeCallback(0.9), stop])
    assert len(learn.recorder.values) == 6


def test_a_fit_that_ends_too_early_tells_so():
    class Stop(Callback):
        def after_batch(self):
            raise fastai.CancelFitException

    learn = small_learner()
    with learn.no_logging(), pytest.warns(UserWarning, match="ended before start=0.75, so nothing was quantized"):
        learn.fit(2, cbs=[QuantizeCallback(), Stop()])


def test_copies_of_a_model_in_a_batch_are_float_models():
    learn = small_learner(steps=1)
    copies = []

    def note(self):
        copies.extend([copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))])

    learn.fit(1, 0.0, cbs=[QuantizeCallback(0), Callback(after_loss=note)])
    images = torch.randn(2, 2, 8, 8)
    model = learn.model.eval()
    for each in copies:
        each.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(each.eval()(images), model(images))
    assert copy.deepcopy(QuantizeCallback(0.5, exclude="0")).exclude == ["0"]


def test_lr_find_and_layers_and_layers_that_stay_float():
    learn = small_learner(steps=8)
    quantize = QuantizeCallback(0, layers=["0", "1?"], exclude="12")
    learn.add_cb(quantize)
    learn.lr_find(num_it=4, show_plot=False)
    assert quantize.ranges == {}
    learn.fit(1)
    assert quantize.ranges.keys() == {"0", "10"}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm = nn.LSTM(16, 8, batch_first=True), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.norm(self.rnn(x.flatten(2).transpose(1, 2).flatten(1).unflatten(1, (8, 16)))[0][:, -1]))


def test_weights_that_cannot_be_rounded_are_told():
    learn = small_learner(Recurrent())
    with learn.no_logging(), pytest.warns(UserWarning, match="3 weights stay float.*: rnn.weight_ih_l0"):
        learn.fit(1, cbs=QuantizeCallback(0))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        tokens = self.embed(x.flatten(1, 2))
        padding = torch.arange(16).expand(len(x), 16) > 12  # for which torch nests tensors in evaluation mode
        return self.out(self.encoder(tokens, src_key_padding_mask=padding).mean(1))


def test_attention_sees_its_rounded_projections_in_training_and_in_validation():
    learn = small_learner(Attention())
    seen = []
    attention = learn.model.encoder.layers[0].self_attn

    def note(self):
        handle = attention.register_forward_hook(
            lambda module, *_: seen.append((module.in_proj_weight.clone(), module.out_proj.weight.clone())),
            prepend=True,
        )
        self.learn.handle = handle

    remove = Callback(after_batch=lambda self: self.learn.handle.remove())
    learn.fit(1, 0.0, cbs=[QuantizeCallback(0), Callback(before_batch=note), remove])
    assert len(seen) == 6
    assert learn.model.encoder.use_nested_tensor
    for projection, out in seen:
        assert torch.allclose(projection, rounded(attention.in_proj_weight), atol=1e-6)
        assert torch.allclose(out, rounded(attention.out_proj.weight), atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.recomputes = body, True

    def forward(self, x):
        x = x.requires_grad_()
        return checkpoint(self.body, x, use_reentrant=False) if self.recomputes else self.body(x)


def test_a_forward_that_is_run_again_in_the_backward_rounds_again():
    def trained(recomputes):
        torch.manual_seed(0)
        learn = small_learner(Checkpointed(nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 3))))
        learn.model.recomputes = recomputes
        learn.fit(1, 0.1, cbs=QuantizeCallback(0))
        return learn.model.state_dict()

    # The ranges move twice in a batch, so that the second forward rounds a little differently.
    for one, other in zip(trained(True).values(), trained(False).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


class Bfloat16(MixedPrecision):
    """Mixed precision on the CPU."""

    def before_fit(self):
        self.autocast = torch.autocast("cpu", torch.bfloat16)
        self.scales = False

    def before_batch(self):
        self.autocast.__enter__()

    def after_pred(self):
        if next(flatten_of(self.pred)).dtype == torch.bfloat16:
            self.learn.pred = self.pred.float()

    def after_loss(self):
        self.autocast.__exit__(None, None, None)

    def before_backward(self):
        pass

    def before_step(self):
        pass

    def after_step(self):
        pass

    def after_fit(self):
        pass


def flatten_of(value):
    yield value


def test_mixed_precision_keeps_the_zeros_and_trains():
    learn = small_learner(steps=8)
    before = learn.model[0].weight.detach().clone()
    sparsify = SparsifyCallback(0.75)
    learn.fit(1, 0.05, cbs=[sparsify, QuantizeCallback(0), Bfloat16(), Between()])
    assert sparsify.sparsifier.sparsity == pytest.approx(0.75, abs=2e-3)
    kept = learn.model[0].weight != 0
    assert not torch.equal(before[kept], learn.model[0].weight[kept])


def test_a_pruned_filter_has_no_range_and_gives_no_nan():
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([0.0, -1.0, 0.5])
    value = rounded_weight(weight.requires_grad_(), 0)
    value.sum().backward()
    assert torch.equal(value[0], torch.zeros(3))
    assert torch.equal(weight.grad, torch.ones(2, 3))  # so that criteria see how it would change
    model = small_net()
    Sparsifier(model, "filter", "local").sparsify(0.5)
    learn = small_learner(model, steps=4)
    learn.fit(1, 0.05, cbs=[KeepSparsity(), QuantizeCallback(0)])
    assert all(parameter.isfinite().all() for parameter in learn.model.parameters())
    assert (learn.model[0].weight.flatten(1) == 0).all(1).sum() == 4


def test_after_shrink_the_callback_starts_anew():
    pytest.importorskip("torch_pruning", reason="shrink needs it")
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8, 3))  # fmt: skip
    learn = small_learner(net)
    quantize = QuantizeCallback(0)
    learn.add_cb(quantize)
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", "local"))
    learn.shrink()
    assert quantize.ranges == {}
    learn.fit(1)
    assert learn.model[0].out_channels == 4
    assert quantize.ranges.keys() == {"0", "2", "5"}


@pytest.mark.parametrize("opt_func", [partial(fastai.SGD, mom=0.9), fastai.RMSProp])
def test_frozen_layers_are_rounded_too_and_do_not_move(opt_func):
    learn = small_learner(opt_func=opt_func, splitter=lambda model: [list(model[:6].parameters()),
                                                                     list(model[6:].parameters())])  # fmt: skip
    learn.freeze()
    before = learn.model[0].weight.detach().clone()
    quantize = QuantizeCallback(0)
    learn.fit(1, 0.1, cbs=quantize)
    assert torch.equal(before, learn.model[0].weight)
    assert "0" in quantize.ranges


def test_a_sparse_model_whose_zeros_nothing_keeps_is_told(capsys):
    model = small_net()
    Sparsifier(model).sparsify(0.5)
    told = "QuantizeCallback: nothing keeps the 50.0"
    learn = small_learner(model)
    with learn.no_logging(), pytest.warns(UserWarning, match=f"^{told}.*; add KeepSparsity"):
        learn.fit(1, cbs=QuantizeCallback(start=0))
    for callbacks in ([KeepSparsity()], [SparsifyCallback(0.5)]):
        model = small_net()
        Sparsifier(model).sparsify(0.5)
        small_learner(model).fit(1, cbs=[QuantizeCallback(start=0), *callbacks])
    small_learner().fit(1, cbs=QuantizeCallback(start=0))  # norm layers begin with biases of zeros
    assert told not in capsys.readouterr().out
