"""Soft targets."""

import math

import pytest
import torch

from sparsifai import soft_targets


def test_soft_targets_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # At temperature 2 the probabilities of the teacher are 3/4 and 1/4, those of the student 1/2 and 1/2.
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(soft_targets(student, teacher, 2.0, 1)) == pytest.approx(expected, rel=1e-5)
    assert float(soft_targets(teacher, teacher, 2.0, 1)) == 0


def test_soft_targets_average_over_all_axes_but_the_classes():
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    each = [
        soft_targets(student[i, :, y, x], teacher[i, :, y, x], 3.0, 0)
        for i in range(2)
        for y in range(3)
        for x in range(4)
    ]
    torch.testing.assert_close(soft_targets(student, teacher, 3.0, 1), torch.stack(each).mean())
    moved = soft_targets(student.movedim(1, -1), teacher.movedim(1, -1), 3.0, -1)
    torch.testing.assert_close(moved, torch.stack(each).mean())


def test_soft_targets_of_half_precision_are_computed_in_float32():
    student, teacher = torch.randn(4, 5).half(), torch.randn(4, 5).half()
    torch.testing.assert_close(
        soft_targets(student, teacher, 4.0, 1), soft_targets(student.float(), teacher.float(), 4.0, 1)
    )
