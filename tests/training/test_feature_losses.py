"""Losses of features: relations between the examples of a batch, and attention maps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from sparsifai import attention_transfer, distillation_losses, relational, similarity

# --- The formulas of the papers, number by number -----------------------------------------------------------------


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def minus(one, other):
    return [a - b for a, b in zip(one, other, strict=True)]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def rows_of(features):
    return features.double().flatten(1).tolist()


def distances(rows):
    """{(i, j): distance divided by the mean distance}"""
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    lengths = {(i, j): math.dist(rows[i], rows[j]) for i, j in pairs}
    mean = sum(lengths.values()) / len(lengths)
    return {pair: length / mean if mean else 0.0 for pair, length in lengths.items()}


def angles(rows):
    """{(i, j, k): cosine of the angle at j}"""
    found = {}
    for i in range(len(rows)):
        for j in range(len(rows)):
            for k in range(len(rows)):
                if len({i, j, k}) == 3:
                    one, other = minus(rows[i], rows[j]), minus(rows[k], rows[j])
                    product = math.hypot(*one) * math.hypot(*other)
                    found[i, j, k] = dot(one, other) / product if product else 0.0
    return found


def mean_huber(ours, theirs):
    return sum(huber(ours[key] - theirs[key]) for key in ours) / max(len(ours), 1)


def plain_relational(student, teacher, distance_weight=1.0, angle_weight=2.0):
    ours, theirs = rows_of(student), rows_of(teacher)
    return distance_weight * mean_huber(distances(ours), distances(theirs)) + angle_weight * mean_huber(
        angles(ours), angles(theirs)
    )


def plain_similarity(student, teacher):
    def similarities(rows):
        gram = [[dot(one, other) for other in rows] for one in rows]
        return [[value / (math.hypot(*row) or 1.0) for value in row] for row in gram]

    ours, theirs = similarities(rows_of(student)), similarities(rows_of(teacher))
    return sum(dot(each, each) for each in map(minus, ours, theirs)) / len(ours) ** 2


def plain_attention(student, teacher):
    """For maps of one size; the axis of the channels is the second."""

    def attention(example):
        channels = [channel.flatten().tolist() for channel in example]
        squares = [
            sum(channel[place] ** 2 for channel in channels) / len(channels) for place in range(len(channels[0]))
        ]
        return [value / (math.hypot(*squares) or 1.0) for value in squares]

    differences = [minus(attention(ours), attention(theirs)) for ours, theirs in zip(student, teacher, strict=True)]
    return sum(dot(each, each) for each in differences) / (len(differences) * len(differences[0]))


PLAIN = {"relational": plain_relational, "similarity": plain_similarity, "attention_transfer": plain_attention}


def features(seed, *shape, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator)
    return drawn * (torch.rand(shape, generator=generator) >= zeros)


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(2, 6),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    zeros=st.sampled_from([0.0, 0.7]),  # with many zeros, examples are equal, or zero
)
def test_a_loss_is_what_its_paper_says(name, seed, batch, channels, sizes, zeros):
    student, teacher = (features(seed + i, batch, channels[i], *sizes, zeros=zeros) for i in range(2))
    found = distillation_losses[name](student, teacher)
    assert found.shape == ()
    assert float(found) == pytest.approx(PLAIN[name](student, teacher), rel=1e-4, abs=1e-6)


def test_the_weights_of_distances_and_angles():
    student, teacher = features(0, 5, 4), features(1, 5, 3)
    for weights in ((25.0, 50.0), (1.0, 0.0), (0.0, 1.0)):
        found = relational(student, teacher, *weights)
        assert float(found) == pytest.approx(plain_relational(student, teacher, *weights), rel=1e-4)


def test_huber_s_loss_is_linear_for_far_distances():
    student = torch.tensor([[0.0], [0.0], [0.0], [9.0]])  # distances 0 and 2, divided by their mean
    teacher = torch.tensor([[0.0], [9.0], [0.0], [0.0]])
    assert float(relational(student, teacher, 1.0, 0.0)) == pytest.approx(8 * 1.5 / 12)


def test_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    root = math.sqrt(0.5)  # the rows of the student's matrix are (root, root), those of the teacher's (1, 0) and (0, 1)
    assert float(similarity(student, teacher)) == pytest.approx(2 * ((1 - root) ** 2 + root**2) / 4)
    one, other = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]], [[0.0, 4.0]]]])
    assert float(attention_transfer(one, other)) == pytest.approx(1.0)  # (1, 0) and (0, 1)


def test_tokens_are_the_positions_of_three_axes():
    student, teacher = features(0, 3, 5, 4), features(1, 3, 5, 7)  # (batch, tokens, channels)
    found = attention_transfer(student, teacher)
    assert float(found) == pytest.approx(plain_attention(student.mT, teacher.mT), rel=1e-4)
    assert float(attention_transfer(student.mT, teacher.mT, channels=1)) == pytest.approx(float(found))
    last = attention_transfer(student[..., None, :], teacher[..., None, :], channels=-1)
    assert float(last) == pytest.approx(float(found))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_maps_of_other_sizes_are_averaged_over_areas(axes):
    small = features(0, 2, 3, *[2] * axes)
    wide = features(1, 2, 4, *[4] * axes)
    attention = wide.square().mean(1)
    for axis in range(1, axes + 1):
        attention = attention.unflatten(axis, (2, 2)).mean(axis + 1)
    expected = plain_attention(small, attention.sqrt()[:, None])
    assert float(attention_transfer(small, wide, channels=1)) == pytest.approx(expected, rel=1e-4)


# --- Gradients and numbers ----------------------------------------------------------------------------------------

WITH_EQUAL_AND_ZERO_EXAMPLES = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, -1.0]])


@pytest.mark.parametrize("name", PLAIN)
def test_gradients(name):
    student, teacher = features(0, 4, 3, 2, 2).double().requires_grad_(), features(1, 4, 2, 2, 2).double()
    assert gradcheck(lambda x: distillation_losses[name](x, teacher), student)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("other", [features(1, 5, 2), WITH_EQUAL_AND_ZERO_EXAMPLES, torch.zeros(5, 2)])
def test_gradients_are_finite_where_examples_are_equal_or_zero(name, other):
    for values in (WITH_EQUAL_AND_ZERO_EXAMPLES, torch.zeros(5, 2), torch.ones(5, 2)):
        student = values.clone().requires_grad_()
        as_maps = [each[:, None, None] for each in (student, other)]
        distillation_losses[name](*as_maps).backward()
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 10


@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_and_autocast_are_computed_in_float32(name):
    loss = distillation_losses[name]
    student, teacher = features(0, 6, 8, 3, 3) + 10, features(1, 6, 4, 3, 3) + 10  # far from zero, near each other
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32
    assert found == loss(student, teacher)
    ours, theirs = student.bfloat16(), teacher.bfloat16()
    assert loss(ours, theirs) == loss(ours.float(), theirs.float())
    assert loss(student.double(), teacher.double()).dtype == torch.float64


@pytest.mark.parametrize("loss", [relational, similarity])
def test_a_single_example_has_no_relations(loss):
    student = features(0, 1, 3).requires_grad_()
    with pytest.warns(UserWarning, match=f"{loss.__name__}: a batch of one example has no relations"):
        found = loss(student, features(1, 1, 2).abs())
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-6


def test_two_examples_have_a_distance_but_no_angle():
    assert float(relational(features(0, 2, 3), features(1, 2, 4))) == 0  # one distance, divided by itself


@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_is_zero_at_its_teacher_and_falls_along_its_gradient(name):
    teacher = features(1, 5, 2, 3, 3)
    assert float(distillation_losses[name](teacher, teacher)) == pytest.approx(0, abs=1e-10)
    student = features(0, 5, 4, 3, 3).requires_grad_()
    optimizer, losses = torch.optim.Adam([student], 0.03), []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(distillation_losses[name](student, teacher))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert isinstance(losses[-1], Tensor)
