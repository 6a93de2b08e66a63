"""command=check: what would go wrong later is told at once, and nothing stays but its page."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from conftest import write_rows
from runs import job, quoted, refusal, rows_of

import dataio
import moco
import sniperface

pytestmark = pytest.mark.usefixtures("no_pictures")


def checked(data, home, *more):
    (home / "run").mkdir(parents=True, exist_ok=True)
    return lambda: sniperface.check(job(home, data, *more), home / "run", set())


def test_a_sound_run_is_described_and_nothing_else_is_left(data, tmp_path):
    checked(data, tmp_path)()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/check.json"]
    page = json.loads((tmp_path / "run" / "check.json").read_text())
    assert page["refused"] == []
    assert page["train"]["rows"] + page["test"]["rows"] == sum(len(rows_of(data, f"{name}_000")) for name in runs.SOURCES.values())
    assert page["train"]["sample"]["formats"].keys() == {"PNG", "JPEG"}
    assert page["eval"]["probes"] > 0
    steps = page["steps"]
    assert steps["pairs_per_s"] > 0
    assert steps["hours"] >= 0
    assert steps["checkpoints_gb"] > 0
    assert steps["cache_gb"] > 0
    assert steps["device_beside_cpu"] is None
    assert steps["ms_a_picture"].keys() == sniperface.SPEEDUPS.keys()
    assert steps["hours_for_the_cache"] == steps["hours_for_links"] == 0
    words = "positives=mutual", "positives.every_epochs=1", "data.cache=decoded", "train.epochs=200"
    checked(data, tmp_path, *words)()
    steps = json.loads((tmp_path / "run" / "check.json").read_text())["steps"]
    assert 0 < steps["hours_for_links"] < steps["hours"]


@pytest.mark.parametrize("cache", sniperface.DONE_ONCE)
def test_the_part_of_a_step_that_takes_longest_is_named_unless_it_is_done_once(cache):
    for slowest in sniperface.SPEEDUPS:
        parts = {"decoding": 3.0, "copying": 2.0, "computing": 1.0} | {slowest: 4.0}
        left = [name for name in parts if name not in sniperface.DONE_ONCE[cache]]
        told = sniperface.name_limit(parts, cache).split(": ")
        assert told[0] == (slowest if slowest in left else left[0])
        assert f"data.cache={cache}" not in told[1]


def test_slow_decoding_is_the_limit_and_counts_once_where_there_is_a_cache(data, tmp_path, monkeypatch):
    original = dataio.decode_image
    monkeypatch.setattr(dataio, "decode_image", lambda *a: time.sleep(0.02) or original(*a))
    monkeypatch.setattr(sniperface, "CHECK_STEPS", 4)

    def steps(cache):
        checked(data, tmp_path, f"data.cache={cache}", "train.epochs=100", "data.workers=1")()
        return json.loads((tmp_path / "run" / "check.json").read_text())["steps"]

    plain, cached = steps("none"), steps("decoded")
    assert plain["limit"].startswith("decoding: data.cache=decoded")
    assert plain["ms_a_picture"]["decoding"] > 20
    assert cached["limit"].startswith("computing")
    assert cached["hours"] < plain["hours"] / 2
    rows = json.loads((tmp_path / "run" / "check.json").read_text())["train"]["rows"]
    assert cached["hours_for_the_cache"] == pytest.approx(rows * cached["ms_a_picture"]["decoding"] / 3.6e6, abs=1e-4)
    assert cached["hours"] > cached["hours_for_the_cache"] > 0


def spoilt(data, home, change):
    for name in runs.SOURCES.values():
        write_rows(home / "data" / f"{name}_000.parquet", change(rows_of(data, f"{name}_000")))
    return home / "data"


TWO_EACH = lambda rows: [row for row in rows if int(row["image_filename"].split("/")[1].split(".")[0]) < 1]  # noqa: E731
DOUBLED = lambda rows: rows + rows  # noqa: E731


@pytest.mark.parametrize(
    ("change", "told"), [(TWO_EACH, "no probes left"), (DOUBLED, "repeat an image")], ids=["two each", "doubled"]
)
def test_a_test_side_that_cannot_be_evaluated_is_refused_by_all_before_the_first_step_and_told_by_train(
    data, tmp_path, change, told, caplog
):
    mine = spoilt(data, tmp_path, change)
    assert told in refusal(checked(mine, tmp_path / "check"))
    assert told in json.loads((tmp_path / "check" / "run" / "check.json").read_text())["refused"][0]
    whole = job(tmp_path, mine, "command=all", "train.batch_size=4", "train.max_steps=1")
    assert told in refusal(lambda: sniperface.train(whole, tmp_path / "whole"))
    assert not (tmp_path / "whole" / "checkpoints").exists()
    sniperface.train(job(tmp_path, mine, "train.batch_size=4", "train.max_steps=1"), tmp_path / "alone")
    assert told in caplog.text


def test_several_refusals_are_told_at_once(data, tmp_path):
    broken = quoted("data.digi2real_glob", tmp_path / "none.parquet")
    told = refusal(checked(data, tmp_path, broken))
    assert "rows of train" in told
    assert "rows of test" in told


def test_a_step_that_comes_out_differently_on_a_device_is_refused(data, tmp_path, monkeypatch):
    cfg, views = job(tmp_path, data), torch.rand(2, 40, 3, 32, 32)
    assert sniperface.compare_devices(cfg, torch.device("cpu"), views) == {"loss": 0, "grad_norm": 0, "keys": 0}
    monkeypatch.setattr(moco, "compare_steps", lambda *_, **__: {"loss": 0.1, "grad_norm": 0.0, "keys": 0.0})
    assert "a step differs from the CPU's" in refusal(lambda: sniperface.compare_devices(cfg, torch.device("cpu"), views))


def test_a_checkpoint_that_does_not_give_back_what_was_saved_is_refused(data, tmp_path, monkeypatch):
    real = sniperface.load_checkpoint

    def forgets(path):
        state = real(path)
        state["model"]["queue"] = state["model"]["queue"] * 2
        return state

    monkeypatch.setattr(sniperface, "load_checkpoint", forgets)
    assert "does not give back" in refusal(checked(data, tmp_path))


def test_what_would_stop_a_run_at_its_end_is_told_at_its_start(data, tmp_path, caplog):
    pairs = quoted("eval.pairs", tmp_path / "none.parquet")
    assert "none.parquet" in refusal(checked(data, tmp_path / "pairs", pairs))
    whole = job(tmp_path, data, "command=all", pairs)
    assert "none.parquet" in refusal(lambda: sniperface.train(whole, tmp_path / "whole"))
    trained_on = quoted("embed.test_glob", data / "digiface1m_000.parquet")
    sniperface.train(job(tmp_path, data, "train.max_steps=1"), tmp_path / "run")
    assert "are trained on" in refusal(checked(data, tmp_path, trained_on))
    assert "holds another run" in refusal(checked(data, tmp_path, "moco.margin=0.3"))
    checked(data, tmp_path)()  # what was asked at first would go on
    assert "was started with data.cache=none" in refusal(checked(data, tmp_path, "data.cache=decoded"))
    fewer = spoilt(data, tmp_path, lambda rows: rows[:-1])
    assert "the data is not what the run was started on" in refusal(checked(fewer, tmp_path))
    write_rows(tmp_path / "one.parquet", [row | {"identity_id": "somebody"} for row in rows_of(data, "digiface1m_000")[:4]])
    assert "the gallery holds one identity" in refusal(checked(data, tmp_path, quoted("embed.test_glob", tmp_path / "one.parquet")))
    (tmp_path / "lonely_pairs.parquet").write_bytes((tmp_path / "one.parquet").read_bytes())
    told = refusal(checked(data, tmp_path, quoted("eval.pairs", tmp_path / "lonely_pairs.parquet")))
    assert "lonely.parquet" in told


def test_a_full_disk_is_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    told = refusal(checked(data, tmp_path, "data.cache=decoded"))
    assert re.search(r"checkpoints \(0\.\d+ GB\) and cache \(0\.\d+ GB\) needs 0\.\d+ GB", told)
    (tmp_path / "cache").mkdir()
    rows = dataio.find_rows((cfg := job(tmp_path, data)).data, cfg.split, "train")
    for stream in dataio.open_streams(rows, cfg.data, cfg.seed):
        (file := dataio.cache_file(stream, tmp_path / "cache")).with_name(f"{file.name}.part").touch()  # is begun: it has its room
    assert "cache (0.000 GB)" in refusal(checked(data, tmp_path, "data.cache=decoded"))


def test_a_sample_of_broken_pictures_is_refused(data, tmp_path):
    mine = spoilt(data, tmp_path, lambda rows: [row | {"image_bytes": b"none"} for row in rows])
    told = refusal(checked(mine, tmp_path / "check"))
    assert re.search(r"train: \d+ of a sample of \d+ pictures are broken", told)
    assert "test: " in told


def test_the_command_leaves_its_page_alone(data, tmp_path):
    told, code = runs.in_shell("command=check", *runs.one_source(data), cwd=tmp_path)
    assert code == 0, told
    assert "pairs_per_s" in told
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["runs/run_001/check.json"]


def test_two_states_are_apart_by_what_was_changed_in_one(data, tmp_path):
    cfg = job(tmp_path, data)
    one, other = (moco.Training(sniperface.build_model(cfg), cfg.train, torch.device("cpu")) for _ in range(2))
    views = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert moco.compare_steps(one, other, *views, seed=0) == {"loss": 0, "grad_norm": 0, "keys": 0}
    with torch.no_grad():
        other.model.query.backbone.fc.weight.mul_(1 + 1e-2 * torch.rand(other.model.query.backbone.fc.weight.shape))
    apart = moco.compare_steps(one, other, *views, seed=0)
    assert np.isfinite(list(apart.values())).all()
    assert apart["loss"] > 0
    assert apart["grad_norm"] > 0
