"""Groups of weights of several layers: attention heads and the neurons of MLPs are ranked and pruned as one."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from attentions import BLOCKS, WIDTH, Fused, FusedGatedMlp, Interleaved, Mlp, Net, Separate, Torch, masks_of, weights_of
from conftest import dense_of, misses_sparsity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsifai import Sparsifier, bounded, contexts, granularities

X = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def lowest(scores, sizes, wanted):
    """Numbers of the groups to prune in each block, ranked together: the definition, group by group.

    scores: for each block, a score per group. sizes: for each block, the number of weights in a group. wanted: how many
    weights to prune.
    """
    ranked = sorted(
        (float(score), block, group) for block, of_block in enumerate(scores) for group, score in enumerate(of_block)
    )
    best = set({block: (block, group) for _, block, group in ranked}.values())
    pruned, total = [[] for _ in scores], 0
    for _, block, group in ranked:
        if (block, group) not in best and abs(total + sizes[block] - wanted) <= abs(total - wanted):
            pruned[block].append(group)
            total += sizes[block]
    return pruned


@misses_sparsity
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_masks_are_those_of_the_groups_that_are_written_out_by_hand(kind, context):
    make, granularity, groups, _ = BLOCKS[kind]
    model = Net(make)
    means = [
        [
            torch.cat([each.flatten() for each in weights_of(model, block, group).values()]).double().abs().mean()
            for group in groups
        ]
        for block in range(2)
    ]
    sizes = [sum(each.numel() for each in weights_of(model, block, groups[0]).values()) for block in range(2)]
    # Rows that belong to no group count, too.
    weights = sum(model.blocks[0].get_parameter(name).numel() for name in groups[0])
    sparsifier = Sparsifier(model, granularity, context)
    for fraction in (0.3, 0.5, 1.0):
        if context == "local":
            pruned = [lowest([means[block]], [sizes[block]], fraction * weights)[0] for block in range(2)]
        else:
            pruned = lowest(means, sizes, fraction * 2 * weights)
        sparsifier.sparsify(fraction)
        expected = masks_of(model, kind, pruned)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter != 0, expected.get(name, torch.ones_like(parameter) > 0)), name
        assert {name: mask.expand_as(expected[name]).tolist() for name, mask in sparsifier.masks.items()} == {
            name: mask.tolist() for name, mask in expected.items() if name in sparsifier.masks
        }


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_pruned_hands_nothing_on(kind):
    make, granularity, groups, _ = BLOCKS[kind]
    model = Net(make)
    Sparsifier(model, granularity, "local", "random").sparsify(0.5)
    before = model(X)
    zero = {name for name, parameter in model.named_parameters() if (parameter == 0).any()}
    for name, parameter in model.named_parameters():
        reads = name.endswith(("o.weight", "proj.weight", "down.weight"))
        if name in zero and not reads:  # whatever stands in the rows of a pruned group, it is not read
            parameter.data[parameter == 0] = torch.randn(int((parameter == 0).sum()))
    assert torch.allclose(model(X), before, atol=1e-6)


def pruned_of(sparsifier):
    """How many groups of each block are pruned."""
    return [pruned for pruned, _ in sparsifier.report().joint.values()]


@pytest.mark.parametrize("context", [*contexts.values(), bounded("global", {"blocks.0": (0, 0.17)})])
@pytest.mark.parametrize("make", [lambda: Separate(6), lambda: Fused(6)])
def test_half_of_the_heads_are_half_of_the_weights_in_every_context(make, context):
    if context is contexts["per_output"]:
        with pytest.raises(ValueError, match="per_output ranks the groups within one output"):
            Sparsifier(Net(make), "head", context).sparsify(0.5)
        return
    sparsifier = Sparsifier(Net(make), "head", context)
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5
    assert sum(pruned_of(sparsifier)) == 6
    if isinstance(context, type(bounded("global", {"x": 0.5}))):
        assert pruned_of(sparsifier) == [1, 5]


def test_blocks_of_n_of_m_are_refused():
    with pytest.raises(ValueError, match="context 2:4: blocks.0.q.weight has no groups along 'in'"):
        Sparsifier(Net(Separate), "head", "2:4").sparsify(0.5)


def test_attentions_of_different_sizes_are_counted_in_weights():
    class Different(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = Separate(4), Fused(12)

        def forward(self, x):
            return self.large(self.small(x))

    model = Different()
    nn.init.constant_(model.large.qkv.weight, 0.01)
    nn.init.constant_(model.large.proj.weight, 0.01)
    sparsifier = Sparsifier(model, "head")
    sparsifier.sparsify(0.5)
    assert sparsifier.sparsity == 0.5
    assert sparsifier.report().joint == {"small": (0, 4), "large": (8, 12)}


def test_equal_scores_are_pruned_in_index_order():
    model = Net(lambda: Separate(4))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    sparsifier = Sparsifier(model, "head")
    sparsifier.sparsify(0.5)
    assert pruned_of(sparsifier) == [3, 1]
    assert sparsifier.masks["blocks.1.q.weight"][:, 0].tolist() == [False] * 2 + [True] * 6


@pytest.mark.parametrize("kind", ["separate", "fused"])
@pytest.mark.parametrize(("number", "pruned"), [(2, 2), (3, 3)])
def test_round_to_keeps_a_multiple_of_heads(kind, number, pruned):
    make = {"separate": lambda: Separate(6), "fused": lambda: Fused(6)}[kind]
    sparsifier = Sparsifier(Net(make), "head", "local", round_to=number)
    sparsifier.sparsify(0.4)
    assert pruned_of(sparsifier) == [pruned, pruned]


def test_a_rising_sparsity_only_prunes_more_and_a_falling_one_revives_with_a_warning():
    sparsifier = Sparsifier(Net(lambda: Separate(6)), "head")
    earlier = {name: torch.ones(1, 1, dtype=torch.bool) for name in sparsifier.masks}
    for fraction in (0.2, 0.5, 0.7):
        sparsifier.sparsify(fraction)
        assert all((mask <= earlier[name]).all() for name, mask in sparsifier.masks.items())
        earlier = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with pytest.warns(UserWarning, match="revives a whole head from zero. No gradient reaches a head"):
        sparsifier.sparsify(0.5)
    assert sum(int((~sparsifier.masks[f"blocks.{block}.o.weight"]).sum()) for block in (0, 1)) == 6 * 2
    assert sum(pruned_of(sparsifier)) == 8  # those that are revived are zero still


def test_steps_end_where_one_step_does():
    models = [Net(lambda: Separate(6)) for _ in range(2)]
    for model, steps in zip(models, (1, 5), strict=True):
        Sparsifier(model, "head").sparsify(0.5, steps=steps)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_each_attention_can_have_a_sparsity_of_its_own_and_its_layers_need_the_same():
    sparsifier = Sparsifier(Net(lambda: Separate(6)), "head")
    sparsifier.sparsify({"blocks.0": 0.5, "blocks.1": 1 / 3})
    assert pruned_of(sparsifier) == [3, 2]
    sparsifier = Sparsifier(Net(lambda: Separate(6)), "head")
    with pytest.raises(ValueError, match="are pruned together, because their heads are made of weights of both"):
        sparsifier.sparsify({"blocks.0.q": 0.5})
    assert sparsifier.sparsity == 0


def test_an_attention_may_lose_all_heads():
    model = Net(lambda: Separate(6))
    for parameter in model.blocks[1].parameters():
        parameter.data *= 10
    sparsifier = Sparsifier(model, "head", may_empty=True)
    sparsifier.sparsify(0.5)
    assert pruned_of(sparsifier) == [6, 0]
    assert all((parameter == 0).all() for parameter in (model.blocks[0].q.weight, model.blocks[0].q.bias))
    assert torch.equal(model.blocks[0](torch.randn(1, 2, WIDTH))[0, 0], model.blocks[0].o.bias)


def test_straight_through_keeps_heads_again_where_others_shrink():
    model = Net(lambda: Separate(6))
    with pytest.warns(UserWarning, match="no gradient reaches a head that is pruned"):
        sparsifier = Sparsifier(model, "head", straight_through=True)
    sparsifier.sparsify(0.5)
    before = pruned_of(sparsifier)
    with sparsifier.dense_weights():
        for parameter in model.blocks[0].parameters():
            parameter.data *= 100
    sparsifier.sparsify(0.5)
    assert before != pruned_of(sparsifier) == [1, 5]
    assert sparsifier.sparsity == 0.5
    assert (model.blocks[0].q.weight != 0).any(1).sum() == 10


def test_regrowth_of_heads_is_refused_since_they_would_not_learn():
    with pytest.raises(ValueError, match="no gradient reaches a head whose weights are all zero, so it"):
        Sparsifier(Net(Separate), "head", regrow="grad")
    model = Net(Separate)
    Sparsifier(model, "head", "local").sparsify(0.3)
    F.cross_entropy(model(X), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.blocks.named_parameters():
        assert (parameter.grad[parameter == 0] == 0).all(), name


def train(model, sparsifier, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    for _ in range(steps):
        F.cross_entropy(model(X), torch.tensor([0, 1, 2, 0])).backward()
        sparsifier.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.apply_masks()


@pytest.mark.parametrize("kind", ["separate", "fused multi-query", "torch with kdim", "fused gated mlp"])
def test_a_state_resumes_and_copies_go_on_by_themselves(kind):
    make, granularity, _, _ = BLOCKS[kind]
    model = Net(make)
    sparsifier = Sparsifier(model, granularity)
    sparsifier.sparsify(0.34)
    train(model, sparsifier)
    again = Net(make)
    again.load_state_dict(model.state_dict())
    resumed = Sparsifier(again, granularity)
    resumed.load_state_dict(copy.deepcopy(sparsifier.state_dict()))
    copied = copy.deepcopy(sparsifier)
    pickled = pickle.loads(pickle.dumps(sparsifier))
    several = [(model, sparsifier), (again, resumed), (copied.model, copied), (pickled.model, pickled)]
    for each, of_it in several:
        train(each, of_it)
        of_it.sparsify(0.5)
        train(each, of_it)
    for each, of_it in several[1:]:
        assert of_it.report().joint == sparsifier.report().joint
        for one, other in zip(each.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert all((parameter[~mask.expand_as(parameter)] == 0).all() for parameter, mask in _masked(each, of_it))


def _masked(model, sparsifier):
    return [(model.get_parameter(name), mask) for name, mask in sparsifier.masks.items()]


@pytest.mark.parametrize("kind", BLOCKS)
def test_masks_are_recovered_from_zeros(kind):
    make, granularity, _, _ = BLOCKS[kind]
    model = Net(make)
    sparsifier = Sparsifier(model, granularity, "local")
    sparsifier.sparsify(0.34)
    again = Sparsifier(model, granularity, "local")
    again.recover_masks()
    assert all(torch.equal(mask, sparsifier.masks[name]) for name, mask in again.masks.items())
    assert again.report().joint == sparsifier.report().joint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_numbers(dtype):
    model, wide = Net(Fused).to(dtype), Net(Fused).to(dtype).double()
    for each in (model, wide):
        Sparsifier(each, "head").sparsify(0.5)
    for one, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(one.double(), other)


def test_frozen_attentions_join_as_a_whole_when_they_are_trained():
    model = Net(lambda: Separate(6))
    model.blocks[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="are frozen, so they stay dense until they are trained"):
        sparsifier = Sparsifier(model, "head", "local")
    sparsifier.sparsify(0.5)
    assert sparsifier.report().joint == {"blocks.1": (3, 6)}
    model.blocks[0].q.requires_grad_(True)
    sparsifier.sparsify(0.5)  # key, value and output are still frozen
    assert sparsifier.report().joint == {"blocks.1": (3, 6)}
    model.blocks[0].requires_grad_(True)
    sparsifier.sparsify(0.5)
    assert sparsifier.report().joint == {"blocks.0": (3, 6), "blocks.1": (3, 6)}


def test_an_attention_with_a_layer_that_stays_dense_stays_dense_as_a_whole():
    model = Net(Separate)
    model.blocks[0].k.requires_grad_(False)
    sparsifier = Sparsifier(model, "head")
    assert dense_of(sparsifier) == {
        "blocks.0.q.weight": "its heads also need blocks.0.k.weight, which stays dense",
        "blocks.0.k.weight": "frozen when coupled filters or joint groups were found",
        "blocks.0.v.weight": "its heads also need blocks.0.k.weight, which stays dense",
        "blocks.0.o.weight": "its heads also need blocks.0.k.weight, which stays dense",
        "classifier.weight": "belongs to no head",
    }
    model.blocks[0].k.requires_grad_(True)
    sparsifier.sparsify(0.3)
    assert sparsifier.report().joint == {"blocks.1": (1, 3)}
    excluded = Sparsifier(Net(Separate), "head", exclude="blocks.1")
    assert set(excluded.masks) == {f"blocks.0.{name}.weight" for name in "qkvo"}
    chosen = Sparsifier(Net(Separate), "head", layers="blocks.1")
    assert set(chosen.masks) == {f"blocks.1.{name}.weight" for name in "qkvo"}


def test_weights_that_are_computed_keep_their_attention_dense():
    model = Net(Separate)
    nn.utils.parametrizations.weight_norm(model.blocks[0].q)
    sparsifier = Sparsifier(model, "head", exclude="blocks.0.q")
    assert "its heads also need" in dense_of(sparsifier)["blocks.0.k.weight"]
    with pytest.raises(ValueError, match="is computed from"):
        Sparsifier(model, "head")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="already joins what belongs together, so leave coupled= out"):
        Sparsifier(Net(Separate), "head", coupled=True, example_input=X)
    with pytest.raises(ValueError, match="no head is left to prune .blocks.0.q.weight: its heads also need blocks.0.k"):
        Sparsifier(Net(Separate), "head", layers="blocks.0.q")
    with pytest.raises(ValueError, match="no heads are found in Net; .* Declare it: register_attention"):
        Sparsifier(Net(Mlp), "head")
    with pytest.raises(ValueError, match="has 1 head, of which 1 must be kept"):
        Sparsifier(Net(lambda: Separate(1)), "head")
    with pytest.raises(ValueError, match="left to prune; 9.blocks.0.q.weight: has 1 head, of which 1 must be kept"):
        Sparsifier(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)), Net(lambda: Separate(1))), "head")
    with pytest.raises(ValueError, match="has 3 heads, of which 2 must be kept"):
        Sparsifier(Net(Separate), "head", round_to=2)


def test_a_joint_granularity_of_your_own_is_one_function():
    def first_attention(model):
        return granularities["head"](model)[:1]

    def none(model):
        return ("out",)

    first_attention.joint = none.joint = True
    sparsifier = Sparsifier(Net(Separate), first_attention)
    sparsifier.sparsify(0.3)
    assert sparsifier.report().joint == {"blocks.0": (1, 3)}
    with pytest.raises(TypeError, match="is registered with joint=True, so it must return a list of JointGroups"):
        Sparsifier(Net(Separate), none)


def test_the_report_counts_heads():
    sparsifier = Sparsifier(Net(lambda: Fused(3, 1)), "head", "local")
    sparsifier.sparsify(0.2)
    report = sparsifier.report()
    assert str(report).startswith("2 of 6 heads are pruned.\n")
    assert report.what == "head"
    assert report.joint == {"blocks.0": (1, 3), "blocks.1": (1, 3)}
    assert [row.note or row.why_dense for row in report.rows] == [
        "1 of 3 heads pruned; 4 of its 10 entries belong to no head", "1 of 3 heads pruned",
        "1 of 3 heads pruned; 4 of its 10 entries belong to no head", "1 of 3 heads pruned", "belongs to no head",
    ]  # fmt: skip
    assert "2 of 6 heads are pruned" in report._repr_html_()
    neurons = Sparsifier(Net(FusedGatedMlp), "neuron")
    assert str(neurons.report()).startswith("0 of 8 neurons are pruned.")
    assert Sparsifier(Net(Separate)).report().joint == {}


def test_the_report_counts_heads_that_are_zero_whoever_has_pruned_them():
    model = Net(Separate)
    Sparsifier(model, "head", "local").sparsify(0.3)
    report = Sparsifier(model, "head").report()
    assert report.joint == {"blocks.0": (1, 3), "blocks.1": (1, 3)}
    assert report.rows[0].note == "1 of 3 heads pruned"
    with torch.no_grad():
        model.blocks[0].o.weight += 1
    assert Sparsifier(model, "head").report().joint == {"blocks.0": (0, 3), "blocks.1": (1, 3)}


def test_masks_that_are_given_prune_parts_of_a_head_and_sparsify_goes_on():
    sparsifier = Sparsifier(Net(Separate), "head", "local")
    sparsifier.set_masks({"blocks.0.q.weight": torch.tensor([[0]] * 2 + [[1]] * 4)})
    assert sparsifier.report().joint == {"blocks.0": (0, 3), "blocks.1": (0, 3)}
    sparsifier.sparsify(0.6)
    assert pruned_of(sparsifier) == [2, 2]


def test_the_attention_of_torch_keeps_what_it_computes_in_eval_and_in_training():
    model = Net(Torch)
    Sparsifier(model, "head", "local").sparsify(0.3)
    assert torch.allclose(model.train()(X), model.eval()(X), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([Separate, Fused, Interleaved]), st.sampled_from([(2, 2), (4, 4), (4, 2), (6, 3), (6, 2), (3, 1)]),
    st.integers(1, 4), st.booleans(), st.floats(0.2, 0.8), st.integers(0, 1000),
)  # fmt: skip
def test_other_heads_compute_what_they_did_and_pruned_ones_hand_nothing_on(kind, heads, size, bias, fraction, seed):
    model = Net(lambda: kind(*heads, size, bias=bias), blocks=1)
    block = model.blocks[0]
    seen = []
    reads = block.o if kind is Separate else block.proj
    hook = reads.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].unflatten(-1, (heads[0], size))))
    model(X)
    sparsifier = Sparsifier(model, "head", "local", "random", seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sparsity cannot be reached
        sparsifier.sparsify(fraction)
    model(X)
    hook.remove()
    dense, sparse = seen
    zero = (reads.weight.unflatten(1, (heads[0], size)) == 0).all(0).all(1)
    queries = 1 if heads[1] == 1 else heads[0] // heads[1]
    (pruned, _) = sparsifier.report().joint["blocks.0"]
    assert int(zero.sum()) == pruned * queries
    assert torch.allclose(sparse[..., ~zero, :], dense[..., ~zero, :], atol=1e-5)
    if heads[1] > 1:
        assert (sparse[..., zero, :] == 0).all()
