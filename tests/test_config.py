"""Settings: every key is explained and typed, every mistake is told in a line or two, the three files know only what they may."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException
from runs import ROOT, RUN, in_shell, settings

import sniperface
from sniperface import CONF, flat


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


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = [
        "data.digiface_glob", "data.digi2real_glob", "split.out_dir", "data.cache_dir", "embed.test_glob", "embed.checkpoint",
        "embed.out", "eval.pairs", "eval.embeddings", "report.runs",
    ]  # fmt: skip
    found = flat(dataclasses.asdict(settings(*(f"{key}='~/a b/{key}*'" for key in keys))))
    (found["eval.pairs"],) = found["eval.pairs"]
    assert [found[key] for key in keys] == [f"/home/me/a b/{key}*" for key in keys]


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_is_explained_on_its_line(path):
    silent = []
    for line in path.read_text().splitlines():
        sets_a_value = re.match(r"\s*[\w.]+: *[^#\s]", line) and not line.strip().startswith("#")
        in_a_recipe = path.parent.name == "experiment"  # a recipe's keys are explained in config.yaml
        if sets_a_value and not in_a_recipe and not re.search(r"#\s*\S", line):
            silent.append(line)
    assert not silent


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_says_what_it_is(name):
    assert settings(f"experiment={name}").run
    head = (CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert "Machine:" in head
    assert "Expected:" in head
    assert f"experiment={name}" in head


@pytest.mark.parametrize("group", ["backbone", "augment", "curriculum"])
def test_every_choice_of_a_group_composes_and_bears_its_name(group):
    for path in (CONF / group).glob("*.yaml"):
        assert getattr(settings(f"{group}={path.stem}"), group).name == path.stem


def test_an_experiment_changes_nothing_that_it_does_not_name():
    plain, recipe = (flat(sniperface.dataclasses.asdict(settings(*words))) for words in ((), ("experiment=usynthface",)))
    changed = {key for key in plain if plain[key] != recipe[key]}
    assert {"run", "run_dir", "train.epochs", "train.amp"} <= changed
    assert all(
        key.split(".")[0] in ("run", "run_dir", "augment", "curriculum") or key in ("train.epochs", "train.amp") for key in changed
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.lr=-1", "train.lr=-1.0: must be > 0"),
        ("train.lr=fast", "train.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("+train.lrr=1", "lrr"),
        ("train.amp=fp8", "train.amp=fp8: must be one of auto, bf16, fp16, fp32"),
        ("moco.queue_size=100", "moco.queue_size=100: must be >= 512"),
        ("backbone.layers=[1,2]", "backbone.layers=[1, 2]: must be four numbers"),
        ("split.train_ratio=1", "split.train_ratio=1.0: must be < 1"),
        ("command=trian", "command=trian: must be one of"),
        ("augment.zoom.p=2", "augment.zoom.p=2.0: must be <= 1"),
        ("curriculum.progress=[0,2]", "curriculum.progress"),
        ("eval.top_k=[0]", "eval.top_k=[0]: must be >= 1"),
    ],
)
def test_a_wrong_value_names_the_key_what_was_given_and_what_is_allowed(override, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        settings(override)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_batch_set_alone_takes_the_queue_along_and_says_so(caplog):
    cfg = settings("train.batch_size=4000", "moco.symmetric=true", "backbone=tiny", "experiment=demo")
    assert cfg.moco.queue_size == 512  # as asked, also in what the run saves
    assert caplog.messages == ["moco.queue_size=512 is less than the keys of one step: 8000 are kept"]
    assert len(sniperface.build_model(cfg).queue) == 8000
    with pytest.raises(ValueError, match=r"moco\.queue_size=32768: must be >= 40000, .*train\.batch_size"):
        settings("train.batch_size=40000", "moco.queue_size=32768")


GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "line", "found", "cure"),
    [
        (GLOBAL + "train:\n\tlr: 1\n", 3, "\\t", "no tabs"),
        (GLOBAL + "train:\n  lr: 1\n  lr: 2\n", 4, "duplicate key lr", "no tabs"),
        ("train:\n  lr: 1\n", 1, "experiment", "'# @package _global_'"),
        ("", 1, "experiment", "'# @package _global_'"),
        (GLOBAL + "run: x\ntrain:\n  lr: 1\n  lrr: 1\n", 5, "train.lrr", "see conf/config.yaml for the settings"),
        (GLOBAL + "train.lr: 1\n", 2, "train.lr", "see conf/config.yaml for the settings"),
        (GLOBAL + "train:\n  lr: -1\n", 3, "train.lr=-1.0", "must be > 0"),
    ],
)
def test_a_mistake_in_an_experiment_file_is_told_with_file_and_line_and_cure(text, line, found, cure, tmp_path):
    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    told, code = in_shell("--config-dir", str(tmp_path / "conf"), "experiment=mine", cwd=tmp_path)
    assert code == 1
    [told] = told.strip().splitlines()
    assert told.startswith(f"sniperface: {path}, line {line}: ")
    assert found in told
    assert told.endswith(cure)


def imports_of(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return modules | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_imports_go_one_way():
    ours = {"sniperface", "moco", "dataio"}
    assert not imports_of("moco") & ours
    assert not imports_of("dataio") & ours
    assert {"moco", "dataio"} <= imports_of("sniperface")


def test_heavy_libraries_are_imported_where_they_are_used():
    code = "import sys, sniperface; print([m for m in ('faiss', 'polars', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_unpickled_and_nothing_is_instantiated_from_a_name():
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        assert "instantiate" not in source
        assert ("import pickle" in source) == (path.name == "dataio.py")
        # of BinUnpickler, which looks no name up
        assert set(re.findall(r"pickle\.\w+", source)) <= {"pickle._Unpickler", "pickle.BYTEARRAY8"}, path
        assert source.count("torch.load(") == source.count("weights_only=True"), path


def test_the_top_level_holds_what_it_should_and_nothing_else():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.splitlines()
    top = {Path(name).parts[0] for name in listed}
    allowed = {"pyproject.toml", "conf", "sniperface.py", "moco.py", "dataio.py", "README.md", "tests"}
    assert {name for name in top if not name.startswith(".")} <= allowed
