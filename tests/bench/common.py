"""What the benchmarks share: made data of the real shape, options, alternating rounds, and the one table that each prints.

Nothing here asserts a time: a table says what was measured, on which machine, beside what, and what the goal is. Linux only.
"""

import argparse
import functools
import io
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # so that a benchmark runs from anywhere

import dataio  # noqa: E402

ON_GPU = torch.cuda.is_available()
clock = time.perf_counter  # or time.process_time, with --cpu-time
WIDTHS = (3, 62, 12, 32, 12, 22, 10, 4)  # of the table's columns


@functools.cache
def make_pictures(kind: str, count: int = 256) -> list[bytes]:
    """Noise over smooth shapes, 112 x 112: PNG of about 20 kB or JPEG of about 7 kB, as the two real sources have."""
    rng, pictures = np.random.default_rng(0), []
    noise, options = (1.0, {"compress_level": 3}) if kind == "png" else (5.0, {"quality": 95})
    for _ in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((112, 112), Image.Resampling.BICUBIC)
        pixels = np.asarray(shapes, np.float32) + rng.normal(0, noise, (112, 112, 1))
        encoded = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(encoded, kind, **options)
        pictures.append(encoded.getvalue())
    return pictures


def write_rows(path: Path, codes: np.ndarray, pictures: list[bytes], group: int = 1000) -> str:
    """Write a row for each identity code [N], in row groups of `group` rows, from a pool of pictures; gives the path."""
    path.parent.mkdir(exist_ok=True)
    names = [f"{code}/{row}.png" for row, code in enumerate(codes)]
    which = pa.array(np.arange(len(codes)) % len(pictures))
    images = pa.DictionaryArray.from_arrays(which, pa.array(pictures, pa.binary()))  # each once; the file has them all
    table = pa.table({"identity_id": codes.astype(str), "image_filename": names, "image_bytes": images})
    packing = {"compression": {"image_bytes": "none"}, "use_dictionary": ["identity_id"], "write_page_index": False}
    pq.write_table(table, path, row_group_size=group, store_schema=False, **packing)
    return str(path)


def write_faces(folder: Path, rows: int, kind: str = "png", group: int = 1000) -> str:
    """Pictures of full size, 72 of a person."""
    return write_rows(folder / f"{kind}_{rows}_{group}.parquet", np.arange(rows) // 72, make_pictures(kind), group)


def write_digiface(folder: Path, share: float = 1.0) -> str:
    """DigiFace-1M's rows with 16 bytes for a picture, sorted: 10,000 people of 72 and 100,000 of 5, 1.22 million; or a share."""
    counts = np.repeat([72, 5], [round(10_000 * share), round(100_000 * share)])
    return write_rows(folder / f"digiface_{share:.2f}.parquet", np.repeat(np.arange(len(counts)), counts), [bytes(16)])


def read_settings(name: str) -> dict:
    """One file of conf/ as plain values, without Hydra, which the GPU machine may lack."""
    return yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())


def read_augmentation() -> dataio.AugmentConfig:
    """conf/augment/default.yaml"""
    settings = read_settings("augment/default").items()
    return dataio.AugmentConfig(**{name: dataio.Op(**value) if isinstance(value, dict) else value for name, value in settings})


def seconds_of(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def rate_of(work: Callable[[], int], seconds: float, warm: int = 1, cores: int | None = None) -> float:
    """The items a second that `work` says it did, over whole calls of it, on so many cores."""
    wait = torch.cuda.synchronize if ON_GPU else lambda: None
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(usual)[:cores])  # of what `work` starts, too
    for _ in range(warm):
        work()
    wait()
    done, start = 0, clock()
    while not done or clock() - start < seconds:
        done += work()
    wait()
    passed = clock() - start
    os.sched_setaffinity(0, usual)
    return done / passed


def peak_mb() -> float:
    """The most memory this process ever held. Not ru_maxrss: that of a started process begins at its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def in_own_process(function: Callable, *arguments: object) -> tuple[float, float, float]:
    """Of `function` in a new process: seconds, the process's peak of memory in MB, and by how much that rose."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before = pool.submit(peak_mb).result()
        seconds = pool.submit(seconds_of, functools.partial(function, *arguments)).result()
        peak = pool.submit(peak_mb).result()
    return seconds, peak, peak - before


def print_line(*cells: object, widths: Sequence[int] = WIDTHS) -> None:
    print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def print_head(*names: str, widths: Sequence[int] = WIDTHS) -> None:
    """Machine, load and versions in one line, then the head of the table."""
    cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, load {os.getloadavg()[0]:.1f} at the start"
    gpu = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    modules = [sys.modules[name] for name in ("torch", "torchvision", "PIL", "pyarrow", "numpy", "faiss") if name in sys.modules]
    versions = [f"{module.__name__} {module.__version__}" for module in modules]
    print(", ".join([cpu, threads, gpu, clock.__name__, f"Python {platform.python_version()}", *versions]), flush=True)
    print_line(*names, widths=widths)
    print_line(*("-" * width for width in widths), widths=widths)


def compare(rounds: int, *rows: tuple) -> None:
    """Measure and print rows (number, what, ours, beside, theirs, goal); ours and theirs measure when called, or theirs is a limit.

    One figure of each contender a round, A B A B, so that what else the machine does hits them alike. Shown are the medians of
    both and of the rounds' ratios, which a goal, like ">= 0.9", is held against.
    """
    figures = {contender: [] for row in rows for contender in (row[2], row[4])}
    for _ in range(rounds):
        for contender, measured in figures.items():
            measured.append(contender() if callable(contender) else contender)
    for number, what, ours, beside, theirs, goal in rows:
        ratios = [a / b for a, b in zip(figures[ours], figures[theirs], strict=True)]
        middle = statistics.median(ratios)
        sense, _, limit = goal.partition(" ")
        met = "" if not goal else "yes" if (middle >= float(limit) if sense == ">=" else middle <= float(limit)) else "no"
        medians = [statistics.median(figures[contender]) for contender in (ours, theirs)]
        a, b = (f"{median:,.0f}" if median >= 100 else f"{median:.3g}" for median in medians)
        print_line(number, what, a, beside, b, f"{middle:.3f} ({min(ratios):.2f}..{max(ratios):.2f})", goal, met)


def make_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, on one core: for a busy machine")
    return parser


def measure(parser: argparse.ArgumentParser, parts: dict[str, Callable[[argparse.Namespace, Path], None]], *asked: str) -> None:
    """Read the options, print the head of the table and measure the parts: by default all but those that must be asked for."""
    global clock
    usual = [part for part in parts if part not in asked]
    parser.add_argument("--only", nargs="*", choices=parts, default=usual, help=f"parts to measure, by default {' '.join(usual)}")
    args = parser.parse_args()
    args.cores = 1 if args.cpu_time else os.cpu_count() or 1
    if args.cpu_time:
        clock = time.process_time
        torch.set_num_threads(1)
    print_head("#", "what (unit of ours and theirs)", "ours", "beside", "theirs", "ratio (lowest..highest)", "goal", "met")
    for part in args.only:
        with tempfile.TemporaryDirectory(prefix="sniperface_bench_") as folder:
            parts[part](args, Path(folder))
