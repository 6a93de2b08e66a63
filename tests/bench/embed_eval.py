"""embed, eval and split beside the bare work in them. About three minutes on two cores.

    uv run python tests/bench/embed_eval.py [--probes 300000 --templates 27500] [--rows N] [--only 11 12 13 whole]

Row 11: embed, parquet -> vectors in a file, beside the forward pass alone at the same batch size. Row 12: the search of eval beside
FAISS's own; with --only whole the command itself on files of vectors, with the references. Row 13: the split table and the shards
of both sides. The default sizes of 12 are small; the arguments give the real ones. Rates are images a second (11) or MB a second
(13), eval is in seconds.
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import compare, peak_mb, rate_of, seconds_of
from runs import settings

import dataio
import moco
import sniperface


def made_vectors(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Five enrolled unit vectors for each template, then the probes, with their identities; a probe is near its people."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal((args.templates, 512), np.float32)
    identity = np.concatenate([np.repeat(np.arange(args.templates), 5), np.arange(args.probes) % args.templates])
    vectors = rng.standard_normal((len(identity), 512), np.float32)
    for row, person in zip(vectors, identity, strict=True):
        row += people[person] / 2
    faiss.normalize_L2(vectors)
    return vectors, identity


def measure_eval(args: argparse.Namespace, folder: Path) -> None:
    """Goal 12. FAISS searches the same centroids for the same 21 nearest, in one call."""
    (vectors, identity), enrolled, last = made_vectors(args), 5 * args.templates, moco.CMC_RANKS[-1]
    gallery = moco.build_gallery(vectors[:enrolled], identity[:enrolled], "centroid")
    asked = vectors, np.arange(enrolled, len(vectors)), gallery.index(identity[enrolled:]), gallery
    index = faiss.IndexFlatIP(512)
    index.add(gallery.vectors)
    faiss.omp_set_num_threads(torch.get_num_threads())  # as many for both
    alone = partial(seconds_of, lambda: index.search(vectors[enrolled:], last + 1))
    ranks = partial(seconds_of, lambda: moco.search(*asked, last))
    counted = partial(seconds_of, lambda: (moco.search(*asked, last), moco.count_pairs(*asked, moco.pick_device("auto"))))
    what = f"{args.probes} probes x {args.templates} (s)"
    compare(
        args.rounds,
        ("12", f"ranks, neighbours, impostor counts: {what}", counted, "FAISS's search alone", alone, "<= 2.5"),
        ("12", "of that: ranks and neighbours", ranks, "FAISS's search alone", alone, ""),
    )
    compare(1, ("12", "peak memory of this process until here (MB)", peak_mb, "limit", 3000.0, "<= 1"))


def run_eval(folder: Path, overrides: list[str]) -> None:
    """command=eval, all else as in conf/config.yaml."""
    cfg = settings("eval.embeddings=test_embeddings.parquet", f"split.out_dir={folder}/splits", *overrides)
    sniperface.evaluate(cfg, folder)


def measure_whole_eval(args: argparse.Namespace, folder: Path) -> None:
    """command=eval in a process of its own, on files as embed writes them; pictures are named by their row."""
    (vectors, identity), rows = made_vectors(args), np.arange(5 * args.templates + args.probes)
    names = pa.table({"identity_id": identity.astype(str), "image_filename": rows.astype(str), "image_hash": rows})
    for name in ("", ".untrained", ".lbp", ".pca"):
        writer = dataio.VectorWriter(folder / f"test_embeddings{name}.parquet", {})
        for first in range(0, len(rows), args.batch):
            part = np.ascontiguousarray(vectors[first : first + args.batch])
            faiss.normalize_L2(part)
            writer.add(names.slice(first, args.batch), "file", part)
        writer.close({})
    seconds, peak, _ = common.in_own_process(run_eval, folder, args.eval)
    what = f"command=eval {' '.join(args.eval)}, {args.probes} probes x {args.templates}: {seconds:.0f} s, peak memory (MB)"
    compare(1, ("12", what, lambda: peak, "limit", 3000.0, "<= 1"))


def measure_embedding(name: str, rows: int, args: argparse.Namespace, folder: Path) -> None:
    """Goal 11: the same rows through the loop of the command, from open files on, and batches through the encoder alone."""
    index, device = dataio.build_index(common.write_faces(folder, rows), None), moco.pick_device("auto")
    sniperface.configure_process(device, deterministic=True, tf32=False)
    cfg = settings(f"backbone={name}", f"data.workers={args.cores}")
    encoder = moco.freeze(moco.build_backbone(cfg.backbone), device, flip=False)
    pictures = torch.randint(0, 256, (args.batch, 112, 112, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return encoder(dataio.to_float(images.to(device)))

    def write_vectors() -> int:
        with dataio.write_whole(folder / "vectors.parquet") as temporary:
            writer = dataio.VectorWriter(temporary, {})
            for table, images in dataio.decoded_rows(index, cfg.data, args.batch):
                writer.add(table, "digiface", encode(images).numpy())
            writer.close({})
        return writer.rows

    ours, forward = partial(rate_of, write_vectors, 0, warm=0), partial(rate_of, lambda: len(encode(pictures)), 1.0)
    what = f"{name}, batch {args.batch}: embed, {rows} PNG"
    compare(args.rounds, ("11", what, ours, "forward alone", forward, ">= 0.9"))


def measure_embeddings(args: argparse.Namespace, folder: Path) -> None:
    for name, rows in {"tiny": 1024, "iresnet50": 256}.items():
        measure_embedding(name, args.embed or (20_480 if common.ON_GPU else rows), args, folder)


def make_table(faces: str, out: Path) -> Path:
    dataio.write_identity_splits(dataio.collect_unique_identities(faces), out, 0.75, seed=42)
    return out


def copy_to_disk(source: str, folder: Path) -> None:
    """Copy through a process's memory, as any program that changes the order must, and wait for the disk."""
    folder.mkdir()
    subprocess.run(["dd", f"if={source}", f"of={folder}/copy.parquet", "bs=1M", "conv=fsync", "status=none"], check=True)


def disk_rate(write: Callable[[Path], object], folder: Path) -> float:
    """MB a second that `write` writes into a new folder, by the clock, whatever --cpu-time says."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    write(folder)
    passed = time.perf_counter() - start
    return sum(path.stat().st_size for path in folder.glob("*.parquet")) / 1e6 / passed


def measure_split(args: argparse.Namespace, folder: Path) -> None:
    """Goal 13. The file with pictures is as large as --rows says; the table's has 1.6 million rows of tiny ones."""
    tiny, faces = common.write_digiface(folder, 1.6 / 1.22), common.write_faces(folder, args.rows)
    ours = partial(seconds_of, lambda: make_table(tiny, folder / "tiny_table.parquet"))
    column = partial(seconds_of, lambda: pq.read_table(tiny, columns=["identity_id"]))
    compare(args.rounds, ("13", "split table of 1.6 million rows (s)", ours, "reading the column", column, ""))
    table = make_table(faces, folder / "table.parquet")
    copy = partial(disk_rate, lambda out: copy_to_disk(faces, out), folder / "copy")
    train = partial(disk_rate, lambda out: dataio.materialize_split(faces, table, out, "train"), folder / "train")
    test = partial(disk_rate, lambda out: dataio.materialize_split(faces, table, out, "test"), folder / "test")
    compare(
        args.rounds,
        ("13", "train shards of these rows, written twice (MB/s)", train, "copy, with fsync", copy, ">= 0.25"),
        ("13", "test shards of these rows (MB/s)", test, "copy, with fsync", copy, ">= 0.25"),
    )


if __name__ == "__main__":
    parser = common.make_parser(__doc__)
    parser.add_argument("--probes", type=int, default=20_000)
    parser.add_argument("--templates", type=int, default=5_000)
    parser.add_argument("--rows", type=int, default=80_000, help="pictures to materialise")
    parser.add_argument("--embed", type=int, help="pictures to embed; by default so many that a round takes seconds")
    parser.add_argument("--batch", type=int, default=256 if common.ON_GPU else 64, help="of embed")
    parser.add_argument("--eval", nargs="*", default=[], help="settings of the whole command, such as eval.repeats=1")
    parts = {"12": measure_eval, "whole": measure_whole_eval, "11": measure_embeddings, "13": measure_split}
    common.measure(parser, parts, "whole")
