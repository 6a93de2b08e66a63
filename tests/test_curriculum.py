"""The curriculum: how many images of each source a step gets, and which."""

import itertools

import numpy as np
import pytest
from conftest import drawn_numbers, number_of, numbered_rows, numbers, stream_of, write_rows

import dataio


def curriculum(progress, share):
    return dataio.CurriculumConfig("test", progress, share)


CURVES = {
    "falling": curriculum([0.0, 1.0], [0.9, 0.1]), "corner": curriculum([0.0, 0.25, 0.5, 1.0], [1.0, 1.0, 0.3, 0.0]),
    "constant": curriculum([0.0], [0.37]),
}  # fmt: skip


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize(("rows", "batch", "epochs"), [((700, 300), 13, 7), ((50, 5000), 64, 2), ((9, 8), 17, 5)])
def test_the_share_follows_the_curriculum_to_within_half_an_image(curve, rows, batch, epochs):
    schedule = dataio.Schedule(curve, rows, batch, epochs)
    assert schedule.steps_per_epoch == sum(rows) // batch
    assert schedule.total_steps == epochs * (sum(rows) // batch)
    drawn = np.array([schedule.drawn(step) for step in range(schedule.total_steps + 1)])
    assert drawn[0].tolist() == [0, 0]
    assert (np.diff(drawn.sum(1)) == batch).all()
    assert (np.diff(drawn, axis=0) >= 0).all()
    wanted = [0.0]
    for step in range(schedule.total_steps):  # the curve by hand, in the middle of the step
        wanted.append(
            wanted[-1] + batch * float(np.interp((step + 0.5) / schedule.total_steps, curve.progress, curve.digiface_share))
        )
    assert np.abs(drawn[:, 0] - wanted).max() <= 0.5 + 1e-6


def test_the_shape_of_the_curriculum_does_not_depend_on_the_number_of_epochs():
    one, other = (dataio.Schedule(CURVES["corner"], (600, 400), 10, epochs) for epochs in (4, 40))
    for start in np.arange(0, 1, 0.1):
        shares = [s.digiface_share(round(start * s.total_steps), round((start + 0.1) * s.total_steps)) for s in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert one.digiface_share(0, one.total_steps // 4) == 1.0
    assert one.digiface_share(0, one.total_steps) == pytest.approx(0.25 + 0.25 * 0.65 + 0.5 * 0.15, abs=0.002)


def test_without_a_curriculum_the_share_is_that_of_the_rows():
    for none in (None, curriculum([], [])):
        schedule = dataio.Schedule(none, (900, 100), 10, 3)
        assert schedule.digiface_share(0, 300) == pytest.approx(0.9, abs=1e-3)


def test_one_source_gives_all_the_images_whatever_the_curriculum_says():
    schedule = dataio.Schedule(CURVES["falling"], (1000,), 30, 2)
    assert [schedule.drawn(step)[0] for step in range(67)] == [30 * step for step in range(67)]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"train.batch_size=101 is more than the 100 train images"):
        dataio.Schedule(None, (60, 40), 101, 1)
    assert dataio.Schedule(None, (60, 40), 100, 1).steps_per_epoch == 1


@pytest.fixture
def two_sources(tmp_path):
    write_rows(tmp_path / "a.parquet", numbered_rows([f"a{n}" for n in range(90)]))
    write_rows(tmp_path / "b.parquet", numbered_rows([f"b{n}" for n in range(30)], 1000))
    return [stream_of(str(tmp_path / f"{name}.parquet"), shuffle_buffer=20) for name in "ab"]


def test_each_source_is_drawn_without_replacement_until_it_is_used_up(two_sources):
    schedule = dataio.Schedule(CURVES["constant"], (90, 30), 20, 6)
    mix = dataio.CurriculumMixStream(*two_sources, 0, schedule)
    drawn = numbers(mix.batches(0, schedule.total_steps))
    a, b = [n for n in drawn if n < 1000], [n - 1000 for n in drawn if n >= 1000]
    assert (len(a), len(b)) == tuple(schedule.drawn(schedule.total_steps))
    assert len(b) / 30 > 10
    for found, rows in ((a, 90), (b, 30)):
        for start in range(0, len(found), rows):
            one_pass = found[start : start + rows]
            assert len(set(one_pass)) == len(one_pass)


def test_the_batches_of_each_step_hold_what_the_schedule_says(two_sources):
    schedule = dataio.Schedule(CURVES["falling"], (90, 30), 16, 3)
    mix = dataio.CurriculumMixStream(*two_sources, 0, schedule)
    for step, batch in enumerate(mix.batches(0, schedule.total_steps)):
        expected = np.subtract(schedule.drawn(step + 1), schedule.drawn(step)).tolist()
        assert [sum(n < 1000 for n in numbers([batch])), sum(n >= 1000 for n in numbers([batch]))] == expected


def test_the_epochs_one_by_one_are_the_whole_training(two_sources):
    schedule = dataio.Schedule(CURVES["falling"], (90, 30), 16, 4)
    whole = numbers(dataio.CurriculumMixStream(*two_sources, 0, schedule).batches(0, schedule.total_steps))
    epochs = [list(map(number_of, dataio.CurriculumMixStream(*two_sources, e, schedule))) for e in range(4)]
    assert list(itertools.chain(*epochs)) == whole
    assert len(epochs[0]) == 7 * 16


def test_a_mix_of_one_source_is_that_source(two_sources):
    schedule = dataio.Schedule(None, (90,), 16, 1)
    mix = dataio.CurriculumMixStream(two_sources[0], None, 0, schedule)
    assert numbers(mix.batches()) == drawn_numbers(two_sources[0], 16, 0, 5)
