"""Materialised shards: every row of a side once, the same bytes each time, going on after a crash."""

import itertools
import shutil
import threading
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PEOPLE, drawn_numbers, numbered_rows, shuffled, split, stream_of, write_rows
from runs import SERVER

import dataio


@pytest.fixture
def job(source, tmp_path, monkeypatch):
    """Arguments of a materialisation in several shards, and the split."""
    monkeypatch.setattr(dataio, "SHARD_BYTES", 4000)
    monkeypatch.setattr(dataio, "ROW_GROUP_ROWS", 20)
    splits = split(PEOPLE, tmp_path)
    return (source, tmp_path / "splits.parquet", tmp_path / "out/digiface"), splits


def rows_of(shards) -> list[dict]:
    return pa.concat_tables(pq.read_table(shard) for shard in shards).to_pylist()


def expected_rows(splits, side) -> list[dict]:
    return [row for row in numbered_rows(np.repeat(PEOPLE, 5).tolist()) if row["identity_id"] in splits.identities[side]]


def in_order(rows):
    return sorted(rows, key=lambda row: row["image_filename"].split("/")[1].zfill(9))


@pytest.mark.parametrize("side", ["train", "test"])
def test_the_shards_hold_every_row_of_their_side_once_byte_for_byte(job, side):
    args, splits = job
    shards = dataio.materialize_split(*args, side)
    rows = rows_of(shards)
    assert in_order(rows) == expected_rows(splits, side)
    assert len(shards) > 2
    assert shards == sorted(args[2].glob("*.parquet"))
    assert sorted(p.name for p in args[2].parent.iterdir()) == [".digiface.lock", "digiface"]
    assert (rows == expected_rows(splits, side)) == (side == "test")  # test in order, train not


def test_the_shards_say_what_they_are_and_have_small_row_groups(job):
    args, splits = job
    shards = dataio.materialize_split(*args, "train")
    for shard in shards:
        file = pq.ParquetFile(shard)
        note = dataio.read_metadata(shard)
        assert note["split"] == "train"
        assert note["table"] == splits.hash
        assert note["rows"] == 225
        assert note["shards"] == len(shards)
        assert max(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)) <= 20
        assert file.schema_arrow.remove_metadata() == dataio.SHARD_SCHEMA
        assert file.metadata.row_group(0).column(2).compression == "UNCOMPRESSED"
    sizes = [pq.ParquetFile(shard).metadata.num_rows for shard in shards]
    assert sizes[:-1] == [max(sizes)] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= max(sizes)


def test_train_shards_are_as_well_mixed_as_a_true_permutation(tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "SHARD_BYTES", 20_000)
    people = [f"{i:03d}" for i in range(120)]
    write_rows(tmp_path / "a.parquet", numbered_rows(np.repeat(people, 15).tolist()), group=100)
    splits = split(people, tmp_path)
    shards = dataio.materialize_split(str(tmp_path / "a.parquet"), tmp_path / "splits.parquet", tmp_path / "out", "train")
    codes = np.array([int(row["identity_id"]) for row in rows_of(shards)])
    sorted_codes = np.sort(codes)
    ideal = np.mean([dataio.repeats_in_queue(shuffled(sorted_codes, seed), 200) for seed in range(5)])
    assert len(splits.identities["train"]) == 90
    assert dataio.repeats_in_queue(sorted_codes, 200) > 3 * ideal
    assert dataio.repeats_in_queue(codes, 200) == pytest.approx(ideal, rel=0.1)


def test_the_shards_train_like_the_source_without_a_second_split(job):
    args, splits = job
    shards = dataio.materialize_split(*args, "train")
    assert sorted(drawn_numbers(stream_of(list(map(str, shards))))) == sorted(
        number_in(row) for row in expected_rows(splits, "train")
    )


def number_in(row):
    return int(row["image_filename"].split("/")[1].removesuffix(".png"))


def test_the_same_call_writes_the_same_bytes(job, tmp_path):
    (source, table, out), _ = job
    one = dataio.materialize_split(source, table, out, "train")
    other = dataio.materialize_split(source, table, tmp_path / "elsewhere/digiface", "train")
    assert [p.name for p in one] == [p.name for p in other]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


def test_a_finished_materialisation_is_left_as_it_is(job, monkeypatch):
    args, _ = job
    shards = dataio.materialize_split(*args, "train")
    before = [(p.stat().st_mtime_ns, p.stat().st_ino) for p in shards]
    monkeypatch.setattr(dataio, "write_shard", lambda *_: pytest.fail("written again"))
    monkeypatch.setattr(dataio, "read_rows", lambda *_: pytest.fail("read again"))
    assert dataio.materialize_split(*args, "train") == shards
    assert [(p.stat().st_mtime_ns, p.stat().st_ino) for p in shards] == before


def test_a_missing_shard_or_another_split_makes_all_shards_again(job):
    args, splits = job
    shards = dataio.materialize_split(*args, "train")
    shards[1].unlink()
    assert in_order(rows_of(dataio.materialize_split(*args, "train"))) == expected_rows(splits, "train")
    other = dataio.write_identity_splits(PEOPLE, args[1], 0.5, 1)
    assert in_order(rows_of(dataio.materialize_split(*args, "train"))) == expected_rows(other, "train")
    assert len(list(args[2].iterdir())) < len(shards)


def read_seven_batches(original):
    def read_rows(*arguments):
        yield from itertools.islice(original(*arguments), 7)
        raise KeyboardInterrupt

    return read_rows


def remove_one_bucket(original):
    def rmtree(folder, *rest, **options):
        if Path(folder).name == "buckets":
            min(Path(folder).iterdir()).unlink()
            raise KeyboardInterrupt
        original(folder, *rest, **options)

    return rmtree


@pytest.mark.parametrize(
    ("module", "name", "crash"), [(dataio, "read_rows", read_seven_batches), (shutil, "rmtree", remove_one_bucket)]
)
def test_after_a_crash_while_rows_are_dealt_or_buckets_removed_the_next_call_ends_well(job, monkeypatch, module, name, crash):
    args, splits = job
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            dataio.materialize_split(*args, "train")
    assert not args[2].exists()
    assert in_order(rows_of(dataio.materialize_split(*args, "train"))) == expected_rows(splits, "train")
    assert sorted(p.name for p in args[2].parent.iterdir()) == [".digiface.lock", "digiface"]


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_crash_while_writing_shards_keeps_the_finished_ones(job, tmp_path, monkeypatch, side):
    args, _ = job
    whole = [p.read_bytes() for p in dataio.materialize_split(args[0], args[1], tmp_path / "other/digiface", side)]
    original, written = dataio.write_shard, []

    def stops(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dataio, "write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            dataio.materialize_split(*args, side)
    assert not args[2].exists()
    again = []
    monkeypatch.setattr(dataio, "write_shard", lambda path, *rest: again.append(path.name) or original(path, *rest))
    monkeypatch.setattr(dataio, "scatter_rows", lambda *_: pytest.fail("dealt again"))
    shards = dataio.materialize_split(*args, side)
    assert len(again) == len(shards) - 2
    assert not set(again) & set(written)
    assert [p.read_bytes() for p in shards] == whole


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_full_disk_stops_the_reading_at_once(job, monkeypatch, side):
    args, _ = job

    def full(path, table, note):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataio, "write_shard", full)
    with pytest.raises(OSError, match="No space") as error:
        dataio.materialize_split(*args, side)
    assert not [thread for thread in threading.enumerate() if "Pool" in thread.name], error


def test_a_file_of_one_row_group_is_not_read_again_for_each_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "SHARD_BYTES", 5_000)
    monkeypatch.setattr(dataio, "ROW_GROUP_ROWS", 20)
    write_rows(tmp_path / "a.parquet", numbered_rows(np.repeat(PEOPLE, 20).tolist()), group=10**6)
    split(PEOPLE, tmp_path)
    read, original = [], dataio.open_parquet

    def counted(*args):
        parquet = original(*args)
        batches = parquet.iter_batches
        monkeypatch.setattr(parquet, "iter_batches", lambda *a, **k: (read.append(len(b)) or b for b in batches(*a, **k)))
        return parquet

    monkeypatch.setattr(dataio, "open_parquet", counted)
    shards = dataio.materialize_split(str(tmp_path / "a.parquet"), tmp_path / "splits.parquet", tmp_path / "out", "test")
    assert len(shards) > 3
    assert sum(read) == 20 * len(PEOPLE)


def test_files_of_the_user_in_the_output_folder_are_not_deleted(job):
    args, _ = job
    args[2].mkdir(parents=True)
    (args[2] / "thesis.txt").write_text("three years")
    with suppress(ValueError, OSError):  # refused, or written beside it
        dataio.materialize_split(*args, "train")
    assert (args[2] / "thesis.txt").exists()


def test_a_disk_without_room_is_refused_and_leaves_nothing(job, monkeypatch):
    args, _ = job
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(20_000))
    with pytest.raises(OSError, match="materialising 225 train images needs"):
        dataio.materialize_split(*args, "train")
    assert [p.name for p in args[2].parent.iterdir()] == [".digiface.lock"]


def test_a_bucket_that_lost_rows_is_refused(job, monkeypatch):
    args, _ = job
    scatter = dataio.scatter_rows

    def scatter_and_cut(index, shard_of, folder, bar):
        scatter(index, shard_of, folder, bar)
        with pa.ipc.open_stream(folder / "00001.arrow") as reader:
            first = next(iter(reader))
        with pa.ipc.new_stream(folder / "00001.arrow", first.schema) as writer:
            writer.write_batch(first.slice(0, 1))

    monkeypatch.setattr(dataio, "scatter_rows", scatter_and_cut)
    with pytest.raises(ValueError, match=r"00001.arrow: holds 1 of \d+ rows; delete"):
        dataio.materialize_split(*args, "train")
    assert not args[2].exists()


def test_two_processes_that_materialise_take_turns(job):
    args, splits = job
    with dataio.locked(args[2].with_name(".digiface.lock"), wait=True):
        other = SERVER.Process(target=dataio.materialize_split, args=(*args, "train"), daemon=True)
        other.start()
        other.join(2)
        assert other.is_alive()
        assert not args[2].exists()
    other.join(60)
    assert other.exitcode == 0
    assert in_order(rows_of(sorted(args[2].glob("*.parquet")))) == expected_rows(splits, "train")


def test_rows_are_regrouped_whole_and_in_order():
    tables = [
        pa.table([["a"] * n, [str(first + i) for i in range(n)], [b"x"] * n], schema=dataio.SHARD_SCHEMA)
        for first, n in ((0, 3), (3, 1), (4, 7), (11, 0), (11, 5))
    ]
    for size, lengths in ((1, [1] * 16), (4, [4] * 4), (6, [6, 6, 4]), (99, [16])):
        groups = list(dataio.regroup(tables, size))
        assert list(map(len, groups)) == lengths
        assert pa.concat_tables(groups).equals(pa.concat_tables(tables))
    assert not list(dataio.regroup([], 4))
