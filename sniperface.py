"""SniperFace: train a face encoder without labels, export its vectors, measure it on identities it has never seen.

    uv run python sniperface.py [command=pack|split|check|train|embed|eval|all|report|export] [overrides]

Each command below reads from top to bottom; what it decodes, builds or computes is in dataio.py and moco.py. Settings and what each
one means: conf/config.yaml. Everything a run makes is in runs/<run>/.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import glob
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

import dataio
import moco
from dataio import draw, draw_seed, first_line, progress, write_text, write_whole

log = logging.getLogger("sniperface")
PROGRAM = Path(__file__).resolve().parent
CONF = PROGRAM / "conf"

# ---- Settings ----


@dataclass
class EmbedConfig:
    checkpoint: str
    split: str = field(metadata={"one_of": ("test", "val")})
    test_glob: str | None
    batch_size: int = field(metadata={"at_least": 1})
    flip: bool
    whiten: str = field(metadata={"one_of": ("train", "none")})
    align: str = field(metadata={"one_of": ("none", "mean")})
    references: bool
    leak_check: bool
    out: str | None


@dataclass
class ReportConfig:
    runs: str | None


@dataclass
class ExportConfig:
    out: str
    formats: list[str] = field(metadata={"one_of": ("onnx", "safetensors", "pt")})
    input: str = field(metadata={"one_of": ("uint8", "float", "normalised")})
    parity_pictures: int = field(metadata={"at_least": 1})


@dataclass
class Config:
    command: str = field(metadata={"one_of": ("pack", "split", "check", "train", "embed", "eval", "all", "report", "export")})
    run: str
    run_dir: str
    seed: int = field(metadata={"at_least": 0})
    device: str
    deterministic: bool
    pack: dataio.PackConfig
    data: dataio.DataConfig
    split: dataio.SplitConfig
    curriculum: dataio.CurriculumConfig
    augment: dataio.AugmentConfig
    backbone: moco.BackboneConfig
    positives: moco.PositivesConfig
    moco: moco.MocoConfig
    train: moco.TrainConfig
    embed: EmbedConfig
    eval: moco.EvalConfig
    report: ReportConfig
    export: ExportConfig


LIMITS: dict[str, tuple[str, Callable]] = {
    "above": (">", operator.gt), "at_least": (">=", operator.ge), "below": ("<", operator.lt), "at_most": ("<=", operator.le),
    "one_of": ("one of", lambda value, allowed: value in allowed),
}  # fmt: skip


def check_ranges(cfg: object, prefix: str = "") -> None:
    """Check each setting against the limits beside its type; ValueError names the key, the value and what is allowed."""
    for entry in dataclasses.fields(cfg):
        value, key = getattr(cfg, entry.name), prefix + entry.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, key + ".")
            continue
        values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        if any(isinstance(v, float) and not math.isfinite(v) for v in values):
            raise ValueError(f"{key}={value}: must be finite")
        if value == [] and entry.metadata:
            raise ValueError(f"{key}=[]: must hold at least one value")
        for name, limit in entry.metadata.items():
            sign, fits = LIMITS[name]
            if not all(fits(v, limit) for v in values):
                shown = ", ".join(map(str, limit)) if name == "one_of" else limit
                raise ValueError(f"{key}={value}: must be {sign} {shown}")


def under(key: str, sections: Iterable[str]) -> bool:
    """Whether a key is one of `sections` or inside one: train.lr is under train."""
    return any((key + ".").startswith(section + ".") for section in sections)


def keys_of_step(cfg: Config) -> int:
    return cfg.train.batch_size * (2 if cfg.moco.symmetric else 1)


def check_together(cfg: Config, typed: Iterable[str]) -> None:
    """Check settings that limit each other; a queue that nobody typed holds at least a step's keys. Raises ValueError."""
    points, shares = cfg.curriculum.progress, cfg.curriculum.digiface_share
    if len(points) != len(shares) or sorted(set(points)) != points or not all(0 <= v <= 1 for v in points + shares):
        raise ValueError(
            f"curriculum.progress={points}, digiface_share={shares}: two lists of one length in 0..1, progress ascending"
        )
    keys = keys_of_step(cfg)
    if cfg.moco.queue_size < keys:
        if under("moco.queue_size", typed):
            raise ValueError(f"moco.queue_size={cfg.moco.queue_size}: must be >= {keys}, the keys of one step (train.batch_size)")
        log.warning("moco.queue_size=%d is less than the keys of one step: %d are kept", cfg.moco.queue_size, keys)
    for name, op in cfg.augment.ops.items():
        if op.low > op.high or (op.low <= 0 and name in ("zoom", "aspect")):
            raise ValueError(f"augment.{name}: low={op.low} must be <= high={op.high}, and > 0 for zoom and aspect")
    if cfg.train.probe_every_epochs and not cfg.split.validation_ratio:
        raise ValueError(f"train.probe_every_epochs={cfg.train.probe_every_epochs}: needs split.validation_ratio above 0")
    if cfg.positives.name != "self" and cfg.data.cache == "none" and cfg.command in ("train", "all", "check"):
        raise ValueError(f"positives={cfg.positives.name}: the linked pictures are taken from a cache; set data.cache=decoded")
    if cfg.eval.out and not cfg.eval.out.endswith(".json"):  # else x and x.json would share their pictures
        raise ValueError(f"eval.out={cfg.eval.out}: must end in .json; its pictures are named after it")
    if len(cfg.backbone.layers) != 4:
        raise ValueError(f"backbone.layers={cfg.backbone.layers}: must be four numbers")


def expand_home(value: object) -> object:
    """Settings, nested or not, with `~/` for the home folder where one begins with it: only paths do."""
    if isinstance(value, dict):
        return {key: expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def load_config(raw: DictConfig, typed: Iterable[str] = ()) -> Config:
    """The composed settings, some keys `typed` by the user, as a `Config`; ValueError, in one line, for an unknown or a bad one."""
    try:
        plain = expand_home(OmegaConf.to_container(raw, resolve=True))
        for section, key in (("pack", "source"), ("eval", "pairs")):  # one path, or several
            plain[section][key] = [value] if isinstance(value := plain[section][key], str) else value or []
        cfg: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except Exception as error:  # omegaconf's errors say the key in a line of their own
        lines = [line.strip() for line in str(error).splitlines()]
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        cure = "begin the file with '# @package _global_'" if key == "experiment" else "see conf/config.yaml for the settings"
        raise ValueError(f"{key}: {lines[0]}; {cure}") from error
    check_ranges(cfg)
    check_together(cfg, typed)
    return cfg


def lines_of(node: yaml.Node, prefix: str = "") -> dict[str, int]:
    """The line of each key of a YAML file, keys as in `flat`."""
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        lines |= {prefix + key.value: key.start_mark.line + 1, **lines_of(value, f"{prefix}{key.value}.")}
    return lines


def place_of(key: str) -> str:
    """Where the chosen files of conf/ set a key: "FILE, line N: ", or nothing."""
    runtime = HydraConfig.get().runtime
    for group, choice in reversed([("", "config"), *runtime.choices.items()]):
        for path in filter(Path.is_file, (Path(source.path, group, f"{choice}.yaml") for source in runtime.config_sources)):
            package = "" if "@package _global_" in (text := path.read_text()) else group
            lines = {package: 1} | lines_of(yaml.compose(text), f"{package}.".lstrip("."))
            if key and key in lines:
                return f"{path}, line {lines[key]}: "
    return ""


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings as {"train.lr": 0.1, ...}."""
    pairs: dict[str, object] = {}
    for key, value in settings.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


DEFAULTS = flat(OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml")))  # a newer setting's is what was done before it
NOT_THE_RESULT = (                                           # settings that may differ when a run goes on
    "command", "run", "run_dir", "device", "deterministic", "pack", "data.digiface_glob", "data.digi2real_glob",
    "data.workers", "data.cache", "data.cache_dir", "data.batch_read_rows", "data.max_bad_fraction", "split.out_dir",
    "split.materialize", "train.compile", "train.max_steps", "train.min_spread", "train.min_gap", "train.when_stuck",
    "train.probe_every_epochs", "train.log_every", "train.save_every_epochs", "train.save_every_steps", "train.keep_last",
    "train.resume", "train.extend", "embed", "eval", "report", "export",
)  # fmt: skip


def differences(saved: dict, asked: dict) -> dict[str, tuple]:
    """Settings of two runs that differ and decide the result: {key: (saved, asked)}."""
    a, b = flat(saved), flat(asked)
    a |= {key: DEFAULTS[key] for key in (b.keys() - a.keys()) & DEFAULTS.keys()}
    pairs = {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
    return {key: pair for key, pair in pairs.items() if not under(key, NOT_THE_RESULT)}


OF_EACH = ("command", "run", "run_dir")  # another one for each run and command
ALWAYS_AS_ASKED = (*OF_EACH, "device", "pack", "embed", "eval", "report", "export")
AS_TYPED = ("data", "split", "embed.flip")  # as the run was trained, unless typed anew


def settings_of(saved: dict, cfg: Config, typed: set[str]) -> Config:
    """The saved settings of a run, with `data`, `split`, `embed` and the like as typed now.

    Raises ValueError where a typed setting contradicts how the run was trained.
    """
    saved, merged = flat(saved), OmegaConf.create()
    if any("${" in str(value) for value in saved.values()):
        raise ValueError("the saved settings hold an interpolation, which this program never writes; do not use unknown files")
    for key, value in flat(dataclasses.asdict(cfg)).items():
        is_typed, trained_with = under(key, typed), saved.get(key, DEFAULTS.get(key, value))
        as_asked = under(key, ALWAYS_AS_ASKED) and not under(key, AS_TYPED)
        as_asked |= is_typed and under(key, AS_TYPED) and key != "data.image_size"
        if is_typed and not as_asked and trained_with != value and not under(key, NOT_THE_RESULT):
            raise ValueError(f"{key}={value}: the checkpoint was trained with {trained_with}; leave it out, or train another run")
        OmegaConf.update(merged, key, value if as_asked else trained_with)
    return load_config(merged)


# ---- The run folder and its checkpoints ----


def configure_process(device: torch.device, deterministic: bool, tf32: bool) -> None:
    """Set what torch keeps for the whole process, in full each time: the jobs of a sweep share one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; without it no deterministic product
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # each value of ours is written before it is read
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.allow_tf32 = tf32


def describe_machine(device: torch.device) -> dict:
    """What else is needed to repeat a run: versions, commit, hardware."""
    packages = ("torch", "torchvision", "numpy", "pyarrow", "hydra-core", "pillow")
    git = ["git", "-C", str(PROGRAM), "status", "--porcelain=v2", "--branch"]
    done = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    told = done.stdout.splitlines() if done and done.returncode == 0 else []
    return {
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "commit": next((line.split()[2] for line in told if line.startswith("# branch.oid")), None),
        "uncommitted_changes": any(not line.startswith("#") for line in told) if told else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    }


def read_saved_settings(path: Path) -> dict:
    """The config.yaml of a run, interpolations as they stand. Raises ValueError for a file that is not one."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(saved, dict) or not isinstance(saved.get("data"), dict):
            raise ValueError("no settings of a run")
        return saved
    except Exception as error:  # yaml's and omegaconf's
        raise ValueError(f"{path}: cannot be used: {first_line(error)}") from error


def read_log(run: Path) -> list[dict]:
    path, lines = run / "train_log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that goes on, or was killed, may be half a line
            lines.append(json.loads(line))
    return lines


def read_starts(folder: Path) -> list[dict]:
    """environment.json: of each start of the run what it ran on."""
    path = folder / "environment.json"
    with dataio.naming(path):
        return json.loads(path.read_text()) if path.exists() else []


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Only one process trains in a run folder. Raises ValueError for the second one."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(dataio.locked(folder / ".lock", wait=False))
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is training here; wait for it, or choose another run=") from error
        for stale in folder.glob("checkpoints/.*.tmp"):  # of a process that was killed, maybe in another container
            stale.unlink()
        yield


def write_checkpoint(state: dict, path: Path) -> None:
    with write_whole(path) as temporary:
        try:
            torch.save(state, temporary)
            moco.seal(temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path}: cannot be written ({first_line(error)}); is the disk full?") from error


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint: tensors and plain values, nothing in it is executed. Raises ValueError if damaged or foreign."""
    try:
        moco.check_seal(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise a dozen types for damaged files
        raise ValueError(f"{path}: cannot be used: {first_line(error)}") from error


def link(target: Path, name: Path) -> None:
    """Let `name` mean the file `target`, at once, without a copy where the disk can link."""
    with write_whole(name) as temporary:
        try:
            os.link(target, temporary)
        except OSError:
            shutil.copyfile(target, temporary)


def latest_checkpoint(folder: Path) -> dict | None:
    """The newest readable checkpoint of a run, None if there never was one. Raises ValueError if there are only damaged ones."""
    paths = list(folder.glob("checkpoints/*.pt"))
    order = {"last.pt": 0, "best.pt": 2}  # best.pt may be older than all others
    for path in sorted(paths, key=lambda path: (order.get(path.name, 1), -path.stat().st_mtime_ns)):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            log.error("%s; trying the one before", error)
    if paths:
        raise ValueError(
            f"{folder}/checkpoints: none of {len(paths)} checkpoints can be read; delete the folder to train from scratch"
        )
    return None


def find_checkpoint(name: str, folder: Path) -> Path:
    """`last`, `best`, `epoch_XX` of this run, or a path. Raises FileNotFoundError that says what there is."""
    path = Path(name) if name.endswith((".pt", ".pth", ".safetensors")) else folder / "checkpoints" / f"{name}.pt"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in (folder / "checkpoints").glob("*.pt"))) or "none"
        raise FileNotFoundError(
            f"{path}: no such checkpoint (embed.checkpoint={name}); in {folder}: {there}. command=train makes them"
        )
    return path


def rotate_checkpoints(folder: Path, cfg: moco.TrainConfig) -> None:
    """Delete all but the two newest of step_*.pt and the newest of epoch_*.pt; final, best.pt and last.pt stay.

    By time, not by number: after a resume from an older one, those with higher numbers are the old ones.
    """
    for pattern, keep in (("step_*.pt", 2), ("epoch_*.pt", cfg.keep_last)):
        old = sorted(folder.glob(f"checkpoints/{pattern}"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in old[:-keep]:
            if path.name != f"epoch_{cfg.epochs:02d}.pt":
                path.unlink()


def free_run_name(folder: Path) -> str:
    """The next name of a run that is not taken: run_001 -> run_002."""
    stem = folder.name.rstrip("0123456789").rstrip("_") or "run"
    return next(name for n in itertools.count(1) if not (folder.parent / (name := f"{stem}_{n:03d}")).exists())


def in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def note_of(rows: dataio.Rows) -> dict:
    """What checkpoints tell of the data."""
    marks = {source: dataio.mark_files(index) for source, index in rows.indices.items()}
    return {"table": rows.tables[0], "shards": rows.shards, "files": marks}


def find_start(cfg: Config, folder: Path) -> dict | None:
    """The checkpoint to go on from, None for a new run.

    Raises ValueError if going on would mix two runs, with the command that does what was asked.
    """
    if cfg.train.resume == "never":
        if (folder / "train_log.jsonl").exists():
            raise ValueError(
                f"{folder} holds a run and train.resume=never; set another run=, for instance run={free_run_name(folder)}"
            )
        return None
    saved = latest_checkpoint(folder)
    if saved is None and cfg.train.resume == "must":
        raise FileNotFoundError(f"{folder}/checkpoints: nothing to resume, and train.resume=must")
    changed = differences(saved["config"], dataclasses.asdict(cfg)) if saved else {}
    was, now = changed.get("train.epochs", (0, 0))
    longer = now > was and changed.keys() <= {"train.epochs", "train.lr", "train.lr_schedule", "train.warmup_epochs"}
    if cfg.train.extend and longer:
        saved["meta"]["extended"] = [*saved["meta"].get("extended", []), was]
    elif changed:
        told = "; ".join(f"{key} was {was!r}, asked is {now!r}" for key, (was, now) in list(changed.items())[:6])
        words = [word for word in sys.argv[1:] if not word.startswith("run=")]
        again = f"uv run python sniperface.py {shlex.join(words)}".strip()
        name = free_run_name(folder.parent if in_sweep() else folder)
        further = "\nTo train this one on after its end, add train.extend=true" if longer else ""
        raise ValueError(f"{folder} holds another run: {told}.\nFor a new one: {again} run={name}{further}")
    return saved


def check_same_data(saved: dict, found: dict, tables: list[str], cfg: Config, folder: Path) -> None:
    """Raise ValueError if the rows, their order or their split are not those that the run was started on."""
    meta, cache = saved["meta"], saved["config"]["data"]["cache"]
    if (cache == "none") != (cfg.data.cache == "none"):
        raise ValueError(
            f"{folder} was started with data.cache={cache}, {cfg.data.cache} draws in another order; set that, or run="
        )
    if "files" not in meta:
        told = f"{folder}: its checkpoints are of an older program and do not tell whether the data is the same"
        raise ValueError(f"{told}; set run={free_run_name(folder)}")
    told = [] if meta["table"] in tables else [f"split table {meta['table']} is {tables[0]} now"]  # it may have grown since
    for source in sorted(meta["files"] | found["files"]):
        marks = [there["files"].get(source, []) for there in (meta, found)]
        told += [f"{source}: {what}" for what in dataio.changed_files(*marks, cache == "none")]
        anew = [now["name"] for was, now in zip(*marks, strict=False) if was["bytes"] != now["bytes"]]
        if anew and not told:
            what = "rows, people and the sample of pictures are the same, the other pictures are taken to be"
            log.warning("%s: %d files, such as %s, were written anew: %s", source, len(anew), anew[0], what)
    if told:
        told = "; ".join(told[:6] + ["and so on"] * (len(told) > 6))
        told = f"{folder}: the data is not what the run was started on: {told}"
        raise ValueError(f"{told}; restore files and order, or set run={free_run_name(folder)}")


def embedded_rows(cfg: Config, side: str | None) -> dataio.Rows:
    """The rows of a side of the split, or, where it is None, all rows of embed.test_glob."""
    return dataio.find_rows(cfg.data, cfg.split, side) if side else dataio.find_given_rows(cfg.embed.test_glob, cfg.data.columns)


# ---- Pictures ----

STYLES = ("-", "--", ":", "-.")  # told apart in black and white, with the marks 16 of them
GREYS = ("black", "#555555", "#888888", "#aaaaaa")
MARKS = ("", "o", "s", "^")
CMC_AXES = {"xlabel": "rank", "ylabel": "share of probes found", "ylim": (0, 1), "xticks": (1, 5, 10, 15, 20)}


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is there; says once how to get it."""
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no pictures: matplotlib is missing; run with `uv run --extra plots python sniperface.py ...`")
        return False
    return True


@contextlib.contextmanager
def not_vital(what: str) -> Iterator[None]:
    """What only shows a run must not end days of training."""
    try:
        yield
    except Exception as error:
        log.warning("no %s: %s", what, first_line(error))


@contextlib.contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.6) -> Iterator[np.ndarray]:
    """Axes [rows, columns] to draw on; the picture is saved whole when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False)
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curve(axes, x, y, label: str, style: int = 0, **labels) -> None:
    """One line of numbers, or of rates with the band of their intervals; the n-th style is told apart without colour."""
    grey, mark = GREYS[style % 4], {"marker": MARKS[style // 4 % 4], "markersize": 4, "markevery": max(1, len(x) // 8)}
    if len(y) and isinstance(y[0], moco.Rate):
        axes.fill_between(x, [rate.low for rate in y], [rate.high for rate in y], color=grey, alpha=0.18, linewidth=0)
        y = [rate.value for rate in y]
    axes.plot(x, y, STYLES[style % 4], color=grey, label=label, linewidth=1.4, **mark)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def draw_training(folder: Path) -> None:
    """train.png: the loss beside its chance level, cosines, top-1, probe, spread, learning rate, share of DigiFace, the monitor."""
    lines = read_log(folder)
    if not can_draw() or not lines:
        return
    whole = {"ylim": (0, 1.05)}  # else an axis that zooms exaggerates noise
    panels = (
        (("loss", "chance_loss"), "loss [nats]", {}),
        (("pos_sim", "neg_sim", "neg_max"), "cosine", {}),
        (("instance_top1", "digiface_share", "probe_rank1", "probe_tar@0.01", "links_right", "links_covered"), "share", whole),
        (("spread",), "spread (1 even, 0 collapsed)", whole),
        (("lr",), "learning rate", {}),
        (("monitor_loss", "monitor_untrained"), "monitor loss [nats]", {}),
    )
    with picture(folder / "plots" / "train.png", 2, 3, 4.2, 3.0) as axes:
        for panel, (names, unit, limits) in zip(axes.flat, panels, strict=True):
            for style, name in enumerate(names):
                if there := {line["step"]: line[name] for line in lines if name in line}:
                    curve(panel, list(there), list(there.values()), name, style, xlabel="step", ylabel=unit, **limits)


def draw_views(images: Tensor, views: tuple[Tensor, Tensor], path: Path) -> None:
    """A sheet of pairs, a column an image: the picture, the query's view, the key's view. A person must still see who it is."""
    rows = [images[:12], *(((view[:12] + 1) * 127.5).round().to(torch.uint8) for view in views)]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # [3, 3*S, 12*S]
    with write_whole(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(temporary, "png")
    log.info("%s: two views of each picture, as the encoder will see them; a person should still tell who it is", path)


def draw_alignment(path: Path, mean: Tensor, train_mean: Tensor) -> None:
    """The mean pictures [3, S, S], in 0..255, of the train rows and of what is embedded, and their difference about mid-grey."""
    if not can_draw():
        return
    shown = {"train rows, mean": train_mean, "embedded, mean": mean, "difference": (mean - train_mean) / 2 + 127.5}
    with picture(path, 1, 3, 3.0, 3.3) as axes:
        for panel, (title, image) in zip(axes.flat, shown.items(), strict=True):
            panel.imshow(image.permute(1, 2, 0).numpy() / 255)
            panel.set(title=title, xticks=[], yticks=[])


def draw_similarity(path: Path, ours: moco.Measured) -> None:
    """Densities of the genuine and of the impostor cosines, and the thresholds of some FAR."""
    edges = np.linspace(-1, 1, 33)
    scores = {"genuine": np.histogram(ours.genuine.clip(-1, 1), edges)[0], "impostors": ours.impostors.reshape(32, -1).sum(axis=1)}
    middle = (edges[:-1] + edges[1:]) / 2
    with picture(path, width=6) as axes:
        panel = axes[0, 0]
        for style, (name, counts) in enumerate(scores.items()):
            density = counts / counts.sum() / np.diff(edges)
            curve(panel, middle, density, name, style, xlabel="cosine of probe and template", ylabel="density")
        panel.set(xlim=(float(middle[counts > 0][0]) - 0.05, 1), ylim=(0, 1.3 * panel.get_ylim()[1]))  # room for words
        for far, at in ours.thresholds.items():
            if at is not None and far in (1e-2, 1e-3, 1e-4):
                panel.axvline(at, color="black", linewidth=0.6)
                panel.text(at, panel.get_ylim()[1], f"FAR {far:g}", rotation=90, va="top", ha="right", fontsize=7)


def draw_neighbours(path: Path, data: dataio.VectorTable, ours: moco.Measured, cfg: Config) -> None:
    """Probes with their five nearest templates, each as its first enrolled picture: worst mistakes first, then some hits."""
    drawn, found = ours.drawn, ours.found
    first = np.unique(drawn.identity[drawn.enrolled], return_index=True)[1]
    faces = drawn.enrolled[first] if cfg.eval.template == "centroid" else drawn.enrolled  # [R] one for each row of the gallery
    margin = found.score[:, 0] - ours.genuine  # by how much a wrong template won
    order = np.argsort(np.where(found.rank > 1, -margin, np.inf), kind="stable")
    wrong = int((found.rank > 1).sum())
    shown = np.concatenate([order[: min(6, wrong)], order[wrong : wrong + 2]])
    rows = np.concatenate([drawn.probes[shown][:, None], faces[found.row[shown]]], axis=1)  # [8, 6] of the file
    keys = {row: (data.sources[row], data.files[row], data.names[row]) for row in rows.ravel().tolist()}
    side, pictures, wanted = data.note.get("split"), {}, set(keys.values())
    with contextlib.suppress(ValueError, OSError):
        if side or cfg.embed.test_glob:  # else they are vectors of other files than the run's
            pictures = dataio.find_pictures(embedded_rows(cfg, side), wanted, cfg.data)
    if not wanted <= pictures.keys():
        log.info("no neighbours.png: the pictures of these embeddings are not where the settings say")
        return
    with picture(path, *rows.shape, 1.1, 1.3) as axes:
        for i, j in np.ndindex(rows.shape):
            panel, right = axes[i, j], data.names[rows[i, j]] == data.names[rows[i, 0]]
            panel.imshow(pictures[keys[rows[i, j]]])
            panel.set(xticks=[], yticks=[])
            title = "probe" if j == 0 else f"{found.score[shown[i], j - 1]:.2f} {'right' if right else 'wrong'}"
            panel.set_title(title, fontsize=7, fontweight="bold" if j and right else "normal")
            for spine in panel.spines.values():
                spine.set(linewidth=3 if j and right else 0.5, linestyle="-" if j == 0 or right else ":")


def draw_results(
    files: dict[str, Path], data: dataio.VectorTable, measured: dict[str, moco.Measured], cfg: Config, gallery: int
) -> None:
    """The pictures of one evaluation; those of an earlier one of its name go first, since not each can always be drawn."""
    for name in PICTURES[:-1]:
        files[name].unlink(missing_ok=True)
    if not can_draw():
        return
    ours, ranks = measured["trained"], np.array(moco.CMC_RANKS)
    with picture(files["cmc"]) as axes:
        for style, (name, found) in enumerate(measured.items()):
            curve(axes[0, 0], ranks, found.cmc, name, style, **CMC_AXES)
        curve(axes[0, 0], ranks, np.minimum(1, ranks / gallery), "chance", len(measured))
    if ours.roc:  # else there are too few impostors for any point of it
        with picture(files["roc"]) as axes:
            units = {"xlabel": "false accept rate", "ylabel": "true accept rate", "xscale": "log", "ylim": (0, 1)}
            for style, (name, found) in enumerate(measured.items()):
                curve(axes[0, 0], list(found.roc), list(found.roc.values()), name, style, **units)
            curve(axes[0, 0], list(ours.roc), list(ours.roc), "chance", len(measured))
    draw_similarity(files["similarity"], ours)
    draw_neighbours(files["neighbours"], data, ours, cfg)


# ---- pack ----


def short_name(path: str) -> str:
    """The last part of a path or pattern that has a name, without wildcards and suffix: faces/lfw/*.parquet -> lfw"""
    parts = reversed(Path(os.path.abspath(path)).parts)
    names = (re.sub(r"(\[.*?\]|[^\w-]|_)+", "_", Path(part).stem).strip("_-") for part in parts)
    return next(filter(None, names), "files")


def pack(cfg: Config, *_: object) -> None:
    """Pack pictures in folders and archives, or a benchmark of pairs, as parquet."""
    benchmark, given = cfg.pack.benchmark, [*filter(None, [cfg.pack.benchmark, *cfg.pack.source])]
    if bool(benchmark) == bool(cfg.pack.source):
        raise ValueError(f"command=pack takes pack.source=faces.zip or pack.benchmark=lfw.bin, one of them; given: {given}")
    out = Path((cfg.pack.out or f"data/{short_name(given[0].replace('.tar.', '.'))}").removesuffix(".parquet"))
    if not benchmark:
        dataio.pack(cfg.pack.source, out, cfg.data)
        return
    if (cfg.pack.pairs is None) != (Path(benchmark).suffix == ".bin"):
        raise ValueError(f"pack.benchmark={benchmark}: folders and archives need their list, pack.pairs=pairs.txt; a .bin holds it")
    images, pairs = dataio.pack_benchmark(benchmark, cfg.pack.pairs, out, cfg.data)
    told = "%s, %s; measure by command=embed embed.test_glob=%s, then command=eval with the same and eval.pairs=%s"
    log.info(told, images, pairs, images, pairs)


# ---- split ----


def split(cfg: Config, *_: object) -> None:
    """Write the split table, extended to new identities, and, if asked for, each side as shards."""
    splits = dataio.find_splits(cfg.data, cfg.split, extend=True)
    log.info("%s: %s", cfg.split.table, splits)
    if cfg.split.materialize == "no":
        return
    sides = [side for side, identities in splits.identities.items() if identities]
    for side, (source, paths) in itertools.product(sides, dataio.find_sources(cfg.data).items()):
        out_dir = Path(cfg.split.out_dir) / side / source
        shards = dataio.materialize_split(paths, cfg.split.table, out_dir, side, cfg.data.columns)
        log.info("%s: %d shards, %.2f GB", out_dir, len(shards), sum(path.stat().st_size for path in shards) / 1e9)


# ---- train ----


class StopAsked:
    """Notes the first SIGINT or SIGTERM, so that training stops at the next step boundary; the second one stops at once."""

    def __enter__(self) -> "StopAsked":
        self.signal: int | None = None
        self.usual = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)


class Timer:
    """Images a second and the share of the time that steps waited for data, since the last lap."""

    def __init__(self) -> None:
        self.started = self.lap_started = time.perf_counter()
        self.images, self.waited = 0, 0.0

    def next(self, batches: Iterator[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        start = time.perf_counter()
        images, others = next(batches)
        self.waited, self.images = self.waited + time.perf_counter() - start, self.images + len(images)
        return images, others

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile counts neither as steps nor as waiting."""
        start = time.perf_counter()
        yield
        passed = time.perf_counter() - start
        self.lap_started, self.waited = self.lap_started + passed, self.waited - passed

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        passed, rate = now - self.lap_started, self.images / (now - self.lap_started)
        figures = {
            "images_per_s": round(rate, 1),
            "data_wait": round(self.waited / passed, 4),
            "seconds": round(now - self.started, 2),
        }
        self.lap_started, self.images, self.waited = now, 0, 0.0
        return figures


class Run(NamedTuple):
    """What a training run is made of."""

    cfg: Config
    folder: Path
    training: moco.Training
    mix: dataio.CurriculumMixStream
    meta: dict  # split table, data and machine of this start
    probe: dataio.Rows | None = None  # of the validation identities

    @property
    def schedule(self) -> dataio.Schedule:
        return self.mix.schedule

    @property
    def warmup(self) -> float:
        """Steps of the warm-up, counted like the rate from `schedule.begins` on."""
        return moco.warmup_steps(self.schedule.rest, self.schedule.steps_per_epoch, self.cfg.train)

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """uint8 [B, 3, S, S] of steps start..stop-1, on the device."""
        return self.mix.batches(start, stop, self.training.device, self.cfg.data.workers)

    def pairs(self, start: int, stop: int, timer: Timer) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of steps start..stop-1: the pictures, and those whose views are their positives; None for the pictures themselves."""
        if self.cfg.positives.name == "self":
            yield from ((images, None) for images in self.batches(start, stop))
            return
        each, cfg, caches = self.schedule.steps_per_epoch, self.cfg.positives, self.mix.sources
        for first, last in itertools.pairwise([start, *range((start // each + 1) * each, stop, each), stop]):
            if first % (each * cfg.every_epochs) == 0:
                rows, judge = sum(map(len, caches)), self.judge_links if self.cfg.split.validation_ratio else None
                with timer.paused():
                    self.training.renew_links(lambda: dataio.pictures_in(caches, self.training.device), rows, cfg, judge)
            partners = self.training.links_in_use[1].partners.numpy()
            linked = [dataio.Partners(caches, number, partners, cfg.p) for number in range(len(caches))]
            others = dataio.mix_from_start(linked, self.schedule).batches(first, last, self.training.device, self.cfg.data.workers)
            yield from zip(self.batches(first, last), others, strict=True)

    def judge_links(self, encode: moco.Encoder) -> dataio.VectorTable | None:
        """Vectors of the validation pictures, by which links are judged; None where these cannot be read."""
        with not_vital("judgement of the links"):
            validation = dataio.find_rows(self.cfg.data, self.cfg.split, "val")
            return describe_rows(validation, self.cfg, self.training.device, encode)

    def views(self, images: Tensor, purpose: str, step: int, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return dataio.two_views(images, self.cfg.augment, draw(self.cfg.seed, purpose, step), others)


def build_model(cfg: Config) -> moco.MoCo:
    fitting = dataclasses.replace(cfg.moco, queue_size=max(cfg.moco.queue_size, keys_of_step(cfg)))
    return moco.build_moco(cfg.backbone, fitting, draw_seed(cfg.seed, "weights"))


def start_model(cfg: Config, tables: list[str]) -> tuple[moco.MoCo, bool]:
    """The model before the first step, and whether it may know faces of elsewhere: its weights are those of `train.init`, if any.

    Raises ValueError for a run of another split table than `tables`: the test identities of this one may be in it.
    """
    model = build_model(cfg)
    if not cfg.train.init:
        return model, False
    with dataio.naming("train.init"):
        weights = moco.read_weights(cfg.train.init)
    meta = weights.state.get("meta", {"table": None, "elsewhere": True})
    if meta["table"] not in (None, *tables):
        told = f"train.init={cfg.train.init} was trained with split table {meta['table']}, this is {tables[0]}"
        raise ValueError(f"{told}: it may have seen the test identities; set split.out_dir to the table of that run")
    moco.put_weights(model.query.backbone, weights, f"train.init={cfg.train.init}")
    model.key.load_state_dict(model.query.state_dict())
    if meta.get("elsewhere"):
        log.warning("train.init=%s: nobody can tell here whether its weights have seen the test identities", cfg.train.init)
    return model, meta.get("elsewhere", False)


def draw_monitor(run: Run) -> list[tuple[Tensor, Tensor]]:
    """Fixed train pictures under fixed hard views, the same whatever a run's own augmentation, for `Training.measure_monitor`."""
    cfg, usual = run.cfg, OmegaConf.load(CONF / "augment" / "default.yaml")
    views = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(dataio.AugmentConfig), usual)).harder()
    steps = min(run.schedule.steps_per_epoch, -(-cfg.train.monitor_images // cfg.train.batch_size))
    images = torch.cat(list(run.batches(0, steps)))[: cfg.train.monitor_images]
    parts = enumerate(images.split(cfg.train.batch_size))
    return [dataio.two_views(part, views, draw(cfg.seed, "monitor", i)) for i, part in parts]


def find_probe(cfg: Config, tables: list[str]) -> dataio.Rows:
    """The rows of the validation identities. Raises ValueError where they cannot be measured, or are of another split table."""
    rows = dataio.find_rows(cfg.data, cfg.split, "val")
    if tables[0] not in rows.tables:
        told = f"validation identities of split table {rows.tables[0]}, train of {tables[0]}"
        raise ValueError(f"{cfg.split.out_dir}: {told}; split anew")
    names, _, keys = dataio.read_names(rows)
    moco.enrol(names, keys, cfg.eval.enroll_per_id, cfg.eval.seed)
    return rows


def views_of(rows: dataio.Rows, cfg: Config, device: torch.device) -> Iterator[tuple[str, pa.Table, Tensor]]:
    """Source, names and hashes, and views float [n, 3, S, S] in [-1, 1] of rows in their order; broken pictures are left out."""
    for source, index in rows.indices.items():
        for table, images in dataio.decoded_rows(index, cfg.data, cfg.embed.batch_size):
            yield source, table, dataio.to_float(images.to(device))


def describe_rows(rows: dataio.Rows, cfg: Config, device: torch.device, encode: moco.Encoder) -> dataio.VectorTable:
    """Vectors of rows in memory, as a file of `embed` holds them."""
    parts = [(source, table, encode(views).cpu()) for source, table, views in views_of(rows, cfg, device) if len(views)]
    names, files = (
        np.array([name for _, table, _ in parts for name in table[column].to_pylist()], str)
        for column in ("identity_id", "image_filename")
    )
    sources = np.repeat([source for source, _, _ in parts], [len(table) for _, table, _ in parts])
    return dataio.VectorTable(names, files, sources, torch.cat([vectors for *_, vectors in parts]).numpy(), None, {})


def measure_probe(run: Run) -> dict[str, float]:
    """Rank-1 and TAR@1e-2 of the validation identities, as eval measures them; a figure that they cannot support is left out.

    Whitened as embed does it, but by no more than REFERENCE_ROWS pictures.
    """
    cfg, device, backbone = run.cfg, run.training.device, copy.deepcopy(run.training.model.query.backbone)
    whitens = cfg.embed.whiten == "train"
    whitening = fit_whitening(backbone, run.mix.sources, cfg, device, moco.REFERENCE_ROWS)[0] if whitens else None
    faces = describe_rows(run.probe, cfg, device, moco.freeze(backbone, device, cfg.embed.flip, whitening))
    found = moco.measure(faces, dataclasses.replace(cfg.eval, fars=[1e-2], bootstrap=100), device).rates
    return {f"probe_{name}": round(found[name].value, 6) for name in ("rank1", "tar@0.01") if name in found}


def start_afresh(run: Run, monitor: list[tuple[Tensor, Tensor]]) -> None:
    """Before the first step: a sheet of views, the queue filled, the monitor of the untrained encoder.

    The queue's keys are of the last images of the first epoch, which the next steps will not draw.
    """
    cfg, schedule = run.cfg, run.schedule
    steps = min(schedule.steps_per_epoch, -(-len(run.training.model.queue) // cfg.train.batch_size))
    batches = run.batches(schedule.steps_per_epoch - steps, schedule.steps_per_epoch)
    batches = progress(batches, total=steps, desc="filling the queue", unit="batch", leave=False)
    with not_vital("views.png"):
        images = next(run.batches(0, 1))
        draw_views(images, run.views(images, "augment", 0), run.folder / "plots" / "views.png")
    run.training.fill_queue(
        (*run.views(images, "fill", step), draw(cfg.seed, "fill-shuffle", step)) for step, images in enumerate(batches)
    )
    run.training.monitor["untrained"] = run.training.measure_monitor(monitor)


def stop_if_not_finite(run: Run) -> None:
    """Raise FloatingPointError if a loss or gradient was not finite; waits for the device.

    bad_batch.json then lists the pictures of that step. With the seed they are all that is needed to meet it again.
    """
    bad, path = run.training.find_bad_step(), run.folder / "bad_batch.json"
    if bad is None:
        return
    pictures = [{"file": str(file), "row": row} for file, row in run.mix.places(bad - 1)]
    write_text(path, json.dumps({"step": bad, "seed": run.cfg.seed, **run.meta, "pictures": pictures}, indent=1))
    raise FloatingPointError(
        f"the loss or gradient of step {bad} is not finite; its pictures are in {path}, checkpoints are from before it. "
        "The same command goes on from the last one and meets the step again; in a new run, lower train.lr, or set train.amp=fp32"
    )


def save_checkpoint(run: Run, epoch: int | None) -> None:
    """Save the state whole, as epoch_XX.pt or step_NNNNNNN.pt, let last.pt mean it, and rotate the older ones."""
    training, checkpoints = run.training, run.folder / "checkpoints"
    name = f"step_{training.step:07d}.pt" if epoch is None else f"epoch_{epoch:02d}.pt"
    write_checkpoint(training.state_dict() | {"config": dataclasses.asdict(run.cfg), "meta": run.meta}, checkpoints / name)
    if epoch is not None and training.monitor["last"] <= training.monitor["best"]:
        link(checkpoints / name, checkpoints / "best.pt")
    link(checkpoints / name, checkpoints / "last.pt")  # the last act: a resume trusts last.pt first
    rotate_checkpoints(run.folder, run.cfg.train)


def say_what_trains(run: Run, sources: list[dataio.Passes], streams: list[dataio.ParquetImageStream], rows: dataio.Rows) -> None:
    """Log the data, the network, the order, and what of these will make the figures worse."""
    cfg, schedule, training = run.cfg, run.schedule, run.training
    weights, precision = sum(p.numel() for p in training.model.query.parameters()), str(training.precision).removeprefix("torch.")
    images, epoch_images = " + ".join(f"{len(source):,}" for source in sources), schedule.steps_per_epoch * schedule.batch_size
    log.info("%s images in %d steps an epoch, %d epochs", images, schedule.steps_per_epoch, cfg.train.epochs)
    if schedule.begins:
        log.info("extended from step %d on: a new warm-up to train.lr=%g", schedule.begins, cfg.train.lr)
    if run.warmup < cfg.train.warmup_epochs * schedule.steps_per_epoch:
        told = "train.warmup_epochs=%g does not fit: the warm-up is a tenth of the run, %d steps"
        log.warning(told, cfg.train.warmup_epochs, math.ceil(run.warmup))
    log.info("%s (%.1f M weights), %s on %s", cfg.backbone.name, weights / 1e6, precision, training.device)
    log.info("order: %s%s", sources[0].order_kind, " of materialised shards" if rows.shards else "")
    for place, stream in zip(rows.indices, streams, strict=True) if cfg.data.cache == "none" else ():
        largest = int(np.bincount(stream.index.unit).max())
        if dataio.LANES * largest > 4 * max(cfg.data.shuffle_buffer, 1024):
            memory = (place, largest, dataio.LANES)
            log.warning("%s: row groups of %d pictures, %d at a time in memory; command=split writes small ones", *memory)
        if not rows.shards:
            worse = dataio.shuffle_quality(stream, len(training.model.queue) * len(stream) // sum(map(len, streams)))
            advice = "; data.cache=decoded or command=split mend that" if worse > 2 else ""
            told = "%s: %.1f times as many pictures of the same person in the queue as in a true shuffle%s"
            log.info(told, place, worse, advice)
    queue, fits = len(training.model.queue), max(epoch_images // 16, 4 * schedule.batch_size)
    if queue > fits:
        told = "moco.queue_size=%d exceeds a sixteenth of the %d pictures: many are the query's own face; set moco.queue_size=%d"
        log.warning(told, queue, epoch_images, fits)
    lag, steps = 1 - cfg.moco.key_momentum, schedule.rest
    if lag and steps * lag < 2:
        told = "moco.key_momentum=%g: in %d steps the key encoder hardly leaves its first weights; set moco.key_momentum=%g"
        log.warning(told, cfg.moco.key_momentum, steps, max(0.0, round(1 - 10 / steps, 3)))


def step_figures(run: Run, out: moco.StepOutput, grad_norm: Tensor, lr: float, key_momentum: float) -> dict:
    """What a line of the log says of a step; reading it waits for the device."""
    cfg, step, schedule = run.cfg, run.training.step, run.schedule
    since = max(0, (step - 1) // cfg.train.log_every * cfg.train.log_every)
    tensors = {name: round(value.item(), 6) for name, value in out._asdict().items() if value.ndim == 0}
    return {
        "step": step, "epoch": (step - 1) // schedule.steps_per_epoch + 1, **tensors,
        "chance_loss": round(moco.chance_loss(len(run.training.model.queue), cfg.moco.temperature, cfg.moco.margin), 6),
        "queue_ptr": int(run.training.model.queue_ptr), "lr": lr, "key_momentum": key_momentum,
        "grad_norm": round(float(grad_norm), 6) if torch.isfinite(grad_norm) else None,  # a step that fp16 skipped: NaN is no JSON
        "digiface_share": round(schedule.digiface_share(since, step), 4), **run.training.link_figures(),
    }  # fmt: skip


def tell_signs(entry: dict, run: Run, told: set[tuple[str, int]]) -> None:
    """Warn of a run that will come to nothing, once per cause and epoch, or stop it where train.when_stuck=stop."""
    cfg = run.cfg.train
    warmed_up = entry["step"] - run.schedule.begins > run.warmup + 1
    for cause, what in moco.signs_of_failure(entry, run.training.monitor["untrained"], cfg, warmed_up).items():
        if (cause, entry["epoch"]) not in told:
            told.add((cause, entry["epoch"]))
            log.warning("step %d, %s: %s", entry["step"], cause, what)
            if cfg.when_stuck == "stop":
                raise ValueError(f"stopped at step {entry['step']}, {cause}, as train.when_stuck=stop asks; {what}")


def run_steps(run: Run, monitor: list[tuple[Tensor, Tensor]], last_step: int) -> None:
    """The training loop: draw, step, and at their times measure, log, save, stop."""
    cfg, training, schedule = run.cfg, run.training, run.schedule
    if cfg.train.compile:
        training.compile()
    timer, told_signs, drawn_at, rest = Timer(), set(), time.monotonic(), schedule.rest
    counts = {"total": schedule.total_steps * schedule.batch_size, "initial": training.step * schedule.batch_size}
    with (
        contextlib.closing(run.pairs(training.step, last_step, timer)) as batches,
        open(run.folder / "train_log.jsonl", "a") as log_file,
        progress(**counts, desc="training", unit="image", smoothing=0.1) as bar, StopAsked() as stop,
    ):  # fmt: skip
        for step in range(training.step, last_step):
            images, others = timer.next(batches)  # uint8 [B, 3, S, S], on the device
            view_q, view_k = run.views(images, "augment", step, others)  # float [B, 3, S, S] in [-1, 1]
            lr = moco.lr_at(step - schedule.begins, rest, schedule.steps_per_epoch, cfg.train)
            momentum = moco.key_momentum_at((step - schedule.begins) / rest, cfg.moco.key_momentum, cfg.moco.key_momentum_schedule)
            out, grad_norm = training.take_step(view_q, view_k, lr, momentum, draw(cfg.seed, "step", step))

            bar.update(len(images))
            epoch, epoch_ends = training.step // schedule.steps_per_epoch, training.step % schedule.steps_per_epoch == 0
            told_to_stop = stop.signal  # read once: a signal that comes later in this step is for the next one
            stopping = training.step == last_step or told_to_stop is not None
            due_to_log = training.step % cfg.train.log_every == 0 or epoch_ends or stopping
            due_to_save = cfg.train.save_every_steps and training.step % cfg.train.save_every_steps == 0
            if due_to_log or due_to_save:
                stop_if_not_finite(run)
            if epoch_ends or training.step == last_step:
                training.monitor["last"] = training.measure_monitor(monitor)
            if due_to_log:
                entry = step_figures(run, out, grad_norm, lr, momentum) | timer.lap()
                if epoch_ends:
                    entry |= {"monitor_loss": training.monitor["last"], "monitor_untrained": training.monitor["untrained"]}
                if epoch_ends and run.probe and epoch % cfg.train.probe_every_epochs == 0:
                    with timer.paused(), not_vital("probe"):
                        entry |= measure_probe(run)
                log_file.write(json.dumps(entry) + "\n")
                log_file.flush()
                os.fsync(log_file.fileno())  # a checkpoint must not outlive the lines before it
                told = f"loss={entry['loss']:.3f}, top1={entry['instance_top1']:.2f}, wait={entry['data_wait']:.0%}"
                bar.set_postfix_str(told, refresh=False)
            if epoch_ends and (epoch % cfg.train.save_every_epochs == 0 or stopping):
                training.monitor["best"] = min(training.monitor["best"], training.monitor["last"])  # of the epochs that are saved
                save_checkpoint(run, epoch)
            elif stopping or due_to_save:
                save_checkpoint(run, None)
            if stopping or (epoch_ends and time.monotonic() > drawn_at + 5):  # tiny epochs are not spent on drawing
                drawn_at = time.monotonic()
                with not_vital("train.png"):
                    draw_training(run.folder)
            if due_to_log:
                tell_signs(entry, run, told_signs)
            if told_to_stop is not None:
                log.warning("stopped at step %d, saved; the same command goes on from here", training.step)
                raise SystemExit(128 + told_to_stop)
    if training.step < schedule.total_steps:
        log.info("stopped at train.max_steps=%d of %d; the same command without it goes on", training.step, schedule.total_steps)


def whiten_checkpoints(cfg: Config, folder: Path, sources: list[dataio.Passes], device: torch.device) -> None:
    """Put whitening and mean picture into the final and the best checkpoint of a finished run, where they are not there yet."""
    if cfg.embed.whiten == "none":
        return
    last, best, end = (folder / "checkpoints" / f"{name}.pt" for name in ("last", "best", f"epoch_{cfg.train.epochs:02d}"))
    configure_process(device, deterministic=True, tf32=False)  # as embed computes
    model, final = build_model(cfg), load_checkpoint(last)
    earlier = load_checkpoint(best) if best.exists() else final  # there is none where the monitor was never a number
    is_last = earlier["step"] == final["step"]
    for path, state in ((best, earlier), (end, final))[is_last:]:
        if "matrix" not in state.get("whitening", {}):  # older ones hold another kind
            moco.load_weights(model, state["model"])
            whitening, state["mean_picture"] = fit_whitening(model.query.backbone, sources, cfg, device)
            state["whitening"], state["config"]["embed"]["flip"] = whitening._asdict(), cfg.embed.flip
            write_checkpoint(state, path)
    if is_last and best.exists():
        link(end, best)
    link(end, last)  # at the end: after a kill, what this one names tells whether to do it again
    rotate_checkpoints(folder, cfg.train)


def pictures_of(pairs: Path) -> Path | None:
    """NAME_pairs.parquet -> NAME.parquet, as pack writes them; None for pairs of the pictures that are measured anyway."""
    return pairs.with_name(pairs.name.replace("_pairs.parquet", ".parquet")) if pairs.name.endswith("_pairs.parquet") else None


def nobody_twice(names: np.ndarray) -> bool:
    """Whether nobody of these can be looked up, as in a benchmark of pairs whose people are not known: it is measured without."""
    return len(np.unique(names)) == len(names)


def look_ahead(cfg: Config) -> dict:
    """Who eval would enrol and look up. Raises ValueError or OSError for what embed and eval would refuse of those pictures."""
    names, files, keys = dataio.read_names(embedded_rows(cfg, None if cfg.embed.test_glob else cfg.embed.split))
    splits = dataio.read_identity_splits(cfg.split.table) if cfg.embed.test_glob and cfg.split.table.exists() else None
    if splits and (trained := splits.trained.intersection(names.tolist())):
        raise ValueError(
            f"{cfg.embed.test_glob}: {len(trained)} identities, such as {min(trained)!r}, are trained on; embed others"
        )
    for pairs in dataio.find_files(cfg.eval.pairs):
        its = dataio.find_given_rows(str(of), cfg.data.columns) if (of := pictures_of(pairs)) else None
        dataio.read_pairs(pairs, *(dataio.read_names(its)[:2] if its else (names, files)))
    if cfg.eval.pairs and nobody_twice(names):
        return {"pairs": len(cfg.eval.pairs)}
    drawn = moco.enrol(names, keys, cfg.eval.enroll_per_id, cfg.eval.seed)
    gallery = len(np.unique(drawn.identity[drawn.enrolled]))
    if gallery < 2:
        raise ValueError("the gallery holds one identity, whom nobody can be mistaken for; embed others as well")
    return {"gallery": gallery, "distractors": drawn.distractors, "probes": len(drawn.probes)}


def note_start(run: Run, rows: dataio.Rows) -> None:
    """Write config.yaml and this start's part of environment.json, and let train_log.jsonl end where the run goes on."""
    cfg, folder, step = run.cfg, run.folder, run.training.step
    note = f"# extended after epochs {run.meta['extended']}, see train.extend\n" if run.meta["extended"] else ""
    write_text(folder / "config.yaml", note + OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg))))
    start = {"from_step": step, **run.meta, "files": {s: index.fingerprint for s, index in rows.indices.items()}}
    write_text(folder / "environment.json", json.dumps([*read_starts(folder), start], indent=1))
    planned = step % cfg.train.log_every == 0  # a line of an unplanned stop goes: the log is that of an unbroken run
    kept = [e for e in read_log(folder) if e["step"] < step + (planned or "monitor_loss" in e)]
    write_text(folder / "train_log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))


def checkpoint_bytes(model: moco.MoCo, cfg: Config) -> int:
    """Of as many checkpoints as a run has at a time: both encoders, the queue, the optimiser's momentum."""
    each = (*model.state_dict().values(), *model.query.parameters())
    return (cfg.train.keep_last + 4) * sum(tensor.numel() * tensor.element_size() for tensor in each)


def train(cfg: Config, folder: Path) -> float:
    """Train, or go on where the run stopped; returns minus the best value of the label-free monitor."""
    with run_lock(folder):
        saved = find_start(cfg, folder)
        device = moco.pick_device(cfg.device)
        configure_process(device, cfg.deterministic, tf32=True)
        rows = dataio.find_rows(cfg.data, cfg.split, "train", shards=saved["meta"]["shards"] if saved else None)
        known = (build_model(cfg), saved["meta"].get("elsewhere", False)) if saved else None
        model, elsewhere = known or start_model(cfg, rows.tables)
        training = moco.Training(model, cfg.train, device)
        probe = find_probe(cfg, rows.tables) if cfg.train.probe_every_epochs else None
        if not saved:  # a run that goes on has most of them already
            dataio.need_space(folder, checkpoint_bytes(training.model, cfg), "a run's checkpoints")
            try:
                look_ahead(cfg)
            except (ValueError, OSError) as error:
                if cfg.command == "all":
                    raise
                log.warning("embed or eval will refuse: %s", error)
        streams = dataio.open_streams(rows, cfg.data, cfg.seed)
        extended = saved["meta"].get("extended", []) if saved else []
        schedule = dataio.Schedule(cfg.curriculum, list(map(len, streams)), cfg.train.batch_size, cfg.train.epochs, extended)
        last_step = min(schedule.total_steps, cfg.train.max_steps or schedule.total_steps)
        meta = note_of(rows)
        if saved:
            check_same_data(saved, meta, rows.tables, cfg, folder)
            training.load_state_dict(saved)
            if training.step < schedule.begins:
                told = f"{folder}: only at step {training.step} of {schedule.begins}; before train.extend finish it"
                raise ValueError(f"{told}, with train.epochs={extended[-1]}")
            if training.step >= last_step:
                rotate_checkpoints(folder, cfg.train)
                what = "finished" if training.step >= schedule.total_steps else "at train.max_steps"
                log.info("%s: %s, %d of %d steps; nothing to do", folder, what, training.step, schedule.total_steps)
                if training.step >= schedule.total_steps and "matrix" not in saved.get("whitening", {}):
                    whiten_checkpoints(cfg, folder, dataio.cached(streams, cfg.data, device), device)
                return -min(training.monitor["best"], training.monitor["last"])
            log.info("going on from step %d of %d", training.step, schedule.total_steps)
            if saved["meta"]["precision"] != str(training.precision):
                log.warning("the run went in %s so far, this device goes on in %s", saved["meta"]["precision"], training.precision)
        resumed, saved = saved is not None, None  # a checkpoint is some four times the weights
        sources = dataio.cached(streams, cfg.data, device)
        meta |= {"precision": str(training.precision), "extended": extended, "elsewhere": elsewhere, **describe_machine(device)}
        run = Run(cfg, folder, training, dataio.mix_from_start(sources, schedule), meta, probe)
        note_start(run, rows)
        say_what_trains(run, sources, streams, rows)
        monitor = draw_monitor(run)
        if not resumed:
            start_afresh(run, monitor)
        run_steps(run, monitor, last_step)
        if training.step >= schedule.total_steps:
            whiten_checkpoints(cfg, folder, sources, device)
        return -min(training.monitor["best"], training.monitor["last"])


# ---- check ----

CHECK_STEPS, CHECK_SECONDS = 20, 60  # as many of the steps as fit
STEPS_APART = {"loss": 1e-3, "grad_norm": 1e-2, "keys": 1e-3}  # how far a step in fp32 may differ between two devices


def describe_side(rows: dataio.Rows, cfg: Config) -> dict:
    """Rows, people and a sample of one side of the split. Raises ValueError where too many of the sample are broken."""
    people = np.unique(np.concatenate([index.identities() for index in rows.indices.values()]), return_counts=True)[1]
    sample = dataio.sample_pictures(rows, cfg.data)
    broken, tried = sample["broken"], sample["decoded"] + len(sample["broken"])
    if len(broken) > cfg.data.max_bad_fraction * tried:
        raise ValueError(
            f"{len(broken)} of a sample of {tried} pictures are broken, the first: {broken[0]}; mend or leave them out"
        )
    each = {"least": int(people.min()), "median": float(np.median(people)), "most": int(people.max())}
    return {"rows": len(rows), "people": len(people), "pictures_a_person": each, "sample": sample}


def compare_devices(cfg: Config, device: torch.device, views: tuple[Tensor, Tensor]) -> dict:
    """The same step in fp32 on the CPU and on `device`. Raises ValueError where it differs by more than STEPS_APART."""
    configure_process(device, cfg.deterministic, tf32=False)
    fp32 = dataclasses.replace(cfg.train, amp="fp32")
    states = [moco.Training(build_model(cfg), fp32, where) for where in (torch.device("cpu"), device)]
    apart = moco.compare_steps(*states, *(view[:32] for view in views), seed=0)
    if any(apart[name] > limit for name, limit in STEPS_APART.items()):
        raise ValueError(
            f"{device}: a step differs from the CPU's by {apart}, allowed is {STEPS_APART}; do not train on this machine"
        )
    return apart


SPEEDUPS = {
    "decoding": "data.cache=decoded decodes once",
    "copying": "data.cache=device keeps the pictures in the device's memory",
    "computing": "try train.compile=true, a smaller backbone",
}
DONE_ONCE = {"none": (), "decoded": ("decoding",), "device": ("decoding", "copying")}  # by data.cache


def time_loading(run: Run) -> dict[str, float]:
    """Seconds a picture of reading and decoding, and of copying to the device, each while nothing else goes on."""
    begun, device, seen = time.perf_counter(), run.training.device, 0
    with contextlib.closing(run.mix.batches(0, min(CHECK_STEPS, run.schedule.total_steps), "cpu", run.cfg.data.workers)) as batches:
        for images in batches:
            seen += len(images)
            if time.perf_counter() - begun > CHECK_SECONDS / 4:
                break
    decoded = time.perf_counter()
    if device.type != "cpu":
        images = images.pin_memory() if device.type == "cuda" else images
        for _ in range(CHECK_STEPS):
            there = images.to(device, non_blocking=True)
        int(there[0, 0, 0, 0])  # waits for the device
    return {"decoding": (decoded - begun) / seen, "copying": (time.perf_counter() - decoded) / (CHECK_STEPS * len(images))}


def name_limit(parts: dict[str, float], cache: str) -> str:
    """Which part of a step takes longest, of those that data.cache leaves to each step, and the setting that shortens it."""
    slowest = max(parts.keys() - {*DONE_ONCE[cache]}, key=parts.get)
    return f"{slowest}: {SPEEDUPS[slowest]}"


def try_steps(cfg: Config, rows: dataio.Rows, scratch: Path) -> dict:
    """Real steps on the plain stream, a round through the checkpoint, and where there is a GPU its step beside the CPU's."""
    device = moco.pick_device(cfg.device)
    configure_process(device, cfg.deterministic, tf32=True)
    linked = cfg.positives
    cfg = dataclasses.replace(cfg, positives=dataclasses.replace(linked, name="self"))  # no cache is here to take them from
    streams = dataio.open_streams(rows, cfg.data, cfg.seed)
    schedule = dataio.Schedule(cfg.curriculum, list(map(len, streams)), cfg.train.batch_size, cfg.train.epochs)
    training = moco.Training(start_model(cfg, rows.tables)[0], cfg.train, device)
    mix = dataio.mix_from_start(streams, schedule)
    meta = note_of(rows) | {"precision": str(training.precision)}
    run, timer, begun = Run(cfg, scratch, training, mix, meta), Timer(), time.perf_counter()
    if cfg.train.compile:
        training.compile()
    steps = min(1 + CHECK_STEPS, schedule.total_steps)
    with contextlib.closing(run.pairs(0, steps, timer)) as batches:
        for step in progress(range(steps), desc="trying steps", unit="step", leave=False):
            if step == 1:  # after compiling
                int(training.first_bad_step)  # waits for the device
                timer = Timer()
            images, _ = timer.next(batches)
            out, _ = training.take_step(*run.views(images, "augment", step), 1e-4, 0.99, draw(cfg.seed, "step", step))
            if time.perf_counter() - begun > CHECK_SECONDS:
                break
        loss = float(out.loss.detach())
    figures = timer.lap()
    parts, cache = time_loading(run), cfg.data.cache
    step = (1 - figures["data_wait"]) / figures["images_per_s"]  # with the copying, which it waits for, as if all data were there
    parts["computing"] = max(step - parts["copying"], 0.0)
    each = 1 / figures["images_per_s"] if cache == "none" else sum(parts[name] for name in parts.keys() - {*DONE_ONCE[cache]})
    missing = dataio.missing_cache_bytes(streams, Path(cfg.data.cache_dir))
    making = missing / (3 * cfg.data.image_size**2) * parts["decoding"] if cache != "none" else 0.0
    begun, some = time.perf_counter(), dataio.to_float(images[:64])
    moco.with_mirrored(moco.lbp_histograms, flip=True)(some)
    searches = 0 if linked.name == "self" else math.ceil(cfg.train.epochs / linked.every_epochs)
    linking = searches * len(rows) * (time.perf_counter() - begun) / len(some)  # LBP takes the longest of it
    hours = (schedule.total_steps * schedule.batch_size * each + making + linking) / 3600
    save_checkpoint(run, None)
    saved = load_checkpoint(scratch / "checkpoints" / "last.pt")["model"]
    if not all(torch.equal(value.cpu(), saved[name]) for name, value in training.model.state_dict().items()):
        raise ValueError(f"{scratch}: a checkpoint does not give back what was saved; use another disk")
    apart = compare_devices(cfg, device, run.views(images, "augment", 0)) if device.type != "cpu" else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "pairs_per_s": figures["images_per_s"], "data_wait": figures["data_wait"], "loss": loss,
        "ms_a_picture": {name: round(1000 * seconds, 4) for name, seconds in parts.items()}, "limit": name_limit(parts, cache),
        "hours": round(hours, 4), "hours_for_the_cache": round(making / 3600, 4), "hours_for_links": round(linking / 3600, 4),
        "peak_process_gb": peak / 1e9,
        "peak_device_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "checkpoints_gb": checkpoint_bytes(training.model, cfg) / 1e9, "device_beside_cpu": apart,
        "cache_gb": missing / 1e9,
    }  # fmt: skip


def check(cfg: Config, folder: Path, typed: set[str]) -> None:
    """Say in minutes what train, embed and eval would say in hours: check.json, a page, and ValueError for what they would refuse.

    Leaves nothing else behind.
    """
    page, refused, places = {}, [], {}  # the folders that the run would write to, or the nearest ones that are there

    def attempt(name: str, part: Callable, *arguments: object) -> object:
        try:
            return part(*arguments)
        except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError
            refused.append(f"{name}: {error}")
            return None

    saved = attempt("run", find_start, cfg, folder)
    saved = saved and {"meta": saved["meta"], "config": saved["config"]}  # a checkpoint is some four times the weights
    for what, place in (("checkpoints", folder), ("split", cfg.split.out_dir), ("cache", cfg.data.cache_dir)):
        if what != "cache" or cfg.data.cache != "none":
            places[what] = attempt("disk", dataio.nearest_folder, Path(place))
            places[what] and attempt("disk", dataio.need_writable, places[what])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not cfg.split.table.exists():
            cfg = dataclasses.replace(cfg, split=dataclasses.replace(cfg.split, out_dir=scratch))
        for side in ("train", "test", *["val"] * (cfg.split.validation_ratio > 0)):
            shards = saved["meta"]["shards"] if saved and side == "train" else None
            rows = attempt(f"rows of {side}", dataio.find_rows, cfg.data, cfg.split, side, shards)
            page[side] = rows and attempt(side, describe_side, rows, cfg)
            if rows and side == "train":
                if saved:
                    attempt("run", check_same_data, saved, note_of(rows), rows.tables, cfg, folder)
                page["steps"] = attempt("steps", try_steps, cfg, rows, Path(scratch))
                if cfg.train.probe_every_epochs:
                    attempt("train.probe_every_epochs", find_probe, cfg, rows.tables)
        page["eval"] = attempt("eval", look_ahead, cfg)
    page["free_disk_gb"], needs = shutil.disk_usage(folder).free / 1e9, defaultdict(dict)  # by disk
    for what in ("checkpoints", "cache") if page.get("steps") else ():
        if places.get(what) and not (saved and what == "checkpoints"):  # a run that goes on has most of them already
            needs[places[what].stat().st_dev][what] = page["steps"][f"{what}_gb"]
    for its in needs.values():
        told = " and ".join(f"{what} ({gb:.3f} GB)" for what, gb in its.items())
        attempt("disk", dataio.need_space, places[min(its)], round(1e9 * sum(its.values())), told)
    page["refused"] = refused
    write_text(folder / "check.json", json.dumps(page, indent=1))
    if {path.name for path in folder.iterdir()} <= {"check.json", "log.txt", ".hydra"}:  # no run: take away what Hydra made
        (folder / "log.txt").unlink(missing_ok=True)
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
    shutil.rmtree(folder / ".hydra" / "check", ignore_errors=True)
    log.info("%s", OmegaConf.to_yaml(OmegaConf.create(page)).rstrip())
    if refused:
        raise ValueError(f"{len(refused)} things would stop this run, see {folder / 'check.json'}:\n" + "\n".join(refused))


# ---- embed ----

REFERENCES = ("untrained", "lbp", "pca")


def sample_images(sources: list[dataio.Passes], cfg: Config, count: int) -> Iterator[Tensor]:
    """At most `count` train pictures as uint8 [B, 3, S, S], of each source its share."""
    rows = list(map(len, sources))
    count = min(count, sum(rows))
    steps = -(-count // 256)
    schedule = dataio.Schedule(None, rows, count // steps, 1)  # of one size, and few pictures are left over
    where = sources[0].images.device if sources[0].on_device else "cpu"
    return dataio.mix_from_start(sources, schedule).batches(0, steps, where, cfg.data.workers)


def mean_picture(batches: Iterable[Tensor]) -> Tensor:
    """The mean [3, S, S] of batches uint8 [B, 3, S, S] of one size."""
    return torch.stack([images.float().mean(0).cpu() for images in batches]).mean(0)


def fit_whitening(
    backbone: moco.IResNet, sources: Sequence[dataio.Passes], cfg: Config, device: torch.device, rows: int = moco.WHITEN_ROWS
) -> tuple[moco.Whitening, Tensor]:  # fmt: skip
    """The whitening of the frozen encoder's features, mirrored or not as embed.flip asks, and the mean [3, S, S], in 0..255, of
    the train pictures that it is fitted to, so many `rows` at most: in one pass over them."""
    if backbone.fc.in_features > moco.REFERENCE_ROWS:
        rows = min(rows, moco.REFERENCE_ROWS)  # so that the fit takes half a minute and, of iResNet-50, 2 GB
    describe, images = moco.freeze(backbone, device, cfg.embed.flip).penultimate, sample_images(sources, cfg, rows)
    features, means = [], []
    for part in progress(images, desc="fitting the whitening", unit="batch", leave=False):
        features.append(describe(dataio.to_float(part.to(device))).cpu())
        means.append(mean_picture([part]))
    features = torch.cat(features)  # the parts go
    return moco.fit_whitening(features), torch.stack(means).mean(0)


def reference_encoders(cfg: Config, rows: dataio.Rows, device: torch.device) -> dict[str, moco.Encoder]:
    """What any encoder must beat: itself untrained (its statistics calibrated, else it is weaker than need be), LBP and PCA."""
    streams = dataio.open_streams(rows, cfg.data, cfg.seed)
    images = list(sample_images(streams, cfg, moco.REFERENCE_ROWS))
    backbone = build_model(cfg).query.backbone.to(device)
    moco.calibrate_batchnorm(backbone, (dataio.to_float(part.to(device)) for part in images))
    whitening = fit_whitening(backbone, streams, cfg, device)[0] if cfg.embed.whiten == "train" else None
    untrained = moco.freeze(backbone, device, cfg.embed.flip, whitening)
    fitted = {
        name: moco.fit_whitened(moco.with_mirrored(describe, cfg.embed.flip), map(dataio.to_float, images))
        for name, describe in (("lbp", moco.lbp_histograms), ("pca", moco.small_grey))
    }
    return {"untrained": untrained} | fitted


def embeds_own_side(cfg: Config, folder: Path) -> bool:
    """Whether embed.test_glob names shards of the run's own side of the split: where split writes them, or moved anywhere."""
    given, side = cfg.embed.test_glob, cfg.embed.split
    if not given or Path(os.path.abspath(given)).is_relative_to(os.path.abspath(f"{cfg.split.out_dir}/{side}")):
        return True
    tables = {start["table"] for start in read_starts(folder)}
    try:
        notes = map(dataio.read_metadata, dataio.find_files(given))
        return all(note.get("split") == side and note.get("table") in tables for note in notes)
    except (OSError, ValueError):  # not there any more, but its vectors may be
        return False


def embedded_file(cfg: Config, folder: Path) -> str:
    """Where `embed` writes in the run's folder, by default named after what it embeds; so vectors of other files replace none."""
    own = embeds_own_side(cfg, folder)
    name = f"{cfg.embed.split}_embeddings" if own else short_name(cfg.embed.test_glob).removesuffix("_embeddings")
    return cfg.embed.out or f"embeddings/{name}.parquet"


def reference_path(embeddings: Path, name: str) -> Path:
    """test_embeddings.parquet -> test_embeddings.untrained.parquet"""
    return embeddings.with_name(f"{embeddings.stem}.{name}.parquet")


def find_train_rows(cfg: Config, table: str, needed: dict[str, bool]) -> dataio.Rows | None:
    """The rows that what is `needed` is fitted on or looked for in; None where they are not here, which is told."""
    if not any(needed.values()):
        return None
    try:
        rows = dataio.find_rows(cfg.data, cfg.split, "train")
        if table in (None, *rows.tables):
            return rows
        why = f"{cfg.split.out_dir} holds split table {rows.tables[0]}, the checkpoint's is {table}"
    except FileNotFoundError as error:
        why = first_line(error)
    left_out = " and ".join(f"no {what}" for what, asked in needed.items() if asked)
    log.warning("%s, the run's train data is not here: %s", left_out, why)
    return None


def count_trained_on(cfg: Config, table: str) -> int | None:
    """How many identities of embed.test_glob are on the train side of the run's split table; None where the table is not there."""
    splits = dataio.read_identity_splits(cfg.split.table) if cfg.split.table.exists() else None
    if splits is None or table not in splits.hashes:
        told = "%s is not the split table of this checkpoint: nobody can tell whether these identities were trained on"
        log.warning(told, cfg.split.table)
        return None
    found = dataio.collect_unique_identities(cfg.embed.test_glob, cfg.data.columns)
    return len(splits.trained.intersection(found))


class Trained(NamedTuple):
    """A trained encoder, and what is known of it."""

    path: Path
    cfg: Config  # the settings it was trained with, data and the like as asked now
    encoder: moco.FrozenEncoder
    made: dict  # what notes tell of it: split table and step (None for weights of other programs), digest of the weights, ...
    device: torch.device
    train_rows: dataio.Rows | None  # where they are here, and something needs them
    mean_picture: Tensor | None  # of the train rows, [3, S, S] in 0..255


def load_trained(cfg: Config, folder: Path, typed: set[str], needed: dict[str, bool]) -> Trained:
    """The encoder that `embed.checkpoint` names: of a run, with its settings, or weights of a public ArcFace iResNet.

    A whitening that the file does not hold is fitted on the train rows, which may be `needed` for other things, too.
    """
    device = moco.pick_device(cfg.device)
    configure_process(device, deterministic=True, tf32=False)  # true fp32, the same each time
    path = find_checkpoint(cfg.embed.checkpoint, folder)
    weights = moco.read_weights(path)
    state = weights.state
    if state:
        cfg, meta = settings_of(state["config"], cfg, typed), state["meta"]
    else:
        log.warning("%s: weights of another program: nobody can tell here whom they were trained on", path)
        meta = {"table": None, "elsewhere": True}
        if not any(under(key, ("backbone",)) for key in typed):
            cfg = dataclasses.replace(cfg, backbone=weights.config)
        if (weights.whitening or weights.flip) and not under("embed.flip", typed):  # what `command=export` wrote says so
            cfg = dataclasses.replace(cfg, embed=dataclasses.replace(cfg.embed, flip=weights.flip))
    backbone = moco.put_weights(moco.build_backbone(cfg.backbone), weights, path).to(device)
    fitted = weights.whitening if weights.flip == cfg.embed.flip else None  # with mirrored pictures the directions are others
    whitening, mean = fitted if cfg.embed.whiten == "train" else None, state.get("mean_picture")
    fits = cfg.embed.whiten == "train" and whitening is None
    rows = find_train_rows(cfg, meta["table"], needed | {"whitening": fits})
    if rows and fits:
        whitening, mean = fit_whitening(backbone, dataio.open_streams(rows, cfg.data, cfg.seed), cfg, device)
    if not meta["table"]:
        mean = None  # of other pictures than these weights were trained on
        if rows and fits:
            log.warning("%s: whitened by the train rows here; embed.whiten=none leaves it as it is", path)
    encoder = moco.freeze(backbone, device, cfg.embed.flip, whitening)
    digest = dataio.digest(*(f"{name} {value.double().sum().item()}" for name, value in weights.backbone.items()))
    made = {"table": meta["table"], "step": state.get("step"), "extended": meta.get("extended", [])}
    made |= {"elsewhere": meta.get("elsewhere", False), "checkpoint": digest}
    made |= {"flip": encoder.flip, "whitened": encoder.mean is not None and f"penultimate^{moco.WHITENING_POWER}"}
    return Trained(path, cfg, encoder, made, device, rows, mean)


def align(cfg: Config, folder: Path, rows: dataio.Rows, train_mean: Tensor) -> dataio.Alignment | None:
    """Tell and draw how the pictures to embed lie beside the train rows', on average; returns what embed.align=mean undoes."""
    mean = mean_picture(sample_images(dataio.open_streams(rows, cfg.data, cfg.seed), cfg, moco.REFERENCE_ROWS))
    found = dataio.find_alignment(mean, train_mean)
    by_name = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, embeddings=None, out=None))
    path = files_of_evaluation(by_name, folder)["alignment"]
    with not_vital(path.name):
        draw_alignment(path, mean, train_mean)
    if found.differs:
        cure = "undone by embed.align=mean" if cfg.embed.align == "mean" else "embed.align=mean undoes it"
        log.warning("ALIGNMENT? beside the train pictures these lie %s; %s, see %s", found, cure, path)
    if cfg.embed.align == "mean" and not found.is_clear:
        told = f"the mean pictures agree to {found.agreement:.2f} only, too little to tell how these lie; see {path}"
        raise ValueError(f"embed.align=mean: {told}, leave it out")
    return found if cfg.embed.align == "mean" else None


def embed(cfg: Config, folder: Path, typed: set[str] = frozenset()) -> None:
    """Write the frozen encoder's vectors of unseen identities, and those of the references beside them."""
    needed = {"references": cfg.embed.references, "leak check": cfg.embed.leak_check}
    path, cfg, encoder, made, device, train_rows, mean = load_trained(cfg, folder, typed, needed)
    table = made["table"]
    side = None if cfg.embed.test_glob else cfg.embed.split
    rows = embedded_rows(cfg, side)
    if side and table not in (None, *rows.tables):
        raise ValueError(
            f"{path} was trained with split table {table}, {cfg.split.out_dir} has {rows.tables[0]}: "
            f"its test identities may have been trained on"
        )
    aligned = None if mean is None else align(cfg, folder, rows, mean)
    if cfg.embed.align == "mean" and not aligned:
        told = "holds no mean picture of its train rows (embed.whiten=none, or an old run); leave it out"
        raise ValueError(f"embed.align=mean: {path} {told}")
    out = folder / embedded_file(cfg, folder)
    files = {"trained": out} | {name: reference_path(out, name) for name in REFERENCES}
    encoders = {"trained": encoder}
    if train_rows and cfg.embed.references:
        encoders |= reference_encoders(cfg, train_rows, device)
    trained_on = None if made["elsewhere"] else 0 if side else count_trained_on(cfg, table)
    note = made | {
        "split": side, "aligned": aligned and aligned._asdict(), "trained_on": trained_on,
        "data": [index.fingerprint for index in rows.indices.values()],
    }  # fmt: skip
    made_by = {
        "trained": made["checkpoint"],
        "untrained": f"untrained seed {cfg.seed}",
        "lbp": f"lbp {moco.EMBEDDING_DIM}",
        "pca": f"pca {moco.EMBEDDING_DIM} of {moco.PCA_SIDE_PX} px",
    }
    hashes: set[int] = set()
    with contextlib.ExitStack() as stack:
        temporaries = {name: stack.enter_context(write_whole(files[name])) for name in encoders}
        writers = {name: dataio.VectorWriter(file, note | {"checkpoint": made_by[name]}) for name, file in temporaries.items()}
        bar = stack.enter_context(progress(total=len(rows), desc="embedding", unit="image"))
        for source, part, views in views_of(rows, cfg, device):
            views = aligned.undo(views) if aligned else views
            for name, encode in encoders.items() if len(views) else ():
                writers[name].add(part, source, encode(views).cpu().numpy())
            hashes.update(part["image_hash"].to_pylist())
            bar.update(len(part))
        bar.close()
        can_leak = train_rows and cfg.embed.leak_check and table  # nobody knows what other weights were trained on
        leaked = dataio.count_pictures(train_rows, hashes) if can_leak else None
        for writer in writers.values():
            writer.close({} if leaked is None else {"sniperface.pictures_in_train": str(leaked)})
    for name in files.keys() - encoders.keys():  # stale: made from other pictures
        files[name].unlink(missing_ok=True)
    log.info("%s: %d vectors by %s (step %s)", out, writers["trained"].rows, path, made["step"])


# ---- export ----


def parity_pictures(cfg: Config) -> Tensor:
    """Some of the pictures that embed would take, as the ONNX file will."""
    rows = embedded_rows(cfg, None if cfg.embed.test_glob else cfg.embed.split)
    views = (view for *_, part in views_of(rows, cfg, torch.device("cpu")) for view in part)
    views = torch.stack(list(itertools.islice(views, cfg.export.parity_pictures)))
    pixels = ((views + 1) * 127.5).round()
    decoded = pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return {"uint8": decoded, "float": pixels, "normalised": views}[cfg.export.input]


def export(cfg: Config, folder: Path, typed: set[str] = frozenset()) -> None:
    """Write the encoder for other programs: its weights, ONNX, how to use them (encoder.json), and a model card (README.md)."""
    moco.need_extra(cfg.export.formats)
    path, cfg, encoder, made, *_ = load_trained(cfg, folder, typed, {})
    out, encoder, files, side = folder / cfg.export.out, encoder.cpu(), {}, cfg.data.image_size
    note = {"backbone": dataclasses.asdict(cfg.backbone), **made}
    for name in cfg.export.formats:
        with write_whole(out / f"encoder.{name}") as temporary:
            if name == "onnx":
                model = moco.FromPixels(encoder).eval() if cfg.export.input == "float" else encoder
                apart = moco.save_onnx(model, temporary, parity_pictures(cfg), {"sniperface": json.dumps(note)})
                what = f"for onnxruntime; its vectors differ from torch's by at most {apart:.1e}"
            elif name == "safetensors":
                moco.save_safetensors(encoder, temporary, {"sniperface": json.dumps(note)})
                what = "for `moco.load_encoder`"
            else:
                torch.save(moco.public_weights(encoder), temporary)
                what = "the weights alone, under the names of the public ArcFace iResNets: neither mirrored nor whitened"
        files[f"encoder.{name}"] = what
    layout = f"uint8 [n, {side}, {side}, 3]" if cfg.export.input == "uint8" else f"float32 [n, 3, {side}, {side}]"
    layout += ", RGB as decoded" + ", divided by 127.5, minus 1" * (cfg.export.input == "normalised")
    use = {"input": {"pictures": layout}, "output": {"vectors": "float32 [n, 512], of length 1; their dot product is the cosine"}}
    for name in {"onnx", "safetensors", "pt"} - {*cfg.export.formats}:  # stale: of another encoder, maybe
        (out / f"encoder.{name}").unlink(missing_ok=True)
    write_text(out / "encoder.json", json.dumps(use | {"files": files} | note, indent=1))
    card = {
        "name": folder.name, "side": side, "backbone": cfg.backbone.name,
        "millions": f"{sum(value.numel() for value in encoder.backbone.parameters()) / 1e6:.1f}",
        "files": "\n".join(f"| `{name}` | {what} |" for name, what in files.items()),
        "training": card_training(path, cfg, made), "figures": card_figures(folder, made),
    }  # fmt: skip
    write_text(out / "README.md", string.Template((CONF / "templates" / "model_card.md").read_text()).substitute(card))
    log.info("%s: %s", out, "; ".join(f"{name}, {what}" for name, what in files.items()))


def card_training(path: Path, cfg: Config, made: dict) -> str:
    """What an encoder was trained on, from which weights, with which settings; of other programs' weights nobody knows."""
    if not made["table"]:
        return f"`{path.name}` holds weights of another program: see there what they were trained on."
    names = [f"`{Path(pattern).name}`" for pattern in (cfg.data.digiface_glob, cfg.data.digi2real_glob) if pattern]
    shown = {name: dataclasses.asdict(getattr(cfg, name)) for name in ("backbone", "moco", "positives", "curriculum")}
    shown["train"] = {name: getattr(cfg.train, name) for name in ("epochs", "batch_size", "lr", "lr_schedule")}
    shown |= {"augment": cfg.augment.name, "seed": cfg.seed, "step": made["step"]}
    told = f"With SniperFace (MoCo with MarginNCE), without labels, on the train identities (split table {made['table']}) of "
    told += " and ".join(names) + (f", starting from the weights `{Path(cfg.train.init).name}`" if cfg.train.init else "")
    return f"{told}.\n\n```yaml\n{OmegaConf.to_yaml(OmegaConf.create(shown)).strip()}\n```"


def told_aligned(note: dict) -> str:
    """What a label adds where the pictures were moved."""
    return ", pictures aligned" * bool(note.get("aligned"))


def card_figures(folder: Path, made: dict) -> str:
    """Figures of a run that were measured with this very encoder, mirrored and whitened alike, as a table with intervals."""
    lines = ["| measured on | figure | value | 95 % interval |", "|---|---|---|---|"]
    for path in sorted(folder.glob("metrics*.json")):
        metrics = read_metrics(path)
        if made.items() <= metrics["made_from"].items():
            what = "{stem}, {gallery} people enrolled with {enroll_per_id} pictures, template {template}{aligned}"
            about = metrics | {"stem": Path(metrics["embeddings"]).stem, "aligned": told_aligned(metrics["made_from"])}
            for name in (name for name in metrics if f"{name}_ci" in metrics):
                low, high = metrics[f"{name}_ci"]
                lines.append(f"| {what.format_map(about)} | {name} | {metrics[name]:z.4f} | {low:z.4f} to {high:z.4f} |")
            for name, pairs in metrics["pair_protocol"].items():
                value = f"{pairs['accuracy']:.4f} | +- {pairs['standard_error']:.4f} (standard error)"
                lines.append(f"| pairs of {name}{told_aligned(pairs)} | accuracy | {value} |")
    return "\n".join(lines) if len(lines) > 2 else "None were measured with this encoder (`command=eval` does it)."


# ---- eval ----

PICTURES = ("cmc", "roc", "similarity", "neighbours", "alignment")  # the last one is drawn by embed


def files_of_evaluation(cfg: Config, folder: Path) -> dict[str, Path]:
    """Files that an evaluation owns, like its section of report.md: it replaces all of them and touches no other's.

    metrics.json, plots/cmc.png, ... belong to the run's own test vectors; metrics_lfw.json, plots/lfw_cmc.png, ... to lfw.parquet;
    of eval.out=other/x.json they are other/x.cmc.png, ...
    """
    vectors, own = cfg.eval.embeddings or embedded_file(cfg, folder), os.path.abspath(folder / "embeddings/test_embeddings.parquet")
    is_own = own in (os.path.abspath(folder / vectors), os.path.abspath(vectors))
    out = cfg.eval.out or ("metrics.json" if is_own else f"metrics_{short_name(vectors)}.json")
    metrics = Path(os.path.abspath(folder / out))
    files = {"metrics": metrics, "ranks": metrics.with_suffix(".ranks.parquet")}  # the rank of each probe
    pictures = f"{metrics.with_suffix('')}."  # beside a file of any other name, which may be anywhere
    if metrics.parent == Path(os.path.abspath(folder)) and re.match(r"metrics(_|$)", metrics.stem):
        pictures = f"{folder}/plots/" + f"{metrics.stem}_".removeprefix("metrics_")
    return files | {what: Path(f"{pictures}{what}.png") for what in PICTURES}


def check_provenance(path: Path, data: dataio.VectorTable, cfg: Config, folder: Path) -> int | None:
    """How many identities the embedded side of the split has, None where its table is not there.

    Raises ValueError for vectors of people who were trained on, or of another split than the run's. Warns of what cannot be known
    of a foreign file, and of vectors that are missing.
    """
    note, names = data.note, set(np.unique(data.names).tolist())
    if note.get("trained_on"):
        raise ValueError(
            f"{path}: {note['trained_on']} of its identities were trained on; measure unseen ones. If they are other people "
            "with the same names, rename them in the files"
        )
    splits = dataio.read_identity_splits(cfg.split.table) if cfg.split.table.exists() else None
    if not note:
        told = "%s: not written by embed: nobody can tell here whether its identities were trained on, nor by which checkpoint"
        log.warning(told, path)
        if splits and (trained := names & splits.trained):
            told = "LEAK? %d of its identities, such as %r, are on the train side of %s; is the file of the same people?"
            log.warning(told, len(trained), min(trained), cfg.split.table)
        return None
    if note.get("trained_on") is None:
        log.warning("%s: embed could not tell whether its identities were trained on", path)
    lines, made_at = read_log(folder), note.get("step")
    if cfg.embed.checkpoint == "last" and lines and made_at != lines[-1]["step"]:
        of = "by weights of another program" if made_at is None else f"of step {made_at}"
        log.warning("%s is %s, the run is at step %d: command=embed brings it up to date", path, of, lines[-1]["step"])
    made_with, ours = note.get("table"), {start["table"] for start in read_starts(folder)}
    if made_with and ours and made_with not in ours:
        raise ValueError(f"{path}: its checkpoint was trained with split table {made_with}, the run in {folder} with {min(ours)}")
    if not splits or made_with not in splits.hashes or not note.get("split"):
        return None
    asked = set(splits.identities[note["split"]])
    if strangers := names - asked:
        raise ValueError(
            f"{path}: {len(strangers)} of its identities, such as {min(strangers)!r}, are not on the {note['split']} side "
            f"of {cfg.split.table}; write it again with command=embed"
        )
    if missing := asked - names:
        log.warning("%s: %d of %d identities have no vector, such as %r", path, len(missing), len(asked), min(missing))
    return len(asked)


def count_leaks(data: dataio.VectorTable, drawn: moco.Enrolment | None) -> dict[str, int | None]:
    """Count what would flatter the figures, and warn loudly: equal pictures in gallery and probes, test pictures in train."""
    twins = None
    if data.hashes is not None and drawn:
        twins = int(np.isin(data.hashes[drawn.probes], data.hashes[drawn.enrolled]).sum())
    leaks = {"probes_equal_to_enrolled": twins, "pictures_in_train": data.note.get("pictures_in_train")}
    for what, count in leaks.items():
        if count:
            log.warning(
                "LEAK: %d %s, byte for byte: the figures are too good; remove the duplicates", count, what.replace("_", " ")
            )
    return leaks


def measure_pairs(path: Path, data: dataio.VectorTable, fars: list[float]) -> dict:
    """The figures of a pair protocol such as LFW's."""
    a, b, same, fold = dataio.read_pairs(path, data.names, data.files)
    try:
        return moco.pair_figures(np.einsum("nd,nd->n", data.vectors[a], data.vectors[b]), same, fold, fars)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_vectors(path: Path) -> dataio.VectorTable:
    """A table of vectors that can be measured. Raises ValueError."""
    data = dataio.read_vectors(path)
    moco.check_vectors(data.vectors, str(path), foreign=not data.note)
    return data


def read_reference(path: Path, name: str, data: dataio.VectorTable) -> dataio.VectorTable | None:
    """A reference's vectors of the same pictures, None where `embed` wrote none."""
    file = reference_path(path, name)
    if not file.exists():
        return None
    reference = read_vectors(file)
    same_note = all(
        reference.note.get(key) == data.note.get(key) for key in ("table", "split", "data", "flip", "whitened", "aligned")
    )
    if not same_note or not np.array_equal(reference.keys, data.keys) or not np.array_equal(reference.names, data.names):
        raise ValueError(f"{file}: not the pictures of {path}, or embedded otherwise; run command=embed again, or delete it")
    return reference


def measure_benchmarks(path: Path, cfg: Config, folder: Path) -> dict[str, dict[str, dict]]:
    """The figures of each of eval.pairs by encoder and name: NAME_pairs.parquet on NAME.parquet beside `path`, others on `path`.

    Raises FileNotFoundError, with the command that makes them, for vectors that are missing.
    """
    found: dict[str, dict[str, dict]] = {"trained": {}}
    for pairs in dataio.find_files(cfg.eval.pairs):
        name, pictures = pairs.stem.removesuffix("_pairs"), pictures_of(pairs)
        vectors = path.with_name(f"{short_name(str(pictures))}.parquet") if pictures else path
        cure = f"command=embed run={shlex.quote(cfg.run)} embed.test_glob={shlex.quote(str(pictures))}"
        if not vectors.is_file():
            raise FileNotFoundError(f"{pairs}: is scored on {vectors}, which is not there; write it by {cure}")
        if name in found["trained"]:
            raise ValueError(f"eval.pairs: two files of the name {name}, {pairs} is the second; rename one")
        data = read_vectors(vectors)
        if vectors != path:
            check_provenance(vectors, data, cfg, folder)
            ours = dataio.read_metadata(path) | {"data": [dataio.build_index(str(pictures), None, cfg.data.columns).fingerprint]}
            if any(data.note.get(key) != ours.get(key) for key in ("checkpoint", "flip", "whitened", "data")):
                raise ValueError(f"{vectors}: not of these pictures by the encoder of {path}; write it again by {cure}")
        found["trained"][name] = measure_pairs(pairs, data, cfg.eval.fars) | {"aligned": data.note.get("aligned")}
        for encoder in REFERENCES:
            if reference := read_reference(vectors, encoder, data):
                found.setdefault(encoder, {})[name] = measure_pairs(pairs, reference, cfg.eval.fars)
    return found


def pairs_table(metrics: dict, encoders: Iterable[str]) -> list[str]:
    """A line for each pair protocol, and their mean: accuracy by encoder, chance, and TAR at the smallest FAR they support."""
    by_encoder = {name: (metrics if name == "trained" else metrics[name])["pair_protocol"] for name in encoders}
    if not (protocols := metrics["pair_protocol"]):
        return []
    rows = {"Accuracy of pairs": [*by_encoder, "chance", "TAR, trained"]}
    for name, ours in protocols.items():
        found = [its.get(name) for its in by_encoder.values()]
        cells = ["{accuracy:.4f} +- {standard_error:.4f}".format_map(figures) if figures else "" for figures in found]
        fars = sorted(float(figure[4:]) for figure in ours if figure.startswith("tar@"))[:1]
        cells += [f"{ours['chance']:.3f}", *(f"{ours[f'tar@{far:g}']:.3f} at FAR {far:g}" for far in fars)]
        rows[f"{name}, {ours['pairs']}{told_aligned(ours)}"] = cells
    if len(protocols) > 1:
        means = ([its[name]["accuracy"] for name in protocols if name in its] for its in by_encoder.values())
        rows["mean"] = [f"{np.mean(each):.4f}" if len(each) == len(protocols) else "" for each in means]
    width = max(map(len, rows)) + 3
    lines = [f"{title:<{width}}" + "".join(f"{cell:<20}" for cell in cells) for title, cells in rows.items()]
    return [*lines, "judged by the threshold of the other folds; +- is the standard error over the folds", ""]


def results_table(metrics: dict, encoders: Iterable[str], cfg: moco.EvalConfig) -> str:
    """The compact tables of the terminal: pairs first, then a row an encoder, intervals in brackets, chance last."""
    gallery, rate = metrics["gallery"], "{:z.3f} [{:z.3f}, {:z.3f}]".format
    columns = [(f"Rank-{k}", lambda f, k=k: rate(f[f"rank{k}"], *f[f"rank{k}_ci"]), min(1, k / gallery)) for k in cfg.top_k]
    rows = {"": [title for title, _, _ in columns]}
    rows |= {name: [cell(metrics if name == "trained" else metrics[name]) for _, cell, _ in columns] for name in encoders}
    rows["chance"] = [f"{chance:.3f}" for _, _, chance in columns]
    lines = pairs_table(metrics, encoders)
    lines += [f"{name:<12}" + "".join(f"{cell:<24}" for cell in cells) for name, cells in rows.items()]
    who = "unseen identities" if metrics["made_from"].get("trained_on") == 0 else "identities, not known to be unseen,"
    lines.append(
        f"{metrics['gallery']} {who} enrolled with {metrics['enroll_per_id']} pictures each ({metrics['distractors']} of them "
        f"distractors), {metrics['probes']} probes; 95 % intervals over identities"
    )
    return "\n".join(line.rstrip() for line in lines)


def write_report(folder: Path, files: dict[str, Path], metrics: dict, table: str, cfg: Config) -> None:
    """The section of report.md of an evaluation that owns `files`, by conf/templates/report.md."""

    def rows(figures: dict, *labels: object, only: str | None = None, beside: Iterable[dict] = ()) -> str:
        """A line for each figure with an interval, or for the figure `only` under other labels; others' values behind it."""
        lines = []
        for name in (name for name in figures if f"{name}_ci" in figures and only in (None, name)):
            low, high = figures[f"{name}_ci"]
            others = (f"{other[name]:z.4f}" if name in other else "" for other in beside)
            lines.append((*(labels or (name,)), f"{figures[name]:z.4f}", f"{low:z.4f} to {high:z.4f}", *others))
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

    draws, gallery, first = metrics["enrolment_draws"], metrics["gallery"], f"rank{cfg.eval.top_k[0]}"
    references = {name: metrics[name] for name in REFERENCES if name in metrics}
    chance = {f"rank{k}": min(1, k / gallery) for k in {1, 5, 10, *cfg.eval.top_k}} | {f"tar@{far:g}": far for far in cfg.eval.fars}
    ranks = np.minimum(np.arange(1, gallery + 1), moco.last_rank(cfg.eval) + 1)
    chance |= {"auc": 0.5, "eer": 0.5, "mrr": float((1 / ranks).mean())}
    refused = [f"{figure} of the pairs of {name}" for name, its in metrics["pair_protocol"].items() for figure in its["refused"]]
    refused += metrics["refused"] + metrics["open_set"].get("refused", [])
    values = {
        "table": table, "first": first, "made_from": json.dumps(metrics["made_from"]),
        "figures": rows(metrics, beside=(*references.values(), chance)),
        "references": "".join(f" {name} |" for name in references), "rules": "---|" * len(references),
        "open_set": rows(metrics["open_set"]) or "| none | | |",
        "refused": ", ".join(refused) or "none",
        "draws": f"{draws['rank1_mean']:.4f} on average over {draws['draws']} draws (deviation {draws['rank1_std'] or 0:.4f})",
        "geometry": ", ".join(f"{name.replace('_', ' ')} {value:z.3f}" for name, value in metrics["geometry"].items()),
        "sources": "\n".join(rows(f, name, f["probes"], only=first) for name, f in metrics["per_source"].items()),
        "sweep": "\n".join(rows(f, n, only=first) for n, f in metrics["enroll_sweep"].items()),
        "pictures": show_pictures(folder, *(files[name] for name in PICTURES)),
    }  # fmt: skip
    put_section(folder, files, string.Template((CONF / "templates" / "report.md").read_text()).substitute(values))


def show_pictures(folder: Path, *pictures: Path) -> str:
    """Those that are there, in a text that lies in `folder`."""
    return "\n\n".join(f"![{path.stem}]({os.path.relpath(path, folder)})" for path in pictures if path.exists())


def put_section(folder: Path, files: dict[str, Path], text: str) -> None:
    """report.md: a run on one page, with a section for each evaluation; this replaces that of `files`."""
    heading = f"## {os.path.relpath(files['metrics'], folder)}"
    there = (folder / "report.md").read_text(errors="replace") if (folder / "report.md").exists() else ""
    sections = {part.split("\n")[0]: part for part in re.split(r"^(?=## )", there, flags=re.MULTILINE)[1:]}
    sections[heading] = f"{heading}\n\n{text}"
    head = (f"# Run {folder.name}", show_pictures(folder, folder / "plots/train.png", folder / "plots/views.png"))
    write_text(folder / "report.md", "\n\n".join(part.strip() for part in (*head, *sections.values()) if part) + "\n")


def evaluate(cfg: Config, folder: Path, typed: set[str] = frozenset()) -> dict:
    """Measure an embeddings file: figures to metrics.json, a table to the terminal, pictures and report.md to the run's folder."""
    if (folder / "config.yaml").exists():
        cfg = settings_of(read_saved_settings(folder / "config.yaml"), cfg, typed)
    files, asked_for = files_of_evaluation(cfg, folder), cfg.eval.embeddings or embedded_file(cfg, folder)
    path = next((path for path in (folder / asked_for, Path(asked_for)) if path.is_file()), None)
    if path is None:
        places = f"{folder / asked_for}: no such file, nor {Path(asked_for).absolute()}"
        raise FileNotFoundError(f"{places}; command=embed writes it, or set eval.embeddings")
    log.info("measuring %s", path)
    pairs = measure_benchmarks(path, cfg, folder)
    device, data = moco.pick_device(cfg.device), read_vectors(path)
    asked = check_provenance(path, data, cfg, folder)
    about = {"identities_asked": asked, "embeddings": str(path), "made_from": data.note, "pair_protocol": pairs["trained"]}
    about["pairs_mean"] = float(np.mean([one["accuracy"] for one in pairs["trained"].values()])) if pairs["trained"] else None
    if pairs["trained"] and nobody_twice(data.names):
        log.info("nobody has two pictures: pairs alone are measured")
        metrics = about | {name: {"pair_protocol": its} for name, its in pairs.items() if name != "trained"}
        metrics |= {"leaks": count_leaks(data, None)}
        for name in {*files} - {"metrics", "alignment"}:  # of an earlier evaluation
            files[name].unlink(missing_ok=True)
        write_text(files["metrics"], json.dumps(metrics, indent=1))
        table = "\n".join(line.rstrip() for line in pairs_table(metrics, pairs))
        log.info("%s", table)
        put_section(folder, files, f"```\n{table}\n```")
        return metrics
    metrics, ours = moco.evaluate(data, cfg.eval, device)
    metrics |= about | {"leaks": count_leaks(data, ours.drawn)}
    if metrics["gallery"] <= max(cfg.eval.top_k):
        log.warning("only %d identities are enrolled: Rank-%d is always 1", metrics["gallery"], max(cfg.eval.top_k))
    measured, leads = {"trained": ours}, {}
    data = data._replace(vectors=np.empty((0, 0)))  # the next ones are as large: one at a time
    for name in REFERENCES:
        if reference := read_reference(path, name, data):
            measured[name] = moco.measure(reference, cfg.eval, device)
            metrics[name] = measured[name].figures() | {"pair_protocol": pairs.get(name, {})}
            hits = [one.found.rank == 1 for one in (ours, measured[name])]
            leads[name] = moco.paired_difference(*hits, ours.people, cfg.eval.seed, cfg.eval.bootstrap)
            metrics[name] |= moco.as_figures({"rank1_lead": leads[name]})  # of the trained encoder
    ranks = {"identity_id": data.names[ours.drawn.probes], "picture": data.keys[ours.drawn.probes], "rank": ours.found.rank}
    ranks = pa.table(ranks)
    with write_whole(files["ranks"]) as temporary:  # ranks beyond this one are not told apart
        note = {"ranks_cut_from": moco.last_rank(cfg.eval) + 1}
        pq.write_table(ranks.cast(dataio.with_metadata(ranks.schema, note)), temporary)
    write_text(files["metrics"], json.dumps(metrics, indent=1))
    table = results_table(metrics, measured, cfg.eval)
    log.info("%s", table)
    for name, lead in leads.items():  # what needs no training must be beaten
        if not lead.low > 0:
            log.warning("the trained encoder is not ahead of %s: Rank-1 %+.3f [%+.3f, %+.3f]", name, *lead)
    with not_vital("pictures of the results"):
        draw_results(files, data, measured, cfg, metrics["gallery"])
    write_report(folder, files, metrics, table, cfg)
    return metrics


# ---- report: several runs side by side ----


def read_metrics(file: Path) -> dict:
    """What `evaluate` wrote. Raises ValueError for a damaged file."""
    with dataio.naming(file, cure="run command=eval again"):
        return json.loads(file.read_text())


def difference_to(first: Path, run: Path, cfg: Config) -> dict[str, float | None]:
    """Rank-1 of a run minus that of the first, with its interval; empty values where it was not measured on the same probes."""
    names = ("rank1_change", "rank1_change_low", "rank1_change_high")
    files = [files_of_evaluation(cfg, path) for path in (first, run)]
    if not all(its[name].exists() for its in files for name in ("metrics", "ranks")):
        return dict.fromkeys(names)
    base, ours = (pq.read_table(its["ranks"]).sort_by([("identity_id", "ascending"), ("picture", "ascending")]) for its in files)
    if not base.select(["identity_id", "picture"]).equals(ours.select(["identity_id", "picture"])):
        return dict.fromkeys(names)
    hits = [table["rank"].to_numpy() == 1 for table in (ours, base)]
    change = moco.paired_difference(*hits, np.array(base["identity_id"].to_pylist()), cfg.eval.seed, cfg.eval.bootstrap)
    return dict(zip(names, change, strict=True))


def settings_file(run: Path) -> Path | None:
    """The settings that a run was trained with, else those that it was asked for and failed on; None for a folder of no run."""
    asked = (path for path in run.glob(".hydra/*/config.yaml") if path.parent.name in ("train", "all", "eval"))
    asked = sorted(asked, key=lambda path: path.stat().st_mtime_ns)
    return run / "config.yaml" if (run / "config.yaml").exists() else asked[-1] if asked else None


def report(cfg: Config | DictConfig, pattern: str) -> None:
    """Several runs side by side: table.csv and curves.png beside them, and the paired difference of each to the first measured."""
    import polars as pl

    found = {run: path for run in sorted(map(Path, glob.glob(pattern))) if (path := settings_file(run))}
    if not found:
        raise FileNotFoundError(f"report.runs={pattern}: no run there (a folder with config.yaml)")
    runs, settings = list(found), [flat(read_saved_settings(path)) for path in found.values()]
    files = (files_of_evaluation(cfg, run)["metrics"] for run in runs)
    metrics = [read_metrics(file) if file.exists() else {} for file in files]
    for setting, figures in zip(settings, metrics, strict=True):
        made = figures.get("made_from", {})
        setting |= {key: value for key, value in DEFAULTS.items() if key not in setting and key.startswith(("moco.", "train."))}
        setting |= {f"eval.{key}": figures[key] for key in ("enroll_per_id", "template", "seed") if key in figures}
        setting |= {f"vectors.{key}": made.get(key) for key in ("flip", "whitened", "aligned") if made}
    values = {key: [s[key] for s in settings if key in s and "${" not in str(s[key])] for key in sorted(set().union(*settings))}
    varied = [key for key, told in values.items() if key not in OF_EACH and any(value != told[0] for value in told)]
    first, rows = next((run for run, figures in zip(runs, metrics, strict=True) if "rank1" in figures), runs[0]), []
    for run, setting, figures in zip(runs, settings, metrics, strict=True):
        lines = read_log(run)
        state = f"epoch {lines[-1]['epoch']} of {setting['train.epochs']}" if lines else "not trained, see its log.txt"
        low, high = figures.get("rank1_ci", (None, None))
        step = figures.get("made_from", {}).get("step")
        earlier = f" at step {step}" if lines and step not in (None, lines[-1]["step"]) else ""
        rows.append({
            "run": run.name, "state": state + (f", measured{earlier}" if figures else ""),
            **{key: next((str(value) for value in values[key] if value == setting.get(key)), "") for key in varied},  # 0 is 0.0
            **{key: figures.get(key) for key in ("rank1", "rank5", "rank10", "mrr", "auc", "eer")},
            "rank1_low": low, "rank1_high": high, **difference_to(first, run, cfg),
        })  # fmt: skip
    out = Path(os.path.commonpath(runs)) if len(runs) > 1 else runs[0].parent
    with write_whole(out / "table.csv") as temporary:
        pl.DataFrame(rows, infer_schema_length=None).write_csv(temporary)
    if can_draw():
        with picture(out / "curves.png", 1, 2) as axes:
            for style, (run, figures) in enumerate(zip(runs, metrics, strict=True)):
                name = ", ".join(f"{key.split('.')[-1]}={s[:20]}" for key in varied[:3] if (s := rows[style][key])) or run.name[:40]
                lines, cmc = read_log(run), figures.get("cmc", [])
                steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
                curve(axes[0, 0], steps, losses, name, style, xlabel="step", ylabel="loss [nats]")
                curve(axes[0, 1], range(1, 1 + len(cmc)), cmc, name, style, **CMC_AXES)
    log.info("%s: %d runs", out / "table.csv", len(runs))


# ---- Dispatch ----


def train_for_objective(cfg: Config, folder: Path, typed: set[str]) -> float:
    """Train; returns what sweepers maximise: Rank-1 of the validation identities if there are any, else minus the monitor."""
    if cfg.split.materialize == "yes":
        split(cfg)
    monitor = train(cfg, folder)
    if not cfg.split.validation_ratio:
        return monitor
    chosen = dataclasses.replace(
        cfg.embed, checkpoint="last", split="val", test_glob=None, align="none", references=False, leak_check=False,
        out="embeddings/val_embeddings.parquet",
    )  # fmt: skip
    embed(dataclasses.replace(cfg, embed=chosen), folder, typed)
    vectors = read_vectors(folder / chosen.out)
    return moco.closed_set_rates(vectors, cfg.eval, cfg.eval.enroll_per_id, cfg.eval.seed)["rank1"].value


def train_and_measure(cfg: Config, folder: Path, typed: set[str]) -> float:
    """The whole path in one process: table, train, embed, eval."""
    objective = train_for_objective(cfg, folder, typed)
    embed(cfg, folder, typed)
    for pictures in filter(None, map(pictures_of, dataio.find_files(cfg.eval.pairs))):
        embed(dataclasses.replace(cfg, embed=dataclasses.replace(cfg.embed, test_glob=str(pictures), out=None)), folder, typed)
    evaluate(cfg, folder, typed)
    return objective


COMMANDS: dict[str, Callable[[Config, Path, set[str]], float | None]] = {
    "pack": pack,
    "split": split,
    "check": check,
    "train": train_for_objective,
    "embed": embed,
    "export": export,
    "eval": lambda cfg, folder, typed: evaluate(cfg, folder, typed) and None,
    "all": train_and_measure,
    "report": lambda cfg, folder, typed: report(cfg, cfg.report.runs or glob.escape(str(folder))),
}


def typed_keys(overrides: Iterable[str]) -> set[str]:
    """The settings that the user wrote on the command line: ["+train.lr=1"] -> {"train.lr"}."""
    return {word.lstrip("+~").split("=")[0].split("@")[0] for word in overrides}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(raw: DictConfig) -> float | None:
    """Run one command; what it returns is the objective for sweepers, higher is better."""
    folder, typed = Path(HydraConfig.get().runtime.output_dir), typed_keys(HydraConfig.get().overrides.task)
    try:
        try:
            cfg = load_config(raw, typed)
        except ValueError as error:
            key = re.match(r"[\w.]*", str(error))[0]
            set_here = typed - HydraConfig.get().runtime.choices.keys()  # to choose a file is not to set its keys
            raise ValueError(("" if under(key, set_here) else place_of(key)) + str(error)) from error
        with logging_redirect_tqdm():
            return COMMANDS[cfg.command](cfg, folder, typed)
    except Exception as error:
        log.debug("failed", exc_info=True)  # for log.txt: the terminal gets one line
        if in_sweep():  # Hydra tells of the first failure alone, and only when all jobs are done
            log.error("%s failed: %s", folder, in_short(error))
        traceback.clear_frames(error.__traceback__)  # a sweep keeps the errors of its jobs, and they all that the jobs held
        if isinstance(error, REFUSALS) and not in_sweep():
            end_with(error)  # at once: Hydra would print a line before ours
        raise
    finally:
        if in_sweep() and raw.command in ("train", "eval", "all"):
            with not_vital("table of the sweep"), dataio.locked(folder.parent / ".table.lock", wait=True):
                report(raw, glob.escape(str(folder.parent)) + "/*")  # so a sweep ends with its table, failed jobs in it
        gc.collect()  # what refers to itself, before the next job of a sweep asks how much memory is free
        torch.cuda.empty_cache()


TYPED = "SNIPERFACE_TYPED"  # in the environment: the command line, for the processes of a sweep as well


def disk_name(told: str, overrides: str) -> str:
    """`told` as a folder's name, with the hash of the overrides where it does not tell them all or makes no name for a disk."""
    name = re.sub(r"[^\w.,=+-]", "_", told) or "defaults"
    return name if name == overrides and len(name.encode()) <= 150 else f"{name[:60]}_{dataio.digest(overrides)}"


def folder_name(dirname: str, overrides: list[str], sweep_dir: str, excluded: list[str]) -> str:
    """The name of a sweep's job folder: those of the job's overrides that the sweep varies, without paths and long values.

    All of them, Hydra's `dirname`, where nothing varies, or where an older version has left the folder of that name.
    """
    whole, words = disk_name(dirname, dirname), shlex.split(os.environ.get(TYPED, ""))
    typed = OverridesParser.create().parse_overrides([word for word in words if re.match(r"[\w.@/+~]+=", word)])
    varies = {word.get_key_element(): word.is_sweep_override() for word in typed}  # typed twice, the last one counts
    told = [word for word in overrides if (key := word.split("=")[0]) not in excluded and varies.get(key, True)]
    varied = sorted(word.replace("=", "-", 1) for word in told)
    if not varied or Path(sweep_dir, whole).is_dir():
        return whole
    return disk_name("_".join(item for item in varied if "/" not in item and len(item) <= 60), "_".join(varied))


REFUSALS = (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException, yaml.YAMLError)  # told in one line


def in_short(error: Exception) -> str:
    """What went wrong, without Hydra's search path and without its advice to add an unknown key by force."""
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", str(error))  # "a,b", "range(3)" without -m
    if several or isinstance(error, OverrideParseException):
        word = several[1] if several else error.override
        key, equals, value = word.replace("\\", "\\\\").replace('"', '\\"').partition("=")
        spelling = shlex.quote(f'{key}="{value}"') if equals else f"command={key}" if key in COMMANDS else f"{key}=VALUE"
        return f"{word}: cannot be read; write {spelling}" + ", or add -m for a sweep over these values" * bool(several)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}: {error.problem!r}; write 'key: value', each key once, with spaces, no tabs"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return str(error)
    told = str(error).split("Config search path")[0]
    lines = [line.strip() for line in told.splitlines() if line.strip() and "To append to your config" not in line]
    return " ".join(lines) + "; see conf/ for what there is"


def end_with(error: Exception) -> NoReturn:
    sys.exit(f"sniperface: {in_short(error)}")


def stop_at_once(number: int, frame: object) -> None:
    """SIGTERM outside the training loop ends like Ctrl-C: what is half written is taken away, and a line says how to go on."""
    raise KeyboardInterrupt(number)


def check_flags(words: list[str]) -> None:
    """Raise ValueError for a flag that Hydra has not, such as --epochs=3, with the setting of that name."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            get_args_parser().parse_args(words)
    except SystemExit as error:
        if not error.code:
            raise
        keys = lines_of(yaml.compose((CONF / "config.yaml").read_text()))
        for flag, equals, value in (word.partition("=") for word in words if re.match(r"--?[a-z_.-]{3,}", word)):
            name = flag.lstrip("-").replace("-", "_")
            if found := next((key for key in keys if f".{key}".endswith(f".{name}")), None):
                raise ValueError(f"{flag}{equals}{value}: settings have no dashes; write {found}={value or 'VALUE'}") from error
        why = told.getvalue().strip().split("error: ")[-1]
        raise ValueError(f"{why}; settings have no dashes, see conf/config.yaml") from error


def start() -> None:
    """The command line: run `main`, and end in one line where it cannot."""
    signal.signal(signal.SIGTERM, stop_at_once)
    sys.argv[1:] = [word.replace("=~/", f"={Path.home()}/") for word in sys.argv[1:]]  # Hydra's grammar has no ~
    os.environ[TYPED] = shlex.join(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra's own refusals arrive below as exceptions
    try:
        check_flags(sys.argv[1:])
        main()
    except KeyboardInterrupt as stopped:
        print("sniperface: stopped; the same command goes on where it can", file=sys.stderr)
        sys.exit(128 + (stopped.args or (signal.SIGINT,))[0])
    except REFUSALS as error:
        end_with(error)


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("program", lambda path: f"{glob.escape(str(PROGRAM))}/{path}", replace=True)

if __name__ == "__main__":
    import sniperface  # not __main__'s own `main`: launchers that start processes look it up by its module's name

    sniperface.start()
