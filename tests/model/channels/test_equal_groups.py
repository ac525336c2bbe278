"""Which channels of grouped convolutions can be removed, so that groups keep equal sizes."""

from sparsifai.model.channels.equal_groups import Division, balance, connected, find_places


def outputs(name, group):
    return ((name, "outputs", group),)


def inputs(name, group):
    return ((name, "inputs", group),)


def test_as_many_channels_of_each_group_are_removed():
    cells = [outputs("a", 0)] * 3 + [outputs("a", 1)] * 3 + [()]
    assert balance(cells, {0, 1, 5, 6}) == ({1}, set())
    assert balance(cells, {0, 1}) == ({0, 1}, set())
    assert balance(cells, {0, 1, 2, 3, 4, 5})[0] == {2, 5}  # one of each group is kept


def test_a_group_is_removed_as_a_whole_with_its_inputs():
    cells = [outputs("a", group) for group in (0, 0, 1, 1, 2, 2)] + [inputs("a", group) for group in (0, 0, 1, 1, 2, 2)]
    assert balance(cells, {0, 1, 6, 7}) == (set(), {("a", 0)})
    assert balance(cells, {0, 1, 6}) == ({0, 1, 6}, set())
    assert balance(cells, {0, 1, 2, 4, 6, 7}) == (set(), {("a", 0)})


def test_a_group_stays_if_its_channels_are_needed_by_a_group_of_another_convolution():
    # The outputs of group g of a are the inputs of group g of b.
    between = [((*outputs("a", group), *inputs("b", group))) for group in (0, 0, 1, 1, 2, 2)]
    cells = between + [inputs("a", group) for group in (0, 0, 1, 1, 2, 2)] + [outputs("b", group) for group in range(3)]
    spared, whole = balance(cells, {0, 1, 2, 3, 6, 7, 8, 9, 12})
    assert whole == {("a", 0), ("b", 0)}  # group 1 of b has an output that stays
    assert spared == {2, 3, 8, 9}


def test_cells_are_connected_by_the_sides_that_they_meet():
    first, second, both, other = outputs("a", 0), inputs("b", 1), (*outputs("a", 1), *inputs("b", 0)), outputs("c", 0)
    numbers = connected([first, second, other, both, ()])
    assert numbers[first] == numbers[second] == numbers[both] != numbers[other]


def divided(*groups, count=2, share=2):
    """The reasons to keep channels, of which each is at some indices of one side."""
    sets = [[("a", "outputs", index) for index in indices] for indices in groups]
    return [place.is_stuck for place in find_places({"a": Division(count, {"outputs": share}, "why")}, sets)]


def test_parts_that_cannot_stay_equal_are_stuck():
    assert divided([0], [1], [2], [3]) == [False] * 4
    assert divided([0, 2], [1], [3]) == [True] * 3  # only one way to keep parts equal is followed
    assert divided([0, 2], [1, 3]) == [False] * 2
    assert divided([0], [1], [2]) == [True] * 3  # channel 3 is not known
    assert divided([0, 1], [2], [3]) == [True] * 3
    assert divided([0, 1, 2], [3]) == [True] * 2
    assert divided([0], [1], [2, 3, 4], [5], share=3) == [True] * 4
