"""Schedules made from another one: between, during, raised and stepped."""

import pickle

import pytest

from sparsifai import agp, between, dsd, during, iterative, lin, one_shot, raised, stepped


def test_between_moves_a_schedule_into_a_part_of_training():
    moved = between("agp", 0.2, 0.8)
    assert [moved(t) for t in (0, 0.1, 0.2)] == [0, 0, 0]
    assert moved(0.5) == pytest.approx(7 / 8)
    assert [moved(t) for t in (0.8, 0.9, 1)] == [1, 1, 1]
    assert between(one_shot, 0.3, 1)(0.29) == 0
    assert between(one_shot, 0.3, 1)(0.3) == 1
    assert between(between(lin, 0.5, 1), 0, 0.5)(0.375) == pytest.approx(0.5)


def test_between_continues_with_the_last_value():
    assert between(dsd, 0.2, 0.6)(0.9) == 0


def test_during_is_zero_after_its_part():
    moved = during("lin", 0.2, 0.6)
    assert [moved(t) for t in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([0, 0, 0.5, 0, 0])
    assert during(lin, 0.5, 1)(1) == 1  # only the end of training has nothing after it


def test_raised_begins_with_a_share():
    assert [raised("lin", 0.5)(t) for t in (0, 0.5, 1)] == [0.5, 0.75, 1]
    assert [raised(between(lin, 0.5, 1), 0.2)(t) for t in (0.4, 0.5, 0.75, 1)] == pytest.approx([0, 0.2, 0.6, 1])


def test_stepped_changes_n_times():
    assert [stepped("lin", 4)(t) for t in (0, 0.24, 0.25, 0.99, 1)] == [0, 0, 0.25, 0.75, 1]
    assert stepped(agp, 100)(0.07) == agp(0.07)  # in floats 0.07 * 100 is just above 7
    assert stepped(agp, 100)(0.29) == agp(0.29)  # and 0.29 * 100 just below 29


@pytest.mark.parametrize(
    "schedule",
    [between(iterative(4), 0.1, 0.9), during("agp", 0.1, 0.9), raised("cos", 0.3), stepped("lin", 3)],
    ids=lambda schedule: schedule.__name__,
)
def test_they_can_be_pickled(schedule):
    restored = pickle.loads(pickle.dumps(schedule))
    assert [restored(step / 7) for step in range(8)] == [schedule(step / 7) for step in range(8)]
