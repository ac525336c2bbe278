import copy

import pytest
import torch
from conftest import CRITERIA, EXAMPLE, small_net
from torch import nn

import sparsifai
from sparsifai import Plan, Sparsifier, between, bounded, contexts, criteria, schedules
from sparsifai.gradual.plan import plan_of


def planned(model, sparsity, *axes, schedule="lin", n_epoch=2, n_iter=4, every=None, example_input=None, **options):
    sparsifier = Sparsifier(model, *axes, example_input=example_input, **options)
    return plan_of(sparsifier, sparsity, schedule, n_epoch, n_iter, every, example_input)


def left(plan):
    return {layer.name: layer.size.left for layer in plan.layers}


def figures(size):
    return size.weights, size.left, size.bytes, size.bytes_left, size.flops, size.flops_left


# --- Layers ----------------------------------------------------------------------------------------------------------


def test_an_mlp_by_hand(mlp):
    plan = planned(mlp, 0.5, "weight", "local", example_input=torch.zeros(5, 4))
    first, second = plan.layers
    assert (first.name, first.kind, first.shape, first.why_dense) == ("0.weight", "Linear", (8, 4), "")
    # 32 weights: 4 bytes of bits, 16 that stay of 4 bytes each; one example.
    assert figures(first.size) == (32, 16, 128, 4 + 64, 2 * 32, 2 * 16)
    assert figures(second.size) == (16, 8, 64, 2 + 32, 2 * 16, 2 * 8)
    assert figures(plan.selected) == (48, 24, 192, 68 + 34, 96, 48)
    assert figures(plan.model) == (58, 34, 232, 68 + 34 + 40, 96, 48)
    assert plan.selected.sparsity == 0.5


def test_a_convolutional_net_by_hand(net):
    """Grouped and depthwise convolutions: every weight is applied once at each place of the output."""
    plan = planned(net, 0.5, "weight", "local", example_input=EXAMPLE)
    sizes = {layer.name: figures(layer.size) for layer in plan.layers}
    assert sizes == {
        "0.weight": (144, 72, 576, 18 + 288, 2 * 144 * 36, 144 * 36),
        "3.weight": (192, 96, 768, 24 + 384, 2 * 192 * 20, 192 * 20),
        "5.weight": (72, 36, 288, 9 + 144, 2 * 72 * 6, 72 * 6),
        "10.weight": (48, 24, 192, 6 + 96, 96, 48),
        "12.weight": (18, 9, 72, 3 + 36, 36, 18),  # 18 bits are 3 bytes
    }


def test_half_precision_has_half_the_bytes(mlp):
    assert planned(mlp.bfloat16(), 0.5, "weight", "local").layers[0].size.bytes_left == 4 + 32


def test_bytes_are_those_of_dense_weights_if_that_is_less(mlp):
    plan = planned(mlp, {"0": 1 / 32, "2": 0.0}, "weight", "local")
    assert [layer.size.left for layer in plan.layers] == [31, 16]
    assert [layer.size.bytes_left for layer in plan.layers] == [128, 64]


@pytest.mark.filterwarnings("ignore:the sparsity that was asked for cannot be reached")
def test_the_plan_has_the_remaining_weights_of_sparsify():
    for axes in [
        ("weight", "global"), ("weight", "erk"), ("weight", "2:4"), ("filter", "global"), ("row", "local"),
        ("kernel", "global"), ("channel", "local"), ("weight", bounded("global", {"0": 0.1})),
    ]:  # fmt: skip
        net = small_net()
        plan = planned(net, 0.5, *axes)
        sparsifier = Sparsifier(net, *axes)
        sparsifier.sparsify(0.5)
        assert left(plan) == {row.name: row.count.weights - row.count.zeros for row in sparsifier.report().rows}
        assert plan.selected.sparsity == sparsifier.sparsity


def test_erk_by_hand():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.Conv2d(32, 64, 3, bias=False))
    plan = planned(model, 0.8, "weight", "erk")
    # Densities in proportion to (16 + 32 + 3 + 3) / 4608 and (32 + 64 + 3 + 3) / 18432, so weights as 54 to 102.
    kept = 0.2 * (4608 + 18432)
    assert left(plan) == {"0.weight": round(kept * 54 / 156), "1.weight": round(kept * 102 / 156)}
    assert not any("split" in note for note in plan.notes)


def test_a_dictionary_of_sparsities_and_bounds(net):
    plan = planned(net, {"0": 0.5, "3": 0.25}, "weight", "local", exclude=["5", "10", "12"])
    assert left(plan) == {"0.weight": 72, "3.weight": 144, "5.weight": 72, "10.weight": 48, "12.weight": 18}
    assert [layer.why_dense for layer in plan.layers] == ["", "", "excluded", "excluded", "excluded"]
    assert plan.timeline[-1] == (2, pytest.approx((0.5 * 144 + 0.25 * 192) / 336))
    assert left(planned(net, 0.5, "weight", bounded("local", {"0": 0.25})))["0.weight"] == 108


def test_filters_and_the_biases_and_norm_layers_that_are_masked_with_them(net):
    plan = planned(net, 0.5, "filter", "local", example_input=EXAMPLE)
    assert left(plan) == {"0.weight": 72, "3.weight": 96, "5.weight": 36, "10.weight": 24, "12.weight": 18}
    assert plan.layers[-1].why_dense == "yields the model's output"
    assert plan.layers[-1].size.bytes_left == 72
    # Four biases of each convolution, twice four of each norm layer, three biases of the linear layer.
    assert "Not counted: 31 entries of biases and norm layers" in str(plan)
    assert not plan.collapsing


@pytest.mark.filterwarnings("ignore:the sparsity that was asked for cannot be reached")
def test_notes_of_the_context_and_why_dense(net):
    plan = planned(net, 0.5, "weight", "2:4", layers=["3", "12"])
    lines = str(plan).splitlines()
    assert next(line for line in lines if line.startswith("12.weight")).endswith("the last block has 2")
    assert next(line for line in lines if line.startswith("0.weight")).endswith("not in layers")


@pytest.mark.filterwarnings("ignore:.*their axes have no names")
def test_matrices_without_named_axes_are_listed():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Parameter(torch.zeros(2, 3)), nn.Linear(3, 3)

    layer = planned(Own(), 0.5).layers[-1]
    assert (layer.name, layer.size.left, layer.size.bytes_left) == ("table", 6, 24)
    assert layer.why_dense == "no named axes: register_layer"


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    plan = planned(model, 0.5, example_input=torch.zeros(1, 4))
    assert figures(plan.model) == (16, 8, 64, 34, 2 * 2 * 16, 2 * 16)
    assert [(layer.name, layer.size.weights, layer.why_dense) for layer in plan.layers] == [
        ("0.weight", 16, ""),
        ("1.weight", 0, "tied to 0.weight"),
    ]


# --- Near collapse ---------------------------------------------------------------------------------------------------


def test_layers_near_collapse_give_a_warning(mlp):
    # Of 32 weights 8 stay, as many as outputs; of 16 weights 4, and 8 inputs.
    with pytest.warns(UserWarning, match="2.weight") as caught:
        plan = planned(mlp, 0.75, "weight", "local")
    assert len(caught) == 1
    assert plan.collapsing == ("2.weight",)
    assert "Near collapse: less than 1%" in str(plan)
    assert "near collapse" in str(plan).splitlines()[-4]


def test_one_percent_of_many_weights():
    model = nn.Linear(1000, 1000, bias=False)
    assert not planned(model, 0.99, "weight", "local").collapsing
    with pytest.warns(UserWarning, match="near collapse"):
        planned(model, 0.9901, "weight", "local")
    filters = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 2))
    assert not planned(filters, 0.5, "filter").collapsing  # outputs without weights are what was asked for


def test_pruned_blocks_and_experts_are_not_near_collapse():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    plan = planned(blocks, 0.5, "block", example_input=torch.randn(2, 5, 8))
    assert not plan.collapsing
    assert {layer.note for layer in plan.layers} == {"its block is pruned", "its block is kept"}
    experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4))
    mixture = nn.ModuleDict({"router": nn.Linear(8, 4), "experts": experts})
    mixture.top_k = 2
    assert not planned(mixture, 0.5, "expert").collapsing


# --- Criteria --------------------------------------------------------------------------------------------------------

KNOWN_NOW = ("random", "large_final", "small_final", "squared_final", "normalized_final", "lamp", "large_init",
             "small_init", "large_init_large_final", "small_init_small_final")  # fmt: skip
BUILT_IN = [name for name in CRITERIA if criteria[name].__module__.startswith("sparsifai")]


@pytest.mark.filterwarnings("ignore:near collapse")  # as small_final with a global ranking is
@pytest.mark.parametrize("criterion", BUILT_IN)
def test_every_criterion(net, criterion):
    axes = ("weight", "local", criterion)
    plan = planned(net, 0.5, *axes)
    assert left(plan) == {"0.weight": 72, "3.weight": 96, "5.weight": 36, "10.weight": 24, "12.weight": 9}
    assert ("how many weights of each layer are pruned is known" in str(plan)) == (criterion not in KNOWN_NOW)
    plan = planned(net, 0.5, "weight", "global", criterion)
    assert plan.selected.left == 237
    assert ("Estimate: " in str(plan)) == (criterion not in KNOWN_NOW)
    if criterion not in KNOWN_NOW:
        assert left(plan) == left(planned(net, 0.5, "weight", "global", "large_final"))


def test_synflow_is_known_with_an_example(net):
    plan = planned(net, 0.5, "weight", "global", "synflow", example_input=EXAMPLE)
    sparsifier = Sparsifier(net, "weight", "global", "synflow", example_input=EXAMPLE)
    sparsifier.sparsify(0.5)
    assert plan.selected.left == 237
    assert left(plan) == {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    assert "The split between layers is that of the present weights" in str(plan)


def test_a_calibrated_sparsifier_needs_no_estimate(net):
    sparsifier = Sparsifier(net, criteria="snip")
    sparsifier.calibrate([(EXAMPLE + 1, torch.tensor([0, 1]))], nn.functional.cross_entropy)
    plan = plan_of(sparsifier, 0.5, "lin", 2, 4)
    sparsifier.sparsify(0.5)
    assert "Estimate" not in str(plan)
    assert left(plan) == {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}


def test_a_scope_of_one_layer_is_fixed_by_its_shape(net):
    assert "how many weights of each layer are pruned is known" in str(planned(net[0], 0.5, "weight", "global", "snip"))


def test_a_bounded_context_is_fixed_by_shapes_if_the_one_within_is(net):
    assert "Estimate" not in str(planned(net, 0.5, "weight", bounded("local", {"0": 0.25}), "snip"))
    assert "Estimate" in str(planned(net, 0.5, "weight", bounded("global", {"0": 0.25}), "snip"))


def test_groups_of_several_sizes_are_estimated():
    model = nn.Linear(6, 10)
    assert "Estimate" in str(planned(model, 0.5, "4x4", "local", "snip"))
    assert "Estimate" not in str(planned(model, 0.5, "2x2", "local", "snip"))


def test_an_estimate_pools_as_large_final_does():
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    plans = [planned(model, 0.5, "filter", "global", criterion) for criterion in ("taylor", "large_final")]
    assert left(plans[0]) == left(plans[1])


def test_a_note_gives_the_present_zeros(net):
    Sparsifier(net).sparsify(0.5)
    assert "50.00% of the weights are zero already" in str(planned(net, 0.5))
    assert "zero already" not in str(planned(small_net(), 0.5))


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_called_have_no_flops():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(self.used(x))

    plan = planned(Net(), 0.5, "weight", "local", example_input={"x": torch.zeros(3, 4)})
    assert [layer.size.flops for layer in plan.layers] == [2 * 2 * 16, None]
    assert figures(plan.model)[4:] == (64, 32)
    assert "not known of unused.weight" in str(plan)


def test_resnet50():
    torchvision = pytest.importorskip("torchvision", reason="its ResNet-50")
    plan = planned(torchvision.models.resnet50(), 0.9, "weight", "erk", example_input=torch.zeros(1, 3, 224, 224))
    assert plan.model.flops == 8_178_368_512  # 4.09 GMAC, as published
    assert plan.model.weights == 25_557_032
    assert plan.selected.sparsity == pytest.approx(0.9, abs=1e-6)
    by_name = {layer.name: layer.size for layer in plan.layers}
    assert by_name["layer1.0.conv1.weight"].sparsity == 0
    # Two of the others, in the proportion of the formula: sums of sides.
    first, second = by_name["layer4.2.conv2.weight"].left, by_name["conv1.weight"].left
    assert first / second == pytest.approx((512 + 512 + 3 + 3) / (64 + 3 + 7 + 7), rel=1e-3)
    assert plan.selected.flops_left == 1_977_824_896


# --- The timeline ----------------------------------------------------------------------------------------------------


def test_the_level_after_every_batch_and_epoch(mlp):
    plan = planned(mlp, 0.5, "weight", "local", schedule="lin")
    assert plan.timeline == tuple((batch / 4, 0.5 * batch / 8) for batch in range(9))
    assert plan.levels == (0.25, 0.5)
    # After 3 and 6 batches, and after the last.
    plan = planned(mlp, 0.5, "weight", "local", schedule="lin", every=3)
    assert [8 / 0.5 * level for _, level in plan.timeline] == [0, 0, 0, 3, 3, 3, 6, 6, 8]


def test_a_long_fit_has_about_a_thousand_points_and_all_ends_of_epochs(mlp):
    plan = planned(mlp, 0.5, "weight", "local", schedule=between("agp", 0, 0.5), n_epoch=7, n_iter=10_001)
    assert len(plan.timeline) < 1010
    assert [epoch for epoch, _ in plan.timeline if epoch.is_integer()] == list(range(8))
    assert plan.levels == pytest.approx([0.5 * (1 - (1 - min(epoch / 3.5, 1)) ** 3) for epoch in range(1, 8)])
    assert "Level after epoch 0: 0.00%" in str(plan)


def test_a_schedule_that_ends_below_the_target_gives_a_warning(mlp):
    with pytest.warns(UserWarning, match="ends at"):
        plan = planned(mlp, 0.5, "weight", "local", schedule="dsd")
    assert plan.timeline[4] == (1, 0.5)
    assert plan.timeline[-1] == (2, 0)


def plan_by(callback, *arguments, **options):
    """What callback.plan gives, with the warning of dsd."""
    if callback.pruning.ramp.schedule is schedules["dsd"]:
        with pytest.warns(UserWarning, match="ends at"):
            return callback.plan(*arguments, **options)
    return callback.plan(*arguments, **options)


@pytest.mark.fastai
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"regrow": "grad"}], ids=["plain", "every", "regrow"])
@pytest.mark.parametrize("schedule", schedules)
def test_the_timeline_is_that_of_a_fit(make_learner, schedule, options):
    learn = make_learner(steps=5)
    callback = sparsifai.SparsifyCallback(0.5, context="local", schedule=schedule, **options)
    before = plan_by(callback, learn.model, 2, 5)
    learn.fit(2, 0.01, cbs=callback)
    assert learn.recorder.hps["sparsity"] == pytest.approx([level for _, level in before.timeline[1:]], abs=1e-12)
    if callback.pruning.ramp.schedule(1.0) == 1:
        assert left(before) == {name: int(mask.sum()) for name, mask in callback.sparsifier.masks.items()}


@pytest.mark.fastai
def test_with_regrowth_masks_are_updated_a_hundred_times(make_learner):
    plan = sparsifai.SparsifyCallback(0.5, schedule="lin", regrow="grad").plan(make_learner().model, 1, 300)
    assert len({level for _, level in plan.timeline}) == 101
    assert [600 * level for _, level in plan.timeline[:5]] == pytest.approx([0, 0, 0, 3, 3])


@pytest.mark.fastai
def test_a_plan_before_in_and_after_a_fit_changes_nothing_of_it(make_learner):
    from fastai.callback.core import Callback

    def fitted(plans):
        learn = make_learner()
        callback = sparsifai.SparsifyCallback(0.5, criteria="random", schedule="lin")

        class Plans(Callback):
            order = callback.order + 1

            def after_backward(self):
                plans and callback.plan(self.learn.model, 2, 4, self.learn.x)

        assert not plans or callback.plan(learn.model, 2, 4).selected.left == 237
        learn.fit(2, 0.01, cbs=[callback, Plans()])
        assert not plans or callback.plan(learn.model, 2, 4).selected.left == 237
        learn.fit(1, 0.01, cbs=callback)
        return learn.model.state_dict()

    plain, with_plans = fitted(False), fitted(True)
    assert all(torch.equal(plain[name], value) for name, value in with_plans.items())


@pytest.mark.fastai
def test_the_callback_plans_with_its_own_options(make_learner):
    net = make_learner().model
    callback = sparsifai.SparsifyCallback({"0": 0.5, "3": 0.25}, "filter", "local", exclude="3", every=2)
    with pytest.raises(ValueError, match="matches only layers that stay dense"):
        callback.plan(net, 2, 4)
    callback = sparsifai.SparsifyCallback({"0": 0.5, "3": 0.25}, "filter", "local", "snip", seed=3, every=2)
    plan = callback.plan(net, 2, 4, EXAMPLE)
    assert isinstance(plan, Plan)
    assert left(plan) == {"0.weight": 72, "3.weight": 144, "5.weight": 72, "10.weight": 48, "12.weight": 18}
    assert plan.model.flops == 2 * (144 * 36 + 192 * 20 + 72 * 6 + 48 + 18)
    assert callback.sparsifier is None


# --- Nothing is changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["random", "movement", "snip", "synflow", "updating_movmag"])
def test_nothing_is_changed(net, criterion):
    net.append(nn.Dropout())
    net[0].eval()
    net(EXAMPLE + torch.randn(2, 2, 8, 8)).sum().backward()
    sparsifier = Sparsifier(net, "weight", "global", criterion, example_input=EXAMPLE)
    gradients = [parameter.grad for parameter in net.parameters()]
    values = copy.deepcopy([net.state_dict(), gradients, sparsifier.state_dict()])
    parameters, modes, random = list(net.parameters()), [each.training for each in net.modules()], torch.get_rng_state()
    attributes, masks = dict(vars(sparsifier)), sparsifier.masks
    plan_of(sparsifier, 0.5, "agp", 3, 10, example_input=EXAMPLE)
    for before, after in zip(values, [net.state_dict(), gradients, sparsifier.state_dict()], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(before is after for before, after in zip(parameters, net.parameters(), strict=True))
    assert all(before is each.grad for before, each in zip(gradients, parameters, strict=True))
    assert [each.training for each in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(each._forward_hooks or each._forward_hooks_with_kwargs for each in net.modules())
    assert dict(vars(sparsifier)) == attributes
    assert all(sparsifier.masks[name] is mask for name, mask in masks.items())
    assert sparsifier.level == 0


def test_a_forward_that_fails_leaves_nothing(net):
    with pytest.raises(ValueError, match="does not run"):
        planned(net, 0.5, example_input=torch.zeros(1, 5, 8, 8))
    assert all(each.training and not each._forward_hooks for each in net.modules())


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_text(mlp):
    lines = str(planned(mlp, 0.5, "weight", "local", exclude="2", example_input=torch.zeros(1, 4))).splitlines()
    assert lines[:2] == [
        "Plan for 50.00% zeros (weight, local, large_final, lin) in 2 x 4 batches; nothing is trained yet.",
        "Level after epoch 0: 0.00%, 1: 25.00%, 2: 50.00%.",
    ]
    assert "only sparse kernels keep" in lines[2]
    assert [" ".join(line.split()) for line in (*lines[-5:-3], *lines[-2:])] == [
        "0.weight Linear 8x4 32 16 50.00% 128 68 64 32 no: sides not multiples of 16",
        "2.weight Linear 2x8 16 16 0.00% 64 64 32 32 no: sides not multiples of 16 excluded",
        "selected layers 32 16 50.00% 128 68 64 32",
        "whole model 58 42 27.59% 232 172 96 64",
    ]
    assert "FLOPs" not in str(planned(mlp, 0.5))
    assert repr(planned(mlp, 0.5)) == str(planned(mlp, 0.5))


def test_html_escapes_and_has_all_rows():
    html = planned(nn.ModuleDict({"<b>": nn.Linear(2, 2)}), 0.5)._repr_html_()
    assert "&lt;b&gt;.weight" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 4
    assert "<caption>Plan for 50.00% zeros" in html


def test_plots(mlp):
    matplotlib = pytest.importorskip("matplotlib", reason="the plots are drawn with it")
    matplotlib.use("Agg")
    with pytest.warns(UserWarning, match="near collapse"):
        plan = planned(mlp, 0.75, "weight", "local")
    ax = plan.plot()
    assert [bar.get_width() for bar in ax.patches] == [0.75, 0.75]
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert ax.patches[1].get_facecolor() == matplotlib.colors.to_rgba("tab:red")
    assert plan.plot(ax) is ax
    ax = plan.plot_schedule()
    assert list(zip(*ax.lines[0].get_data(), strict=True)) == list(plan.timeline)
    assert plan.plot_schedule(ax) is ax
    matplotlib.pyplot.close("all")


@pytest.mark.fastai
def test_warnings_name_the_line_of_the_call(make_learner):
    model = make_learner().model
    with pytest.warns(UserWarning, match="near collapse") as caught:
        sparsifai.SparsifyCallback(0.95, context="local").plan(model, 2, 4)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_criterion_that_draws_and_compares_draws_the_same_after_a_plan():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))

    def drawn(weight, init, rng):
        return torch.rand(weight.shape, generator=rng) + 0 * init

    masks = []
    for plans in (False, True):
        sparsifier = Sparsifier(copy.deepcopy(model), criteria=drawn)
        if plans:
            plan_of(sparsifier, 0.5, "lin", 2, 4)
        sparsifier.sparsify(0.5)
        masks.append(sparsifier.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_a_released_model_cannot_be_planned(mlp):
    sparsifier = Sparsifier(mlp)
    sparsifier.release()
    with pytest.raises(RuntimeError, match="has released its model"):
        plan_of(sparsifier, 0.5, "lin", 2, 4)


def test_a_context_of_ones_own_can_declare_that_shapes_fix_the_counts(mlp):
    def context(layers, sparsity):
        return contexts["local"](layers, sparsity)

    assert "training changes it" in str(planned(mlp, 0.5, "weight", context))
    context.fixes_counts = True
    assert "training changes it" not in str(planned(mlp, 0.5, "weight", context))
