"""Files: written whole, found by pattern, and read or refused by name whatever lies in them."""

import os
import random
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PEOPLE, damage_column, drawn_numbers, numbered_rows, numbers, split, stream_of, write_rows

import dataio


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


def test_a_file_and_a_link_to_it_are_one_file(tmp_path):
    path = write_rows(tmp_path / "a.parquet", numbered_rows("abc"))
    (tmp_path / "b.parquet").symlink_to(path)
    assert [found.resolve() for found in dataio.find_files(str(tmp_path / "*.parquet"))] == [path.resolve()]


def test_a_file_named_absolutely_and_relatively_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    assert len(dataio.find_files(["a.parquet", str(tmp_path / "a.parquet")])) == 1


def test_a_folder_means_the_parquet_files_below_it_that_are_not_hidden(tmp_path):
    kept = ["a.parquet/x/part-0.parquet", "a.parquet/y/part-0.parquet", "b.parquet"]
    left = ["a.parquet/_SUCCESS", "a.parquet/_tmp/part-9.parquet", "a.parquet/.part-8.parquet", "a.parquet/_part.parquet", "a.csv"]
    for name in [*kept[::-1], *left, "splits/identity_splits.parquet", "splits/train/digiface/digiface_00000.parquet"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    def found(*globs):
        return sorted(str(path.relative_to(tmp_path)) for path in dataio.find_files([str(tmp_path / name) for name in globs]))

    assert found("") == found("*.parquet") == found("", "a.parquet/x", "**/[ab].parquet") == kept  # what `split` wrote is not data
    assert found("splits/train/digiface") == ["splits/train/digiface/digiface_00000.parquet"]
    order = dataio.find_files(str(tmp_path))
    assert [path.relative_to(tmp_path).as_posix() for path in order] == ["b.parquet", *kept[:2]]  # by name, then by path


def test_a_folder_without_a_parquet_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").mkdir()
    write_rows(tmp_path / "b.parquet", numbered_rows("ab"))
    for pattern in ("a.parquet", "*.parquet"):
        with pytest.raises(FileNotFoundError, match=r"a\.parquet: a folder without a \.parquet file"):
            dataio.find_files(str(tmp_path / pattern))


def test_a_folder_may_be_written_by_hive_and_its_keys_are_the_column(tmp_path):
    rows = numbered_rows(np.repeat(["007", "a b/ü", "x=1"], 3).tolist())
    for n, folder in enumerate(["007", "a%20b%2F%C3%BC", "x=1"]):
        plain = [{k: v for k, v in row.items() if k != "identity_id"} for row in rows[3 * n : 3 * n + 3]]
        write_rows(tmp_path / f"faces.parquet/identity_id={folder}/part-0.parquet", plain)
    pattern = str(tmp_path / "*.parquet")
    assert dataio.collect_unique_identities(pattern) == ["007", "a b/ü", "x=1"]
    index = dataio.build_index(pattern, None)
    assert [row for table in dataio.read_rows(index) for row in table.to_pylist()] == rows
    assert index.identities() == [row["identity_id"] for row in rows]
    assert drawn_numbers(stream_of(pattern, allowed_identities=["x=1"], shuffle_files=False, shuffle_buffer=0)) == [6, 7, 8]


def test_a_key_of_a_folder_never_replaces_a_column_and_its_null_is_refused(tmp_path):
    write_rows(tmp_path / "identity_id=wrong/a.parquet", numbered_rows("ab"))
    assert dataio.collect_unique_identities(str(tmp_path)) == ["a", "b"]
    plain = [{k: v for k, v in row.items() if k != "identity_id"} for row in numbered_rows("ab")]
    write_rows(tmp_path / "identity_id=__HIVE_DEFAULT_PARTITION__/b.parquet", plain)
    refuse(tmp_path, r"b\.parquet: 2 of 2 rows have no 'identity_id'")


def refuse(pattern, message):
    """Who reads the rows and who reads the identities must both refuse."""
    for read in (lambda: dataio.build_index(str(pattern), None), lambda: dataio.collect_unique_identities(str(pattern))):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("identity_id"), "0 columns called 'identity_id', found .*'image_bytes'.*data.columns"),
        (lambda row: row.pop("image_bytes"), "0 columns called 'image_bytes'"),
        (lambda row: row.update(image_bytes=row["image_bytes"].hex()), "'image_bytes' is string, must be binary"),
        (lambda row: row.update(identity_id=1.5), "'identity_id' is double, must be string or integer"),
        (lambda row: row.update(identity_id=True), "'identity_id' is bool, must be string or integer"),
        (lambda row: row.update(image_filename=3), "'image_filename' is int64, must be string"),
        (lambda row: row.update(image_bytes=[1]), "'image_bytes' is list.*must be binary"),
        (
            lambda row: row.update(image_bytes={"bytes": row["image_bytes"], "path": "x"}),
            "0 columns called 'image_bytes', found .*'image_bytes.bytes'",
        ),
    ],
)
def test_a_missing_column_or_a_wrong_type_is_refused_by_name(tmp_path, change, message):
    rows = numbered_rows(["a", "b"])
    for row in rows:
        change(row)
    path = tmp_path / "wrong.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    refuse(path, f"wrong.parquet: .*{message}")


def test_rows_without_an_identity_are_refused_with_file_and_count(tmp_path):
    rows = numbered_rows(["a"] * 10)
    rows[2]["identity_id"] = rows[7]["identity_id"] = rows[8]["identity_id"] = None
    path = write_rows(tmp_path / "some_null.parquet", rows)
    refuse(path, r"some_null\.parquet: 3 of 10 rows have no 'identity_id'")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    rows = numbered_rows(["a", "b"])
    columns = [pa.array([row[name] for row in rows]) for name in ("identity_id", "identity_id", "image_filename", "image_bytes")]
    names = ["identity_id", "identity_id", "image_filename", "image_bytes"]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "twice.parquet")
    refuse(tmp_path / "twice.parquet", r"twice\.parquet: 2 columns called 'identity_id'")


def test_columns_may_have_other_names(tmp_path):
    rows = [{"who": r["identity_id"], "file": r["image_filename"], "png": r["image_bytes"], "age": 3} for r in numbered_rows("abc")]
    path = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    columns = dataio.Columns("who", "file", "png")
    assert numbers(
        [list(stream_of(str(path), columns=columns, allowed_identities=["b", "c"], shuffle_files=False, shuffle_buffer=0))]
    ) == [1, 2]
    assert dataio.collect_unique_identities(str(path), columns) == ["a", "b", "c"]


def half(path):
    os.truncate(path, write_rows(path, numbered_rows(["a"] * 30)).stat().st_size // 2)


NO_PARQUET = {
    "truncated": half, "empty": Path.touch,
    "text": lambda path: path.write_text("identity_id,image_bytes\n" * 100),
    "magic only": lambda path: path.write_bytes(b"PAR1PAR1"),
}  # fmt: skip


@pytest.mark.parametrize("make", NO_PARQUET.values(), ids=NO_PARQUET)
def test_what_is_no_parquet_file_is_refused_by_name(tmp_path, make):
    write_rows(tmp_path / "a.parquet", numbered_rows("ab"))
    make(tmp_path / "b.parquet")
    refuse(tmp_path / "*.parquet", r"b.parquet: damaged, or no such file \(.+\)")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_file_with_damaged_pages_is_refused_by_name(tmp_path, compression):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist(numbered_rows(PEOPLE)), path, compression=compression)
    damage_column(path, 0)
    refuse(path, r"damaged\.parquet")


def test_seeded_mutations_of_a_parquet_file_are_read_or_refused_by_name(tmp_path):
    path = tmp_path / "mutated.parquet"
    whole, rng, unnamed = write_rows(path, numbered_rows(PEOPLE[:30])).read_bytes(), random.Random(5), []
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw if rng.random() < 0.8 else raw[: rng.randrange(len(raw))])
        try:
            assert len(dataio.build_index(str(path), None).unit) > 0
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
