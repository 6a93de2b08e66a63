"""The command line: mistakes without a traceback, names of runs, sweeps."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import NASTY, ROOT, RUN, in_shell, quoted

import sniperface


@pytest.mark.parametrize(
    "words", [["train.lrr=1"], ["+train.lrr=1"], ["train.lr=fast"], ["experiment=dmeo"], ["backbone=big"], ["train.lr=-1"]]
)
def test_the_command_line_refuses_a_mistake_in_few_lines_without_a_traceback(words, tmp_path):
    told, code = in_shell(*words, cwd=tmp_path)
    assert code == 1
    assert "Traceback" not in told
    assert words[0].split("=")[0].lstrip("+").split(".")[-1] in told or words[0].split("=")[1] in told
    assert len(told.strip().splitlines()) <= 2


def test_without_data_a_newcomer_learns_what_is_missing_and_what_to_do(tmp_path):
    script = [sys.executable, ROOT / "sniperface.py"]  # this once as a shell starts it
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "data/digiface1m_*.parquet" in done.stderr
    assert "DigiFace1M" in done.stderr
    assert "experiment=demo" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [NASTY, "100 %s & $x$ #1"])
def test_run_names_with_awkward_characters_work_from_the_command_line(data, tmp_path, name):
    told, code = in_shell(quoted("run", name), *one_source(data), cwd=tmp_path)
    assert code == 0, told
    assert (tmp_path / "runs" / name / "checkpoints" / "last.pt").exists()


def test_the_name_of_a_sweep_may_hold_awkward_characters(data, tmp_path):
    told, code = in_shell("-m", quoted("run", "sweep[1]"), "seed=0,1", *one_source(data), cwd=tmp_path)
    assert code == 0, told
    assert len((tmp_path / "runs" / "sweep[1]" / "table.csv").read_text().splitlines()) == 3


def test_the_home_folder_may_be_typed(tmp_path):
    told, code = in_shell("--cfg", "job", "data.digiface_glob=~/faces/*.parquet", "run_dir=~/mine", cwd=tmp_path)
    assert code == 0, told
    assert f"digiface_glob: {Path.home()}/faces/*.parquet\n" in told
    assert f"run_dir: {Path.home()}/mine\n" in told


def one_source(data):
    return [*RUN, quoted("data.digiface_glob", data / "digiface1m_*.parquet"), "data.digi2real_glob=null", "train.max_steps=1"]


def test_no_two_jobs_of_a_sweep_share_a_folder():
    asked = ["a-1_b-2", "", "data.digiface_glob-x/y.parquet", "data.digiface_glob-x_y.parquet", "é" * 200, "é" * 201, "x" * 151]
    names = [sniperface.folder_name(overrides) for overrides in asked]
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


def test_failed_jobs_of_a_sweep_stand_in_its_table_and_the_others_go_on(words, tmp_path):
    told, code = in_shell("-m", *words, "run_dir=sweep", "train.max_steps=2", "moco.queue_size=8,48", cwd=tmp_path)
    assert code == 1
    assert "moco.queue_size=8: must be >= 16" in told
    with open(tmp_path / "sweep" / "table.csv") as file:
        states = {row["moco.queue_size"]: row["state"] for row in csv.DictReader(file)}
    assert states["48"] == "epoch 1 of 2"
    assert states["8"] == "not trained, see its log.txt"
