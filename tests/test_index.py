"""The index: which rows are read, and what its fingerprint sees."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import PEOPLE, numbered_picture, numbered_rows, stream_of, write_rows

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


def test_the_stream_fingerprint_changes_with_what_changes_the_order(source):
    found = [
        stream_of(source, **o).fingerprint
        for o in ({}, {"shuffle_files": False}, {"shuffle_buffer": 61}, {"allowed_identities": PEOPLE[:9]})
    ]
    assert len(set(found)) == 4
    assert stream_of(source, batch_read_rows=3).fingerprint == found[0]
