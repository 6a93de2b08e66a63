"""Planted code, planted references and strange names: nothing runs, nothing leaks, nothing leads out of the folder."""

import glob
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_rows
from runs import NASTY, job, read_or_refused, refusal, rows_of, run_all, with_note

import dataio
import sniperface

pytestmark = pytest.mark.usefixtures("no_pictures")


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
