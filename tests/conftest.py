"""Shared by all tests: pictures that carry their number, parquet files made from rows, a folder of demo faces."""

import io
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dataio

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: they are too small to share among cores
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores Ctrl-C, and so would what tests start

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


def without_hanging(function, limit_s: float = 60.0):
    """Run `function` in a thread and give what it gives or raises; fail if it does not come back."""
    result: dict = {}

    def run():
        try:
            result["value"] = function()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        pytest.fail(f"hangs: not back after {limit_s} s")
    if "error" in result:
        raise result["error"]
    return result["value"]


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A folder with two small sources of demo faces: digiface1m_000.parquet (PNG) and digi2real_000.parquet (JPEG)."""
    folder = tmp_path_factory.mktemp("faces")
    dataio.write_demo_faces(folder, identities=40, images_digiface=6, images_digi2real=4, size=112, seed=1)
    return folder
