"""Groups of weights of several layers: attention heads and the neurons of MLPs are ranked and pruned as one."""

import pytest
import torch
from attentions import BLOCKS, WIDTH, Net, masks_of, weights_of
from conftest import misses_sparsity

from sparsifai import Sparsifier

X = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(1))


def lowest(scores, sizes, fraction):
    """Numbers of the groups to prune in each block, ranked together: the definition, group by group.

    scores: for each block, a score per group. sizes: for each block, the number of weights in a group.
    """
    ranked = sorted(
        (float(score), block, group) for block, of_block in enumerate(scores) for group, score in enumerate(of_block)
    )
    best = set({block: (block, group) for _, block, group in ranked}.values())
    wanted = fraction * sum(size * len(of_block) for size, of_block in zip(sizes, scores, strict=True))
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
    sparsifier = Sparsifier(model, granularity, context)
    for fraction in (0.3, 0.5, 1.0):
        if context == "local":
            pruned = [lowest([means[block]], [sizes[block]], fraction)[0] for block in range(2)]
        else:
            pruned = lowest(means, sizes, fraction)
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
