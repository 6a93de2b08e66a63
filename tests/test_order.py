"""The order of the plain stream: each row once a pass, shuffled as far as the buffer says."""

import numpy as np
import pytest
from conftest import shuffled

import dataio

SHAPES = {
    "one row": [1], "one unit": [50], "three units": [7, 1, 30], "as many as lanes": [5] * 8, "one more": [5] * 9,
    "uneven": [1, 200, 3, 3, 90, 1, 1, 40, 2, 17, 60],
    "many": [10] * 100, "many single rows": [1] * 77, "one giant": [1] * 20 + [5000],
}  # fmt: skip


def units_of(shape):
    return np.repeat(np.arange(len(shape)), shape).astype(np.int32)


def lane_order(shape, seed=0, shuffle_files=True, shuffle_buffer=100):
    return dataio.lane_order(units_of(shape), np.random.default_rng(seed), shuffle_files, shuffle_buffer)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("shuffle_files", [True, False])
@pytest.mark.parametrize("shuffle_buffer", [0, 1, 2, 30, 1000, 10**9])
def test_every_pass_draws_each_row_once_and_is_repeatable(shape, shuffle_files, shuffle_buffer):
    order = lane_order(shape, 3, shuffle_files, shuffle_buffer)
    assert sorted(order) == list(range(sum(shape)))
    assert (order == lane_order(shape, 3, shuffle_files, shuffle_buffer)).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_any_shuffling_the_order_is_that_of_the_files(shape):
    assert (lane_order(shape, shuffle_files=False, shuffle_buffer=0) == np.arange(sum(shape))).all()


def test_each_pass_has_another_order_and_each_kind_of_shuffling_works_alone():
    shape = SHAPES["many"]
    for options in ({}, {"shuffle_files": False}, {"shuffle_buffer": 0}):
        assert (lane_order(shape, 1, **options) != lane_order(shape, 2, **options)).mean() > 0.9
    within = units_of(shape)[lane_order(shape, shuffle_buffer=0)]
    assert all((np.diff(lane_order(shape, shuffle_buffer=0)[within == unit]) == 1).all() for unit in range(100))
    only_rows = lane_order(shape, shuffle_files=False, shuffle_buffer=50)
    assert np.abs(only_rows - np.arange(1000)).max() < 50  # nothing travels further than the buffer


def alive_units(order, unit):
    """The number of row groups that are between their first and last use, at each image."""
    drawn = unit[order]
    steps = np.zeros(len(order) + 1, int)
    for u in np.unique(unit):
        places = np.flatnonzero(drawn == u)
        steps[places[0]] += 1
        steps[places[-1] + 1] -= 1
    return steps.cumsum()[:-1]


@pytest.mark.parametrize("shuffle_files", [True, False])
@pytest.mark.parametrize("shuffle_buffer", [0, 100, 400, 1000])
@pytest.mark.parametrize("shape", [[10] * 200, [1, 19] * 100], ids=["even", "uneven"])
def test_the_row_groups_in_memory_are_as_many_as_the_shuffle_buffer_says(shape, shuffle_buffer, shuffle_files):
    lanes = dataio.LANES if shuffle_files else 1
    alive = alive_units(lane_order(shape, 0, shuffle_files, shuffle_buffer), units_of(shape)).max()
    assert alive <= max(lanes, round(shuffle_buffer / 10) + lanes / 2)  # a lane rounds to whole row groups
    assert alive >= 0.5 * max(lanes, shuffle_buffer / 10)  # and the buffer is used


def test_repeats_in_the_queue_equal_a_count_by_hand():
    rng = np.random.default_rng(0)
    for codes, queue in (
        (rng.integers(0, 9, 300), 37),
        (np.repeat(np.arange(30), 10), 4),
        (np.arange(50), 10),
        (np.zeros(40, int), 1000),
    ):
        by_hand = sum(int((codes[max(0, i - queue) : i] == codes[i]).sum()) for i in range(len(codes))) / len(codes)
        assert dataio.repeats_in_queue(codes, queue) == pytest.approx(by_hand, abs=1e-12)


def test_the_plain_stream_mixes_better_with_a_larger_buffer():
    codes, unit = np.arange(20_000) // 20, np.arange(20_000) // 100
    ideal = dataio.repeats_in_queue(shuffled(codes), 2000)
    found = [
        dataio.repeats_in_queue(codes[dataio.lane_order(unit, np.random.default_rng(0), True, buffer)], 2000)
        for buffer in (0, 4000, 8000, 16_000)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 9  # all that there are: 19 / 2
    assert found[2] < 6 * ideal * 0.8
    assert found[3] < 2.5 * ideal


def test_a_buffer_as_large_as_the_data_mixes_as_well_as_a_true_permutation():
    codes, unit = np.arange(20_000) // 20, np.arange(20_000) // 100
    order = dataio.lane_order(unit, np.random.default_rng(0), True, 20_000)
    assert dataio.repeats_in_queue(codes[order], 2000) < 1.1 * dataio.repeats_in_queue(shuffled(codes), 2000)
