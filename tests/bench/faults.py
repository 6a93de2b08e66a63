"""Faults by the hundred, in one table: kill -9 while a whole run (command=all) writes, and seeded damage to what it reads.

    uv run python tests/bench/faults.py [--kills 50] [--fuzz-seconds 60] [--seed 0]

survived: the rerun ended with the bits of a run that was never killed (shards, weights, queue, log, embeddings, metrics), the
damaged file was refused by name, or what was read is right. lost: the rerun refused or did not end, or reading took the process
down or hung. wrong: other bits, or another exception than one that names the file. Exit code 1 where anything is lost or wrong.
Linux only: it forks.
"""

import argparse
import contextlib
import json
import logging
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests"))

import pyarrow.parquet as pq
from conftest import encode
from PIL import Image
from test_faults import KILLED, bits, job, result, watch_writes

import dataio
import sniperface

MEMORY_BYTES = 6 << 30  # that a process may take while it reads damaged files
PATIENCE_S = 120  # before a run counts as hanging, and 20 s for a damaged file


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


def whole_run(home: Path, data: Path) -> None:
    """command=all as a user types it: shards, decoded caches, checkpoints every other step, vectors, figures."""
    cfg = job(home, data, "split.materialize=yes", "data.cache=decoded", "train.keep_last=1", "command=all")
    sniperface.train_and_measure(cfg, home / "run", set())


def everything(home: Path) -> dict:
    """What must be the same in the end; of the rotated checkpoints only those that every run keeps."""
    found = {
        key: value for key, value in result(home / "run").items() if key != "names" and not key.startswith(("step_", "epoch_01"))
    }
    shards = {str(p.relative_to(home)): pq.read_table(p).to_pylist() for p in sorted((home / "splits").rglob("*.parquet"))}
    caches = {p.name: p.read_bytes() for p in sorted((home / "cache").glob("*.u8"))}
    return found | shards | caches


def started(function: Callable[[], object], told: Path) -> int:
    """The process id of a fork that runs `function`; what it says goes to the file `told`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with open(told, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(pid: int, limit_s: float) -> int | None:
    """Exit status of a process, negative for a signal; None if it had to be killed after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def count_instants(home: Path, data: Path, folder: Path) -> int:
    """How many instants of a run there are just before or after a file changes."""
    seen = folder / "instants"

    def counting() -> None:
        count = 0

        def tell(*_) -> None:
            nonlocal count
            count += 1

        watch_writes(tell)
        whole_run(home, data)
        seen.write_text(str(count))

    assert ended(started(counting, folder / "told"), PATIENCE_S) == 0, (folder / "told").read_text()[-2000:]
    return int(seen.read_text())


def dying(home: Path, data: Path, number: int, half: bool) -> None:
    """The run, dead at instant `number`; with `half` the file that is being written there has lost the end of its bytes."""
    count = 0

    def tell(operation: str, name: str, when: str, arguments: tuple) -> None:
        nonlocal count
        count += 1
        if count >= number and (not half or ((operation, when) == ("fsync", "before") and name.endswith(".tmp"))):
            if half:
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os._exit(KILLED)

    watch_writes(tell)
    whole_run(home, data)


def one_victim(kind: str, rng: random.Random, home: Path, data: Path, span: tuple[float, int], told: Path) -> int:
    """Start the run and kill it as `kind` says; gives how often it was hit: 0 where it ended before, 2 where twice."""
    hits, (seconds, instants) = 0, span
    while not hits or rng.random() < 0.3:  # now and then the rerun is killed, too
        if kind == "kill -9 at a random moment":
            pid = started(lambda: whole_run(home, data), told)
            hit = ended(pid, rng.uniform(0, seconds)) is None
        else:
            number, half = rng.randint(1, instants), kind == "half a file left behind"
            hit = ended(started(lambda number=number, half=half: dying(home, data, number, half), told), PATIENCE_S) == KILLED
        if not hit:
            break
        hits += 1
    return hits


def kill_runs(kills: int, rng: random.Random, data: Path, folder: Path) -> Iterator[tuple[str, Counter]]:
    """Kill `kills` times, by turns in each way; after each victim the same command runs to its end and is compared."""
    start = time.monotonic()
    whole_run(folder / "unbroken", data)  # here, so that each fork finds the libraries warm
    start = time.monotonic()
    instants = count_instants(folder / "counted", data, folder)
    span, expected = (time.monotonic() - start, instants), everything(folder / "unbroken")
    kinds = ("kill -9 at a random moment", "kill -9 before or after a write", "half a file left behind")
    tables = {kind: Counter() for kind in kinds}
    while sum(table["injected"] for table in tables.values()) < kills:
        kind = min(kinds, key=lambda kind: tables[kind]["injected"])
        home, told = folder / "victim", folder / "told"
        shutil.rmtree(home, ignore_errors=True)
        told.write_text("")
        hits = one_victim(kind, rng, home, data, span, told)
        if not hits:
            continue
        code = ended(started(lambda home=home: whole_run(home, data), told), PATIENCE_S)
        found = everything(home) if code == 0 else {}
        differ = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        outcome = "lost" if code != 0 else "wrong" if differ or list(home.rglob("*.tmp")) else "survived"
        tables[kind].update({"injected": hits, outcome: hits})
        if outcome != "survived":
            print(f"{outcome} after {hits} x {kind}, exit {code}, {differ[:5]}:\n{told.read_text()[-3000:]}", file=sys.stderr)
    yield from tables.items()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite, cut, repeat or swap pieces of a file, one to eight times; half of it in its first or last kilobyte."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            break
        ends = (0, min(1024, len(data))), (max(0, len(data) - 1024), len(data)), (0, len(data)), (0, len(data))
        at, size = rng.randrange(*rng.choice(ends)), rng.choice((1, 4, 16, 256))
        how = rng.randrange(6)
        if how <= 1:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        elif how == 3:
            data[at : at + size] = rng.randbytes(size)
        elif how == 4:
            del data[at : at + (size if rng.random() < 0.7 else len(data))]
        else:
            data[at:at] = data[rng.randrange(len(data)) :][:size]
    return bytes(data)


def judged(error: Exception, path: Path) -> str:
    """A refusal is right if it names the file."""
    if str(path) in str(error):
        return "survived"
    print(f"does not name the file: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    return "wrong"


def picture_reader(data: Path) -> Callable[[random.Random, Path], str]:
    face = dataio.draw_face(3, 1, "digi2real", seed=0)
    grey, deep = face.convert("L"), Image.fromarray(np.asarray(face.convert("L"), np.uint16) * 257)
    kinds = [encode(face, "png"), encode(face, "jpeg", quality=90), encode(face, "jpeg", progressive=True), encode(face, "webp")]
    kinds += [encode(face, "bmp"), encode(face.quantize(), "gif"), encode(face.convert("CMYK"), "jpeg"), encode(grey, "png")]
    kinds += [encode(face, "tiff", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "tiff_deflate")] + [encode(deep, "png")]
    kinds += [encode(face.convert("RGBA"), "png"), encode(face.quantize(), "png", transparency=3)]

    def read(rng: random.Random, scratch: Path) -> str:
        try:
            image = dataio.decode_image(damage(rng.choice(kinds), rng), 112, 4_000_000)
            return "survived" if image.shape == (112, 112, 3) and image.dtype == np.uint8 else "wrong"
        except ValueError:
            return "survived"

    return read


def parquet_reader(data: Path) -> Callable[[random.Random, Path], str]:
    rows = pq.read_table(data / "digi2real_000.parquet")
    whole = []
    for options in ({"compression": "none"}, {"compression": "zstd"}, {"use_dictionary": False}, {"data_page_version": "2.0"}):
        path = data / "whole.parquet"
        pq.write_table(rows, path, row_group_size=10, **options)
        whole.append(path.read_bytes())
        path.unlink()

    def read(rng: random.Random, scratch: Path) -> str:
        path = scratch / "damaged.parquet"
        path.write_bytes(damage(rng.choice(whole), rng))
        try:
            dataio.read_metadata(path)
            dataio.collect_unique_identities(str(path))
            stream = dataio.ParquetImageStream(str(path), image_size=32, max_bad_fraction=1.0)
            seen = sum(1 for _ in stream)
            table = sum(len(part) for part in dataio.read_rows(stream.index, dataio.COLUMNS))
            return "survived" if seen == table == len(stream) else "wrong"
        except (ValueError, OSError) as error:
            return judged(error, path)

    return read


def checkpoint_reader(home: Path) -> Callable[[random.Random, Path], str]:
    whole = (home / "run" / "checkpoints" / "last.pt").read_bytes()
    wanted = bits(sniperface.load_checkpoint(home / "run" / "checkpoints" / "last.pt"))

    def read(rng: random.Random, scratch: Path) -> str:
        path, data = scratch / "damaged.pt", bytearray(whole)
        at = rng.randrange(*rng.choice(((0, len(data)), (max(0, len(data) - 60_000), len(data)))))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data if rng.random() < 0.9 else data[:at])
        try:
            return "survived" if bits(sniperface.load_checkpoint(path)) == wanted else "wrong"
        except ValueError as error:
            return judged(error, path)

    return read


def embeddings_reader(home: Path) -> Callable[[random.Random, Path], str]:
    whole = (home / "run" / "embeddings" / "test_embeddings.parquet").read_bytes()

    def read(rng: random.Random, scratch: Path) -> str:
        path = scratch / "damaged.parquet"
        path.write_bytes(damage(whole, rng))
        try:
            found = sniperface.read_embeddings(path)
            return "survived" if len(found.names) == len(found.keys) == len(found.vectors) else "wrong"
        except (ValueError, OSError) as error:
            return judged(error, path)

    return read


def table_reader(home: Path) -> Callable[[random.Random, Path], str]:
    whole = (home / "splits" / "identity_splits.parquet").read_bytes()

    def read(rng: random.Random, scratch: Path) -> str:
        path = scratch / "damaged.parquet"
        path.write_bytes(damage(whole, rng))
        try:
            splits = dataio.read_identity_splits(path)
            return "survived" if splits.identities.keys() == {"train", "val", "test"} else "wrong"
        except (ValueError, OSError) as error:
            return judged(error, path)

    return read


def fuzz(read: Callable[[random.Random, Path], str], seconds: float, seed: int, folder: Path) -> Counter:
    """Read damaged files for so long in a process that may die; a file that kills it or takes 20 s is lost, the next goes on."""
    counts, number, until = Counter(), 0, time.monotonic() + seconds
    shared = mmap.mmap(-1, 64)  # number of the file that is being read; survived and wrong so far

    def work(first: int) -> None:
        logging.disable()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES + int(Path("/proc/self/statm").read_text().split()[0]) * 4096,) * 2)
        n = first
        while time.monotonic() < until:
            shared[:8] = struct.pack("q", n)
            try:
                outcome = read(random.Random(f"{seed}/{n}"), folder)
            except Exception as error:
                outcome = "wrong"
                print(f"file {n}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                traceback.print_exc(limit=-3)
            if outcome == "wrong":
                print(f"file {n} of seed {seed}: wrong", file=sys.stderr, flush=True)
            place = 8 if outcome == "survived" else 16
            shared[place : place + 8] = struct.pack("q", struct.unpack("q", shared[place : place + 8])[0] + 1)
            n += 1

    while time.monotonic() < until:
        shared[:8] = struct.pack("q", number)
        pid, status, last, since = started(lambda first=number: work(first), folder / "fuzz_told"), None, -1, time.monotonic()
        while status is None:
            found, raw = os.waitpid(pid, os.WNOHANG)
            now = struct.unpack("q", shared[:8])[0]
            if found:
                status = os.waitstatus_to_exitcode(raw)
            elif now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > 20:
                os.kill(pid, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.01)
        number = struct.unpack("q", shared[:8])[0] + 1
        if status != 0:
            counts["lost"] += 1
            print(f"file {number - 1} of seed {seed}: the process ended with {status}", file=sys.stderr)
    survived, wrong = struct.unpack("qq", shared[8:24])
    counts.update({"survived": survived, "wrong": wrong, "injected": survived + wrong + counts["lost"]})
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, (34, 8, 8, 6, 6), strict=True)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--fuzz-seconds", type=float, default=60.0, help="of each kind of damaged file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sniperface.can_draw = lambda: False  # half the time of a run, and nothing depends on it
    logging.getLogger("sniperface").setLevel(logging.ERROR)
    total = Counter()
    print(describe_machine())
    print_row("fault", "injected", "survived", "lost", "wrong")
    print_row(*("-" * width for width in (34, 8, 8, 6, 6)))
    with tempfile.TemporaryDirectory(prefix="sniperface_faults_") as name, open(os.devnull, "w") as silence:
        folder = Path(name)
        data = folder / "data"
        with contextlib.redirect_stderr(silence):  # progress bars
            dataio.write_demo_faces(data, identities=16, images_digiface=4, images_digi2real=3, size=32, seed=1)
            if not args.kills:
                whole_run(folder / "unbroken", data)
        if args.kills:
            for kind, counts in kill_runs(args.kills, random.Random(args.seed), data, folder):
                print_row(kind, *(counts[key] for key in ("injected", "survived", "lost", "wrong")))
                total.update(counts)
        home = folder / "unbroken"
        readers = {
            "damaged picture": picture_reader(data), "damaged parquet data": parquet_reader(data),
            "damaged checkpoint": checkpoint_reader(home), "damaged embeddings": embeddings_reader(home),
            "damaged split table": table_reader(home),
        }  # fmt: skip
        for kind, read in readers.items():
            (folder / "fuzz_told").write_text("")
            counts = fuzz(read, args.fuzz_seconds, args.seed, folder) if args.fuzz_seconds else Counter()
            print_row(kind, *(counts[key] for key in ("injected", "survived", "lost", "wrong")))
            if counts["lost"] or counts["wrong"]:
                print((folder / "fuzz_told").read_text()[-6000:], file=sys.stderr)
            total.update(counts)
    print_row("all", *(total[key] for key in ("injected", "survived", "lost", "wrong")))
    print(json.dumps(total))
    sys.exit(bool(total["lost"] or total["wrong"]))


if __name__ == "__main__":
    main()
