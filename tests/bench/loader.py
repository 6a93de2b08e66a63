"""From parquet to augmented views: each stage of the loader beside the usual way. About six minutes on two cores.

    uv run python tests/bench/loader.py [--rows N] [--seconds S] [--rounds R] [--only 1 3 shuffle]

Rows 1 and 2: parquet -> uint8 batches, on one core and on two, beside a bare loop of Pillow on as many. Row 3: two
augmented views beside DataLoader, PIL and torchvision's MoCo v2 recipe. Row 4: the filter by identity and its index. Row 5: the
decoded cache. Rows 7 and 14 (--only 14): memory and rate for inputs of 1, 4 and 16 times the size. shuffle: pictures of one
person among the last 32,768, beside a true shuffle of 1.22 million sorted rows.

"Views" of ours are those of conf/augment/default.yaml, which has more operations than the usual recipe. Rates are images a second.
"""

import argparse
import io
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import common
import numpy as np
import pyarrow.parquet as pq
import torch
from common import compare, make_pictures, write_faces
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

import dataio

BATCH, QUEUE = 128, 32_768


def our_batches(source, workers: int) -> Iterator[Tensor]:
    """uint8 [BATCH, 3, 112, 112], endless."""
    return dataio.load_batches([source], lambda step: [step * BATCH], 0, 10**9, workers=workers)


def our_views(source, workers: int) -> Iterator[Tensor]:
    """The query's views, float [BATCH, 3, 112, 112]; the key's are made and dropped."""
    augment = common.read_augmentation()
    for step, images in enumerate(our_batches(source, workers)):
        yield dataio.two_views(images, augment, dataio.draw(0, "augment", step))[0]


def bare_decoding(encoded: list[bytes], threads: int) -> Iterator[list[bytes]]:
    """A loop of Pillow over bytes in memory, on so many threads; keeps no picture."""

    def decode(part: list[bytes]) -> None:
        for data in part:
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    with ThreadPoolExecutor(threads) as pool:
        while True:
            list(pool.map(decode, [encoded[i::threads] for i in range(threads)]))
            yield encoded


def usual_views(path: str, workers: int) -> Iterator[Tensor]:
    """A DataLoader over encoded pictures in memory; each is decoded and transformed by itself, by MoCo v2's recipe."""
    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    view = transforms.Compose([
        transforms.RandomResizedCrop(112, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([blur], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip

    def two_views(encoded: list[bytes]) -> tuple[Tensor, Tensor]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
        return torch.stack([view(image) for image in images]), torch.stack([view(image) for image in images])

    pictures = pq.read_table(path, columns=["image_bytes"])["image_bytes"].to_pylist()
    loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=workers, drop_last=True, collate_fn=two_views)
    while True:
        yield from (view_q for view_q, _ in loader)


def turn(batches: Iterator, seconds: float, cores: int = 1, warm: int = 6) -> Callable[[], float]:
    """Measures the rate of one long pass, which goes on from call to call, once its queues have filled again."""
    return partial(common.rate_of, lambda: len(next(batches)), seconds, warm, cores)


def measure_decoding(args: argparse.Namespace, folder: Path) -> None:
    """Goals 1 and 2."""
    for kind in ("png", "jpeg"):
        path, encoded = write_faces(folder, args.rows, kind), make_pictures(kind)
        for cores, goal in ((1, ">= 0.9"), (2, ">= 0.86"))[: args.cores]:
            ours = turn(our_batches(dataio.ParquetImageStream(path), cores), args.seconds, cores)
            bare = turn(bare_decoding(encoded, cores), args.seconds, cores, warm=1)
            what = f"{kind.upper()} parquet -> uint8 batches, {cores} core(s)"
            compare(args.rounds, (str(cores), what, ours, "Pillow alone", bare, goal))


def measure_views(args: argparse.Namespace, folder: Path) -> None:
    """Goal 3: what a step can take, so the whole of each loader on all cores."""
    path, cores, seconds = write_faces(folder, args.rows), args.cores, 2 * args.seconds
    workers = 0 if args.cpu_time else cores  # of the DataLoader: what other processes compute is not counted
    usual = turn(usual_views(path, workers), seconds, cores, 2 * workers)
    parquet = turn(our_views(dataio.ParquetImageStream(path), cores), seconds, cores)
    cache = turn(our_views(dataio.DecodedCache(dataio.ParquetImageStream(path), folder), cores), seconds, cores)
    compare(
        args.rounds,
        ("3", f"PNG parquet -> two views, {cores} cores", parquet, "DataLoader, MoCo v2", usual, ">= 2.3"),
        ("3", f"decoded cache -> two views, {cores} cores", cache, "the same, from PNG", usual, ">= 4"),
    )


def measure_filter(args: argparse.Namespace, folder: Path) -> None:
    """Goal 4: three quarters of 110,000 people are allowed, of whom the file with pictures holds the first few hundred."""
    path, index_path = write_faces(folder, args.rows), common.write_digiface(folder)
    allowed = [str(code) for code in range(110_000) if code % 4]
    kept = turn(our_batches(dataio.ParquetImageStream(path, allowed_identities=allowed), 1), args.seconds)
    whole = turn(our_batches(dataio.ParquetImageStream(path), 1), args.seconds)
    seconds, _, added = common.in_own_process(dataio.build_index, index_path, allowed)
    what = "PNG parquet -> batches, 82,500 identities allowed, 1 core"
    compare(args.rounds, ("4", what, kept, "no filter", whole, ">= 0.98"))
    what = f"index of 1.22 million rows in {seconds:.2f} s: memory added (MB)"
    compare(1, ("4", what, lambda: added, "limit", 200.0, "<= 1"))


def measure_cache(args: argparse.Namespace, folder: Path) -> None:
    """Goal 5, from the page cache."""
    cache = dataio.DecodedCache(dataio.ParquetImageStream(write_faces(folder, args.rows)), folder)
    ours = turn(our_batches(cache, 1), args.seconds)
    compare(args.rounds, ("5", "decoded cache -> batches, 1 core", ours, "limit", 20_000.0, ">= 1"))


def stream(path: str, seconds: float) -> None:
    turn(our_batches(dataio.ParquetImageStream(path), 4), seconds, 4)()


def measure_growth(args: argparse.Namespace, folder: Path) -> None:
    """Goals 7 and 14: a quarter of the rows, the rows, four times the rows; then row groups of several sizes."""
    shapes = [(args.rows // 4, 1000), (args.rows, 1000), (args.rows * 4, 1000), (args.rows, 100), (args.rows, 5000)]
    paths = {f"{rows} rows in groups of {group}": write_faces(folder, rows, group=group) for rows, group in shapes}
    rates = {name: turn(our_batches(dataio.ParquetImageStream(path), 1), args.seconds) for name, path in paths.items()}
    (first, beside), *others = rates.items()
    compare(args.rounds, *[("14", f"PNG -> batches, 1 core, {name}", rate, first, beside, ">= 0.95") for name, rate in others])
    for path in [*paths.values()][:3]:
        what = f"{Path(path).stat().st_size / 1e9:.2f} GB streamed, 4 threads: peak memory (MB)"
        _, peak, _ = common.in_own_process(stream, path, 8 * args.seconds)
        compare(1, ("7", what, lambda peak=peak: peak, "limit", 1500.0, "<= 1"))


def measure_shuffle(args: argparse.Namespace, folder: Path) -> None:
    """How good it is, for several seeds; a row of tiny pictures counts as one of 20 kB."""
    dataio.SHARD_BYTES = dataio.SHARD_BYTES // 20_000 * 20  # as many rows a shard as with real pictures
    faces, table = common.write_digiface(folder), folder / "splits.parquet"
    dataio.write_identity_splits(dataio.collect_unique_identities(faces), table, 0.999, seed=0)
    shards = list(map(str, dataio.materialize_split(faces, table, folder / "train", "train")))
    for name, paths, goal in (("plain stream", faces, ""), (f"{len(shards)} materialised shards", shards, "<= 1.3")):
        qualities = (dataio.shuffle_quality(dataio.ParquetImageStream(paths, seed=n), QUEUE) for n in range(args.rounds))
        compare(args.rounds, ("", f"same person in the queue, {name}", partial(next, qualities), "a true shuffle", 1.0, goal))


if __name__ == "__main__":
    parser = common.make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the main file, of 20 kB each")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement")
    parts = {"1": measure_decoding, "3": measure_views, "4": measure_filter, "5": measure_cache, "14": measure_growth}
    common.measure(parser, parts | {"shuffle": measure_shuffle})
