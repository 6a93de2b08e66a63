"""Kills at each kind of write and stops by signals: the rerun ends with the bits of a run that nothing happened to."""

import io
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from runs import assert_same, in_child, job, log_of, training_result

import dataio
import sniperface

pytestmark = pytest.mark.usefixtures("no_pictures")


KILLED = 77  # exit status of a process that ended itself at an instant


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
        "after link .last.pt", "after replace epoch_02.pt", "before replace best.pt", "after replace last.pt",
        "before unlink epoch_01.pt",
    ],
)  # fmt: skip
def test_a_kill_at_a_write_of_training_loses_nothing(data, tmp_path, expected, instant):
    cfg = job(tmp_path, data)
    killed(lambda: sniperface.train(cfg, tmp_path / "run"), instant)
    sniperface.train(cfg, tmp_path / "run")
    found = training_result(tmp_path / "run")
    assert set(found["names"]) >= set(expected["names"])  # a kill while old ones are deleted may leave one more
    assert_same({key: found[key] for key in expected if key != "names" and key in found}, runs.without_measures(expected))
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
        log_of(tmp_path / "run")
    sniperface.report(job(tmp_path, data), str(tmp_path / "run"))  # a report of a killed or a running run
    assert (tmp_path / "table.csv").read_text().count("\n") == 2
    sniperface.train(cfg, tmp_path / "run")
    assert training_result(tmp_path / "run")["log"] == expected["log"]


@pytest.mark.parametrize("instant", ["half u8.json", "after replace .*u8.json", "before replace .*u8$", "after replace .*u8$"])
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_while_the_cache_is_made_loses_nothing(data, tmp_path, monkeypatch, instant, again):
    monkeypatch.setattr(dataio, "CACHE_CHUNK", 16)
    stream = dataio.ParquetImageStream(str(data / "*.parquet"))
    plain = dataio.open_cache(stream, tmp_path / "plain", 2).copy()
    if again:  # deleted, as the message about damage advises
        dataio.open_cache(stream, tmp_path / "cache", 2)
        next((tmp_path / "cache").glob("*.u8")).unlink()
    killed(lambda: dataio.open_cache(stream, tmp_path / "cache", 2), instant)
    assert np.array_equal(dataio.open_cache(stream, tmp_path / "cache", 2), plain)


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
    assert_same(runs.result(trained), expected)


def test_the_second_interrupt_stops_at_once(data, tmp_path, monkeypatch, expected):
    cfg, real = job(tmp_path, data), sniperface.moco.lr_at

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    def again(*arguments):
        signal.raise_signal(signal.SIGINT)
        time.sleep(30)

    started = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(sniperface.moco, "lr_at", interrupt)
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
        sniperface.moco.Training.measure_monitor,
        [],
    )

    def ask(training, monitor):
        calls.append(training.step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(training, monitor)

    monkeypatch.setattr(sniperface.moco.Training, "measure_monitor", ask)
    with pytest.raises(SystemExit) as stopped:
        sniperface.train(cfg, tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM
    told = int(re.search(r"stopped at step (\d+), saved", caplog.text)[1])
    assert sniperface.latest_checkpoint(tmp_path / "run")["step"] == told
    assert log_of(tmp_path / "run")[-1]["step"] == told


LONG = ["train.epochs=6", "train.save_every_steps=5"]


@pytest.fixture(scope="module")
def long_run(people, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("long")
    with pytest.MonkeyPatch.context() as patch:
        runs.draw_no_plots(patch)
        runs.train(runs.words_of(people, home), home / "run", *LONG)
    return home / "run"


def wait_for(condition, limit_s: float = 50.0) -> None:
    deadline = time.time() + limit_s
    while not condition() and time.time() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_goes_on_to_the_same_bits(words, long_run, tmp_path, how):
    line, log = [*words, "run_dir=killed", *LONG], tmp_path / "killed" / "train_log.jsonl"
    process = runs.Command(*line, cwd=tmp_path)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3)
    os.kill(process.pid, how)
    told, code = process.wait()
    if how == signal.SIGKILL:
        assert code == -9
    else:
        assert code == 128 + how
        assert "the same command goes on" in told
    assert 0 < runs.state_of(tmp_path / "killed")["step"] < runs.state_of(long_run)["step"]
    told, code = runs.in_shell(*line, cwd=tmp_path)
    assert code == 0, told
    assert "going on from step" in told
    runs.assert_same_run(long_run, tmp_path / "killed")


def test_sigterm_outside_the_training_loop_ends_with_a_line_and_nothing_half_written(words, tmp_path):
    with dataio.locked(tmp_path / "splits" / "train" / ".digiface.lock", wait=True):  # where the process will wait
        process = runs.Command(*words, "run_dir=run", "command=split", cwd=tmp_path)
        wait_for((tmp_path / "splits" / "identity_splits.parquet").exists)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        told, code = process.wait()
    assert code == 128 + signal.SIGTERM
    assert "stopped; the same command goes on where it can" in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.tmp"))
