"""Data, embeddings, tables and pairs that cannot be right are refused by name; those of an odd layout are read."""

import itertools
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, write_rows
from runs import job, quoted, refusal, rows_of, run_all, with_note

import dataio
import sniperface

pytestmark = pytest.mark.usefixtures("no_pictures")


def as_it_is(path: Path, rows: list[dict]) -> None:
    write_rows(path, rows, group=100)


def truncated(path: Path, rows: list[dict]) -> None:
    as_it_is(path, rows)
    os.truncate(path, path.stat().st_size * 2 // 3)


def with_damaged_pages(path: Path, rows: list[dict]) -> None:
    as_it_is(path, rows)
    whole = bytearray(path.read_bytes())
    whole[4:3000] = bytes(2996)
    path.write_bytes(whole)


def everywhere(name: str, value: object, kind: pa.DataType):
    return lambda path, rows: write_rows(path, [row | {name: value} for row in rows], group=100, types={name: kind})


def changed(**values):
    return lambda path, rows: write_rows(path, [row | values if i == 7 else row for i, row in enumerate(rows)], group=100)


REFUSED_DATA = {  # at the level of the commands; more of what is no such parquet file is in test_files
    "truncated": truncated,
    "damaged pages": with_damaged_pages,
    "text image": everywhere("image_bytes", "x", pa.string()),
    "null identity": changed(identity_id=None),
    "note is no json": with_note(b"\x80\x04."),
    "note is a list": with_note(b'["split"]'),
    "note is a number": with_note(b"7"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_DATA)
def test_data_that_cannot_be_right_is_refused_by_name(data, unbroken, trained, tmp_path, kind):
    mine = shutil.copytree(data, tmp_path / "data")
    path = mine / "digiface1m_000.parquet"
    path.unlink()
    REFUSED_DATA[kind](path, rows_of(data))
    for command in (sniperface.train,) if kind.startswith("note") else (sniperface.train, sniperface.split):  # split reads no notes
        assert path.name in refusal(lambda command=command: command(job(tmp_path, mine), tmp_path / "new"))
    keys = {"data.digiface_glob", "data.digi2real_glob"}
    assert path.name in refusal(lambda: sniperface.embed(job(unbroken, mine), trained, keys))


def vectors_by_picture(path: Path) -> dict:
    table = pq.read_table(path)
    return {(r["identity_id"], r["image_filename"], r["source"]): r["embedding"] for r in table.to_pylist()}


def test_the_same_rows_in_two_schemas_beside_a_file_without_rows_give_the_same_vectors(data, unbroken, trained, tmp_path):
    mine, rows = shutil.copytree(data, tmp_path / "data"), rows_of(data)
    numbered = [row | {"identity_id": int(row["identity_id"])} for row in rows[:30]]
    write_rows(mine / "digiface1m_000a.parquet", numbered, types={"identity_id": pa.uint16(), "image_bytes": pa.large_binary()})
    other = {"identity_id": pa.large_string(), "image_filename": pa.dictionary(pa.int32(), pa.string())}
    write_rows(mine / "digiface1m_000.parquet", rows[30:], types=other)
    write_rows(mine / "digiface1m_000b.parquet", [])
    pattern, path = (
        quoted("data.digiface_glob", mine / "digiface1m_000*.parquet"),
        trained / "embeddings" / "test_embeddings.parquet",
    )
    wanted = vectors_by_picture(path)
    cfg = job(tmp_path, mine, pattern, "embed.references=false")
    sniperface.embed(cfg, trained, {"data.digiface_glob", "data.digi2real_glob", "split.out_dir"})
    found = vectors_by_picture(path)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[k] for k in wanted], list(wanted.values()), atol=1e-5)


def test_folders_by_hive_go_through_every_command_like_files(data, unbroken, tmp_path):
    for name, rows in (("digiface", rows_of(data)), ("digi2real", rows_of(data, "digi2real_000"))):
        for identity, group in itertools.groupby(rows, lambda row: row["identity_id"]):
            plain = [{key: row[key] for key in ("image_filename", "image_bytes")} for row in group]
            write_rows(tmp_path / f"{name}.parquet/identity_id={identity}/part-0.parquet", plain)
    globs = [quoted(f"data.{source}_glob", tmp_path / f"{source}.parquet") for source in ("digiface", "digi2real")]
    metrics = run_all(job(tmp_path, tmp_path, *globs), tmp_path)
    assert metrics["leaks"]["pictures_in_train"] == 0
    path = Path("embeddings/test_embeddings.parquet")
    assert vectors_by_picture(tmp_path / "run" / path).keys() == vectors_by_picture(unbroken / "run" / path).keys()
    cfg = job(tmp_path, tmp_path, *globs, quoted("embed.test_glob", tmp_path / "digi2real.parquet"))
    sniperface.embed(cfg, tmp_path / "run", {"embed.test_glob"})
    assert len(pq.read_table(tmp_path / "run" / "embeddings" / "digi2real.parquet")) == len(rows_of(data, "digi2real_000"))
    sniperface.split(cfg)
    sides = dataio.read_identity_splits(cfg.split.table).identities
    train_rows = [
        row for path in dataio.find_files(f"{cfg.split.out_dir}/train/digiface") for row in pq.read_table(path).to_pylist()
    ]
    wanted = [row for row in rows_of(data) if row["identity_id"] in sides["train"]]
    assert sorted(map(str, train_rows)) == sorted(map(str, wanted))


def test_a_footer_that_hides_rows_is_refused_and_no_row_is_left_out_silently(data, tmp_path, monkeypatch):
    index = dataio.build_index(str(data / "digi2real_000.parquet"), None)
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **o: itertools.islice((b.slice(0, 3) for b in real(*a, **o)), 1))
    assert "digi2real_000.parquet" in refusal(lambda: list(dataio.read_rows(index)))


def test_null_and_empty_pictures_are_named_and_left_out_or_replaced(data, tmp_path, caplog):
    mine = shutil.copytree(data, tmp_path / "data")
    rows = rows_of(data)
    broken = {3: None, 17: b"", 29: b"\x89PNG\r\n\x1a\nno", 41: encode(np.zeros((1, 1), np.uint8)), 50: b"GIF89a"}
    write_rows(mine / "digiface1m_000.parquet", [r | {"image_bytes": broken.get(i, r["image_bytes"])} for i, r in enumerate(rows)])
    told = refusal(lambda: run_all(job(tmp_path, mine), tmp_path))
    assert "max_bad_fraction" in told
    assert "digiface1m_000.parquet row" in told
    metrics = run_all(job(tmp_path / "b", mine, "data.max_bad_fraction=0.5"), tmp_path / "b")
    vectors = vectors_by_picture(tmp_path / "b" / "run" / "embeddings" / "test_embeddings.parquet")
    left_out = {(rows[i]["identity_id"], rows[i]["image_filename"], "digiface") for i in broken if i != 41}
    assert not vectors.keys() & left_out
    assert 0 <= metrics["rank1"] <= 1
    assert re.search(r"row 3: broken image \(no bytes\)", caplog.text)


def test_doubled_file_names_of_a_person_are_refused_by_eval_and_of_two_people_are_not(data, unbroken, trained, tmp_path):
    cfg = job(unbroken, data)
    table = pq.read_table(trained / "embeddings" / "test_embeddings.parquet")
    names = pa.array([f"{n % 4}.png" for n in range(len(table))])
    path = trained / "embeddings" / "test_embeddings.parquet"
    pq.write_table(table.set_column(1, "image_filename", names), path)
    for reference in trained.glob("embeddings/*.*.parquet"):
        reference.unlink()
    doubled = len({(r["identity_id"], r["source"], r["image_filename"]) for r in pq.read_table(path).to_pylist()}) < len(table)
    if doubled:
        assert "test_embeddings" in refusal(lambda: sniperface.evaluate(cfg, trained))
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path)
    assert table["image_filename"][0].as_py() in refusal(lambda: sniperface.evaluate(cfg, trained))


def test_one_file_in_both_sources_is_refused_because_pictures_would_enrol_and_probe_at_once(data, tmp_path):
    cfg = job(tmp_path, data, quoted("data.digiface_glob", data / "digi*.parquet"))
    assert "digi2real_000.parquet" in refusal(lambda: sniperface.train(cfg, tmp_path / "run"))


def with_vectors(change):
    def make(path: Path, table: pa.Table) -> None:
        vectors = np.array(table["embedding"].to_pylist(), np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(change(vectors).reshape(-1)), 512)
        pq.write_table(table.set_column(table.column_names.index("embedding"), "embedding", column), path)

    return make


def with_column(name: str, values):
    return lambda path, table: pq.write_table(table.set_column(table.column_names.index(name), name, values(table)), path)


def flipped_end(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="snappy")
    whole = bytearray(path.read_bytes())
    whole[100:2000] = os.urandom(1900)
    path.write_bytes(whole)


REFUSED_EMBEDDINGS = {
    "text": lambda path, table: path.write_text("no parquet"),
    "folder": lambda path, table: (path.unlink(), path.mkdir()),
    "truncated": lambda path, table: os.truncate(path, path.stat().st_size // 2),
    "damaged pages": flipped_end,
    "no rows": lambda path, table: pq.write_table(table.slice(0, 0), path),
    "no embedding": lambda path, table: pq.write_table(table.drop_columns("embedding"), path),
    "column twice": lambda path, table: pq.write_table(table.append_column("identity_id", table["identity_id"]), path),
    "integers": with_column("embedding", lambda t: pa.array([[1, 0]] * len(t))),
    "no lists": with_column("embedding", lambda t: pa.array([1.0] * len(t))),
    "two widths": with_column("embedding", lambda t: pa.array([[1.0] * (1 + i % 2) for i in range(len(t))])),
    "no width": with_column("embedding", lambda t: pa.array([[]] * len(t), pa.list_(pa.float32(), 0))),
    "nan": with_vectors(lambda v: np.where(np.arange(len(v))[:, None] == 2, np.float32("nan"), v)),
    "ours, not unit": with_vectors(lambda v: v * np.float32(2)),
    "zero": with_vectors(lambda v: v * (np.arange(len(v)) != 2)[:, None].astype(np.float32)),
    "null vector": with_column("embedding", lambda t: pa.array([None, *t["embedding"].to_pylist()[1:]], t["embedding"].type)),
    "null identity": with_column("identity_id", lambda t: pa.array([None, *t["identity_id"].to_pylist()[1:]])),
    "null filename": with_column("image_filename", lambda t: pa.array([None, *t["image_filename"].to_pylist()[1:]])),
    "list identity": with_column("identity_id", lambda t: pa.array([[1]] * len(t))),
    "struct filename": with_column("image_filename", lambda t: pa.array([{"a": i} for i in range(len(t))])),
    "binary identity": with_column("identity_id", lambda t: pa.array([b"\xff\xfe"] * len(t))),
    "note is no json": with_note(b"\x80\x04."),
    "note is a list": with_note(b"[1]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_EMBEDDINGS)
def test_embeddings_that_cannot_be_measured_are_refused_by_name(data, unbroken, trained, kind):
    path = trained / "embeddings" / "test_embeddings.parquet"
    REFUSED_EMBEDDINGS[kind](path, pq.read_table(path))
    assert path.name in refusal(lambda: sniperface.evaluate(job(unbroken, data), trained))


@pytest.mark.parametrize("kind", ["truncated", "list identity", "nan"])
def test_damaged_reference_files_are_refused_by_their_own_name(data, unbroken, trained, kind):
    path = trained / "embeddings" / "test_embeddings.pca.parquet"
    table = pq.read_table(trained / "embeddings" / "test_embeddings.parquet")
    REFUSED_EMBEDDINGS[kind](path, table)
    assert path.name in refusal(lambda: sniperface.evaluate(job(unbroken, data), trained))


def pair_rows(trained: Path, count: int = 20) -> list[dict]:
    rows = pq.read_table(trained / "embeddings" / "test_embeddings.parquet").to_pylist()
    people = {r["image_filename"]: r["identity_id"] for r in rows}
    names, rng = list(people), random.Random(1)
    pairs = [rng.sample(names, 2) for _ in range(60 * count)]
    same = [pair for pair in pairs if people[pair[0]] == people[pair[1]]][: count // 2]
    other = [pair for pair in pairs if people[pair[0]] != people[pair[1]]][: count // 2]
    return [
        {"fold": n % 2, "image_filename_a": a, "image_filename_b": b, "same": people[a] == people[b]}
        for n, (a, b) in enumerate([pair for both in zip(same, other, strict=True) for pair in both], 1)
        for n in [n // 2]
    ]  # fmt: skip


def pairs_with(name: str, change, kind: pa.DataType | None = None):
    def make(path: Path, rows: list[dict]) -> None:
        table = pa.Table.from_pylist(rows)
        values = pa.array([change(i, row[name]) for i, row in enumerate(rows)], kind)
        pq.write_table(table.set_column(table.column_names.index(name), name, values), path)

    return make


REFUSED_PAIRS = {
    "text": lambda path, rows: path.write_text("no parquet"),
    "no rows": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), path),
    "lacks a column": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows).drop_columns("same"), path),
    "one fold": pairs_with("fold", lambda i, v: 0),
    "null fold": pairs_with("fold", lambda i, v: None if i == 3 else v),
    "list fold": pairs_with("fold", lambda i, v: [v]),
    "null same": pairs_with("same", lambda i, v: None if i == 3 else int(v)),
    "null bool": pairs_with("same", lambda i, v: None if i == 3 else v),
    "text same": pairs_with("same", lambda i, v: str(int(v))),
    "minus one": pairs_with("same", lambda i, v: 1 if v else -1),
    "null name": pairs_with("image_filename_a", lambda i, v: None if i == 3 else v),
    "number names": pairs_with("image_filename_b", lambda i, v: i),
    "unknown name": pairs_with("image_filename_b", lambda i, v: "x.png" if i == 3 else v),
}


@pytest.mark.parametrize("kind", REFUSED_PAIRS)
def test_pair_files_that_cannot_be_right_are_refused_by_name(data, unbroken, trained, tmp_path, monkeypatch, kind):
    path = tmp_path / "pairs.parquet"
    REFUSED_PAIRS[kind](path, pair_rows(trained))
    found = dataio.read_vectors(trained / "embeddings" / "test_embeddings.parquet")
    assert path.name in refusal(lambda: sniperface.measure_pairs(path, found, [0.1]))


def test_a_pair_file_of_zeros_and_ones_means_the_same_as_one_of_booleans(data, unbroken, trained, tmp_path):
    found, figures = dataio.read_vectors(trained / "embeddings" / "test_embeddings.parquet"), []
    for name, kind in (("a", bool), ("b", int)):
        pairs_with("same", lambda i, v, kind=kind: kind(v))(tmp_path / f"{name}.parquet", pair_rows(trained))
        figures.append(sniperface.measure_pairs(tmp_path / f"{name}.parquet", found, [0.1]))
    assert figures[0] == figures[1]
    assert 0 <= figures[0]["accuracy"] <= 1
