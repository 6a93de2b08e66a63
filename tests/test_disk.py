"""Full disks, and places where nothing may be written: told by name, nothing half written, and the rerun goes on."""

import os
import re
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import assert_same, in_child, job, refusal, result, settings, training_result

import dataio
import sniperface

pytestmark = pytest.mark.usefixtures("no_pictures")


IS_ROOT = os.geteuid() == 0


@contextmanager
def full_disk(folder: Path, free_bytes: int):
    """Within the block the disk of `folder`, a small tmpfs, has `free_bytes` left; without root no file may grow beyond that."""
    if os.path.ismount(folder):
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "ballast").write_bytes(bytes(max(0, free - free_bytes)))
        yield
        (folder / "ballast").unlink()
    else:
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, usual[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own of 30 MB where we may mount one, else a plain folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        IS_ROOT and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", folder], capture_output=True).returncode
    )
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_at_a_checkpoint_is_told_and_the_one_before_is_intact(data, disk, monkeypatch, expected):
    cfg = job(disk, data)
    sniperface.train(job(disk, data, "train.max_steps=2"), disk / "run")
    with full_disk(disk, 300_000), monkeypatch.context() as patch:
        patch.setattr(dataio, "need_space", lambda *a: None)  # there was room when it was asked
        told = refusal(lambda: sniperface.train(cfg, disk / "run"))
    assert "step_0000004.pt" in told or "epoch_01.pt" in told
    assert re.search("No space|File too large|disk", told)
    assert sniperface.latest_checkpoint(disk / "run")["step"] == 2
    assert not list(disk.rglob("*.tmp"))
    sniperface.train(cfg, disk / "run")
    found = {key: value for key, value in training_result(disk / "run").items() if not key.startswith("step_0000002")}
    assert_same(found, {key: expected[key] for key in found})


def test_a_full_disk_at_the_embeddings_is_told_and_the_rerun_goes_on(data, disk, unbroken, trained, expected):
    cfg = job(unbroken, data)
    shutil.rmtree(trained / "embeddings")
    shutil.move(trained, disk / "run")
    with full_disk(disk, 20_000):
        told = refusal(lambda: sniperface.embed(cfg, disk / "run"))
    assert "test_embeddings" in told
    assert not list((disk / "run" / "embeddings").iterdir())
    sniperface.embed(cfg, disk / "run")
    assert_same(result(disk / "run"), expected)


def test_a_full_disk_at_the_metrics_is_told_and_leaves_no_half_file(data, disk, unbroken, trained):
    shutil.move(trained, disk / "run")
    (disk / "run" / "metrics.json").unlink()
    with full_disk(disk, 0):
        told = refusal(lambda: sniperface.evaluate(job(unbroken, data), disk / "run"))
    assert "metrics." in told
    assert not (disk / "run" / "metrics.json").exists()


def test_a_full_disk_at_the_log_is_told_and_the_rerun_has_every_line(data, disk, monkeypatch, expected):
    cfg = job(disk, data)
    sniperface.train(job(disk, data, "train.max_steps=2"), disk / "run")
    with full_disk(disk, 0), monkeypatch.context() as patch:
        patch.setattr(dataio, "need_space", lambda *a: None)  # there was room when it was asked
        refusal(lambda: sniperface.train(cfg, disk / "run"))
    sniperface.train(cfg, disk / "run")
    assert training_result(disk / "run")["log"] == expected["log"]


def test_a_run_that_has_its_checkpoints_already_asks_for_no_more_room_than_it_takes(data, disk, expected):
    cfg = job(disk, data)
    sniperface.train(job(disk, data, "train.max_steps=7"), disk / "run")
    largest = max(path.stat().st_size for path in disk.rglob("*.pt"))
    for _ in "going on", "finished":
        with full_disk(disk, 3 * largest):
            sniperface.train(cfg, disk / "run")
    assert training_result(disk / "run")["log"] == expected["log"]


def test_a_disk_that_fills_while_shards_are_written_is_told_and_the_rerun_goes_on(data, disk, unbroken, monkeypatch):
    monkeypatch.setattr(dataio, "need_space", lambda *a: None)  # there was room when it was asked

    def make() -> list[Path]:
        table = unbroken / "splits" / "identity_splits.parquet"
        return dataio.materialize_split(str(data / "digi*"), table, disk / "digiface", "train")

    with full_disk(disk, 60_000):
        told = refusal(make)
    assert "digiface" in told
    assert not (disk / "digiface").exists()
    assert sum(pq.read_metadata(path).num_rows for path in make()) > 0


def test_a_disk_that_fills_while_the_cache_is_made_is_told_and_the_rerun_goes_on(data, disk, monkeypatch):
    stream = dataio.ParquetImageStream(str(data / "*.parquet"))

    def make() -> int:
        return len(dataio.open_cache(stream, disk / "cache", 2))

    with full_disk(disk, 60_000):
        assert in_child(lambda: refusal(make)) == 0  # asked before
        monkeypatch.setattr(dataio, "need_space", lambda *a: None)  # there was room when it was asked
        assert in_child(lambda: refusal(make)) == 0  # the kernel ends a process that writes to a map without room
    assert make() == len(stream)


READ_ONLY = pytest.param(lambda path: path.mkdir(mode=0o500), marks=pytest.mark.skipif(IS_ROOT, reason="root may write everywhere"))


@pytest.mark.parametrize("make", [READ_ONLY, Path.touch], ids=["read only", "a file"])
@pytest.mark.parametrize("place", ["run", "splits", "cache"])
def test_a_place_where_no_folder_can_be_written_is_named(data, tmp_path, place, make):
    make(tmp_path / place)
    assert place in refusal(lambda: sniperface.train(job(tmp_path, data, "data.cache=decoded"), tmp_path / "run"))


WRITTEN = [("splits", "train"), ("cache", "train"), ("splits", "split"), ("splits/train", "split")]


@pytest.mark.parametrize(("place", "command"), WRITTEN)
def test_where_splits_and_caches_cannot_be_written_the_settings_that_work_are_told(words, tmp_path, monkeypatch, place, command):
    monkeypatch.chdir(tmp_path)
    if place == "splits/train":
        dataio.find_splits(settings(*words).data, settings(*words).split)
    (tmp_path / place).touch()

    def run(*more):
        cfg = settings(*words, "data.cache=decoded", "train.max_steps=1", *more)
        (sniperface.split if command == "split" else sniperface.train)(cfg, tmp_path / "runs/run")

    told = refusal(run)
    assert told.startswith(f"{tmp_path / place}: cannot be written to (")
    run(*re.search(r"split\.out_dir=\S+ data\.cache_dir=\S+", told)[0].split())
