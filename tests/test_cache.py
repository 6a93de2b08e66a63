"""The decoded cache: the stream's pixels, checked, and going on where it was killed."""

import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    PEOPLE,
    SIDE,
    broken_source,
    by_steps,
    drawn_numbers,
    moved_pictures,
    number_of,
    numbered_rows,
    shuffled,
    stream_of,
    write_rows,
)

import dataio
from dataio import ParquetImageStream, load_batches


def test_a_cache_of_other_pictures_is_not_used(tmp_path):
    rows = numbered_rows(PEOPLE)
    path = write_rows(tmp_path / "a.parquet", rows)
    dataio.DecodedCache(stream_of(str(path)), tmp_path / "cache")
    write_rows(path, moved_pictures(rows))
    cache = dataio.DecodedCache(stream_of(str(path)), tmp_path / "cache")
    assert [number_of(np.moveaxis(image, -1, 0)) for image in cache.images] == list(range(60))[::-1]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(dataio, "CACHE_CHUNK", 32)


def counted_decodes(monkeypatch) -> list:
    calls, original = [], dataio.decode_image
    monkeypatch.setattr(dataio, "decode_image", lambda *a: calls.append(1) or original(*a))
    return calls


def test_the_cache_gives_the_pixels_of_the_stream(people, tmp_path, small_chunks):
    stream = ParquetImageStream(str(people / "*.parquet"), image_size=48, seed=9)
    cache = dataio.DecodedCache(stream, tmp_path)
    assert len(cache) == len(stream) == 304
    in_order = torch.stack(list(stream.in_file_order()))
    drawn = torch.cat(list(load_batches([cache], by_steps(38), 0, 8, workers=2)))
    assert torch.equal(drawn, in_order[torch.from_numpy(cache.order(0))])


def test_each_pass_over_the_cache_is_another_permutation_addressed_by_the_seed(source, tmp_path, small_chunks):
    cache = dataio.DecodedCache(stream_of(source, seed=4), tmp_path)
    drawn = np.array(drawn_numbers(cache, 30, 0, 30)).reshape(3, 300)
    assert (np.sort(drawn) == np.arange(300)).all()
    assert len({tuple(one) for one in drawn.tolist()}) == 3
    assert drawn_numbers(cache, 30, 7, 30) == drawn.reshape(-1)[210:].tolist()
    again = dataio.DecodedCache(stream_of(source, seed=4, shuffle_buffer=0), tmp_path)
    assert (again.order(1) == drawn[1]).all()
    assert (dataio.DecodedCache(stream_of(source, seed=5), tmp_path).order(0) != drawn[0]).any()
    assert dataio.repeats_in_queue(drawn[0] // 5, 100) < 1.5 * dataio.repeats_in_queue(shuffled(np.arange(300) // 5), 100)


def test_a_batch_larger_than_the_cache_goes_round(tmp_path):
    path = write_rows(tmp_path / "a.parquet", numbered_rows("abc"))
    drawn = np.array(drawn_numbers(dataio.DecodedCache(stream_of(str(path)), tmp_path / "c"), 7, 0, 3)).reshape(-1, 3)
    assert (np.sort(drawn) == np.arange(3)).all()


def test_a_device_cache_gives_the_same_images_in_the_same_order(source, tmp_path, small_chunks):
    one = dataio.DecodedCache(stream_of(source), tmp_path)
    other = dataio.DecodedCache(stream_of(source), tmp_path, 2, torch.device("cpu"))
    assert drawn_numbers(one, 32, 2, 20) == drawn_numbers(other, 32, 2, 20)


def test_a_finished_cache_is_used_again_and_other_rows_or_sizes_get_their_own(source, tmp_path, small_chunks, monkeypatch):
    dataio.DecodedCache(stream_of(source), tmp_path)
    calls = counted_decodes(monkeypatch)
    dataio.DecodedCache(stream_of(source, seed=1, shuffle_files=False), tmp_path)
    assert len(calls) == 0
    dataio.DecodedCache(stream_of(source, allowed_identities=PEOPLE[:4]), tmp_path)
    assert len(calls) == 20
    dataio.DecodedCache(stream_of(source, image_size=8), tmp_path)
    assert len(calls) == 320
    assert len(list(tmp_path.glob("*.u8"))) == 3


def test_a_cache_build_that_was_killed_goes_on_where_it_was(source, tmp_path, small_chunks, monkeypatch):
    original, done = dataio.zlib.crc32, []

    def killed(data):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return original(data)

    stream = stream_of(source)
    with monkeypatch.context() as patch:
        patch.setattr(dataio, "zlib", SimpleNamespace(crc32=killed))  # Pillow keeps its own
        with pytest.raises(KeyboardInterrupt):
            dataio.DecodedCache(stream, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.u8"))
    calls = counted_decodes(monkeypatch)
    cache = dataio.DecodedCache(stream_of(source), tmp_path / "c")
    assert len(calls) == 300 - 4 * 32
    assert [number_of(np.moveaxis(image, -1, 0)) for image in cache.images] == list(range(300))
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".json", ".lock", ".u8"]


def test_a_cache_killed_just_before_it_got_its_name_is_finished_without_decoding(source, tmp_path, small_chunks, monkeypatch):
    dataio.DecodedCache(stream_of(source), tmp_path)
    final = next(tmp_path.glob("*.u8"))
    final.rename(f"{final}.part")
    calls = counted_decodes(monkeypatch)
    assert len(dataio.DecodedCache(stream_of(source), tmp_path)) == 300
    assert not calls


def flip(place):
    def change(cache):
        raw = bytearray(cache.read_bytes())
        raw[place] ^= 1
        cache.write_bytes(raw)

    return change


DAMAGES = {  # and what is told
    **{f"byte {place}": (flip(place), ": 1 of 10 chunks are damaged; delete it") for place in (0, 100_000, -1)},
    "truncated": (lambda cache: os.truncate(cache, cache.stat().st_size - 5), ""),
    "no checksums": (lambda cache: cache.with_name(f"{cache.name}.json").unlink(), ""),
}


@pytest.mark.parametrize(("change", "told"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_refused_by_name(source, tmp_path, small_chunks, change, told):
    dataio.DecodedCache(stream_of(source), tmp_path)
    final = next(tmp_path.glob("*.u8"))
    change(final)
    with pytest.raises(ValueError, match=final.name + told):
        dataio.DecodedCache(stream_of(source), tmp_path)


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_decoding(source, tmp_path, monkeypatch):
    calls = counted_decodes(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(300 * SIDE * SIDE * 3 - 1))
    with pytest.raises(OSError, match="the decoded cache needs"):
        dataio.DecodedCache(stream_of(source), tmp_path / "c")
    assert not calls
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".lock"]


def test_a_cache_remembers_its_broken_pictures(tmp_path):
    path = broken_source(tmp_path, range(30), count=100)
    dataio.DecodedCache(stream_of(path, max_bad_fraction=0.5), tmp_path / "cache")
    again = dataio.DecodedCache(stream_of(path, max_bad_fraction=0.3), tmp_path / "cache")
    assert {row for _, row in again.bad.found} == set(range(30))
    with pytest.raises(ValueError, match=r"30 of 100 images are broken|more than data.max_bad_fraction=0.29"):
        dataio.DecodedCache(stream_of(path, max_bad_fraction=0.29), tmp_path / "cache")
