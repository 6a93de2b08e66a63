"""Sweeps: a folder a job, named by what varies; a table of all jobs, failed ones in it."""

import csv
import json
import re
import shlex
import shutil

import pytest
import yaml
from runs import in_shell, one_source, quoted, refusal
from runs import settings as settings_of

import sniperface


def sweep_of(folder) -> list[dict]:
    with open(folder / "table.csv") as file:
        return list(csv.DictReader(file))


def test_the_name_of_a_sweep_may_hold_awkward_characters(data, tmp_path):
    told, code = in_shell("-m", quoted("run", "sweep[1]"), "seed=0,1", *one_source(data), cwd=tmp_path)
    assert code == 0, told
    assert len((tmp_path / "runs" / "sweep[1]" / "table.csv").read_text().splitlines()) == 3


def test_no_two_jobs_of_a_sweep_share_a_folder():
    asked = ["a-1_b-2", "", "data.digiface_glob-x/y.parquet", "data.digiface_glob-x_y.parquet", "é" * 200, "é" * 201, "x" * 151]
    names = [sniperface.disk_name(overrides, overrides) for overrides in asked]
    assert len(set(names)) == len(names)
    assert names[0] == "a-1_b-2"
    assert all(name and "/" not in name and len(name.encode()) <= 150 for name in names)


def test_a_sweep_of_whole_pipelines_ends_with_a_folder_a_job_and_a_table(words, tmp_path):
    told, code = in_shell("-m", *words, "run_dir=sweep", "command=all", "train.max_steps=3", "moco.margin=0,0.1", cwd=tmp_path)
    assert code == 0, told
    jobs = [path for path in (tmp_path / "sweep").iterdir() if (path / "metrics.json").exists()]
    assert len(jobs) == 2
    assert {json.loads((job / "train_log.jsonl").read_text().splitlines()[-1])["step"] for job in jobs} == {3}
    table = (tmp_path / "sweep" / "table.csv").read_text()
    assert "moco.margin" in table
    assert len(table.splitlines()) == 3


def test_failed_jobs_are_told_when_they_happen_and_stand_in_the_table_like_the_others(words, tmp_path):
    told, code = in_shell("-m", *words, "run_dir=sweep", "train.max_steps=2", "moco.margin=0,2,0.10,3", cwd=tmp_path)
    assert code == 1
    failed = [line for line in told.splitlines() if "moco.margin=2.0: must be <= 1" in line]
    assert failed[0] == f"{tmp_path}/sweep/moco.margin-2 failed: {failed[-1].removeprefix('sniperface: ')}"
    assert told.index(failed[0]) < told.index("#2 :")  # before the next job starts
    table = sweep_of(tmp_path / "sweep")
    assert {row["moco.margin"]: row["state"] for row in table} == dict.fromkeys(("0.0", "0.1"), "epoch 1 of 2") | {
        "2": "not trained, see its log.txt", "3": "not trained, see its log.txt",
    }  # fmt: skip
    assert not [key for key in table[0] if "." in key and key != "moco.margin"]  # an interpolation is no setting of its own


def test_equal_numbers_are_one_value_and_the_first_run_that_was_measured_is_what_others_are_compared_with(
    trained, tmp_path, monkeypatch
):
    for name in ("b", "c"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    failed = tmp_path / "runs" / "a" / ".hydra" / "train"
    failed.mkdir(parents=True)
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    settings["moco"]["margin"], settings["embed"]["out"], settings["train"]["weight_decay"] = 1, "x/${embed.split}.parquet", 5e-4
    settings["data"]["digiface_glob"] = "${program:x}"
    (failed / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(failed, tmp_path / "runs" / "none" / ".hydra" / "report")  # a folder in which no run was asked for
    other = yaml.safe_load((trained / "config.yaml").read_text())
    other["moco"]["margin"] = 1.0
    (tmp_path / "runs" / "c" / "config.yaml").write_text(yaml.safe_dump(other))
    labels = []
    monkeypatch.setattr(sniperface, "curve", lambda axes, x, y, label, *_, **limits: labels.append(label))
    sniperface.report(settings_of(), f"{tmp_path}/runs/*")
    assert labels == ["margin=1"] * 2 + ["margin=0.1"] * 2 + ["margin=1"] * 2  # in curves.png
    table = sweep_of(tmp_path / "runs")
    assert [row["moco.margin"] for row in table] == ["1", "0.1", "1"]
    assert [row["rank1_change"] for row in table] == ["", "0.0", "0.0"]
    (tmp_path / "runs" / "c" / "metrics.json").write_text('{"rank1": 0.5')
    assert "c/metrics.json" in refusal(lambda: sniperface.report(settings_of(), f"{tmp_path}/runs/*"))
    assert not [key for key in table[0] if "." in key and key != "moco.margin"]


LONG = "curriculum.digiface_share=[0.9,0.8,0.7,0.65,0.61,0.6012345,0.60123,0.6012,0.601,0.6]"


@pytest.mark.parametrize(
    ("typed", "overrides", "name"),
    [
        (["seed=0,1", "train.lr=0.1"], ["seed=1", "train.lr=0.1"], "seed-1"),
        (["train.lr=0.2", "train.lr=0.1,0.3"], ["train.lr=0.3"], "train.lr-0.3"),
        (["moco.margin=choice(0,0.1)", "seed=range(3)"], ["moco.margin=0", "seed=2"], "moco.margin-0_seed-2"),
        (["train.lr=interval(0.01,0.1)", "run=it"], ["train.lr=0.0314", "run=it"], "train.lr-0.0314"),
        (["run=it"], ["run=it", "moco.margin=0.2"], "moco.margin-0.2"),  # a sweeper's own search space
        (["seed=0,1", "data.digiface_glob=a/x,b/x"], ["seed=1", "data.digiface_glob=a/x"], r"seed-1_[0-9a-f]{16}"),
        (["seed=0,1", f"{LONG},[1]"], ["seed=1", LONG], r"seed-1_[0-9a-f]{16}"),
        (["data.digiface_glob=a/x,b/x"], ["data.digiface_glob=b/x"], r"defaults_[0-9a-f]{16}"),
        (["train.lr=0.1", "-m"], ["train.lr=0.1"], "all"),  # nothing varies
        (["command=train,embed"], ["command=embed"], "all"),  # in the same folder
    ],
)
def test_a_job_is_named_by_what_the_sweep_varies_without_long_values_and_paths(typed, overrides, name, monkeypatch, tmp_path):
    monkeypatch.setenv(sniperface.TYPED, shlex.join(["-m", "hydra/launcher=joblib", *typed]))
    assert re.fullmatch(name, sniperface.folder_name("all", overrides, str(tmp_path), ["command"]))
    (tmp_path / "all").mkdir()
    assert sniperface.folder_name("all", overrides, str(tmp_path), ["command"]) == "all"  # an older version's folder


def test_a_further_value_in_a_sweep_reruns_nothing_that_is_there_however_it_was_named(data, tmp_path):
    words = ["-m", "run_dir=sweep", *one_source(data)]
    told, code = in_shell(*words, "seed=0,1", cwd=tmp_path)
    assert code == 0, told
    jobs = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert jobs == {"seed-0", "seed-1"}
    dirname = yaml.safe_load((tmp_path / "sweep" / "seed-0" / ".hydra/train/hydra.yaml").read_text())["hydra"]["job"][
        "override_dirname"
    ]
    old = sniperface.disk_name(dirname, dirname)
    (tmp_path / "sweep" / "seed-0").rename(tmp_path / "sweep" / old)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    told, code = in_shell(*words, "seed=0,1,2", cwd=tmp_path)
    assert code == 0, told
    assert told.count("nothing to do") == 2
    assert {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()} == {old, "seed-1", "seed-2"}
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}.items()
    assert len(sweep_of(tmp_path / "sweep")) == 3
