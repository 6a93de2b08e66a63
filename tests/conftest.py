"""Shared by all tests: pictures that carry their number, parquet files made from rows, demo faces, a whole run of them."""

import io
import itertools
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import torch
from demo_faces import write_demo_faces
from PIL import Image
from tqdm import tqdm

import dataio
from dataio import ParquetImageStream, load_batches

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: they are too small to share among cores
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores Ctrl-C, and so would what tests start

tqdm.monitor_interval = 0  # its thread would be in the way of fork


TEXT, BINARY = pa.string(), pa.binary()
SIDE = 16  # of the numbered pictures


def encode(picture, kind: str = "png", **options) -> bytes:
    """A Pillow picture or an array [H, W] or [H, W, 3] as encoded bytes."""
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


def numbered_picture(number: int) -> bytes:
    """A plain PNG of SIDE x SIDE whose colour is its number, see `number_of`."""
    return encode(Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 77)))


def number_of(image) -> int:
    """The number of a decoded `numbered_picture`, uint8 [3, S, S]; fails for any other picture."""
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :1, :1]).all()
    assert pixels[2, 0, 0] == 77
    return int(pixels[0, 0, 0]) + 256 * int(pixels[1, 0, 0])


def numbered_rows(identities, first: int = 0) -> list[dict]:
    """One row for each identity; the pictures are numbered from `first`."""
    return [
        {"identity_id": identity, "image_filename": f"{identity}/{n}.png", "image_bytes": numbered_picture(n)}
        for n, identity in enumerate(identities, first)
    ]


def write_rows(path: Path, rows: list[dict], group: int = 10, types: dict | None = None, **options) -> Path:
    """Write rows as a parquet file with row groups of `group` rows; `types` overrides types of columns, `options` are pyarrow's."""
    wanted = {"identity_id": TEXT, "image_filename": TEXT, "image_bytes": BINARY} | (types or {})
    arrays = {}
    for name in rows[0] if rows else wanted:
        kind = wanted.get(name)
        values = [row[name] for row in rows]
        if kind is None:
            arrays[name] = pa.array(values)
        elif pa.types.is_dictionary(kind):
            arrays[name] = pa.array(values, kind.value_type).dictionary_encode()
        else:
            arrays[name] = pa.array(values, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path, row_group_size=group, **options)
    return path


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A folder with two small sources of demo faces: digiface1m_000.parquet (PNG) and digi2real_000.parquet (JPEG)."""
    folder = tmp_path_factory.mktemp("faces")
    write_demo_faces(folder, identities=40, images_digiface=6, images_digi2real=4, size=112, seed=1)
    return folder


PEOPLE = [f"{i:03d}" for i in range(60)]
BROKEN = b"\x89PNG\r\n\x1a\nthis is no picture"


@pytest.fixture
def source(tmp_path):
    """300 numbered pictures of 60 people, five each, sorted by person, in two files of row groups of ten."""
    rows = numbered_rows(np.repeat(PEOPLE, 5).tolist())
    write_rows(tmp_path / "in/part_000.parquet", rows[:170])
    write_rows(tmp_path / "in/part_001.parquet", rows[170:])
    return str(tmp_path / "in/*.parquet")


def stream_of(globs, **options):
    options = {"shuffle_buffer": 60, "image_size": SIDE, "max_bad_fraction": 0.5} | options
    return ParquetImageStream(globs, **options)


def by_steps(batch):
    return lambda step: [batch * step]


def numbers(batches) -> list[int]:
    return [number_of(image) for batch in batches for image in batch]


def drawn_numbers(stream, batch=16, start=0, stop=None, workers=2) -> list[int]:
    """The numbers of the images of steps start..stop-1; by default of one pass."""
    end = math.inf if stop else len(stream)
    stop = stop or math.ceil(len(stream) / batch)
    return numbers(load_batches([stream], lambda step: [min(batch * step, end)], start, stop, workers=workers))


def shuffled(codes, seed=0):
    return np.random.default_rng(seed).permutation(codes)


def split(ids, folder, ratio=0.75, seed=42, **more):
    return dataio.write_identity_splits(ids, folder / "splits.parquet", ratio, seed, **more)


def damage_column(path, number):
    column = pq.ParquetFile(path).metadata.row_group(0).column(number)
    start, raw = column.dictionary_page_offset or column.data_page_offset, bytearray(path.read_bytes())
    for i in range(start, start + column.total_compressed_size):
        raw[i] ^= 0x5A
    path.write_bytes(raw)


def moved_pictures(rows):
    """The same rows, each with the picture of another one of the same size."""
    return [row | {"image_bytes": other["image_bytes"]} for row, other in zip(rows, rows[::-1], strict=True)]


def broken_source(tmp_path, broken, count=200, group=10, payloads=(BROKEN, b"", None)):
    rows = numbered_rows([f"p{n // 10}" for n in range(count)])
    for n, payload in zip(broken, itertools.cycle(payloads), strict=False):
        rows[n]["image_bytes"] = payload
    return str(write_rows(tmp_path / "holey.parquet", rows, group=group))


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """The same people as in `faces`, drawn at 32 pixels."""
    folder = tmp_path_factory.mktemp("people")
    write_demo_faces(folder, identities=40, images_digiface=6, images_digi2real=4, size=32, seed=1)
    return folder


@pytest.fixture(autouse=True)
def no_hang():
    """A test that hangs fails after a minute instead."""

    def late(number, frame):
        raise AssertionError("hangs: not back after 60 s")

    usual = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


@pytest.fixture
def no_pictures(monkeypatch):
    runs.draw_no_plots(monkeypatch)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo_faces(folder, identities=16, images_digiface=4, images_digi2real=3, size=32, seed=1)
    return folder


@pytest.fixture(scope="session")
def unbroken(data, tmp_path_factory) -> Path:
    """The home of a whole run that nothing happened to."""
    home = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        runs.draw_no_plots(patch)
        runs.run_all(runs.job(home, data), home)
    return home


@pytest.fixture(scope="session")
def expected(unbroken) -> dict:
    return runs.result(unbroken / "run")


@pytest.fixture
def trained(unbroken, data, tmp_path) -> Path:
    """A copy of the unbroken run's folder; its settings still point at the unbroken run's split table."""
    shutil.copytree(unbroken / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def words(people, tmp_path, no_pictures):
    """Overrides of a small run; its split and caches are its own."""
    return runs.words_of(people, tmp_path)
