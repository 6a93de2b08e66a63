"""What goes wrong on real machines, injected: kills at each kind of write, full disks, damaged and hostile files, planted code.

The bar for each fault: the rerun ends with the bits of a run that nothing happened to; for each hostile input: a right result,
or one ValueError or OSError that names the file.
"""

import dataclasses
import errno
import functools
import glob
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import encode, write_rows
from hydra.errors import HydraException
from test_config import ROOT, settings
from test_train import SMALL
from tqdm import tqdm

import dataio
import sniperface

tqdm.monitor_interval = 0  # its thread would be in the way of fork
SOURCES = {"digiface": "digiface1m", "digi2real": "digi2real"}  # and their files
KILLED = 77  # exit status of a process that ended itself at an instant
IS_ROOT = os.geteuid() == 0
NASTY = "a b,c'd\"e[1]=é人"  # a name that shells, globs and Hydra each dislike for another reason
RUN = [
    *SMALL, "data.image_size=32", "train.monitor_images=32", "moco.queue_size=32", "train.save_every_steps=2", "train.log_every=1",
    "train.keep_last=1", "data.workers=2", "augment=light", "eval.bootstrap=100", "eval.repeats=1", "eval.enroll_sweep=[1]",
    "eval.open_set_share=0",
]  # fmt: skip


def quoted(key: str, value: object) -> str:
    """One override whose value may hold anything."""
    return key + "='" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


@functools.cache
def composed(*words: str) -> sniperface.Config:
    return settings(*RUN, *words)


def job(home: Path, data: Path, *more: str) -> sniperface.Config:
    """Settings of a run of eight steps (saved at 2, 4, 6, 8; two epochs) whose every file is below `home`."""
    cfg, typed = composed(*more), sniperface.typed_keys(more)
    globs = {f"{source}_glob": str(data / f"{name}_000.parquet") for source, name in SOURCES.items()}
    globs = {key: path for key, path in globs.items() if f"data.{key}" not in typed}
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, cache_dir=str(home / "cache"), **globs),
        split=dataclasses.replace(cfg.split, out_dir=str(home / "splits")),
    )


def run_all(cfg: sniperface.Config, home: Path) -> dict:
    sniperface.train(cfg, home / "run")
    sniperface.embed(cfg, home / "run")
    return sniperface.evaluate(cfg, home / "run")


def log_lines(run: Path) -> list[dict]:
    timed = ("images_per_s", "data_wait", "seconds")
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def bits(value: object, prefix: str = "") -> dict:
    """A nested state as {path: bytes or value}; tensors and arrays by their bytes."""
    if isinstance(value, torch.Tensor):
        return {prefix: (str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes())}
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in bits(part, f"{prefix}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in bits(part, f"{prefix}/{i}").items()}
    return {prefix: repr(value)}


def training_result(run: Path) -> dict:
    """All that training leaves behind, by name; what measures time or says where it lies is left out."""
    found: dict = {"names": sorted(path.name for path in (run / "checkpoints").iterdir()), "log": log_lines(run)}
    for path in sorted((run / "checkpoints").glob("*.pt")):
        state = sniperface.load_checkpoint(path)
        found |= {f"{path.name}{k}": v for k, v in bits({k: v for k, v in state.items() if k not in ("config", "meta")}).items()}
    return found


def result(run: Path) -> dict:
    """All that a whole run leaves behind."""
    found = training_result(run)
    for path in sorted((run / "embeddings").iterdir()):
        table = pq.read_table(path)
        found[path.name] = (table.schema.metadata, table.to_pylist())
    metrics = json.loads((run / "metrics.json").read_text())
    return found | {"metrics": {k: v for k, v in metrics.items() if k != "embeddings"}}


def without_measures(expected: dict) -> dict:
    """The part of `result` that training leaves, without the names of the files."""
    return {key: value for key, value in expected.items() if key == "log" or ".pt/" in key}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key] != expected[key]] == []


@pytest.fixture(autouse=True)
def no_hang():
    """A test that hangs fails after a minute instead."""

    def late(number, frame):
        raise AssertionError("hangs: not back after 60 s")

    usual = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(sniperface, "can_draw", lambda: False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataio.write_demo_faces(folder, identities=16, images_digiface=4, images_digi2real=3, size=32, seed=1)
    return folder


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    """The home of a whole run that nothing happened to."""
    home = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sniperface, "can_draw", lambda: False)
        run_all(job(home, data), home)
    return home


@pytest.fixture(scope="module")
def expected(unbroken) -> dict:
    return result(unbroken / "run")


@pytest.fixture
def trained(unbroken, data, tmp_path) -> Path:
    """A copy of the unbroken run's folder; its settings still point at the unbroken run's split table."""
    shutil.copytree(unbroken / "run", tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


def name_of(operation: str, arguments: tuple) -> str:
    target = os.readlink(f"/proc/self/fd/{arguments[0]}") if operation == "fsync" else str(arguments[-1])
    return os.path.basename(target)


def watch_writes(tell) -> None:
    """Call tell(operation, file name, "before" | "after", arguments) round each fsync, replace, link and unlink of this process."""
    for operation in ("fsync", "replace", "link", "unlink"):
        real = getattr(os, operation)

        def watched(*arguments, real=real, operation=operation, **options):
            name = name_of(operation, arguments)
            tell(operation, name, "before", arguments)
            done = real(*arguments, **options)
            tell(operation, name, "after", arguments)
            return done

        setattr(os, operation, watched)


def in_child(function, *arguments) -> int:
    """Run in a fork of this process, so that it may die; its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # it hangs: see `no_hang`
        raise


def die_at(instant: str) -> None:
    """End this process at `instant`: "before replace NAME", "after link NAME", or "half NAME", in the middle of its bytes."""
    moment, _, rest = instant.partition(" ")

    def tell(operation, name, when, arguments):
        if moment == "half" and operation == "fsync" and when == "before" and re.search(rest, name):
            os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os._exit(KILLED)
        if when == moment and re.search(rest, f"{operation} {name}"):
            os._exit(KILLED)

    watch_writes(tell)


def killed(function, instant: str) -> None:
    """Run `function` in a child that dies at `instant`; fails if it never came there."""

    def die():
        die_at(instant)
        function()

    assert in_child(die) == KILLED


@pytest.mark.parametrize(
    "instant",
    [
        "half identity_splits", "half config.yaml", "half step_0000002", "half epoch_01", "before replace step_0000006.pt",
        "after link .last.pt.link", "after replace epoch_02.pt", "before replace best.pt", "after replace last.pt",
        "before unlink epoch_01.pt",
    ],
)  # fmt: skip
def test_a_kill_at_a_write_of_training_loses_nothing(data, tmp_path, expected, instant):
    cfg = job(tmp_path, data)
    killed(lambda: sniperface.train(cfg, tmp_path / "run"), instant)
    sniperface.train(cfg, tmp_path / "run")
    found = training_result(tmp_path / "run")
    assert set(found["names"]) >= set(expected["names"])  # a kill while old ones are deleted may leave one more
    assert_same({key: found[key] for key in expected if key != "names" and key in found}, without_measures(expected))
    assert not list(tmp_path.rglob("*.tmp"))


def test_half_a_line_of_the_log_is_not_a_line(data, tmp_path, expected):
    cfg = job(tmp_path, data)

    class Dying(io.TextIOWrapper):
        lines = 0

        def write(self, text):
            self.lines += 1
            super().write(text[: len(text) // 2] if self.lines == 5 else text)
            if self.lines == 5:
                self.flush()
                os._exit(KILLED)

    def die_in_a_line(path, mode="r"):
        return Dying(io.FileIO(path, mode)) if mode == "a" else open(path, mode)

    def die():
        sniperface.open = die_in_a_line
        sniperface.train(cfg, tmp_path / "run")

    assert in_child(die) == KILLED
    with pytest.raises(json.JSONDecodeError):
        log_lines(tmp_path / "run")
    sniperface.report(job(tmp_path, data), str(tmp_path / "run"))  # a report of a killed or a running run
    assert (tmp_path / "table.csv").read_text().count("\n") == 2
    sniperface.train(cfg, tmp_path / "run")
    assert training_result(tmp_path / "run")["log"] == expected["log"]


def read_all(stream) -> list[np.ndarray]:
    return [image.numpy() for image in stream]


@pytest.mark.parametrize("instant", ["half u8.json", "after replace .*u8.json", "before replace .*u8$", "after replace .*u8$"])
def test_a_kill_while_the_cache_is_made_loses_nothing(data, tmp_path, monkeypatch, instant):
    monkeypatch.setattr(dataio, "CACHE_CHUNK", 16)
    stream = dataio.ParquetImageStream(str(data / "*.parquet"))
    plain = dataio.open_cache(stream, tmp_path / "plain", 2).copy()
    killed(lambda: dataio.open_cache(stream, tmp_path / "cache", 2), instant)
    assert np.array_equal(dataio.open_cache(stream, tmp_path / "cache", 2), plain)


def test_a_deleted_cache_whose_second_making_was_killed_is_made(data, tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "CACHE_CHUNK", 16)
    stream = dataio.ParquetImageStream(str(data / "*.parquet"))
    plain = dataio.open_cache(stream, tmp_path, 2).copy()
    next(tmp_path.glob("*.u8")).unlink()  # as the message about damage advises
    killed(lambda: dataio.open_cache(stream, tmp_path, 2), "before replace .*u8.json")
    assert np.array_equal(dataio.open_cache(stream, tmp_path, 2), plain)


@pytest.mark.parametrize("side", ["train", "test"])
@pytest.mark.parametrize(
    "instant", ["half digiface_00000", "after replace digiface_00000", "before replace digiface$", "after unlink note"]
)
def test_a_kill_while_shards_are_written_loses_nothing(data, unbroken, tmp_path, side, instant):
    def make(home: Path) -> list[pa.Table]:
        table = unbroken / "splits" / "identity_splits.parquet"
        return [pq.read_table(p) for p in dataio.materialize_split(str(data / "digi*"), table, home / "digiface", side)]

    killed(lambda: make(tmp_path / "killed"), instant)
    assert not (tmp_path / "killed" / "digiface").exists()
    assert all(a.equals(b) for a, b in zip(make(tmp_path / "killed"), make(tmp_path / "whole"), strict=True))


@pytest.mark.parametrize("instant", ["before replace test_embeddings.parquet", "half metrics.json", "half metrics.ranks.parquet"])
def test_a_kill_while_vectors_or_figures_are_written_loses_nothing(data, unbroken, trained, expected, instant):
    cfg = job(unbroken, data)

    def measure():
        sniperface.embed(cfg, trained)
        sniperface.evaluate(cfg, trained)

    shutil.rmtree(trained / "embeddings")
    (trained / "metrics.json").unlink()
    killed(measure, instant)
    assert not (trained / "metrics.json").exists()
    measure()
    assert_same(result(trained), expected)


def test_the_second_interrupt_stops_at_once(data, tmp_path, monkeypatch, expected):
    cfg, real = job(tmp_path, data), sniperface.set_lr

    def interrupt(optimizer, lr):
        real(optimizer, lr)
        signal.raise_signal(signal.SIGINT)

    def again(*arguments):
        signal.raise_signal(signal.SIGINT)
        time.sleep(30)

    started = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(sniperface, "set_lr", interrupt)
        patch.setattr(sniperface, "save_checkpoint", again)
        with pytest.raises(KeyboardInterrupt):
            sniperface.train(cfg, tmp_path / "run")
    assert time.time() - started < 20
    assert not list(tmp_path.glob("run/checkpoints/*"))
    sniperface.train(cfg, tmp_path / "run")
    assert training_result(tmp_path / "run")["log"] == expected["log"]


def test_a_stop_that_is_asked_for_while_the_monitor_measures_is_saved_before_it_says_so(data, tmp_path, monkeypatch, caplog):
    cfg, real, calls = (
        job(tmp_path, data, "train.save_every_epochs=2", "train.save_every_steps=null"),
        sniperface.Monitor.measure,
        [],
    )

    def ask(monitor, training):
        calls.append(training.step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(monitor, training)

    monkeypatch.setattr(sniperface.Monitor, "measure", ask)
    with pytest.raises(SystemExit) as stopped:
        sniperface.train(cfg, tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM
    told = int(re.search(r"stopped at step (\d+), saved", caplog.text)[1])
    assert sniperface.latest_checkpoint(tmp_path / "run")["step"] == told
    assert log_lines(tmp_path / "run")[-1]["step"] == told


# ---------------------------------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------------------------------


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


def refusal(function) -> str:
    """What `function` says when it refuses; any other exception, or none, fails the test."""
    with pytest.raises((ValueError, OSError)) as refused:
        function()
    assert str(refused.value).strip()
    return str(refused.value)


def read_or_refused(read, name: str):
    """What `read` gives, None where it refuses a file called `name`."""
    try:
        return read()
    except ValueError as error:
        if name not in str(error):
            pytest.fail(f"does not name {name}: {error}")


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


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints, changed data
# ---------------------------------------------------------------------------------------------------------------------


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
    seal = range(len(whole) - len(sniperface.SEAL) - sniperface.DIGEST_BYTES - 2, len(whole), 5)
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
            found = sniperface.read_embeddings(path)
            return [*map(np.ndarray.tolist, (found.names, found.keys, found.vectors))]
        if kind == "split table":
            return dataio.read_identity_splits(path).identities
        index = dataio.build_index(str(path), None)
        return [row for part in dataio.read_rows(index, dataio.COLUMNS) for row in part.to_pylist()]

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


@pytest.mark.parametrize(
    "change", [lambda rows: rows[:-2], lambda rows: rows[::-1], change_people], ids=["fewer", "turned", "people"]
)
def test_other_rows_in_the_same_files_are_refused(data, tmp_path, change):
    mine = shutil.copytree(data, tmp_path / "data")
    sniperface.train(job(tmp_path, mine, "train.max_steps=2"), tmp_path / "run")
    path = mine / "digiface1m_000.parquet"
    write_rows(path, change(pq.read_table(path).to_pylist()), group=100, compression="none")
    told = refusal(lambda: sniperface.train(job(tmp_path, mine), tmp_path / "run"))
    assert "data is not what the run was started on" in told


def test_a_file_that_disappears_while_training_is_named(data, tmp_path, monkeypatch):
    mine, real = shutil.copytree(data, tmp_path / "data"), sniperface.set_lr

    def lose(*arguments):
        (mine / "digi2real_000.parquet").unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(sniperface, "set_lr", lose)
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


def test_any_exception_in_a_decoding_thread_ends_the_run(data, tmp_path, monkeypatch):
    def breaks(*arguments):
        raise KeyError("a bug of ours")

    monkeypatch.setattr(dataio, "decode_image", breaks)
    with pytest.raises(KeyError, match="a bug of ours"):
        sniperface.train(job(tmp_path, data), tmp_path / "run")


def test_an_overflow_in_fp16_is_skipped_and_rescaled_and_does_not_end_the_run(data, tmp_path, monkeypatch):
    cfg, real = job(tmp_path, data, "train.amp=fp16"), torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, enabled=enabled, init_scale=2.0**21))
    before = bits(sniperface.build_model(cfg).query.state_dict())
    sniperface.train(cfg, tmp_path / "run")
    state = sniperface.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    after = bits({key.removeprefix("query."): value for key, value in state["model"].items() if key.startswith("query.")})
    assert state["step"] == 8
    assert state["scaler"]["scale"] < 2.0**21
    assert after["/backbone.conv1.weight"] != before["/backbone.conv1.weight"]
    assert all(math.isfinite(value) for value in bits_as_floats(state["model"]))
    for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def bits_as_floats(state: dict) -> list[float]:
    return [float(value.double().sum()) for value in state.values()]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile inputs
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(data: Path, source: str = "digiface1m_000") -> list[dict]:
    return pq.read_table(data / f"{source}.parquet").to_pylist()


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


def without(name: str):
    return lambda path, rows: write_rows(path, [{k: v for k, v in row.items() if k != name} for row in rows], group=100)


def everywhere(name: str, value: object, kind: pa.DataType):
    return lambda path, rows: write_rows(path, [row | {name: value} for row in rows], group=100, types={name: kind})


def changed(**values):
    return lambda path, rows: write_rows(path, [row | values if i == 7 else row for i, row in enumerate(rows)], group=100)


def noted(note: bytes):
    def make(path: Path, rows: list[dict]) -> None:
        table = pa.Table.from_pylist(rows)
        pq.write_table(table.replace_schema_metadata({dataio.METADATA_KEY: note}), path)

    return make


def twice(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.append_column("identity_id", table["identity_id"]), path)


REFUSED_DATA = {
    "truncated": truncated,
    "empty": lambda path, rows: path.write_bytes(b""),
    "text": lambda path, rows: path.write_text("identity_id,image_filename,image_bytes\n"),
    "folder": lambda path, rows: path.mkdir(),
    "magic only": lambda path, rows: path.write_bytes(b"PAR1\0\0\0\0PAR1"),
    "damaged pages": with_damaged_pages,
    "no identity": without("identity_id"),
    "no filename": without("image_filename"),
    "no image": without("image_bytes"),
    "column twice": twice,
    "float identity": everywhere("identity_id", 0.5, pa.float64()),
    "list image": everywhere("image_bytes", [1], pa.list_(pa.int64())),
    "text image": everywhere("image_bytes", "x", pa.string()),
    "null identity": changed(identity_id=None),
    "note is no json": noted(b"\x80\x04."),
    "note is a list": noted(b'["split"]'),
    "note is a number": noted(b"7"),
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


def integers(path: Path, rows: list[dict]) -> None:
    write_rows(path, [r | {"identity_id": int(r["identity_id"])} for r in rows], group=7, types={"identity_id": pa.int64()})


def in_two_schemas(path: Path, rows: list[dict]) -> None:
    """The first half beside the file that the glob names, with integer identities and large binaries."""
    half = [r | {"identity_id": int(r["identity_id"])} for r in rows[:30]]
    write_rows(
        path.with_name("digiface1m_000a.parquet"), half, types={"identity_id": pa.uint16(), "image_bytes": pa.large_binary()}
    )
    write_rows(path, rows[30:], types={"identity_id": pa.large_string(), "image_filename": pa.dictionary(pa.int32(), pa.string())})


def beside_an_empty_one(path: Path, rows: list[dict]) -> None:
    as_it_is(path, rows)
    write_rows(path.with_name("digiface1m_000b.parquet"), [])


RIGHT_DATA = {
    "one huge row group": lambda path, rows: write_rows(path, rows, group=10**6),
    "row groups of one row": lambda path, rows: write_rows(path, rows, group=1),
    "integer identities": integers,
    "two schemas": in_two_schemas,
    "beside a file without rows": beside_an_empty_one,
}


def vectors_by_picture(path: Path) -> dict:
    table = pq.read_table(path)
    return {(r["identity_id"], r["image_filename"], r["source"]): r["embedding"] for r in table.to_pylist()}


@pytest.mark.parametrize("kind", RIGHT_DATA)
def test_every_layout_of_the_same_rows_gives_the_same_people_and_vectors(data, unbroken, trained, tmp_path, kind):
    mine = shutil.copytree(data, tmp_path / "data")
    RIGHT_DATA[kind](mine / "digiface1m_000.parquet", rows_of(data))
    pattern = quoted("data.digiface_glob", mine / "digiface1m_000*.parquet")
    wanted = vectors_by_picture(trained / "embeddings" / "test_embeddings.parquet")
    cfg = job(tmp_path, mine, pattern, "embed.references=false")
    sniperface.embed(cfg, trained, {"data.digiface_glob", "data.digi2real_glob", "split.out_dir"})
    found = vectors_by_picture(trained / "embeddings" / "test_embeddings.parquet")
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[k] for k in wanted], list(wanted.values()), atol=1e-5)


def test_a_footer_that_hides_rows_is_refused_and_no_row_is_left_out_silently(data, tmp_path, monkeypatch):
    index = dataio.build_index(str(data / "digi2real_000.parquet"), None)
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **o: itertools.islice((b.slice(0, 3) for b in real(*a, **o)), 1))
    assert "digi2real_000.parquet" in refusal(lambda: list(dataio.read_rows(index, dataio.COLUMNS)))


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


def with_note(note: bytes):
    return lambda path, table: pq.write_table(table.replace_schema_metadata({dataio.METADATA_KEY: note}), path)


REFUSED_EMBEDDINGS = {
    "text": lambda path, table: path.write_text("no parquet"),
    "folder": lambda path, table: (path.unlink(), path.mkdir()),
    "truncated": lambda path, table: os.truncate(path, path.stat().st_size // 2),
    "damaged pages": flipped_end,
    "no rows": lambda path, table: pq.write_table(table.slice(0, 0), path),
    "no embedding": lambda path, table: pq.write_table(table.drop_columns("embedding"), path),
    "column twice": lambda path, table: pq.write_table(table.append_column("identity_id", table["identity_id"]), path),
    "doubles": with_column("embedding", lambda t: t["embedding"].cast(pa.list_(pa.float64(), 512))),
    "lists": with_column("embedding", lambda t: t["embedding"].cast(pa.list_(pa.float32()))),
    "no width": with_column("embedding", lambda t: pa.array([[]] * len(t), pa.list_(pa.float32(), 0))),
    "nan": with_vectors(lambda v: np.where(np.arange(len(v))[:, None] == 2, np.float32("nan"), v)),
    "not unit": with_vectors(lambda v: v * np.float32(2)),
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


def split_table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


TABLE = ["identity_id", "split"]
REFUSED_TABLES = {
    "text": lambda path: path.write_text("identity_id,split\n1,train\n"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "other columns": split_table(a=[1]),
    "two sides": split_table(identity_id=["1", "1"], split=["train", "test"]),
    "another side": split_table(identity_id=["1"], split=["dev"]),
    "null side": split_table(identity_id=["1", "2"], split=["train", None]),
    "lists": split_table(identity_id=[["1"]], split=["train"]),
    "number sides": split_table(identity_id=["1"], split=[1]),
    "column twice": lambda path: pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, [*TABLE, "split"]), path),
    "note is no json": lambda path: noted(b"\x80\x04.")(path, [{"identity_id": "1", "split": "train"}]),
    "note is a list": lambda path: noted(b"[1]")(path, [{"identity_id": "1", "split": "train"}]),
    "without a note": split_table(identity_id=["1", "2"], split=["train", "test"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_TABLES)
def test_split_tables_that_cannot_be_right_are_refused_by_name(data, unbroken, tmp_path, kind):
    path = tmp_path / "splits" / "identity_splits.parquet"
    shutil.copytree(unbroken / "splits", tmp_path / "splits")
    REFUSED_TABLES[kind](path)
    before = path.is_dir() or path.read_bytes()
    for command in (sniperface.train, sniperface.split):
        assert path.name in refusal(lambda command=command: command(job(tmp_path, data), tmp_path / "run"))
    assert before == (path.is_dir() or path.read_bytes())


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
    found = sniperface.read_embeddings(trained / "embeddings" / "test_embeddings.parquet")
    cfg = job(unbroken, data, quoted("eval.pairs", path))
    assert path.name in refusal(lambda: sniperface.pair_figures(found, cfg.eval))


def test_a_pair_file_of_zeros_and_ones_means_the_same_as_one_of_booleans(data, unbroken, trained, tmp_path):
    found, figures = sniperface.read_embeddings(trained / "embeddings" / "test_embeddings.parquet"), []
    for name, kind in (("a", bool), ("b", int)):
        pairs_with("same", lambda i, v, kind=kind: kind(v))(tmp_path / f"{name}.parquet", pair_rows(trained))
        figures.append(sniperface.pair_figures(found, job(unbroken, data, quoted("eval.pairs", tmp_path / f"{name}.parquet")).eval))
    assert figures[0] == figures[1]
    assert 0 <= figures[0]["accuracy"] <= 1


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=abc", "train.lr=nan", "train.lr=-1", "train.lr=inf", "train.epochs=0", "train.epochs=1.5", "train.epochs=null",
        "train.batch_size=1", "train.amp=int8", "moco.temperature=nan", "moco.temperature=0", "moco.margin=nan",
        "moco.margin=inf", "moco.queue_size=8", "moco.key_momentum=1.5", "data.image_size=8", "data.workers=0", "data.cache=ram",
        "data.max_bad_fraction=2", "data.digiface_glob=null", "data.digiface_glob=[a]", "split.train_ratio=1",
        "split.train_ratio=nan", "split.seed=-1", "eval.top_k=[]", "eval.fars=[]", "eval.fpirs=[]", "eval.enroll_sweep=[]",
        "eval.top_k=[0]", "eval.top_k=5", "eval.fars=[2]", "eval.fars=[nan]", "eval.fpirs=[0]", "eval.bootstrap=1",
        "eval.enroll_per_id=0", "eval.enroll_sweep=[0]", "embed.batch_size=0", "embed.split=train", "curriculum.progress=[1,0]",
        "backbone.layers=[1,1]", "backbone.width=0", "backbone.width=nan", "augment.zoom.p=2", "augment.zoom.low=nan", "seed=-1",
        "seed=x", "command=fly", "run=null", "no.such=1", "+train.lrr=1", "train.weight_decay=nan", "train.clip_grad_norm=nan",
    ],
)  # fmt: skip
def test_an_override_of_the_wrong_type_or_range_is_refused_in_a_few_lines_that_name_it(override):
    with pytest.raises((ValueError, HydraException)) as refused:
        settings(*RUN, override)
    told = sniperface.in_short(refused.value)
    assert override.lstrip("+").split("=")[0].split(".")[-1] in told
    assert len(told.splitlines()) <= 3


@pytest.mark.parametrize("override", ["eval.top_k=[3]", "eval.top_k=[1000]"])
def test_odd_but_allowed_settings_of_eval_give_figures(data, unbroken, trained, override):
    metrics = sniperface.evaluate(job(unbroken, data, override, "eval.open_set_share=0.3"), trained)
    assert metrics["probes"] > 0
    assert json.loads((trained / "metrics.json").read_text())["probes"] == metrics["probes"]


@pytest.mark.parametrize(
    "override", ["data.image_size=16", "data.shuffle_buffer=1000000000000", "data.batch_read_rows=1", "seed=1000000000000000000"]
)
def test_odd_but_allowed_settings_of_training_train(data, tmp_path, override):
    sniperface.train(job(tmp_path, data, override, "train.max_steps=1"), tmp_path / "run")
    assert sniperface.latest_checkpoint(tmp_path / "run")["step"] == 1


def test_names_with_every_awkward_character_work_in_every_place(data, tmp_path, expected):
    home = tmp_path / NASTY
    mine = shutil.copytree(data, home / NASTY)
    cfg = job(home, mine)
    sniperface.split(cfg, home / "run")
    sniperface.train(job(home, mine, "data.cache=decoded"), home / NASTY)
    assert sniperface.latest_checkpoint(home / NASTY)["meta"]["shards"] is True
    sniperface.embed(cfg, home / NASTY)
    assert sniperface.evaluate(cfg, home / NASTY)["probes"] == expected["metrics"]["probes"]
    sniperface.report(cfg, glob.escape(str(home / NASTY)))
    assert NASTY.replace('"', '""') in (home / "table.csv").read_text()


def test_run_names_with_awkward_characters_work_from_the_command_line(data, tmp_path):
    words = [*RUN, quoted("data.digiface_glob", data / "digiface1m_*.parquet"), "data.digi2real_glob=null", "train.max_steps=1"]
    names = [NASTY, "100 %s & $x$ #1"]
    lines = [*([quoted("run", name), "command=train"] for name in names), ["-m", quoted("run", "sweep[1]"), "seed=0,1"]]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, sniperface
torch.set_num_threads(1)
from omegaconf import OmegaConf
OmegaConf.register_new_resolver("folder_name", sniperface.folder_name)
sniperface.can_draw = lambda: False
for more in {lines!r}:
    sys.argv = ["sniperface.py", *more, *{words!r}]
    sniperface.main()
"""  # one process for all lines: most of a command's time is the import of torch; and no fork, which polars does not survive
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all((tmp_path / "runs" / name / "checkpoints" / "last.pt").exists() for name in names)
    assert len((tmp_path / "runs" / "sweep[1]" / "table.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
@pytest.mark.parametrize("place", ["run", "splits", "cache"])
def test_a_folder_that_may_not_be_written_is_named(data, tmp_path, place):
    (tmp_path / place).mkdir(mode=0o500)
    told = refusal(lambda: sniperface.train(job(tmp_path, data, "data.cache=decoded"), tmp_path / "run"))
    assert place in told


@pytest.mark.parametrize("place", ["run", "splits", "cache"])
def test_a_file_where_a_folder_should_be_is_named(data, tmp_path, place):
    (tmp_path / place).write_text("a file")
    told = refusal(lambda: sniperface.train(job(tmp_path, data, "data.cache=decoded"), tmp_path / "run"))
    assert place in told


# ---------------------------------------------------------------------------------------------------------------------
# Security
# ---------------------------------------------------------------------------------------------------------------------


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch '{self.flag}'",)


def test_the_payload_of_these_tests_does_run_where_pickles_are_trusted(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "flag")))
    assert (tmp_path / "flag").exists()


@pytest.mark.parametrize("form", ["archive", "legacy", "plain pickle", "config", "meta"])
def test_a_malicious_checkpoint_runs_nothing(data, unbroken, trained, tmp_path, form):
    path, flag = trained / "checkpoints" / "epoch_02.pt", tmp_path / "flag"
    state, payload = sniperface.load_checkpoint(path), Payload(tmp_path / "flag")
    planted = state | ({form: payload} if form in ("config", "meta") else {"model": payload})
    for old in trained.glob("checkpoints/*.pt"):
        old.unlink()
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(planted))
    else:
        torch.save(planted, path, _use_new_zipfile_serialization=form != "legacy")
    os.link(path, trained / "checkpoints" / "last.pt")
    for command in (sniperface.train, sniperface.embed):
        assert "checkpoints" in refusal(lambda command=command: command(job(unbroken, data), trained))
    assert not flag.exists()


def change_state(state: dict, key: str) -> dict:
    first = next(iter(state["model"]))
    return {
        "config list": state | {"config": [1]}, "meta text": state | {"meta": "x"}, "step text": state | {"step": "x"},
        "no optimizer": {k: v for k, v in state.items() if k != "optimizer"}, "monitor list": state | {"monitor": [1]},
        "no table": state | {"meta": {}}, "model list": state | {"model": [1]},
        "model short": state | {"model": {k: v for k, v in state["model"].items() if k != first}},
        "model shape": state | {"model": state["model"] | {first: torch.zeros(1)}},
        "model text": state | {"model": state["model"] | {first: "x"}},
        "config empty": state | {"config": {}},
    }[key]  # fmt: skip


@pytest.mark.parametrize(
    "key",
    [
        "config list", "meta text", "step text", "no optimizer", "monitor list", "no table", "model list", "model short",
        "model shape", "model text", "config empty",
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_shape_is_refused_and_does_not_crash(data, unbroken, trained, key):
    state = sniperface.load_checkpoint(trained / "checkpoints" / "last.pt")
    for path in trained.glob("checkpoints/*.pt"):
        torch.save(change_state(state, key), path)
    if key not in ("no optimizer", "monitor list", "step text"):  # which embed does not use
        refusal(lambda: sniperface.embed(job(unbroken, data), trained))
    refusal(lambda: sniperface.train(job(unbroken, data, "train.resume=must"), trained))


@pytest.mark.parametrize("planted", ["${oc.env:PLANTED}", "${hydra:runtime.cwd}", "x${oc.decode:${oc.env:PLANTED}}"])
def test_interpolations_in_files_are_never_resolved(data, unbroken, trained, monkeypatch, planted):
    monkeypatch.setenv("PLANTED", "a secret")
    config = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(config.replace(str(unbroken / "splits"), planted))
    assert planted in (trained / "config.yaml").read_text()
    state = sniperface.load_checkpoint(trained / "checkpoints" / "last.pt")
    state["config"]["split"]["out_dir"] = state["config"]["augment"]["name"] = planted
    for path in trained.glob("checkpoints/*.pt"):
        torch.save(state, path)
    cfg = job(unbroken, data)
    for command in (sniperface.evaluate, sniperface.embed, sniperface.train):
        assert "a secret" not in refusal(lambda command=command: command(cfg, trained))
    sniperface.report(cfg, str(trained))
    assert not [p for p in trained.parent.rglob("*") if p.is_file() and b"a secret" in p.read_bytes()]


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch {flag}']", "a: [1", "- 1\n- 2\n", "", "just words", "data: 5\n", "\x00\x01"]
)
def test_a_config_of_a_run_that_is_not_ours_runs_nothing_and_is_refused(data, unbroken, trained, tmp_path, text):
    (trained / "config.yaml").write_text(text.replace("{flag}", str(tmp_path / "flag")))
    assert "config.yaml" in refusal(lambda: sniperface.evaluate(job(unbroken, data), trained))
    assert not (tmp_path / "flag").exists()


@pytest.mark.parametrize("place", ["table", "embeddings", "note", "cache"])
def test_a_pickle_in_any_other_file_runs_nothing(data, unbroken, trained, tmp_path, place):
    flag = tmp_path / "flag"
    planted, cfg = pickle.dumps(Payload(flag)), job(tmp_path, data, "data.cache=decoded")
    shutil.copytree(unbroken / "splits", tmp_path / "splits")
    if place == "table":
        (tmp_path / "splits" / "identity_splits.parquet").write_bytes(planted)
        told = refusal(lambda: sniperface.train(cfg, tmp_path / "new"))
    elif place == "cache":
        sniperface.train(job(tmp_path, data, "data.cache=decoded", "train.max_steps=1"), tmp_path / "new")
        for note in (tmp_path / "cache").glob("*.json"):
            note.write_bytes(planted)
        told = refusal(lambda: sniperface.train(cfg, tmp_path / "new"))
        assert ".u8" in told
    else:
        path = trained / "embeddings" / "test_embeddings.parquet"
        if place == "note":
            with_note(planted)(path, pq.read_table(path))
        else:
            path.write_bytes(planted)
        told = refusal(lambda: sniperface.evaluate(job(unbroken, data), trained))
        assert path.name in told
    assert told
    assert not flag.exists()


@pytest.mark.parametrize("text", ["{}", "7", '"x"', "[1", "[]", "[1, 2, 3, 4, 5, 6, 7, 8]", '["a"]'])
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_a_note_of_a_cache_that_is_not_ours_is_refused_by_name_or_made_again(data, tmp_path, text, state):
    stream = dataio.ParquetImageStream(str(data / "digi2real_000.parquet"))
    plain = dataio.open_cache(stream, tmp_path, 2).copy()
    next(tmp_path.glob("*.json")).write_text(text)
    if state == "begun":
        cache = next(tmp_path.glob("*.u8"))
        cache.rename(f"{cache}.part")
    found = read_or_refused(lambda: dataio.open_cache(stream, tmp_path, 2), ".u8")
    assert found is None or np.array_equal(found, plain)


def test_names_in_the_data_never_lead_out_of_the_output_folder(data, tmp_path):
    home, mine = tmp_path / "deep" / "home", tmp_path / "data"
    names = ["../../x", "/tmp/h_faults_escaped.png", "..\\..\\x", "a\0b", "~/x", "x" * 300]
    for source in ("digiface1m_000", "digi2real_000"):
        rows = [r | {"image_filename": f"{names[i % 6]}{i}"} for i, r in enumerate(rows_of(data, source))]
        rows = [r | {"identity_id": f"../{r['identity_id']}"} for r in rows]
        write_rows(mine / f"{source}.parquet", rows)
    before = set(tmp_path.rglob("*"))
    sniperface.split(job(home, mine), home / "run")
    run_all(job(home, mine), home)
    assert all(home in path.parents or path in (home, home.parent) for path in {*tmp_path.rglob("*")} - before)
    assert {path.name for path in home.iterdir()} == {"run", "splits"}
    assert not Path("/tmp/h_faults_escaped.png1").exists()
