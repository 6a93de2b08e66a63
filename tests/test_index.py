"""The index: which rows are read, and what its fingerprint sees."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PEOPLE, moved_pictures, numbered_picture, numbered_rows, write_rows

import dataio


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
    original = pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, **k: read.append(k["columns"]) or original(self, **k))
    dataio.build_index(source, PEOPLE[:3])
    dataio.collect_unique_identities(source)
    assert {tuple(columns) for columns in read} == {("identity_id",)}


def test_no_allowed_row_at_all_is_refused(source):
    with pytest.raises(ValueError, match="no row of 2 files has an allowed identity"):
        dataio.build_index(source, ["nobody"])
    with pytest.raises(ValueError, match="no row of 2 files"):
        dataio.build_index(source, [])


def test_the_fingerprint_follows_the_rows_and_not_the_folder(tmp_path):
    rows = numbered_rows(PEOPLE)

    def fingerprint(name, rows, allowed=None, **options):
        return dataio.build_index(str(write_rows(tmp_path / name / "a.parquet", rows, **options)), allowed).fingerprint

    base = fingerprint("one", rows)
    assert fingerprint("two", rows) == base
    assert dataio.build_index(str((tmp_path / "two/a.parquet").rename(tmp_path / "b.parquet")), None).fingerprint == base
    assert fingerprint("three", rows[:-1]) != base
    assert fingerprint("four", [*rows[:-1], rows[-1] | {"image_bytes": numbered_picture(9) + b"more"}]) != base
    assert fingerprint("five", rows, PEOPLE[:30]) != base
    assert fingerprint("six", rows, PEOPLE[:30]) != fingerprint("seven", rows, PEOPLE[1:31])
    assert fingerprint("eight", rows, group=7) != base


def test_the_fingerprint_sees_other_people_in_rows_of_the_same_size(tmp_path):
    rows = numbered_rows(PEOPLE)
    renamed = [row | {"identity_id": row["identity_id"].replace("0", "a")} for row in rows]
    found = [
        dataio.build_index(str(write_rows(tmp_path / name / "a.parquet", r)), None).fingerprint
        for name, r in (("1", rows), ("2", renamed))
    ]
    assert found[0] != found[1]


def marks(path, rows, **options):
    return dataio.mark_files(dataio.build_index(str(write_rows(path, rows, **options)), None))


ROWS = numbered_rows(PEOPLE)
MAY_CHANGE = {
    "nothing": ("a", ROWS, {"compression": "zstd"}),
    "name": ("b", ROWS, {"compression": "zstd"}),
    "compression": ("a", ROWS, {"compression": "gzip"}),
    "level": ("a", ROWS, {"compression": "zstd", "compression_level": 19}),
    "name and compression": ("b", ROWS, {"compression": "none", "use_dictionary": False}),
    "writer": ("a", ROWS, {"compression": "zstd", "version": "1.0", "data_page_size": 99, "write_statistics": False}),
    "names of pictures": ("a", [*ROWS[:40], ROWS[40] | {"image_filename": "renamed.png"}, *ROWS[41:]], {"compression": "zstd"}),
}


@pytest.mark.parametrize("kind", MAY_CHANGE)
def test_name_and_writing_of_a_file_may_change(tmp_path, kind):
    name, rows, options = MAY_CHANGE[kind]
    found = marks(tmp_path / "new" / f"{name}.parquet", rows, **options)
    assert dataio.changed_files(marks(tmp_path / "old/a.parquet", ROWS, compression="zstd"), found, plain=True) == []


MUST_NOT_CHANGE = {
    "rows": (ROWS[:-1], {}),
    "people": ([row | {"identity_id": row["identity_id"][::-1]} for row in ROWS], {}),
    "pictures": (moved_pictures(ROWS), {"compression": "zstd"}),
    "row groups": (ROWS, {"compression": "zstd", "group": 7}),
    "pictures, compressed as before": (moved_pictures(ROWS), {}),
}


@pytest.mark.parametrize("kind", MUST_NOT_CHANGE)
def test_what_else_of_a_file_changed_is_told(tmp_path, kind):
    rows, options = MUST_NOT_CHANGE[kind]
    old, new = marks(tmp_path / "a.parquet", ROWS), marks(tmp_path / "a.parquet", rows, **options)
    [told] = dataio.changed_files(old, new, plain=True)
    assert re.match(rf"a\.parquet differs in .*{kind.split(',')[0]}", told)
    assert bool(dataio.changed_files(old, new, plain=False)) == (kind != "row groups")  # a permutation does not depend on them


def test_files_that_come_in_another_order_are_told_with_their_new_names(tmp_path):
    for name, people in (("a", PEOPLE[:30]), ("b", PEOPLE[30:]), ("c", PEOPLE[:7])):
        write_rows(tmp_path / f"{name}.parquet", numbered_rows(people))
    old = dataio.mark_files(dataio.build_index(str(tmp_path), None))
    (tmp_path / "a.parquet").rename(tmp_path / "x.parquet")
    (tmp_path / "c.parquet").unlink()
    write_rows(tmp_path / "y.parquet", numbered_rows(PEOPLE[:9]))
    told = dataio.changed_files(old, dataio.mark_files(dataio.build_index(str(tmp_path), None)), plain=True)
    assert [line.split(", differs in ")[0] for line in told] == [
        "a.parquet, now b.parquet", "b.parquet, now x.parquet", "c.parquet, now y.parquet"
    ]  # fmt: skip


def test_a_picture_of_each_file_is_read_for_the_marks_and_a_bounded_number_of_all(tmp_path, monkeypatch):
    read, original = [], dataio.read_rows
    monkeypatch.setattr(dataio, "read_rows", lambda index, places, names: read.extend(places) or original(index, places, names))
    for files in (1, 7, dataio.MARKED_PICTURES + 1):
        for n in range(files):
            write_rows(tmp_path / f"{files}/identity_id={n:02d}/part-0.parquet", numbered_rows([f"{n:02d}"] * 100))
        read.clear()
        found = dataio.mark_files(dataio.build_index(str(tmp_path / f"{files}"), None))
        assert [mark["name"] for mark in found][3:4] in ([], ["identity_id=03/part-0.parquet"])
        assert {place // 100 for place in read} == set(range(files))
        assert len(read) <= dataio.MARKED_PICTURES + files


def test_another_column_of_pictures_has_caches_and_shards_of_its_own(tmp_path):
    rows = [row | {"crop": row["image_bytes"]} for row in ROWS]
    path = write_rows(tmp_path / "a.parquet", rows, types={"crop": pa.binary()})
    whole, crop = (
        dataio.build_index(str(path), None, dataio.Columns("identity_id", "image_filename", c)) for c in ("image_bytes", "crop")
    )
    assert whole.fingerprint != crop.fingerprint


def test_a_picture_that_changed_in_the_middle_while_the_file_was_compressed_otherwise_is_seen(tmp_path):
    changed = [*ROWS[:25], *(row | {"image_bytes": numbered_picture(9)} for row in ROWS[25:35]), *ROWS[35:]]
    old, new = marks(tmp_path / "a.parquet", ROWS), marks(tmp_path / "a.parquet", changed, compression="zstd")
    assert dataio.changed_files(old, new, plain=True) == ["a.parquet differs in pictures"]
