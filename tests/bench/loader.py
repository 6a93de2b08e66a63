"""From parquet to augmented views: each stage of the loader beside the usual way. About six minutes on two cores.

    uv run python tests/bench/loader.py [--rows N] [--seconds S] [--rounds R] [--only 1 3 shuffle]

| # | what | goal |
|---|---|---|
| 1 | parquet -> uint8 batches on one core, beside a bare loop of Pillow over the same bytes | at least 0.9 of it |
| 2 | the same on two cores | at least 0.95 of the bare loop's own scaling |
| 3 | parquet -> two augmented float views, beside DataLoader + PIL + torchvision's MoCo v2 recipe | 3x, from the decoded cache 5x |
| 4 | the filter with 82,500 of 110,000 identities allowed; index of 1.22 million rows | 2 % slower at most; under 200 MB |
| 5 | reading the decoded cache on one core | 20,000 images/s |
| 7 | peak memory of streaming with four threads from inputs of 1, 4 and 16 times the size | flat, under 1.5 GB |
| 14 | the rate of streaming for those inputs, and for several sizes of row groups | flat |
| shuffle | same-identity pictures among the last 32,768, beside a true shuffle of 1.22 million sorted rows | cache 1, shards 1.3 |

"Views" of ours are those of conf/augment/default.yaml, which has more operations than the usual recipe. Rates are images a second.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import (
    alternate,
    digiface_codes,
    keep_freed_memory,
    make_pictures,
    on_cores,
    peak_mb,
    print_head,
    print_row,
    read_augmentation,
    seconds_of,
    steady_rate,
    use_one_core,
    write_faces,
)
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import dataio

BATCH, QUEUE = 128, 32_768

# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------


def our_batches(source, workers: int) -> Iterator[Tensor]:
    """uint8 [BATCH, 3, 112, 112], endless."""
    return dataio.load_batches([source], lambda step: [step * BATCH], 0, 10**9, workers=workers)


def our_views(source, workers: int) -> Iterator[Tensor]:
    """The query's views, float [BATCH, 3, 112, 112]; the key's are made and dropped."""
    augment = read_augmentation()
    for step, images in enumerate(our_batches(source, workers)):
        yield dataio.two_views(images, augment, dataio.draw(0, "augment", step))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The usual way
# ---------------------------------------------------------------------------------------------------------------------


def bare_decoding(encoded: list[bytes], workers: int, decode: Callable) -> Iterator[range]:
    """A loop of `decode` over bytes in memory, on so many threads; keeps no picture."""

    def loop(part: int) -> None:
        for data in encoded[part::workers]:
            decode(data)

    with ThreadPoolExecutor(workers) as pool:
        while True:
            list(pool.map(loop, range(workers)))
            yield range(len(encoded))


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class MocoBlur:
    """The blur of MoCo v2, as in facebookresearch/moco."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class UsualDataset(Dataset):
    """Encoded pictures in memory; an item is two views, each picture by itself, by the recipe of MoCo v2."""

    def __init__(self, path: str):
        self.encoded = pq.read_table(path, columns=["image_bytes"])["image_bytes"].to_pylist()
        self.view = transforms.Compose([
            transforms.RandomResizedCrop(112, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([MocoBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = Image.open(io.BytesIO(self.encoded[i])).convert("RGB")
        return self.view(image), self.view(image)


def usual_views(dataset: UsualDataset, workers: int) -> Iterator[Tensor]:
    while True:
        for view_q, _ in DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True):
            yield view_q


def filter_by_set(path: str, allowed: set[str]) -> list[int]:
    """Numbers of the allowed rows, by a Python set, row by row."""
    column = pq.read_table(path, columns=["identity_id"])["identity_id"]
    return [row for row, name in enumerate(column.to_pylist()) if name in allowed]


def usual_cache_reading(images: np.ndarray) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        yield np.stack([images[i] for i in rng.integers(0, len(images), BATCH)])


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def measure_decoding(path: str, kind: str, args: argparse.Namespace) -> None:
    """Goals 1 and 2."""
    encoded = pq.ParquetFile(path).read_row_group(0, columns=["image_bytes"])["image_bytes"].to_pylist()[:256]

    def bare(cores: int, decode: Callable = pillow) -> Callable[[], float]:
        return lambda: on_so_many(cores, lambda: steady_rate(bare_decoding(encoded, cores, decode), args.seconds, 1))

    def checked(data: bytes) -> np.ndarray:
        return dataio.decode_image(data, 112, 10**6)

    stream = dataio.ParquetImageStream(path)
    contenders = {"bare": bare(1), "ours": open_stream(stream, 1, args), "checked": bare(1, checked)}
    if args.cores > 1:
        contenders |= {"bare 2": bare(2), "ours 2": open_stream(dataio.ParquetImageStream(path), 2, args)}
    found = alternate(contenders, args.rounds)
    print_row("1", f"{kind} parquet -> uint8 batches, 1 core", found["ours"], "Pillow alone", found["bare"], ">= 0.9")
    print_row("1", f"{kind}, of that: dataio.decode_image alone", found["checked"], "Pillow alone", found["bare"])
    if args.cores > 1:
        scaling = [[b / a for a, b in zip(found[name], found[f"{name} 2"], strict=True)] for name in ("ours", "bare")]
        print_row("2", f"{kind}, what a second core gains (times)", scaling[0], "Pillow alone", scaling[1], ">= 0.95")


def open_stream(stream: dataio.ParquetImageStream, cores: int, args: argparse.Namespace) -> Callable[[], float]:
    """Its rate in one long pass, the shuffle buffer full from the start: what is new and cold at first is soon over in training."""
    with on_cores(cores):
        batches = our_batches(stream, cores)
        steady_rate(batches, 0, warm=8192 // BATCH, close=False)
    return lambda: on_so_many(cores, lambda: steady_rate(batches, args.seconds, close=False))


def on_so_many(cores: int, measure: Callable[[], float]) -> float:
    with on_cores(cores):
        return measure()


def measure_views(path: str, cache: dataio.DecodedCache, args: argparse.Namespace) -> None:
    """Goal 3: what a step can take, so the whole of each loader on all cores."""
    stream, dataset, cores = dataio.ParquetImageStream(path), UsualDataset(path), args.cores
    workers = 0 if args.cpu_time else cores  # of the DataLoader: what other processes compute is not counted
    found = alternate({
        "usual": lambda: steady_rate(usual_views(dataset, workers), 2 * args.seconds, 2 * workers),
        "parquet": lambda: steady_rate(our_views(stream, cores), 2 * args.seconds),
        "cache": lambda: steady_rate(our_views(cache, cores), 2 * args.seconds),
    }, args.rounds)  # fmt: skip
    print_row("3", f"PNG parquet -> two views, {cores} cores", found["parquet"], "DataLoader, MoCo v2", found["usual"], ">= 3")
    print_row("3", f"decoded cache -> two views, {cores} cores", found["cache"], "the same, from PNG", found["usual"], ">= 5")


def measure_filter(path: str, codes: np.ndarray, index_path: str, args: argparse.Namespace) -> None:
    """Goal 4. Who is allowed are three quarters of 110,000 people, of whom the file with pictures holds some."""
    allowed = [str(code) for code in np.random.default_rng(1).permutation(110_000)[:82_500]]
    present = np.unique(codes)[: len(np.unique(codes)) * 3 // 4].astype(str).tolist()
    people = present + [name for name in allowed if int(name) > codes.max()][: 82_500 - len(present)]
    streams = [dataio.ParquetImageStream(path, allowed_identities=who) for who in (people, None)]
    rates = [open_stream(stream, 1, args) for stream in streams]
    found = alternate(dict(zip(("filter", "none"), rates, strict=True)), args.rounds)
    print_row(
        "4", "PNG parquet -> batches, 82,500 identities allowed, 1 core", found["filter"], "no filter", found["none"], ">= 0.98"
    )
    built = alternate({
        "ours": lambda: seconds_of(lambda: dataio.build_index(index_path, allowed)),
        "set": lambda: seconds_of(lambda: filter_by_set(index_path, set(allowed))),
    }, args.rounds)  # fmt: skip
    print_row("4", "index of 1.22 million rows (s)", built["ours"], "a set, row by row", built["set"])
    memory = run_apart("index", index_path)
    print_row("4", "index of 1.22 million rows, memory added at most (MB)", [memory["added_mb"]], "limit", [200.0], "<= 1")


def measure_cache(cache: dataio.DecodedCache, args: argparse.Namespace) -> None:
    """Goal 5, from the page cache."""
    found = alternate({
        "ours": lambda: on_so_many(1, lambda: steady_rate(our_batches(cache, 1), args.seconds)),
        "usual": lambda: on_so_many(1, lambda: steady_rate(usual_cache_reading(cache.images), args.seconds)),
    }, args.rounds)  # fmt: skip
    print_row("5", "decoded cache -> batches, 1 core", found["ours"], "np.stack of rows", found["usual"])
    print_row("5", "the same", found["ours"], "limit", [20_000.0] * args.rounds, ">= 1")


def measure_growth(folder: Path, pictures: list[bytes], args: argparse.Namespace) -> None:
    """Goals 7 and 14: a quarter of the rows, the rows, four times the rows; then row groups of several sizes."""
    sizes = {f"{times} x": write_faces(folder / f"{times}.parquet", np.arange(args.rows * times // 4) // 72, pictures)
             for times in (1, 4, 16)}  # fmt: skip
    groups = {f"groups of {n}": write_faces(folder / f"g{n}.parquet", np.arange(args.rows) // 72, pictures, n)
              for n in (100, 5000)}  # fmt: skip
    streams = {name: dataio.ParquetImageStream(path) for name, path in (sizes | groups).items()}
    rates = {n: lambda s=s: on_so_many(1, lambda: steady_rate(our_batches(s, 1), args.seconds)) for n, s in streams.items()}
    found = alternate(rates, args.rounds)
    for name in ("4 x", "16 x"):
        print_row("14", f"PNG parquet -> batches, {len(streams[name])} rows, 1 core", found[name],
                  f"{len(streams['1 x'])} rows", found["1 x"], ">= 0.95")  # fmt: skip
    for name in groups:
        print_row("14", f"the same, {args.rows} rows in {name}", found[name], "groups of 1000", found["4 x"])
    for path in sizes.values():
        memory = run_apart("stream", path, str(8 * args.seconds))
        what = f"{os.path.getsize(path) / 1e9:.2f} GB streamed, 4 threads: peak memory (MB)"
        print_row("7", what, [memory["peak_mb"]], "limit", [1500.0], "<= 1")


# ---------------------------------------------------------------------------------------------------------------------
# How good the shuffle is
# ---------------------------------------------------------------------------------------------------------------------


class CacheOrder(dataio.DecodedCache):
    """The order of a decoded cache without its pictures."""

    def __init__(self, rows: int):
        self.seed, self.images = 0, range(rows)


def codes_of(paths: list[str]) -> np.ndarray:
    """The identity of each row, in the order of the files, as an integer [N]."""
    column = pq.read_table(paths, columns=["identity_id"])["identity_id"].combine_chunks().dictionary_encode()
    return column.indices.to_numpy()


def measure_shuffle(index_path: str, folder: Path, rounds: int = 5) -> None:
    """Orders of several seeds beside a true shuffle each; a row of tiny pictures counts as one of 20 kB."""
    dataio.SHARD_BYTES = dataio.SHARD_BYTES // 20_000 * 20  # as many rows a shard as with real pictures
    table = folder / "splits.parquet"
    dataio.write_identity_splits(dataio.collect_unique_identities(index_path), table, 0.999, seed=0)
    shards = list(map(str, dataio.materialize_split(index_path, table, folder / "train", "train")))
    sources = {"plain stream": [index_path], f"materialised, {len(shards)} shards": shards, "decoded cache": [index_path]}
    for name, paths in sources.items():
        codes, plain = codes_of(paths), dataio.ParquetImageStream(paths)
        order = CacheOrder(len(codes)).order if name == "decoded cache" else plain.order
        found = [dataio.repeats_in_queue(codes[order(n)], QUEUE) for n in range(rounds)]
        ideal = [dataio.repeats_in_queue(np.random.default_rng(n).permutation(codes), QUEUE) for n in range(rounds)]
        goal = {"plain stream": "", "decoded cache": "<= 1.02"}.get(name, "<= 1.3")
        print_row("", f"same person in the queue, {name} (pictures)", found, "a true shuffle", ideal, goal)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, in processes of their own
# ---------------------------------------------------------------------------------------------------------------------


def run_apart(what: str, *words: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--apart", what, *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def apart(what: str, path: str, seconds: str = "0") -> None:
    """In the other process: do it and print the peak."""
    before = peak_mb()
    if what == "index":
        dataio.build_index(path, map(str, range(82_500)))
    else:
        steady_rate(our_batches(dataio.ParquetImageStream(path), 4), float(seconds))
    print(json.dumps({"peak_mb": peak_mb(), "added_mb": peak_mb() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the main file, of 20 kB each")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="parts to measure: 1 3 4 5 14 shuffle")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, on one core: for a busy machine")
    parser.add_argument("--apart", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.apart:
        return apart(*args.apart)
    args.cores = 1 if args.cpu_time else os.cpu_count() or 1
    if args.cpu_time:
        use_one_core()
    keep_freed_memory(True)  # as sniperface does
    print_head()

    def wanted(part: str) -> bool:
        return not args.only or part in args.only

    with tempfile.TemporaryDirectory(prefix="sniperface_bench_") as name:
        folder, png, jpeg = Path(name), make_pictures("png"), make_pictures("jpeg")
        codes = np.arange(args.rows) // 72
        faces = write_faces(folder / "faces.parquet", codes, png)
        if wanted("1"):
            measure_decoding(faces, "PNG", args)
            measure_decoding(write_faces(folder / "jpeg.parquet", codes, jpeg), "JPEG", args)
        if wanted("3") or wanted("5"):
            cache = dataio.DecodedCache(dataio.ParquetImageStream(faces), folder / "cache")
        if wanted("3"):
            measure_views(faces, cache, args)
        if wanted("4") or wanted("shuffle"):
            tiny = write_faces(folder / "tiny.parquet", digiface_codes(), [bytes(16)])
        if wanted("4"):
            measure_filter(faces, codes, tiny, args)
        if wanted("5"):
            measure_cache(cache, args)
        if wanted("14"):
            measure_growth(folder / "growth", png, args)
        if wanted("shuffle"):
            measure_shuffle(tiny, folder)


if __name__ == "__main__":
    main()
