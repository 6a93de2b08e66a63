"""The command line: mistakes without a traceback, names of runs."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import NASTY, ROOT, in_shell, one_source, quoted


@pytest.mark.parametrize(
    "words", [["train.lrr=1"], ["+train.lrr=1"], ["train.lr=fast"], ["experiment=dmeo"], ["backbone=big"], ["train.lr=-1"]]
)
def test_the_command_line_refuses_a_mistake_in_one_line(words, tmp_path):
    told, code = in_shell(*words, cwd=tmp_path)
    assert code == 1
    [told] = told.strip().splitlines()
    assert words[0].split("=")[0].lstrip("+").split(".")[-1] in told or words[0].split("=")[1] in told


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


def test_the_home_folder_may_be_typed(tmp_path):
    told, code = in_shell("--cfg", "job", "data.digiface_glob=~/faces/*.parquet", "run_dir=~/mine", cwd=tmp_path)
    assert code == 0, told
    assert f"digiface_glob: {Path.home()}/faces/*.parquet\n" in told
    assert f"run_dir: {Path.home()}/mine\n" in told


@pytest.mark.parametrize(
    ("word", "spelling"),
    [
        ("train", "command=train"), ("train.lr", "train.lr=VALUE"), ("run=it's", r"""'run="it'"'"'s"'"""),
        ("data.digiface_glob=a=b.parquet", """'data.digiface_glob="a=b.parquet"'"""),
        ("data.digiface_glob=faces[1]/x.parquet", """'data.digiface_glob="faces[1]/x.parquet"'"""),
        ('run=a"b\\', r"""'run="a\"b\\"'"""),
    ],
)  # fmt: skip
def test_a_word_that_cannot_be_read_ends_in_one_line_with_the_spelling_that_works(word, spelling, tmp_path):
    told, code = in_shell(word, cwd=tmp_path)
    assert code == 1
    assert told.strip() == f"sniperface: {word}: cannot be read; write {spelling}"
    if "VALUE" not in spelling:
        (read,) = OverridesParser.create().parse_overrides(shlex.split(spelling))
        assert read.value() == (word.split("=", 1)[1] if "=" in word else word)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs=3"], "--epochs=3: settings have no dashes; write train.epochs=3"),
        (["--batch-size", "3"], "--batch-size: settings have no dashes; write train.batch_size=VALUE"),
        (["--train.lr=1"], "--train.lr=1: settings have no dashes; write train.lr=1"),
        (["--run=mine"], "--run=mine: settings have no dashes; write run=mine"),
        (["--rubbish=3"], "unrecognized arguments: --rubbish=3; settings have no dashes, see conf/config.yaml"),
        (
            ["data.digiface_glob=a,b.parquet"],
            "data.digiface_glob=a,b.parquet: cannot be read; write 'data.digiface_glob=\"a,b.parquet\"', "
            "or add -m for a sweep over these values",
        ),
    ],
)  # fmt: skip
def test_habits_of_other_programs_end_in_one_line_with_the_spelling_that_works(words, told, tmp_path):
    assert in_shell(*words, cwd=tmp_path) == (f"sniperface: {told}\n", 1)
