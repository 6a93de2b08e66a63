"""Streams: every allowed row once, the same whatever the threads, broken images replaced and counted."""

import os
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    BROKEN,
    PEOPLE,
    SIDE,
    broken_source,
    by_steps,
    damage_column,
    drawn_numbers,
    moved_pictures,
    number_of,
    numbered_rows,
    numbers,
    stream_of,
    write_rows,
)
from runs import settings

import dataio
from dataio import ParquetImageStream, load_batches


@pytest.mark.parametrize(
    "options", [{}, {"shuffle_files": False}, {"shuffle_buffer": 0}, {"shuffle_buffer": 10**6}, {"batch_read_rows": 3}]
)
def test_a_pass_yields_each_allowed_row_exactly_once(source, options):
    allowed = PEOPLE[::3]
    stream = stream_of(source, allowed_identities=allowed, **options)
    images = list(stream)
    assert len(stream) == len(images) == 100
    assert images[0].dtype == torch.uint8
    assert images[0].shape == (3, SIDE, SIDE)
    assert sorted(map(number_of, images)) == [n for n in range(300) if PEOPLE[n // 5] in allowed]


def test_the_images_come_in_the_order_that_was_announced(source):
    stream = stream_of(source, seed=5)
    assert drawn_numbers(stream, 50) == stream.order(0).tolist()
    assert stream.order(0).tolist() != list(range(300))


@pytest.mark.parametrize(("workers", "batch"), [(1, 32), (2, 32), (5, 32), (3, 1), (2, 100), (2, 299)])
def test_order_and_pixels_depend_neither_on_workers_nor_on_the_batch_size(people, workers, batch):
    def images(workers, batch):
        stream = ParquetImageStream(str(people / "*.parquet"), shuffle_buffer=100, image_size=32, seed=3)
        return torch.cat(list(load_batches([stream], by_steps(batch), 0, 500 // batch, workers=workers)))

    count = 500 // batch * batch  # more than one pass of 304
    assert torch.equal(images(workers, batch)[:480], images(2, 20)[:480] if count >= 480 else images(2, 20)[:count])


def test_batches_are_channels_last_and_each_batch_owns_its_memory(source):
    batches = list(load_batches([stream_of(source)], by_steps(20), 0, 15, workers=2))
    assert batches[0].shape == (20, 3, SIDE, SIDE)
    assert all(b.is_contiguous(memory_format=torch.channels_last) for b in batches)
    assert sorted(numbers(batches)) == list(range(300))


@pytest.mark.parametrize("start", [1, 7, 18, 19, 30])
def test_jumping_into_the_middle_gives_the_tail_of_the_whole_run(source, start):
    whole = drawn_numbers(stream_of(source), 16, 0, 40)
    assert drawn_numbers(stream_of(source), 16, start, 40) == whole[16 * start :]


def test_one_stream_may_jump_to_and_fro(source):
    stream = stream_of(source)
    whole = drawn_numbers(stream_of(source), 16, 0, 40)
    for start, stop in ((10, 12), (0, 3), (3, 5), (5, 40), (0, 1), (30, 31)):
        assert drawn_numbers(stream, 16, start, stop) == whole[16 * start : 16 * stop]
    assert sorted(map(number_of, stream)) == list(range(300))


def test_several_passes_each_draw_every_row_in_a_new_order(source):
    drawn = np.array(drawn_numbers(stream_of(source), 300, 0, 4)).reshape(4, 300)
    assert (np.sort(drawn) == np.arange(300)).all()
    assert len({tuple(one) for one in drawn.tolist()}) == 4


def test_a_source_smaller_than_a_batch_goes_round_within_it(tmp_path):
    path = write_rows(tmp_path / "a.parquet", numbered_rows("abc"), group=1)
    drawn = np.array(drawn_numbers(stream_of(str(path)), 60, 0, 5)).reshape(-1, 3)
    assert (np.sort(drawn) == np.arange(3)).all()
    assert len({tuple(one) for one in drawn.tolist()}) == 6


def test_the_order_follows_the_seed(source):
    assert drawn_numbers(stream_of(source, seed=1)) != drawn_numbers(stream_of(source, seed=2))
    assert drawn_numbers(stream_of(source, seed=1)) == drawn_numbers(stream_of(source, seed=1))


def test_no_row_of_an_identity_that_is_not_allowed_is_ever_decoded(tmp_path, monkeypatch):
    identities = [f"{'train' if n % 3 else 'test'}{n % 20}" for n in range(200)]  # both kinds share row groups
    rows = numbered_rows(identities)
    for n in range(0, 200, 12):
        if n % 3:
            rows[n]["image_bytes"] = BROKEN
    broken = [n for n in range(1, 200, 25) if n % 3]
    for n in broken:
        rows[n]["image_bytes"] = BROKEN  # what stands in for it is of the allowed ones too
    path, decoded = write_rows(tmp_path / "a.parquet", rows), []
    original = dataio.decode_image

    def decode(data, *rest):
        decoded.append(bytes(data))
        return original(data, *rest)

    monkeypatch.setattr(dataio, "decode_image", decode)
    allowed = {i for i in identities if i.startswith("train")}
    count = len(list(stream_of(str(path), allowed_identities=allowed)))
    may = {rows[n]["image_bytes"] for n in range(200) if n % 3}
    assert count == sum(n % 3 > 0 for n in range(200))
    assert set(decoded) == may
    assert len(decoded) >= count


def test_broken_images_are_replaced_by_the_same_readable_ones_whatever_the_workers(tmp_path):
    broken = [3, 4, 9, 57, *range(100, 110)]  # two in a row, the last of a group, a whole group
    path = broken_source(tmp_path, broken)
    found = [drawn_numbers(stream_of(path, seed=2), 16, 0, 25, workers) for workers in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    expected = stream_of(path, seed=2).order(0).tolist() + stream_of(path, seed=2).order(1).tolist()
    stands_in = {3: 5, 4: 5, 9: 0, 57: 58} | dict.fromkeys(range(100, 110), 110)
    assert found[0] == [stands_in.get(n, n) for n in expected]


def test_broken_images_are_counted_once_and_named_with_file_and_row(tmp_path, caplog):
    stream = stream_of(broken_source(tmp_path, [3, 57, 120]), allowed_identities=[f"p{i}" for i in range(20) if i != 2])
    with caplog.at_level("WARNING", "sniperface"):
        drawn_numbers(stream, 10, 0, 57)  # three passes
    assert {(path.name, row) for path, row in stream.bad.found} == {
        ("holey.parquet", 3),
        ("holey.parquet", 57),
        ("holey.parquet", 120),
    }
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3
    assert any("holey.parquet row 57: broken image" in message for message in warnings)


def test_the_log_is_not_flooded_by_broken_images(tmp_path, caplog):
    with caplog.at_level("WARNING", "sniperface"):
        drawn_numbers(stream_of(broken_source(tmp_path, range(0, 60, 2))))
    assert 1 <= len(caplog.records) <= 12


@pytest.mark.parametrize(("broken", "ends"), [(2, False), (3, True)])
def test_too_many_broken_images_end_the_run_at_the_end_of_a_small_source(tmp_path, broken, ends):
    stream = stream_of(broken_source(tmp_path, range(0, 10 * broken, 10)), max_bad_fraction=0.01)
    if ends:
        with pytest.raises(
            ValueError, match=r"3 of 200 images are broken, more than data.max_bad_fraction=0.01.*holey.parquet row \d+"
        ):
            drawn_numbers(stream)
    else:
        assert len(drawn_numbers(stream, 10)) == 200
        assert len(stream.bad.found) == broken


def test_too_many_broken_images_end_the_run_as_soon_as_no_number_of_good_ones_can_make_up_for_them(tmp_path):
    path = broken_source(tmp_path, range(0, 3000, 10), count=3000, group=100)
    batches = load_batches([stream_of(path, max_bad_fraction=0.05)], by_steps(100), 0, 30, workers=2)
    given = []
    with pytest.raises(ValueError, match=r"^151 of 3000 images are broken"):
        given.extend(batches)  # keeps those before the error
    assert 10 <= len(given) <= 16  # of 100 images, ten of them broken


def test_a_batch_of_broken_images_alone_is_an_empty_batch(tmp_path):
    index = dataio.build_index(broken_source(tmp_path, [0, 1, 7], count=20), None)
    cfg = settings("data.max_bad_fraction=0.5", f"data.image_size={SIDE}").data
    sizes = [(len(table), len(images)) for table, images in dataio.decoded_rows(index, cfg, 1)]
    assert sizes == [(n not in (0, 1, 7),) * 2 for n in range(20)]


def test_whether_broken_images_end_the_run_does_not_depend_on_how_far_ahead_threads_have_decoded(tmp_path):
    path = broken_source(tmp_path, range(1000, 1100, 9), count=2000, group=100)  # 12, 0.6 % of all
    stream = stream_of(path, max_bad_fraction=0.011, shuffle_files=False, shuffle_buffer=0)
    drawn = 0
    for batch in load_batches([stream], by_steps(100), 0, 20, workers=2):
        drawn += len(batch)
        give_up = time.monotonic() + 5
        while drawn == 900 and len(stream.bad.found) < 12 and time.monotonic() < give_up:
            time.sleep(0.01)  # a slow consumer: the threads run ahead
    assert drawn == 2000


def test_a_source_without_one_readable_image_is_refused(tmp_path):
    stream = stream_of(broken_source(tmp_path, range(30), count=30), max_bad_fraction=1.0)
    with pytest.raises(ValueError, match=r"not one of 30 images can be decoded.*holey\.parquet"):
        drawn_numbers(stream)


@pytest.fixture
def long_source(tmp_path, monkeypatch):
    """A stream of 40 row groups that reads only a little ahead, and its file."""
    monkeypatch.setattr(dataio, "READ_AHEAD", 16)
    path = write_rows(tmp_path / "long.parquet", numbered_rows([f"p{n // 10}" for n in range(400)]))
    return path, stream_of(str(path), shuffle_files=False, shuffle_buffer=0)


def drop(path):
    path.unlink()


def shorten(path):
    path.write_bytes(path.read_bytes()[:4000])


def fewer_rows(path):
    write_rows(path, numbered_rows([f"p{n // 10}" for n in range(60)]))


@pytest.mark.parametrize("change", [drop, shorten, fewer_rows])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_vanishes_or_shrinks_while_streaming_ends_in_an_error_that_names_it(long_source, change, workers):
    path, stream = long_source
    batches = load_batches([stream], by_steps(10), 0, 40, workers=workers)
    assert numbers([next(batches)]) == list(range(10))
    change(path)
    with pytest.raises(ValueError, match=r"long.parquet.*(was replaced or removed|no such file|the index expects)"):
        list(batches)


def test_a_file_that_is_replaced_by_one_of_the_same_shape_while_streaming_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "READ_AHEAD", 16)
    rows = numbered_rows(["train"] * 120 + ["test"] * 120)
    path = write_rows(tmp_path / "long.parquet", rows, compression="none")
    stream = stream_of(str(path), shuffle_files=False, shuffle_buffer=0, allowed_identities=["train"])
    batches = load_batches([stream], by_steps(10), 0, 12, workers=1)
    assert numbers([next(batches)]) == list(range(10))
    other = write_rows(tmp_path / "other.parquet", moved_pictures(rows), compression="none")
    os.replace(other, path)  # such as a sorted file written again unsorted
    with pytest.raises(ValueError, match=r"long\.parquet"):
        list(batches)


def test_damaged_pages_of_pictures_end_in_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist(numbered_rows(PEOPLE)), path, compression="zstd")
    damage_column(path, 2)
    with pytest.raises(ValueError, match=r"damaged\.parquet row group 0: damaged"):
        drawn_numbers(stream_of(str(path)))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_in_a_decoding_thread_reaches_the_caller_and_no_thread_stays(source, monkeypatch, workers):
    monkeypatch.setattr(dataio, "decode_image", lambda *_: 1 / 0)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        drawn_numbers(stream_of(source), workers=workers)
    assert threading.active_count() <= before


def test_leaving_the_loop_early_ends_the_threads(source):
    before = threading.active_count()
    batches = load_batches([stream_of(source)], by_steps(10), 0, 1000, workers=3)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loop_left_early_may_go_on_where_its_loader_had_read_to(long_source, monkeypatch, workers):
    _, stream = long_source
    original = ParquetImageStream.read_unit

    def slow(self, unit):
        time.sleep(0.02)
        return original(self, unit)

    monkeypatch.setattr(ParquetImageStream, "read_unit", slow)
    batches = load_batches([stream], by_steps(10), 0, 4, workers=workers)
    next(batches)
    batches.close()  # an epoch of four steps, of which one was wanted
    try:
        assert drawn_numbers(stream, 10, 4, 8, workers) == list(range(40, 80))
    except CancelledError:
        pytest.fail("a read that an earlier loader cancelled was waited for")


def test_rows_that_were_used_up_are_released(tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "READ_AHEAD", 32)
    path = write_rows(tmp_path / "a.parquet", numbered_rows([f"p{n // 10}" for n in range(2000)]))
    stream, most = stream_of(str(path), shuffle_buffer=160), 0
    for _ in load_batches([stream], by_steps(20), 0, 250, workers=2):  # two and a half passes over 200 row groups
        most = max(most, len(stream.loaded))
    assert most <= 16 + 2 * dataio.LANES + 52 // 10 + 1  # the buffer, one to come per lane, what is read ahead
    assert most >= 12
    assert {number for number, _ in stream.loaded} == {2}


def test_after_a_jump_nothing_is_kept_for_images_that_were_jumped_over(long_source):
    stream = stream_of(str(long_source[0]), shuffle_buffer=400)
    for _ in load_batches([stream], by_steps(10), 35, 45, workers=2):  # from near the end of a pass into the next
        pass
    assert {number for number, _ in stream.loaded} == {1}


def test_file_names_may_hold_spaces_commas_quotes_and_letters_of_any_language(tmp_path):
    name = "Gesichter ä, 'x' \"y\" [1] 顔=*.parquet"
    path = write_rows(tmp_path / name, numbered_rows(["é, '\n", "ß"]))
    assert sorted(drawn_numbers(stream_of(str(path), allowed_identities=["é, '\n"]))) == [0]


def test_a_source_of_which_nothing_can_be_decoded_ends_at_once(tmp_path, monkeypatch):
    path, tried, decode = broken_source(tmp_path, range(5000), count=5000), [], dataio.decode_image
    monkeypatch.setattr(dataio, "decode_image", lambda *args: tried.append(1) or decode(*args))
    with pytest.raises(ValueError, match="51 of 5000 images are broken"):
        next(load_batches([stream_of(path, max_bad_fraction=0.01)], by_steps(16), 0, 4, workers=1))
    assert len(tried) < 200  # what was in the threads' queues
