"""Packing: what lies in zips, tars, folders and benchmark files comes out byte for byte, whatever else lies there."""

import functools
import gzip
import io
import json
import os
import pickle
import re
import signal
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from conftest import BROKEN, encode, numbered_picture
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from runs import SMALL, in_child, in_shell, quoted, refusal, settings

import dataio
import sniperface

DATA = settings(*SMALL, "data.workers=2").data
HEAD = re.compile(r"(\d+) identities of (\d+) to (\d+) images, (\d+) images")


def noise(number: int, kind: str = "jpeg", side: int = 24) -> bytes:
    return encode(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8), kind)


def write_zip(path: Path, entries: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, entries: dict[str, bytes], mode: str = "w", mtime: int = 0) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            archive.addfile(member, io.BytesIO(data))
    return path


def write_folder(path: Path, entries: dict[str, bytes]) -> Path:
    for name, data in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


WRITERS = {
    "zip": lambda folder, entries: write_zip(folder / "faces.zip", entries),
    "stored": lambda folder, entries: write_zip(folder / "faces.zip", entries, zipfile.ZIP_STORED),
    "tar": lambda folder, entries: write_tar(folder / "faces.tar", entries),
    "tar.gz": lambda folder, entries: write_tar(folder / "faces.tar.gz", entries, "w:gz"),
    "tar.xz": lambda folder, entries: write_tar(folder / "faces.tar.xz", entries, "w:xz"),
    "folder": lambda folder, entries: write_folder(folder / "faces", entries),
}


def packed(files) -> list[tuple[str, str, bytes]]:
    return [tuple(row.values()) for path in files for row in pq.read_table(path).to_pylist()]


def small_windows(patch, window: int, shard_windows: int = 16) -> None:
    patch.setattr(dataio, "WINDOW_BYTES", window)
    patch.setattr(dataio, "SHARD_WINDOWS", shard_windows)


PEOPLE = {f"{person}/{n}.png": numbered_picture(100 * person + n) for person in (10, 9, 100, 0) for n in (11, 2, 0)}
IN_ORDER = [(str(p), f"{n}.png", numbered_picture(100 * p + n)) for p in (0, 9, 10, 100) for n in (0, 2, 11)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("window", [1, 300, 1 << 20])
def test_pictures_come_out_byte_for_byte_in_the_order_of_their_numbers(tmp_path, monkeypatch, kind, window):
    small_windows(monkeypatch, window)
    files = dataio.pack(str(WRITERS[kind](tmp_path, PEOPLE)), tmp_path / "out" / "faces", DATA)
    assert packed(files) == IN_ORDER
    assert [path.name for path in files] == [f"faces_{n:03d}.parquet" for n in range(len(files))]
    assert (len(files) > 1) == (window == 1)
    assert dataio.find_files(str(tmp_path / "out/faces_*.parquet")) == files


def test_the_eight_zips_of_digiface_are_one_source_whose_counts_are_checked(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="sniperface")
    for first, last, each in ((0, 1, 72), (2, 3, 72), (100000, 100002, 5)):
        entries = {f"{p}/{k}.png": noise(100 * p + k, "png", 8) for p in range(first, last + 1) for k in range(each)}
        write_zip(tmp_path / f"subjects_{first}-{last}_{each}_imgs.zip", entries)
    files = dataio.pack(str(tmp_path / "subjects_*.zip"), tmp_path / "mine", DATA)
    rows = packed(files)
    assert [row[0] for row in rows[::72]][:4] == ["0", "1", "2", "3"]
    assert rows[-1] == ("100002", "4.png", noise(10000204, "png", 8))
    assert HEAD.search(caplog.text).groups() == ("7", "5", "72", "303")
    assert "sizes: 8 x 8 (303)\nmodes: RGB (303)" in caplog.text
    told = "DigiFace-1M has 109999 identities and 1219995 images, here are 7 and 303: -109992 and -1219692"
    assert told in caplog.text
    monkeypatch.setitem(dataio.KNOWN_SOURCES, "DigiFace-1M", (dataio.KNOWN_SOURCES["DigiFace-1M"][0], 7, 303))
    caplog.clear()
    assert dataio.pack(str(tmp_path / "subjects_*.zip"), tmp_path / "mine", DATA) == files
    assert "DigiFace-1M has" not in caplog.text


@pytest.mark.parametrize("top", ["", "Digi2Real/", "./Digi2Real/images/"])
def test_folders_around_the_identities_make_no_difference(tmp_path, caplog, top):
    entries = {f"{top}{p}/{p}_{k}.jpg": noise(20 * p + k) for p in range(3) for k in range(4)}
    rows = packed(dataio.pack(str(write_tar(tmp_path / "Digi2Real.tar.gz", entries, "w:gz")), tmp_path / "digi", DATA))
    assert rows == [(str(p), f"{p}_{k}.jpg", noise(20 * p + k)) for p in range(3) for k in range(4)]
    assert "Digi2Real has 20000 identities and 399355 images, here are 3 and 12: -19997 and -399343" in caplog.text
    assert "in several places" not in caplog.text


def test_people_of_one_name_in_several_places_are_told(tmp_path, caplog):
    entries = {f"{side}/{person}/{side}.jpg": noise(person + len(side)) for side in ("train", "test") for person in (3, 6)}
    rows = packed(dataio.pack(str(write_tar(tmp_path / "all.tar", entries, "w")), tmp_path / "all", DATA))
    assert [row[0] for row in rows] == ["3", "3", "6", "6"]
    assert "2 identities, such as 3, have a folder in several places: each is taken to be one person" in caplog.text


def test_a_packed_source_is_split_and_read_as_any_other(tmp_path):
    entries = {f"{p}/{k}.png": numbered_picture(10 * p + k) for p in range(20) for k in range(5)}
    dataio.pack(str(write_zip(tmp_path / "faces.zip", entries)), tmp_path / "faces", DATA)
    assert dataio.collect_unique_identities(str(tmp_path / "faces_*.parquet")) == sorted(map(str, range(20)))
    stream = dataio.ParquetImageStream(str(tmp_path / "faces_*.parquet"), image_size=16, allowed_identities=["3", "12"])
    assert sorted(int(image[0, 0, 0]) for image in stream) == [*range(30, 35), *range(120, 125)]
    others = dataio.Columns("person", "name", "jpg")  # what other files call them
    assert len(dataio.build_index(str(tmp_path / "faces_*.parquet"), None, others)) == 100
    (path,) = tmp_path.glob("faces_*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.append_column("person", pa.array(["one", "other"] * 50)), path)  # a column that is there is taken
    assert set(dataio.build_index(str(path), None, others).identities()) == {"one", "other"}


def test_row_groups_are_small_and_only_the_names_are_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataio, "GROUP_BYTES", 10_000)
    entries = {f"{n // 10}/{n}.png": noise(n, "png") for n in range(60)}
    (path,) = dataio.pack(str(write_zip(tmp_path / "faces.zip", entries)), tmp_path / "faces", DATA)
    metadata = pq.ParquetFile(path).metadata
    assert 9 <= metadata.num_row_groups <= 20
    kinds = {metadata.row_group(0).column(n).path_in_schema: metadata.row_group(0).column(n).compression for n in range(3)}
    assert kinds == {"identity_id": "ZSTD", "image_filename": "ZSTD", "image_bytes": "UNCOMPRESSED"}


# ---- Stopping and going on ----


def test_after_a_kill_the_same_command_goes_on_with_the_shards_that_are_there(tmp_path, monkeypatch, caplog):
    small_windows(monkeypatch, 200, 1)
    source = str(write_zip(tmp_path / "faces.zip", PEOPLE))
    wanted = {path.name: path.read_bytes() for path in dataio.pack(source, tmp_path / "whole" / "faces", DATA)}
    assert len(wanted) > 3
    real, written = dataio.shard_writer, []

    def dies(path, note):
        written.append(path)
        if len(written) == 3:
            (tmp_path / "out/.faces_002.parquet.~1~host.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, note)

    with monkeypatch.context() as patch:
        patch.setattr(dataio, "shard_writer", dies)
        assert in_child(dataio.pack, source, tmp_path / "out" / "faces", DATA) == -signal.SIGKILL
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("faces_*.parquet")}
    assert len(left) == 2
    caplog.set_level("INFO", logger="sniperface")
    files = dataio.pack(source, tmp_path / "out" / "faces", DATA)
    assert {path.name: path.read_bytes() for path in files} == wanted
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert HEAD.search(caplog.text).groups() == ("4", "3", "3", "12")


def test_files_of_other_pictures_are_not_written_over_or_mixed_with(tmp_path, monkeypatch):
    small_windows(monkeypatch, 400, 1)
    source = write_zip(tmp_path / "faces.zip", PEOPLE)
    files = dataio.pack(str(source), tmp_path / "faces", DATA)
    before = [path.read_bytes() for path in files]
    write_zip(source, dict([*PEOPLE.items()][:-1]))
    assert "faces_000.parquet: is there, and not packed from these pictures" in refusal(
        lambda: dataio.pack(str(source), tmp_path / "faces", DATA)
    )
    assert [path.read_bytes() for path in files] == before
    files[0].unlink()
    assert "faces_001.parquet" in refusal(lambda: dataio.pack(str(source), tmp_path / "faces", DATA))


# ---- What else may lie in an archive ----


def packed_with(tmp_path, caplog, source) -> tuple[list, str]:
    """What comes out beside the good picture `a/1.png`, and what the summary says is left out."""
    caplog.set_level("INFO", logger="sniperface")
    before = sorted(tmp_path.rglob("*"))
    rows = packed(dataio.pack(str(source), tmp_path / "out", DATA))
    new = {path.name for path in {*tmp_path.rglob("*")} - {*before}}
    assert new == {"out_000.parquet", ".out.lock"}
    rows.remove(("a", "1.png", numbered_picture(1)))
    return rows, caplog.text


GOOD = {"a/1.png": numbered_picture(1)}
LEFT_OUT = {
    "../../x/2.png": "a path that leads elsewhere", "/etc/2.png": "a path that leads elsewhere",
    "C:/b/2.png": "a path that leads elsewhere", "..\\b\\2.png": "a path that leads elsewhere",
    "__MACOSX/a/._1.png": "hidden", "a/.DS_Store": "hidden", "a/notes.txt": "no picture by its name",
    "2.png": "in no identity's folder", "./2.png": "in no identity's folder", ".": "a path that leads elsewhere",
    "a/more.zip": "an archive within", "b/more.tar.gz": "an archive within",
}  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_entries_that_are_no_pictures_of_an_identity_are_left_out_and_named(tmp_path, caplog, write, name):
    source = write(tmp_path / "faces.archive", GOOD | {name: numbered_picture(2)})
    rows, told = packed_with(tmp_path, caplog, source)
    assert rows == []
    assert f"left out, {LEFT_OUT[name]}" in told
    assert ascii(name)[1:-1] in told


def test_an_archive_within_a_folder_is_named_and_a_folder_of_archives_is_refused(tmp_path):
    (tmp_path / "zips").mkdir()
    write_zip(tmp_path / "zips/one.zip", GOOD)
    told = refusal(lambda: dataio.pack(str(tmp_path / "zips"), tmp_path / "out", DATA))
    assert "no pictures laid out as <identity>/<file>, but an archive within: unpack it, and name it in pack.source" in told
    assert "one.zip" in told


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_followed(tmp_path, caplog, kind):
    (tmp_path / "secret.png").write_bytes(numbered_picture(7))
    source = write_tar(tmp_path / "faces.tar", GOOD)
    with tarfile.open(source, "a") as archive:
        member = tarfile.TarInfo("b/2.png")
        member.type, member.linkname = kind, str(tmp_path / "secret.png")
        archive.addfile(member)
    rows, told = packed_with(tmp_path, caplog, source)
    assert rows == []
    assert "left out, a link or a device (1)" in told


def test_a_folder_may_hold_links_to_pictures_but_no_pipes(tmp_path, caplog):
    source = write_folder(tmp_path / "faces", GOOD)
    (tmp_path / "elsewhere.png").write_bytes(numbered_picture(2))
    (source / "a/2.png").symlink_to(tmp_path / "elsewhere.png")
    (source / "a/3.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(source / "a/4.png")
    rows, told = packed_with(tmp_path, caplog, source)
    assert rows == [("a", "2.png", numbered_picture(2))]
    assert "left out, a link or a device (2)" in told


def test_a_folder_that_is_a_link_is_named_and_one_that_cannot_be_read_is_refused(tmp_path, caplog, monkeypatch):
    source = write_folder(tmp_path / "faces", GOOD | {"b/2.png": numbered_picture(2)})
    (source / "b").rename(tmp_path / "elsewhere")
    (source / "b").symlink_to(tmp_path / "elsewhere")
    rows, told = packed_with(tmp_path, caplog, source)
    assert rows == []
    assert f"left out, a link or a device (1): {source}: b" in told
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path if str(path).endswith("faces") else "/not/here"))
    assert "cannot be read as a folder, zip or tar" in refusal(lambda: dataio.pack(str(source), tmp_path / "again", DATA))


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_other_pictures_of_the_same_names_and_sizes_are_other_pictures(tmp_path, kind):
    bmp = [encode(Image.new("RGB", (8, 8), (n, n, n)), "bmp") for n in (1, 2)]
    source = WRITERS[kind](tmp_path, {"a/1.bmp": bmp[0]})
    dataio.pack(str(source), tmp_path / "out", DATA)
    if kind == "tar":  # written a second later
        write_tar(source, {"a/1.bmp": bmp[1]}, mtime=1)
    else:
        WRITERS[kind](tmp_path, {"a/1.bmp": bmp[1]})
    assert "not packed from these pictures" in refusal(lambda: dataio.pack(str(source), tmp_path / "out", DATA))


def test_an_error_of_the_disk_is_no_broken_picture(tmp_path, monkeypatch):
    source, read = write_folder(tmp_path / "faces", PEOPLE), open

    def fails(path, *more):
        if str(path).endswith("9/2.png"):
            raise OSError(5, "Input/output error")
        return read(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        assert "Input/output error" in refusal(lambda: dataio.pack(str(source), tmp_path / "out", DATA))
    assert packed(dataio.pack(str(source), tmp_path / "out", DATA)) == IN_ORDER


def test_a_source_without_one_readable_picture_is_refused_and_leaves_no_file(tmp_path):
    source = write_folder(tmp_path / "faces", {"a/1.png": BROKEN, "b/2.png": b""})
    assert "not one picture can be read" in refusal(lambda: dataio.pack(str(source), tmp_path / "out", DATA))
    assert not [*tmp_path.glob("out*.parquet")]


def test_names_that_are_not_text_are_kept_apart(tmp_path, caplog):
    source = write_folder(tmp_path / "faces", GOOD)
    for number, name in enumerate((b"\xff", b"\xfe"), 2):
        os.mkdir(os.fsencode(source) + b"/" + name)
        Path(os.fsdecode(os.fsencode(source) + b"/" + name + b"/1.png")).write_bytes(numbered_picture(number))
    rows, _ = packed_with(tmp_path, caplog, source)
    assert {(row[0], row[2]) for row in rows} == {(r"\udcfe", numbered_picture(3)), (r"\udcff", numbered_picture(2))}


def with_claim(source: Path, name: str, claimed: int) -> None:
    """Make an entry of a zip claim another size, in its header and in the directory."""
    raw = bytearray(source.read_bytes())
    for signature, size_at, name_at in ((b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)):
        at = next(m.start() for m in re.finditer(re.escape(signature), raw) if raw[m.start() + name_at :].startswith(name.encode()))
        raw[at + size_at : at + size_at + 4] = struct.pack("<I", claimed)
    source.write_bytes(raw)


@pytest.mark.parametrize("claimed", [0, 100, 70 << 20])
def test_a_bomb_is_neither_unpacked_nor_packed(tmp_path, caplog, claimed):
    source = write_zip(tmp_path / "faces.zip", GOOD | {"b/2.png": bytes(60 << 20)})
    with_claim(source, "b/2.png", claimed)
    largest, real = [], dataio.read_entry

    def read(*arguments):
        largest.append(len(real(*arguments)))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataio, "read_entry", read)
        rows, told = packed_with(tmp_path, caplog, source)
    assert rows == []
    assert max(largest) < 1000
    assert "left out, larger than 64 MB (1)" in told if claimed > 1000 else "left out, broken (1)" in told


def test_a_picture_of_more_pixels_than_training_takes_is_broken(tmp_path, caplog):
    source = write_zip(tmp_path / "faces.zip", GOOD | {"b/2.png": encode(Image.new("1", (5_000, 5_000)))})
    rows, told = packed_with(tmp_path, caplog, source)
    assert rows == []
    assert "5000 x 5000 pixels are more than data.max_image_pixels=16000000" in told


@pytest.mark.parametrize("kind", WRITERS)
def test_broken_pictures_are_left_out_and_named(tmp_path, caplog, kind):
    bad = {"b/2.png": BROKEN, "b/3.jpg": b"", "b/4.jpg": noise(4)[:300]}
    rows, told = packed_with(tmp_path, caplog, WRITERS[kind](tmp_path, GOOD | bad | {"b/5.jpg": noise(5)}))
    assert rows == [("b", "5.jpg", noise(5))]
    assert "left out, broken (3)" in told
    assert all(name in told for name in bad)


def test_damaged_entries_and_other_ways_to_compress_are_broken_pictures(tmp_path, caplog):
    source = write_zip(tmp_path / "faces.zip", GOOD | {"b/2.png": numbered_picture(2)}, zipfile.ZIP_STORED)
    raw = source.read_bytes()
    at = raw.index(numbered_picture(2)) + 40
    source.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with zipfile.ZipFile(source, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("b/3.png", numbered_picture(3))
    rows, told = packed_with(tmp_path, caplog, source)
    assert rows == []
    assert "left out, broken (2)" in told
    assert "Bad CRC-32" in told
    assert "neither stored nor deflated" in told


def test_doubled_pictures_are_left_out_and_others_of_the_same_name_are_renamed(tmp_path, caplog, monkeypatch):
    small_windows(monkeypatch, 1)
    for name, number in (("one", 1), ("two", 1), ("three", 2)):
        write_zip(tmp_path / f"{name}.zip", {"a/1.png": numbered_picture(number), f"a/{name}.png": numbered_picture(9)})
    caplog.set_level("INFO", logger="sniperface")
    rows = packed(dataio.pack([str(tmp_path / "*.zip")], tmp_path / "out", DATA))
    assert {name: data for _, name, data in rows} == {
        "1.png": numbered_picture(1), "1~2.png": numbered_picture(2),
        **{f"{name}.png": numbered_picture(9) for name in ("one", "two", "three")},
    }  # fmt: skip
    assert "left out, doubled (1)" in caplog.text


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"text", lambda raw: b""])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_that_is_cut_or_none_is_refused_by_name(tmp_path, kind, damage):
    source = WRITERS[kind](tmp_path, {name: noise(n, "png", 64) for n, name in enumerate(PEOPLE)})
    source.write_bytes(damage(source.read_bytes()))
    assert f"{source}: cannot be read as a folder, zip or tar" in refusal(lambda: dataio.pack(str(source), tmp_path / "o", DATA))
    assert not [*tmp_path.glob("o_*")]


def without_the_third_header(raw: bytes) -> bytes:
    return raw[: 3 * 1024] + b"x" + raw[3 * 1024 + 1 :]


@pytest.mark.parametrize("damage", [without_the_third_header, lambda raw: raw[: 3 * 1024], lambda raw: raw[: 3 * 1024 + 99]])
@pytest.mark.parametrize("press", [lambda raw: raw, gzip.compress])
def test_a_tar_that_is_damaged_between_its_entries_is_refused(tmp_path, damage, press):
    source = write_tar(tmp_path / "faces.tar", PEOPLE)  # entries of two blocks of 512 bytes
    source.write_bytes(press(damage(source.read_bytes())))
    assert f"{source}: cannot be read" in refusal(lambda: dataio.pack(str(source), tmp_path / "o", DATA))


def test_a_header_of_a_tar_that_is_longer_than_any_name_is_not_read(tmp_path):
    with tarfile.open(tmp_path / "faces.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a/1.png")
        member.pax_headers = {"comment": "x" * (2 << 20)}
        archive.addfile(member)
    told = refusal(lambda: dataio.pack(str(tmp_path / "faces.tar.gz"), tmp_path / "o", DATA))
    assert "a header of 20971" in told


def test_a_tar_whose_last_entry_is_a_zip_is_a_tar(tmp_path, caplog):
    inner = write_zip(tmp_path / "inner.zip", {"evil/1.png": numbered_picture(3)}, zipfile.ZIP_STORED).read_bytes()
    source = write_tar(tmp_path / "faces.tar", GOOD | {"b/inner.zip": inner})
    (tmp_path / "inner.zip").unlink()
    assert packed_with(tmp_path, caplog, source)[0] == []


def test_a_folder_of_pictures_as_the_data_says_the_command_that_packs_it(tmp_path):
    write_folder(tmp_path / "faces", GOOD)
    told = refusal(lambda: dataio.find_sources(runs.dataclasses.replace(DATA, digiface_glob=str(tmp_path / "faces"))))
    assert f"command=pack pack.source={tmp_path}/faces pack.out=data/faces, then give data/faces_*.parquet" in told


# ---- Benchmarks ----


class Runs:
    """What a hostile file would like to have called."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def written_by_python_2(bins, same) -> bytes:
    """The pickle of protocol 2 that Python 2 makes of (list of str, list of bool)."""
    strings = b"".join(b"T" + struct.pack("<i", len(data)) + data for data in bins)
    return b"\x80\x02](" + strings + b"e](" + b"".join(b"\x88" if one else b"\x89" for one in same) + b"e\x86."


def arrays(bins):
    return [np.frombuffer(data, np.uint8) for data in bins]


BINS = {
    "python 2": written_by_python_2,
    **{f"protocol {n}": functools.partial(lambda n, bins, same: pickle.dumps((bins, same), n), n) for n in range(6)},
    **{f"arrays {n}": functools.partial(lambda n, bins, same: pickle.dumps((arrays(bins), same), n), n) for n in range(6)},
    "numpy's booleans": lambda bins, same: pickle.dumps([bins, [np.bool_(one) for one in same]], 4),
    "numbers": lambda bins, same: pickle.dumps([tuple(bins), [int(one) for one in same]], 4),
}


def draw_bin(pairs: int = 40) -> tuple[list[bytes], list[bool]]:
    """Pairs of pictures of half as many people, in which pictures come again; even pairs are of one person."""
    same = [n % 2 == 0 for n in range(pairs)]
    return [noise((n + side * (1 + (not one))) % 30) for n, one in enumerate(same) for side in (0, 1)], same


@pytest.mark.parametrize("kind", BINS)
def test_a_benchmark_file_becomes_pictures_and_pairs(tmp_path, kind):
    bins, same = draw_bin()
    (tmp_path / "agedb_30.bin").write_bytes(BINS[kind](bins, same))
    images, pairs = dataio.pack_benchmark(str(tmp_path / "agedb_30.bin"), None, tmp_path / "agedb_30", DATA)
    rows, listed = packed([images]), pq.read_table(pairs).to_pylist()
    picture = {name: data for _, name, data in rows}
    assert len(picture) == len(rows) == len(set(bins)) < len(bins)
    assert len({identity for identity, _, _ in rows}) == len(rows)
    assert [picture[row[f"image_filename_{side}"]] for row in listed for side in "ab"] == bins
    assert [row["same"] for row in listed] == same
    assert [row["fold"] for row in listed] == np.repeat(range(10), 4).tolist()


HOSTILE = {
    "runs": lambda mark: pickle.dumps(([Runs(mark)], [True])),
    "runs in protocol 0": lambda mark: pickle.dumps(([Runs(mark)], [True]), 0),
    "a name in a name": lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "numpy's own pickle": lambda mark: b"cnumpy\nload\n(S'x.npy'\ntR.",
    "another module": lambda mark: b"cnumpy_evil\nndarray\n)R.",
    "no pickle": lambda mark: b"text",
    "nothing": lambda mark: b"",
    "a large number": lambda mark: b"\x80\x02Nr\xff\xff\xff\xff.",
    "a large array of bytes": lambda mark: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "nested beyond any depth": lambda mark: b"\x80\x02](K\x01K\x01e](" + b")" + b"\x85" * 100_000 + b"e\x86.",
    "large bytes": lambda mark: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "odd": lambda mark: pickle.dumps(([noise(1)], [True])),
    "no pairs": lambda mark: pickle.dumps(([], [])),
    "other answers": lambda mark: pickle.dumps(([noise(1)] * 2, ["yes"])),
    "numbers for pictures": lambda mark: pickle.dumps(([1, 2], [True])),
    "a damaged picture": lambda mark: pickle.dumps(([noise(1), BROKEN] * 10, [True] * 10)),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_in_a_benchmark_file_runs_and_what_is_none_is_refused_by_name(tmp_path, kind):
    source, mark = tmp_path / "lfw.bin", tmp_path / "ran"
    source.write_bytes(HOSTILE[kind](mark))
    assert f"{source}: " in refusal(lambda: dataio.pack_benchmark(str(source), None, tmp_path / "lfw", DATA))
    assert [path.name for path in tmp_path.iterdir()] == ["lfw.bin"]


def draw_lfw(folder: Path, archive=write_folder, folds: int = 10, each: int = 3) -> tuple[str, str]:
    """Twelve people of four pictures in LFW's layout, and its list of pairs: `each` of both kinds a fold."""
    people, rng = [f"First{n}_Last" for n in range(12)], np.random.default_rng(0)
    pictures = {f"lfw/{p}/{p}_{k:04d}.jpg": noise(10 * n + k) for n, p in enumerate(people) for k in range(1, 5)}
    lines = [f"{folds}\t{each}"]
    for _ in range(folds):
        lines += [f"{people[rng.integers(12)]}\t{a}\t{a % 4 + 1}" for a in rng.integers(1, 5, each)]
        lines += [
            "\t".join(f"{people[p]}\t{k}" for p, k in zip(rng.choice(12, 2, False), (1, 4), strict=True)) for _ in range(each)
        ]
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    return str(archive(folder / "lfw", pictures)), str(folder / "pairs.txt")


@pytest.mark.parametrize("archive", [write_folder, functools.partial(write_tar, mode="w:gz")])
def test_lfw_as_it_is_downloaded_becomes_pictures_and_pairs(tmp_path, archive):
    source, listed = draw_lfw(tmp_path, archive)
    images, pairs = dataio.pack_benchmark(source, listed, tmp_path / "out" / "lfw", DATA)
    assert [path.name for path in (images, pairs)] == ["lfw.parquet", "lfw_pairs.parquet"]
    rows, found = packed([images]), pq.read_table(pairs).to_pylist()
    assert len(rows) == 48
    assert rows[5] == ("First1_Last", "First1_Last_0002.jpg", noise(12))
    for line, row in zip(Path(listed).read_text().splitlines()[1:], found, strict=True):
        (a, i), (b, j) = (line.split()[:2], line.split()[-2:]) if row["same"] is False else (line.split()[:2], line.split()[::2])
        assert (row["identity_id_a"], row["identity_id_b"]) == (a, b)
        assert (row["image_filename_a"], row["image_filename_b"]) == (f"{a}_{i:>04}.jpg", f"{b}_{j:>04}.jpg")
    assert [row["fold"] for row in found] == np.repeat(range(10), 6).tolist()
    assert [row["same"] for row in found] == [True, True, True, False, False, False] * 10
    dataio.pack_benchmark(source, listed, tmp_path / "out" / "lfw", DATA)  # again: what is there is left


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("First1_", "Nobody_", 1), "of its pictures, such as Nobody_Last"),
        (lambda text: text.replace("10\t3", "10\t4"), "60 pairs, 10 folds of twice 4 are announced"),
        (lambda text: text.split("\n", 1)[1], "look at the first line"),
        (lambda text: "", "no list of pairs"),
        (lambda text: text.replace("\t1\t", "\tone\t", 1), "no list of pairs as LFW's, look at line"),
    ],
)
def test_a_list_of_pairs_that_cannot_be_right_is_refused_by_name(tmp_path, change, told):
    source, listed = draw_lfw(tmp_path)
    Path(listed).write_text(change(Path(listed).read_text()))
    found = refusal(lambda: dataio.pack_benchmark(source, listed, tmp_path / "out", DATA))
    assert told in found
    assert f"{listed}: " in found
    assert not (tmp_path / "out_pairs.parquet").exists()


# ---- From the archives to a number ----


def test_benchmarks_are_measured_on_their_own_vectors_with_a_row_each_and_their_mean(trained, unbroken, data, tmp_path, caplog):
    caplog.set_level("INFO", logger="sniperface")
    lfw, listed = draw_lfw(tmp_path)
    Path(listed).write_text(Path(listed).read_text(), "utf-8-sig")
    (tmp_path / "agedb_30.bin").write_bytes(BINS["arrays 2"](*draw_bin()))
    sniperface.pack(settings(f"pack.benchmark={lfw}", f"pack.pairs={listed}", f"pack.out={tmp_path}/data/lfw"))
    sniperface.pack(settings(f"pack.benchmark={tmp_path}/agedb_30.bin", f"pack.out={tmp_path}/data/agedb_30"))
    both = quoted("eval.pairs", tmp_path / "data/*_pairs.parquet")
    cfg = runs.job(unbroken, data, both)
    cure = f"command=embed run=run_001 embed.test_glob={tmp_path}/data/agedb_30.parquet"
    assert cure in refusal(lambda: sniperface.evaluate(cfg, trained))
    for name in ("agedb_30", "lfw"):
        sniperface.embed(runs.job(unbroken, data, f"embed.test_glob={tmp_path}/data/{name}.parquet"), trained)
    metrics = sniperface.evaluate(cfg, trained)
    found = metrics["pair_protocol"]
    assert [(name, figures["pairs"]) for name, figures in found.items()] == [("agedb_30", 40), ("lfw", 60)]
    assert metrics["pairs_mean"] == pytest.approx((found["agedb_30"]["accuracy"] + found["lfw"]["accuracy"]) / 2)
    assert json.loads((trained / "metrics.json").read_text())["untrained"]["pair_protocol"].keys() == found.keys()
    vectors = dataio.read_vectors(trained / "embeddings/lfw.parquet")
    wanted = sniperface.measure_pairs(tmp_path / "data/lfw_pairs.parquet", vectors, cfg.eval.fars)
    assert found["lfw"] == wanted | {"aligned": None}
    lines = caplog.text.splitlines()
    for row, figures in (("agedb_30, 40", found["agedb_30"]), ("lfw, 60", found["lfw"])):
        assert any(line.startswith(f"{row} ") and f"{figures['accuracy']:.4f} +- " in line for line in lines)
    assert any(re.match(rf"mean +{metrics['pairs_mean']:.4f} ", line) for line in lines)
    words = f"embed.test_glob={tmp_path}/data/agedb_30.parquet", quoted("eval.pairs", tmp_path / "data/agedb_30_pairs.parquet")
    alone = sniperface.evaluate(runs.job(unbroken, data, *words), trained)  # each of its pictures has an identity of its own
    assert alone == json.loads((trained / "metrics_agedb_30.json").read_text())
    assert alone["pair_protocol"] == {"agedb_30": found["agedb_30"]}
    assert "rank1" not in alone
    assert "nobody has two pictures: pairs alone are measured" in caplog.text
    assert "## metrics_agedb_30.json\n\n```\nAccuracy of pairs" in (trained / "report.md").read_text()
    assert sniperface.look_ahead(runs.job(unbroken, data, *words)) == {"pairs": 1}
    told = refusal(lambda: sniperface.evaluate(runs.job(unbroken, data, both, "eval.enroll_per_id=50"), trained))
    assert "lower eval.enroll_per_id" in told  # a mistake in a setting replaces no figures
    sniperface.export(runs.job(unbroken, data, "export.formats=[pt]"), trained)
    assert "| pairs of agedb_30 | accuracy |" in (trained / "export" / "README.md").read_text()
    sniperface.embed(runs.job(unbroken, data, "embed.flip=true", "embed.references=false"), trained, {"embed.flip"})
    told = refusal(lambda: sniperface.evaluate(cfg, trained))  # the benchmarks' vectors are of another encoder now
    assert "agedb_30.parquet: not of these pictures by the encoder of" in told
    assert cure in told


def test_the_command_packs_and_says_what_it_lacks(tmp_path):
    write_zip(tmp_path / "faces.zip", PEOPLE)
    told, code = in_shell("command=pack", "pack.source=faces.zip", "pack.out=data/faces.parquet", cwd=tmp_path)
    assert code == 0, told
    assert packed([tmp_path / "data/faces_000.parquet"]) == IN_ORDER
    assert HEAD.search(told).groups() == ("4", "3", "3", "12")
    for words in ([], ["pack.source=faces.zip", "pack.benchmark=lfw.bin"], ["pack.benchmark=lfw/"], ["pack.source=none.zip"]):
        told = refusal(lambda words=words: sniperface.pack(settings(*words)))
        assert "pack.source" in told or "pack.pairs=pairs.txt" in told or "none.zip" in told


def test_help_begins_with_the_commands_and_with_settings_that_exist(tmp_path):
    told, code = in_shell("--help", cwd=tmp_path)
    assert code == 0
    ours = told.split("== Configuration groups ==")[0]
    assert set(re.findall(r"^ *command=(\w+)", ours, re.MULTILINE)) == set(sniperface.COMMANDS)
    words = re.findall(r"(?:^|(?<= ))([a-z][\w.]*=(?:'[^']*'|[^\s\[]+))(?=\s|$)", ours, re.MULTILINE)
    words = [word for word in words if not word.startswith("command=")]
    assert len(words) >= 12
    for word in words:
        (read,) = OverridesParser.create().parse_overrides([word])
        settings(word)
        assert read.key_or_group in ours
