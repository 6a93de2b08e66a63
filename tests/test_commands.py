"""The command line: mistakes without a traceback, names of runs, sweeps."""

import csv
import json
import os
import subprocess
import sys

import pytest
from runs import NASTY, ROOT, RUN, in_shell, quoted

import sniperface


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


def command(*words, cwd):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, ROOT / "sniperface.py", *words], capture_output=True, text=True, cwd=cwd, env=env, check=False
    )


@pytest.mark.parametrize(
    "words", [["train.lrr=1"], ["+train.lrr=1"], ["train.lr=fast"], ["experiment=dmeo"], ["backbone=big"], ["train.lr=-1"]]
)
def test_the_command_line_refuses_a_mistake_in_few_lines_without_a_traceback(words, tmp_path):
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert words[0].split("=")[0].lstrip("+").split(".")[-1] in done.stderr or words[0].split("=")[1] in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_without_data_a_newcomer_learns_what_is_missing_and_what_to_do(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode != 0
    assert "data/digiface1m_*.parquet" in done.stderr
    assert "DigiFace1M" in done.stderr
    assert "experiment=demo" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_two_jobs_of_a_sweep_share_a_folder():
    asked = ["a-1_b-2", "", "data.digiface_glob-x/y.parquet", "data.digiface_glob-x_y.parquet", "é" * 200, "é" * 201, "x" * 151]
    names = [sniperface.folder_name(overrides) for overrides in asked]
    assert len(set(names)) == len(names)
    assert names[0] == "a-1_b-2"
    assert all(name and "/" not in name and len(name.encode()) <= 150 for name in names)


def test_a_sweep_of_whole_pipelines_ends_with_a_folder_a_job_and_a_table(words, tmp_path):
    told, code = in_shell(words, tmp_path / "sweep", "command=all", "train.max_steps=3", "moco.margin=0,0.1", first=["-m"])
    assert code == 0, told
    jobs = [path for path in (tmp_path / "sweep").iterdir() if (path / "metrics.json").exists()]
    assert len(jobs) == 2
    assert {json.loads((job / "train_log.jsonl").read_text().splitlines()[-1])["step"] for job in jobs} == {3}
    table = (tmp_path / "sweep" / "table.csv").read_text()
    assert "moco.margin" in table
    assert len(table.splitlines()) == 3


def test_failed_jobs_of_a_sweep_stand_in_its_table_and_the_others_go_on(words, tmp_path):
    told, code = in_shell(words, tmp_path / "sweep", "train.max_steps=2", "moco.queue_size=8,48", first=["-m"])
    assert code == 1
    assert "moco.queue_size=8: must be >= 16" in told
    with open(tmp_path / "sweep" / "table.csv") as file:
        states = {row["moco.queue_size"]: row["state"] for row in csv.DictReader(file)}
    assert states["48"] == "epoch 1 of 2"
    assert states["8"] == "not trained, see its log.txt"
