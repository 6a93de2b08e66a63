"""Files and pixels: from parquet rows to augmented views on the device, and tables of vectors.

Guarantees: the identity column is read to filter rows and to split identities, then dropped, so no identity reaches training; rows
that are not allowed are never decoded; the order of the images is a pure function of the seed, whatever the number of workers;
a file appears whole or not at all. Takes parquet files of encoded images, gives uint8 batches [B, 3, S, S] and float views in
[-1, 1].

Sources: DigiFace-1M (arXiv:2210.02579), Digi2Real (arXiv:2411.02188); operations of RandAugment (arXiv:1909.13719).
"""

import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import threading
import urllib.parse
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("sniperface")
ROW_GROUP_ROWS = 500  # of the files we write: small enough to mix many at a time, large enough to read fast
SHARD_BYTES = 256 << 20  # of a materialised train shard; two at a time are shuffled in memory
LANES = 8  # places of the files that are read side by side; fixed, so that the order never depends on the machine
PREFETCH = 4  # batches that are decoded ahead
READ_AHEAD = 1024  # images whose row groups are requested before they are due
TASK_IMAGES = 32  # that a thread decodes at a time: some 10 ms
MARKED_PICTURES = 64  # of a source, by which a run knows the pictures again in files that were written anew
CACHE_CHUNK = 4096  # images of a decoded cache that share a checksum
SPLIT_TABLE = "identity_splits.parquet"
METADATA_KEY = b"sniperface"  # our entry in the schema metadata of the files we write
PICTURE = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?|gif|avif|jp2)$", re.IGNORECASE)  # names of files that should be pictures

# ---- Files ----


def progress(*args, **settings) -> tqdm:
    """A tqdm bar that in a file, as of a batch job, adds a line every ten seconds instead of ten a second."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 10.0, **settings)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_running(process: str, host: str) -> bool:
    """Whether a process of this machine runs; those of other machines, which share the disk, are taken to run."""
    if host != socket.gethostname():
        return True
    with suppress(PermissionError):
        try:
            os.kill(int(process), 0)
        except (ProcessLookupError, ValueError):
            return False
    return True


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Let an error of the disk name the file that was written: a full disk does not say which."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, what was written there takes the name `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        _, process, host = stale.name[: -len(".tmp")].rsplit("~", 2) if stale.name.count("~") >= 2 else ("", "", "")
        if not is_running(process, host):  # left by a process that was killed
            stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.~{os.getpid()}~{socket.gethostname()}.tmp")
    try:
        with naming_output(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with write_whole(path) as temporary:
        temporary.write_text(text)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, alone; it goes with its process, however that ends. Raises OSError if taken and not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def nearest_folder(folder: Path) -> Path:
    """`folder`, or, where it does not exist yet, the one above in which it would be made."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def need_space(folder: Path, need_bytes: int, what: str) -> None:
    """Raise OSError unless the disk of `folder`, which may not exist yet, has room for `need_bytes`."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < need_bytes:
        has = f"needs {need_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
        raise OSError(f"{folder}: {what} {has}; make room or choose another folder")


def need_writable(folder: Path) -> None:
    """Raise OSError, with the settings that help, unless files can be written in `folder`, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        cure = "choose folders where you can write: split.out_dir=runs/splits data.cache_dir=runs/cache"
        raise OSError(f"{folder}: cannot be written to ({error.strerror}); {cure}") from error


def parquet_below(folder: str) -> list[str]:
    """All parquet files below a folder, but not what is hidden, begins with `_`, or was written by `split`."""
    names = [name for name in glob.glob("**/*.parquet", root_dir=folder, recursive=True) if "/_" not in f"/{name}"]
    tables = [name for name in names if Path(name).name == SPLIT_TABLE]
    ours = tuple(t.removesuffix(SPLIT_TABLE) + part for t in tables for part in (SPLIT_TABLE, "train/", "val/", "test/"))
    return [path for n in names if not n.startswith(ours) and not os.path.isdir(path := os.path.join(folder, n))]


def find_matches(globs: str | Path | Sequence[str | Path]) -> list[str]:
    """Files and folders that match any of `globs`. Raises FileNotFoundError for a pattern that none does."""
    found: list[str] = []
    for pattern in map(str, [globs] if isinstance(globs, str | Path) else globs):
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)  # a name may hold [ ]
        if not matches:
            raise FileNotFoundError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
        found += matches
    return found


def find_files(globs: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files that match any of `globs`, or lie below a folder that does, sorted by name. Raises FileNotFoundError for none."""
    found: list[Path] = []
    for match in find_matches(globs):
        files = parquet_below(match) if os.path.isdir(match) else [match]
        if not files:
            cure = "give one that holds some"
            if any(PICTURE.search(name) for name in glob.iglob("*/*.*", root_dir=match)):
                out = f"data/{Path(os.path.abspath(match)).name}"
                cure = f"make some of its pictures by command=pack pack.source={match} pack.out={out}, then give {out}_*.parquet"
            raise FileNotFoundError(f"{match}: a folder without a .parquet file; {cure}")
        found += map(Path, files)
    return sorted({os.path.realpath(path): path for path in found}.values(), key=lambda path: (path.name, str(path)))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def digest(*parts: object) -> str:
    """Sixteen hex digits of the SHA-256 of `parts`: equal on every machine and in every version."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def draw_seed(seed: int, purpose: str, *address: int) -> int:
    """The seed of one draw, addressed by purpose and place: nothing random is carried along, so nothing random must be saved."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{'/'.join(map(str, address))}".encode()).digest()[:7])


def draw(seed: int, purpose: str, *address: int) -> torch.Generator:
    """A CPU generator for one draw, see `draw_seed`."""
    return torch.Generator().manual_seed(draw_seed(seed, purpose, *address))


# ---- Parquet: the contract of the image files ----


@dataclass(unsafe_hash=True)  # a key of the cache of `scan_identities`
class Columns:
    identity: str
    filename: str
    image: str


COLUMNS = Columns("identity_id", "image_filename", "image_bytes")  # the contract's own names
HUGGINGFACE = Columns("label", "image.path", "image.bytes")  # as its `datasets` writes pictures


UNREADABLE = (OSError, OverflowError, pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError, StopIteration)


@contextmanager
def naming(
    place: object, what: str = "damaged, or no such file", cure: str = "fetch it again or leave it out", errors=UNREADABLE
) -> Iterator[None]:
    """Turn the errors that reading a damaged file raises into a ValueError that names its place, what it is, and a cure."""
    try:
        yield
    except MemoryError:  # not the file's fault
        raise
    except errors as error:
        raise ValueError(f"{place}: {what} ({first_line(error)}); {cure}") from error


def open_parquet(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open for reading row group by row group; without these buffers the whole file, or a whole row group, is kept in memory."""
    with naming(path):
        parquet = pq.ParquetFile(path, metadata=metadata, pre_buffer=False, buffer_size=1 << 17, page_checksum_verification=True)
        parquet.schema_arrow.names  # noqa: B018  # a damaged schema is noticed here
        return parquet


def with_path_columns(table: pa.Table, path: Path) -> pa.Table:
    """`table` of the file `path` with the columns that it lacks and its folders give: below `identity_id=7/`, the string "7"."""
    for part in path.absolute().parent.parts:
        name, equals, value = map(urllib.parse.unquote, part.partition("="))
        if equals and name not in table.column_names:
            value = pa.scalar(None if value == "__HIVE_DEFAULT_PARTITION__" else value, pa.string())
            table = table.append_column(name, pa.repeat(value, len(table)))
    return table


def check_contract(path: Path, schema: pa.Schema, asked: Columns) -> Columns:
    """The three columns by their names in this file: where one that we wrote lacks those asked, ours; where it lacks ours,
    HuggingFace's, and "" where pictures have no names.

    Raises ValueError where there are none, or of types that cannot hold an identity, a name and an image.
    """
    with naming(path):
        table, t = with_path_columns(schema.empty_table().flatten(), path), pa.types  # a field of a struct is called struct.field
        schema = table.schema
    columns, there = replace(asked), set(schema.names)
    for key, ours in vars(COLUMNS).items() if METADATA_KEY in (schema.metadata or {}) else ():
        if getattr(asked, key) not in there:
            setattr(columns, key, ours)
    for key, theirs in vars(HUGGINGFACE).items() if HUGGINGFACE.image in there else ():
        if getattr(asked, key) == getattr(COLUMNS, key) not in there and theirs in there:
            setattr(columns, key, theirs)
    if columns.filename == COLUMNS.filename not in there:
        columns.filename = ""
    text = (t.is_string, t.is_large_string, t.is_string_view)
    for name, kind, fits in (
        (columns.identity, "string or integer", (*text, t.is_integer)),
        (columns.filename, "string", (*text, t.is_null)),
        (columns.image, "binary", (t.is_binary, t.is_large_binary, t.is_binary_view)),
    ):
        if name == columns.filename == "":
            continue
        if schema.names.count(name) != 1:
            count = schema.names.count(name)
            raise ValueError(f"{path}: {count} columns called {name!r}, found {schema.names}; set data.columns to the names in it")
        found = schema.field(name).type
        found = found.value_type if t.is_dictionary(found) else found
        if not any(test(found) for test in fits):
            raise ValueError(f"{path}: column {name!r} is {schema.field(name).type}, must be {kind}")
    return columns


def read_strings(parquet: pq.ParquetFile, path: Path, name: str) -> pa.Array:
    """A column of identities or names as one string array: the integer 1 and the string "1" are the same.

    Raises ValueError for nulls and for what is damaged.
    """
    with naming(path):
        table = with_path_columns(parquet.read(columns=[name], use_threads=False), path)
        column = (table if name in table.column_names else table.flatten())[name]
        column.validate(full=True)  # a string that is not valid UTF-8
        strings = pc.cast(column, pa.large_string()).combine_chunks()
    if column.null_count:
        raise ValueError(f"{path}: {column.null_count} of {len(column)} rows have no {name!r}; every row needs one")
    return strings


def read_metadata(path: Path) -> dict:
    """What we noted in a file of ours when it was written; empty for a foreign one."""
    with naming(path):
        note = json.loads((open_parquet(path).schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    if not isinstance(note, dict):
        raise ValueError(f"{path}: its note {note!r} is not one of ours; write the file again")
    return note


def with_metadata(schema: pa.Schema, note: dict) -> pa.Schema:
    return schema.with_metadata({METADATA_KEY: json.dumps(note, sort_keys=True).encode()})


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def name_labels(path: Path, schema: pa.Schema, column: str, labels: pa.DictionaryArray) -> pa.DictionaryArray:
    """The names of numbered labels where HuggingFace's metadata has them, else the numbers. Raises ValueError for one without."""
    with naming(path), suppress(KeyError, TypeError):
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
        numbers = labels.dictionary.to_pylist()
        if unnamed := [number for number in numbers if not number.isdecimal() or int(number) >= len(names)]:
            raise ValueError(f"{path}: {column!r} {unnamed[0]} has none of the metadata's {len(names)} names; leave its rows out")
        return pa.DictionaryArray.from_arrays(labels.indices, pa.array([names[int(n)] for n in numbers], pa.large_string()))
    return labels


@functools.lru_cache(maxsize=256)
def scan_identities(path: Path, stamped: tuple[int, int], asked: Columns) -> tuple[pq.FileMetaData, pa.Array, Columns]:
    """A file's footer, the identity of each of its rows, read from that column only, and its columns; `stamped` is its `stamp`.

    Kept, since a command asks more than once: for the table and for each side of the split. Not by polars, whose threads hang in a
    process that was forked after they had started.
    """
    parquet = open_parquet(path)
    columns = check_contract(path, parquet.schema_arrow, asked)
    identities = read_strings(parquet, path, columns.identity)
    if parquet.metadata.num_rows != len(identities):
        count = parquet.metadata.num_rows
        raise ValueError(f"{path}: damaged ({len(identities)} identities in {count} rows); fetch it again or leave it out")
    return parquet.metadata, name_labels(path, parquet.schema_arrow, columns.identity, identities.dictionary_encode()), columns


# ---- Identities: which are trained on, which are never seen ----


@dataclass
class SplitConfig:
    out_dir: str
    train_ratio: float = field(metadata={"above": 0, "below": 1})
    seed: int = field(metadata={"at_least": 0})
    validation_ratio: float = field(metadata={"at_least": 0, "below": 1})
    materialize: str = field(metadata={"one_of": ("auto", "yes", "no")})

    @property
    def table(self) -> Path:
        return Path(self.out_dir) / SPLIT_TABLE


class Splits(NamedTuple):
    """The table of `write_identity_splits`: identities of each side, what it was made with, and its hash."""

    identities: dict[str, list[str]]  # "train", "val", "test"
    note: dict  # seed, train_ratio, validation_ratio, counts
    hash: str

    @property
    def hashes(self) -> list[str]:
        """Of this table and of the earlier states that it extends, in which each identity has the same side."""
        return [self.hash, *self.note.get("extends", [])]

    @property
    def trained(self) -> set[str]:
        """Identities that training may have used or chosen by."""
        return {*self.identities["train"], *self.identities["val"]}

    def __str__(self) -> str:
        return ", ".join(f"{len(ids)} {side}" for side, ids in self.identities.items()) + f" (table {self.hash})"


def collect_unique_identities(globs: str | Sequence[str], columns: Columns = COLUMNS) -> list[str]:
    """All identities in the files that match `globs`, as sorted strings. Reads no other column."""
    scans = (scan_identities(path, stamp(path), columns)[1] for path in find_files(globs))
    return sorted(set().union(*(scan.unique().to_pylist() for scan in scans)))


def assign_splits(
    identities: Iterable[str], train_ratio: float, seed: int, validation_ratio: float = 0.0, known: dict[str, str] | None = None
) -> dict[str, str]:
    """Identity -> train, val or test, decided by the order of hashes: the same on every machine and in every version.

    Exactly round(train_ratio * n) identities are on the train side, of which round(validation_ratio * that) are val. Those in
    `known` keep their side, and new ones fill the ratio as far as that allows.
    """
    sides = {str(name): side for name, side in (known or {}).items()}
    new = sorted(set(map(str, identities)) - sides.keys(), key=lambda identity: (digest(seed, identity), identity))
    train_side = round(train_ratio * (len(sides) + len(new)))
    validation = round(validation_ratio * train_side)
    for side, wanted in (("val", validation), ("train", train_side - validation)):
        missing = max(0, wanted - sum(s == side for s in sides.values()))
        sides.update(dict.fromkeys(new[:missing], side))
        new = new[missing:]
    return sides | dict.fromkeys(new, "test")


def read_identity_splits(path: str | Path) -> Splits:
    """Read a split table. Raises ValueError for a file that is not one, or that gives an identity two sides."""
    parquet = open_parquet(Path(path))
    found = parquet.schema_arrow.names
    if any(found.count(name) != 1 for name in ("identity_id", "split")):
        raise ValueError(f"{path}: not a split table, its columns are {found}; expected identity_id and split")
    names, sides = (read_strings(parquet, Path(path), name).to_pylist() for name in ("identity_id", "split"))
    if len(sides) != len(names) or len(set(names)) < len(names) or not set(sides) <= {"train", "val", "test"}:
        raise ValueError(f"{path}: a split table has each identity once, as train, val or test; delete it and run command=split")
    pairs = sorted(zip(names, sides, strict=True))
    identities = {side: [name for name, its in pairs if its == side] for side in ("train", "val", "test")}
    return Splits(identities, read_metadata(Path(path)), digest(*map("\t".join, pairs)))


def write_identity_splits(
    ids: Iterable[str], out_path: str | Path, train_ratio: float, seed: int, validation_ratio: float = 0.0,
    known: dict[str, str] | None = None, extends: Sequence[str] = (),
) -> Splits:  # fmt: skip
    """Decide the split of `ids` (see `assign_splits`) and write it as parquet: `identity_id`, `split`.

    The file notes seed, ratios, counts, and the hashes of the tables that it `extends`.
    """
    sides = dict(sorted(assign_splits(ids, train_ratio, seed, validation_ratio, known).items()))
    counts = {side: sum(s == side for s in sides.values()) for side in ("train", "val", "test")}
    if not counts["train"] or not counts["test"]:
        cure = "both train and test need at least one; give more data or another split.train_ratio"
        raise ValueError(f"{len(sides)} identities split into {counts}: {cure}")
    need_writable(Path(out_path).parent)
    note = {"seed": seed, "train_ratio": train_ratio, "validation_ratio": validation_ratio, "counts": counts, "extends": [*extends]}
    table = pa.table({"identity_id": list(sides), "split": list(sides.values())})
    with write_whole(Path(out_path)) as temporary:
        pq.write_table(table.cast(with_metadata(table.schema, note)), temporary, write_page_checksum=True)
    return read_identity_splits(out_path)


# ---- The index before the pixels ----


@dataclass(frozen=True)
class RowIndex:
    """Where the allowed rows are. A unit is a row group of a file."""

    files: list[pq.FileMetaData]
    paths: list[Path]
    stamps: list[tuple[int, int]]  # size and time of each file
    columns: list[Columns]  # of each file
    units: np.ndarray  # int32 [U, 2]: file, row group
    starts: np.ndarray  # int64 [U + 1]: allowed rows before each unit
    unit: np.ndarray  # int32 [N]: unit of each allowed row, ascending
    row: np.ndarray  # int32 [N]: row inside the unit
    place_in_file: np.ndarray  # int32 [N]: row inside the file
    marks: list[dict]  # of each file its name, and what tells whether it is still the same and what of it changed

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def fingerprint(self) -> str:
        """Of the files' rows, of their columns and of which rows are allowed; neither their names nor their folder count."""
        marks = ([value for key, value in mark.items() if key != "name"] for mark in self.marks)
        return digest(*([*mark, *vars(columns).values()] for mark, columns in zip(marks, self.columns, strict=True)))

    def place(self, i: int) -> tuple[Path, int]:
        """Path of the file and row in it, counted from 0, of row `i` of the index."""
        return self.paths[self.units[self.unit[i], 0]], int(self.place_in_file[i])

    def identities(self) -> list[str]:
        """The identity of each row: for figures about the data, never for training."""
        file = self.units[self.unit, 0]
        scans = (scan_identities(*told)[1] for told in zip(self.paths, self.stamps, self.columns, strict=True))
        return [name for n, scan in enumerate(scans) for name in scan.take(self.place_in_file[file == n]).to_pylist()]

    def image_bytes(self) -> int:
        """About how many bytes the images of these rows take, from the files' own figures."""
        groups = [self.files[number].row_group(group) for number, group in self.units.tolist()]
        total = sum(group.total_byte_size for group in groups)
        return total * len(self) // max(1, sum(group.num_rows for group in groups))


def mark_bytes(path: Path, size: int) -> str:
    """A digest of a file's size and of 4 kB at 64 places of it: it changes when the file is written with other pictures.

    Not when a few of them are replaced in place by others of the same size, such as BMPs.
    """
    with naming(path), open(path, "rb") as file:
        places = np.linspace(0, max(0, size - 4096), 64).astype(int).tolist()
        return digest(size, *(zlib.crc32(os.pread(file.fileno(), 4096, place)) for place in places))


def build_index(globs: str | Sequence[str], allowed_identities: Iterable[str] | None, columns: Columns = COLUMNS) -> RowIndex:
    """Index the rows whose identity is allowed (None: all), reading the identity column only.

    Raises ValueError if there is none.
    """
    paths, files, marks, parts, found = find_files(globs), [], [], [], []
    stamps, root = [stamp(path) for path in paths], os.path.commonpath([path.absolute().parent for path in paths])
    allowed = None if allowed_identities is None else pa.array([*map(str, allowed_identities)], pa.large_string())
    for number, (path, stamped) in enumerate(zip(paths, stamps, strict=True)):
        metadata, identities, theirs = scan_identities(path, stamped, columns)
        mask = np.ones(len(identities), bool)
        if allowed is not None:
            is_allowed = pc.is_in(identities.dictionary, value_set=allowed).to_numpy(zero_copy_only=False)
            mask = is_allowed[identities.indices.to_numpy()] if len(is_allowed) else mask
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        before = np.cumsum([0, *sizes])
        place = np.flatnonzero(mask).astype(np.int32)
        group = np.searchsorted(before, place, side="right") - 1
        parts.append(np.stack([np.full(len(place), number), group, place - before[group], place]).astype(np.int32))
        codes, known = identities.indices.to_numpy(), "\n".join(identities.dictionary.to_pylist())
        marks.append({
            "name": os.path.relpath(path, root), "rows": len(identities), "row groups": digest(*sizes),
            "people": digest(*map(zlib.crc32, (known.encode(), codes, place))), "bytes": mark_bytes(path, stamped[0]),
        })  # fmt: skip
        files.append(metadata)
        found.append(theirs)
    file, group, row, place = np.concatenate(parts, axis=1)
    if not len(row):
        raise ValueError(
            f"{paths[0].parent}: no row of {len(paths)} files has an allowed identity; is split.out_dir the table of other data?"
        )
    starts = np.flatnonzero((np.diff(file, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))  # first row of each unit
    unit = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff(starts, append=len(row)))
    units, starts = np.stack([file, group], axis=1)[starts], np.append(starts, len(row))
    return RowIndex(files, paths, stamps, found, units, starts, unit, row, place, marks)


SHARD_SCHEMA = pa.schema([("identity_id", pa.string()), ("image_filename", pa.string()), ("image_bytes", pa.binary())])


def read_unit(index: RowIndex, unit: int, rows: np.ndarray, names: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
    """Some rows of a unit (ascending numbers inside it), as columns `names` of SHARD_SCHEMA; `batch_rows` are read at a time.

    A picture without a name gets one here, its file and row: below the folder that all files share, `train/0000/17`.
    Raises ValueError for a damaged file, and for one that was replaced since it was indexed: its rows may be other people's.
    """
    (number, group), offset = index.units[unit].tolist(), 0
    path, schema = index.paths[number], pa.schema([SHARD_SCHEMA.field(name) for name in names])
    columns, first = index.columns[number], index.starts[unit]
    theirs = [column for name, column in zip(SHARD_SCHEMA.names, vars(columns).values(), strict=True) if name in names]
    before = int(index.place_in_file[first] - index.row[first])  # rows of the file before this row group
    with naming(f"{path} row group {group}"):
        if not path.exists() or stamp(path) != index.stamps[number]:
            raise ValueError(f"{path}: was replaced or removed since it was indexed; start again")
        parquet = open_parquet(path, index.files[number])
        for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=theirs, use_threads=False):
            inside = rows[(rows >= offset) & (rows < offset + len(batch))] - offset
            place, offset = before + offset, offset + len(batch)
            if len(inside):
                table = with_path_columns(pa.Table.from_batches([batch]), path).flatten().append_column("", pa.nulls(len(batch)))
                table = table.select(theirs).rename_columns(names)
                if "identity_id" in names:
                    people = scan_identities(path, index.stamps[number], columns)[1].slice(place, len(batch))
                    table = table.set_column(names.index("identity_id"), "identity_id", people.dictionary_decode())
                table = table.cast(schema)
                if "image_filename" in names and table["image_filename"].null_count:
                    stem, _ = os.path.splitext(index.marks[number]["name"])
                    made = pa.array([f"{stem}/{row}" for row in range(place, place + len(batch))])
                    made = pc.coalesce(table["image_filename"], made)
                    table = table.set_column(names.index("image_filename"), "image_filename", made)
                yield table if len(inside) == len(batch) else table.take(inside)
            if offset > rows[-1]:
                return
    raise ValueError(  # a damaged footer: pyarrow stops at the shortest column, without a word
        f"{path} row group {group}: ends at row {offset}, the index expects row {rows[-1]}; damaged; fetch it again or leave it out"
    )


def read_rows(
    index: RowIndex, places: np.ndarray | None = None, names: Sequence[str] = ("identity_id", "image_filename", "image_bytes")
) -> Iterator[pa.Table]:
    """The rows of the index, all or those at some ascending `places`, part of a row group at a time, as SHARD_SCHEMA."""
    places = np.arange(len(index)) if places is None else places
    for unit in np.unique(index.unit[places]).tolist():
        rows = index.row[places[slice(*np.searchsorted(places, index.starts[unit : unit + 2]))]]
        yield from read_unit(index, unit, rows, list(names), ROW_GROUP_ROWS)


def mark_files(index: RowIndex) -> list[dict]:
    """The marks of the files, each with a checksum of some pictures: MARKED_PICTURES of all files, of each at least one."""
    count, file, marks = len(index.marks), index.units[index.unit, 0], []
    for mark, (start, stop) in zip(index.marks, itertools.pairwise(np.searchsorted(file, np.arange(count + 1))), strict=True):
        places = np.arange(start, stop, 1 + (stop - start) * count // MARKED_PICTURES)  # whatever the row groups are
        tables = read_rows(index, places, ["image_bytes"])
        marks.append(mark | {"pictures": digest(*(data.as_py() for table in tables for data in table["image_bytes"]))})
    return marks


def changed_files(saved: list[dict], found: list[dict], plain: bool) -> list[str]:
    """What of a source's files, in their order, changed since they were marked, in words; names and compression may.

    plain: they are streamed plainly, in an order that depends on the row groups.
    """
    told = [f"{len(found)} files instead of {len(saved)}"] * (len(found) != len(saved))
    for old, new in zip(saved, found, strict=False):
        what = [kind for kind in ("rows", "people", "pictures", *["row groups"] * plain) if old[kind] != new[kind]]
        now = f", now {new['name']}," * (new["name"] != old["name"])
        told += [f"{old['name']}{now} differs in {', '.join(what)}"] * bool(what)
    return told


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows of SHARD_SCHEMA in tables of `rows` each, the last one shorter."""
    left = SHARD_SCHEMA.empty_table()
    for table in tables:
        left = pa.concat_tables([left, table])
        while len(left) >= rows:
            yield left.slice(0, rows)
            left = left.slice(rows)
    if len(left):
        yield left


# ---- Where the rows of one side of the split are ----


@dataclass
class DataConfig:
    digiface_glob: str
    digi2real_glob: str | None
    columns: Columns
    image_size: int = field(metadata={"at_least": 16, "at_most": 1024})
    workers: int | None = field(metadata={"at_least": 1, "at_most": 256})
    cache: str = field(metadata={"one_of": ("none", "decoded", "device")})
    cache_dir: str
    max_bad_fraction: float = field(metadata={"at_least": 0, "at_most": 1})
    max_image_pixels: int = field(metadata={"at_least": 1})
    shuffle_files: bool
    shuffle_buffer: int = field(metadata={"at_least": 0})
    batch_read_rows: int = field(metadata={"at_least": 1})


@dataclass
class Rows:
    """One side of the split: for each source the index of its rows."""

    indices: dict[str, RowIndex]
    tables: list[str]  # hash of the split table, and of the earlier states that it extends
    shards: bool  # materialised shards, which need no filter

    def __len__(self) -> int:
        return sum(map(len, self.indices.values()))


def find_sources(cfg: DataConfig) -> dict[str, list[Path]]:
    """The files of each source. Raises FileNotFoundError that tells a newcomer where the data comes from."""
    try:
        files = {"digiface": find_files(cfg.digiface_glob)}
        if cfg.digi2real_glob is not None:
            files["digi2real"] = find_files(cfg.digi2real_glob)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}.\nThe data is DigiFace-1M (github.com/microsoft/DigiFace1M) and Digi2Real (Idiap) as parquet, see README.md; "
            "set data.digiface_glob and data.digi2real_glob.\n"
            "To see everything work without data: uv run python sniperface.py experiment=demo"
        ) from error
    for source, paths in files.items():
        if len({"split" in read_metadata(path) for path in paths}) > 1:
            raise ValueError(
                f"data.{source}_glob matches shards of command=split and other files; give one kind, else rows count twice"
            )
    doubled = set.intersection(*({path.resolve() for path in paths} for paths in files.values())) if len(files) > 1 else set()
    if doubled:  # its pictures would be enrolled under one source and probed under the other
        raise ValueError(f"{min(doubled)}: matches both data.digiface_glob and data.digi2real_glob; give each source its own files")
    return files


def find_splits(data: DataConfig, cfg: SplitConfig, extend: bool = False) -> Splits:
    """The split table of the data, made if there is none. Raises ValueError for a table of another split or of other data.

    extend: add identities that the table lacks.
    """
    wanted = {"seed": cfg.seed, "train_ratio": cfg.train_ratio, "validation_ratio": cfg.validation_ratio}
    found = collect_unique_identities([path for paths in find_sources(data).values() for path in paths], data.columns)
    if not cfg.table.exists():
        splits = write_identity_splits(found, cfg.table, **wanted)
        log.info("%s: %s", cfg.table, splits)
        return splits
    splits = read_identity_splits(cfg.table)
    made_with = {key: splits.note.get(key) for key in wanted}
    if not splits.note:
        raise ValueError(f"{cfg.table}: not written by command=split, or by another program since; set another split.out_dir")
    if made_with != wanted:
        raise ValueError(f"{cfg.table} was made with {made_with}, asked for is {wanted}; set these, or another split.out_dir")
    known = {identity: side for side, identities in splits.identities.items() for identity in identities}
    new = [identity for identity in found if identity not in known]
    if len(new) == len(found):
        raise ValueError(f"{cfg.table} knows none of the {len(found)} identities of the data; set another split.out_dir")
    if new and not extend:
        log.warning("%s lacks %d identities of the data, which are left out; command=split adds them", cfg.table, len(new))
    if new and extend:
        splits = write_identity_splits(found, cfg.table, known=known, extends=splits.hashes, **wanted)
        log.info("%s: %d new identities: %s", cfg.table, len(new), splits)
    return splits


def index_shards(folder: Path, table: str, side: str) -> RowIndex:
    """The shards in a folder, all of them, of one split table and one side. Raises ValueError otherwise."""
    paths = find_files(f"{glob.escape(str(folder))}/*.parquet")
    notes = [read_metadata(path) for path in paths]
    if any((note.get("table"), note.get("split"), note.get("shards")) != (table, side, len(paths)) for note in notes):
        raise ValueError(f"{folder}: {len(paths)} files, not the {side} shards of table {table}; delete it and run command=split")
    return build_index(paths, None)


def find_shards_given(files: dict[str, list[Path]], notes: dict[str, dict], side: str) -> Rows:
    """The globs name shards: those, or the ones of another side beside them. Raises ValueError for a part of them."""
    tables = {note.get("table") for note in notes.values()}
    if len(tables) != 1:
        raise ValueError(f"{files}: shards of different split tables {tables}; materialise both sources with one command=split")
    for source, paths in files.items() if side == "train" else ():
        given, count = notes[source].get("split"), notes[source].get("shards")
        if given != "train" or len(paths) != count:
            raise ValueError(f"{paths[0].parent}: {len(paths)} {given} shards; train on all of .../train/{source}")
    folders = {source: paths[0].parent.parent.parent / side / paths[0].parent.name for source, paths in files.items()}
    table = tables.pop()
    return Rows({source: index_shards(folder, table, side) for source, folder in folders.items()}, [table], True)


def find_rows(data: DataConfig, split: SplitConfig, side: str, shards: bool | None = None) -> Rows:
    """The rows of one side of the split: in shards that the globs name, in materialised ones, or in the data, filtered.

    shards: whether materialised ones must be used (True) or not be used (False). Raises ValueError for shards of another side or
    split.
    """
    files = find_sources(data)
    notes = {source: read_metadata(paths[0]) for source, paths in files.items()}
    if any("split" in note for note in notes.values()):
        return find_shards_given(files, notes, side)
    splits = find_splits(data, split)
    if not splits.identities[side]:
        raise ValueError(f"{split.table}: nobody is on its {side} side; raise split.validation_ratio and set another split.out_dir")
    indices = {source: build_index(paths, splits.identities[side], data.columns) for source, paths in files.items()}
    folders = {source: Path(split.out_dir) / side / source for source in files}
    if shards is not False and all(folder.is_dir() for folder in folders.values()):
        made = {s: next(map(read_metadata, sorted(folder.glob("*.parquet"))), {}) for s, folder in folders.items()}
        of_table = all(note.get("table") == splits.hash for note in made.values())
        of_data = all(made[source].get("source") == index.fingerprint for source, index in indices.items())
        if of_table and (of_data or shards):  # who knows their shards need not know what they were made from
            found = {source: index_shards(folder, splits.hash, side) for source, folder in folders.items()}
            return Rows(found, splits.hashes, True)
        log.warning("%s: materialised from other data or another split; not used", Path(split.out_dir) / side)
    if shards:
        raise ValueError(f"{split.out_dir}: the shards that the run was started on are gone; command=split makes them")
    return Rows(indices, splits.hashes, False)


def find_given_rows(pattern: str, columns: Columns) -> Rows:
    """All rows of the files that match, as a source called "file"."""
    return Rows({"file": build_index(pattern, None, columns)}, [], False)


# ---- Materialised shards: the split as files ----


@contextmanager
def shard_writer(path: Path, note: dict) -> Iterator[pq.ParquetWriter]:
    """A file of SHARD_SCHEMA, images uncompressed: they are compressed already."""
    packing = {
        "compression": {"identity_id": "zstd", "image_filename": "zstd", "image_bytes": "none"},
        "use_dictionary": ["identity_id"], "write_statistics": ["identity_id"], "write_page_checksum": True,
    }  # fmt: skip
    with write_whole(path) as temporary, pq.ParquetWriter(temporary, with_metadata(SHARD_SCHEMA, note), **packing) as writer:
        yield writer


def write_shard(path: Path, table: pa.Table, note: dict) -> None:
    """Write a table of SHARD_SCHEMA as row groups of ROW_GROUP_ROWS."""
    with shard_writer(path, note) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)


def scatter_rows(index: RowIndex, shard_of: np.ndarray, folder: Path, bar: tqdm) -> None:
    """First pass: each row to the bucket of its shard, with its place in the index beside it."""
    folder.mkdir()
    schema, done = SHARD_SCHEMA.append(pa.field("number", pa.int64())), 0
    with naming_output(folder), ExitStack() as stack:
        buckets = [folder / f"{shard:05d}.arrow" for shard in range(int(shard_of.max()) + 1)]
        writers = [stack.enter_context(pa.ipc.new_stream(str(bucket), schema)) for bucket in buckets]
        for table in read_rows(index):
            numbers = np.arange(done, done + len(table))
            table, shards = table.append_column("number", pa.array(numbers)), shard_of[numbers]
            for shard in np.unique(shards).tolist():
                writers[shard].write_table(table.take(np.flatnonzero(shards == shard)).combine_chunks())
            done += len(table)
            bar.update(len(table))


def sort_bucket(path: Path, order: np.ndarray, rows: int) -> pa.Table:
    """Second pass: the `rows` rows of one shard in the global order. Raises ValueError for a bucket that lost some."""
    with naming(path):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    if len(table) != rows:  # a stream that was cut between two messages, as by a power cut, reads without an error
        raise ValueError(f"{path}: holds {len(table)} of {rows} rows; delete {path.parent} and run the command again")
    return table.take(np.argsort(order[table["number"].to_numpy()])).drop_columns("number")


def write_side(index: RowIndex, out_dir: Path, names: list[str], note: dict) -> None:
    """Write the shards `names` with `note` into a folder beside `out_dir`, which takes its place when all are there."""
    part, rows = out_dir.with_name(f".{out_dir.name}.part"), len(index)
    marker, buckets = part / "note.json", part / "buckets"
    foreign = [p.name for p in out_dir.glob("*") if not re.fullmatch(re.escape(out_dir.name) + r"_\d{5}\.parquet", p.name)]
    if foreign:
        raise ValueError(f"{out_dir}: holds {foreign[:3]}, which is not ours to delete; choose another split.out_dir")
    if not marker.exists() or json.loads(marker.read_text()) != note:  # of another split, or none
        shutil.rmtree(part, ignore_errors=True)
        need_space(part, 2 * index.image_bytes() * 11 // 10, f"materialising {rows} {note['split']} images")
        write_text(marker, json.dumps(note))
    order = np.arange(rows)
    if note["split"] == "train":
        order = np.random.default_rng(draw_seed(0, "materialize", rows)).permutation(rows)
    shard_of = order // note["shard_rows"]
    missing = [n for n, name in enumerate(names) if not (part / name).exists()]

    def write(n: int) -> int:
        table = sort_bucket(buckets / f"{n:05d}.arrow", order, int((shard_of == n).sum()))
        write_shard(part / names[n], table, note)
        return len(table)

    with progress(total=2 * rows, desc=f"{note['split']}/{out_dir.name}", unit="image") as bar:
        bar.update(int((~np.isin(shard_of, missing)).sum()))
        if missing and not buckets.exists():
            shutil.rmtree(part / "dealing", ignore_errors=True)
            scatter_rows(index, shard_of, part / "dealing", bar)
            os.replace(part / "dealing", buckets)
        with ThreadPoolExecutor(2) as pool:  # one sorts while the other waits for the disk: 1.26 times as fast
            for done in pool.map(write, missing):
                bar.update(done)
    shutil.rmtree(buckets, ignore_errors=True)
    marker.unlink()
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(part, out_dir)
    sync_folder(out_dir.parent)


def materialize_split(
    input_glob: str | Sequence[str], splits_table: str | Path, out_dir: str | Path, split_name: str, columns: Columns = COLUMNS
) -> list[Path]:
    """Write the rows of one side of the split as parquet shards below `out_dir`, images byte for byte; give the shards' paths.

    Train shards are in one globally shuffled order, so that reading them in sequence is as good as a permutation: a first pass
    deals the rows to buckets, a second one sorts each bucket in memory. The folder appears whole or not at all; a stopped run
    goes on with the shards that it had finished, a finished one is left as it is; of two processes, one writes and the other
    waits. Raises OSError where the disk has no room.
    """
    out_dir, splits = Path(out_dir), read_identity_splits(splits_table)
    index = build_index(input_glob, splits.identities[split_name], columns)
    rows = -(-len(index) // min(len(index), -(-index.image_bytes() // SHARD_BYTES)))
    names = [f"{out_dir.name}_{shard:05d}.parquet" for shard in range(-(-len(index) // rows))]
    note = {"split": split_name, "table": splits.hash, "source": index.fingerprint, "rows": len(index), "shards": len(names)}
    note["shard_rows"] = rows
    need_writable(out_dir.parent)
    with locked(out_dir.with_name(f".{out_dir.name}.lock"), wait=True):
        if not out_dir.exists() or not all((out_dir / n).exists() and read_metadata(out_dir / n) == note for n in names):
            write_side(index, out_dir, names, note)
    return [out_dir / name for name in names]


# ---- Decoding ----

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")  # the last two where Pillow was built with them
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # upright again, by EXIF's orientation
MID_GREY = 128  # behind transparent pixels
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # of a text or profile; Pillow's own limit refuses pictures with long notes


NOTES = (  # how a file begins, the length of a part of it by its first 4 bytes, and how parts begin that its pixels do not need
    (b"\x89PNG\r\n\x1a\n", lambda head: 12 + int.from_bytes(head), re.compile(rb".{4}(?!tRNS|eXIf)[a-z]", re.DOTALL)),
    (
        b"\xff\xd8",  # all from the pixels on is one part; some notes are only in the way where they are too short
        lambda head: 2 + int.from_bytes(head[2:]) if head[1:2] not in b"\xda\xff" else sys.maxsize,
        re.compile(rb"\xff(\xfe|[\xe1-\xed\xef](?!..Exif)|[\xe0\xee].{0,13}$)", re.DOTALL),
    ),
)
TIFF_NOTES = {269, 270, 271, 272, 282, 283, 285, 296, 297, 305, 306, 315, 316, *range(700, 1 << 16)}  # numbers of tags


def without_notes(data: bytes) -> bytes:
    """A picture without the notes that its pixels do not need, in the formats where broken ones are in the way."""
    if kind := {b"ftyp": b"Exif", b"jP  ": b"res "}.get(data[4:8]):  # AVIF, JPEG 2000
        return data.replace(kind, b"none", 1)  # the kind of an item, named before all pixels
    if order := {b"II*\0": "little", b"MM\0*": "big"}.get(data[:4]):
        at = int.from_bytes(data[4:8], order)  # of the list of tags: how many, 12 bytes each, and where the next list is
        end = at + 2 + 12 * int.from_bytes(data[at : at + 2], order)
        tags = [data[i : i + 12] for i in range(at + 2, end, 12) if int.from_bytes(data[i : i + 2], order) not in TIFF_NOTES]
        short = b"".join([len(tags).to_bytes(2, order), *tags, data[end : end + 4]])
        return data[:at] + short + data[at + len(short) :]
    for begins, length, note in NOTES:
        if data.startswith(begins):
            at, kept = len(begins), [begins]
            while at < len(data):
                part = data[at : at + length(data[at : at + 4])]
                kept += [] if note.match(part) else [part]
                at += len(part)
            return b"".join(kept)
    return data


DECODING = 1  # to be raised when `decode_image` gives other pixels: part of the names of caches


def decode_image(data: bytes | memoryview, size: int, max_pixels: int) -> np.ndarray:
    """Encoded image -> RGB uint8 [size, size, 3]; a picture that is not square is cropped to its centre. Raises ValueError.

    Floats must be in 0..1, integers in 0..255 or 0..65535; transparent pixels lie on mid-grey; broken metadata is passed over.
    By Pillow: torchvision's decoder ends the process on a damaged PNG.
    """
    try:
        return decode_whole(data, size, max_pixels)
    except ValueError:
        bare = without_notes(bytes(data))
        if bare == data:
            raise
        return decode_whole(bare, size, max_pixels)


DEEP = re.compile(r"(RGB.?;16|LA;16)([BLN])")  # Pillow's layouts of 16 bits a colour, of which it keeps the high bytes


def low_bytes(data: bytes | memoryview) -> Image.Image:
    """A picture of 16 bits a colour by its low bytes: read as if they stood in the other order. Raises ValueError for LA."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if any("LA;16" in str(tile.args) for tile in image.tile):  # Pillow reads it in one order alone
        raise ValueError("grey with alpha of 16 bits, all in 0..255: store it in 8 bits")
    native = "B" if sys.byteorder == "little" else "L"
    for n, tile in enumerate(image.tile):
        layout, *more = (tile.args,) if isinstance(tile.args, str) else tile.args
        layout = DEEP.sub(lambda found: found[1] + {"B": "L", "L": "B", "N": native}[found[2]], layout)
        image.tile[n] = tile._replace(args=(layout, *more))
    image.load()
    return image


def decode_whole(data: bytes | memoryview, size: int, max_pixels: int) -> np.ndarray:
    """As `decode_image`, but for metadata that Pillow cannot read past."""
    if not len(data):
        raise ValueError("no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_image_pixels={max_pixels}")
            deep = any(DEEP.search(str(tile.args)) for tile in image.tile)
            image.load()  # before the metadata, which for some formats stands behind the pixels
            if deep and not any(highest for _, highest in image.getextrema()[:3]):  # all values are in 0..255
                image = low_bytes(data)
            turn = None
            with suppress(Exception):  # broken metadata is no fault of the pixels; a TIFF is turned already
                turn = TURNS.get(image.getexif().get(0x0112))
            image = image if turn is None else image.transpose(turn)
            if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip
                wide, clear = np.asarray(image), image.info.get("transparency")
                top = 1 if image.mode == "F" else 255 if wide.max() <= 255 else 65535
                if not (wide.min() >= 0 and wide.max() <= top):
                    raise ValueError(f"values from {wide.min()} to {wide.max()}: floats must be in 0..1, integers in 0..65535")
                image = Image.fromarray(np.where(wide == clear, MID_GREY, (wide * (255 / top)).round()).astype(np.uint8))
            if image.has_transparency_data:  # the colour that is hidden under alpha 0 is nobody's
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (MID_GREY, MID_GREY, MID_GREY, 255)), image)
            image = image if image.mode == "RGB" else image.convert("RGB")
            return np.asarray(image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except MemoryError:  # not the picture's fault
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture of a format that is read: it begins with {bytes(data[:8])!r}") from error
    except Exception as error:  # Pillow raises a dozen types on damaged files; each of them means the same here
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error


class BadImages:
    """Counts the broken ones of `whole` images, each once, names the first in the log, and ends the run when they are too many."""

    def __init__(self, max_fraction: float, whole: int, instead: str):
        self.max_fraction, self.whole, self.instead, self.lock = max_fraction, whole, instead, threading.Lock()
        self.found: dict[tuple[Path, int], str] = {}  # why, by file and row

    def add(self, path: Path, row: int, reason: str) -> None:
        """Note a broken image. Raises ValueError where those found are more than the allowed fraction of the whole."""
        with self.lock:
            if (path, row) not in self.found and len(self.found) < 10:
                log.warning("%s row %d: broken image (%s); %s", path, row, reason, self.instead)
            limit = self.max_fraction * self.whole
            if len(self.found) <= limit:  # later, other threads tell of the same end
                self.found.setdefault((path, row), reason)
            if len(self.found) > limit:
                (path, row), reason = next(iter(self.found.items()))
                raise ValueError(
                    f"{len(self.found)} of {self.whole} images are broken, more than data.max_bad_fraction={self.max_fraction}; "
                    f"the first: {path} row {row} ({reason})"
                )


def attempt(function: Callable, *arguments: object) -> object:
    """What `function` gives, or the ValueError that it raises: for work whose failures are counted by those who asked for it."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


def map_ahead(function: Callable, parts: Iterable[tuple], workers: int | None) -> Iterator[tuple]:
    """For each (part, items) the part and an `attempt` at each item, by threads that are two parts ahead of the caller."""
    ahead: deque[tuple] = deque()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for part, items in parts:
            ahead.append((part, pool.map(functools.partial(attempt, function), items)))
            if len(ahead) > 2:
                yield ahead.popleft()
        yield from ahead


def decoded_rows(index: RowIndex, cfg: DataConfig, batch_rows: int) -> Iterator[tuple[pa.Table, Tensor]]:
    """Rows in the order of the files, as `identity_id`, `image_filename`, `image_hash`, and their pictures uint8 [n, 3, S, S].

    Broken pictures are left out, named and counted; too many raise ValueError.
    """
    bad, done = BadImages(cfg.max_bad_fraction, len(index), "it is left out"), 0

    def decode(data: pa.Scalar) -> np.ndarray:
        return decode_image(data.as_buffer() or b"", cfg.image_size, cfg.max_image_pixels)

    parts = ((table, table["image_bytes"]) for table in regroup(read_rows(index), batch_rows))
    for table, pictures in map_ahead(decode, parts, cfg.workers):
        good = {}
        for i, picture in enumerate(pictures):
            if isinstance(picture, ValueError):
                bad.add(*index.place(done + i), str(picture))
            else:
                good[i] = picture
        stack = np.stack([*good.values()]) if good else np.empty((0, 1, 1, 3), np.uint8)
        kept, done = table.take(np.array([*good], np.int64)), done + len(table)
        hashes = pa.array(map(image_hash, kept["image_bytes"]), pa.int64())
        yield kept.drop_columns("image_bytes").append_column("image_hash", hashes), torch.from_numpy(stack).permute(0, 3, 1, 2)


def image_hash(data: pa.BinaryScalar) -> int:
    """A number that equal bytes share and others do not, by which eval finds pictures that stand in two places."""
    return int.from_bytes(hashlib.blake2b(data.as_buffer() or b"", digest_size=8).digest(), signed=True)


def count_pictures(rows: Rows, hashes: set[int]) -> int:
    """How many of the pictures, by `image_hash`, stand byte for byte in `rows`, under whatever name; reads all of those."""
    found: set[int] = set()
    with progress(total=len(rows), desc="looking for these pictures in train", unit="image", leave=False) as bar:
        for table in itertools.chain.from_iterable(read_rows(index, names=["image_bytes"]) for index in rows.indices.values()):
            found |= hashes.intersection(map(image_hash, table["image_bytes"]))
            bar.update(len(table))
    return len(found)


def read_names(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Identity, file name and key (source and file name) of each row, as a table of vectors of them has them; str [N] each."""
    names, files, keys = [], [], []
    for source, index in rows.indices.items():
        for table in read_rows(index, names=SHARD_SCHEMA.names[:2]):
            names += table["identity_id"].to_pylist()
            files += table["image_filename"].to_pylist()
        keys += [f"{source}/{file}" for file in files[len(keys) :]]
    return np.array(names, str), np.array(files, str), np.array(keys, str)


def examine(data: bytes | memoryview, cfg: DataConfig) -> tuple[str, str, str]:
    """Format, size and mode of an encoded picture. Raises ValueError where training would find it broken."""
    decode_image(data, cfg.image_size, cfg.max_image_pixels)
    with Image.open(io.BytesIO(without_notes(bytes(data))), formats=FORMATS) as image:
        return image.format, f"{image.width} x {image.height}", image.mode


def sample_pictures(rows: Rows, cfg: DataConfig, count: int = 64) -> dict:
    """What some pictures of each source are, evenly over its rows: formats, sizes, and file, row and reason of broken ones."""
    formats, sizes, broken = Counter(), Counter(), []
    for index in rows.indices.values():
        places = np.unique(np.linspace(0, len(index) - 1, count).astype(int))
        pictures = (data for table in read_rows(index, places, ["image_bytes"]) for data in table["image_bytes"])
        for place, data in zip(places.tolist(), pictures, strict=True):
            try:
                kind, size, _ = examine(data.as_buffer() or b"", cfg)
                formats[kind] += 1
                sizes[size] += 1
            except ValueError as error:
                broken.append("{} row {}: {}".format(*index.place(place), error))
    return {"decoded": formats.total(), "formats": dict(formats), "sizes": dict(sizes), "broken": broken}


def find_pictures(rows: Rows, wanted: set[tuple[str, str, str]], cfg: DataConfig) -> dict[tuple[str, str, str], np.ndarray]:
    """Decode those pictures (source, file name, identity) of `rows` that are wanted, uint8 [S, S, 3] each."""
    found, people = {}, [identity for _, _, identity in wanted]
    for source, index in rows.indices.items():
        for table in read_rows(index, np.flatnonzero(np.isin(index.identities(), people))):
            for identity, name, data in zip(*(table[column] for column in SHARD_SCHEMA.names), strict=True):
                key = (source, name.as_py(), identity.as_py())
                if key in wanted:
                    found[key] = decode_image(data.as_buffer(), cfg.image_size, cfg.max_image_pixels)
    return found


# ---- Packing: pictures in folders and archives, and benchmarks of pairs, as parquet ----

SHARD_WINDOWS = 16  # windows of a shard, about 1 GB
WINDOW_BYTES = 64 << 20  # held at a time; a compressed tar is read anew from its beginning for what lies further back
GROUP_BYTES = 16 << 20  # of a row group
MAX_FILE_BYTES = 64 << 20  # of a picture: as many pixels as one may have, uncompressed
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|7z|rar|gz|bz2|xz)$", re.IGNORECASE)
KNOWN_SOURCES = {  # known by the names of archives or of what is packed: identities, images
    "DigiFace-1M": (r"digiface|subjects_\d+-\d+_\d+_imgs", 109_999, 1_219_995), "Digi2Real": (r"digi2real", 20_000, 399_355),
}  # fmt: skip


@dataclass
class PackConfig:
    source: list[str]
    benchmark: str | None
    pairs: str | None
    out: str | None


naming_archive = functools.partial(naming, what="cannot be read as a folder, zip or tar", errors=Exception)  # of a dozen types


class Member(tarfile.TarInfo):
    """An entry of a tar, or a header that is longer than any name or attribute, which tarfile would read whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.size > 1 << 20 and self.type in headers:
            raise ValueError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)


@functools.lru_cache(maxsize=2)  # the directory of 144,000 entries takes a second to read
def open_archive(path: Path) -> zipfile.ZipFile | tarfile.TarFile:
    with suppress(tarfile.ReadError):  # first, since a tar that ends with a zip passes for a zip
        return tarfile.open(path, tarinfo=Member)
    return zipfile.ZipFile(path)


def list_entries(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of each file in a folder, zip or tar: name, size in bytes (-1 for links and devices), place, and its time or checksum.

    Raises ValueError for what cannot be read to its end.
    """

    def refuse(error: OSError) -> None:
        raise error

    with naming_archive(path):
        if path.is_dir():
            for folder, folders, names in os.walk(path, onerror=refuse):
                links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
                for file in (Path(folder, name) for name in (*links, *names)):
                    size, time = stamp(file) if file.is_file() else (-1, 0)
                    yield str(file.relative_to(path)), size, 0, time
        elif isinstance(archive := open_archive(path), zipfile.ZipFile):
            entries = enumerate(archive.infolist())
            yield from ((info.filename, info.file_size, n, info.CRC) for n, info in entries if not info.is_dir())
        else:
            for member in archive:
                archive.members = []  # else it keeps them all
                if not member.isdir():
                    size = member.size if member.isreg() and not member.issparse() else -1
                    yield member.name, size, member.offset_data, int(member.mtime)
            archive.fileobj.seek(archive.offset)
            if not (rest := archive.fileobj.read(1 << 20)) or any(rest):  # tarfile ends at a damaged header without a word
                raise ValueError(f"damaged or cut at byte {archive.offset}")


def read_entry(path: Path, name: str, size: int, place: int) -> bytes:
    """The bytes of an entry of `list_entries`, no more than it claims. Raises ValueError for one that is damaged."""
    with naming_archive(path / name):
        if path.is_dir():
            with open(path / name, "rb") as file:
                return file.read(size)
        archive = open_archive(path)
        if isinstance(archive, tarfile.TarFile):
            archive.fileobj.seek(place)
            return archive.fileobj.read(size)
        info = archive.infolist()[place]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are unpacked without a bound
            raise ValueError("neither stored nor deflated: pack the zip anew")
        with archive.open(info) as file:
            return file.read(size)


def why_not_packed(parts: list[str], size: int) -> str:
    """Why an entry, by its path and the size that it claims, is no picture `<identity>/<file>`; empty if it is one."""
    reasons = {
        "a path that leads elsewhere": ".." in parts or not all(parts) or parts[0].endswith(":"),
        "a link or a device": size < 0,
        "hidden": parts[-1].startswith(".") or "__MACOSX" in parts,
        "an archive within: unpack it, and name it in pack.source": ARCHIVE.search(parts[-1]),
        "no picture by its name": not PICTURE.search(parts[-1]),
        f"larger than {MAX_FILE_BYTES >> 20} MB": size > MAX_FILE_BYTES,
        "in no identity's folder": len(parts) < 2,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def printable(name: str) -> str:
    """A name of a file without what a terminal or a table cannot hold."""
    return ascii(name)[1:-1]


def list_pictures(paths: Sequence[Path]) -> tuple[pa.Table, dict[str, list[str]]]:
    """The pictures `<identity>/<file>` in folders and archives, at any depth, sorted, numbers in names by their value.

    A row each: `source` (number of the path), `name` (bytes), `size`, `place`, `mark`, `identity`, `file`. Gives also the names of
    all other entries, by reason. Raises ValueError where there is no picture.
    """
    names = ["source", "name", "size", "place", "mark", "identity", "file", "person", "picture"]
    tables, left_out, homes = [], {}, defaultdict(set)  # the folders in which an identity's own lie
    for source, path in enumerate(paths):
        rows = []
        for name, size, place, mark in list_entries(path):
            parts = [part.encode(errors="backslashreplace").decode() for part in re.split(r"[/\\]", name) if part != "."] or [""]
            if why := why_not_packed(parts, size):
                left_out.setdefault(why, []).append(printable(f"{path}: {name}"))
                continue
            by_value = (re.sub(r"\d+", lambda number: number[0].zfill(20), part) for part in parts[-2:])
            rows.append((source, os.fsencode(name), size, place, mark, *parts[-2:], *by_value))
            homes[parts[-2]].add((source, *parts[:-2]))
        if rows:
            tables.append(pa.table(list(map(pa.array, zip(*rows, strict=True))), names))
    if not tables:
        found = "; ".join(f"{why}: {entries[:3]}" for why, entries in left_out.items()) or "nothing"
        raise ValueError(f"{paths[0]}: no pictures laid out as <identity>/<file>, but {found}")
    if several := [printable(identity) for identity, its in homes.items() if len(its) > 1]:
        told = "%d identities, such as %s, have a folder in several places: each is taken to be one person"
        log.warning(told, len(several), several[0])
    order = ("person", "identity", "picture", "file", "source", "place", "name")
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in order]).select(names[:7]), left_out


def read_pictures(
    paths: Sequence[Path], windows: Iterable[pa.Table], counts: dict[str, Counter], cfg: DataConfig, bar: tqdm
) -> Iterator[pa.Table]:
    """Windows of `list_pictures` as tables of SHARD_SCHEMA, without broken and doubled ones; `counts` what is in them.

    Of pictures that share their identity and name, equal bytes are doubled, others get a name of their own.
    """

    def read_windows() -> Iterator[tuple[list[dict], list[bytes | ValueError]]]:
        for window in windows:
            rows = window.to_pylist()
            for row in sorted(rows, key=lambda row: (row["source"], row["place"])):  # as they lie in the archives
                row["data"] = attempt(read_entry, paths[row["source"]], os.fsdecode(row["name"]), row["size"], row["place"])
            yield rows, [row["data"] for row in rows]

    def look(data: bytes | ValueError) -> tuple[str, str, str]:
        if isinstance(data, ValueError):
            raise data
        return examine(data, cfg)

    def finish(rows: list[dict], found: Iterable[tuple[str, str, str] | ValueError]) -> pa.Table:
        kept, held = [], defaultdict(list)
        for row, told in zip(rows, found, strict=True):
            place, identity, file = f"{paths[row['source']]}: {os.fsdecode(row['name'])}", row["identity"], row["file"]
            others = held[identity, file]
            if isinstance(getattr(row["data"], "__cause__", None), OSError) and row["data"].__cause__.errno:
                raise row["data"]  # the disk is broken, not the picture
            if isinstance(told, ValueError):
                counts["broken"][f"{printable(place)}: {first_line(told)}"] += 1
            elif row["data"] in others:
                counts["doubled"][printable(place)] += 1
            else:
                stem, suffix = os.path.splitext(file)
                file = f"{stem}~{len(others) + 1}{suffix}" if others else file
                kept.append({"identity_id": identity, "image_filename": file, "image_bytes": row["data"]})
                others.append(row["data"])
                counts["sizes"][told[1]] += 1
                counts["modes"][told[2]] += 1
        bar.update(len(rows))
        return pa.Table.from_pylist(kept, SHARD_SCHEMA)

    yield from itertools.starmap(finish, map_ahead(look, read_windows(), cfg.workers))  # which keeps no window


def describe_packed(files: Sequence[Path], left_out: dict[str, list[str]]) -> tuple[list[int], str]:
    """Numbers of identities and of images in packed files, and lines that tell more of them."""
    counts, images = defaultdict(Counter), Counter()
    for path in files:
        metadata, identities, _ = scan_identities(path, stamp(path), COLUMNS)
        images.update(identities.dictionary_decode().to_pylist())
        for what, found in json.loads(metadata.metadata[b"sniperface.packed"]).items():
            counts[what].update(found)

    def some(names: list[str]) -> str:
        return ", ".join(names[:5] + [f"{len(names) - 5} others"] * (len(names) > 5))

    each, size = sorted(images.values()) or [0], sum(path.stat().st_size for path in files) / 1e9
    lines = [f"{len(images)} identities of {each[0]} to {each[-1]} images, {sum(each)} images, {size:.2f} GB in {len(files)} files"]
    lines += [f"{what}: {some([f'{kind} ({n})' for kind, n in counts[what].most_common()])}" for what in ("sizes", "modes")]
    left_out = {"broken": list(counts["broken"]), "doubled": list(counts["doubled"]), **left_out}
    lines += [f"left out, {why} ({len(names)}): {some(names)}" for why, names in left_out.items() if names]
    return [len(images), sum(each)], "\n".join(lines)


def keep_others(files: Iterable[Path], note: dict) -> None:
    """Raise ValueError for files that are there and do not bear `note`: they would be written over, or mixed with others."""
    for path in files:
        if path.exists() and read_metadata(path) != note:
            raise ValueError(f"{path}: is there, and not packed from these pictures; delete it or choose another pack.out")


def cut_shards(table: pa.Table, one: bool) -> list[list[pa.Table]]:
    """The rows of `list_pictures` as shards, `one` or of SHARD_WINDOWS windows; equal names of a person are in one window."""
    again = [pc.equal(table[name].slice(1), table[name].slice(0, len(table) - 1)).to_numpy() for name in ("identity", "file")]
    again = np.append(False, again[0] & again[1])  # whether a row has the name of the one before
    sizes, first = table["size"].to_numpy(), np.maximum.accumulate(np.where(again, 0, np.arange(len(table))))
    window, shards = (np.cumsum(sizes) - sizes)[first] // WINDOW_BYTES, defaultdict(list)
    starts = np.flatnonzero(np.diff(window, prepend=-1)).tolist()
    for start, stop in itertools.pairwise([*starts, len(table)]):
        shards[0 if one else window[start] // SHARD_WINDOWS].append(table.slice(start, stop - start))
    return list(shards.values())


def pack(sources: str | Sequence[str], out: Path, cfg: DataConfig, one_file: bool = False) -> list[Path]:
    """Pack the pictures `<identity>/<file>` of folders, zips and tars, byte for byte, as `out`_000.parquet, ...; give the paths.

    Nothing is unpacked to the disk. Sorted by identity and name; a stopped run goes on with the shards that it had finished.
    Memory: three windows of WINDOW_BYTES, and some 600 bytes an entry. one_file: all as `out`.parquet. Raises ValueError where
    there is no picture, and for files of other pictures in the way.
    """
    paths = sorted({*map(Path, find_matches(sources))}, key=lambda path: (path.name, str(path)))
    table, left_out = list_pictures(paths)
    files = {
        out.with_name(f"{out.name}{'' if one_file else f'_{n:03d}'}.parquet"): windows
        for n, windows in enumerate(cut_shards(table, one_file))
    }
    note = {"pack": digest(cfg.max_image_pixels, *(zlib.crc32(repr(b.to_pydict()).encode()) for b in table.to_batches(10_000)))}
    with locked(out.with_name(f".{out.name}.lock"), wait=True), progress(total=len(table), desc="packing", unit="image") as bar:
        ours = re.compile(re.escape(out.name) + r"_\d{3,}\.parquet").fullmatch
        keep_others(files if one_file else filter(lambda path: ours(path.name), sorted(out.parent.iterdir())), note)
        missing = {path: windows for path, windows in files.items() if not path.exists()}
        sizes = [size for windows in missing.values() for window in windows for size in window["size"].to_pylist()]
        need_space(out.parent, sum(sizes) * 101 // 100, f"packing {len(table)} pictures")
        bar.update(len(table) - len(sizes))
        for path, windows in missing.items():
            counts = defaultdict(Counter)
            with shard_writer(path, note) as writer:
                for part in filter(len, read_pictures(paths, windows, counts, cfg, bar)):
                    writer.write_table(part, row_group_size=1 + len(part) * GROUP_BYTES // max(GROUP_BYTES, part.nbytes))
                writer.add_key_value_metadata({"sniperface.packed": json.dumps(counts)})
    open_archive.cache_clear()
    found, told = describe_packed([*files], left_out)
    if not found[1]:
        for path in files:
            path.unlink()
        raise ValueError(f"{paths[0]}: not one picture can be read: {told}")
    log.info("%s: %s", f"{out}{'' if one_file else '_*'}.parquet", told)
    for name, (pattern, *wanted) in KNOWN_SOURCES.items():
        if found != wanted and any(re.search(pattern, path.name, re.IGNORECASE) for path in (out, *paths)):
            told = "%s has %d identities and %d images, here are %d and %d: %+d and %+d"
            log.warning(told, name, *wanted, *found, found[0] - wanted[0], found[1] - wanted[1])
    return [*files]


class Inert:
    """Stands in a pickle for whatever it makes of numpy: keeps the parts and does nothing."""

    def __init__(self, *parts: object):
        self.parts = parts

    def __setstate__(self, state: tuple) -> None:
        self.parts = state


class BinUnpickler(pickle._Unpickler):  # the one in Python: in C's a number in the file can ask for 64 GB
    """Reads bytes, numbers and lists. No name in the file is ever looked up, so nothing in it can run.

    Of the common files only LFW's is of plain bytes; the others hold arrays. The names by which these, and the bytes of old
    protocols, are pickled stand for `Inert` and for a change of text to bytes; any other name is refused.
    """

    dispatch = pickle._Unpickler.dispatch.copy()

    def load_bytearray8(self) -> None:  # the original makes as much room as the file claims
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin-1")
        if module.split(".")[0] == "numpy" and name in ("ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar"):
            return Inert
        raise ValueError(f"asks for {module}.{name}, which a file of pictures does not need")


def read_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """The encoded pictures, two a pair, of an insightface `.bin`, and for each pair whether it is of one person."""

    def as_bytes(value: object) -> bytes:  # an array's own bytes stand among its parts
        parts = value.parts if isinstance(value, Inert) else (value,)
        return bytes(next(part for part in parts if isinstance(part, bytes | bytearray)))

    try:
        pictures, same = BinUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pictures = [as_bytes(picture) for picture in pictures]
        same = [as_bytes(one)[0] if isinstance(one, Inert) else one for one in same]
        if not all(isinstance(one, int) and one in (0, 1) for one in same):
            raise ValueError("issame holds more than true and false")
        same = list(map(bool, same))
        if not same or len(pictures) != 2 * len(same):
            raise ValueError(f"{len(pictures)} pictures for {len(same)} pairs")
    except Exception as error:  # of a damaged pickle: any
        raise ValueError(f"{path}: no (pictures, issame) as insightface pickles them ({first_line(error)})") from error
    return pictures, same


def read_pair_list(path: Path) -> list[tuple[int, tuple[str, str], tuple[str, str]]]:
    """LFW's list of pairs: the fold, and of both sides the person and the picture's name without suffix. Raises ValueError."""
    with naming(path):
        (head, *lines) = [line.split() for line in path.read_text("utf-8-sig").splitlines() if line.strip()] or [[]]
    found = []
    try:
        folds, each = map(int, head if len(head) == 2 else ["1", *head])
        for number, words in enumerate(lines):
            (a, i), (b, j) = (words[:2], words[-2:]) if len(words) == 4 else (words[:2], words[::2])
            found.append((number // (2 * each), (a, f"{a}_{int(i):04d}"), (b, f"{b}_{int(j):04d}")))
        if len(lines) != folds * 2 * each:
            raise ValueError(f"{len(lines)} pairs, {folds} folds of twice {each} are announced")
    except (ValueError, ZeroDivisionError) as error:
        where = f"line {len(found) + 2}" if 0 < len(found) < len(lines) else "the first lines"
        raise ValueError(f"{path}: no list of pairs as LFW's, look at {where} ({first_line(error)})") from error
    return found


def pack_benchmark(source: str, pair_list: str | None, out: Path, cfg: DataConfig) -> list[Path]:
    """Pack a benchmark of pairs: `out`.parquet with the pictures and `out`_pairs.parquet, which eval.pairs takes.

    source: an insightface `.bin`, whose people nobody knows, so that each picture has an identity of its own, and whose pairs
    fall into ten folds in their order; or a folder or archive `<identity>/<file>` with the list `pair_list`, as LFW's.
    """
    images, pairs = (out.with_name(f"{out.name}{end}.parquet") for end in ("", "_pairs"))
    if pair_list is None:
        pictures, same = read_bin(Path(source))
        names: dict[bytes, str] = {}
        for data in pictures:  # most stand in two pairs
            names.setdefault(data, f"{out.name}/{len(names):06d}")
        for number, data in enumerate(pictures):
            if isinstance(told := attempt(examine, data, cfg), ValueError):
                raise ValueError(f"{source}: picture {number} is broken ({told})")
        note = {"pack": digest(out.name, *map(zlib.crc32, pictures), same)}
        keep_others([images], note)
        rows = [{"identity_id": name, "image_filename": name, "image_bytes": data} for data, name in names.items()]
        write_shard(images, pa.Table.from_pylist(rows, SHARD_SCHEMA), note)
        folds = np.repeat(np.arange(10), [len(part) for part in np.array_split(same, 10)])
        table = {"fold": folds, "same": same}
        table |= {f"image_filename_{side}": [names[data] for data in pictures[n::2]] for n, side in enumerate("ab")}
    else:
        listed = read_pair_list(Path(pair_list))
        pack(source, out, cfg, one_file=True)
        packed = pq.read_table(images, columns=SHARD_SCHEMA.names[:2]).to_pydict().values()
        files = {(person, os.path.splitext(file)[0]): file for person, file in zip(*packed, strict=True)}
        if lacking := {side for _, *sides in listed for side in sides if side not in files}:
            raise ValueError(f"{pair_list}: {len(lacking)} of its pictures, such as {'/'.join(min(lacking))}, are not in {source}")
        table = {"fold": [fold for fold, _, _ in listed], "same": [a[0] == b[0] for _, a, b in listed]}
        for n, side in enumerate("ab", 1):
            table |= {f"identity_id_{side}": [pair[n][0] for pair in listed]}
            table |= {f"image_filename_{side}": [files[pair[n]] for pair in listed]}
    found = pa.table(table)
    note = {"pack": digest(*found.to_pydict().items())}
    keep_others([pairs], note)
    with write_whole(pairs) as temporary:
        pq.write_table(found.cast(with_metadata(found.schema, note)), temporary)
    return [images, pairs]


# ---- Streams: an endless sequence of images, addressed by number ----


def lane_order(unit: np.ndarray, rng: np.random.Generator, shuffle_files: bool, shuffle_buffer: int) -> np.ndarray:
    """Order of one pass over a plain stream: a permutation of range(N) that needs only `shuffle_buffer` images at a time.

    The row groups, in a new order each pass, are dealt to LANES lanes; within a lane, blocks of neighbouring row groups are
    shuffled as wholes; image j comes from lane j mod LANES. The lanes change blocks at different times, so that reading is even.
    """
    count = int(unit[-1]) + 1
    if not shuffle_files and shuffle_buffer <= 1:
        return np.arange(len(unit))
    place = np.empty(count, np.int64)
    place[rng.permutation(count) if shuffle_files else np.arange(count)] = np.arange(count)
    lanes = LANES if shuffle_files else 1
    lane, place = place % lanes, place // lanes  # [U]
    block = max(1, round(shuffle_buffer / lanes / (len(unit) / count)))  # row groups in a block
    offset = lane * block // lanes if block * lanes < count else 0  # where a block holds the whole lane, nothing is cut
    block_of = (place + offset) // block  # [U]
    key = rng.random(len(unit)) if shuffle_buffer > 1 else np.arange(len(unit))
    order = np.lexsort((key, block_of[unit], lane[unit]))
    starts = np.searchsorted(lane[unit][order], np.arange(lanes))
    within = np.arange(len(unit)) - starts[lane[unit][order]]
    return order[np.lexsort((lane[unit][order], within))]


def repeats_in_queue(codes: np.ndarray, queue_size: int) -> float:
    """Mean number of pictures of the same identity among the `queue_size` images before one; `codes` [N] in the order drawn."""
    order = np.lexsort((np.arange(len(codes)), codes))
    pairs, step = 0, 1
    while step < len(codes):
        same = codes[order[step:]] == codes[order[:-step]]
        if not same.any():
            break
        pairs += int((same & (order[step:] - order[:-step] <= queue_size)).sum())
        step += 1
    return pairs / len(codes)


class Passes:
    """An endless sequence of images: pass after pass over the rows of an index, each in the order that `order(pass)` gives."""

    index: RowIndex
    seed: int

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Images first..stop-1 of the sequence as (pass, rows of the index), one pair a pass."""
        while first < stop:
            number, start = divmod(first, len(self))
            rows = self.order(number)[start : start + stop - first]
            yield number, rows
            first += len(rows)


def load_batches(
    sources: Sequence, drawn: Callable[[int], Sequence[int]], start: int, stop: int, device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the images of steps start..stop-1 as uint8 [B, 3, S, S], channels last in memory, on `device`.

    `drawn(step)` says how many images of each source came before that step: the whole state of a loader. Threads decode PREFETCH
    batches ahead; an error in a thread is raised here.
    """
    device, size = torch.device(device), sources[0].image_size
    where = {"device": device} if sources[0].on_device else {"pin_memory": device.type == "cuda"}
    pending: deque[tuple[Tensor, list[Future]]] = deque()

    def begin(step: int) -> None:
        counts = np.subtract(drawn(step + 1), drawn(step)).tolist()
        images, futures = torch.empty(sum(counts), size, size, 3, dtype=torch.uint8, **where), []
        for source, first, count, part in zip(sources, drawn(step), counts, images.split(counts), strict=True):
            futures += source.submit(pool, first, first + count, part) if count else []
        pending.append((images, futures))

    with ThreadPoolExecutor(workers or os.cpu_count(), "decode") as pool:
        try:
            for step in range(start, stop + PREFETCH):
                if step < stop:
                    begin(step)
                if step - start >= PREFETCH:
                    images, futures = pending.popleft()
                    for future in futures:
                        future.result()
                    yield images.to(device, non_blocking=True).permute(0, 3, 1, 2)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class ParquetImageStream(Passes):
    """The images of allowed identities in parquet files, as an endless sequence of passes; image n is a pure function of the seed.

    Iterating gives each image of one pass as uint8 [3, S, S]. Training takes whole batches through `submit`.

    globs: one or several patterns. shuffle_files: visit the row groups in a new order each pass. shuffle_buffer: how many
    images mix at a time (0: no shuffling inside). batch_read_rows: rows that are read at a time. allowed_identities: None for all.
    """

    order_kind, on_device = "lanes", False

    def __init__(
        self, globs: str | Sequence[str], shuffle_files: bool = True, shuffle_buffer: int = 8192, batch_read_rows: int = 256,
        allowed_identities: Iterable[str] | None = None, *, columns: Columns = COLUMNS, image_size: int = 112, seed: int = 0,
        max_bad_fraction: float = 0.01, max_image_pixels: int = 16_000_000, index: RowIndex | None = None,
    ):  # fmt: skip
        self.index = index or build_index(globs, allowed_identities, columns)
        self.shuffle_files, self.shuffle_buffer, self.batch_read_rows = shuffle_files, shuffle_buffer, batch_read_rows
        self.image_size, self.seed, self.max_pixels = image_size, seed, max_image_pixels
        self.bad = BadImages(max_bad_fraction, len(self.index), "a readable one of its row group stands in for it")
        self.loaded: dict[tuple[int, int], Future] = {}  # encoded rows by (pass, unit), until their last use
        self.plan = functools.lru_cache(maxsize=2)(self.plan)

    def plan(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of pass `number`: the rows of the index in its order [N], and the place in it where each unit is needed last [U]."""
        rng = np.random.default_rng(draw_seed(self.seed, "order", number))
        order = lane_order(self.index.unit, rng, self.shuffle_files, self.shuffle_buffer)
        last_use = np.empty(len(self.index.units), np.int64)
        last_use[self.index.unit[order]] = np.arange(len(order))
        return order, last_use

    def order(self, number: int) -> np.ndarray:
        return self.plan(number)[0]

    def read_unit(self, unit: int) -> pa.ChunkedArray:
        """Encoded images of the allowed rows of one row group; a null where the file has none."""
        wanted = self.index.row[self.index.starts[unit] : self.index.starts[unit + 1]]
        tables = list(read_unit(self.index, unit, wanted, ["image_bytes"], self.batch_read_rows))
        return pa.chunked_array([chunk for table in tables for chunk in table["image_bytes"].chunks], pa.binary())

    def decode_row(self, unit: int, place: int, encoded: pa.ChunkedArray) -> np.ndarray:
        """Decode one image; for a broken one the next readable one of the row group, going round, then of the next row groups."""
        for step in range(len(self.index.units)):
            for i in range(len(encoded)):
                candidate = (place + i) % len(encoded)
                try:
                    return decode_image(encoded[candidate].as_buffer() or b"", self.image_size, self.max_pixels)
                except ValueError as error:
                    self.bad.add(*self.index.place(int(self.index.starts[unit]) + candidate), str(error))
            unit, place = (unit + 1) % len(self.index.units), 0
            encoded = self.read_unit(unit) if step + 1 < len(self.index.units) else encoded
        raise ValueError(f"not one of {len(self)} images can be decoded; the first: {next(iter(self.bad.found.items()))}")

    def decode_rows(self, rows: np.ndarray, encoded: dict[int, Future], out: np.ndarray) -> None:
        """Decode rows of the index into out [len(rows), S, S, 3]; waits for their row groups, whose reading started before."""
        for row, target in zip(rows.tolist(), out, strict=True):
            unit = int(self.index.unit[row])
            target[:] = self.decode_row(unit, row - int(self.index.starts[unit]), encoded[unit].result())

    def request(self, pool: ThreadPoolExecutor, number: int, units: np.ndarray) -> dict[int, Future]:
        """Start to read those units of a pass that are not there yet, or whose reading an earlier loader gave up."""
        for key in ((number, unit) for unit in units.tolist()):
            if key not in self.loaded or self.loaded[key].cancelled():
                self.loaded[key] = pool.submit(self.read_unit, key[1])
        return {unit: self.loaded[number, unit] for unit in units.tolist()}

    def submit(self, pool: ThreadPoolExecutor, first: int, stop: int, out: Tensor) -> list[Future]:
        """Start to decode images first..stop-1 of the sequence into uint8 [stop - first, S, S, 3]. For one caller at a time.

        Reading is requested before the decoding that waits for it, and the pool starts tasks in order, so one worker is enough.
        """
        for number, rows in self.rows(first, stop + min(READ_AHEAD, len(self))):
            self.request(pool, number, np.unique(self.index.unit[rows]))
        futures, done = [], 0
        for number, rows in self.rows(first, stop):
            for start in range(0, len(rows), TASK_IMAGES):
                part = rows[start : start + TASK_IMAGES]
                encoded = self.request(pool, number, np.unique(self.index.unit[part]))
                target = out[done + start : done + start + len(part)].numpy()
                futures.append(pool.submit(self.decode_rows, part, encoded, target))
            done += len(rows)
        last_use = {number: self.plan(number)[1] + number * len(self) for number, _ in self.loaded}
        self.loaded = {key: read for key, read in self.loaded.items() if last_use[key[0]][key[1]] >= stop}
        return futures

    def __iter__(self) -> Iterator[Tensor]:
        for images in load_batches([self], lambda step: [min(64 * step, len(self))], 0, -(-len(self) // 64)):
            yield from images

    def in_file_order(self) -> "ParquetImageStream":
        """The same images in the order of the files."""
        return ParquetImageStream(
            "", False, 0, self.batch_read_rows, image_size=self.image_size, max_bad_fraction=self.bad.max_fraction,
            max_image_pixels=self.max_pixels, index=self.index,
        )  # fmt: skip


def read_cache_note(path: Path) -> tuple[list[int], list[list]]:
    """What is kept beside a decoded cache: checksums of its finished chunks, and file, row and reason of the broken images.

    Raises ValueError for a file that is not such a note.
    """
    if not path.exists():
        return [], []
    cure = "delete it and the files beside it to make them again"
    with naming(path, "not the checksums of a cache", cure, (ValueError, TypeError, KeyError)):
        note = json.loads(path.read_bytes())
        return [int(number) for number in note["sums"]], [[str(file), int(row), str(why)] for file, row, why in note["broken"]]


def build_cache(stream: ParquetImageStream, part: Path, note_path: Path, shape: tuple[int, ...], workers: int | None) -> None:
    """Decode the images of `stream` into the file `part`, from where a stopped build left off; a note grows beside it."""
    if not part.exists():
        need_space(part.parent, math.prod(shape), "the decoded cache")
        note_path.unlink(missing_ok=True)  # of a cache that was deleted: nothing of this one is decoded yet
    (sums, broken), ordered = read_cache_note(note_path), stream.in_file_order()
    with open(part, "ab") as file:  # a full disk is an error here, and a dead process in the map
        allocate = getattr(os, "posix_fallocate", lambda descriptor, _, size: os.truncate(descriptor, size))  # macOS has none
        allocate(file.fileno(), 0, math.prod(shape))
    images = np.memmap(part, np.uint8, "r+", shape=shape)
    for file, row, reason in broken:
        ordered.bad.add(Path(file), row, reason)

    def drawn(chunk: int) -> list[int]:
        return [min(chunk * CACHE_CHUNK, len(stream))]

    batches = load_batches([ordered], drawn, len(sums), -(-len(stream) // CACHE_CHUNK), workers=workers)
    with progress(total=len(stream), initial=drawn(len(sums))[0], desc=f"decoding into {part.parent}", unit="image") as bar:
        for batch in batches:
            start = len(sums) * CACHE_CHUNK
            images[start : start + len(batch)] = batch.permute(0, 2, 3, 1).numpy()
            images.flush()
            sums.append(zlib.crc32(images[start : start + len(batch)]))
            broken = [(str(file), row, reason) for (file, row), reason in list(ordered.bad.found.items())]
            write_text(note_path, json.dumps({"sums": sums, "broken": broken}))
            bar.update(len(batch))


def cache_file(stream: ParquetImageStream, folder: Path) -> Path:
    """The decoded images of `stream`, named by what they are made from."""
    return folder / f"{digest(DECODING, stream.index.fingerprint, stream.image_size, stream.max_pixels)}.u8"


def missing_cache_bytes(streams: Iterable[ParquetImageStream], folder: Path) -> int:
    """What caches of these streams would still add to the disk; one that is begun has its room."""
    files = ((stream, cache_file(stream, folder)) for stream in streams)
    missing = (stream for stream, file in files if not file.exists() and not file.with_name(f"{file.name}.part").exists())
    return sum(len(stream) * 3 * stream.image_size**2 for stream in missing)


def open_cache(stream: ParquetImageStream, folder: Path, workers: int | None) -> np.memmap:
    """The decoded images of `stream` as a read-only map uint8 [N, S, S, 3], made if it is not there, checked by its checksums.

    A build that was stopped goes on where it was; of two processes that want the same cache, one builds and the other waits.
    Raises OSError where the disk has no room, ValueError for a damaged cache, or one with too many broken images.
    """
    need_writable(folder)
    shape = (len(stream), stream.image_size, stream.image_size, 3)
    final = cache_file(stream, folder)
    part, note_path = (folder / f"{final.name}.{end}" for end in ("part", "json"))
    with locked(folder / f".{final.name}.lock", wait=True):
        if not final.exists():
            build_cache(stream, part, note_path, shape, workers)
            os.replace(part, final)
    if final.stat().st_size != math.prod(shape) or not note_path.exists():
        raise ValueError(f"{final}: {final.stat().st_size} bytes instead of {math.prod(shape)}, or no checksums; delete it")
    images, (sums, broken) = np.memmap(final, np.uint8, "r", shape=shape), read_cache_note(note_path)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # crc32 releases the GIL
        starts = range(0, len(images), CACHE_CHUNK)
        found = list(pool.map(lambda start: zlib.crc32(images[start : start + CACHE_CHUNK]), starts))
    if found != sums:
        bad = sum(a != b for a, b in itertools.zip_longest(found, sums))
        raise ValueError(f"{final}: {bad} of {len(found)} chunks are damaged; delete it, it will be made again")
    for file, row, reason in broken:
        stream.bad.add(Path(file), row, reason)
    return images


class DecodedCache(Passes):
    """The images of a stream, decoded once into a memory map uint8 [N, S, S, 3]; a true permutation of all of them each pass.

    device: copy them to its memory, which leaves no work per image to the CPU.
    """

    order_kind = "permutation"

    def __init__(
        self, stream: ParquetImageStream, folder: str | Path, workers: int | None = None, device: torch.device | None = None
    ):
        self.index, self.seed, self.image_size, self.bad = stream.index, stream.seed, stream.image_size, stream.bad
        self.on_device = device is not None
        self.images: np.ndarray | Tensor = open_cache(stream, Path(folder), workers)
        self.order = functools.lru_cache(maxsize=2)(self.order)  # of this pass and the next
        if device is not None:
            self.images = copy_to_device(self.images, device)

    def order(self, number: int) -> np.ndarray:
        return np.random.default_rng(draw_seed(self.seed, "order", number)).permutation(len(self))

    def submit(self, pool: ThreadPoolExecutor, first: int, stop: int, out: Tensor) -> list[Future]:
        """Start to copy images first..stop-1 of the sequence into uint8 [stop - first, S, S, 3]."""
        rows = np.concatenate([rows for _, rows in self.rows(first, stop)])
        if self.on_device:
            torch.index_select(self.images, 0, torch.from_numpy(rows).to(out.device, non_blocking=True), out=out)
            return []
        parts = [(rows[i : i + TASK_IMAGES], out[i : i + TASK_IMAGES].numpy()) for i in range(0, len(rows), TASK_IMAGES)]
        return [pool.submit(np.take, self.images, part, 0, target, "clip") for part, target in parts]


class Partners(Passes):
    """For image n of a cache the picture whose view is its positive: with probability p one of those linked to it, else itself.

    caches: of all sources, of which this is the one with the given number. partners: int [N, K] rows that a row is linked to, -1
    for none, those last; rows of all caches, one cache after the other.
    """

    def __init__(self, caches: Sequence[DecodedCache], number: int, partners: np.ndarray, p: float):
        self.own, self.caches, self.partners, self.p = caches[number], caches, partners, p
        self.index, self.seed, self.image_size = self.own.index, self.own.seed, self.own.image_size
        self.on_device = self.own.on_device
        self.starts = np.cumsum([0, *map(len, caches)])
        self.first = self.starts[number]
        self.order = functools.lru_cache(maxsize=2)(self.order)

    def order(self, number: int) -> np.ndarray:
        """Rows of all caches [N] for the images of a pass."""
        rng, rows = np.random.default_rng(draw_seed(self.seed, "partners", number)), self.own.order(number) + self.first
        count = (self.partners[rows] >= 0).sum(axis=1)
        chosen = self.partners[rows, (rng.random(len(rows)) * count).astype(int)]
        return np.where((rng.random(len(rows)) < self.p) & (count > 0), chosen, rows)

    def submit(self, pool: ThreadPoolExecutor, first: int, stop: int, out: Tensor) -> list[Future]:
        """Start to copy the partners of images first..stop-1 of the sequence into uint8 [stop - first, S, S, 3]."""
        rows = np.concatenate([rows for _, rows in self.rows(first, stop)])
        source = np.searchsorted(self.starts, rows, "right") - 1

        def copy(cache: DecodedCache, start: int, places: np.ndarray) -> None:
            if self.on_device:
                out[torch.from_numpy(places)] = cache.images[torch.from_numpy(rows[places] - start)]
            else:
                out.numpy()[places] = cache.images[rows[places] - start]

        parts = ((cache, self.starts[number], np.flatnonzero(source == number)) for number, cache in enumerate(self.caches))
        return [pool.submit(copy, *part) for part in parts]


def pictures_in(caches: Sequence[DecodedCache], device: torch.device, batch: int = 256) -> Iterator[Tensor]:
    """All pictures of the caches, one cache after the other, as views float [n, 3, S, S] without augmentation."""
    for cache in caches:
        for start in range(0, len(cache), batch):
            part = cache.images[start : start + batch]
            yield to_float(torch.as_tensor(np.array(part) if isinstance(part, np.ndarray) else part).to(device).permute(0, 3, 1, 2))


def copy_to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N, S, S, 3] in the memory of `device`. Raises ValueError where they would leave too little of it for training."""
    if device.type == "cuda" and images.nbytes > 0.6 * torch.cuda.mem_get_info(device)[0]:
        told = f"{images.nbytes / 1e9:.1f} GB of images do not fit beside the training on {device}"
        raise ValueError(f"data.cache=device: {told}; set data.cache=decoded")
    there = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), CACHE_CHUNK):
        there[start : start + CACHE_CHUNK] = torch.from_numpy(np.array(images[start : start + CACHE_CHUNK]))
    return there


def shuffle_quality(stream: ParquetImageStream, queue_size: int) -> float:
    """How many times as often the queue holds other pictures of an image's person as under a true shuffle of the same rows.

    1 is ideal; nan where nobody has two pictures.
    """
    codes = np.unique(stream.index.identities(), return_inverse=True)[1]
    true_shuffle = np.random.default_rng(0).permutation(len(codes))
    ideal = repeats_in_queue(codes[true_shuffle], queue_size)
    return repeats_in_queue(codes[stream.order(0)], queue_size) / ideal if ideal else float("nan")


def open_streams(rows: Rows, cfg: DataConfig, seed: int) -> list[ParquetImageStream]:
    return [
        ParquetImageStream(
            "", cfg.shuffle_files, cfg.shuffle_buffer, cfg.batch_read_rows, image_size=cfg.image_size, seed=draw_seed(seed, source),
            max_bad_fraction=cfg.max_bad_fraction, max_image_pixels=cfg.max_image_pixels, index=index,
        )
        for source, index in rows.indices.items()
    ]  # fmt: skip


def cached(streams: list[ParquetImageStream], cfg: DataConfig, device: torch.device) -> list[Passes]:
    """The streams as data.cache asks for: as they are, from a map of decoded images, or from the device's memory."""
    if cfg.cache == "none":
        return streams
    return [DecodedCache(stream, cfg.cache_dir, cfg.workers, device if cfg.cache == "device" else None) for stream in streams]


# ---- Curriculum ----


@dataclass
class CurriculumConfig:
    name: str
    progress: list[float]
    digiface_share: list[float]


class Schedule:
    """How many images of each source come before each step: the curriculum as arithmetic.

    `digiface_share` is linear between the points `progress` in [0, 1] of the training; None keeps the natural share of the rows.
    Where a finished training was extended, after each of the epochs `extended`, its last share holds, and `begins` is the step
    after which learning rate and the like are scheduled anew.
    """

    def __init__(
        self, cfg: CurriculumConfig | None, rows: Sequence[int], batch_size: int, epochs: int, extended: Sequence[int] = ()
    ):
        if sum(rows) < batch_size:
            raise ValueError(f"train.batch_size={batch_size} is more than the {sum(rows)} train images; lower it")
        self.batch_size, self.steps_per_epoch = batch_size, sum(rows) // batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.begins = extended[-1] * self.steps_per_epoch if extended else 0
        middle = (np.arange(self.total_steps) + 0.5) / ([*extended, epochs][0] * self.steps_per_epoch)
        points = cfg and cfg.progress
        share = np.interp(middle, points, cfg.digiface_share) if points else np.full(len(middle), rows[0] / sum(rows))
        share = share if len(rows) == 2 else np.ones(len(middle))
        self.of_first = np.floor(np.concatenate([[0], np.cumsum(share * batch_size)]) + 0.5).astype(np.int64)  # [steps + 1]

    @property
    def rest(self) -> int:
        """Steps after `begins`: over which rate and momentum are scheduled."""
        return self.total_steps - self.begins

    def drawn(self, step: int) -> list[int]:
        """Images of DigiFace and of Digi2Real that were drawn before `step`."""
        return [int(self.of_first[step]), step * self.batch_size - int(self.of_first[step])]

    def digiface_share(self, start: int, stop: int) -> float:
        """The share that was really drawn in steps start..stop-1."""
        return int(self.of_first[stop] - self.of_first[start]) / max(1, (stop - start) * self.batch_size)


class CurriculumMixStream:
    """The images of training from `epoch` (0-based) on: two sources, mixed by the schedule. Iterating gives those of the epoch.

    Each source is drawn without replacement until it is used up, then reshuffled. digi2real_stream may be None.
    """

    def __init__(self, digiface_stream, digi2real_stream, epoch: int, schedule: Schedule):
        self.sources = [s for s in (digiface_stream, digi2real_stream) if s is not None]
        self.first_step, self.schedule = epoch * schedule.steps_per_epoch, schedule

    def batches(
        self, start: int | None = None, stop: int | None = None, device: torch.device | str = "cpu", workers: int | None = None
    ) -> Iterator[Tensor]:
        """Yield uint8 [B, 3, S, S] for the steps start..stop-1 of the whole training; by default those of the epoch."""
        start = self.first_step if start is None else start
        stop = self.first_step + self.schedule.steps_per_epoch if stop is None else stop
        return load_batches(self.sources, lambda step: self.schedule.drawn(step)[: len(self.sources)], start, stop, device, workers)

    def places(self, step: int) -> Iterator[tuple[Path, int]]:
        """File and row of each picture of a step, in the order of its batch; a broken one is named, not what stood in for it."""
        for source, first, stop in zip(self.sources, self.schedule.drawn(step), self.schedule.drawn(step + 1), strict=False):
            for _, rows in source.rows(first, stop):
                yield from map(source.index.place, rows.tolist())

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.batches():
            yield from images


def mix_from_start(sources: Sequence, schedule: Schedule) -> CurriculumMixStream:
    """One source or two, mixed from the first epoch on."""
    return CurriculumMixStream(sources[0], sources[1] if len(sources) == 2 else None, 0, schedule)


# ---- Augmentation: whole batches on the device, each image with its own draw ----


@dataclass
class Op:
    """Applied with probability p, with a strength drawn evenly from low..high."""

    p: float = field(metadata={"at_least": 0, "at_most": 1})
    low: float
    high: float


@dataclass
class AugmentConfig:
    name: str
    pick: int = field(metadata={"at_least": 0})
    flip: float = field(metadata={"at_least": 0, "at_most": 1})
    zoom: Op
    aspect: Op
    shift_x: Op
    shift_y: Op
    rotate: Op
    shear_x: Op
    shear_y: Op
    warp: Op
    brightness: Op
    contrast: Op
    saturation: Op
    hue: Op
    grey: Op
    light: Op
    low_resolution: Op
    blur: Op
    sharpness: Op
    posterise: Op
    solarise: Op
    autocontrast: Op
    equalise: Op
    noise: Op
    erase: Op

    @property
    def ops(self) -> dict[str, Op]:
        return {name: op for name, op in vars(self).items() if isinstance(op, Op)}

    def harder(self) -> "AugmentConfig":
        """Each operation more often: sqrt(p) for p."""
        return replace(self, **{name: replace(op, p=math.sqrt(op.p)) for name, op in self.ops.items()})


OPS = [entry.name for entry in fields(AugmentConfig) if entry.type is Op]
NEUTRAL = {"zoom": 1.0, "aspect": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}  # the others: 0
NUMBERS = {"gate": len(OPS), "strength": len(OPS), "nothing": 1, "flip": 1, "corners": 8, "pixels": 10}  # that a view is made of
LUMA = (0.299, 0.587, 0.114)


def draw_numbers(count: int, generator: torch.Generator) -> Tensor:
    """All that is random in `count` views, [count, sum of NUMBERS] in [0, 1)."""
    return torch.rand(count, sum(NUMBERS.values()), generator=generator)


def strengths_of(cfg: AugmentConfig, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strength [n] of each operation for each image, NEUTRAL where it does not apply.

    With cfg.pick = k, just k of the operations with p > 0 (doing nothing is one more) apply to an image, as in RandAugment.
    """
    chance, low, high = torch.tensor([[op.p, op.low, op.high] for op in cfg.ops.values()]).T  # [ops] each
    neutral = torch.tensor([NEUTRAL.get(name, 0.0) for name in OPS])
    applies = numbers["gate"] < chance  # [n, ops]
    if cfg.pick:
        scores = torch.cat([numbers["gate"].masked_fill(chance == 0, -1), numbers["nothing"]], dim=1)
        least = scores.topk(min(cfg.pick, len(OPS) + 1), dim=1).values[:, -1:]
        applies = (scores >= least)[:, :-1] & (chance > 0)
    strengths = torch.where(applies, low + (high - low) * numbers["strength"], neutral)
    return dict(zip(OPS, strengths.T, strict=True)) | {"flip": (numbers["flip"][:, 0] < cfg.flip).float()}


def geometry(s: dict[str, Tensor], corners: Tensor) -> Tensor:
    """All geometry as one map from view to picture, [n, 2, 4] on the basis (1, x, y, xy), x and y in [-1, 1].

    corners: displacement of the four corners [n, 2, 4] in the order (-,-), (+,-), (-,+), (+,+); bilinear, so xy is all it needs.
    """
    angle = torch.deg2rad(s["rotate"])
    cos, sin, stretch = angle.cos(), angle.sin(), s["aspect"].sqrt()
    along_x, along_y = (1 - 2 * s["flip"]) / (s["zoom"] * stretch), stretch / s["zoom"]
    linear = torch.stack([cos * along_x, -sin * along_y, sin * along_x, cos * along_y], 1).view(-1, 2, 2)
    shear = torch.stack([torch.ones_like(cos), s["shear_x"], s["shear_y"], torch.ones_like(cos)], 1).view(-1, 2, 2)
    shift = 2 * torch.stack([s["shift_x"], s["shift_y"]], 1)[:, :, None]  # shares of the side -> [-1, 1]
    affine = torch.cat([shift, linear @ shear, torch.zeros_like(shift)], dim=2)  # [n, 2, 4]
    signs = torch.tensor([[1, -1, -1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, 1, 1, 1]]).float()  # corner -> basis
    return affine + corners @ signs / 4


def resample(x: Tensor, maps: Tensor) -> Tensor:
    """Pictures [n, 3, S, S] seen through `geometry` maps [n, 2, 4], bilinear; outside, the picture is mirrored."""
    size = x.shape[-1]
    axis = (torch.arange(size, device=x.device) * 2 + 1) / size - 1  # centres of the pixels
    powers = torch.stack([torch.ones_like(axis), axis])  # (1, x) or (1, y): their products are the basis
    grid = powers.T @ maps.view(-1, 2, 2, 2) @ powers  # [n, 2, S, S]
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="reflection", align_corners=False)


def colour_matrix(s: dict[str, Tensor]) -> Tensor:
    """All colour as one affine map per image, [n, 3, 4], for pixels in [-1, 1]: brightness, contrast, saturation, hue, grey."""
    saturation, turn, gain, fade = (
        values.view(-1, 1, 1)
        for values in (s["saturation"] * (s["grey"] == 0), 2 * math.pi * s["hue"], s["brightness"] * s["contrast"], s["contrast"])
    )
    grey_axis = torch.ones(3, 3) / 3  # Rodrigues' rotation about (1, 1, 1)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = turn.cos() * torch.eye(3) + turn.sin() * cross + (1 - turn.cos()) * grey_axis
    linear = gain * (hue @ (saturation * torch.eye(3) + (1 - saturation) * torch.tensor(LUMA).expand(3, 3)))
    return torch.cat([linear, (gain - fade).expand(-1, 3, 1)], dim=2)  # brightness scales [0, 1], contrast about mid-grey


def per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, x.dtype, non_blocking=True).view(-1, 1, 1, 1)


@functools.lru_cache(256)
def low_resolution_map(kept: int, size: int) -> Tensor:
    """[size, size]: shrinks an axis of `size` pixels to `kept` of them and back; bilinear, without aliasing."""
    small = F.interpolate(torch.eye(size)[None, None], (kept, size), mode="bilinear", antialias=True)
    return F.interpolate(small, (size, size), mode="bilinear")[0, 0]


def on_axes(x: Tensor, maps: Tensor) -> Tensor:
    """Apply a matrix [n, S, S] for each image to its rows and to its columns."""
    maps = maps.to(x.device, non_blocking=True)
    for _ in range(2):  # the last axis, which then changes places with the one before it
        x = (x.flatten(1, 2) @ maps.mT).view_as(x).mT
    return x


def relight(x: Tensor, deviation: Tensor, u: Tensor) -> Tensor:
    """Light from somewhere: a gain that varies smoothly over the picture, and a gamma, both of a log deviation [n] each."""
    normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999, 0.999)) * deviation[:, None]  # [n, 10]
    size, gamma = x.shape[-2:], per_image(normal[:, 9].exp(), x)
    gain = F.interpolate(normal[:, :9].view(-1, 1, 3, 3).to(x.device), size, mode="bicubic", align_corners=True).exp()
    return ((x + 1) / 2).clamp(0, 1).pow(gamma) * gain * 2 - 1


def lower_resolution(x: Tensor, side: Tensor, _: Tensor) -> Tensor:
    """Shrink to a share `side` [n] of the size, in whole pixels, and back."""
    kept = (x.shape[-1] * side).round().clamp(min=1).int().tolist()
    return on_axes(x, torch.stack([low_resolution_map(pixels, x.shape[-1]) for pixels in kept]))


def blur(x: Tensor, sigma_px: Tensor, _: Tensor) -> Tensor:
    """Gaussian blur with a sigma [n] each; near the border of the pixels that there are."""
    pixel = torch.arange(x.shape[-1])
    distance = (pixel[:, None] - pixel) / sigma_px[:, None, None]  # [n, S, S]
    exponent = (-0.5 * distance**2).masked_fill(distance.abs() > 4, -math.inf)  # else denormal numbers, which are slow
    return on_axes(x, torch.softmax(exponent, dim=2))


def sharpen(x: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    """Blend with the smoothed picture: 0 is smooth, 1 as it was, 2 sharp."""
    from torchvision.transforms.v2 import functional

    smooth = functional.adjust_sharpness((x + 1) / 2, 0) * 2 - 1
    return smooth + per_image(factor, x) * (x - smooth)


def posterise(x: Tensor, bits: Tensor, _: Tensor) -> Tensor:
    """Keep the highest `bits` [n] of each 8-bit value."""
    step = per_image(2 ** (8 - bits.round()), x)
    return (((x + 1) * 127.5).round() / step).floor() * step / 127.5 - 1


def solarise(x: Tensor, threshold: Tensor, _: Tensor) -> Tensor:
    """Invert what is brighter than `threshold` [n], in [0, 1]."""
    return torch.where((x + 1) / 2 >= per_image(threshold, x), -x, x)


def autocontrast(x: Tensor, *_: Tensor) -> Tensor:
    """Stretch each channel of each image to the whole range."""
    from torchvision.transforms.v2 import functional

    return functional.autocontrast((x + 1) / 2) * 2 - 1


def equalise(x: Tensor, *_: Tensor) -> Tensor:
    """Even out the histogram of each channel of each image."""
    from torchvision.transforms.v2 import functional

    return to_float(functional.equalize(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)))


def add_noise(x: Tensor, sigma: Tensor, u: Tensor) -> Tensor:
    """Add normal noise of a standard deviation [n] each, from a generator of its own for each image."""
    seeds = (u[:, 0] * 2**24).long().tolist()
    noise = [torch.randn(x.shape[1:], generator=torch.Generator(x.device).manual_seed(seed), device=x.device) for seed in seeds]
    return x + per_image(sigma, x) * torch.stack(noise)


def erase(x: Tensor, area: Tensor, u: Tensor) -> Tensor:
    """Paint a rectangle of a share `area` [n] of each picture, in a random colour, anywhere."""
    ratio = torch.exp((u[:, 0] * 2 - 1) * math.log(2))
    half_w, half_h = (area * ratio).sqrt() / 2, (area / ratio).sqrt() / 2  # shares of the side
    axis = (torch.arange(x.shape[-1]) + 0.5) / x.shape[-1]
    column, row = ((axis - u[:, i, None]).abs() < half[:, None] for i, half in ((1, half_w), (2, half_h)))  # [n, S] each
    inside = (row[:, :, None] & column[:, None, :])[:, None]  # [n, 1, S, S]
    colour = (u[:, 3:6] * 2 - 1)[:, :, None, None]
    return torch.where(inside.to(x.device, non_blocking=True), colour.to(x.device, non_blocking=True), x)


FILTERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of images [n, 3, S, S], strengths [n], numbers [n, 10]
    "light": relight, "low_resolution": lower_resolution, "blur": blur, "sharpness": sharpen, "posterise": posterise,
    "solarise": solarise, "autocontrast": autocontrast, "equalise": equalise, "noise": add_noise, "erase": erase,
}  # fmt: skip


def to_float(images: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float in [-1, 1] (mean = std = 0.5), the preprocessing of training and of embed."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def augment(images: Tensor, cfg: AugmentConfig, numbers: Tensor) -> Tensor:
    """A random view of each picture: uint8 [n, 3, S, S] -> float [n, 3, S, S] in [-1, 1], channels last in memory.

    numbers: rows of `draw_numbers`, on the CPU, so that nothing waits for what the device computes. A view depends on its picture
    and its row of numbers alone: a part of a batch gives the same views by itself.
    """
    n, device = len(images), images.device
    u = dict(zip(NUMBERS, numbers.split([*NUMBERS.values()], dim=1), strict=True))
    s = strengths_of(cfg, u)
    corners = (u["corners"].view(n, 2, 4) * 2 - 1) * 2 * s["warp"].view(n, 1, 1)
    maps, colours = (t.to(device, non_blocking=True) for t in (geometry(s, corners), colour_matrix(s)))
    linear, offset = colours.split([3, 1], dim=2)
    x = resample(images.float(), maps)
    x = torch.baddbmm(offset - linear.sum(2, keepdim=True), linear / 127.5, x.flatten(2)).view_as(x)  # and 0..255 to -1..1
    for name, function in FILTERS.items():
        if name == "erase":
            x.clamp_(-1, 1)
        rows = s[name].nonzero().squeeze(1)
        if len(rows):
            where = rows.to(device, non_blocking=True)
            x.index_copy_(0, where, function(x.index_select(0, where), s[name][rows], u["pixels"][rows]))
    return x.contiguous(memory_format=torch.channels_last)


def two_views(
    images: Tensor, cfg: AugmentConfig, generator: torch.Generator, others: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two views of each picture, drawn apart, the second of `others` if given: uint8 [B, 3, S, S] -> float [B, 3, S, S] each."""
    pair = images, images if others is None else others
    return tuple(augment(side, cfg, draw_numbers(len(side), generator)) for side in pair)


# ---- Alignment: where faces lie in their pictures, told by the mean picture ----

ALIGN_SIDES_PX = (16, 64)  # of the mean pictures: to search all, and to refine the best
CANVAS = 1.5  # sides of what they lie on, so that what comes in from outside is known to be nothing
SMOOTH = 0.08  # of the side: what varies over less stands out


class Alignment(NamedTuple):
    """How pictures lie beside others, when both are seen on average."""

    shift_x: float  # to the right, as a share of the side
    shift_y: float  # down, likewise
    size: float  # 1 is as large
    turn: float  # clockwise, in degrees
    agreement: float  # of both means then, a correlation

    @property
    def is_clear(self) -> bool:
        """Whether the means agree enough to tell: those of few pictures, or of other things than faces, do not."""
        return self.agreement > 0.6

    @property
    def differs(self) -> bool:
        """Whether by more than other people's or another source's aligned pictures do."""
        apart = math.hypot(self.shift_x, self.shift_y) > 0.04 or abs(self.size - 1) > 0.06 or abs(self.turn) > 5
        return apart and self.is_clear

    def __str__(self) -> str:
        return (
            f"{abs(self.shift_x):.1%} of the side to the {'left' if self.shift_x < 0 else 'right'} and {abs(self.shift_y):.1%} "
            f"{'up' if self.shift_y < 0 else 'down'}, {self.size:.0%} as large, turned by {self.turn:+.1f} degrees clockwise"
        )

    def undo(self, x: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] that lie so, moved to where the others lie; what comes in from outside is mirrored."""
        p = torch.tensor([[self.shift_x, self.shift_y, math.log(self.size), math.radians(self.turn)]])
        return resample(x, similarity(p).to(x.device).expand(len(x), -1, -1))


def similarity(p: Tensor) -> Tensor:
    """`geometry` maps [n, 2, 4] of rows [n, 4]: shift right and down in shares of the side, log of the size, turn in radians."""
    still = {name: torch.full((len(p),), NEUTRAL.get(name, 0.0)) for name in (*OPS, "flip")}
    asked = {"shift_x": p[:, 0], "shift_y": p[:, 1], "zoom": (-p[:, 2]).exp(), "rotate": torch.rad2deg(p[:, 3])}
    return geometry(still | asked, torch.zeros(len(p), 2, 4))


def with_weights(mean: Tensor, side: int) -> Tensor:
    """A mean picture [3, S, S] -> on a canvas [1, 3, s, s]: grey, whether there is picture (1) or flat filling (0), its weight."""
    grey = F.interpolate(mean.mean(0, keepdim=True)[None], size=(side, side), mode="bilinear", antialias=True)
    flat = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1) < 0.5  # grey levels: a real mean hardly is anywhere
    inside = 1 - F.max_pool2d(flat.float(), 5, 1, 2)
    window = torch.sin(math.pi * (torch.arange(side) + 0.5) / side)
    return F.pad(torch.cat([grey, inside, inside * window[:, None] * window], dim=1), [round((CANVAS - 1) / 2 * side)] * 4)


def stand_out(grey: Tensor, inside: Tensor) -> Tensor:
    """What stands out from its surroundings, of even contrast, [n, 1, s, s]; what is not `inside` has no part in it."""
    sigma = torch.tensor([SMOOTH * grey.shape[-1] / CANVAS])

    def smooth(values: Tensor, sigma: Tensor) -> Tensor:  # normalised convolution
        return blur(values * inside, sigma, sigma) / blur(inside, sigma, sigma).clamp(min=1e-3)

    detail = inside * (grey - smooth(grey, sigma))
    floor = 0.1 * detail.square().mean((2, 3), keepdim=True)  # else what is nearly flat would count as much
    return detail / (smooth(detail**2, 2 * sigma) + floor + 1e-6).sqrt()


def agreement(p: Tensor, pictures: Tensor, others: Tensor) -> Tensor:
    """Weighted correlation [n] of what stands out in `others` and in `pictures` seen through the `similarity` p [n, 4]."""
    seen = resample(pictures.expand(len(p), -1, -1, -1), similarity(p))
    (grey, inside, weight), (other_grey, other_inside, other_weight) = (x.split(1, dim=1) for x in (seen, others))
    inside, weight = inside * other_inside, weight * other_weight  # both are judged by what both have
    weight = weight / weight.sum((2, 3), keepdim=True).clamp(min=1e-6)
    a, b = (stand_out(x, inside) for x in (grey, other_grey))
    a, b = (x - (weight * x).sum((2, 3), keepdim=True) for x in (a, b))
    covariance, *variances = ((weight * x * y).sum((1, 2, 3)) for x, y in ((a, b), (a, a), (b, b)))
    return covariance / (variances[0] * variances[1] + 1e-9).sqrt()


def find_alignment(mean: Tensor, other_mean: Tensor) -> Alignment:
    """How the pictures of `mean` lie beside those of `other_mean`, both [3, S, S] in 0..255: from mean pictures, without labels.

    Maximises the correlation of what stands out locally (enhanced correlation coefficient, Evangelidis and Psarakis 2008) over
    shift, size and turn: the best of a grid up to 0.24 of the side, 0.62 to 1.62 of the size and 34 degrees, refined.
    """
    (coarse, fine), (other_coarse, other_fine) = ([with_weights(m, side) for side in ALIGN_SIDES_PX] for m in (mean, other_mean))
    ends = (0.24 / CANVAS, 9), (0.24 / CANVAS, 9), (0.48, 7), (0.6, 7)
    grid = torch.cartesian_prod(*(torch.linspace(-end, end, steps) for end, steps in ends))
    with torch.no_grad():
        agreements = torch.cat([agreement(part, coarse, other_coarse) for part in grid.split(256)])

    def refine(start: Tensor) -> tuple[float, list[float]]:
        p = start[None].clone().requires_grad_()
        optimizer = torch.optim.LBFGS([p], max_iter=30, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -agreement(p, fine, other_fine).sum()
            value.backward()
            return value

        optimizer.step(loss)
        return -loss().item(), p[0].tolist()

    best, (shift_x, shift_y, log_size, turn) = max(map(refine, grid[agreements.topk(5).indices]))  # the first may end beside it
    return Alignment(shift_x * CANVAS, shift_y * CANVAS, math.exp(log_size), math.degrees(turn), best)


# ---- Tables of vectors ----


class VectorTable(NamedTuple):
    """One file of embeddings in memory, rows in the file's order."""

    names: np.ndarray  # str [N], the identity
    files: np.ndarray  # str [N], the picture's name
    sources: np.ndarray  # str [N]
    vectors: np.ndarray  # float32 [N, D]
    hashes: np.ndarray | None  # int64 [N], of the pictures' bytes
    note: dict  # what `embed` noted of checkpoint, split and data; empty for a foreign file

    @property
    def keys(self) -> np.ndarray:
        """str [N], source and file name: unique within an identity."""
        return np.char.add(np.char.add(self.sources, "/"), self.files)


class VectorWriter:
    """Writes a table of vectors: rows of `decoded_rows`, their source, and their vectors."""

    def __init__(self, path: Path, note: dict):
        self.path, self.note, self.writer, self.rows = path, note, None, 0

    def add(self, table: pa.Table, source: str, vectors: np.ndarray) -> None:
        """table: `identity_id`, `image_filename`, `image_hash`; vectors: float32 [len(table), D]."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
        table = table.append_column("source", pa.array([source] * len(table))).append_column("embedding", column)
        if self.writer is None:
            schema = with_metadata(table.schema, self.note)
            self.writer = pq.ParquetWriter(self.path, schema, compression="none", write_page_checksum=True)
        self.writer.write_table(table)
        self.rows += len(table)

    def close(self, last_words: dict[str, str]) -> None:
        """End the file, with metadata known only at the end. Raises ValueError where there is no row."""
        if not self.rows:
            raise ValueError("not one image to embed: the chosen rows are empty or broken")
        self.writer.add_key_value_metadata({"sniperface.rows": str(self.rows)} | last_words)
        self.writer.close()


def read_embedding_column(path: Path, parquet: pq.ParquetFile) -> np.ndarray:
    """The column `embedding` as float32 [N, D]."""
    with naming(path):
        column = parquet.read(columns=["embedding"])["embedding"].combine_chunks()
    flat, widths = column.flatten(), pc.unique(pc.list_value_length(column)).to_pylist() or [1]
    if column.null_count or flat.null_count:
        raise ValueError(f"{path}: {max(column.null_count, 1)} rows have no embedding; write it again with command=embed")
    if len(widths) > 1 or widths == [0]:
        raise ValueError(f"{path}: embeddings of {sorted(widths)} numbers; all need one width above 0")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as that
        return flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, widths[0])


def read_vectors(path: Path) -> VectorTable:
    """Read a file of `embed`, or a foreign one with the same columns. Raises ValueError for what cannot be one."""
    parquet = open_parquet(path)
    found, last_words = parquet.schema_arrow.names, parquet.metadata.metadata or {}
    wrong = len(set(found)) < len(found) or not {"identity_id", "image_filename", "embedding"} <= set(found)
    kind, t = None if wrong else parquet.schema_arrow.field("embedding").type, pa.types
    is_list = kind and any(test(kind) for test in (t.is_fixed_size_list, t.is_list, t.is_large_list))
    if not is_list or not t.is_floating(kind.value_type):
        raise ValueError(f"{path}: needs identity_id, image_filename and embedding, a list of floats; found {found} ({kind})")
    names, files = (np.array(read_strings(parquet, path, name).to_pylist(), str) for name in ("identity_id", "image_filename"))
    sources = np.full(len(names), "file")
    if "source" in found:
        sources = np.array(read_strings(parquet, path, "source").to_pylist(), str)
    with naming(path):
        hashes = parquet.read(columns=["image_hash"])["image_hash"].to_numpy() if "image_hash" in found else None
    rows, leaked = last_words.get(b"sniperface.rows"), last_words.get(b"sniperface.pictures_in_train")
    if rows and int(rows) != len(names):
        raise ValueError(
            f"{path}: {len(names)} rows, embed wrote {int(rows)}; joined from several? Write it again with command=embed"
        )
    vectors = read_embedding_column(path, parquet)
    if not len(names) == len(files) == len(sources) == len(vectors):
        raise ValueError(f"{path}: damaged ({len(names)} identities, {len(vectors)} vectors); write it again with command=embed")
    note = read_metadata(path) | ({"pictures_in_train": int(leaked)} if leaked else {})
    return VectorTable(names, files, sources, vectors, hashes, note)


def read_pairs(path: Path, names: np.ndarray, files: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read a protocol of pairs such as LFW's: `fold`, `image_filename_a`, `image_filename_b`, `same`.

    Where file names repeat between people it needs `identity_id_a` and `identity_id_b` as well. Gives [N] each: the rows of both
    sides among the pictures of people `names` with `files`, whether they are the same person, and the fold. Raises ValueError for
    a file that is not such a protocol, and for pictures without a vector.
    """
    parquet, t = open_parquet(path), pa.types
    by_person = any(name in ("identity_id_a", "identity_id_b") for name in parquet.schema_arrow.names)
    picture = ["identity_id", "image_filename"] if by_person else ["image_filename"]
    wanted = ["fold", "same", *(f"{name}_{side}" for side in "ab" for name in picture)]
    kinds = {name: parquet.schema_arrow.field(name).type for name in wanted if parquet.schema_arrow.names.count(name) == 1}
    fits = {"fold": t.is_integer, "same": lambda kind: t.is_boolean(kind) or t.is_integer(kind)}
    wrong = [name for name in wanted if name not in kinds or not fits.get(name, lambda kind: True)(kinds[name])]
    if wrong:
        raise ValueError(f"{path}: needs {wanted}, fold an integer, same a boolean or 0 and 1; look at {wrong}: {kinds}")
    with naming(path):
        table = parquet.read(columns=wanted)
    empty = [name for name in wanted if table[name].null_count]
    if empty or not set(table["same"].unique().to_pylist()) <= {0, 1}:
        raise ValueError(f"{path}: no value may be missing (look at {empty}) and same must be 0 or 1")
    held = list(zip(*([names.tolist()] if by_person else []), files.tolist(), strict=True))
    sides = [list(zip(*(read_strings(parquet, path, f"{n}_{side}").to_pylist() for n in picture), strict=True)) for side in "ab"]
    row_of, times = dict(zip(held, range(len(held)), strict=True)), Counter(held)
    for what, bad in (("no embedding", lambda n: n == 0), ("more than one embedding", lambda n: n > 1)):
        if found := {name for side in sides for name in side if bad(times[name])}:
            cure = "embed the benchmark's own pictures by embed.test_glob"
            if not by_person and len(row_of) < len(held):
                cure = "file names repeat between people there: add columns identity_id_a and identity_id_b"
            raise ValueError(f"{path}: {len(found)} of its pictures, such as {'/'.join(min(found))!r}, have {what}; {cure}")
    a, b = (np.array([row_of[name] for name in side], np.int64) for side in sides)
    same = table["same"].to_numpy().astype(bool)
    if by_person and len(wrong := np.flatnonzero((names[a] == names[b]) != same)):
        raise ValueError(f"{path}: same contradicts the identities in {len(wrong)} rows, first row {wrong[0]}; correct one of them")
    return a, b, same, table["fold"].to_numpy()
