"""Damaged checkpoints and data that changes or breaks under a run: noticed, named, and never trained on silently."""

import errno
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_rows
from runs import assert_same, bits, job, read_or_refused, refusal, training_result

import dataio
import moco
import sniperface

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(data, tmp_path, expected, caplog, share):
    cfg = job(tmp_path, data)
    sniperface.train(job(tmp_path, data, "train.max_steps=7", "train.save_every_steps=3"), tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_0000007.pt"
    os.truncate(newest, int(newest.stat().st_size * share))
    sniperface.train(cfg, tmp_path / "run")
    assert "step_0000007.pt: cannot be used" in caplog.text or "last.pt: cannot be used" in caplog.text
    wanted = {
        key: value for key, value in expected.items() if key == "log" or key.startswith(("last.pt", "best.pt", "epoch_02.pt"))
    }
    newest.unlink(missing_ok=True)
    assert_same({key: value for key, value in training_result(tmp_path / "run").items() if key in wanted}, wanted)


def test_each_flipped_byte_of_a_checkpoint_is_detected_or_harmless(trained):
    path = trained / "checkpoints" / "last.pt"
    whole, rng = path.read_bytes(), random.Random(5)
    wanted, detected = bits(sniperface.load_checkpoint(path)), 0
    ends = [rng.randrange(len(whole) - 40_000, len(whole)) for _ in range(100)]  # the directory of the archive
    seal = range(len(whole) - len(moco.SEAL) - moco.DIGEST_BYTES - 2, len(whole), 5)
    for place in [*ends, *seal, *(rng.randrange(len(whole)) for _ in range(100))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found = read_or_refused(lambda: bits(sniperface.load_checkpoint(path)), path.name)
        assert found in (None, wanted), place
        detected += found is None
    assert detected >= 200


@pytest.mark.parametrize("kind", ["embeddings", "split table", "shard"])
def test_each_flipped_bit_of_a_file_that_we_wrote_is_detected_or_harmless(data, unbroken, tmp_path, kind):
    table = unbroken / "splits" / "identity_splits.parquet"
    source = {
        "embeddings": lambda: unbroken / "run" / "embeddings" / "test_embeddings.parquet",
        "split table": lambda: table,
        "shard": lambda: dataio.materialize_split(str(data / "digi*"), table, tmp_path / "digiface", "train")[0],
    }[kind]()

    def read(path: Path) -> object:
        if kind == "embeddings":
            found = dataio.read_vectors(path)
            return [*map(np.ndarray.tolist, (found.names, found.keys, found.vectors))]
        if kind == "split table":
            return dataio.read_identity_splits(path).identities
        index = dataio.build_index(str(path), None)
        return [row for part in dataio.read_rows(index) for row in part.to_pylist()]

    whole, wanted, rng, detected = source.read_bytes(), read(source), random.Random(7), 0
    for _ in range(40):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        found = read_or_refused(lambda: read(tmp_path / "damaged.parquet"), "damaged.parquet")
        assert found in (None, wanted), place
        detected += found is None
    assert detected > (5 if kind == "split table" else 20)  # a small file is mostly what pyarrow notes about it


def test_after_a_damaged_final_checkpoint_embed_refuses_and_train_makes_it_again(data, tmp_path, expected):
    cfg = job(tmp_path, data)
    sniperface.train(job(tmp_path, data, "train.keep_last=3"), tmp_path / "run")
    final = tmp_path / "run" / "checkpoints" / "epoch_02.pt"
    final.write_bytes(final.read_bytes()[:1000])  # last.pt is the same file
    with pytest.raises(ValueError, match=r"last\.pt"):
        sniperface.embed(cfg, tmp_path / "run")
    sniperface.train(cfg, tmp_path / "run")
    found = training_result(tmp_path / "run")
    assert {key: found[key] for key in found if key.startswith(("last.pt", "log"))} == {
        key: expected[key] for key in expected if key.startswith(("last.pt", "log"))
    }


def test_the_only_good_checkpoint_is_never_rotated_away(data, tmp_path, monkeypatch):
    sniperface.train(job(tmp_path, data, "train.max_steps=4"), tmp_path / "run")
    good = sniperface.load_checkpoint(tmp_path / "run" / "checkpoints" / "epoch_01.pt")

    def breaks(state, file, *rest):
        Path(file).write_bytes(b"half")
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr(torch, "save", breaks)
    refusal(lambda: sniperface.train(job(tmp_path, data), tmp_path / "run"))
    found = sniperface.latest_checkpoint(tmp_path / "run")
    assert bits(found["model"]) == bits(good["model"])


def test_after_a_resume_from_an_older_checkpoint_the_newly_written_one_stays(data, tmp_path):
    sniperface.train(job(tmp_path, data, "train.max_steps=1"), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (4, 6, 8):  # what was written before, and is damaged now
        (checkpoints / f"step_{step:07d}.pt").write_bytes(b"damaged")
    sniperface.train(job(tmp_path, data, "train.max_steps=2"), tmp_path / "run")
    assert sniperface.load_checkpoint(checkpoints / "step_0000002.pt")["step"] == 2


def change_people(rows):
    return [row | {"identity_id": rows[(i + 4) % len(rows)]["identity_id"]} for i, row in enumerate(rows)]


def change_pictures(rows):
    return [row | {"image_bytes": rows[i - 1]["image_bytes"]} for i, row in enumerate(rows)]


CHANGES = [(lambda rows: rows[:-2], "rows"), (lambda rows: rows[::-1], "people"), (change_people, "people")]


@pytest.mark.parametrize(
    ("change", "what"), [*CHANGES, (change_pictures, "pictures")], ids=["fewer", "turned", "people", "pictures"]
)
def test_other_rows_in_the_same_files_are_refused_and_what_of_them_changed_is_told(data, tmp_path, change, what):
    mine = shutil.copytree(data, tmp_path / "data")
    sniperface.train(job(tmp_path, mine, "train.max_steps=2"), tmp_path / "run")
    path = mine / "digiface1m_000.parquet"
    write_rows(path, change(pq.read_table(path).to_pylist()), group=100, compression="none")
    told = refusal(lambda: sniperface.train(job(tmp_path, mine), tmp_path / "run"))
    assert "data is not what the run was started on: digiface: digiface1m_000.parquet differs in " in told
    assert re.search(rf"differs in (\w+, )*{what}.*; restore .* run=run_001$", told)
    assert "digi2real" not in told


def test_a_file_that_disappears_while_training_is_named(data, tmp_path, monkeypatch):
    mine, real = shutil.copytree(data, tmp_path / "data"), sniperface.moco.lr_at

    def lose(*arguments):
        (mine / "digi2real_000.parquet").unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(sniperface.moco, "lr_at", lose)
    told = refusal(lambda: sniperface.train(job(tmp_path, mine, "train.epochs=6"), tmp_path / "run"))
    assert "digi2real_000.parquet" in told


def test_an_error_of_the_disk_in_a_reading_thread_names_the_file(data, tmp_path, monkeypatch):
    real = pq.ParquetFile.iter_batches

    def breaks(parquet, *arguments, columns, **options):
        if columns == ["image_bytes"]:
            raise OSError(errno.EIO, "Input/output error")
        return real(parquet, *arguments, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", breaks)
    told = refusal(lambda: sniperface.train(job(tmp_path, data), tmp_path / "run"))
    assert re.search(r"digi\w+_000\.parquet", told)


def test_without_one_good_checkpoint_training_does_not_begin_again(data, tmp_path):
    sniperface.train(job(tmp_path, data, "train.max_steps=4"), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"none of .* checkpoints can be read"):
        sniperface.train(job(tmp_path, data), tmp_path / "run")
