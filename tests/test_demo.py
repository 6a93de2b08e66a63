"""The demo's faces: how they are drawn, and that the files in conf/demo hold what is drawn."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_faces import DEMO_FILES, DEMO_FOLDER, draw_face, write_demo_faces, write_faces
from PIL import Image

FIRST, SECOND = DEMO_FILES["digiface"], DEMO_FILES["digi2real"]
LARGEST_LOSS = 6  # mean absolute difference per pixel of 0..255 that the lossy encoding may cost; the worst picture has 4.1


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def drawn(identity: int, variation: int, style: str, seed: int = 0, size: int = 112) -> np.ndarray:
    return np.asarray(draw_face(identity, variation, style, seed, size))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference per pixel and channel, in levels of 0..255."""
    return float(np.abs(one.astype(int) - other).mean())


def committed(name: str) -> pa.Table:
    return pq.read_table(DEMO_FOLDER / name, page_checksum_verification=True)


def test_a_face_is_a_function_of_its_arguments():
    one = drawn(7, 2, "digiface", seed=3, size=48)
    assert one.shape == (48, 48, 3)
    assert (one == drawn(7, 2, "digiface", seed=3, size=48)).all()
    for other in ((8, 2, "digiface", 3), (7, 3, "digiface", 3), (7, 2, "digi2real", 3), (7, 2, "digiface", 4)):
        assert difference(one, drawn(*other, size=48)) > 2


def test_a_person_is_the_same_in_both_styles_and_in_every_picture(faces):
    tables = [pq.read_table(faces / name) for name in (FIRST, SECOND)]
    rows, first = pa.concat_tables(tables).to_pylist(), tables[0].num_rows
    images = np.stack([np.asarray(Image.fromarray(pixels_of(row["image_bytes"])).resize((16, 16))) for row in rows])
    images = images.reshape(len(rows), -1).astype(np.float32)
    images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)
    people, similar = np.array([row["identity_id"] for row in rows]), images @ images.T / images.shape[1]
    genuine = (people[:, None] == people[None]) & ~np.eye(len(rows), dtype=bool)
    across = genuine.copy()
    across[:first, :first] = across[first:, first:] = False
    impostor = people[:, None] != people[None]
    assert similar[genuine].mean() > similar[impostor].mean() + 0.1
    assert similar[across].mean() > similar[impostor].mean() + 0.05


def test_small_sources_hold_the_people_that_are_documented(faces):
    a, b = (pq.read_table(faces / name) for name in (FIRST, SECOND))
    assert Counter(a["identity_id"].to_pylist()) == {str(i): 6 for i in range(36)}
    assert Counter(b["identity_id"].to_pylist()) == {str(i): 4 for i in range(18, 40)}
    assert a["image_filename"].to_pylist()[:7] == ["0/0.png", "0/1.png", "0/2.png", "0/3.png", "0/4.png", "0/5.png", "1/0.png"]
    assert b["image_filename"].to_pylist()[0] == "18/0.jpg"
    formats = [{Image.open(io.BytesIO(data)).format for data in table["image_bytes"].to_pylist()} for table in (a, b)]
    assert formats == [{"PNG"}, {"JPEG"}]
    assert pixels_of(a["image_bytes"][0].as_py()).shape == (112, 112, 3)


def test_a_picture_does_not_depend_on_how_many_are_drawn(faces, tmp_path):
    write_demo_faces(tmp_path, identities=10, images_digiface=2, images_digi2real=1, size=112, seed=1)
    for name, few in ((FIRST, 18), (SECOND, 6)):
        many = {row["image_filename"]: row["image_bytes"] for row in pq.read_table(faces / name).to_pylist()}
        one = {row["image_filename"]: row["image_bytes"] for row in pq.read_table(tmp_path / name).to_pylist()}
        both = many.keys() & one.keys()
        assert len(one) == few
        assert all(many[key] == one[key] for key in both)
        if name == FIRST:
            assert len(both) == few


def test_another_seed_draws_other_people(faces, tmp_path):
    write_demo_faces(tmp_path, identities=10, images_digiface=1, images_digi2real=1, size=112, seed=2)
    old, new = (pq.read_table(folder / FIRST)["image_bytes"].to_pylist() for folder in (faces, tmp_path))
    assert not set(old) & set(new)


def test_the_same_call_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_faces(tmp_path / name, "digiface", range(3), 2, {"format": "webp", "quality": 80, "method": 6}, size=32, seed=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_committed_files_are_small():
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 6e6


@pytest.mark.parametrize(("name", "people", "images"), [(FIRST, range(180), 16), (SECOND, range(90, 200), 8)])
def test_the_committed_files_hold_the_documented_people_in_order(name, people, images):
    table = committed(name)
    assert table.schema.equals(pa.schema({"identity_id": pa.string(), "image_filename": pa.string(), "image_bytes": pa.binary()}))
    assert table["identity_id"].to_pylist() == [str(i) for i in people for _ in range(images)]
    assert table["image_filename"].to_pylist() == [f"{i}/{k}.webp" for i in people for k in range(images)]
    metadata = pq.read_metadata(DEMO_FOLDER / name)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert all(size == 100 for size in sizes[:-1])
    pictures = [Image.open(io.BytesIO(data)) for data in table["image_bytes"].to_pylist()]
    assert {(picture.format, picture.mode, picture.size) for picture in pictures} == {("WEBP", "RGB", (112, 112))}


@pytest.mark.parametrize(("style", "images"), [("digiface", 16), ("digi2real", 8)])
def test_the_committed_pictures_are_those_that_are_drawn(style, images):
    rows = committed(DEMO_FILES[style]).to_pylist()
    for row in rows[:: 7 * images + 1]:  # every seventh person, and each time their next picture
        identity, variation = int(row["identity_id"]), int(row["image_filename"].removesuffix(".webp").split("/")[1])
        stored = pixels_of(row["image_bytes"])
        assert difference(stored, drawn(identity, variation, style)) < LARGEST_LOSS
        other_style = {"digiface": "digi2real", "digi2real": "digiface"}[style]
        for wrong in ((identity + 1, variation, style), (identity, variation + 1, style), (identity, variation, other_style)):
            assert difference(stored, drawn(*wrong)) > 2 * LARGEST_LOSS
