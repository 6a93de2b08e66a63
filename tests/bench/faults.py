"""Faults by the hundred, in one table: kill -9 while a whole run (command=all) writes, and seeded damage to what it reads.

    uv run python tests/bench/faults.py [--kills 50] [--fuzz-seconds 60] [--seed 0] 2> faults.log

survived: the rerun ended with the bits of a run that was never killed (shards, weights, queue, log, embeddings, metrics), the
damaged file was refused by name, or what was read is right. lost: the rerun refused or did not end, or reading took the process
down or hung. wrong: other bits, or another exception than one that names the file. Exit code 1 where anything is lost or wrong.
What the runs and the readers say, and why something is lost or wrong, goes to stderr. Linux only: it forks.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import pyarrow.parquet as pq
import torch
from demo_faces import draw_face, write_demo_faces
from runs import bits, job, result
from test_kills import KILLED, die_at, watch_writes

import dataio
import sniperface

MEMORY_BYTES = 6 << 30  # that a process may take while it reads damaged files
PATIENCE_S = 120  # before a run counts as hanging
FILE_PATIENCE_S = 20  # before a damaged file does
COLUMNS, WIDTHS = ("injected", "survived", "lost", "wrong"), (34, 8, 8, 6, 6)


def exit_of(function: Callable[[], object], limit_s: float | None = None) -> int | None:
    """Exit code of a fork that runs `function`; None where it is killed at the limit."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(limit_s)
    code = child.exitcode
    child.kill()
    child.join()
    return code


def whole_run(home: Path, data: Path) -> None:
    """command=all as a user types it: shards, decoded caches, checkpoints every other step, vectors, figures."""
    cfg = job(home, data, "split.materialize=yes", "data.cache=decoded", "train.keep_last=1", "command=all")
    sniperface.train_and_measure(cfg, home / "run", set())


def everything(home: Path) -> dict:
    """What must be the same in the end; of the rotated checkpoints only those that every run keeps."""
    passing = ("names", "step_", "epoch_01")
    found = {key: value for key, value in result(home / "run").items() if not key.startswith(passing)}
    shards = {str(p.relative_to(home)): pq.read_table(p).to_pylist() for p in sorted((home / "splits").rglob("*.parquet"))}
    caches = {p.name: p.read_bytes() for p in sorted((home / "cache").glob("*.u8"))}
    return found | shards | caches


def watched_run(home: Path, data: Path) -> None:
    """Write down all instants of a run just before or after a file changes, a line each, as `die_at` takes them."""
    seen = []
    watch_writes(lambda operation, name, when, _: seen.append(f"{when} {operation} {name.partition('~')[0]}\n"))  # no process id
    whole_run(home, data)
    (home / "instants").write_text("".join(seen))


def kill_runs(kills: int, rng: random.Random, data: Path, folder: Path) -> dict[str, Counter]:
    """Kill `kills` times, by turns in each way; after each victim the same command runs to its end and is compared."""
    home, watched, start = folder / "victim", folder / "watched", time.monotonic()
    assert exit_of(lambda: watched_run(watched, data)) == 0, "a run without faults failed"
    seconds, instants = time.monotonic() - start, (watched / "instants").read_text().splitlines()
    halves = [line.replace("before fsync", "half") for line in instants if line.startswith("before fsync .")]  # of temporary files
    halves = [line for line in halves if ".last.pt" not in line and ".best.pt" not in line]  # links to files that are whole already

    def dies(instant: str) -> bool:
        return exit_of(lambda: (die_at(instant), whole_run(home, data)), PATIENCE_S) == KILLED

    kinds = {
        "kill -9 at a random moment": lambda: exit_of(lambda: whole_run(home, data), rng.uniform(0, seconds)) is None,
        "kill -9 before or after a write": lambda: dies(rng.choice(instants)),
        "half a file left behind": lambda: dies(rng.choice(halves)),
    }
    tables, expected = {kind: Counter() for kind in kinds}, everything(folder / "unbroken")
    for kind, kill in itertools.islice(itertools.cycle(kinds.items()), kills):
        hits = 0
        while not hits:  # it ended before
            shutil.rmtree(home, ignore_errors=True)
            hits = int(kill())
        hits += rng.random() < 0.3 and kill()  # now and then the rerun is killed, too
        code = exit_of(lambda: whole_run(home, data), PATIENCE_S)
        found = everything(home) if code == 0 else {}
        differ = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        outcome = "lost" if code != 0 else "wrong" if differ or list(home.rglob("*.tmp")) else "survived"
        tables[kind].update({"injected": hits, outcome: hits})
        if outcome != "survived":
            print(f"{outcome} after {hits} x {kind}, exit {code}, {differ[:5]}", file=sys.stderr)
    return tables


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut out or double pieces of a file, half of them in its first or last kilobyte; seldom cut its end off."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        end, size = len(data), rng.choice((1, 4, 16, 256))
        at = rng.randrange(*rng.choice(((0, min(1024, end)), (max(0, end - 1024), end), (0, end), (0, end))))
        flipped = bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 : at + size]
        filled = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        data[at : at + size] = rng.choice((flipped, flipped, filled, rng.randbytes(size), b"", 2 * data[at : at + size]))
        if rng.random() < 0.05 or not data:
            return bytes(data[:at])
    return bytes(data)


def write_pictures(folder: Path) -> list[Path]:
    face = draw_face(3, 1, "digi2real", seed=0)
    grey, few = face.convert("L"), face.quantize()
    kinds = [("png", face, {}), ("png", grey, {}), ("png", grey.convert("I;16"), {}), ("png", face.convert("RGBA"), {})]
    kinds += [("png", few, {"transparency": 3}), ("gif", few, {}), ("bmp", face, {}), ("webp", face, {})]
    kinds += [("jpeg", face, {"quality": 90}), ("jpeg", face, {"progressive": True}), ("jpeg", face.convert("CMYK"), {})]
    kinds += [("tiff", face, {"compression": name}) for name in ("raw", "tiff_lzw", "jpeg", "tiff_deflate")]
    for number, (kind, picture, options) in enumerate(kinds):
        picture.save(folder / f"{number}.picture", kind, **options)
    return [*folder.glob("*.picture")]


def read_picture(path: Path) -> bool:
    try:
        image = dataio.decode_image(path.read_bytes(), 112, 4_000_000)
    except ValueError:
        return True  # it is the caller who knows the row and names it
    return image.shape == (112, 112, 3) and image.dtype == "uint8"


def read_data(path: Path) -> bool:
    dataio.read_metadata(path)
    dataio.collect_unique_identities(str(path))
    stream = dataio.ParquetImageStream(str(path), image_size=32, max_bad_fraction=1.0)
    rows = sum(len(part) for part in dataio.read_rows(stream.index))
    return sum(1 for _ in stream) == rows == len(stream)


def fuzz(read: Callable[[Path], bool], whole: list[bytes], seconds: float, seed: int, folder: Path) -> Counter:
    """Read damaged files for so long in a process that may die; a file that kills or holds it is lost, the next one goes on.

    Survived are those that read right or whose refusal names them.
    """
    counts, first, until = Counter(), 0, time.monotonic() + seconds
    path, letters = folder / "damaged", folder / "letters"  # one a file: right or wrong

    def read_on() -> None:
        logging.disable()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES + used,) * 2)
        for number in itertools.takewhile(lambda _: time.monotonic() < until, itertools.count(first)):
            signal.alarm(FILE_PATIENCE_S)  # which ends the process
            rng = random.Random(f"{seed}/{number}")
            path.write_bytes(damage(rng.choice(whole), rng))
            try:
                right, error = read(path), "what was read is not right"
            except Exception as raised:
                error = traceback.format_exc(limit=-3)
                right = isinstance(raised, ValueError | OSError) and str(path) in str(raised)
            if not right:
                print(f"file {number} of seed {seed}: {error}", file=sys.stderr)
            with open(letters, "a") as file:
                file.write("r" if right else "w")

    while time.monotonic() < until:
        letters.write_text("")
        code, found = exit_of(read_on), letters.read_text()
        counts.update(survived=found.count("r"), wrong=found.count("w"), lost=int(code != 0))
        first += len(found) + 1
        if code != 0:
            print(f"file {first - 1} of seed {seed}: the process ended with {code}", file=sys.stderr)
    return counts + Counter(injected=counts.total())


def inject(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Counter]]:
    """Each kind of fault and how often it was injected, with what came of it."""
    data, home = folder / "data", folder / "unbroken"
    data.mkdir()
    write_demo_faces(data, identities=16, images_digiface=4, images_digi2real=3, size=32, seed=1)
    whole_run(home, data)  # here, so that each fork finds the libraries warm
    if args.kills:
        yield from kill_runs(args.kills, random.Random(args.seed), data, folder).items()
    weights, sides = bits(sniperface.load_checkpoint(home / "run/checkpoints/last.pt")), {"train", "val", "test"}
    targets = {
        "picture": (read_picture, write_pictures(folder)),
        "parquet data": (read_data, [*data.glob("*.parquet"), *home.glob("splits/*/*/*.parquet")]),
        "checkpoint": (lambda path: bits(sniperface.load_checkpoint(path)) == weights, home.glob("run/checkpoints/last.pt")),
        "embeddings": (lambda path: len(dataio.read_vectors(path).vectors) > 0, home.glob("run/*/test_embeddings.parquet")),
        "split table": (lambda path: dataio.read_identity_splits(path).identities.keys() == sides, home.glob("splits/*.parquet")),
    }
    for kind, (read, paths) in targets.items() if args.fuzz_seconds else ():
        whole = [path.read_bytes() for path in paths]
        yield f"damaged {kind}", fuzz(read, whole, args.fuzz_seconds, args.seed, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--fuzz-seconds", type=float, default=60.0, help="of each kind of damaged file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of FAISS: a fork cannot use the threads that its parent has started
    torch.set_num_threads(1)
    sniperface.can_draw = lambda: False  # half the time of a run, and nothing depends on it
    logging.getLogger("sniperface").setLevel(logging.ERROR)
    common.print_head("fault", *COLUMNS, widths=WIDTHS)
    total = Counter()
    with tempfile.TemporaryDirectory(prefix="sniperface_faults_") as name:
        for kind, counts in inject(args, Path(name)):
            common.print_line(kind, *(counts[column] for column in COLUMNS), widths=WIDTHS)
            total.update(counts)
    common.print_line("all", *(total[column] for column in COLUMNS), widths=WIDTHS)
    sys.exit(bool(total["lost"] or total["wrong"]))
