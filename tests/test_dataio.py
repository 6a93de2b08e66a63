"""Files and pixels: the split, the index, the order, streams, caches, decoding, curriculum, shards, views, demo faces."""

import dataclasses
import errno
import io
import itertools
import math
import multiprocessing
import os
import random
import shutil
import socket
import threading
import time
from collections import Counter, namedtuple
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TV
from conftest import SIDE, encode, number_of, numbered_picture, numbered_rows, without_hanging, write_rows
from PIL import Image

import dataio
from dataio import ParquetImageStream, load_batches

PEOPLE = [f"{i:03d}" for i in range(60)]
BROKEN = b"\x89PNG\r\n\x1a\nthis is no picture"


@pytest.fixture
def source(tmp_path):
    """300 numbered pictures of 60 people, five each, sorted by person, in two files of row groups of ten."""
    rows = numbered_rows(np.repeat(PEOPLE, 5).tolist())
    write_rows(tmp_path / "in/part_000.parquet", rows[:170])
    write_rows(tmp_path / "in/part_001.parquet", rows[170:])
    return str(tmp_path / "in/*.parquet")


def stream_of(globs, **options):
    options = {"shuffle_buffer": 60, "image_size": SIDE, "max_bad_fraction": 0.5} | options
    return ParquetImageStream(globs, **options)


def by_steps(batch):
    return lambda step: [batch * step]


def numbers(batches) -> list[int]:
    return [number_of(image) for batch in batches for image in batch]


def drawn_numbers(stream, batch=16, start=0, stop=None, workers=2) -> list[int]:
    """The numbers of the images of steps start..stop-1; by default of one pass."""
    end = math.inf if stop else len(stream)
    stop = stop or math.ceil(len(stream) / batch)
    return without_hanging(
        lambda: numbers(load_batches([stream], lambda step: [min(batch * step, end)], start, stop, workers=workers))
    )


def shuffled(codes, seed=0):
    return np.random.default_rng(seed).permutation(codes)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_half(path, error):
    with dataio.write_whole(path) as temporary:
        temporary.write_text("half of")
        raise error


def test_a_file_appears_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert list(path.parent.iterdir()) == []
    with dataio.write_whole(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        written = temporary.stat().st_ino
    assert path.stat().st_ino == written  # renamed, never copied: a copy can be half there
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "whole"


def test_the_old_file_stays_when_writing_the_new_one_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError())
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_temporaries_of_dead_processes_are_removed_and_those_of_others_are_not(tmp_path):
    path = tmp_path / "a [1].txt"
    here, parent = socket.gethostname(), os.getppid()
    dead, alive = tmp_path / f".{path.name}.~999999999~{here}.tmp", tmp_path / f".{path.name}.~{parent}~{here}.tmp"
    other = tmp_path / f".{path.name}.~999999999~elsewhere.tmp"
    for file in (dead, alive, other):
        file.write_text("left")
    with dataio.write_whole(path) as temporary:
        temporary.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, alive.name, other.name}


def test_a_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    dataio.need_space(tmp_path / "not/there/yet", 1_000_000, "the cache")
    with pytest.raises(OSError, match=r"there/yet: the cache needs 2\.00 GB.*0\.00 GB free"):
        dataio.need_space(tmp_path / "not/there/yet", 2_000_000_000, "the cache")


def test_a_pattern_without_a_match_is_named(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"nothing_\*\.parquet"):
        dataio.find_files([str(tmp_path / "*.parquet"), str(tmp_path / "nothing_*.parquet")])


def test_files_are_found_once_in_the_order_of_their_names(tmp_path):
    names = ["b/1 [x].parquet", "a/2 ä, 'q'.parquet", "a/3.parquet"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = dataio.find_files([str(tmp_path / "a/*"), str(tmp_path / "**/*.parquet"), str(tmp_path / names[0])])
    assert [str(path.relative_to(tmp_path)) for path in found] == names


def test_a_file_named_absolutely_and_relatively_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    assert len(dataio.find_files(["a.parquet", str(tmp_path / "a.parquet")])) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Split
# ---------------------------------------------------------------------------------------------------------------------


def split(ids, folder, ratio=0.75, seed=42, **more):
    return dataio.write_identity_splits(ids, folder / "splits.parquet", ratio, seed, **more)


@pytest.mark.parametrize(("count", "ratio"), [(2, 0.5), (7, 0.75), (100, 0.75), (101, 0.75), (1000, 0.1), (33, 0.9)])
def test_the_train_ratio_is_exact_and_no_identity_is_on_two_sides(tmp_path, count, ratio):
    ids = [f"id{i}" for i in range(count)]
    splits = split(ids, tmp_path, ratio)
    assert len(splits.identities["train"]) == round(ratio * count)
    assert sorted(itertools.chain(*splits.identities.values())) == sorted(ids)


def test_the_split_of_an_identity_does_not_depend_on_the_order_or_repetition_of_the_input(tmp_path):
    ids = [f"id{i}" for i in range(50)]
    expected = split(ids, tmp_path)
    for order in (ids[::-1], shuffled(ids).tolist(), ids + ids[:20], set(ids), iter(ids)):
        assert split(order, tmp_path) == expected


def test_the_split_never_changes_silently(tmp_path):
    """Golden values: a change of these sides would move test identities of published runs into training."""
    splits = split([str(i) for i in range(20)], tmp_path)
    assert splits.identities["test"] == ["1", "18", "19", "6", "9"]
    assert splits.hash == "f901cf4a11730408"
    assert dataio.draw_seed(42, "order", 3) == 374074118411474


def test_another_seed_gives_another_split_of_the_same_size(tmp_path):
    ids = [f"id{i}" for i in range(100)]
    one, other = split(ids, tmp_path, seed=1), split(ids, tmp_path, seed=2)
    assert one.identities["train"] != other.identities["train"]
    assert one.hash != other.hash
    assert len(one.identities["train"]) == len(other.identities["train"]) == 75


def test_the_integer_1_and_the_string_1_are_the_same_person(tmp_path):
    texts, integers = write_rows(tmp_path / "a.parquet", numbered_rows(["1", "2", "3"])), tmp_path / "b.parquet"
    write_rows(integers, numbered_rows([2, 3, 4]), types={"identity_id": pa.int64()})
    assert dataio.collect_unique_identities([str(texts), str(integers)]) == ["1", "2", "3", "4"]
    assert len(dataio.build_index([str(texts), str(integers)], [2, "4"]).unit) == 3
    assert split([1, 2, 3, 4], tmp_path) == split(["1", "2", "3", "4"], tmp_path)


def test_integers_and_strings_may_be_mixed_in_one_split(tmp_path):
    assert split([1, "1", 2, "3", 4], tmp_path) == split(["1", "2", "3", "4"], tmp_path)


def test_extending_a_table_keeps_every_side_and_restores_the_ratio(tmp_path):
    old, new = [f"id{i}" for i in range(40)], [f"new{i}" for i in range(60)]
    first = split(old, tmp_path)
    known = {name: side for side, names in first.identities.items() for name in names}
    second = split(old + new, tmp_path, known=known)
    sides = {name: side for side, names in second.identities.items() for name in names}
    assert {name: sides[name] for name in old} == known
    assert len(second.identities["train"]) == 75
    assert len(sides) == 100


def test_an_extension_with_too_few_new_identities_puts_them_all_where_they_are_missing(tmp_path):
    known = dict.fromkeys([f"t{i}" for i in range(10)], "test") | {"a": "train"}
    splits = split([*known, "b", "c"], tmp_path, known=known)
    assert splits.identities["train"] == ["a", "b", "c"]
    known = dict.fromkeys([f"t{i}" for i in range(10)], "train") | {"a": "test"}
    assert split([*known, "b", "c"], tmp_path, known=known).identities["test"] == ["a", "b", "c"]


def test_validation_identities_come_out_of_the_train_side_only(tmp_path):
    ids = [f"id{i}" for i in range(200)]
    plain, with_val = split(ids, tmp_path), split(ids, tmp_path, validation_ratio=0.1)
    assert with_val.identities["test"] == plain.identities["test"]
    assert sorted(with_val.identities["train"] + with_val.identities["val"]) == plain.identities["train"]
    assert len(with_val.identities["val"]) == 15
    assert plain.identities["val"] == []


def test_the_table_says_how_it_was_made_and_its_hash_follows_its_content(tmp_path):
    splits = split(PEOPLE, tmp_path, 0.6, 7, validation_ratio=0.25)
    counts = {"train": 27, "val": 9, "test": 24}
    assert splits.note == {"seed": 7, "train_ratio": 0.6, "validation_ratio": 0.25, "counts": counts, "extends": []}
    table = pq.read_table(tmp_path / "splits.parquet")
    assert Counter(table["split"].to_pylist()) == counts
    pq.write_table(table.take(shuffled(np.arange(60))), tmp_path / "reordered.parquet")
    assert dataio.read_identity_splits(tmp_path / "reordered.parquet") == splits
    sides = table["split"].to_pylist()
    sides[0] = {"train": "test", "test": "train", "val": "test"}[sides[0]]
    pq.write_table(table.set_column(1, "split", pa.array(sides)), tmp_path / "changed.parquet")
    assert dataio.read_identity_splits(tmp_path / "changed.parquet").hash != splits.hash


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"identity_id": ["a", "a"], "split": ["train", "test"]}, "each identity once"),
        ({"identity_id": ["a", "b"], "split": ["train", "exam"]}, "as train, val or test"),
        ({"identity_id": ["a", None], "split": ["train", "test"]}, "1 of 2 rows have no 'identity_id'"),
        ({"identity_id": ["a", "b"], "side": ["train", "test"]}, "not a split table.*side"),
        ({"identity_id": ["a", "b"], "split": [0, 1]}, "as train, val or test"),
        ({"identity_id": [1, 1], "split": ["train", "train"]}, "each identity once"),
    ],
)
def test_a_file_that_is_no_split_table_is_refused_by_name(tmp_path, columns, message):
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=f"foreign.parquet: .*{message}"):
        dataio.read_identity_splits(path)


@pytest.mark.parametrize("ids", [[], ["a"]])
def test_a_split_without_train_or_test_identities_is_refused_and_writes_nothing(tmp_path, ids):
    with pytest.raises(ValueError, match="both train and test need at least one"):
        split(ids, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------------------------------------


def test_the_index_holds_the_allowed_rows_and_no_others(source):
    allowed = PEOPLE[3:40:7]
    index = dataio.build_index(source, allowed)
    found = []
    for unit, row in zip(index.unit, index.row, strict=True):
        file, group = index.units[unit]
        found.append(pq.ParquetFile(index.paths[file]).read_row_group(group)["identity_id"][int(row)].as_py())
    assert found == sorted(allowed * 5)
    assert len(dataio.build_index(source, None).unit) == 300
    assert (np.diff(index.unit) >= 0).all()
    assert set(index.unit) == set(range(len(index.units)))


def test_the_index_reads_no_pictures(source, monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, *a, **k: read.append(k["columns"]) or original(self, *a, **k)
    )
    dataio.build_index(source, PEOPLE[:3])
    dataio.collect_unique_identities(source)
    assert {tuple(columns) for columns in read} == {("identity_id",)}


def test_no_allowed_row_at_all_is_refused(source):
    with pytest.raises(ValueError, match="no row of 2 files has an allowed identity"):
        dataio.build_index(source, ["nobody"])
    with pytest.raises(ValueError, match="no row of 2 files"):
        dataio.build_index(source, [])


def test_rows_without_an_identity_are_refused_with_file_and_count(tmp_path):
    rows = numbered_rows(["a"] * 10)
    rows[2]["identity_id"] = rows[7]["identity_id"] = rows[8]["identity_id"] = None
    path = write_rows(tmp_path / "some_null.parquet", rows)
    for read in (lambda: dataio.build_index(str(path), None), lambda: dataio.collect_unique_identities(str(path))):
        with pytest.raises(ValueError, match=r"some_null\.parquet: 3 of 10 rows have no 'identity_id'"):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("identity_id"), "0 columns called 'identity_id', found .*'image_bytes'.*data.columns"),
        (lambda row: row.pop("image_filename"), "0 columns called 'image_filename'"),
        (lambda row: row.pop("image_bytes"), "0 columns called 'image_bytes'"),
        (lambda row: row.update(image_bytes=row["image_bytes"].hex()), "'image_bytes' is string, must be binary"),
        (lambda row: row.update(identity_id=1.5), "'identity_id' is double, must be string or integer"),
        (lambda row: row.update(identity_id=True), "'identity_id' is bool, must be string or integer"),
        (lambda row: row.update(image_filename=3), "'image_filename' is int64, must be string"),
        (lambda row: row.update(image_bytes={"bytes": row["image_bytes"], "path": "x"}), "'image_bytes' is struct.*must be binary"),
    ],
)
def test_a_missing_column_or_a_wrong_type_is_refused_by_name(tmp_path, change, message):
    rows = numbered_rows(["a", "b"])
    for row in rows:
        change(row)
    path = tmp_path / "wrong.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    for read in (lambda: dataio.build_index(str(path), None), lambda: dataio.collect_unique_identities(str(path))):
        with pytest.raises(ValueError, match=f"wrong.parquet: .*{message}"):
            read()


def test_a_column_that_stands_twice_is_refused(tmp_path):
    rows = numbered_rows(["a", "b"])
    columns = [pa.array([row[name] for row in rows]) for name in ("identity_id", "identity_id", "image_filename", "image_bytes")]
    names = ["identity_id", "identity_id", "image_filename", "image_bytes"]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: 2 columns called 'identity_id'"):
        dataio.build_index(str(tmp_path / "twice.parquet"), None)


def test_columns_may_have_other_names(tmp_path):
    rows = [{"who": r["identity_id"], "file": r["image_filename"], "png": r["image_bytes"], "age": 3} for r in numbered_rows("abc")]
    path = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    columns = dataio.Columns("who", "file", "png")
    assert numbers(
        [list(stream_of(str(path), columns=columns, allowed_identities=["b", "c"], shuffle_files=False, shuffle_buffer=0))]
    ) == [1, 2]
    assert dataio.collect_unique_identities(str(path), columns) == ["a", "b", "c"]


def hostile_folder(path):
    path.mkdir()


def hostile_truncation(path):
    whole = write_rows(path, numbered_rows(["a"] * 30)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "make",
    [
        hostile_folder,
        hostile_truncation,
        Path.touch,
        lambda path: path.write_text("identity_id,image_bytes\n" * 100),
        lambda p: p.write_bytes(b"PAR1PAR1"),
    ],
    ids=["folder", "truncated", "empty", "text", "magic only"],
)
def test_what_is_no_parquet_file_is_refused_by_name(tmp_path, make):
    write_rows(tmp_path / "a.parquet", numbered_rows("ab"))
    make(tmp_path / "b.parquet")
    for read in (
        lambda: dataio.build_index(str(tmp_path / "*.parquet"), None),
        lambda: dataio.collect_unique_identities(str(tmp_path / "*.parquet")),
    ):
        with pytest.raises(ValueError, match=r"b.parquet: not a readable parquet file \(.+\)"):
            read()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_file_with_damaged_pages_is_refused_by_name(tmp_path, compression):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist(numbered_rows(PEOPLE)), path, compression=compression)
    damage_column(path, 0)
    for read in (lambda: dataio.build_index(str(path), None), lambda: dataio.collect_unique_identities(str(path))):
        with pytest.raises(ValueError, match=r"damaged\.parquet"):
            read()


def damage_column(path, number):
    column = pq.ParquetFile(path).metadata.row_group(0).column(number)
    start, raw = column.dictionary_page_offset or column.data_page_offset, bytearray(path.read_bytes())
    for i in range(start, start + column.total_compressed_size):
        raw[i] ^= 0x5A
    path.write_bytes(raw)


def test_seeded_mutations_of_a_parquet_file_are_read_or_refused_by_name(tmp_path):
    path = tmp_path / "mutated.parquet"
    whole, rng, unnamed = write_rows(path, numbered_rows(PEOPLE[:30])).read_bytes(), random.Random(5), []
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw if rng.random() < 0.8 else raw[: rng.randrange(len(raw))])
        try:
            assert len(without_hanging(lambda: dataio.build_index(str(path), None)).unit) > 0
        except Exception as error:
            if not isinstance(error, ValueError) or "mutated.parquet" not in str(error):
                unnamed.append(f"{type(error).__name__}: {dataio.first_line(error)}")
    assert not unnamed


@pytest.mark.parametrize("rows", [[], None])
def test_a_file_without_rows_is_skipped_beside_others_and_refused_alone(tmp_path, rows):
    empty = write_rows(tmp_path / "empty.parquet", [])
    if rows is None:  # not even a row group
        pq.ParquetWriter(empty, pq.read_schema(empty)).close()
        assert pq.ParquetFile(empty).num_row_groups == 0
    with pytest.raises(ValueError, match="no row of 1 files"):
        dataio.build_index(str(empty), None)
    assert dataio.collect_unique_identities(str(empty)) == []
    write_rows(tmp_path / "full.parquet", numbered_rows("ab"))
    assert sorted(drawn_numbers(stream_of(str(tmp_path / "*.parquet")))) == [0, 1]


TYPES = {
    "large": (pa.large_string(), pa.large_string(), pa.large_binary()),
    "view": (pa.string_view(), pa.string_view(), pa.binary_view()),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.string()), pa.binary()),
    "dictionary of pictures": (pa.string(), pa.string(), pa.dictionary(pa.int32(), pa.binary())),
    "dictionary of large": (pa.dictionary(pa.int32(), pa.large_string()), pa.string(), pa.large_binary()),
    "int8": (pa.int8(), pa.string(), pa.binary()),
    "uint64": (pa.uint64(), pa.string(), pa.binary()),
    "dictionary of integers": (pa.dictionary(pa.int32(), pa.int64()), pa.string(), pa.binary()),
}


def typed_file(path, kinds, identities, first=0):
    rows = numbered_rows(identities, first)
    if any("int" in str(getattr(kinds[0], "value_type", kinds[0])) for _ in "x"):
        rows = [row | {"identity_id": int(row["identity_id"])} for row in rows]
    return write_rows(path, rows, types=dict(zip(("identity_id", "image_filename", "image_bytes"), kinds, strict=True)))


@pytest.mark.parametrize("kind", TYPES)
def test_every_layout_of_strings_and_bytes_gives_the_same_images(tmp_path, kind):
    path = typed_file(tmp_path / "a.parquet", TYPES[kind], [str(i % 7) for i in range(25)])
    assert dataio.collect_unique_identities(str(path)) == [str(i) for i in range(7)]
    stream = stream_of(str(path), allowed_identities=["1", "5"], shuffle_files=False, shuffle_buffer=0, batch_read_rows=4)
    assert drawn_numbers(stream) == [n for n in range(25) if n % 7 in (1, 5)]


@pytest.mark.parametrize("kind", TYPES)
def test_every_layout_of_strings_and_bytes_can_be_materialised(tmp_path, kind):
    path = typed_file(tmp_path / "a.parquet", TYPES[kind], [str(i % 7) for i in range(25)])
    splits = split([str(i) for i in range(7)], tmp_path)
    shards = dataio.materialize_split(str(path), tmp_path / "splits.parquet", tmp_path / "out", "train")
    rows = pa.concat_tables(pq.read_table(shard) for shard in shards).to_pylist()
    expected = [row for row in numbered_rows([str(i % 7) for i in range(25)]) if row["identity_id"] in splits.identities["train"]]
    assert sorted(rows, key=lambda row: row["image_filename"]) == sorted(expected, key=lambda row: row["image_filename"])


def test_shards_with_different_schemas_are_read_side_by_side(tmp_path):
    kinds = [TYPES["large"], TYPES["int8"], TYPES["view"], TYPES["dictionary"]]
    for n, kind in enumerate(kinds):
        typed_file(tmp_path / f"{n}.parquet", kind, [str(i % 4) for i in range(20)], 20 * n)
    stream = stream_of(str(tmp_path / "*.parquet"), allowed_identities=["3"])
    assert sorted(drawn_numbers(stream)) == [n for n in range(80) if n % 4 == 3]


def test_the_fingerprint_follows_the_rows_and_not_the_folder(tmp_path):
    rows = numbered_rows(PEOPLE)

    def fingerprint(name, rows, allowed=None, **options):
        return dataio.build_index(str(write_rows(tmp_path / name / "a.parquet", rows, **options)), allowed).fingerprint

    base = fingerprint("one", rows)
    assert fingerprint("two", rows) == base
    assert fingerprint("three", rows[:-1]) != base
    assert fingerprint("four", [*rows[:-1], rows[-1] | {"image_bytes": numbered_picture(9) + b"more"}]) != base
    assert fingerprint("five", rows, PEOPLE[:30]) != base
    assert fingerprint("six", rows, PEOPLE[:30]) != fingerprint("seven", rows, PEOPLE[1:31])
    assert fingerprint("eight", rows, group=7) != base


def moved_pictures(rows):
    """The same rows, each with the picture of another one of the same size."""
    return [row | {"image_bytes": other["image_bytes"]} for row, other in zip(rows, rows[::-1], strict=True)]


def test_the_fingerprint_sees_other_people_in_rows_of_the_same_size(tmp_path):
    rows = numbered_rows(PEOPLE)
    renamed = [row | {"identity_id": row["identity_id"].replace("0", "a")} for row in rows]
    found = [
        dataio.build_index(str(write_rows(tmp_path / name / "a.parquet", r)), None).fingerprint
        for name, r in (("1", rows), ("2", renamed))
    ]
    assert found[0] != found[1]


def test_a_cache_of_other_pictures_is_not_used(tmp_path):
    rows = numbered_rows(PEOPLE)
    path = write_rows(tmp_path / "a.parquet", rows)
    dataio.DecodedCache(stream_of(str(path)), tmp_path / "cache")
    write_rows(path, moved_pictures(rows))
    cache = dataio.DecodedCache(stream_of(str(path)), tmp_path / "cache")
    assert [number_of(np.moveaxis(image, -1, 0)) for image in cache.images] == list(range(60))[::-1]


def test_the_stream_fingerprint_changes_with_what_changes_the_order(source):
    found = [
        stream_of(source, **o).fingerprint
        for o in ({}, {"shuffle_files": False}, {"shuffle_buffer": 61}, {"allowed_identities": PEOPLE[:9]})
    ]
    assert len(set(found)) == 4
    assert stream_of(source, batch_read_rows=3).fingerprint == found[0]


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"shuffle_files": False}, {"shuffle_buffer": 0}, {"shuffle_buffer": 10**6}, {"batch_read_rows": 3}]
)
def test_a_pass_yields_each_allowed_row_exactly_once(source, options):
    allowed = PEOPLE[::3]
    stream = stream_of(source, allowed_identities=allowed, **options)
    images = without_hanging(lambda: list(stream))
    assert len(stream) == len(images) == 100
    assert images[0].dtype == torch.uint8
    assert images[0].shape == (3, SIDE, SIDE)
    assert sorted(map(number_of, images)) == [n for n in range(300) if PEOPLE[n // 5] in allowed]


def test_the_images_come_in_the_order_that_was_announced(source):
    stream = stream_of(source, seed=5)
    assert drawn_numbers(stream, 50) == stream.order(0).tolist()
    assert stream.order(0).tolist() != list(range(300))


@pytest.mark.parametrize(("workers", "batch"), [(1, 32), (2, 32), (5, 32), (3, 1), (2, 100), (2, 299)])
def test_order_and_pixels_depend_neither_on_workers_nor_on_the_batch_size(faces, workers, batch):
    def images(workers, batch):
        stream = ParquetImageStream(str(faces / "*.parquet"), shuffle_buffer=100, image_size=32, seed=3)
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


def broken_source(tmp_path, broken, count=200, group=10, payloads=(BROKEN, b"", None)):
    rows = numbered_rows([f"p{n // 10}" for n in range(count)])
    for n, payload in zip(broken, itertools.cycle(payloads), strict=False):
        rows[n]["image_bytes"] = payload
    return str(write_rows(tmp_path / "holey.parquet", rows, group=group))


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


def test_too_many_broken_images_end_the_run_after_a_thousand(tmp_path):
    path = broken_source(tmp_path, range(0, 3000, 10), count=3000, group=100)
    batches = load_batches([stream_of(path, max_bad_fraction=0.05)], by_steps(100), 0, 30, workers=2)
    done = []
    with pytest.raises(ValueError, match=r"of 1000 images are broken"):
        without_hanging(lambda: done.extend(len(batch) for batch in batches))
    assert sum(done) == 900


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
    with pytest.raises(ValueError, match=r"long.parquet.*has the file changed\?"):
        without_hanging(lambda: list(batches))


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
        without_hanging(lambda: list(batches))


def test_damaged_pages_of_pictures_end_in_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist(numbered_rows(PEOPLE)), path, compression="zstd")
    damage_column(path, 2)
    with pytest.raises(ValueError, match=r"damaged\.parquet row group 0: cannot be read"):
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
    assert set(stream.to_come) == {2}


def test_after_a_jump_nothing_is_kept_for_images_that_were_jumped_over(long_source):
    stream = stream_of(str(long_source[0]), shuffle_buffer=400)
    for _ in load_batches([stream], by_steps(10), 35, 45, workers=2):  # from near the end of a pass into the next
        pass
    assert {number for number, _ in stream.loaded} == {1}
    assert set(stream.to_come) == {1}


def test_file_names_may_hold_spaces_commas_quotes_and_letters_of_any_language(tmp_path):
    name = "Gesichter ä, 'x' \"y\" [1] 顔=*.parquet"
    path = write_rows(tmp_path / name, numbered_rows(["é, '\n", "ß"]))
    assert sorted(drawn_numbers(stream_of(str(path), allowed_identities=["é, '\n"]))) == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(dataio, "CACHE_CHUNK", 32)


def counted_decodes(monkeypatch) -> list:
    calls, original = [], dataio.decode_image
    monkeypatch.setattr(dataio, "decode_image", lambda *a: calls.append(1) or original(*a))
    return calls


def test_the_cache_gives_the_pixels_of_the_stream(faces, tmp_path, small_chunks):
    stream = ParquetImageStream(str(faces / "*.parquet"), image_size=48, seed=9)
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
    assert again.fingerprint == cache.fingerprint
    assert (dataio.DecodedCache(stream_of(source, seed=5), tmp_path).order(0) != drawn[0]).any()
    assert dataio.repeats_in_queue(drawn[0] // 5, 100) < 1.5 * dataio.repeats_in_queue(shuffled(np.arange(300) // 5), 100)


def test_a_batch_larger_than_the_cache_goes_round(tmp_path):
    path = write_rows(tmp_path / "a.parquet", numbered_rows("abc"))
    drawn = np.array(drawn_numbers(dataio.DecodedCache(stream_of(str(path)), tmp_path / "c"), 7, 0, 3)).reshape(-1, 3)
    assert (np.sort(drawn) == np.arange(3)).all()


def test_a_device_cache_gives_the_same_images_in_the_same_order(source, tmp_path, small_chunks):
    one = dataio.DecodedCache(stream_of(source), tmp_path)
    other = dataio.DeviceCache(stream_of(source), tmp_path, 2, torch.device("cpu"))
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


@pytest.mark.parametrize("where", [0, 100_000, -1])
def test_a_flipped_byte_in_the_cache_is_refused(source, tmp_path, small_chunks, where):
    dataio.DecodedCache(stream_of(source), tmp_path)
    final = next(tmp_path.glob("*.u8"))
    raw = bytearray(final.read_bytes())
    raw[where] ^= 1
    final.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{final.name}: 1 of 10 chunks are damaged; delete it"):
        dataio.DecodedCache(stream_of(source), tmp_path)


def test_a_truncated_cache_is_refused_by_name(source, tmp_path, small_chunks):
    dataio.DecodedCache(stream_of(source), tmp_path)
    final = next(tmp_path.glob("*.u8"))
    os.truncate(final, final.stat().st_size - 5)
    with pytest.raises(ValueError, match=final.name):
        dataio.DecodedCache(stream_of(source), tmp_path)


def test_a_cache_whose_checksums_are_gone_is_refused_by_name(source, tmp_path, small_chunks):
    dataio.DecodedCache(stream_of(source), tmp_path)
    next(tmp_path.glob("*.json")).unlink()
    with pytest.raises(ValueError, match=next(tmp_path.glob("*.u8")).name):
        dataio.DecodedCache(stream_of(source), tmp_path)


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_decoding(source, tmp_path, monkeypatch):
    calls = counted_decodes(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(300 * SIDE * SIDE * 3 - 1))
    with pytest.raises(OSError, match="the decoded cache needs"):
        dataio.DecodedCache(stream_of(source), tmp_path / "c")
    assert not calls
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".lock"]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def decode(data, size=SIDE, max_pixels=1_000_000):
    image = dataio.decode_image(data, size, max_pixels)
    assert image.dtype == np.uint8
    assert image.shape == (size, size, 3)
    return image


def plain(mode, colour, size=(SIDE, SIDE)):
    return Image.new(mode, size, colour)


def palette(size=(SIDE, SIDE)):
    image = Image.new("P", size, 3)
    image.putpalette([0, 0, 0] * 3 + [10, 200, 30] + [255] * 3 * 252)
    return image


def deep_grey(value, size=SIDE):
    return Image.fromarray(np.full((size, size), value, np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(plain("L", 99)), (99, 99, 99)),
        (encode(palette()), (10, 200, 30)),
        (encode(palette(), transparency=7), (10, 200, 30)),
        (encode(palette(), transparency=bytes([255, 255, 255, 9])), (10, 200, 30)),
        (encode(plain("RGB", (1, 2, 3))), (1, 2, 3)),
        (encode(plain("RGBA", (1, 2, 3, 255))), (1, 2, 3)),
        (encode(plain("LA", (77, 255))), (77, 77, 77)),
        (encode(plain("1", 1)), (255, 255, 255)),
        (encode(plain("1", 0)), (0, 0, 0)),
        (encode(deep_grey(0xABCD)), (0xAB, 0xAB, 0xAB)),
        (encode(deep_grey(0xABCD), "tiff"), (0xAB, 0xAB, 0xAB)),
        (encode(deep_grey(65535)), (255, 255, 255)),
        (encode(deep_grey(255)), (0, 0, 0)),
        (encode(plain("CMYK", (0, 0, 0, 0)), "jpeg"), (255, 255, 255)),
        (encode(plain("CMYK", (0, 255, 255, 0)), "jpeg"), (255, 0, 0)),
        (encode(plain("L", 80), "jpeg"), (80, 80, 80)),
        (encode(plain("RGB", (200, 30, 60)), "jpeg", quality=100, subsampling=0), (200, 30, 60)),
        (encode(plain("RGB", (200, 30, 60)), "webp", lossless=True), (200, 30, 60)),
        (encode(plain("RGB", (200, 30, 60)), "bmp"), (200, 30, 60)),
        (encode(plain("RGB", (200, 30, 60)), "tiff"), (200, 30, 60)),
        (encode(palette(), "gif"), (10, 200, 30)),
        (encode(plain("RGB", (200, 30, 60)), "jpeg", exif=b"Exif\0\0 no such thing"), (200, 30, 60)),
    ],
)  # fmt: skip
def test_pictures_of_every_mode_have_their_colour(data, expected):
    assert np.abs(decode(data).astype(int) - expected).max() <= 3


def test_a_square_png_of_the_right_size_is_decoded_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert (decode(encode(pixels)) == pixels).all()
    assert (decode(memoryview(encode(pixels))) == pixels).all()
    assert (decode(pa.py_buffer(encode(pixels))) == pixels).all()


def test_red_stays_red_and_blue_stays_blue():
    assert tuple(decode(encode(plain("RGB", (255, 0, 0))))[0, 0]) == (255, 0, 0)
    assert tuple(decode(encode(plain("RGB", (0, 0, 255))))[0, 0]) == (0, 0, 255)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))],
)
def test_a_camera_held_sideways_is_turned_upright(kind, orientation, corner):
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:8, :8] = 255  # white at the upper left of what is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(pixels, kind, exif=exif)).astype(int)
    bright = {(y, x): image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for y in (0, 1) for x in (0, 1)}
    assert max(bright, key=bright.get) == corner
    assert bright[corner] > 220


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animated_picture_gives_its_first_frame(kind):
    frames = [plain("RGB", colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=10, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decode(data).astype(int) - (250, 0, 0)).max() <= 3


def test_a_picture_of_one_pixel_fills_the_square():
    assert (decode(encode(plain("RGB", (9, 8, 7), (1, 1)))) == (9, 8, 7)).all()


def test_a_large_picture_is_averaged_down_and_not_sampled():
    checks = np.indices((8 * SIDE, 8 * SIDE)).sum(0) % 2 * 255
    assert np.abs(decode(encode(checks.astype(np.uint8))).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_that_is_not_square_loses_the_ends_of_its_longer_side(turned):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:40], pixels[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = decode(encode(pixels.transpose(1, 0, 2) if turned else pixels))
    assert (image[2:-2, 2:-2] == (0, 255, 0)).all()
    assert (image[..., 1] > 150).all()


def test_a_picture_20000_pixels_wide_is_decoded_or_refused_by_its_area():
    wide = encode(plain("RGB", (5, 6, 7), (20_000, 3)))
    assert (decode(wide) == (5, 6, 7)).all()
    with pytest.raises(ValueError, match=r"20000 x 3 pixels are more than data.max_image_pixels=59999"):
        decode(wide, max_pixels=59_999)
    decode(wide, max_pixels=60_000)


@pytest.mark.parametrize("kind", ["png", "gif", "tiff", "bmp", "jpeg", "webp"])
def test_a_bomb_is_refused_before_it_is_unpacked(kind, monkeypatch):
    data = encode(plain("L" if kind != "webp" else "RGB", 0, (3000, 3000)), kind)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match="3000 x 3000 pixels are more than"):
        decode(data)


def test_a_bomb_of_billions_of_pixels_in_a_few_bytes_is_refused():
    data = bytearray(encode(plain("L", 0)))
    data[16:24] = (60_000).to_bytes(4) * 2  # width and height in IHDR
    data[29:33] = dataio.zlib.crc32(data[12:29]).to_bytes(4)
    for max_pixels in (1_000_000, 10**12):  # Pillow's own limit holds too
        with pytest.raises(ValueError, match=r"60000 x 60000|[Bb]omb|3600000000"):
            decode(bytes(data), max_pixels=max_pixels)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff"])
def test_truncated_pictures_are_refused(kind):
    data = encode(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    decode(data)
    for share in (0.0, 0.01, 0.1, 0.5):
        with pytest.raises(ValueError, match=r".+"):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"hello, I am text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        BROKEN,
        b"GIF89a",
        b"P6 1 1 255 abc",
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(data):
    with pytest.raises(ValueError, match=r"\w+"):
        decode(data)


def test_every_flipped_bit_of_a_small_png_gives_a_picture_or_a_refusal():
    whole, refused = encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        try:
            decode(bytes(data))
        except ValueError:
            refused += 1
    assert refused > len(whole) // 2  # PNG has checksums


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            del data[place : place + rng.randrange(1, 20)]
        elif len(data) > 2 and rng.random() < 0.2:
            del data[place:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_three_hundred_mutated_pictures_give_pixels_or_a_value_error():
    pixels, rng = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8), random.Random(11)
    exif = Image.Exif()
    exif[0x0112] = 6
    valid = [
        encode(pixels), encode(pixels, "jpeg"), encode(pixels, "jpeg", exif=exif), encode(pixels, "png", exif=exif),
        encode(pixels, "webp"),
        encode(palette(), "gif"), encode(palette(), "png", transparency=b"\1\2\3"), encode(deep_grey(9)), encode(pixels, "tiff"),
        encode(pixels, "tiff", compression="tiff_lzw"), encode(pixels, "bmp"), encode(plain("CMYK", 0), "jpeg"),
    ]  # fmt: skip
    outcomes = Counter()
    for n in range(300):
        try:
            decode(mutated(valid[n % len(valid)], rng))
            outcomes["picture"] += 1
        except ValueError as error:
            outcomes["refused" if str(error) else "refused without a reason"] += 1
    assert outcomes.keys() == {"picture", "refused"}
    assert min(outcomes.values()) > 30


# ---------------------------------------------------------------------------------------------------------------------
# Curriculum
# ---------------------------------------------------------------------------------------------------------------------


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
    drawn = without_hanging(lambda: numbers(mix.batches(0, schedule.total_steps)))
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
    whole = without_hanging(lambda: numbers(dataio.CurriculumMixStream(*two_sources, 0, schedule).batches(0, schedule.total_steps)))
    epochs = [
        without_hanging(lambda e=e: list(map(number_of, dataio.CurriculumMixStream(*two_sources, e, schedule)))) for e in range(4)
    ]
    assert list(itertools.chain(*epochs)) == whole
    assert len(epochs[0]) == 7 * 16


def test_a_mix_of_one_source_is_that_source(two_sources):
    schedule = dataio.Schedule(None, (90,), 16, 1)
    assert without_hanging(
        lambda: numbers(dataio.CurriculumMixStream(two_sources[0], None, 0, schedule).batches())
    ) == drawn_numbers(two_sources[0], 16, 0, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Materialised shards
# ---------------------------------------------------------------------------------------------------------------------


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
    assert max(sizes) - min(sizes) <= 1


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


def test_a_crash_while_dealing_leaves_nothing_and_the_next_call_ends_well(job, monkeypatch):
    args, splits = job
    original = dataio.read_rows

    def stops(*arguments):
        yield from itertools.islice(original(*arguments), 7)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataio, "read_rows", stops)
        with pytest.raises(KeyboardInterrupt):
            dataio.materialize_split(*args, "train")
    assert not args[2].exists()
    assert in_order(rows_of(dataio.materialize_split(*args, "train"))) == expected_rows(splits, "train")
    assert sorted(p.name for p in args[2].parent.iterdir()) == [".digiface.lock", "digiface"]


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_crash_while_writing_shards_keeps_the_finished_ones(job, tmp_path, monkeypatch, side):
    args, _ = job
    whole = [p.read_bytes() for p in dataio.materialize_split(args[0], args[1], tmp_path / "other/digiface", side)]
    original, written, lock = dataio.write_shard, [], threading.Lock()

    def stops(path, *rest):
        with lock:  # several are written at a time
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

    def full(path, tables, note):
        next(iter(tables))  # the reading has begun
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataio, "write_shard", full)
    with pytest.raises(OSError, match="No space") as error:
        dataio.materialize_split(*args, side)
    assert not [thread for thread in threading.enumerate() if "Pool" in thread.name], error


def test_an_error_of_the_disk_while_a_shard_is_still_written_names_it_and_leaves_nothing(tmp_path, monkeypatch):
    told, table = threading.Event(), pa.table([["a"], ["a/0.png"], [b"picture"]], dataio.SHARD_SCHEMA)

    def broken(descriptor):
        if not told.is_set():  # as Linux does, which tells of an error once
            told.set()
            raise OSError(errno.EIO, "Input/output error")

    def tables():
        yield table
        assert told.wait(10)
        yield table

    monkeypatch.setattr(os, "fdatasync", broken, raising=False)
    with pytest.raises(OSError, match=r"/faces_00000\.parquet"):
        dataio.write_shard(tmp_path / "out" / "faces_00000.parquet", tables(), {})
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("side", ["train", "test"])
def test_after_an_error_in_one_run_of_shards_the_others_begin_no_more(job, monkeypatch, side):
    args, _ = job
    original, begun, all_at_work = dataio.write_shard, [], threading.Barrier(dataio.WRITERS)

    def stops(path, tables, note):
        begun.append(path.name)
        all_at_work.wait(10)
        if path.name.endswith("_00000.parquet"):
            raise OSError(28, "No space left on device")
        time.sleep(0.2)  # the error reaches the caller
        original(path, tables, note)

    monkeypatch.setattr(dataio, "write_shard", stops)
    with pytest.raises(OSError, match="No space"):
        dataio.materialize_split(*args, side)
    assert len(begun) == dataio.WRITERS
    assert len(list(args[2].parent.glob(".digiface.part/digiface_*.parquet"))) == dataio.WRITERS - 1


def test_a_file_of_one_row_group_is_not_read_again_for_each_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "SHARD_BYTES", 5_000)
    monkeypatch.setattr(dataio, "ROW_GROUP_ROWS", 20)
    write_rows(tmp_path / "a.parquet", numbered_rows(np.repeat(PEOPLE, 20).tolist()), group=10**6)
    split(PEOPLE, tmp_path)
    read, original = [], dataio.open_indexed

    def counted(index, number):
        parquet = original(index, number)
        batches = parquet.iter_batches
        monkeypatch.setattr(parquet, "iter_batches", lambda *a, **k: (read.append(len(b)) or b for b in batches(*a, **k)))
        return parquet

    monkeypatch.setattr(dataio, "open_indexed", counted)
    shards = dataio.materialize_split(str(tmp_path / "a.parquet"), tmp_path / "splits.parquet", tmp_path / "out", "test")
    assert len(shards) > 2 * dataio.WRITERS
    assert 1 < sum(read) / (20 * len(PEOPLE)) < 1.75  # the first of two runs ends with its last row, the second begins at the top


def test_what_is_made_in_the_background_comes_in_order_and_no_further_ahead_than_asked():
    made, threads = [], threading.active_count()

    def items():
        for i in range(20):
            made.append(i)
            yield i
        raise ValueError("the end is broken")

    some = dataio.in_background(items(), 3)
    for i in range(10):
        assert next(some) == i
        assert len(made) <= i + 1 + 3
    some.close()
    assert threading.active_count() == threads
    assert len(made) < 20
    with pytest.raises(ValueError, match="the end is broken"):
        list(dataio.in_background(items(), 3))
    assert made[-20:] == list(range(20))
    assert threading.active_count() == threads


def test_a_crash_while_the_buckets_are_removed_is_survived(job, monkeypatch):
    args, splits = job
    original = shutil.rmtree

    def killed(folder, *rest, **options):
        if Path(folder).name == "buckets":
            next(iter(sorted(Path(folder).iterdir()))).unlink()
            raise KeyboardInterrupt
        original(folder, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            dataio.materialize_split(*args, "train")
    assert in_order(rows_of(dataio.materialize_split(*args, "train"))) == expected_rows(splits, "train")


def test_files_of_the_user_in_the_output_folder_are_not_deleted(job):
    args, _ = job
    args[2].mkdir(parents=True)
    (args[2] / "thesis.txt").write_text("three years")
    with suppress(ValueError, OSError):  # refused, or written beside it
        dataio.materialize_split(*args, "train")
    assert (args[2] / "thesis.txt").exists()


def test_a_cache_remembers_its_broken_pictures(tmp_path):
    path = broken_source(tmp_path, range(30), count=100)
    dataio.DecodedCache(stream_of(path, max_bad_fraction=0.5), tmp_path / "cache")
    again = dataio.DecodedCache(stream_of(path, max_bad_fraction=0.3), tmp_path / "cache")
    assert {row for _, row in again.bad.found} == set(range(30))
    with pytest.raises(ValueError, match=r"30 of 100 images are broken|more than data.max_bad_fraction=0.29"):
        dataio.DecodedCache(stream_of(path, max_bad_fraction=0.29), tmp_path / "cache")


def test_a_source_of_which_nothing_can_be_decoded_ends_at_once(tmp_path, monkeypatch):
    path, tried, decode = broken_source(tmp_path, range(5000), count=5000), [], dataio.decode_image
    monkeypatch.setattr(dataio, "decode_image", lambda *args: tried.append(1) or decode(*args))
    with pytest.raises(ValueError, match="51 of 5000 images are broken"):
        next(load_batches([stream_of(path, max_bad_fraction=0.01)], by_steps(16), 0, 4, workers=1))
    assert len(tried) < 200  # what was in the threads' queues


def test_a_disk_without_room_is_refused_and_leaves_nothing(job, monkeypatch):
    args, _ = job
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(20_000))
    with pytest.raises(OSError, match="materialising 225 train images needs"):
        dataio.materialize_split(*args, "train")
    assert [p.name for p in args[2].parent.iterdir()] == [".digiface.lock"]


def test_a_bucket_that_lost_rows_is_refused(job, monkeypatch):
    args, _ = job
    scatter = dataio.scatter_rows

    def scatter_and_cut(index, columns, shard_of, folder, bar):
        scatter(index, columns, shard_of, folder, bar)
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
        other = multiprocessing.get_context("spawn").Process(target=dataio.materialize_split, args=(*args, "train"))
        other.start()
        other.join(5)
        assert other.is_alive()
        assert not args[2].exists()
    other.join(60)
    assert other.exitcode == 0
    assert in_order(rows_of(sorted(args[2].glob("*.parquet")))) == expected_rows(splits, "train")


def test_a_side_that_does_not_exist_is_refused_by_name(job):
    with pytest.raises(ValueError, match="validation"):
        dataio.materialize_split(*job[0], "validation")


def test_shards_of_a_source_in_ten_thousand_pieces_are_read_back_whole():
    tables = [
        pa.table(
            {"identity_id": ["a"] * n, "image_filename": [str(i) for i in range(n)], "image_bytes": [b"x"] * n},
            schema=dataio.SHARD_SCHEMA,
        )
        for n in (3, 1, 7, 5)
    ]
    runs = [pa.concat_tables(run) for run in map(list, dataio.cut(tables, [4, 2, 0, 10])) if run]
    assert [len(run) for run in runs] == [4, 2, 10]
    assert pa.concat_tables(runs).equals(pa.concat_tables(tables))


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------

OPS = [field.name for field in dataclasses.fields(dataio.AugmentConfig) if field.type is dataio.Op or field.type == "Op"]
EVERY_OP = {
    "zoom": (1.0, 1.3), "aspect": (0.9, 1.1), "shift_x": (-0.1, 0.1), "shift_y": (-0.1, 0.1), "rotate": (-20, 20),
    "shear_x": (-0.1, 0.1), "shear_y": (-0.1, 0.1),
    "warp": (0.05, 0.1), "brightness": (0.5, 1.5), "contrast": (0.5, 1.5), "saturation": (0.0, 2.0), "hue": (-0.1, 0.1),
    "grey": (1, 1), "low_resolution": (0.2, 0.9),
    "blur": (0.5, 2.0), "sharpness": (0.5, 1.9), "posterise": (3, 8), "solarise": (0.4, 1.0), "autocontrast": (1, 1),
    "equalise": (1, 1), "noise": (0.05, 0.1),
    "erase": (0.05, 0.2),
}  # fmt: skip


def recipe(pick=0, flip=0.0, p=1.0, **ops):
    """A recipe in which only the operations named apply, each as (low, high) or as one value."""
    values = {name: dataio.Op(0.0, 0.0, 0.0) for name in OPS}
    for name, limits in ops.items():
        low, high = limits if isinstance(limits, tuple) else (limits, limits)
        values[name] = dataio.Op(p, float(low), float(high))
    return dataio.AugmentConfig(name="test", pick=pick, flip=flip, **values)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def view(images, seed=0, **options):
    return dataio.augment(images, recipe(**options), generator(seed))


@pytest.fixture(scope="module")
def portraits(faces):
    """Eight demo faces as uint8 [8, 3, 112, 112]."""
    rows = pq.read_table(faces / "digi2real_000.parquet")["image_bytes"].to_pylist()[::9][:8]
    return torch.stack([torch.from_numpy(dataio.decode_image(data, 112, 10**6).copy()).permute(2, 0, 1) for data in rows])


def to_bytes(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def levels_apart(x, reference):
    return (to_bytes(x).int() - reference.int()).abs()


def test_every_operation_of_the_recipe_is_tried_here():
    assert sorted(OPS) == sorted(EVERY_OP)


@pytest.mark.parametrize("size", [16, 17, 64, 112])
def test_views_keep_shape_and_range_with_everything_on(size):
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=generator())
    x = view(images, flip=0.5, **EVERY_OP)
    assert x.shape == images.shape
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert x.min() >= -1
    assert x.max() <= 1


def test_the_input_is_not_changed_and_layout_does_not_matter(portraits):
    before = portraits.clone()
    x = view(portraits, flip=0.5, **EVERY_OP)
    assert torch.equal(portraits, before)
    last = view(portraits.to(memory_format=torch.channels_last), flip=0.5, **EVERY_OP)
    assert torch.allclose(x, last, atol=1e-4)


def test_views_are_a_function_of_the_generator(portraits):
    assert torch.equal(view(portraits, 5, flip=0.5, **EVERY_OP), view(portraits, 5, flip=0.5, **EVERY_OP))
    assert not torch.equal(view(portraits, 5, flip=0.5, **EVERY_OP), view(portraits, 6, flip=0.5, **EVERY_OP))


def test_two_views_of_a_picture_are_drawn_apart(portraits):
    one, other = dataio.two_views(portraits, recipe(flip=0.5, **EVERY_OP), generator())
    assert ((one - other).abs().mean(dim=(1, 2, 3)) > 0.01).all()


def test_each_row_of_both_views_is_of_the_picture_of_that_row():
    shades = (torch.arange(64, dtype=torch.uint8) * 4).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    options = recipe(p=0.5, flip=0.5, **{op: EVERY_OP[op] for op in ("low_resolution", "blur", "rotate", "warp")})
    for one in dataio.two_views(shades, options, generator()):
        assert torch.equal(to_bytes(one), shades)


@pytest.mark.parametrize("op", [name for name in OPS if EVERY_OP[name][0] != EVERY_OP[name][1]])
def test_each_image_has_its_own_draw_of_each_operation(portraits, op):
    same = portraits[:1].expand(12, -1, -1, -1)
    x = view(same, **{op: EVERY_OP[op]})
    distinct = {tuple(to_bytes(one).flatten().tolist()) for one in x}
    assert len(distinct) >= (3 if op in ("posterise", "low_resolution") else 12)


@pytest.mark.parametrize("op", OPS)
def test_each_operation_applies_to_the_share_of_images_that_p_says(op):
    strengths = dataio.draw_strengths(recipe(p=0.3, **{op: EVERY_OP[op]}), 4000, generator())
    neutral = dataio.NEUTRAL.get(op, 0.0)
    assert (strengths[op] != neutral).float().mean() == pytest.approx(0.3, abs=0.03)
    applied = strengths[op][strengths[op] != neutral]
    assert EVERY_OP[op][0] - 1e-6 <= applied.min() <= applied.max() <= EVERY_OP[op][1] + 1e-6
    assert applied.mean() == pytest.approx(sum(EVERY_OP[op]) / 2, abs=0.05 * max(1, EVERY_OP[op][1]))
    assert all((strengths[other] == dataio.NEUTRAL.get(other, 0.0)).all() for other in OPS if other != op)


@pytest.mark.parametrize("size", [16, 64, 112])
def test_with_every_p_at_0_the_view_is_the_picture_itself(size):
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator())
    assert (view(images) - dataio.to_float(images)).abs().max() < 3e-5  # 0.004 grey levels: the resampling's rounding
    assert torch.equal(to_bytes(view(images)), images)


def test_pixels_cross_to_minus_one_and_one():
    x = dataio.to_float(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert torch.allclose(x, torch.tensor([-1, 1, -0.6]))


def test_the_flip_is_an_exact_mirror_of_half_of_the_images(portraits):
    assert torch.equal(to_bytes(view(portraits, flip=1.0)), portraits.flip(3))
    x = to_bytes(view(portraits[:1].expand(200, -1, -1, -1), flip=0.5))
    mirrored = (x == portraits[:1].flip(3)).flatten(1).all(1)
    plain = (x == portraits[:1]).flatten(1).all(1)
    assert (mirrored | plain).all()
    assert 70 < mirrored.sum() < 130


# A picture whose red is x and whose green is y tells where each pixel of the view was taken from.
RAMP_PX = 128


def places_seen(**options) -> torch.Tensor:
    """Where each pixel of a view lies in the picture: [S, S, 2] as (x, y) in [-1, 1]; and a mask of what lies inside."""
    ramp = torch.arange(RAMP_PX, dtype=torch.uint8) * 2
    picture = torch.stack(
        [ramp.expand(RAMP_PX, -1), ramp[:, None].expand(-1, RAMP_PX), torch.zeros(RAMP_PX, RAMP_PX, dtype=torch.uint8)]
    )
    x = view(picture[None], **options)[0, :2]
    return ((x + 1) * 127.5 + 1).permute(1, 2, 0) / RAMP_PX - 1


def axes():
    axis = (torch.arange(RAMP_PX) * 2 + 1) / RAMP_PX - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


TURN = math.radians(30)
GEOMETRY = {
    "shift_x": (0.25, lambda x, y: (x + 0.5, y)), "shift_y": (-0.1, lambda x, y: (x, y - 0.2)),
    "zoom": (2.0, lambda x, y: (x / 2, y / 2)),
    "aspect": (1.21, lambda x, y: (x / 1.1, y * 1.1)), "shear_x": (0.2, lambda x, y: (x + 0.2 * y, y)),
    "shear_y": (0.2, lambda x, y: (x, y + 0.2 * x)),
    "rotate": (30.0, lambda x, y: (x * math.cos(TURN) - y * math.sin(TURN), x * math.sin(TURN) + y * math.cos(TURN))),
}  # fmt: skip


@pytest.mark.parametrize("op", GEOMETRY)
def test_geometry_alone_takes_each_pixel_from_where_it_should(op):
    strength, function = GEOMETRY[op]
    seen, wanted = places_seen(**{op: strength}), torch.stack(function(*axes()), dim=2)
    inside = (wanted.abs() < 1 - 1 / RAMP_PX).all(dim=2)
    assert inside.float().mean() > 0.5
    assert (seen - wanted)[inside].abs().max() < 1e-3


def test_a_shift_by_whole_pixels_moves_the_picture_and_mirrors_the_rest(portraits):
    x = to_bytes(view(portraits, shift_x=0.25))
    assert torch.equal(x[..., :84], portraits[..., 28:])
    assert torch.equal(x[..., 84:], portraits[..., 84:].flip(3))


def test_a_quarter_turn_is_exact(portraits):
    assert torch.equal(to_bytes(view(portraits, rotate=90.0)), torch.rot90(portraits, 1, (2, 3)))
    assert torch.equal(to_bytes(view(portraits, rotate=180.0)), portraits.flip(2, 3))


def test_flip_and_shift_together_mirror_what_the_shift_shows(portraits):
    both = to_bytes(view(portraits, flip=1.0, shift_x=0.25))
    assert torch.equal(both, to_bytes(view(portraits, shift_x=0.25)).flip(3))


def test_a_warp_moves_the_corners_by_up_to_its_share_and_leaves_straight_lines_between_them():
    x, y = axes()
    for seed in range(10):
        seen = places_seen(seed=seed, warp=0.1, zoom=1.5)
        moved = seen - torch.stack([x, y], 2) / 1.5
        corners = moved[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert 0.01 < corners.abs().max() < 0.2 + 1e-3
        assert (seen[0, 1:-1] * 2 - seen[0, :-2] - seen[0, 2:]).abs().max() < 1e-3  # straight along the upper edge
        centre = moved[63:65, 63:65].mean(dim=(0, 1))
        assert (centre - corners.mean(0)).abs().max() < 2e-3


def test_corners_of_the_map_are_where_they_were_sent():
    neutral = dataio.draw_strengths(recipe(), 1, generator())
    corners = torch.tensor([[[0.1, -0.2, 0.05, 0.3], [0.0, 0.1, -0.1, 0.2]]])
    maps = dataio.geometry(neutral, corners)[0]
    for number, (x, y) in enumerate([(-1, -1), (1, -1), (-1, 1), (1, 1)]):
        assert torch.allclose(maps @ torch.tensor([1.0, x, y, x * y]), torch.tensor([x, y]) + corners[0, :, number], atol=1e-6)


def colours(**options):
    """The colour map [3, 4] of one image with the operations given."""
    return dataio.colour_matrix(dataio.draw_strengths(recipe(**options), 1, generator()))[0]


IDENTITY = torch.eye(3, 4)


@pytest.mark.parametrize("options", [{}, {"brightness": 1.0}, {"contrast": 1.0}, {"saturation": 1.0}, {"hue": 0.0}, {"hue": 1.0}])
def test_neutral_colour_is_the_identity(options):
    assert torch.allclose(colours(**options), IDENTITY, atol=1e-6)


def test_colour_operations_do_what_their_names_say():
    red = torch.tensor([1.0, -1, -1, 1])
    assert torch.allclose(
        colours(brightness=0.5) @ torch.tensor([1.0, -1, 0, 1]), torch.tensor([0.0, -1, -0.5])
    )  # on [0, 1]: 1, 0, 0.5 halved
    assert torch.allclose(colours(contrast=0.5) @ torch.tensor([1.0, -1, 0, 1]), torch.tensor([0.5, -0.5, 0.0]))  # towards mid-grey
    assert torch.allclose(colours(saturation=0.0) @ red, torch.full((3,), 2 * 0.299 - 1), atol=1e-6)
    assert torch.allclose(colours(hue=1 / 3) @ red, torch.tensor([-1.0, 1, -1]), atol=1e-6)  # red to green
    assert torch.allclose(colours(hue=-1 / 3) @ red, torch.tensor([-1.0, -1, 1]), atol=1e-6)
    both = colours(hue=0.1)[:, :3] @ colours(hue=-0.1)[:, :3]
    assert torch.allclose(both, torch.eye(3), atol=1e-6)


@pytest.mark.parametrize(("op", "reference"), [("brightness", TV.adjust_brightness), ("saturation", TV.adjust_saturation)])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.6])
def test_brightness_and_saturation_agree_with_torchvision(portraits, op, reference, factor):
    assert levels_apart(view(portraits, **{op: factor}), reference(portraits, factor)).max() <= 1


def test_grey_gives_equal_channels_with_the_usual_weights(portraits):
    x = view(portraits, grey=1.0)
    assert torch.allclose(x[:, 0], x[:, 1], atol=1e-5)
    assert torch.allclose(x[:, 0], x[:, 2], atol=1e-5)
    assert levels_apart(x, TV.rgb_to_grayscale(portraits, 3)).max() <= 1
    x = view(portraits, grey=1.0, saturation=2.0, hue=0.1)
    assert torch.allclose(x[:, 0], x[:, 2], atol=1e-5)


def test_pick_applies_at_most_n_operations_and_all_alike_often():
    limits = {name: (low + 0.01, high + 0.011) for name, (low, high) in EVERY_OP.items()}
    count, n = 6000, 4
    strengths = dataio.draw_strengths(recipe(pick=n, **limits), count, generator())
    applies = torch.stack([strengths[name] != dataio.NEUTRAL.get(name, 0.0) for name in OPS])
    each = applies.sum(0)
    assert each.max() == n
    assert set(each.tolist()) == {n, n - 1}  # doing nothing is one of them
    assert (each == n - 1).float().mean() == pytest.approx(n / 23, abs=0.02)
    assert applies.float().mean(1).tolist() == pytest.approx([n / 23] * 22, abs=0.02)


def test_pick_never_applies_an_operation_whose_p_is_0():
    few = {name: EVERY_OP[name] for name in ("blur", "noise", "erase")}
    for pick in (1, 2, 3, 4, 5, 20):
        strengths = dataio.draw_strengths(recipe(pick=pick, **few), 500, generator())
        assert all((strengths[name] == dataio.NEUTRAL.get(name, 0.0)).all() for name in OPS if name not in few)
        applied = sum((strengths[name] != 0).int() for name in few)
        assert applied.max() == min(pick, 3)
        assert applied.min() == min(pick - 1, 3)


def test_pick_of_more_operations_than_there_are_applies_them_all():
    strengths = dataio.draw_strengths(recipe(pick=30, blur=(1, 2)), 10, generator())
    assert (strengths["blur"] != 0).all()


def all_levels():
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterise_agrees_with_torchvision_on_every_level(bits):
    assert levels_apart(view(all_levels(), posterise=bits), TV.posterize(all_levels(), bits)).max() == 0


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_solarise_agrees_with_torchvision(portraits, threshold):
    assert levels_apart(view(portraits, solarise=threshold), TV.solarize(portraits, threshold * 255)).max() <= 1


def test_autocontrast_agrees_with_torchvision(portraits):
    pale = (portraits.float() * 0.4 + 60).to(torch.uint8)
    assert levels_apart(view(pale, autocontrast=1), TV.autocontrast(pale)).max() <= 1
    plain = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, autocontrast=1)), plain)


def test_equalise_agrees_with_torchvision_on_pictures_of_many_levels(portraits):
    apart = levels_apart(view(portraits, equalise=1), TV.equalize(portraits))
    assert apart.float().mean() < 4


def test_equalise_keeps_a_black_border_black_and_a_plain_picture_as_it_is(portraits):
    half = portraits.clone()
    half[..., :56] = 0
    assert levels_apart(view(half, equalise=1), TV.equalize(half)).float().mean() < 4
    plain = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, equalise=1)), plain)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.8])
def test_sharpness_agrees_with_torchvision_inside_the_border(portraits, factor):
    ours, reference = view(portraits, sharpness=factor), TV.adjust_sharpness(portraits, factor)
    assert levels_apart(ours, reference)[..., 1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.8])
def test_blur_agrees_with_torchvision(portraits, sigma):
    assert levels_apart(view(portraits, blur=sigma), TV.gaussian_blur(portraits, [13, 13], [sigma, sigma])).max() <= 1


def test_low_resolution_keeps_plain_areas_and_takes_detail(portraits):
    plain = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, low_resolution=0.25)), plain)
    fine = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).expand(1, 3, 64, 64)
    assert view(fine, low_resolution=0.25).abs().max() < 0.2
    assert torch.equal(to_bytes(view(portraits, low_resolution=1.0)), portraits)
    detail = [(view(portraits, low_resolution=side) - dataio.to_float(portraits)).abs().mean() for side in (0.25, 0.5, 0.75)]
    assert detail[0] > detail[1] > detail[2] > 0.001


@pytest.mark.parametrize("side", [0.3, 0.47, 0.9])
def test_low_resolution_is_what_interpolation_to_whole_pixels_and_back_gives(portraits, side):
    small = F.interpolate(dataio.to_float(portraits), (round(112 * side),) * 2, mode="bilinear", antialias=True)
    wanted = F.interpolate(small, (112, 112), mode="bilinear")
    assert torch.allclose(view(portraits, low_resolution=side), wanted, atol=1e-4)


def test_softening_is_low_resolution_and_then_blur_for_those_images_that_have_them(portraits):
    x, none = dataio.to_float(portraits), torch.zeros(8)
    side, sigma = torch.tensor([0, 0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), torch.tensor([0, 1.5, 0, 1.2, 0, 0.8, 2.0, 0])
    both = dataio.soften(x, side, sigma)
    assert torch.equal(both[0], x[0])
    assert torch.allclose(both, dataio.soften(dataio.soften(x, side, none), none, sigma), atol=1e-5)
    assert not torch.allclose(both, dataio.soften(dataio.soften(x, none, sigma), side, none), atol=1e-3)


@pytest.mark.parametrize("size", [16, 17, 64, 112])
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.8, 2.5])
def test_the_bands_of_softening_leave_nothing_out(size, sigma, monkeypatch):
    x, sides = torch.rand(5, 3, size, size, generator=generator()), [0.1, 0.2, 0.33, 0.6, 0.95] + [0.0] * (sigma > 0)
    strengths = [(torch.tensor([side, *sides[:4]]), torch.tensor([sigma, 0, 0, sigma, 0])) for side in sides]
    strengths += [(torch.full((5,), side), torch.full((5,), sigma)) for side in sides]
    in_bands = [dataio.soften(x, *each) for each in strengths]
    monkeypatch.setattr(dataio, "banded_product", lambda maps, x, _: maps @ x)
    for each, found in zip(strengths, in_bands, strict=True):
        assert torch.allclose(found, dataio.soften(x, *each), atol=1e-6)


def test_what_lies_outside_of_the_picture_is_mirrored(portraits):
    maps = torch.zeros(8, 2, 4)
    maps[:, 0, 1] = maps[:, 1, 2] = 1.3  # x and y of the view, a third wider than the picture
    maps[:, :, 0] = torch.linspace(-1.6, 1.6, 16).view(8, 2)
    axis = (torch.arange(112) * 2 + 1) / 112 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = 1.3 * torch.stack([x, y], dim=-1) + maps[:, None, None, :, 0]
    wanted = F.grid_sample(dataio.to_float(portraits), grid, padding_mode="reflection", align_corners=False)
    for far in (False, True):
        assert torch.allclose(dataio.resample(dataio.to_float(portraits), maps, far), wanted, atol=1e-4)


@pytest.mark.parametrize("strength", [{"zoom": 0.2}, {"shift_x": 1.3}, {"zoom": 0.4, "shift_y": -0.9}])
def test_a_view_far_outside_of_the_picture_is_mirrored_again(portraits, strength):
    maps = torch.zeros(8, 2, 4)
    maps[:, 0, 1] = maps[:, 1, 2] = 1 / strength.get("zoom", 1)
    maps[:, :, 0] = 2 * torch.tensor([strength.get("shift_x", 0), strength.get("shift_y", 0)])
    wanted = dataio.resample(dataio.to_float(portraits), maps, far=True)
    assert torch.allclose(view(portraits, **strength), wanted, atol=1e-4)
    assert not torch.allclose(dataio.resample(dataio.to_float(portraits), maps, far=False), wanted, atol=0.1)


def test_views_do_not_depend_on_how_many_are_made_at_once(portraits, monkeypatch):
    pictures, found, parts, original = portraits.repeat(20, 1, 1, 1), [], [], dataio.resample
    monkeypatch.setattr(dataio, "resample", lambda images, *rest: parts.append(len(images)) or original(images, *rest))
    for threads in (1, 2, 100):  # 12, 24 and all at once of those that are softened alike
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        parts.clear()
        found.append((view(pictures, p=0.5, flip=0.5, **EVERY_OP), max(parts)))
    assert [most for _, most in found[:2]] == [12, 24]
    assert found[2][1] > 24
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[1][0], found[2][0])


def test_noise_has_the_spread_that_was_asked_for():
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    x = view(grey, noise=0.1)
    assert x.flatten(1).std(1).tolist() == pytest.approx([0.1] * 4, rel=0.05)
    assert not torch.equal(x[0], x[1])


@pytest.mark.parametrize("area", [0.05, 0.15])
def test_erasing_paints_one_rectangle_of_one_colour_and_about_the_area_asked_for(area):
    grey = torch.full((300, 3, 64, 64), 128, dtype=torch.uint8)
    x = view(grey, erase=area)
    painted = (x - dataio.to_float(grey)).abs().amax(1) > 1e-3  # [300, 64, 64]
    share = painted.float().mean(dim=(1, 2))
    assert share.max() < 1.15 * area
    assert 0.75 * area < share.mean() < 1.02 * area  # some hang over the border
    assert (share > 0).float().mean() > 0.98
    for one, mask in zip(x[:50], painted[:50], strict=True):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        assert (one[:, mask].std(dim=1) < 1e-5).all()
    some = view(grey[:40], p=0.5, erase=area)
    untouched = (some == dataio.to_float(grey[:40])).flatten(1).all(1)
    assert 8 < untouched.sum() < 32
    colours_seen = {tuple(one[:, mask][:, 0].tolist()) for one, mask in zip(x, painted, strict=True) if mask.any()}
    assert len(colours_seen) > 250


# ---------------------------------------------------------------------------------------------------------------------
# Demo faces
# ---------------------------------------------------------------------------------------------------------------------


def test_a_demo_face_is_a_function_of_its_arguments():
    one = np.array(dataio.draw_face(7, 2, "digiface", seed=3, size=48))
    assert one.shape == (48, 48, 3)
    assert (one == np.array(dataio.draw_face(7, 2, "digiface", seed=3, size=48))).all()
    for other in ((8, 2, "digiface", 3), (7, 3, "digiface", 3), (7, 2, "digi2real", 3), (7, 2, "digiface", 4)):
        assert np.abs(one.astype(int) - np.array(dataio.draw_face(*other, size=48))).mean() > 2


def test_a_demo_person_is_the_same_in_both_styles_and_in_every_picture(faces):
    rows = pa.concat_tables(pq.read_table(faces / name) for name in ("digiface1m_000.parquet", "digi2real_000.parquet")).to_pylist()
    images = (
        np.stack([dataio.decode_image(row["image_bytes"], 16, 10**6) for row in rows]).reshape(len(rows), -1).astype(np.float32)
    )
    images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)
    people, similar = np.array([row["identity_id"] for row in rows]), images @ images.T / images.shape[1]
    genuine = (people[:, None] == people[None]) & ~np.eye(len(rows), dtype=bool)
    across = genuine.copy()
    across[:216, :216] = across[216:, 216:] = False
    impostor = people[:, None] != people[None]
    assert similar[genuine].mean() > similar[impostor].mean() + 0.1
    assert similar[across].mean() > similar[impostor].mean() + 0.05


def test_the_demo_sources_hold_the_people_that_are_documented(faces):
    a, b = (pq.read_table(faces / name) for name in ("digiface1m_000.parquet", "digi2real_000.parquet"))
    assert Counter(a["identity_id"].to_pylist()) == {str(i): 6 for i in range(36)}
    assert Counter(b["identity_id"].to_pylist()) == {str(i): 4 for i in range(18, 40)}
    assert a["image_filename"].to_pylist()[:7] == ["0/0.png", "0/1.png", "0/2.png", "0/3.png", "0/4.png", "0/5.png", "1/0.png"]
    assert b["image_filename"].to_pylist()[0] == "18/0.jpg"
    formats = [{Image.open(io.BytesIO(data)).format for data in table["image_bytes"].to_pylist()} for table in (a, b)]
    assert formats == [{"PNG"}, {"JPEG"}]
    assert Image.open(io.BytesIO(a["image_bytes"][0].as_py())).size == (112, 112)
    assert dataio.collect_unique_identities(str(faces / "*.parquet")) == sorted(map(str, range(40)))


def test_a_demo_picture_does_not_depend_on_how_many_are_drawn(faces, tmp_path):
    dataio.write_demo_faces(tmp_path, identities=10, images_digiface=2, images_digi2real=1, size=112, seed=1)
    for name, few in (("digiface1m_000.parquet", 18), ("digi2real_000.parquet", 6)):
        rows = {(row["image_filename"]): row["image_bytes"] for row in pq.read_table(faces / name).to_pylist()}
        drawn = {row["image_filename"]: row["image_bytes"] for row in pq.read_table(tmp_path / name).to_pylist()}
        both = rows.keys() & drawn.keys()
        assert len(drawn) == few
        assert all(rows[key] == drawn[key] for key in both)
        if name.startswith("digiface"):
            assert len(both) == few


def test_another_seed_draws_other_people(faces, tmp_path):
    dataio.write_demo_faces(tmp_path, identities=10, images_digiface=1, images_digi2real=1, size=112, seed=2)
    old, new = (pq.read_table(folder / "digiface1m_000.parquet")["image_bytes"].to_pylist() for folder in (faces, tmp_path))
    assert not set(old) & set(new)
