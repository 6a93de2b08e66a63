"""What the benchmarks share: made data of the real shape, alternating rounds, and the one table that each prints.

Nothing here asserts a time: a table says what was measured, on which machine, beside what, and what the goal is.
"""

import contextlib
import ctypes
import io
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a benchmark runs from anywhere

import dataio  # noqa: E402

SIDE = 112
CLOCK = [time.perf_counter]  # or time.process_time, see `use_one_core`
SCHEMA = pa.schema([("identity_id", pa.string()), ("image_filename", pa.string()), ("image_bytes", pa.binary())])

# ---------------------------------------------------------------------------------------------------------------------
# Data of the real shape
# ---------------------------------------------------------------------------------------------------------------------


def make_pictures(kind: str, count: int = 256) -> list[bytes]:
    """Noise over smooth shapes, 112 x 112: PNG of about 20 kB or JPEG of about 7 kB, as the two real sources have."""
    rng, pictures = np.random.default_rng(0), []
    noise, options = (1.0, {"compress_level": 3}) if kind == "png" else (5.0, {"quality": 95})
    for _ in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = np.asarray(shapes, np.float32) + rng.normal(0, noise, (SIDE, SIDE, 1))
        encoded = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(encoded, kind, **options)
        pictures.append(encoded.getvalue())
    return pictures


def digiface_codes(share: float = 1.0) -> np.ndarray:
    """The identity of each row of DigiFace-1M, sorted: 10,000 people of 72 pictures, 100,000 of 5; or a share of the people."""
    counts = np.repeat([72, 5], [round(10_000 * share), round(100_000 * share)])
    return np.repeat(np.arange(len(counts)), counts)  # [1.22 million * share]


def write_faces(path: Path, codes: np.ndarray, pictures: list[bytes], group: int = 1000) -> str:
    """Write a row for each identity code [N], in row groups of `group` rows, from a pool of pictures; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = {"compression": {"image_bytes": "none"}, "use_dictionary": ["identity_id"], "write_page_index": False}
    with pq.ParquetWriter(path, SCHEMA, **packing) as writer:
        for start in range(0, len(codes), group):
            part = codes[start : start + group].tolist()
            names = [f"{code}/{row}.png" for row, code in enumerate(part, start)]
            images = [pictures[row % len(pictures)] for row in range(start, start + len(part))]
            writer.write_table(pa.table([list(map(str, part)), names, images], SCHEMA), row_group_size=group)
    return str(path)


def read_settings(group: str, name: str) -> dict:
    """One group of conf/ as plain values, without Hydra, which the GPU machine may lack."""
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())


def read_augmentation() -> dataio.AugmentConfig:
    """conf/augment/default.yaml"""
    settings = read_settings("augment", "default")
    return dataio.AugmentConfig(**{k: dataio.Op(**v) if isinstance(v, dict) else v for k, v in settings.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def clock() -> float:
    return CLOCK[0]()


def keep_freed_memory(keep: bool) -> None:
    """The C library's memory as sniperface.configure_process sets it on the CPU, or as it sets itself after a few large tensors."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0 if keep else 65536), (-1, 2**31 - 1 if keep else 64 << 20), (-3, 32 << 20)):
            libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def use_one_core() -> None:
    """Count what this process computes, on one thread, instead of what the clock says: for a machine that others use as well."""
    CLOCK[0] = time.process_time
    torch.set_num_threads(1)


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this thread, and all that it starts meanwhile, on so many cores (Linux only)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(usual)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, usual)


def steady_rate(batches: Iterator, seconds: float, warm: int = 6, close: bool = True) -> float:
    """Items a second of an endless sequence of batches, once its queues have filled; closes the sequence."""
    for _ in range(warm):
        next(batches)
    count, start = 0, clock()
    while (passed := clock() - start) < seconds or not count:
        count += len(next(batches))
    if close:
        batches.close()
    return count / passed


def seconds_of(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def peak_mb() -> float:
    """The most memory this process ever held. Not ru_maxrss: that of a started process begins at its parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS, in bytes
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def alternate(contenders: dict[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """One figure of each contender a round, A B A B, so that what else the machine does hits them alike."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            figures[name].append(measure())
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def describe_machine() -> str:
    """Machine, load and versions in one line."""

    def version_of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    packages = ("torch", "torchvision", "pillow", "pyarrow", "numpy", "faiss-cpu")
    load += ", processor time" if CLOCK[0] is time.process_time else ""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {load}"
    return ", ".join([cpu, threads, gpu, f"Python {platform.python_version()}", *map(version_of, packages)])


WIDTHS = (3, 62, 12, 32, 12, 22, 10, 4)  # of the columns


def print_line(*cells: str) -> None:
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)) + " |", flush=True)


def print_head() -> None:
    print(describe_machine(), flush=True)
    print_line("#", "what (unit of ours and theirs)", "ours", "beside", "theirs", "ratio (lowest..highest)", "goal", "met")
    print_line(*("-" * width for width in WIDTHS))


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_row(number: str, what: str, ours: list[float], beside: str, theirs: list[float], goal: str = "") -> None:
    """Medians of both sides and of the rounds' ratios, which the goal, like ">= 0.9", is held against."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle, met = statistics.median(ratios), ""
    if goal:
        sense, limit = goal.split()
        met = "yes" if (middle >= float(limit) if sense == ">=" else middle <= float(limit)) else "no"
    spread = f"{middle:.3f} ({min(ratios):.2f}..{max(ratios):.2f})"
    print_line(number, what, shown(statistics.median(ours)), beside, shown(statistics.median(theirs)), spread, goal, met)
