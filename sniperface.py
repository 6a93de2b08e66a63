"""SniperFace: train a face encoder without labels, export its vectors, measure it on identities it has never seen.

    uv run python sniperface.py [command=split|train|embed|eval|all|report] [overrides]

Each command below reads from top to bottom; what it decodes, builds or computes is in dataio.py and moco.py. Settings and what each
one means: conf/config.yaml. Everything a run makes is in runs/<run>/.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
import traceback
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataio
import moco
from dataio import draw, draw_seed, progress, two_views, write_whole

log = logging.getLogger("sniperface")
CONF = Path(__file__).resolve().parent / "conf"

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    epochs: int = field(metadata={"at_least": 1})
    batch_size: int = field(metadata={"at_least": 2})
    lr: float = field(metadata={"above": 0})
    momentum: float = field(metadata={"at_least": 0, "below": 1})
    weight_decay: float = field(metadata={"at_least": 0})
    warmup_epochs: float = field(metadata={"at_least": 0})
    clip_grad_norm: float | None = field(metadata={"above": 0})
    amp: str = field(metadata={"one_of": ("auto", "bf16", "fp16", "fp32")})
    compile: bool
    max_steps: int | None = field(metadata={"at_least": 1})
    monitor_images: int = field(metadata={"at_least": 2})
    min_spread: float = field(metadata={"at_least": 0, "below": 1})
    min_gap: float = field(metadata={"at_least": 0, "below": 1})
    when_stuck: str = field(metadata={"one_of": ("warn", "stop")})
    log_every: int = field(metadata={"at_least": 1})
    save_every_epochs: int = field(metadata={"at_least": 1})
    save_every_steps: int | None = field(metadata={"at_least": 1})
    keep_last: int = field(metadata={"at_least": 1})
    resume: str = field(metadata={"one_of": ("auto", "never", "must")})


@dataclass
class EmbedConfig:
    checkpoint: str
    split: str = field(metadata={"one_of": ("test", "val")})
    test_glob: str | None
    batch_size: int = field(metadata={"at_least": 1})
    flip: bool
    references: bool
    leak_check: bool
    out: str


@dataclass
class EvalConfig:
    embeddings: str
    enroll_per_id: int = field(metadata={"at_least": 1})
    enroll_sweep: list[int] = field(metadata={"at_least": 1})
    template: str = field(metadata={"one_of": ("centroid", "best")})
    repeats: int = field(metadata={"at_least": 1})
    open_set_share: float = field(metadata={"at_least": 0, "below": 1})
    fpirs: list[float] = field(metadata={"above": 0, "at_most": 1})
    fars: list[float] = field(metadata={"above": 0, "at_most": 1})
    pairs: str | None
    seed: int = field(metadata={"at_least": 0})
    top_k: list[int] = field(metadata={"at_least": 1, "at_most": 1000})
    bootstrap: int = field(metadata={"at_least": 100})
    out: str


@dataclass
class ReportConfig:
    runs: str | None


@dataclass
class Config:
    command: str = field(metadata={"one_of": ("split", "train", "embed", "eval", "all", "report")})
    run: str
    run_dir: str
    seed: int = field(metadata={"at_least": 0})
    device: str
    deterministic: bool
    data: dataio.DataConfig
    split: dataio.SplitConfig
    curriculum: dataio.CurriculumConfig
    augment: dataio.AugmentConfig
    backbone: moco.BackboneConfig
    moco: moco.MocoConfig
    train: TrainConfig
    embed: EmbedConfig
    eval: EvalConfig
    report: ReportConfig


LIMITS: dict[str, tuple[str, Callable]] = {
    "above": (">", lambda value, limit: value > limit),
    "at_least": (">=", lambda value, limit: value >= limit),
    "below": ("<", lambda value, limit: value < limit),
    "at_most": ("<=", lambda value, limit: value <= limit),
    "one_of": ("one of", lambda value, limit: value in limit),
}


def check_ranges(cfg: object, prefix: str = "") -> None:
    """Check each setting against the limits beside its type.

    Raises ValueError that names the key, the value and what is allowed.
    """
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


def load_config(raw: DictConfig) -> Config:
    """The composed settings as a typed `Config`.

    Raises ValueError, in one line, for an unknown key, a wrong type or a bad value.
    """
    try:
        plain = OmegaConf.to_container(raw, resolve=True)
        cfg: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except Exception as error:  # omegaconf's errors say the key in a line of their own
        lines = [line.strip() for line in str(error).splitlines()]
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        raise ValueError(f"{key}: {lines[0]}; see conf/config.yaml for the settings") from error
    check_ranges(cfg)
    points, shares = cfg.curriculum.progress, cfg.curriculum.digiface_share
    if len(points) != len(shares) or sorted(set(points)) != points or not all(0 <= v <= 1 for v in points + shares):
        raise ValueError(
            f"curriculum.progress={points}, digiface_share={shares}: two lists of one length in 0..1, progress ascending"
        )
    drawn_keys = cfg.train.batch_size * (2 if cfg.moco.symmetric else 1)
    if cfg.moco.queue_size < drawn_keys:
        raise ValueError(f"moco.queue_size={cfg.moco.queue_size}: must be >= {drawn_keys}, the keys of one step (train.batch_size)")
    if cfg.train.warmup_epochs >= cfg.train.epochs:
        raise ValueError(f"train.warmup_epochs={cfg.train.warmup_epochs}: must be < train.epochs={cfg.train.epochs}")
    for name, op in vars(cfg.augment).items():
        if isinstance(op, dataio.Op) and (op.low > op.high or (op.low <= 0 and name in ("zoom", "aspect"))):
            raise ValueError(f"augment.{name}: low={op.low} must be <= high={op.high}, and > 0 for zoom and aspect")
    if len(cfg.backbone.layers) != 4:
        raise ValueError(f"backbone.layers={cfg.backbone.layers}: must be four numbers")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# Runtime: device and precision
# ---------------------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name}: {dataio.first_line(error)}; choose auto, cpu, cuda, cuda:N or mps") from error
    return device


def configure_process(device: torch.device, deterministic: bool, tf32: bool) -> None:
    """Set what torch and the C library keep for the whole process, in full each time: the jobs of a sweep share one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; without it no deterministic product
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # each value of ours is written before it is read
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu" and sys.platform == "linux":  # keep freed memory: else each large tensor is mapped and zeroed anew
        with contextlib.suppress(AttributeError):  # a C library without mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def computes_in_bf16() -> bool:
    """Whether this CPU multiplies faster in bf16 than in fp32: Intel's do with AMX alone, else at 0.66 of the rate; AMD's at 2."""
    intel = "intel" in torch.cpu.get_capabilities().get("cpu_name", "").lower()
    return torch.cpu._is_amx_tile_supported() if intel else torch.cpu._is_avx512_bf16_supported()


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast type: `auto` is bf16 where that is faster, else fp16 on a GPU, else fp32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and computes_in_bf16() else torch.float32


def describe_machine(device: torch.device) -> dict:
    """What else is needed to repeat a run: versions, commit, hardware."""

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        done = subprocess.run(["git", "-C", str(CONF.parent), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("torch", "torchvision", "numpy", "pyarrow", "hydra-core", "pillow")
    changes = git("status", "--porcelain")
    return {
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Identities and rows
# ---------------------------------------------------------------------------------------------------------------------


def sources_of(cfg: Config) -> dict[str, str]:
    named = {"digiface": cfg.data.digiface_glob, "digi2real": cfg.data.digi2real_glob}
    return {source: pattern for source, pattern in named.items() if pattern is not None}


def find_sources(cfg: Config) -> dict[str, list[Path]]:
    """The files of each source. Raises FileNotFoundError that tells a newcomer where the data comes from."""
    folder, patterns = Path(cfg.data.digiface_glob).parent, sources_of(cfg).values()
    if (
        cfg.data.demo_identities
        and not all(map(glob.glob, patterns))
        and all("drawn" in dataio.read_metadata(path) for path in folder.glob("*.parquet"))  # never over or beside a user's files
    ):
        dataio.write_demo_faces(folder, cfg.data.demo_identities, 16, 8, cfg.data.image_size, seed=0)
    try:
        files = {source: dataio.find_files(pattern) for source, pattern in sources_of(cfg).items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}.\nThe data is DigiFace-1M (github.com/microsoft/DigiFace1M) and Digi2Real (Idiap) as parquet, see README.md; "
            "set data.digiface_glob and data.digi2real_glob.\n"
            "To see everything work without data: uv run python sniperface.py experiment=demo"
        ) from error
    doubled = set.intersection(*({path.resolve() for path in paths} for paths in files.values())) if len(files) > 1 else set()
    if doubled:  # its pictures would be enrolled under one source and probed under the other
        raise ValueError(f"{min(doubled)}: matches both data.digiface_glob and data.digi2real_glob; give each source its own files")
    return files


def read_split_table(cfg: Config, extend: bool = False) -> dataio.Splits:
    """The split table of the data, made if there is none. Raises ValueError for a table of another split or of other data."""
    path = Path(cfg.split.out_dir) / "identity_splits.parquet"
    wanted = {"seed": cfg.split.seed, "train_ratio": cfg.split.train_ratio, "validation_ratio": cfg.split.validation_ratio}
    find_sources(cfg)
    found = dataio.collect_unique_identities(list(sources_of(cfg).values()), cfg.data.columns)
    if not path.exists():
        splits = dataio.write_identity_splits(found, path, **wanted)
        log.info("%s: %s", path, ", ".join(f"{len(ids)} {side}" for side, ids in splits.identities.items()))
        return splits
    splits = dataio.read_identity_splits(path)
    made_with = {key: splits.note.get(key) for key in wanted}
    if made_with != wanted:
        raise ValueError(
            f"{path} was made with {made_with}, asked for is {wanted}; set another split.out_dir, or the settings it was made with"
        )
    known = {identity: side for side, identities in splits.identities.items() for identity in identities}
    new = [identity for identity in found if identity not in known]
    if len(new) == len(found):
        raise ValueError(f"{path} knows none of the {len(found)} identities of the data; set another split.out_dir")
    if new and not extend:
        log.warning("%s lacks %d identities of the data, which are left out; command=split adds them", path, len(new))
    if new and extend:
        earlier = [*splits.note.get("extends", []), splits.hash]
        splits = dataio.write_identity_splits(found, path, known=known, extends=earlier, **wanted)
        log.info("%s: %d new identities: %s", path, len(new), {side: len(ids) for side, ids in splits.identities.items()})
    return splits


@dataclass
class Rows:
    """Where one side of the split is: for each source the files and the identities allowed in them (None: all)."""

    sources: dict[str, tuple[list[str], list[str] | None]]
    table: str  # hash of the split table
    shards: bool  # materialised shards, which need no filter
    extends: list[str]  # hashes of earlier states of the table, whose identities are all on the same side in this one


def complete_shards(folder: Path, table: str, side: str) -> list[str]:
    """The shards in a folder, all of them, of one split table and one side. Raises ValueError otherwise."""
    paths = dataio.find_files(f"{glob.escape(str(folder))}/*.parquet")
    notes = [dataio.read_metadata(path) for path in paths]
    if any((note.get("table"), note.get("split"), note.get("shards")) != (table, side, len(paths)) for note in notes):
        raise ValueError(
            f"{folder}: {len(paths)} files, not the {side} shards of split table {table}; delete it and run command=split"
        )
    return list(map(str, paths))


def locate_siblings(files: dict[str, list[Path]], notes: dict[str, dict], side: str) -> Rows:
    """The globs name shards: those, or the ones of another side beside them. Raises ValueError for a part of them."""
    tables = {note.get("table") for note in notes.values()}
    if len(tables) != 1:
        raise ValueError(f"{files}: shards of different split tables {tables}; materialise both sources with one command=split")
    table = tables.pop()
    if side == "train":
        for source, paths in files.items():
            if notes[source].get("split") != "train" or len(paths) != notes[source]["shards"]:
                raise ValueError(
                    f"{paths[0].parent}: {len(paths)} {notes[source].get('split')} shards; train on all of .../train/{source}"
                )
    folders = {source: paths[0].parent.parent.parent / side / paths[0].parent.name for source, paths in files.items()}
    return Rows({source: (complete_shards(folder, table, side), None) for source, folder in folders.items()}, table, True, [])


def locate_rows(cfg: Config, side: str, shards: bool | None = None) -> Rows:
    """Find the rows of one side of the split: in shards that are given by glob, in materialised ones (unless `shards` is
    False), or in the data, filtered. Raises ValueError for shards of another side or split."""
    files = find_sources(cfg)
    notes = {source: dataio.read_metadata(paths[0]) for source, paths in files.items()}
    if any("split" in note for note in notes.values()):
        return locate_siblings(files, notes, side)
    splits = read_split_table(cfg)
    folders = {source: Path(cfg.split.out_dir) / side / source for source in files}
    if shards is not False and all(folder.is_dir() for folder in folders.values()):
        of_data = {s: dataio.build_index(list(map(str, p)), splits.identities[side], cfg.data.columns) for s, p in files.items()}
        found = {
            s: dataio.read_metadata(dataio.find_files(f"{glob.escape(str(folder))}/*.parquet")[0]) for s, folder in folders.items()
        }
        if all((found[s].get("table"), found[s].get("source")) == (splits.hash, of_data[s].fingerprint) for s in files):
            complete = {source: (complete_shards(folder, splits.hash, side), None) for source, folder in folders.items()}
            return Rows(complete, splits.hash, True, splits.note.get("extends", []))
        log.warning("%s: materialised from other data or another split; not used", Path(cfg.split.out_dir) / side)
    if shards:
        raise ValueError(f"{cfg.split.out_dir}: the shards that the run was started on are gone; command=split makes them")
    filtered = {source: (list(map(str, paths)), splits.identities[side]) for source, paths in files.items()}
    return Rows(filtered, splits.hash, False, splits.note.get("extends", []))


def shard_columns(cfg: Config, rows: Rows) -> dataio.Columns:
    return dataio.COLUMNS if rows.shards else cfg.data.columns


def open_streams(cfg: Config, rows: Rows) -> dict[str, dataio.ParquetImageStream]:
    data = cfg.data
    return {
        source: dataio.ParquetImageStream(
            globs, data.shuffle_files, data.shuffle_buffer, data.batch_read_rows, allowed, columns=shard_columns(cfg, rows),
            image_size=data.image_size, seed=draw_seed(cfg.seed, source), max_bad_fraction=data.max_bad_fraction,
            max_image_pixels=data.max_image_pixels,
        )
        for source, (globs, allowed) in rows.sources.items()
    }  # fmt: skip


def cached(cfg: Config, streams: dict[str, dataio.ParquetImageStream], device: torch.device) -> list:
    """The streams as data.cache asks for: as they are, from a map of decoded images, or from the device's memory."""
    if cfg.data.cache == "none":
        return list(streams.values())
    if cfg.data.cache == "decoded":
        return [dataio.DecodedCache(stream, cfg.data.cache_dir, cfg.data.workers) for stream in streams.values()]
    return [dataio.DeviceCache(stream, cfg.data.cache_dir, cfg.data.workers, device) for stream in streams.values()]


def split(cfg: Config, folder: Path) -> None:
    """Write the split table, extended to new identities, and, if asked for, each side as shards."""
    table = Path(cfg.split.out_dir) / "identity_splits.parquet"
    splits = read_split_table(cfg, extend=True)
    log.info("%s: %s (table %s)", table, ", ".join(f"{len(ids)} {side}" for side, ids in splits.identities.items()), splits.hash)
    if cfg.split.materialize == "no":
        return
    for side, (source, paths) in itertools.product((s for s, ids in splits.identities.items() if ids), find_sources(cfg).items()):
        out_dir = Path(cfg.split.out_dir) / side / source
        shards = dataio.materialize_split(list(map(str, paths)), table, out_dir, side, cfg.data.columns)
        log.info("%s: %d shards, %.2f GB", out_dir, len(shards), sum(path.stat().st_size for path in shards) / 1e9)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and the run folder
# ---------------------------------------------------------------------------------------------------------------------

NOT_THE_RESULT = (                                           # settings that may differ when a run goes on
    "command", "run", "run_dir", "device", "deterministic", "data.digiface_glob", "data.digi2real_glob", "data.demo_identities",
    "data.workers", "data.cache", "data.cache_dir", "data.batch_read_rows", "data.max_bad_fraction", "split.out_dir",
    "split.materialize", "train.compile", "train.max_steps", "train.min_spread", "train.min_gap", "train.when_stuck",
    "train.log_every", "train.save_every_epochs", "train.save_every_steps", "train.keep_last", "train.resume", "embed", "eval",
    "report",
)  # fmt: skip


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings as {"train.lr": 0.1, ...}."""
    pairs: dict[str, object] = {}
    for key, value in settings.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def differences(saved: dict, asked: dict) -> dict[str, tuple]:
    """Settings of two runs that differ and decide the result: {key: (saved, asked)}."""
    a, b = flat(saved), flat(asked)
    pairs = {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
    return {key: pair for key, pair in pairs.items() if not any((key + ".").startswith(free + ".") for free in NOT_THE_RESULT)}


def read_saved_settings(path: Path) -> dict:
    """The config.yaml of a run, interpolations as they stand. Raises ValueError for a file that is none."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(saved, dict) or not isinstance(saved.get("data"), dict):
            raise ValueError("no settings of a run")
        return saved
    except Exception as error:  # yaml's and omegaconf's
        raise ValueError(f"{path}: cannot be used: {dataio.first_line(error)}") from error


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


SEAL, DIGEST_BYTES = b"sha256:", 64


def seal(path: Path) -> None:
    """Append the SHA-256 of a file of `torch.save` to it, as the comment of its zip archive, which readers pass over.

    The checksums in the archive are not enough: a flipped bit in its directory can pass for other values.
    """
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment, so far 0
        file.write((len(SEAL) + DIGEST_BYTES).to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(SEAL + digest.encode())


def check_seal(path: Path) -> None:
    """Raise ValueError if a file is not as it was when it was sealed, or, without a seal, if a record of its archive is not."""
    data = np.memmap(path, np.uint8, "r")
    told = bytes(data[-len(SEAL) - DIGEST_BYTES :])
    if told.startswith(SEAL):
        if told != SEAL + hashlib.sha256(data[: -len(told)]).hexdigest().encode():
            raise ValueError("does not match its checksum")
        return
    with zipfile.ZipFile(path) as archive:  # torch writes a CRC for each record, and does not read it
        if damaged := archive.testzip():
            raise ValueError(f"record {damaged} does not match its checksum")


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint: tensors and plain values, nothing in it is executed. Raises ValueError if damaged or foreign."""
    try:
        check_seal(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"model", "config", "meta", "step"} <= state.keys():
            raise ValueError("not a checkpoint of this program")
        kinds = {"model": dict, "config": dict, "meta": dict, "step": int, "optimizer": dict, "scaler": dict, "monitor": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
        if wrong or not {"table", "shards", "sources", "precision"} <= state["meta"].keys():
            raise ValueError(f"not a whole checkpoint of this program: {wrong or 'meta'} is not as it writes it")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise a dozen types for damaged files
        raise ValueError(f"{path}: cannot be used: {dataio.first_line(error)}") from error


def read_log(run: Path) -> list[dict]:
    path, lines = run / "train_log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that goes on, or was killed, may be half a line
            lines.append(json.loads(line))
    return lines


def link(target: Path, name: Path) -> None:
    """Let `name` mean the file `target`, at once, without a copy where the disk can link."""
    temporary = name.with_name(f".{name.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        with write_whole(name) as copy:
            copy.write_bytes(target.read_bytes())
        return
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # a rename onto the same file does nothing at all
    dataio.sync_folder(name.parent)


def latest_checkpoint(folder: Path) -> dict | None:
    """The newest readable checkpoint of a run, None if there never was one. Raises ValueError if there are only damaged ones."""
    paths = sorted(
        folder.glob("checkpoints/*.pt"), key=lambda path: (path.name == "last.pt", path.stat().st_mtime_ns), reverse=True
    )
    usable = []
    for path in paths:
        try:
            usable.append(load_checkpoint(path))
            if path.name != "best.pt":
                break
        except ValueError as error:
            log.error("%s; trying the one before", error)
    if paths and not usable:
        raise ValueError(
            f"{folder}/checkpoints: none of {len(paths)} checkpoints can be read; delete the folder to train from scratch"
        )
    return max(usable, key=lambda state: state["step"], default=None)


def free_run_name(folder: Path) -> str:
    """The next name of a run that is not taken: run_001 -> run_002."""
    stem = folder.name.rstrip("0123456789").rstrip("_") or "run"
    return next(name for n in itertools.count(1) if not (folder.parent / (name := f"{stem}_{n:03d}")).exists())


def check_same_run(saved: dict, cfg: Config, folder: Path) -> None:
    """Raise ValueError if going on would mix two runs, with the command that does what was asked."""
    changed = differences(saved["config"], dataclasses.asdict(cfg))
    if changed:
        told = "; ".join(f"{key} was {was!r}, asked is {now!r}" for key, (was, now) in list(changed.items())[:6])
        words = [word for word in sys.argv[1:] if not word.startswith("run=")]
        again = f"uv run python sniperface.py {shlex.join(words)}".strip()
        raise ValueError(f"{folder} holds another run: {told}.\nFor a new one: {again} run={free_run_name(folder)}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

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
    """A picture that cannot be drawn must not end days of training."""
    try:
        yield
    except Exception as error:
        log.warning("no %s: %s", what, dataio.first_line(error))


@contextlib.contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.6) -> Iterator[np.ndarray]:
    """Axes [rows, columns] to draw on; the picture is saved whole when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False)
    with write_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curve(axes, x, y, label: str, style: int = 0, band: tuple | None = None, **labels) -> None:
    """One line, with the band of its interval; the n-th style is told apart without colour."""
    grey, mark = GREYS[style % 4], {"marker": MARKS[style // 4 % 4], "markersize": 4, "markevery": max(1, len(x) // 8)}
    axes.plot(x, y, STYLES[style % 4], color=grey, label=label, linewidth=1.4, **mark)
    if band is not None:
        axes.fill_between(x, *band, color=grey, alpha=0.18, linewidth=0)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def rate_curve(axes, x, rates: list[moco.Rate], label: str, style: int, **labels) -> None:
    """A curve of rates with the band of their intervals."""
    curve(axes, x, [r.value for r in rates], label, style, ([r.low for r in rates], [r.high for r in rates]), **labels)


def draw_training(folder: Path) -> None:
    """train.png: the loss beside its chance level, cosines, top-1, spread, learning rate, share of DigiFace, the monitor."""
    lines = read_log(folder)
    if not can_draw() or not lines:
        return
    whole = {"ylim": (0, 1.05)}  # else an axis that zooms makes a drama of noise
    panels = (
        (("loss", "chance_loss"), "loss [nats]", {}),
        (("pos_sim", "neg_sim", "neg_max"), "cosine", {}),
        (("instance_top1", "digiface_share"), "share", whole),
        (("spread",), "spread (1 even, 0 collapsed)", whole),
        (("lr",), "learning rate", {}),
        (("monitor_loss", "monitor_untrained"), "monitor loss [nats]", {}),
    )
    with picture(folder / "plots" / "train.png", 2, 3, 4.2, 3.0) as axes:
        for panel, (names, unit, limits) in zip(axes.flat, panels, strict=True):
            for style, name in enumerate(names):
                there = {line["step"]: line[name] for line in lines if name in line}
                curve(panel, list(there), list(there.values()), name, style, xlabel="step", ylabel=unit, **limits)


# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------


class StopAsked:
    """Notes the first SIGINT or SIGTERM, so that training stops at the next step boundary; the second one stops at once."""

    def __enter__(self) -> "StopAsked":
        self.signal: int | None = None
        self.usual = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        self.signal = number
        for each, handler in self.usual.items():
            signal.signal(each, handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)


def lr_at(step: int, total_steps: int, steps_per_epoch: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then half a cosine to zero (arXiv:1608.03983)."""
    warmup = cfg.warmup_epochs * steps_per_epoch
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    return cfg.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2


def build_model(cfg: Config) -> moco.MoCo:
    """The untrained model: the same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(cfg.seed, "weights"))
        try:
            return moco.build_moco(cfg.backbone, cfg.moco)
        except (RuntimeError, MemoryError) as error:  # torch's word for too little memory
            raise ValueError(
                f"backbone and moco.queue_size={cfg.moco.queue_size}: {dataio.first_line(error)}; lower them"
            ) from error


def build_optimizer(model: moco.MoCo, cfg: TrainConfig, device: torch.device, scaled: bool) -> torch.optim.SGD:
    """SGD with momentum; no weight decay on what has one dimension: BatchNorm, PReLU and biases."""
    trained = [p for p in model.query.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=device.type in ("cpu", "cuda") and not scaled)


def load_weights(model: moco.MoCo, state: dict) -> None:
    """Put a checkpoint's weights into `model`. Raises ValueError where they are those of another one."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights of this checkpoint do not fit its own settings: {told}") from error


class Training:
    """All that a step changes and a checkpoint holds: the model, the optimiser, the scaler, the monitor and the step."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg, self.device, self.step = cfg, device, 0
        self.precision = pick_precision(cfg.train.amp, device)
        self.model = build_model(cfg).to(device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, cfg.train, device, scaled=self.precision == torch.float16)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.first_bad_step = torch.tensor(-1, device=device)  # of the loss; set on the device, so that no step waits
        self.monitor: dict[str, float] = {"untrained": math.nan, "last": math.nan, "best": math.inf}
        self.meta: dict[str, object] = {}

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "step": self.step, "monitor": dict(self.monitor), "config": dataclasses.asdict(self.cfg), "meta": self.meta,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        load_weights(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if state["meta"]["precision"] != str(self.precision):
            log.warning("the run went in %s so far, this device goes on in %s", state["meta"]["precision"], self.precision)
        self.step, self.monitor, self.meta = state["step"], dict(state["monitor"]), state["meta"]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def views(self, images: Tensor, purpose: str, step: int) -> tuple[Tensor, Tensor]:
        return two_views(images, self.cfg.augment, draw(self.cfg.seed, purpose, step))


def fill_queue(training: Training, mix: dataio.CurriculumMixStream, schedule: dataio.Schedule) -> None:
    """Fill the queue with keys before the first step: of the last images of the first epoch, which the next steps will not draw."""
    cfg, model = training.cfg, training.model
    steps = min(schedule.steps_per_epoch, -(-cfg.moco.queue_size // cfg.train.batch_size))
    first = schedule.steps_per_epoch - steps
    batches = mix.batches(first, schedule.steps_per_epoch, training.device, cfg.data.workers)
    model.train()
    filled = 0
    for step, images in enumerate(progress(batches, total=steps, desc="filling the queue", unit="batch", leave=False)):
        view_q, view_k = training.views(images, "fill", step)
        with torch.no_grad(), training.autocast():
            if step == 0:  # cold statistics make worse keys than no guard at all, and an untrained encoder worse than it is
                moco.calibrate_batchnorm(model.query, [view_q])
                model.key.load_state_dict(model.query.state_dict())
            keys = model.encode_keys(view_k, draw(cfg.seed, "fill-shuffle", step))
        model.enqueue(keys[: cfg.moco.queue_size])
        filled += len(keys)
    rows = torch.arange(cfg.moco.queue_size, device=model.queue.device) % filled  # an epoch is shorter than the queue: say it again
    model.queue.copy_(model.queue[rows])
    model.queue_ptr.zero_()


class Monitor:
    """A label-free figure that does not saturate: InfoNCE on fixed images under fixed hard views, each against all the others."""

    def __init__(self, training: Training, mix: dataio.CurriculumMixStream, schedule: dataio.Schedule):
        cfg = training.cfg
        steps = min(schedule.steps_per_epoch, -(-cfg.train.monitor_images // cfg.train.batch_size))
        batches = mix.batches(0, steps, training.device, cfg.data.workers)
        images = torch.cat(list(batches))[: cfg.train.monitor_images]
        harder = dataclasses.replace(cfg.augment, **{
            name: dataclasses.replace(op, p=math.sqrt(op.p)) for name, op in vars(cfg.augment).items() if isinstance(op, dataio.Op)
        })  # fmt: skip
        self.parts = [
            two_views(part, harder, draw(cfg.seed, "monitor", i)) for i, part in enumerate(images.split(cfg.train.batch_size))
        ]

    @torch.no_grad()
    def measure(self, training: Training) -> float:
        """Loss in nats; ln(M) is chance for M images. The query encoder alone, as embed uses it."""
        model = training.model.eval()
        with training.autocast():
            q, k = (torch.cat([model.encode_queries(views[side]) for views in self.parts]) for side in (0, 1))
        model.train()
        return float(F.cross_entropy(q @ k.T / training.cfg.moco.temperature, torch.arange(len(q), device=q.device)))


def stop_if_not_finite(training: Training, mix: dataio.CurriculumMixStream, folder: Path) -> None:
    """Raise FloatingPointError if a loss or gradient was not finite, or fp16 has run out of scale; waits for the device.

    bad_batch.json then lists the pictures of that step. With the seed they are all that is needed to meet it again.
    """
    bad = int(training.first_bad_step)
    if bad < 0 and training.scaler.is_enabled():  # a skipped step leaves the weights alone, but not BatchNorm's averages
        averages = torch.cat([b.flatten() for b in training.model.query.buffers() if b.is_floating_point()])
        bad = training.step if training.scaler.get_scale() < 1 or not averages.isfinite().all() else bad
    if bad < 0:
        return
    cfg, path = training.cfg, folder / "bad_batch.json"
    pictures = [{"file": str(file), "row": row} for file, row in mix.places(bad - 1)]
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps({"step": bad, "seed": cfg.seed, **training.meta, "pictures": pictures}, indent=1))
    raise FloatingPointError(
        f"the loss or gradient of step {bad} is not finite; the last checkpoint is from before it, its pictures are in {path}. "
        "The same command goes on from there and meets the step again; in a new run, lower train.lr or set train.amp=fp32"
    )


def signs_of_failure(entry: dict, training: Training, warmed_up: bool) -> dict[str, str]:
    """What a line of the log says of a run that will come to nothing: {cause: what was found and what to look at}."""
    cfg, monitor, gap = training.cfg.train, training.monitor, entry["pos_sim"] - entry["neg_sim"]
    found = {}
    if entry["spread"] < cfg.min_spread:
        found["collapse"] = (
            f"all pictures get nearly the same vector: spread {entry['spread']:.3f} < train.min_spread={cfg.min_spread}; "
            "look at train.lr, moco.temperature and the norm of the gradient"
        )
    if warmed_up and gap < cfg.min_gap:
        found["no contrast"] = (
            f"a picture's own key is no nearer than others: cosines {entry['pos_sim']:.3f} and {entry['neg_sim']:.3f}, "
            f"less than train.min_gap={cfg.min_gap} apart; look at plots/views.png: are views of one picture still alike?"
        )
    if warmed_up and "monitor_loss" in entry and not entry["monitor_loss"] < monitor["untrained"]:  # NaN is no better either
        found["not learning"] = (
            f"the monitor's loss {entry['monitor_loss']:.3f} is no better than untrained, {monitor['untrained']:.3f}; "
            "look at train.lr, moco.key_momentum and the augmentation"
        )
    return found


class Watch:
    """Tells of a run that will come to nothing, once per cause and epoch, or stops it where train.when_stuck=stop."""

    def __init__(self) -> None:
        self.told: set[tuple[str, int]] = set()

    def judge(self, entry: dict, training: Training, warmed_up: bool) -> None:
        for cause, what in signs_of_failure(entry, training, warmed_up).items():
            if (cause, entry["epoch"]) in self.told:
                continue
            self.told.add((cause, entry["epoch"]))
            log.warning("step %d, %s: %s", entry["step"], cause, what)
            if training.cfg.train.when_stuck == "stop":
                raise ValueError(f"stopped at step {entry['step']}, {cause}, as train.when_stuck=stop asks; {what}")


def rotate_checkpoints(checkpoints: Path, keep_epochs: int, final: str) -> None:
    """Delete all but the last written two of step_*.pt and the last written of epoch_*.pt; final, best.pt and last.pt stay.

    By time, not by number: after a resume from an older one, those with higher numbers are the old ones.
    """
    for pattern, keep in (("step_*.pt", 2), ("epoch_*.pt", keep_epochs)):
        old = sorted(checkpoints.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in old[:-keep]:
            if path.name != final:
                path.unlink()


def save_checkpoint(training: Training, folder: Path, epoch: int | None) -> None:
    """Save the state whole, as epoch_XX.pt or step_NNNNNNN.pt, let last.pt mean it, and rotate the older ones."""
    checkpoints, cfg = folder / "checkpoints", training.cfg.train
    name = f"step_{training.step:07d}.pt" if epoch is None else f"epoch_{epoch:02d}.pt"
    with write_whole(checkpoints / name) as temporary:
        try:
            torch.save(training.state_dict(), temporary)
            seal(temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{checkpoints / name}: cannot be written ({dataio.first_line(error)}); is the disk full?") from error
    if epoch is not None and training.monitor["last"] <= training.monitor["best"]:
        link(checkpoints / name, checkpoints / "best.pt")
    link(checkpoints / name, checkpoints / "last.pt")  # the last act: a resume trusts last.pt first
    rotate_checkpoints(checkpoints, cfg.keep_last, f"epoch_{cfg.epochs:02d}.pt")


def start_log(folder: Path, step: int, log_every: int) -> None:
    """Keep the lines of the log up to `step`; a line of an unplanned stop goes too, so that the log is that of an unbroken run."""
    planned = step % log_every == 0
    kept = [e for e in read_log(folder) if e["step"] < step or (e["step"] == step and (planned or "monitor_loss" in e))]
    with write_whole(folder / "train_log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))


def say_what_trains(training: Training, sources: list, schedule: dataio.Schedule, rows: Rows) -> None:
    cfg, weights = training.cfg, sum(p.numel() for p in training.model.query.parameters())
    images, precision = " + ".join(f"{len(source):,}" for source in sources), str(training.precision).removeprefix("torch.")
    log.info("%s images in %d steps an epoch, %d epochs", images, schedule.steps_per_epoch, cfg.train.epochs)
    log.info("%s (%.1f M weights), %s on %s", cfg.backbone.name, weights / 1e6, precision, training.device)
    log.info("order: %s%s", sources[0].order_kind, " of materialised shards" if rows.shards else "")
    for source in sources if sources[0].order_kind == "lanes" else ():
        largest = int(np.bincount(source.index.unit).max())
        if dataio.LANES * largest > 4 * max(cfg.data.shuffle_buffer, 1024):
            log.warning(
                "%s: row groups of %d pictures, of which %d are in memory at a time; command=split writes small ones",
                source.globs[0],
                largest,
                dataio.LANES,
            )
    for source in sources if sources[0].order_kind == "lanes" and not rows.shards else ():
        worse = dataio.shuffle_quality(source, cfg.moco.queue_size * len(source) // sum(map(len, sources)))
        advice = "; data.cache=decoded or command=split mend that" if worse > 2 else ""
        log.info(
            "%s: %.1f times as many pictures of the same person in the queue as in a true shuffle%s", source.globs[0], worse, advice
        )
    if cfg.moco.queue_size > schedule.steps_per_epoch * schedule.batch_size / 2:
        log.warning(
            "moco.queue_size=%d holds more than half an epoch (%d images): many negatives are pictures of the query's own face",
            cfg.moco.queue_size, schedule.steps_per_epoch * schedule.batch_size,
        )  # fmt: skip


def draw_views(training: Training, mix: dataio.CurriculumMixStream, path: Path) -> None:
    """A sheet of pairs, a column an image: the picture, the query's view, the key's view. A person must still see who it is."""
    images = next(iter(mix.batches(0, 1, training.device, training.cfg.data.workers)))[:12]
    view_q, view_k = training.views(images, "augment", 0)
    rows = [images, *(((view + 1) * 127.5).round().to(torch.uint8) for view in (view_q, view_k))]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # [3, 3*S, 12*S]
    with write_whole(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(temporary, "png")
    log.info("%s: pairs as the encoder will see them; a person should still tell who it is", path)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Timer:
    """Images a second and the share of the time that the step waited for data, since the last lap."""

    def __init__(self, batch_size: int):
        self.batch_size, self.steps, self.waited = batch_size, 0, 0.0
        self.started = self.lap_started = self.drawn = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        self.steps += 1

    def is_time_to_draw(self) -> bool:
        """Once in five seconds at most, so that tiny epochs are not spent on drawing."""
        now = time.perf_counter()
        due = now - self.drawn > 5
        self.drawn = now if due else self.drawn
        return due

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        passed = now - self.lap_started
        figures = {
            "images_per_s": round(self.steps * self.batch_size / passed, 1), "data_wait": round(self.waited / passed, 4),
            "seconds": round(now - self.started, 2),
        }  # fmt: skip
        self.lap_started, self.waited, self.steps = now, 0.0, 0
        return figures


def step_figures(
    training: Training, out: moco.StepOutput, grad_norm: Tensor, key_momentum: float, schedule: dataio.Schedule
) -> dict:
    """What a line of the log says of a step; the only place of the loop that waits for the device."""
    cfg, step = training.cfg, training.step
    since = max(0, (step - 1) // cfg.train.log_every * cfg.train.log_every)
    tensors = {name: round(value.item(), 6) for name, value in out._asdict().items() if value.ndim == 0 and name != "queue_ptr"}
    return {
        "step": step, "epoch": (step - 1) // schedule.steps_per_epoch + 1, **tensors,
        "chance_loss": round(moco.chance_loss(cfg.moco.queue_size, cfg.moco.temperature, cfg.moco.margin), 6),
        "queue_ptr": int(out.queue_ptr), "lr": training.optimizer.param_groups[0]["lr"], "key_momentum": key_momentum,
        "grad_norm": round(float(grad_norm), 6) if torch.isfinite(grad_norm) else None,  # a step that fp16 skipped: NaN is no JSON
        "digiface_share": round(schedule.digiface_share(since, step), 4),
    }  # fmt: skip


def progress_bar(training: Training, schedule: dataio.Schedule) -> tqdm:
    batch = schedule.batch_size
    return progress(total=schedule.total_steps * batch, initial=training.step * batch, desc="training", unit="image", smoothing=0.1)


def train_step(training: Training, images: Tensor, key_momentum: float) -> tuple[moco.StepOutput, Tensor]:
    """One step of the paper on uint8 [B, 3, S, S], each line of it a line; gives the loss and the like, and the gradient's norm."""
    cfg, model, optimizer, scaler = training.cfg, training.model, training.optimizer, training.scaler
    view_q, view_k = training.views(images, "augment", training.step)  # float [B, 3, S, S] in [-1, 1]
    torch.manual_seed(draw_seed(cfg.seed, "dropout", training.step))
    with training.autocast():
        out = model(view_q, view_k, draw(cfg.seed, "shuffle", training.step))
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    clip = cfg.train.clip_grad_norm or math.inf  # inf only measures
    grad_norm = torch.nn.utils.clip_grad_norm_(model.query.parameters(), clip)  # after backward
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    model.update_key_encoder(key_momentum)
    model.enqueue(out.keys)  # after backward: the queue needs no copy
    training.step += 1
    if not scaler.is_enabled():  # the scaler of fp16 skips such a step and goes on
        bad = ~(torch.isfinite(out.loss) & torch.isfinite(grad_norm)) & (training.first_bad_step < 0)
        training.first_bad_step = torch.where(bad, training.step, training.first_bad_step)
    return out, grad_norm


def run_steps(
    training: Training, mix: dataio.CurriculumMixStream, schedule: dataio.Schedule, monitor: Monitor, last_step: int, folder: Path
) -> None:
    """The training loop: draw, step, and at their times measure, log, save, stop."""
    cfg, model = training.cfg, training.model.train()
    for encoder in (model.query, model.key) if cfg.train.compile else ():
        encoder.compile()  # in place: the names in the checkpoint stay
    timer, watch = Timer(cfg.train.batch_size), Watch()
    with (
        contextlib.closing(mix.batches(training.step, last_step, training.device, cfg.data.workers)) as batches,
        open(folder / "train_log.jsonl", "a") as log_file, progress_bar(training, schedule) as bar, StopAsked() as stop,
    ):  # fmt: skip
        for step in range(training.step, last_step):
            momentum = moco.key_momentum_at(step / schedule.total_steps, cfg.moco.key_momentum, cfg.moco.key_momentum_schedule)
            with timer.waiting():
                images = next(batches)  # uint8 [B, 3, 112, 112], on the device
            set_lr(training.optimizer, lr_at(step, schedule.total_steps, schedule.steps_per_epoch, cfg.train))
            out, grad_norm = train_step(training, images, momentum)

            bar.update(len(images))
            epoch, in_epoch = divmod(training.step, schedule.steps_per_epoch)
            told_to_stop = stop.signal  # read once: a signal that comes later in this step is for the next one
            stopping = training.step == last_step or told_to_stop is not None
            entry = {}
            due_to_log = training.step % cfg.train.log_every == 0 or in_epoch == 0 or stopping
            due_to_save = cfg.train.save_every_steps and training.step % cfg.train.save_every_steps == 0
            if due_to_log or due_to_save:
                stop_if_not_finite(training, mix, folder)
            if in_epoch == 0 or training.step == last_step:
                training.monitor["last"] = round(monitor.measure(training), 6)
            if in_epoch == 0:
                entry = {"monitor_loss": training.monitor["last"], "monitor_untrained": training.monitor["untrained"]}
            if due_to_log:
                entry = step_figures(training, out, grad_norm, momentum, schedule) | timer.lap() | entry
                log_file.write(json.dumps(entry) + "\n")
                log_file.flush()
                os.fsync(log_file.fileno())  # a checkpoint must not outlive the lines before it
                told = f"loss={entry['loss']:.3f}, top1={entry['instance_top1']:.2f}, wait={entry['data_wait']:.0%}"
                bar.set_postfix_str(told, refresh=False)
                watch.judge(entry, training, step > cfg.train.warmup_epochs * schedule.steps_per_epoch)
            if in_epoch == 0 and (epoch % cfg.train.save_every_epochs == 0 or stopping):
                training.monitor["best"] = min(training.monitor["best"], training.monitor["last"])  # of the epochs that are saved
                save_checkpoint(training, folder, epoch)
            elif stopping or due_to_save:
                save_checkpoint(training, folder, None)
            if stopping or (in_epoch == 0 and timer.is_time_to_draw()):
                with not_vital("train.png"):
                    draw_training(folder)
            if told_to_stop is not None:
                log.warning("stopped at step %d, saved; the same command goes on from here", training.step)
                raise SystemExit(128 + told_to_stop)
    if training.step < schedule.total_steps:
        log.info("stopped at train.max_steps=%d of %d; the same command without it goes on", training.step, schedule.total_steps)


def write_run_files(training: Training, folder: Path) -> None:
    """The settings of the run, and of each start what it ran on: versions, commit, data, hardware."""
    with write_whole(folder / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(training.cfg))))
    path = folder / "environment.json"
    with dataio.naming(path):
        starts = json.loads(path.read_text()) if path.exists() else []
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps([*starts, {"from_step": training.step, **training.meta}], indent=1))


def describe_data(cfg: Config, rows: Rows, streams: dict[str, dataio.ParquetImageStream]) -> dict:
    """What decides which pictures come in which order: the split table, and fingerprints of the rows and how they are drawn."""
    orders = [s.fingerprint if cfg.data.cache == "none" else dataio.DecodedCache.fingerprint_of(s) for s in streams.values()]
    return {"table": rows.table, "shards": rows.shards, "sources": orders}


def check_same_data(saved: dict, found: dict, rows: Rows, cfg: Config, folder: Path) -> None:
    """Raise ValueError if the rows, their order or their split are not those that the run was started on."""
    meta, cache = saved["meta"], saved["config"]["data"]["cache"]
    if meta["table"] in rows.extends:
        found = found | {"table": meta["table"]}  # it has grown since; the fingerprints tell whether the train rows did
    changed = {key: (meta[key], now) for key, now in found.items() if meta[key] != now}
    if changed.keys() == {"sources"} and (cache == "none") != (cfg.data.cache == "none"):
        raise ValueError(
            f"{folder} was started with data.cache={cache}, {cfg.data.cache} draws in another order; set that, or run="
        )
    if changed:
        raise ValueError(f"{folder}: the data is not what the run was started on: {changed}; restore it, or set another run=")


def train(cfg: Config, folder: Path) -> float:
    """Train, or go on where the run stopped; returns minus the best value of the label-free monitor."""
    with run_lock(folder):
        saved = None if cfg.train.resume == "never" else latest_checkpoint(folder)
        if cfg.train.resume == "never" and (folder / "train_log.jsonl").exists():
            raise ValueError(
                f"{folder} holds a run and train.resume=never; set another run=, for instance run={free_run_name(folder)}"
            )
        if cfg.train.resume == "must" and saved is None:
            raise FileNotFoundError(f"{folder}/checkpoints: nothing to resume, and train.resume=must")
        if saved:
            check_same_run(saved, cfg, folder)
        device = pick_device(cfg.device)
        configure_process(device, cfg.deterministic, tf32=True)
        training = Training(cfg, device)
        state_bytes = 4 * sum(p.numel() * p.element_size() for p in training.model.query.parameters())
        if not saved:  # a run that goes on has most of them already
            dataio.need_space(folder, (cfg.train.keep_last + 4) * state_bytes, "a run's checkpoints")
        rows = locate_rows(cfg, "train", shards=saved["meta"]["shards"] if saved else None)
        streams = open_streams(cfg, rows)
        data = describe_data(cfg, rows, streams)
        schedule = dataio.Schedule(cfg.curriculum, list(map(len, streams.values())), cfg.train.batch_size, cfg.train.epochs)
        last_step = min(schedule.total_steps, cfg.train.max_steps or schedule.total_steps)
        if saved:
            check_same_data(saved, data, rows, cfg, folder)
            training.load_state_dict(saved)
            if training.step >= last_step:
                rotate_checkpoints(folder / "checkpoints", cfg.train.keep_last, f"epoch_{cfg.train.epochs:02d}.pt")
                what = "finished" if training.step >= schedule.total_steps else "at train.max_steps"
                log.info("%s: %s, %d of %d steps; nothing to do", folder, what, training.step, schedule.total_steps)
                return -min(training.monitor["best"], training.monitor["last"])
            log.info("going on from step %d of %d", training.step, schedule.total_steps)
        resumed, saved = saved is not None, None  # a checkpoint is four times the weights
        sources = cached(cfg, streams, device)
        training.meta = {**data, "precision": str(training.precision), **describe_machine(device)}
        write_run_files(training, folder)
        mix = dataio.CurriculumMixStream(sources[0], sources[1] if len(sources) == 2 else None, 0, schedule)
        monitor = Monitor(training, mix, schedule)
        say_what_trains(training, sources, schedule, rows)
        if not resumed:
            with not_vital("views.png"):
                draw_views(training, mix, folder / "plots" / "views.png")
            fill_queue(training, mix, schedule)
            training.monitor["untrained"] = round(monitor.measure(training), 6)
        start_log(folder, training.step, cfg.train.log_every)
        run_steps(training, mix, schedule, monitor, last_step, folder)
        return -min(training.monitor["best"], training.monitor["last"])


# ---------------------------------------------------------------------------------------------------------------------
# embed
# ---------------------------------------------------------------------------------------------------------------------

Encoder = Callable[[Tensor], Tensor]  # uint8 [n, 3, S, S] -> unit rows float32 [n, D]
REFERENCE_IMAGES = 4096  # train images that the references are fitted on
PCA_SIDE_PX, PCA_COMPONENTS = 32, 128


def backbone_encoder(backbone: nn.Module, device: torch.device, flip: bool) -> Encoder:
    """A frozen backbone as an encoder, in fp32, so that a vector does not depend on its batch; `flip` adds the mirrored picture."""
    backbone = backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def encode(images: Tensor) -> Tensor:
        views = dataio.to_float(images.to(device))
        embedding = backbone(views) + (backbone(views.flip(3)) if flip else 0)
        return F.normalize(embedding.float()).cpu()

    return encode


def pca_encoder(images: Tensor) -> Encoder:
    """Whitened principal components of small grey pictures, fitted on `images` uint8 [n, 3, S, S] without labels (eigenfaces)."""

    def small_grey(images: Tensor) -> Tensor:
        grey = dataio.to_float(images).mul(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return (
            F.interpolate(grey, size=(PCA_SIDE_PX, PCA_SIDE_PX), mode="bilinear", antialias=True).flatten(1).double()
        )  # [n, side^2]

    fitted = torch.cat([small_grey(part) for part in images.split(512)])
    mean = fitted.mean(0)
    values, vectors = torch.linalg.eigh((fitted - mean).T @ (fitted - mean) / len(fitted))
    count = min(PCA_COMPONENTS, len(fitted) - 1)
    basis = vectors[:, -count:] / values[-count:].clamp(min=1e-9).sqrt()  # [side^2, count]
    return lambda images: F.normalize((small_grey(images) - mean) @ basis).float()


def reference_encoders(cfg: Config, rows: Rows, device: torch.device) -> dict[str, Encoder]:
    """What any encoder must beat: itself untrained (its statistics calibrated, else it is weaker than need be) and PCA."""
    streams = list(open_streams(cfg, rows).values())
    schedule = dataio.Schedule(None, [len(stream) for stream in streams], min(256, sum(map(len, streams))), 1)
    mix = dataio.CurriculumMixStream(streams[0], streams[1] if len(streams) == 2 else None, 0, schedule)
    steps = min(schedule.steps_per_epoch, REFERENCE_IMAGES // 256)
    images = torch.cat(list(mix.batches(0, steps, workers=cfg.data.workers)))
    backbone = build_model(cfg).query.backbone.to(device)
    moco.calibrate_batchnorm(backbone, (dataio.to_float(part.to(device)) for part in images.split(256)))
    return {"untrained": backbone_encoder(backbone, device, cfg.embed.flip), "pca": pca_encoder(images)}


def find_checkpoint(cfg: Config, folder: Path) -> Path:
    """`last`, `best`, `epoch_XX` of this run, or a path. Raises FileNotFoundError that says what there is."""
    name = cfg.embed.checkpoint
    path = Path(name) if name.endswith(".pt") else folder / "checkpoints" / f"{name}.pt"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in (folder / "checkpoints").glob("*.pt"))) or "none"
        raise FileNotFoundError(
            f"{path}: no such checkpoint (embed.checkpoint={name}); in {folder}: {there}. command=train makes them"
        )
    return path


def settings_of(state: dict, cfg: Config, typed: set[str]) -> Config:
    """The checkpoint's settings, with data.*, split.*, embed.* and the like as typed.

    Raises ValueError for a typed contradiction.
    """
    ours, with_data = ("command", "run", "run_dir", "device", "embed", "eval", "report"), ("data", "split")

    def under(key: str, sections: Iterable[str]) -> bool:
        return any((key + ".").startswith(section + ".") for section in sections)

    asked, saved = flat(dataclasses.asdict(cfg)), flat(state["config"])
    if any("${" in str(value) for value in saved.values()):
        raise ValueError(
            "the saved settings hold an interpolation, which this program never writes; do not use files of unknown origin"
        )
    merged = dict(saved)
    for key, value in asked.items():
        if under(key, ours) or (under(key, with_data) and under(key, typed) and key != "data.image_size"):
            merged[key] = value
        elif under(key, typed) and saved.get(key) != value and not under(key, NOT_THE_RESULT):
            raise ValueError(f"{key}={value}: the checkpoint was trained with {saved.get(key)}; leave it out, or train another run")
    nested: dict = {}
    for key, value in merged.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return load_config(OmegaConf.create(nested))


def embedded_indices(
    cfg: Config, rows: Rows | None, only: set[str] | None = None
) -> dict[str, tuple[dataio.RowIndex, dataio.Columns]]:
    """Index of each source to embed: the located rows, or all rows of embed.test_glob; with `only`, those identities alone."""
    if rows is None:
        return {"file": (dataio.build_index(cfg.embed.test_glob, only, cfg.data.columns), cfg.data.columns)}
    columns, indices = shard_columns(cfg, rows), {}
    for source, (globs, allowed) in rows.sources.items():
        people = allowed if only is None else only if allowed is None else only & set(allowed)
        with contextlib.suppress(ValueError) if only else contextlib.nullcontext():  # not each source has each identity
            indices[source] = (dataio.build_index(globs, people, columns), columns)
    return indices


def image_hash(data: pa.Buffer) -> int:
    """A number that equal bytes share and others do not, by which eval finds pictures that stand in two places."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)


def count_in_train(cfg: Config, train: Rows, hashes: set[int]) -> int:
    """How many of the pictures stand byte for byte among the train rows, under whatever name; reads those rows once."""
    found = set()
    for index, columns in embedded_indices(cfg, train).values():
        with progress(total=len(index.unit), desc="looking for these pictures in train", unit="image", leave=False) as bar:
            for table in dataio.read_rows(index, columns):
                found |= hashes & {image_hash(data.as_buffer()) for data in table["image_bytes"] if data.is_valid}
                bar.update(len(table))
    return len(found)


def decoded_batches(
    index: dataio.RowIndex, columns: dataio.Columns, cfg: Config, pool: ThreadPoolExecutor
) -> Iterator[tuple[pa.Table, Tensor]]:
    """Rows in the order of the files with a hash of their bytes, and their pictures uint8 [n, 3, S, S].

    Broken ones are left out, named and counted.
    """
    bad, done = dataio.BadImages(cfg.data.max_bad_fraction, len(index.unit), "it is left out"), 0

    def decode(row: int, data: pa.Scalar) -> np.ndarray | None:
        try:
            return dataio.decode_image(data.as_buffer() if data.is_valid else b"", cfg.data.image_size, cfg.data.max_image_pixels)
        except ValueError as error:
            bad.add(*dataio.place_of(index, row), str(error))
            return None

    def finish(table: pa.Table, pictures: Iterable[np.ndarray | None]) -> tuple[pa.Table, Tensor]:
        good = {i: picture for i, picture in enumerate(pictures) if picture is not None}
        stack = np.stack([*good.values()]) if good else np.empty((0, 1, 1, 3), np.uint8)
        kept = table.take(list(good))
        hashes = pa.array([image_hash(data.as_buffer()) for data in kept["image_bytes"]], pa.int64())
        named = kept.select(["identity_id", "image_filename"]).append_column("image_hash", hashes)
        return named, torch.from_numpy(stack).permute(0, 3, 1, 2)

    ahead: deque[tuple[pa.Table, Iterable]] = deque()  # decoded by the pool while the encoder works
    size, total = cfg.embed.batch_size, len(index.unit)
    for tables in dataio.cut(dataio.read_rows(index, columns), [min(size, total - start) for start in range(0, total, size)]):
        table = pa.concat_tables(tables)
        ahead.append((table, pool.map(decode, range(done, done + len(table)), table["image_bytes"])))
        done += len(table)
        if len(ahead) > 3:
            yield finish(*ahead.popleft())
            bad.judge(done)
    yield from itertools.starmap(finish, ahead)
    bad.judge(total)


def embedding_table(table: pa.Table, source: str, vectors: np.ndarray) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
    return table.append_column("source", pa.array([source] * len(table))).append_column("embedding", column)


def write_embeddings(encoders: dict[Path, Encoder], sources: dict, cfg: Config, notes: dict[Path, dict], train: Rows | None) -> int:
    """Encode the rows of `sources` {name: (index, columns)} with each encoder, in one pass, into parquet; returns how many."""
    total, done, hashes = sum(len(index.unit) for index, _ in sources.values()), 0, set()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(cfg.data.workers or os.cpu_count()))
        temporaries = {path: stack.enter_context(write_whole(path)) for path in encoders}
        writers: dict[Path, pq.ParquetWriter] = {}
        ready: dict[Path, list[pa.Table]] = {path: [] for path in encoders}
        bar = stack.enter_context(progress(total=total, desc="embedding", unit="image"))
        for source, (index, columns) in sources.items():
            for table, images in decoded_batches(index, columns, cfg, pool):
                for path, encode in encoders.items() if len(table) else ():
                    rows = embedding_table(table, source, encode(images).numpy())
                    if path not in writers:
                        schema = dataio.with_metadata(rows.schema, notes[path])
                        writers[path] = pq.ParquetWriter(temporaries[path], schema, compression="none", write_page_checksum=True)
                    ready[path].append(rows)
                    if sum(map(len, ready[path])) >= dataio.CACHE_CHUNK:  # few large row groups, whatever embed.batch_size
                        writers[path].write_table(pa.concat_tables(ready[path]))
                        ready[path] = []
                done += len(table)
                hashes.update(table["image_hash"].to_pylist())
                bar.update(len(table))
        if not done:
            raise ValueError("not one image to embed: the chosen rows are empty or broken")
        bar.close()
        last_words = {"sniperface.rows": str(done)}
        if train and cfg.embed.leak_check:
            last_words["sniperface.pictures_in_train"] = str(count_in_train(cfg, train, hashes))
        for path, writer in writers.items():
            writer.write_table(pa.concat_tables(ready[path]) if ready[path] else writer.schema.empty_table())
            writer.add_key_value_metadata(last_words)
            writer.close()
    return done


def count_trained_on(cfg: Config, table: str) -> int | None:
    """How many identities of embed.test_glob are on the train side of the run's split table; None where the table is not there."""
    path = Path(cfg.split.out_dir) / "identity_splits.parquet"
    splits = dataio.read_identity_splits(path) if path.exists() else None
    if splits is None or splits.hash != table:
        log.warning("%s is not the split table of this checkpoint: nobody can tell whether these identities were trained on", path)
        return None
    found = dataio.collect_unique_identities(cfg.embed.test_glob, cfg.data.columns)
    return len(set(found) & {*splits.identities["train"], *splits.identities["val"]})


def reference_path(embeddings: Path, name: str) -> Path:
    """test_embeddings.parquet -> test_embeddings.untrained.parquet"""
    return embeddings.with_name(f"{embeddings.stem}.{name}.parquet")


def find_train_rows(cfg: Config, table: str) -> Rows | None:
    """The rows that the references are fitted on and that test pictures are looked for in; None where they are not here."""
    if not (cfg.embed.references or cfg.embed.leak_check):
        return None
    try:
        rows = locate_rows(cfg, "train")
        if table in (rows.table, *rows.extends):
            return rows
        why = f"{cfg.split.out_dir} holds split table {rows.table}, the checkpoint's is {table}"
    except FileNotFoundError as error:
        why = dataio.first_line(error)
    log.warning("no references and no leak check, the run's train data is not here: %s", why)
    return None


def embed(cfg: Config, folder: Path, typed: set[str] = frozenset()) -> None:
    """Write the frozen encoder's vectors of unseen identities, and those of the references beside them."""
    device = pick_device(cfg.device)
    path = find_checkpoint(cfg, folder)
    state = load_checkpoint(path)
    cfg = settings_of(state, cfg, typed)
    configure_process(device, deterministic=True, tf32=False)  # fp32 in earnest, the same each time
    model = build_model(cfg)
    load_weights(model, state)
    rows = None if cfg.embed.test_glob else locate_rows(cfg, cfg.embed.split)
    if rows and state["meta"]["table"] not in (rows.table, *rows.extends):
        raise ValueError(
            f"{path} was trained with split table {state['meta']['table']}, {cfg.split.out_dir} has {rows.table}: "
            f"its test identities may have been trained on"
        )
    indices = embedded_indices(cfg, rows)
    out = folder / cfg.embed.out
    encoders = {out: backbone_encoder(model.query.backbone, device, cfg.embed.flip)}
    train_rows = find_train_rows(cfg, state["meta"]["table"])
    if train_rows and cfg.embed.references:
        encoders |= {reference_path(out, name): encoder for name, encoder in reference_encoders(cfg, train_rows, device).items()}
    note = {
        "table": state["meta"]["table"], "split": cfg.embed.split if rows else None, "step": state["step"], "flip": cfg.embed.flip,
        "data": [index.fingerprint for index, _ in indices.values()],
        "trained_on": 0 if rows else count_trained_on(cfg, state["meta"]["table"]),
    }  # fmt: skip
    made_by = {
        out: dataio.digest(*(f"{name} {value.double().sum().item()}" for name, value in state["model"].items())),
        reference_path(out, "untrained"): f"untrained seed {cfg.seed}",
        reference_path(out, "pca"): f"pca {PCA_COMPONENTS} of {PCA_SIDE_PX} px",
    }
    for old in made_by.keys() - encoders.keys():  # of other pictures than those embedded now
        old.unlink(missing_ok=True)
    notes = {file: note | {"checkpoint": made_by[file]} for file in encoders}
    count = write_embeddings(encoders, indices, cfg, notes, train_rows)
    log.info("%s: %d vectors by %s (step %d)", out, count, path, state["step"])


# ---------------------------------------------------------------------------------------------------------------------
# eval
# ---------------------------------------------------------------------------------------------------------------------


class Embeddings(NamedTuple):
    """One embeddings file in memory, rows in the file's order."""

    names: np.ndarray  # str [N], the identity
    keys: np.ndarray  # str [N], source and file name of the picture
    sources: np.ndarray  # str [N]
    vectors: np.ndarray  # float32 [N, D], unit rows
    hashes: np.ndarray | None  # int64 [N], of the pictures' bytes
    note: dict  # what `embed` noted of checkpoint, split and data; empty for a foreign file


class Measured(NamedTuple):
    """The figures of one encoder, and what the pictures need besides."""

    figures: dict  # as in metrics.json
    cmc: list[moco.Rate]  # [20]
    roc: dict[float, moco.Rate]  # TAR by FAR, as far as the impostors support it
    histogram: dict[str, np.ndarray]  # of genuine and impostor cosines, see `moco.histograms`
    found: moco.Found
    thresholds: dict[float, float | None]


def find_embeddings(name: str, folder: Path) -> Path:
    """In the run's folder first, then where the user stands."""
    path = next((path for path in (folder / name, Path(name)) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder / name}: no such file, nor {Path(name).absolute()}; command=embed writes it, or set eval.embeddings"
        )
    log.info("measuring %s", path)
    return path


def read_vectors(path: Path, parquet: pq.ParquetFile, count: int) -> np.ndarray:
    """The column `embedding` as float32 [count, D], a row group at a time: what is held twice is one row group."""
    vectors, done, size = np.empty((0, 1), np.float32), 0, parquet.schema_arrow.field("embedding").type.list_size
    for group in range(parquet.num_row_groups):
        with dataio.naming(path):
            column = parquet.read_row_group(group, columns=["embedding"])["embedding"].combine_chunks()
        flat = column.flatten()
        if column.null_count or flat.null_count:
            raise ValueError(f"{path}: {max(column.null_count, 1)} rows have no embedding; write it again with command=embed")
        rows = flat.to_numpy(zero_copy_only=True).reshape(-1, size)
        if done + len(rows) > count:
            raise ValueError(f"{path}: damaged (more vectors than its {count} names); write it again with command=embed")
        if len(rows):  # only now is it known that rows are so long
            vectors = vectors if done else np.empty((count, size), np.float32)
            vectors[done : done + len(rows)] = rows
        done += len(rows)
    if done < count:
        raise ValueError(f"{path}: damaged ({done} vectors for {count} names); write it again with command=embed")
    return vectors


def read_embeddings(path: Path) -> Embeddings:
    """Read and check a file of `embed`, or a foreign one with the same columns. Raises ValueError for what cannot be measured."""
    parquet = dataio.open_parquet(path)
    with dataio.naming(path):
        found = parquet.schema_arrow.names
    wrong = len(set(found)) < len(found) or not {"identity_id", "image_filename", "embedding"} <= set(found)
    kind = None if wrong else parquet.schema_arrow.field("embedding").type
    if wrong or not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32() or not kind.list_size:
        raise ValueError(
            f"{path}: needs identity_id, image_filename and embedding fixed_size_list<float32>, found "
            f"{parquet.schema_arrow.names} ({kind})"
        )
    others = [name for name in ("identity_id", "image_filename", "source", "image_hash") if name in found]
    with dataio.naming(path):
        table = parquet.read(columns=others)
    last_words = parquet.metadata.metadata or {}
    rows, leaked = last_words.get(b"sniperface.rows"), last_words.get(b"sniperface.pictures_in_train")
    if rows and int(rows) != len(table):
        raise ValueError(
            f"{path}: {len(table)} rows, embed wrote {int(rows)}; was it joined from several? Write it again with command=embed"
        )
    vectors = read_vectors(path, parquet, len(table))
    moco.check_vectors(vectors, str(path))

    def strings(name: str) -> np.ndarray:
        with dataio.naming(path):
            return np.array(dataio.as_strings(table[name], path, name).to_pylist())

    sources = strings("source") if "source" in table.column_names else np.full(len(table), "file")
    keys = np.char.add(np.char.add(sources, "/"), strings("image_filename"))
    hashes = table["image_hash"].to_numpy() if "image_hash" in table.column_names else None
    note = dataio.read_metadata(path) | ({"pictures_in_train": int(leaked)} if leaked else {})
    return Embeddings(strings("identity_id"), keys, sources, vectors, hashes, note)


def check_provenance(path: Path, note: dict) -> None:
    """Say what cannot be known of a foreign file. Raises ValueError for vectors of people who were trained on."""
    if not note:
        log.warning(
            "%s: not written by embed: nobody can tell here whether its identities were trained on, nor by which "
            "checkpoint it was made",
            path,
        )
    if note and note.get("trained_on") is None:
        log.warning("%s: embed could not tell whether its identities were trained on", path)
    if note.get("trained_on"):
        raise ValueError(
            f"{path}: {note['trained_on']} of its identities were trained on; measure unseen ones. If they are other people "
            "with the same names, rename them in the files"
        )


def check_split(path: Path, data: Embeddings, cfg: Config, folder: Path) -> int | None:
    """How many identities the embedded side of the split has, None where the table is not there; warns where vectors are missing.

    Raises ValueError for vectors of another split than the run's, or of identities on another side than the note says. Of a
    foreign file, warns where names are those of people who were trained on.
    """
    with dataio.naming(folder / "environment.json"):
        starts = json.loads((folder / "environment.json").read_text()) if (folder / "environment.json").exists() else []
    table = Path(cfg.split.out_dir) / "identity_splits.parquet"
    splits = dataio.read_identity_splits(table) if table.exists() else None
    grown_from = [splits.hash, *splits.note.get("extends", [])] if splits else []
    made_with, names = data.note.get("table"), set(np.unique(data.names).tolist())
    ours = {start["table"] for start in starts}
    if made_with and ours and made_with not in ours:
        raise ValueError(f"{path}: its checkpoint was trained with split table {made_with}, the run in {folder} with {min(ours)}")
    asked = set(splits.identities[data.note["split"]]) if made_with in grown_from and data.note.get("split") else None
    if asked is not None:
        if strangers := names - asked:
            raise ValueError(
                f"{path}: {len(strangers)} of its identities, such as {min(strangers)!r}, are not on the {data.note['split']} side "
                f"of {table}; write it again with command=embed"
            )
        if missing := asked - names:
            log.warning("%s: %d of %d identities have no vector, such as %r", path, len(missing), len(asked), min(missing))
    if not data.note and splits and (trained := names & {*splits.identities["train"], *splits.identities["val"]}):
        log.warning(
            "LEAK? %d of its identities, such as %r, have names of the train side of %s; if they are the same people, the figures "
            "are worth nothing", len(trained), min(trained), table,
        )  # fmt: skip
    return None if asked is None else len(asked)


def check_leaks(data: Embeddings, drawn: moco.Enrolment, cfg: EvalConfig) -> dict[str, int | None]:
    """Count what would flatter the figures, and warn loudly: equal pictures in gallery and probes, test pictures in train."""
    twins = None
    if data.hashes is not None:
        twins = int(np.isin(data.hashes[drawn.probes], data.hashes[drawn.enrolled]).sum())
    leaks = {"probes_equal_to_enrolled": twins, "pictures_in_train": data.note.get("pictures_in_train")}
    for what, count in leaks.items():
        if count:
            log.warning("LEAK: %d %s, byte for byte: the figures are too good; remove the doubles", count, what.replace("_", " "))
    gallery = len(np.unique(drawn.identity[drawn.enrolled]))
    if gallery <= max(cfg.top_k):
        log.warning("only %d identities are enrolled: Rank-%d finds everybody", gallery, max(cfg.top_k))
    return leaks


def figures_of(rates: dict[str, moco.Rate]) -> dict[str, object]:
    """{"rank1": Rate} -> {"rank1": 0.5, "rank1_ci": [0.4, 0.6]}"""
    return {
        key: value for name, rate in rates.items() for key, value in ((name, rate.value), (f"{name}_ci", [rate.low, rate.high]))
    }


def closed_set_ranks(data: Embeddings, cfg: EvalConfig, per_id: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank [P] and identity [P] of the probes of one enrolment draw."""
    drawn = moco.enrol(data.names, data.keys, per_id, seed)
    gallery = moco.build_gallery(data.vectors[drawn.enrolled], drawn.identity[drawn.enrolled], cfg.template)
    people = drawn.identity[drawn.probes]
    probes = moco.Chosen(data.vectors, drawn.probes)
    return moco.search(probes, gallery.index(people), gallery).rank, people


def closed_set_rates(data: Embeddings, cfg: EvalConfig, per_id: int, seed: int) -> dict[str, moco.Rate]:
    """Rank-k of one enrolment draw."""
    rank, people = closed_set_ranks(data, cfg, per_id, seed)
    return moco.rates({f"rank{k}": rank <= k for k in {1, *cfg.top_k}}, people, cfg.seed, cfg.bootstrap)


def measure(data: Embeddings, drawn: moco.Enrolment, cfg: EvalConfig) -> Measured:
    """Closed set and verification of one encoder: Rank-k, MRR, TAR at each FAR, AUC, EER, each with its interval."""
    gallery = moco.build_gallery(data.vectors[drawn.enrolled], drawn.identity[drawn.enrolled], cfg.template)
    probes, people = moco.Chosen(data.vectors, drawn.probes), drawn.identity[drawn.probes]
    found = moco.search(probes, gallery.index(people), gallery, count=True)
    verified, thresholds = moco.verification(found.genuine, found.impostors, cfg.fars)
    columns = moco.closed_set(found.rank, sorted({*range(1, 21), *cfg.top_k})) | {"mrr": 1 / found.rank} | verified
    rates = moco.rates(columns, people, cfg.seed, cfg.bootstrap)
    shown = {name: rate for name, rate in rates.items() if not name.startswith("rank") or int(name[4:]) in {1, 5, 10, *cfg.top_k}}
    figures = figures_of(shown) | {
        "cmc": [rates[f"rank{k}"].value for k in range(1, 21)], "impostor_pairs": int(found.impostors.sum()),
        "thresholds": {f"far@{far:g}": at for far, at in thresholds.items() if at is not None},
        "refused": [f"tar@{far:g}" for far, at in thresholds.items() if at is None],
    }  # fmt: skip
    points, _ = moco.verification(found.genuine, found.impostors, np.geomspace(1e-6, 1, 37).tolist())
    points = {float(name[4:]): column for name, column in points.items() if name.startswith("tar@")}
    roc = moco.rates(points, people, cfg.seed, cfg.bootstrap)
    shape = moco.histograms(found.genuine, found.impostors)
    return Measured(figures, [rates[f"rank{k}"] for k in range(1, 21)], roc, shape, found, thresholds)


def per_source(data: Embeddings, drawn: moco.Enrolment, found: Measured, cfg: EvalConfig) -> dict[str, dict]:
    """Rank-k of the probes of each source; the gallery is the same."""
    people, sources, figures = drawn.identity[drawn.probes], data.sources[drawn.probes], {}
    for source in np.unique(sources).tolist():
        here = sources == source
        rates = moco.rates({f"rank{k}": found.found.rank[here] <= k for k in cfg.top_k}, people[here], cfg.seed, cfg.bootstrap)
        figures[source] = figures_of(rates) | {"probes": int(here.sum())}
    return figures


def enrolment_draws(data: Embeddings, first: np.ndarray, cfg: EvalConfig) -> dict:
    """Rank-1 over several draws of the enrolment pictures, `first` [P] the ranks of the first: how much is the luck of the draw."""
    others = (closed_set_ranks(data, cfg, cfg.enroll_per_id, cfg.seed + n)[0] for n in range(1, cfg.repeats))
    hits = [float((rank == 1).mean()) for rank in itertools.chain([first], others)]
    spread = float(np.std(hits, ddof=1)) if len(hits) > 1 else None
    return {"draws": len(hits), "rank1_mean": float(np.mean(hits)), "rank1_std": spread}


def enrolment_sweep(data: Embeddings, drawn: moco.Enrolment, cfg: EvalConfig) -> dict[str, dict]:
    """Rank-k by the number of enrolment pictures, as far as an identity has one picture more."""
    most = np.bincount(drawn.identity).max() - 1
    return {str(n): figures_of(closed_set_rates(data, cfg, n, cfg.seed)) for n in cfg.enroll_sweep if n <= most}


def open_set_figures(data: Embeddings, cfg: EvalConfig) -> dict:
    """TPIR at each FPIR when a share of the identities is not enrolled; empty where the share leaves nobody out."""
    try:
        drawn = moco.enrol(data.names, data.keys, cfg.enroll_per_id, cfg.seed, cfg.open_set_share)
    except ValueError as error:  # those with pictures to spare are left out: the closed set stands nevertheless
        log.warning("no open-set figures: %s", error)
        return {}
    if not len(drawn.unknown):
        return {}
    gallery = moco.build_gallery(data.vectors[drawn.enrolled], drawn.identity[drawn.enrolled], cfg.template)
    people, strangers = drawn.identity[drawn.probes], drawn.identity[drawn.unknown]
    known = moco.search(moco.Chosen(data.vectors, drawn.probes), gallery.index(people), gallery)
    unknown = moco.search(moco.Chosen(data.vectors, drawn.unknown), np.full(len(strangers), -1), gallery)
    columns, thresholds = moco.open_set(known, unknown, cfg.fpirs)
    identity = np.concatenate([people, strangers])
    rates = moco.rates(columns, identity, cfg.seed, cfg.bootstrap, trials=len(people)) if columns else {}
    return figures_of(rates) | {
        "unknown_identities": len(np.unique(strangers)), "unknown_probes": len(strangers), "known_probes": len(people),
        "refused": [f"tpir@{rate:g}" for rate, at in thresholds.items() if at is None],
    }  # fmt: skip


def pair_figures(data: Embeddings, cfg: EvalConfig) -> dict:
    """Accuracy over the folds of a pair protocol such as LFW, the threshold from the other folds."""
    wanted = ["fold", "image_filename_a", "image_filename_b", "same"]
    parquet, t = dataio.open_parquet(Path(cfg.pairs)), pa.types
    kinds = {name: parquet.schema_arrow.field(name).type for name in wanted if parquet.schema_arrow.names.count(name) == 1}
    fits = {"fold": t.is_integer, "same": lambda kind: t.is_boolean(kind) or t.is_integer(kind)}
    wrong = [name for name in wanted if name not in kinds or not fits.get(name, lambda kind: True)(kinds[name])]
    if wrong:
        raise ValueError(f"{cfg.pairs}: needs {wanted}, fold an integer, same a boolean or 0 and 1; look at {wrong}: {kinds}")
    with dataio.naming(Path(cfg.pairs)):
        table = parquet.read(columns=wanted)
    empty = [name for name in wanted if table[name].null_count]
    if empty or not set(table["same"].unique().to_pylist()) <= {0, 1}:
        raise ValueError(f"{cfg.pairs}: no value may be missing (look at {empty}) and same must be 0 or 1")
    files = [key.split("/", 1)[1] for key in data.keys.tolist()]
    row_of = dict(zip(files, range(len(files)), strict=True))
    sides = [table[f"image_filename_{side}"].to_pylist() for side in "ab"]
    unknown = {name for side in sides for name in side if name not in row_of}
    if unknown or len(row_of) < len(files):
        what = (
            f"{len(unknown)} of its pictures, such as {sorted(unknown)[:1]}, have no embedding"
            if unknown
            else "file names stand twice in the embeddings"
        )
        raise ValueError(f"{cfg.pairs}: {what}; embed the benchmark's own pictures by embed.test_glob")
    a, b = ([row_of[name] for name in side] for side in sides)
    score = np.einsum("nd,nd->n", data.vectors[a], data.vectors[b])
    same, fold = table["same"].to_numpy().astype(bool), table["fold"].to_numpy()
    try:
        found = moco.pair_accuracy(score, same, fold)
    except ValueError as error:
        raise ValueError(f"{cfg.pairs}: {error}") from error
    columns, threshold = moco.verification(score[same], moco.count_scores(score[~same]), cfg.fars)
    return {
        "pairs": len(score), "accuracy": found.mean, "standard_error": found.standard_error,
        **{name: float(column.mean()) for name, column in columns.items()},
        "refused": [f"tar@{far:g}" for far, at in threshold.items() if at is None],
    }  # fmt: skip


def read_reference(path: Path, name: str, data: Embeddings) -> Embeddings | None:
    """The untrained encoder's or PCA's vectors of the same pictures, None where `embed` wrote none."""
    file = reference_path(path, name)
    if not file.exists():
        return None
    reference = read_embeddings(file)
    same_note = all(reference.note.get(key) == data.note.get(key) for key in ("table", "split", "data", "flip"))
    if not same_note or not np.array_equal(reference.keys, data.keys) or not np.array_equal(reference.names, data.names):
        raise ValueError(f"{file}: not the pictures of {path}, or embedded otherwise; run command=embed again, or delete it")
    return reference


def results_table(metrics: dict, measured: dict[str, Measured], cfg: EvalConfig) -> str:
    """The compact table of the terminal: a row an encoder, intervals in brackets, chance last."""
    columns = [f"rank{k}" for k in cfg.top_k]
    lines = [f"{'':<12}" + "".join(f"{'Rank-' + name[4:]:<24}" for name in columns)]
    for name, found in measured.items():
        cells = (f"{found.figures[c]:.3f} [{found.figures[c + '_ci'][0]:.3f}, {found.figures[c + '_ci'][1]:.3f}]" for c in columns)
        lines.append(f"{name:<12}" + "".join(f"{cell:<24}" for cell in cells))
    lines.append(f"{'chance':<12}" + "".join(f"{min(1, k / metrics['gallery']):<24.3f}" for k in cfg.top_k))
    who = "unseen identities" if metrics["made_from"].get("trained_on") == 0 else "identities, not known to be unseen,"
    lines.append(
        f"{metrics['gallery']} {who} enrolled with {metrics['enroll_per_id']} pictures each ({metrics['distractors']} of them "
        f"distractors), {metrics['probes']} probes; 95 % intervals over identities"
    )
    return "\n".join(line.rstrip() for line in lines)


def find_pictures(cfg: Config, side: str | None, wanted: set[tuple[str, str, str]]) -> dict | None:
    """Decode the pictures (source, file name, identity) from the data of the run; None if the data is not there."""
    if side is None and cfg.embed.test_glob is None:  # vectors of other files than the run's
        return None
    found, people = {}, {identity for _, _, identity in wanted}
    try:
        for source, (index, columns) in embedded_indices(cfg, locate_rows(cfg, side) if side else None, people).items():
            for table in dataio.read_rows(index, columns):
                names, identities = table["image_filename"].to_pylist(), table["identity_id"].to_pylist()
                for key, data in zip(
                    zip(itertools.repeat(source), names, identities, strict=False), table["image_bytes"], strict=True
                ):
                    if key in wanted:
                        found[key] = dataio.decode_image(data.as_buffer(), cfg.data.image_size, cfg.data.max_image_pixels)
    except (ValueError, OSError):
        return None
    return found if wanted <= found.keys() else None


def draw_neighbours(cfg: Config, path: Path, data: Embeddings, drawn: moco.Enrolment, found: Measured) -> None:
    """Probes with their five nearest templates, each as its first enrolled picture: worst mistakes first, then some hits."""
    first = np.unique(drawn.identity[drawn.enrolled], return_index=True)[1]
    faces = drawn.enrolled[first] if cfg.eval.template == "centroid" else drawn.enrolled  # [R] one for each row of the gallery
    margin = found.found.score[:, 0] - found.found.genuine  # by how much a wrong template won
    order = np.argsort(np.where(found.found.rank > 1, -margin, np.inf), kind="stable")
    wrong = int((found.found.rank > 1).sum())
    shown = np.concatenate([order[: min(6, wrong)], order[wrong : wrong + 2]])
    nearest = found.found.row[shown, : min(5, len(faces))]  # [8, 5]
    rows = np.concatenate([drawn.probes[shown][:, None], faces[nearest]], axis=1)  # [8, 6] of the file
    pictures = find_pictures(
        cfg, data.note.get("split"), {(data.sources[row], data.keys[row].split("/", 1)[1], data.names[row]) for row in rows.ravel()}
    )
    if pictures is None:
        log.info("no neighbours.png: the pictures of these embeddings are not where the settings say")
        return
    with picture(path, *rows.shape, 1.1, 1.3) as axes:
        for i, j in np.ndindex(rows.shape):
            row, panel = rows[i, j], axes[i, j]
            panel.imshow(pictures[data.sources[row], data.keys[row].split("/", 1)[1], data.names[row]])
            panel.set(xticks=[], yticks=[])
            right = data.names[row] == data.names[rows[i, 0]]
            title = "probe" if j == 0 else f"{found.found.score[shown[i], j - 1]:.2f} {'right' if right else 'wrong'}"
            panel.set_title(title, fontsize=7, fontweight="bold" if j and right else "normal")
            for spine in panel.spines.values():
                spine.set(linewidth=3 if j and right else 0.5, linestyle="-" if j == 0 or right else ":")


def draw_results(
    cfg: Config, folder: Path, path: Path, data: Embeddings, drawn: moco.Enrolment, measured: dict[str, Measured], metrics: dict
) -> None:
    """cmc.png, roc.png, similarity.png and neighbours.png of one evaluation."""
    if not can_draw():
        return
    plots = folder / "plots"
    with picture(plots / "cmc.png") as axes:
        ranks = np.arange(1, 21)
        for style, (name, found) in enumerate(measured.items()):
            rate_curve(axes[0, 0], ranks, found.cmc, name, style, **CMC_AXES)
        curve(axes[0, 0], ranks, np.minimum(1, ranks / metrics["gallery"]), "chance", 3)
    with picture(plots / "roc.png") as axes:
        units = {"xlabel": "false accept rate", "ylabel": "true accept rate", "xscale": "log", "ylim": (0, 1)}
        for style, (name, found) in enumerate(measured.items()):
            rate_curve(axes[0, 0], list(found.roc), list(found.roc.values()), name, style, **units)
        curve(axes[0, 0], list(measured["trained"].roc), list(measured["trained"].roc), "chance", 3)
    with picture(plots / "similarity.png", width=6) as axes:
        found = measured["trained"]
        edges = found.histogram["edge"][::8]
        middle = (edges[:-1] + edges[1:]) / 2
        for style, name in enumerate(("genuine", "impostors")):
            counts = found.histogram[name].reshape(-1, 8).sum(axis=1)
            density = counts / counts.sum() / np.diff(edges)
            curve(axes[0, 0], middle, density, name, style, xlabel="cosine of probe and template", ylabel="density")
        axes[0, 0].set(xlim=(float(middle[counts > 0][0]) - 0.05, 1), ylim=(0, 1.3 * axes[0, 0].get_ylim()[1]))  # room for words
        for far, at in found.thresholds.items():
            if at is not None and far in (1e-2, 1e-3, 1e-4):
                axes[0, 0].axvline(at, color="black", linewidth=0.6)
                axes[0, 0].text(at, axes[0, 0].get_ylim()[1], f"FAR {far:g}", rotation=90, va="top", ha="right", fontsize=7)
    draw_neighbours(cfg, plots / "neighbours.png", data, drawn, measured["trained"])


def write_report(cfg: Config, folder: Path, metrics: dict, table: str) -> None:
    """report.md: figures and pictures of a run on one page, from the template conf/templates/report.md."""

    def rows(figures: dict, *before: object, names: Iterable[str] | None = None, beside: Iterable[dict] = ()) -> str:
        names = [name for name in figures if f"{name}_ci" in figures] if names is None else names
        lines = []
        for name in names:
            others = (f"{other[name]:.4f}" if name in other else "" for other in beside)
            low, high = figures[f"{name}_ci"]
            lines.append((*(before or (name,)), f"{figures[name]:.4f}", f"{low:.4f} to {high:.4f}", *others))
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

    names = ("cmc", "roc", "similarity", "neighbours", "train", "views")
    pictures = [name for name in names if (folder / f"plots/{name}.png").exists()]
    draws, shape, first = metrics["enrolment_draws"], metrics["geometry"], f"rank{cfg.eval.top_k[0]}"
    references, gallery = {name: metrics[name] for name in ("untrained", "pca") if name in metrics}, metrics["gallery"]
    chance = {f"rank{k}": min(1, k / gallery) for k in {1, 5, 10, *cfg.eval.top_k}} | {f"tar@{far:g}": far for far in cfg.eval.fars}
    chance |= {"auc": 0.5, "eer": 0.5, "mrr": float((1 / np.arange(1, gallery + 1)).mean())}
    values = {
        "run": folder.name, "table": table, "figures": rows(metrics, beside=(*references.values(), chance)),
        "references": "".join(f" {name} |" for name in references), "rules": "---|" * len(references),
        "open_set": rows(metrics["open_set"]) or "| none | | |",
        "refused": ", ".join(metrics["refused"] + metrics["open_set"].get("refused", [])) or "none", "first": first,
        "draws": f"{draws['rank1_mean']:.4f} on average over {draws['draws']} draws (deviation {draws['rank1_std'] or 0:.4f})",
        "geometry": ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shape.items()),
        "made_from": json.dumps(metrics["made_from"]),
        "sources": "\n".join(rows(f, name, f["probes"], names=[first]) for name, f in metrics["per_source"].items()),
        "sweep": "\n".join(rows(f, n, names=[first]) for n, f in metrics["enroll_sweep"].items()),
        "pictures": "\n\n".join(f"![{name}](plots/{name}.png)" for name in pictures),
    }  # fmt: skip
    with write_whole(folder / "report.md") as temporary:
        temporary.write_text(string.Template((CONF / "templates" / "report.md").read_text()).substitute(values))


def ranks_path(folder: Path, cfg: Config) -> Path:
    """metrics.json -> metrics.ranks.parquet: the rank of each probe, from which `report` computes paired differences."""
    return (folder / cfg.eval.out).with_suffix(".ranks.parquet")


def evaluate(cfg: Config, folder: Path, typed: set[str] = frozenset()) -> dict:
    """Measure an embeddings file: figures to metrics.json, a table to the terminal, pictures and report.md to the run's folder."""
    if (folder / "config.yaml").exists():
        cfg = settings_of({"config": read_saved_settings(folder / "config.yaml")}, cfg, typed)
    path = find_embeddings(cfg.eval.embeddings, folder)
    data = read_embeddings(path)
    check_provenance(path, data.note)
    asked = check_split(path, data, cfg, folder)
    lines = read_log(folder)
    if cfg.embed.checkpoint == "last" and lines and data.note.get("step", lines[-1]["step"]) != lines[-1]["step"]:
        log.warning(
            "%s is of step %d, the run is at step %d: command=embed brings it up to date",
            path,
            data.note["step"],
            lines[-1]["step"],
        )
    drawn = moco.enrol(data.names, data.keys, cfg.eval.enroll_per_id, cfg.eval.seed)
    ours, people = measure(data, drawn, cfg.eval), drawn.identity[drawn.probes]
    canonical = np.lexsort((data.keys, data.names))  # so that the order of the file decides nothing
    gallery = len(np.unique(drawn.identity[drawn.enrolled]))
    metrics = {
        **ours.figures, "identities": gallery, "identities_asked": asked, "gallery": gallery, "probes": len(people),
        "distractors": drawn.distractors, "chance_rank1": 1 / gallery, "enroll_per_id": cfg.eval.enroll_per_id,
        "template": cfg.eval.template, "seed": cfg.eval.seed, "embeddings": str(path), "made_from": data.note,
        "leaks": check_leaks(data, drawn, cfg.eval), "enrolment_draws": enrolment_draws(data, ours.found.rank, cfg.eval),
        "per_source": per_source(data, drawn, ours, cfg.eval), "enroll_sweep": enrolment_sweep(data, drawn, cfg.eval),
        "open_set": open_set_figures(data, cfg.eval) if cfg.eval.open_set_share else {},
        "pair_protocol": pair_figures(data, cfg.eval) if cfg.eval.pairs else {},
        "geometry": moco.geometry(data.vectors, drawn.identity, canonical, cfg.eval.seed),
    }  # fmt: skip
    measured, data = {"trained": ours}, data._replace(vectors=np.empty((0, 0)))  # the next ones are as large: one at a time
    for name in ("untrained", "pca"):
        if reference := read_reference(path, name, data):
            measured[name] = measure(reference, drawn, cfg.eval)
            metrics[name] = measured[name].figures
    ranks = pa.table({"identity_id": data.names[drawn.probes], "picture": data.keys[drawn.probes], "rank": ours.found.rank})
    with write_whole(ranks_path(folder, cfg)) as temporary:
        pq.write_table(ranks, temporary)
    with write_whole(folder / cfg.eval.out) as temporary:
        temporary.write_text(json.dumps(metrics, indent=1))
    table = results_table(metrics, measured, cfg.eval)
    log.info("%s", table)
    with not_vital("pictures of the results"):
        draw_results(cfg, folder, path, data, drawn, measured, metrics)
    write_report(cfg, folder, metrics, table)
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Results on paper
# ---------------------------------------------------------------------------------------------------------------------


def difference_to(first: Path, run: Path, cfg: Config) -> dict[str, float | None]:
    """Rank-1 of a run minus that of the first, over the same probes, with its interval; empty values where they were not the
    same.
    """
    names = ("rank1_change", "rank1_change_low", "rank1_change_high")
    files = [ranks_path(path, cfg) for path in (first, run)]
    if not all(file.exists() for file in files):
        return dict.fromkeys(names)
    base, ours = (pq.read_table(file).sort_by([("identity_id", "ascending"), ("picture", "ascending")]) for file in files)
    if not base.select(["identity_id", "picture"]).equals(ours.select(["identity_id", "picture"])):
        return dict.fromkeys(names)
    hits = [{"rank1": table["rank"].to_numpy() == 1} for table in (ours, base)]
    change = moco.differences(*hits, np.array(base["identity_id"].to_pylist()), cfg.eval.seed, cfg.eval.bootstrap)["rank1"]
    return dict(zip(names, change, strict=True))


def settings_file(run: Path) -> Path | None:
    """The settings that a run was trained with, else those that it was asked for and failed on; None for a folder of no run."""
    asked = sorted(run.glob(".hydra/*/config.yaml"), key=lambda path: path.stat().st_mtime_ns)
    return run / "config.yaml" if (run / "config.yaml").exists() else asked[-1] if asked else None


def report(cfg: Config, pattern: str) -> None:
    """Several runs side by side: table.csv and curves.png beside them, and the paired difference of each to the first."""
    import polars as pl

    found = {run: path for run in sorted(map(Path, glob.glob(pattern))) if (path := settings_file(run))}
    if not found:
        raise FileNotFoundError(f"report.runs={pattern}: no run there (a folder with config.yaml)")
    runs, settings = list(found), [flat(read_saved_settings(path)) for path in found.values()]
    varied = sorted(
        key for key in settings[0] if key not in ("run", "run_dir", "command") and len({str(s.get(key)) for s in settings}) > 1
    )
    metrics = [json.loads((run / cfg.eval.out).read_text()) if (run / cfg.eval.out).exists() else {} for run in runs]
    rows = []
    for run, setting, figures in zip(runs, settings, metrics, strict=True):
        rates = {key: figures.get(key) for key in ("rank1", "rank5", "rank10", "mrr", "auc", "eer")}
        low, high = figures.get("rank1_ci", (None, None))
        change = difference_to(runs[0], run, cfg)
        lines = read_log(run)
        epoch = f"epoch {lines[-1]['epoch']} of {setting['train.epochs']}" if lines else "not trained, see its log.txt"
        state = epoch + (", measured" if figures else "")
        overrides = {key: str(setting.get(key)) for key in varied}
        rows.append({"run": run.name, "state": state, **overrides, **rates, "rank1_low": low, "rank1_high": high, **change})
    out = Path(os.path.commonpath(runs)) if len(runs) > 1 else runs[0].parent
    with write_whole(out / "table.csv") as temporary:
        pl.DataFrame(rows, infer_schema_length=None).write_csv(temporary)
    if can_draw():
        with picture(out / "curves.png", 1, 2) as axes:
            for style, (run, figures) in enumerate(zip(runs, metrics, strict=True)):
                name = ", ".join(f"{key.split('.')[-1]}={s}" for key in varied[:3] if (s := rows[style][key])) or run.name
                lines, cmc = read_log(run), figures.get("cmc", [])
                steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
                curve(axes[0, 0], steps, losses, name, style, xlabel="step", ylabel="loss [nats]")
                curve(axes[0, 1], range(1, 1 + len(cmc)), cmc, name, style, **CMC_AXES)
    log.info("%s: %d runs", out / "table.csv", len(runs))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch
# ---------------------------------------------------------------------------------------------------------------------


def train_for_objective(cfg: Config, folder: Path) -> float:
    """Train; returns what sweepers maximise: Rank-1 of the validation identities if there are any, else minus the monitor."""
    if cfg.split.materialize == "yes":
        split(cfg, folder)
    monitor = train(cfg, folder)
    if not cfg.split.validation_ratio:
        return monitor
    out = "embeddings/val_embeddings.parquet"
    chosen = dataclasses.replace(
        cfg.embed, checkpoint="last", split="val", test_glob=None, references=False, leak_check=False, out=out
    )
    embed(dataclasses.replace(cfg, embed=chosen), folder)
    return closed_set_rates(read_embeddings(folder / chosen.out), cfg.eval, cfg.eval.enroll_per_id, cfg.eval.seed)["rank1"].value


def train_and_measure(cfg: Config, folder: Path, typed: set[str]) -> float:
    """The whole path in one process: table, train, embed, eval."""
    objective = train_for_objective(cfg, folder)
    embed(cfg, folder, typed)
    evaluate(cfg, folder, typed)
    return objective


COMMANDS: dict[str, Callable[[Config, Path, set[str]], float | None]] = {
    "split": lambda cfg, folder, typed: split(cfg, folder),
    "train": lambda cfg, folder, typed: train_for_objective(cfg, folder),
    "embed": embed,
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
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        cfg = load_config(raw)
        with logging_redirect_tqdm():
            try:
                return COMMANDS[cfg.command](cfg, folder, typed_keys(HydraConfig.get().overrides.task))
            finally:
                if HydraConfig.get().mode == RunMode.MULTIRUN and cfg.command in ("train", "eval", "all"):
                    with not_vital("table of the sweep"):
                        report(cfg, glob.escape(str(folder.parent)) + "/*")  # so a sweep ends with its table, failed jobs in it
    except Exception as error:
        log.debug("failed", exc_info=True)  # for log.txt: the terminal gets one line
        traceback.clear_frames(error.__traceback__)  # a sweep keeps the errors of its jobs, and they all that the jobs held
        raise
    finally:
        gc.collect()  # what refers to itself, before the next job of a sweep asks how much memory is free
        torch.cuda.empty_cache()


def folder_name(overrides: str) -> str:
    """The name of a sweep's job folder: its overrides, told apart by their hash where they do not make a name for a disk."""
    name = re.sub(r"[^\w.,=+-]", "_", overrides) or "defaults"
    return name if name == overrides and len(name.encode()) <= 150 else f"{name[:60]}_{dataio.digest(overrides)}"


def in_short(error: Exception) -> str:
    """What went wrong, without Hydra's search path and without its advice to add an unknown key by force."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return str(error)
    told = str(error).split("Config search path")[0]
    lines = [line.strip() for line in told.splitlines() if line.strip() and "To append to your config" not in line]
    return " ".join(lines) + "; see conf/ for what there is"


def stop_at_once(number: int, frame: object) -> None:
    """SIGTERM outside the training loop ends like Ctrl-C: what is half written is taken away, and a line says how to go on."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_at_once)
    OmegaConf.register_new_resolver("folder_name", folder_name)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra's own refusals arrive below as exceptions
    try:
        main()
    except KeyboardInterrupt as stopped:
        print("sniperface: stopped; the same command goes on where it can", file=sys.stderr)
        sys.exit(128 + (stopped.args or (signal.SIGINT,))[0])
    except (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"sniperface: {in_short(error)}")
