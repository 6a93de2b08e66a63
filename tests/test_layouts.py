"""Layouts: files as HuggingFace's datasets writes them, and files without names of pictures, serve like those of the contract."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from conftest import drawn_numbers, numbered_rows, split, stream_of, write_rows

import dataio
import sniperface

PEOPLE = ["zoe", "ann", "bob"]  # labels 0, 1, 2
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def note_of(names, column="label"):
    """The schema metadata that HuggingFace's datasets leaves."""
    features = {"image": {"_type": "Image"}, column: {"_type": "ClassLabel", "names": names}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_huggingface(path, rows, names=None, column="label", group=10):
    """Rows of the contract in the layout of HuggingFace; `names` are those of the labels, by default there are none."""
    images = [{"bytes": row["image_bytes"], "path": row["image_filename"]} for row in rows]
    labels = [names.index(row["identity_id"]) if names else int(row["identity_id"]) for row in rows]
    table = pa.table({"image": pa.array(images, IMAGE), column: pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(note_of(names, column) if names else None), path, row_group_size=group)
    return path


def without_names(rows, missing=lambda n: True):
    return [row | {"image_filename": None} if missing(n) else row for n, row in enumerate(rows)]


def rows_read(globs, allowed=None, **options):
    return [row for table in dataio.read_rows(dataio.build_index(globs, allowed, **options)) for row in table.to_pylist()]


def test_huggingface_files_are_recognised_and_give_people_names_and_pictures(tmp_path):
    rows = numbered_rows([PEOPLE[n % 3] for n in range(25)])
    path = str(write_huggingface(tmp_path / "hf.parquet", rows, PEOPLE))
    assert dataio.collect_unique_identities(path) == ["ann", "bob", "zoe"]
    assert rows_read(path) == rows
    assert rows_read(path, ["bob"]) == rows[2::3]
    stream = stream_of(path, allowed_identities=["zoe"], shuffle_files=False, shuffle_buffer=0, batch_read_rows=4)
    assert drawn_numbers(stream) == list(range(0, 25, 3))
    assert stream.index.identities() == ["zoe"] * 9
    usual = dataio.build_index(write_rows(tmp_path / "usual.parquet", rows), None).image_bytes()
    assert stream.index.image_bytes() == pytest.approx(usual * 9 / 25, rel=0.2)


def test_labels_without_names_are_numbers(tmp_path):
    rows = numbered_rows(["7", "0", "7"])
    assert rows_read(write_huggingface(tmp_path / "hf.parquet", rows)) == rows


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_has_no_name_is_refused(tmp_path, label):
    path = write_huggingface(tmp_path / "hf.parquet", numbered_rows(["0", "1", str(label)]))
    pq.write_table(pq.read_table(path).replace_schema_metadata(note_of(PEOPLE)), path)
    with pytest.raises(ValueError, match=rf"hf\.parquet: 'label' {label} has none of the metadata's 3 names"):
        dataio.build_index(path, None)


def test_a_row_without_a_label_is_refused(tmp_path):
    table = pa.table({"image": pa.array([{"bytes": b"x", "path": "x"}] * 2, IMAGE), "label": pa.array([1, None], pa.int64())})
    pq.write_table(table, tmp_path / "hf.parquet")
    with pytest.raises(ValueError, match=r"hf\.parquet: 1 of 2 rows have no 'label'"):
        dataio.build_index(tmp_path / "hf.parquet", None)


def test_columns_in_a_struct_are_named_with_a_dot(tmp_path):
    rows = numbered_rows(["zoe", "bob"])
    path = write_huggingface(tmp_path / "hf.parquet", rows, PEOPLE, "person")
    with pytest.raises(ValueError, match=r"0 columns called 'identity_id', found .*'image.bytes'.*'person'.*data.columns"):
        dataio.build_index(path, None)
    for columns in (("person", "image_filename", "image.bytes"), ("person", "image.path", "image_bytes")):
        assert rows_read(path, columns=dataio.Columns(*columns)) == rows
    renamed = pq.read_table(path).rename_columns(["face", "person"]).replace_schema_metadata(note_of(PEOPLE, "person"))
    pq.write_table(renamed, path)
    assert rows_read(path, columns=dataio.Columns("person", "face.path", "face.bytes")) == rows


def test_columns_of_the_contract_come_before_those_of_huggingface(tmp_path):
    rows = [row | {"image": {"bytes": b"other", "path": "other"}, "label": 5} for row in numbered_rows("ab")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "both.parquet")
    assert rows_read(tmp_path / "both.parquet") == numbered_rows("ab")


def test_a_picture_that_is_null_counts_as_broken(tmp_path, caplog):
    path = write_huggingface(tmp_path / "hf.parquet", numbered_rows(["0"] * 9))
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[2], images[5] = None, {"bytes": None, "path": "elsewhere.png"}
    pq.write_table(table.set_column(0, "image", pa.array(images, IMAGE)), path)
    assert sorted(set(drawn_numbers(stream_of(str(path))))) == [0, 1, 3, 4, 6, 7, 8]
    assert caplog.text.count("no bytes") == 2


def test_a_picture_without_a_name_is_named_by_file_and_row(tmp_path):
    rows = numbered_rows([PEOPLE[n % 3] for n in range(25)])
    path = write_huggingface(tmp_path / "faces 1.v2.parquet", without_names(rows, lambda n: n % 2), PEOPLE)
    expected = [row["image_filename"] if n % 2 == 0 else f"faces 1.v2/{n}" for n, row in enumerate(rows)]
    index = dataio.build_index(path, None)
    units = [list(dataio.read_unit(index, unit, np.arange(5), dataio.SHARD_SCHEMA.names, 3)) for unit in range(3)]
    assert [row["image_filename"] for row in rows_read(path)] == expected
    assert [n for unit in units for table in unit for n in table["image_filename"].to_pylist()] == [
        *expected[:5], *expected[10:15], *expected[20:25],
    ]  # fmt: skip
    assert [row["image_filename"] for row in rows_read(path, ["bob"])] == expected[2::3]


@pytest.mark.parametrize("kind", ["absent", "null", "huggingface", "huggingface without paths"])
def test_names_that_are_made_are_unique_in_files_of_one_name(tmp_path, kind):
    rows = without_names(numbered_rows(["0"] * 12))
    for side in ("train", "test"):
        path = tmp_path / side / "0000.parquet"
        if kind.startswith("huggingface"):
            write_huggingface(path, rows, group=5)
            if kind.endswith("paths"):
                images = pa.array([{"bytes": row["image_bytes"]} for row in rows], pa.struct([("bytes", pa.binary())]))
                pq.write_table(pq.read_table(path).set_column(0, "image", images), path, row_group_size=5)
        else:
            table = pq.read_table(write_rows(path, rows))
            pq.write_table(table if kind == "null" else table.drop_columns("image_filename"), path, row_group_size=5)
    names = [row["image_filename"] for row in rows_read(str(tmp_path / "*/*.parquet"))]
    assert names == [f"{side}/0000/{n}" for side in ("test", "train") for n in range(12)]
    assert [row["image_filename"] for row in rows_read(str(tmp_path / "test/*.parquet"))] == [f"0000/{n}" for n in range(12)]


def test_a_column_of_names_that_was_asked_for_and_is_missing_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.parquet", numbered_rows("ab"))
    with pytest.raises(ValueError, match="0 columns called 'file'"):
        dataio.build_index(path, None, dataio.Columns("identity_id", "file", "image_bytes"))


def test_shards_of_huggingface_files_hold_the_names_of_people_and_pictures(tmp_path):
    rows = numbered_rows([f"p{n % 8}" for n in range(40)])
    names = [f"p{n}" for n in range(8)]
    path = write_huggingface(tmp_path / "in/hf.parquet", without_names(rows), names)
    splits = split(names, tmp_path)
    for side in ("train", "test"):
        shards = dataio.materialize_split(str(path), tmp_path / "splits.parquet", tmp_path / side, side)
        expected = rows_read(path, splits.identities[side])
        assert {row["image_filename"] for row in expected} <= {f"hf/{n}" for n in range(40)}
        found = pa.concat_tables(map(pq.read_table, shards)).to_pylist()
        assert sorted(found, key=str) == sorted(expected, key=str)


def in_huggingface_layout(data: Path, home: Path) -> Path:
    for name in runs.SOURCES.values():
        rows = runs.rows_of(data, f"{name}_000")
        write_huggingface(home / f"{name}_000.parquet", rows, sorted({row["identity_id"] for row in rows}), group=500)
    return home


def test_a_whole_run_on_huggingface_files_is_that_on_the_same_pictures_of_the_contract(data, expected, tmp_path, no_pictures):
    cfg = runs.job(tmp_path, in_huggingface_layout(data, tmp_path / "hf"))
    metrics = runs.run_all(cfg, tmp_path)
    found = runs.result(tmp_path / "run")
    named = {key for key in expected if key.endswith(".parquet")}
    for key in named:
        assert found[key][1] == expected[key][1]
    assert metrics["rank1"] == expected["metrics"]["rank1"]
    assert metrics["leaks"] == expected["metrics"]["leaks"]
    assert metrics["leaks"]["pictures_in_train"] == 0


def test_pictures_of_huggingface_files_are_found_again_by_their_made_names(data, tmp_path, trained):
    rows = without_names(runs.rows_of(data))
    path = write_huggingface(tmp_path / "hf.parquet", rows, sorted({row["identity_id"] for row in rows}))
    cfg = runs.job(
        tmp_path,
        data,
        "embed.leak_check=false",
        "embed.references=false",
        "data.columns.image=image.bytes",
        "embed.test_glob=" + str(path),
    )
    sniperface.embed(cfg, trained, {"embed.test_glob", "data.columns.image"})
    table = dataio.read_vectors(trained / "embeddings/hf.parquet")
    assert table.files.tolist() == [f"hf/{n}" for n in range(len(rows))]
    wanted = set(zip(table.sources.tolist(), table.files.tolist(), table.names.tolist(), strict=True))
    assert dataio.find_pictures(dataio.find_given_rows(str(path), cfg.data.columns), wanted, cfg.data).keys() == wanted
