"""embed, eval and split beside the bare work in them. About three minutes on two cores.

    uv run python tests/bench/embed_eval.py [--probes 300000 --templates 27500] [--rows N] [--only 11 12 13 whole]

| # | what | goal |
|---|---|---|
| 11 | embed: parquet -> vectors in a file, beside the forward pass alone at the same batch size | at least 0.9 of it |
| 12 | eval: search, comparison of all pairs and rates, beside FAISS's search alone | at most 1.2 times it; under 3 GB |
|    | the command itself on files of vectors, with both references: seconds and peak memory (only with --only whole) | 3 GB |
| 13 | split table of 1.6 million rows, beside reading the identity column alone | stated |
|    | materialising train (written twice) and test shards, beside copying the same bytes to the disk | 0.35 and 0.7 of it |

The usual way to embed: a loop with no_grad over a DataLoader in NCHW. The default sizes of 12 are small; the arguments give the
real ones. Rates are images a second (11) or MB a second (13), eval is in seconds.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from common import (
    ROOT,
    alternate,
    digiface_codes,
    keep_freed_memory,
    make_pictures,
    peak_mb,
    print_head,
    print_row,
    seconds_of,
    use_one_core,
    write_faces,
)  # fmt: skip
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

import dataio
import moco
import sniperface


def settings(*overrides: str) -> sniperface.Config:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return sniperface.load_config(compose("config", list(overrides)))


# ---------------------------------------------------------------------------------------------------------------------
# eval
# ---------------------------------------------------------------------------------------------------------------------


def made_vectors(templates: int, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Five enrolled unit vectors for each template, then the probes, with their identities; a probe is near its people."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal((templates, 512), np.float32)
    identity = np.concatenate([np.repeat(np.arange(templates), 5), np.arange(probes) % templates])
    vectors = np.empty((len(identity), 512), np.float32)
    for start in range(0, len(identity), 50_000):
        here = identity[start : start + 50_000]
        part = people[here] + 2 * rng.standard_normal((len(here), 512), np.float32)
        vectors[start : start + len(here)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return vectors, identity


def our_eval(vectors: np.ndarray, identity: np.ndarray, enrolled: int, cfg: sniperface.EvalConfig) -> dict[str, moco.Rate]:
    """What sniperface.measure computes."""
    gallery = moco.build_gallery(vectors[:enrolled], identity[:enrolled], cfg.template)
    probes, people = vectors[enrolled:], identity[enrolled:]
    found = moco.search(probes, gallery.index(people), gallery, count=True)
    columns, _ = moco.verification(found.genuine, found.impostors, cfg.fars)
    columns |= moco.closed_set(found.rank) | {"mrr": 1 / found.rank}
    return moco.rates(columns, people, cfg.seed, cfg.bootstrap)


def measure_eval(args: argparse.Namespace) -> None:
    """Goal 12. FAISS searches the same centroids for the same 21 nearest, in one call."""
    cfg, enrolled = settings().eval, 5 * args.templates
    vectors, identity = made_vectors(args.templates, args.probes)
    gallery = moco.build_gallery(vectors[:enrolled], identity[:enrolled], "centroid")
    index = faiss.IndexFlatIP(512)
    index.add(gallery.vectors)
    probes, own = vectors[enrolled:], gallery.index(identity[enrolled:])
    found = alternate({
        "ours": lambda: seconds_of(lambda: our_eval(vectors, identity, enrolled, cfg)),
        "faiss": lambda: seconds_of(lambda: index.search(probes, 21)),
        "search": lambda: seconds_of(lambda: moco.search(probes, own, gallery)),
        "counted": lambda: seconds_of(lambda: moco.search(probes, own, gallery, count=True)),
    }, args.rounds)  # fmt: skip
    what = f"{args.probes} probes x {args.templates} centroids (s)"
    print_row("12", f"eval of {what}", found["ours"], "FAISS's search alone", found["faiss"], "<= 1.2")
    print_row("12", "moco.search: ranks and neighbours", found["search"], "FAISS's search alone", found["faiss"])
    print_row("12", "of that eval: search that counts all pairs", found["counted"], "FAISS's search alone", found["faiss"])
    print_row("12", "peak memory of this process until here (MB)", [peak_mb()], "limit", [3000.0], "<= 1")


def write_vectors(path: Path, vectors: np.ndarray, identity: np.ndarray) -> None:
    """An embeddings file as embed writes it; pictures are named by their row."""
    schema, note = (
        None,
        {"table": "bench", "split": None, "data": ["bench"], "flip": False, "trained_on": 0, "checkpoint": path.name},
    )
    with contextlib.ExitStack() as stack:
        for start in range(0, len(vectors), dataio.CACHE_CHUNK):
            here = identity[start : start + dataio.CACHE_CHUNK]
            names = {"identity_id": here.astype(str), "image_filename": np.arange(start, start + len(here)).astype(str)}
            rows = sniperface.embedding_table(pa.table(names), "file", vectors[start : start + len(here)])
            if schema is None:
                schema = dataio.with_metadata(rows.schema, note)
                writer = stack.enter_context(pq.ParquetWriter(path, schema, compression="none", write_page_checksum=True))
            writer.write_table(rows)


def measure_whole_eval(args: argparse.Namespace, folder: Path) -> None:
    """command=eval in a process of its own, all else as in conf/config.yaml; `args.eval` adds settings."""
    vectors, identity = made_vectors(args.templates, args.probes)
    for name, width in (("", 512), (".untrained", 512), (".pca", 128)):
        part = vectors[:, :width]
        write_vectors(folder / f"test_embeddings{name}.parquet", part / np.linalg.norm(part, axis=1, keepdims=True), identity)
    del vectors
    command = [sys.executable, __file__, "--apart", str(folder), "--eval", *args.eval]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    what = f"command=eval {' '.join(args.eval)}, {args.probes} probes x {args.templates} templates"
    print_row("12", f"{what} (s)", [told["seconds"]], "", [told["seconds"]])
    print_row("12", f"{what}: peak memory (MB)", [told["peak_mb"]], "limit", [3000.0], "<= 1")


def apart(folder: Path, overrides: list[str]) -> None:
    """In the other process: evaluate and print what it took."""
    cfg = settings("eval.embeddings=test_embeddings.parquet", f"split.out_dir={folder}/splits", *overrides)
    seconds = seconds_of(lambda: sniperface.evaluate(cfg, folder))
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))


# ---------------------------------------------------------------------------------------------------------------------
# embed
# ---------------------------------------------------------------------------------------------------------------------


class UsualDataset(Dataset):
    """Encoded pictures in memory, decoded one at a time."""

    def __init__(self, path: str):
        self.encoded = pq.read_table(path, columns=["image_bytes"])["image_bytes"].to_pylist()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> Tensor:
        return to_tensor(Image.open(io.BytesIO(self.encoded[i])).convert("RGB")) * 2 - 1


@torch.no_grad()
def usual_embedding(dataset: UsualDataset, backbone: torch.nn.Module, device: torch.device, batch: int, workers: int) -> Tensor:
    return torch.cat([F.normalize(backbone(x.to(device))).cpu() for x in DataLoader(dataset, batch, num_workers=workers)])


def measure_embedding(name: str, rows: int, args: argparse.Namespace, folder: Path) -> None:
    """Goal 11: the same rows through the command's own function, through the encoder alone, and the usual way."""
    cfg = settings(f"backbone={name}", f"embed.batch_size={args.batch}")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=1)) if args.cpu_time else cfg
    device = sniperface.pick_device("auto")
    path = write_faces(folder / f"{name}.parquet", np.arange(rows) // 72, make_pictures("png"))
    index, dataset = dataio.build_index(path, None), UsualDataset(path)
    usual = moco.build_backbone(cfg.backbone).to(device).eval()
    encode = sniperface.backbone_encoder(moco.build_backbone(cfg.backbone), device, flip=False)
    images = torch.randint(0, 256, (args.batch, 112, 112, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    out, source = folder / "vectors.parquet", {"digiface": (index, dataio.COLUMNS)}
    workers = 0 if args.cpu_time else os.cpu_count() or 1
    batches = -(-rows // args.batch)
    encode(images)
    found = alternate({
        "ours": lambda: rows / seconds_of(lambda: sniperface.write_embeddings({out: encode}, source, cfg, {out: {}}, None)),
        "forward": lambda: batches * args.batch / seconds_of(lambda: [encode(images) for _ in range(batches)]),
        "usual": lambda: rows / seconds_of(lambda: usual_embedding(dataset, usual, device, args.batch, workers)),
    }, args.rounds)  # fmt: skip
    what = f"{name}, batch {args.batch}: embed, {rows} PNG"
    print_row("11", what, found["ours"], "forward alone", found["forward"], ">= 0.9")
    print_row("11", what, found["ours"], "a loop with no_grad", found["usual"])


# ---------------------------------------------------------------------------------------------------------------------
# split
# ---------------------------------------------------------------------------------------------------------------------


def make_table(path: str, out: Path) -> dataio.Splits:
    return dataio.write_identity_splits(dataio.collect_unique_identities(path), out, 0.75, seed=42)


def copy_to_disk(source: str, target: Path) -> None:
    """Copy through this process, as any program that changes the order must, and wait for the disk."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        os.fsync(writing.fileno())


def measure_split(args: argparse.Namespace, folder: Path) -> None:
    """Goal 13, with the disk by the clock, whatever --cpu-time says.

    The file with pictures is as large as --rows says; the table's has 1.6 million rows of tiny ones.
    """
    tiny = write_faces(folder / "tiny.parquet", digiface_codes(1.6 / 1.22), [bytes(16)])
    tables = alternate({
        "ours": lambda: seconds_of(lambda: make_table(tiny, folder / "tiny_table.parquet")),
        "column": lambda: seconds_of(lambda: pq.read_table(tiny, columns=["identity_id"])),
        "strings": lambda: seconds_of(lambda: set(pq.read_table(tiny, columns=["identity_id"])["identity_id"].to_pylist())),
    }, args.rounds)  # fmt: skip
    print_row("13", "split table of 1.6 million rows (s)", tables["ours"], "reading the column", tables["column"])
    print_row("13", "split table of 1.6 million rows (s)", tables["ours"], "a Python set of its values", tables["strings"])
    faces = write_faces(folder / "faces.parquet", np.arange(args.rows) // 72, make_pictures("png"))
    make_table(faces, folder / "table.parquet")

    def copied() -> float:
        start = time.perf_counter()
        copy_to_disk(faces, folder / "copy")
        return os.path.getsize(faces) / 1e6 / (time.perf_counter() - start)

    def materialised(side: str) -> Callable[[], float]:
        def measure() -> float:
            shutil.rmtree(folder / side, ignore_errors=True)
            start = time.perf_counter()
            shards = dataio.materialize_split(faces, folder / "table.parquet", folder / side, side)
            return sum(shard.stat().st_size for shard in shards) / 1e6 / (time.perf_counter() - start)

        return measure

    found = alternate({"copy": copied, "train": materialised("train"), "test": materialised("test")}, args.rounds)
    print_row(
        "13", "train shards of these rows, written twice (MB/s)", found["train"], "copy, with fsync", found["copy"], ">= 0.35"
    )
    print_row("13", "test shards of these rows (MB/s)", found["test"], "copy, with fsync", found["copy"], ">= 0.7")


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=20_000)
    parser.add_argument("--templates", type=int, default=5_000)
    parser.add_argument("--rows", type=int, default=80_000, help="pictures to materialise")
    parser.add_argument("--embed", type=int, help="pictures to embed; by default so many that a round takes seconds")
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 64, help="of embed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="parts to measure: 11 12 13 whole")
    parser.add_argument("--eval", nargs="*", default=[], help="settings of the whole command, such as eval.repeats=1")
    parser.add_argument("--apart", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, on one core: for a busy machine")
    args = parser.parse_args()
    if args.apart:
        return apart(args.apart, args.eval)
    if args.cpu_time:
        use_one_core()
        faiss.omp_set_num_threads(1)
    keep_freed_memory(True)  # as sniperface does
    print_head()

    def wanted(part: str) -> bool:
        return not args.only or part in args.only

    with tempfile.TemporaryDirectory(prefix="sniperface_bench_") as folder:
        if wanted("12"):
            measure_eval(args)
        if args.only and "whole" in args.only:
            measure_whole_eval(args, Path(folder))
        if wanted("11"):
            for name, rows in {"tiny": 1024, "iresnet50": 256}.items():
                measure_embedding(name, args.embed or (20_480 if on_gpu else rows), args, Path(folder))
        if wanted("13"):
            measure_split(args, Path(folder))


if __name__ == "__main__":
    main()
