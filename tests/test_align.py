"""Where faces lie in their pictures, beside those that were trained on."""

import logging
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import encode, write_rows
from demo_faces import DEMO_FILES, DEMO_FOLDER
from PIL import Image
from runs import settings, state_of, train

import dataio
import sniperface

MOVES = [(0.08, -0.05, 1, 0), (0, 0, 1.2, 0), (0, 0, 0.8, 0), (0, 0, 1, -12), (-0.05, 0.04, 0.88, 9)]  # right, down, size, turn


def linear(size: float, turn: float) -> np.ndarray:
    cos, sin = (size * f(math.radians(turn)) for f in (math.cos, math.sin))
    return np.array([[cos, -sin], [sin, cos]])


def moved(picture: np.ndarray, right: float, down: float, size: float, turn: float) -> np.ndarray:
    """A copy of a picture [S, S, 3] that lies otherwise; black comes in from outside."""
    side, back = len(picture), np.linalg.inv(linear(size, turn))
    middle = side / 2 - back @ (side / 2 + side * np.array([right, down]))
    rows = np.column_stack([back, middle])
    return np.asarray(
        Image.fromarray(picture).transform((side, side), Image.Transform.AFFINE, rows.ravel(), Image.Resampling.BILINEAR)
    )


def off_px(found: dataio.Alignment, right: float, down: float, size: float, turn: float, side: int) -> float:
    """How far off the middles of the picture's four edges are where the alignment puts them."""
    edges, shift = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]]) * side / 2, np.array([found.shift_x - right, found.shift_y - down])
    return np.linalg.norm(edges @ (linear(found.size, found.turn) - linear(size, turn)).T + side * shift, axis=1).max()


def read_demo(name: str, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Identities [N] and pictures [N, 112, 112, 3] of a file of the demo, one in `every`."""
    table = pq.read_table(DEMO_FOLDER / name)[::every]
    pictures = [dataio.decode_image(data.as_buffer(), 112, 10**6) for data in table["image_bytes"]]
    return np.array(table["identity_id"].to_pylist(), int), np.stack(pictures)


@pytest.fixture(scope="module")
def demo():
    return {source: read_demo(name, 4) for source, name in DEMO_FILES.items()}


def mean_of(pictures) -> torch.Tensor:
    return torch.from_numpy(np.mean(pictures, axis=0, dtype=np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("move", MOVES)
def test_moved_scaled_and_turned_copies_are_found_to_a_pixel_and_brought_back(demo, move):
    pictures = demo["digiface"][1][::3]
    copies = np.stack([moved(picture, *move) for picture in pictures])
    found = dataio.find_alignment(mean_of(copies), mean_of(pictures))
    assert found.differs
    assert off_px(found, *move, side=112) < 1
    back = found.undo(torch.from_numpy(copies).permute(0, 3, 1, 2).float()).mean(0)
    assert off_px(dataio.find_alignment(back, mean_of(pictures)), 0, 0, 1, 0, side=112) < 1


def test_other_people_and_the_other_source_raise_no_alarm(demo):
    even, odd = ([pictures[who % 2 == side] for who, pictures in demo.values()] for side in (0, 1))
    for mean, other in [(even[0], odd[0]), (even[1], odd[0])]:
        assert not (found := dataio.find_alignment(mean_of(mean), mean_of(other))).differs, found
    assert not dataio.find_alignment(mean_of(even[0]), torch.rand(3, 112, 112) * 255).differs  # nothing to tell by


def test_embed_tells_moves_and_notes_where_pictures_lie_otherwise(words, people, tmp_path, caplog, monkeypatch):
    train(words, tmp_path / "run")
    table = pq.read_table(people / "digiface1m_000.parquet")
    pictures = [dataio.decode_image(data.as_buffer(), 32, 10**6) for data in table["image_bytes"]]
    rows = table.to_pylist()
    for name, copies in {"plain": pictures, "copies": [moved(picture, 0.1, 0, 1, 0) for picture in pictures]}.items():
        ready = [row | {"image_bytes": encode(copy)} for row, copy in zip(rows, copies, strict=True)]
        write_rows(tmp_path / f"{name}.parquet", ready)
    monkeypatch.setattr(sniperface, "can_draw", lambda: True)

    def embed(name: str, *more: str) -> tuple[dataio.VectorTable, str]:
        caplog.clear()
        glob = f"embed.test_glob={tmp_path}/{name}.parquet"
        sniperface.embed(settings(*words, glob, "embed.references=false", "embed.leak_check=false", *more), tmp_path / "run")
        data = dataio.read_vectors(tmp_path / f"run/embeddings/{name}.parquet")
        return data, caplog.text

    with caplog.at_level(logging.WARNING, "sniperface"):
        plain, told = embed("plain")
        assert "ALIGNMENT" not in told
        copies, told = embed("copies")
        assert "% of the side to the right" in told
        assert (tmp_path / "run/plots/copies_alignment.png").stat().st_size > 1000
        aligned, told = embed("copies", "embed.align=mean")
    assert (plain.note["aligned"], copies.note["aligned"]) == (None, None)
    assert aligned.note["aligned"]["shift_x"] == pytest.approx(0.1, abs=1 / 32)
    nearness = [np.einsum("nd,nd->n", plain.vectors, other.vectors).mean() for other in (copies, aligned)]
    assert nearness[0] < nearness[1]


def test_a_checkpoint_without_a_mean_picture_embeds_silently_and_aligns_nothing(words, tmp_path, caplog):
    train(words, tmp_path)
    state = state_of(tmp_path)
    assert state.pop("mean_picture").shape == (3, 32, 32)
    sniperface.write_checkpoint(state, tmp_path / "checkpoints/old.pt")
    sniperface.embed(settings(*words, "embed.checkpoint=old"), tmp_path)
    assert "ALIGNMENT" not in caplog.text
    with pytest.raises(ValueError, match="no mean picture of its train rows"):
        sniperface.embed(settings(*words, "embed.checkpoint=old", "embed.align=mean"), tmp_path)
