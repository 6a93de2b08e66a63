"""Files and pixels: from parquet rows to augmented views on the device.

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
import re
import shutil
import socket
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("sniperface")
ROW_GROUP_ROWS = 500  # of the files we write: small enough to mix many at a time, large enough to read fast
SHARD_BYTES = 256 << 20  # of a materialised train shard, which is shuffled in memory
WRITERS = 2  # runs of shards that are written at a time, so that cores are busy while one waits for the disk: 1.2 x
LANES = 8  # places of the files that are read side by side; fixed, so that the order never depends on the machine
PREFETCH = 4  # batches that are decoded ahead
READ_AHEAD = 1024  # images whose row groups are requested before they are due
TASK_IMAGES = 32  # that a thread decodes at a time: some 10 ms
CACHE_CHUNK = 4096  # images of a decoded cache that share a checksum
METADATA_KEY = b"sniperface"  # our entry in the schema metadata of the files we write

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


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


@contextmanager
def syncing(path: Path) -> Iterator[None]:
    """Have the disk write a file while the block still makes it: the fsync at its end waits less, shards 1.1 to 1.3 x as fast."""
    made = threading.Event()

    def sync() -> None:
        while not made.wait(0.1):
            with open(path, "rb+") as file:  # not every file system syncs what is open for reading only
                getattr(os, "fdatasync", os.fsync)(file.fileno())  # macOS has no fdatasync

    with ThreadPoolExecutor(1) as pool:
        try:
            synced = pool.submit(sync)
            yield
        finally:
            made.set()
        synced.result()  # the disk tells of an error once, so maybe not at the end


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, alone; it goes with its process, however that ends. Raises OSError if taken and not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def need_space(folder: Path, need_bytes: int, what: str) -> None:
    """Raise OSError unless the disk of `folder`, which may not exist yet, has room for `need_bytes`."""
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise OSError(
            f"{folder}: {what} needs {need_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; make room "
            f"or choose another folder"
        )


def find_files(globs: str | Sequence[str]) -> list[Path]:
    """Files that match any of `globs`, sorted by name. Raises FileNotFoundError for a pattern without a match."""
    found: list[Path] = []
    for pattern in [globs] if isinstance(globs, str | os.PathLike) else globs:
        pattern = str(pattern)
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)  # a name may hold [ ]
        if not matches:
            raise FileNotFoundError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
        found += [Path(m) for m in matches]
    return sorted({os.path.abspath(path): path for path in found}.values(), key=lambda path: (path.name, str(path)))


@dataclass
class Columns:
    identity: str
    filename: str
    image: str


COLUMNS = Columns("identity_id", "image_filename", "image_bytes")  # the contract's own names


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def open_parquet(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open for reading row group by row group. `pre_buffer` would keep the whole file in memory; a small buffer reads at 1.2 x."""
    try:
        return pq.ParquetFile(path, metadata=metadata, pre_buffer=False, buffer_size=1 << 17, page_checksum_verification=True)
    except (OSError, OverflowError, UnicodeDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file ({first_line(error)}); fetch it again or leave it out") from error


def check_contract(path: Path, schema: pa.Schema, columns: Columns) -> None:
    """Raise ValueError unless `schema` has the three columns with types that can hold an identity, a name and an image."""

    def fits(kind: pa.DataType, *tests) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return any(test(kind) for test in tests)

    t = pa.types
    text = (t.is_string, t.is_large_string, t.is_string_view)
    wanted = {
        columns.identity: ("string or integer", (*text, t.is_integer)),
        columns.filename: ("string", text),
        columns.image: ("binary", (t.is_binary, t.is_large_binary, t.is_binary_view)),
    }
    for name, (kind, tests) in wanted.items():
        if schema.names.count(name) != 1:
            raise ValueError(
                f"{path}: {schema.names.count(name)} columns called {name!r}, found {schema.names}; set data.columns "
                f"to the names in your files"
            )
        if not fits(schema.field(name).type, *tests):
            raise ValueError(f"{path}: column {name!r} is {schema.field(name).type}, must be {kind}")


def as_strings(column: pa.ChunkedArray, path: Path, name: str) -> pa.Array:
    """Identities or names as one string array: the integer 1 and the string "1" are the same. Raises ValueError for nulls."""
    if column.null_count:
        raise ValueError(f"{path}: {column.null_count} of {len(column)} rows have no {name!r}; every row needs one")
    return pc.cast(column, pa.large_string()).combine_chunks()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what a damaged file raises name it."""
    try:
        yield
    except (OSError, OverflowError, pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError, StopIteration) as error:
        raise ValueError(f"{path}: damaged ({first_line(error)}); fetch it again or leave it out") from error


def read_identities(parquet: pq.ParquetFile, path: Path, group: int, columns: Columns) -> pa.Array:
    """The identities of one row group as strings."""
    with naming(path):
        column = parquet.read_row_group(group, columns=[columns.identity]).column(0)
        column.validate(full=True)  # a string that is no UTF-8
    return as_strings(column, path, columns.identity)


def read_metadata(path: Path) -> dict:
    """What we noted in a file of ours when it was written; empty for a foreign one."""
    with naming(path):
        note = json.loads((open_parquet(path).schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
    if not isinstance(note, dict):
        raise ValueError(f"{path}: its note {note!r} is not one of ours; write the file again")
    return note


def with_metadata(schema: pa.Schema, note: dict) -> pa.Schema:
    return schema.with_metadata({METADATA_KEY: json.dumps(note, sort_keys=True).encode()})


def digest(*parts: object) -> str:
    """Sixteen hex digits of the SHA-256 of `parts`: equal on every machine and in every version."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Identities: which are trained on, which are never seen
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SplitConfig:
    out_dir: str
    train_ratio: float = field(metadata={"above": 0, "below": 1})
    seed: int = field(metadata={"at_least": 0})
    validation_ratio: float = field(metadata={"at_least": 0, "below": 1})
    materialize: str = field(metadata={"one_of": ("auto", "yes", "no")})


class Splits(NamedTuple):
    """The table of `write_identity_splits`: identities of each side, what it was made with, and its hash."""

    identities: dict[str, list[str]]  # "train", "val", "test"
    note: dict  # seed, train_ratio, validation_ratio, counts
    hash: str


def collect_unique_identities(globs: str | Sequence[str], columns: Columns = COLUMNS) -> list[str]:
    """All identities in the files that match `globs`, as sorted strings. Reads no other column."""
    unique: set[str] = set()
    for path in find_files(globs):
        parquet = open_parquet(path)
        with naming(path):
            check_contract(path, parquet.schema_arrow, columns)
        for group in range(parquet.num_row_groups):
            unique.update(read_identities(parquet, path, group, columns).unique().to_pylist())
    return sorted(unique)


def assign_splits(
    identities: Iterable[str], train_ratio: float, seed: int, validation_ratio: float = 0.0, known: dict[str, str] | None = None
) -> dict[str, str]:
    """Identity -> train, val or test. The order that decides is that of hashes, so it is the same on every machine for ever.

    Exactly round(train_ratio * n) identities are on the train side, of which round(validation_ratio * that) are val. Those in
    `known` keep their side, and new ones fill the ratio as far as that allows.
    """
    sides = {str(name): side for name, side in (known or {}).items()}
    new = sorted(set(map(str, identities)) - sides.keys(), key=lambda identity: (digest(seed, identity), identity))
    total = len(sides) + len(new)
    train_side = round(train_ratio * total)
    for side, wanted in (
        ("val", round(validation_ratio * train_side)),
        ("train", train_side - round(validation_ratio * train_side)),
    ):
        missing = max(0, wanted - sum(s == side for s in sides.values()))
        sides.update(dict.fromkeys(new[:missing], side))
        new = new[missing:]
    return sides | dict.fromkeys(new, "test")


def read_identity_splits(path: str | Path) -> Splits:
    """Read a split table. Raises ValueError for a file that is none, or that gives an identity two sides."""
    path = Path(path)
    parquet = open_parquet(path)
    with naming(path):
        found = parquet.schema_arrow.names
    if any(found.count(name) != 1 for name in ("identity_id", "split")):
        raise ValueError(f"{path}: not a split table, its columns are {found}; expected identity_id and split")
    with naming(path):
        table = parquet.read(columns=["identity_id", "split"])
        names, sides = (as_strings(table[name], path, name).to_pylist() for name in ("identity_id", "split"))
    if len(set(names)) != len(names) or not set(sides) <= {"train", "val", "test"}:
        raise ValueError(f"{path}: a split table has each identity once, as train, val or test; delete it and run command=split")
    identities: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    pairs = sorted(zip(names, sides, strict=True))
    for name, side in pairs:
        identities[side].append(name)
    return Splits(identities, read_metadata(path), digest(*("\t".join(pair) for pair in pairs)))


def write_identity_splits(
    ids: Iterable[str],
    out_path: str | Path,
    train_ratio: float,
    seed: int,
    validation_ratio: float = 0.0,
    known: dict[str, str] | None = None,
    extends: Sequence[str] = (),
) -> Splits:
    """Decide the split of `ids` (see `assign_splits`) and write it as parquet: `identity_id`, `split`.

    The file notes seed, ratios, counts, and the hashes of the tables that it `extends`.
    """
    sides = assign_splits(ids, train_ratio, seed, validation_ratio, known)
    names = sorted(sides)
    counts = {side: sum(s == side for s in sides.values()) for side in ("train", "val", "test")}
    if not counts["train"] or not counts["test"]:
        raise ValueError(
            f"{len(names)} identities split into {counts}: both train and test need at least one; give more data "
            f"or another split.train_ratio"
        )
    note = {
        "seed": seed,
        "train_ratio": train_ratio,
        "validation_ratio": validation_ratio,
        "counts": counts,
        "extends": list(extends),
    }
    table = pa.table({"identity_id": names, "split": [sides[name] for name in names]})
    with write_whole(Path(out_path)) as temporary:
        pq.write_table(table.cast(with_metadata(table.schema, note)), temporary, write_page_checksum=True)
    return read_identity_splits(out_path)


# ---------------------------------------------------------------------------------------------------------------------
# The index before the pixels
# ---------------------------------------------------------------------------------------------------------------------


class RowIndex(NamedTuple):
    """Where the allowed rows are. A unit is a row group of a file."""

    files: list[pq.FileMetaData]
    paths: list[Path]
    units: np.ndarray  # int32 [U, 2]: file, row group
    offset: np.ndarray  # int64 [U]: rows of the file before the unit
    starts: np.ndarray  # int64 [U + 1]: allowed rows before each unit
    unit: np.ndarray  # int32 [N]: unit of each allowed row, ascending
    row: np.ndarray  # int32 [N]: row inside the unit
    fingerprint: str  # of the files' rows and of which are allowed; the folder does not count
    stamps: list[tuple[int, int]]  # size and time of each file


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def open_indexed(index: RowIndex, number: int) -> pq.ParquetFile:
    """Open a file of the index again. Raises ValueError for one that was replaced: its rows may be other people's."""
    path = index.paths[number]
    if stamp(path) != index.stamps[number]:
        raise ValueError(f"{path}: was replaced since it was indexed; start again")
    return open_parquet(path, index.files[number])


def mark_pictures(path: Path, parquet: pq.ParquetFile, group: int, columns: Columns) -> tuple[int, int]:
    """Size of a row group and checksum of both ends of its pictures, 4 kB each: they change when the pictures or their order do."""
    with naming(path):
        found = parquet.metadata.row_group(group)
        chunk = next(c for c in map(found.column, range(found.num_columns)) if c.path_in_schema == columns.image)
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    with naming(path), open(path, "rb") as file:
        ends = b"".join(
            os.pread(file.fileno(), 4096, max(start, place)) for place in (start, start + chunk.total_compressed_size - 4096)
        )
    return found.total_byte_size, zlib.crc32(ends)


def build_index(globs: str | Sequence[str], allowed_identities: Iterable[str] | None, columns: Columns = COLUMNS) -> RowIndex:
    """Index the rows whose identity is allowed (None: all), reading the identity column only.

    Raises ValueError if there is none.
    """
    allowed = None if allowed_identities is None else set(map(str, allowed_identities))
    files, paths, units, offsets, unit_of_row, row_of_row, marks = [], find_files(globs), [], [], [], [], []
    stamps = [stamp(path) for path in paths]
    for number, path in enumerate(paths):
        parquet = open_parquet(path)
        with naming(path):
            check_contract(path, parquet.schema_arrow, columns)
        files.append(parquet.metadata)
        before = 0
        for group in range(parquet.num_row_groups):
            identities = read_identities(parquet, path, group, columns)
            coded = identities.dictionary_encode()  # asked once a person: pc.is_in hashes all names anew for each row group, 14 x
            kept = [allowed is None or name in allowed for name in coded.dictionary.to_pylist()]
            mask = np.array(kept, bool)[coded.indices.to_numpy()]
            rows = np.flatnonzero(mask).astype(np.int32)
            people = zlib.crc32("\n".join(identities.to_pylist()).encode())
            marks.append((path.name, group, zlib.crc32(mask.tobytes()), people, *mark_pictures(path, parquet, group, columns)))
            if len(rows):
                unit_of_row.append(np.full(len(rows), len(units), np.int32))
                row_of_row.append(rows)
                units.append((number, group))
                offsets.append(before)
            before += len(identities)
    if not units:
        raise ValueError(
            f"{globs}: no row of {len(paths)} files has an allowed identity; is split.out_dir the table of other data?"
        )
    starts = np.concatenate([[0], np.cumsum([len(rows) for rows in row_of_row])])
    return RowIndex(
        files, paths, np.array(units, np.int32), np.array(offsets), starts, np.concatenate(unit_of_row),
        np.concatenate(row_of_row), digest(*marks), stamps,
    )  # fmt: skip


def place_of(index: RowIndex, i: int) -> tuple[Path, int]:
    """Path of the file and row in it, counted from 0, of row `i` of the index."""
    unit = index.unit[i]
    return index.paths[index.units[unit, 0]], int(index.offset[unit] + index.row[i])


def draw_seed(seed: int, purpose: str, *address: int) -> int:
    """The seed of one draw, addressed by purpose and place: nothing random is carried along, so nothing random must be saved."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{'/'.join(map(str, address))}".encode()).digest()[:7])


def draw(seed: int, purpose: str, *address: int) -> torch.Generator:
    """A CPU generator for one draw, see `draw_seed`."""
    return torch.Generator().manual_seed(draw_seed(seed, purpose, *address))


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


# ---------------------------------------------------------------------------------------------------------------------
# Materialised shards: the split as files
# ---------------------------------------------------------------------------------------------------------------------

SHARD_SCHEMA = pa.schema([("identity_id", pa.string()), ("image_filename", pa.string()), ("image_bytes", pa.binary())])


def read_rows(index: RowIndex, columns: Columns, places: np.ndarray | None = None) -> Iterator[pa.Table]:
    """The rows of the index, all or those at some ascending `places`, part of a row group at a time, by the contract's names."""
    names, places = [columns.identity, columns.filename, columns.image], np.arange(len(index.unit)) if places is None else places
    for unit in np.unique(index.unit[places]).tolist():
        wanted = index.row[places[slice(*np.searchsorted(places, index.starts[unit : unit + 2]))]]
        (number, group), offset = index.units[unit].tolist(), 0
        parquet = open_indexed(index, number)
        with naming(index.paths[number]):
            for batch in parquet.iter_batches(ROW_GROUP_ROWS, row_groups=[group], columns=names, use_threads=False):
                inside = wanted[(wanted >= offset) & (wanted < offset + len(batch))] - offset
                offset += len(batch)
                table = pa.Table.from_batches([batch]).select(names).rename_columns(SHARD_SCHEMA.names)
                if len(inside):
                    yield table.cast(SHARD_SCHEMA).take(inside)  # cast first: pyarrow cannot take from views
                if offset > wanted[-1]:
                    break
        if offset <= wanted[-1]:  # a damaged footer: pyarrow stops at the shortest column, without a word
            raise ValueError(
                f"{index.paths[number]} row group {group}: ends at row {offset}, the index expects row {wanted[-1]}; "
                f"damaged; fetch it again or leave it out"
            )


def image_bytes_of(index: RowIndex, columns: Columns) -> int:
    """About how many bytes the allowed rows' images take, from the files' own figures."""
    total = 0
    for number, group in index.units.tolist():
        found = index.files[number].row_group(group)
        total += sum(
            found.column(c).total_uncompressed_size
            for c in range(found.num_columns)
            if found.column(c).path_in_schema == columns.image
        )
    return total * len(index.unit) // max(1, sum(index.files[n].row_group(g).num_rows for n, g in index.units.tolist()))


def write_shard(path: Path, tables: Iterable[pa.Table], note: dict) -> None:
    """Write tables of SHARD_SCHEMA as row groups of ROW_GROUP_ROWS, images uncompressed: they are compressed already."""
    packing = {
        "compression": {"identity_id": "zstd", "image_filename": "zstd", "image_bytes": "none"},
        "use_dictionary": ["identity_id"], "write_page_checksum": True,
    }  # fmt: skip
    with (
        write_whole(path) as temporary,
        pq.ParquetWriter(temporary, with_metadata(SHARD_SCHEMA, note), write_statistics=["identity_id"], **packing) as writer,
        syncing(temporary),
    ):
        left = SHARD_SCHEMA.empty_table()
        for table in tables:
            left = pa.concat_tables([left, table])
            whole = len(left) // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            if whole:
                writer.write_table(left.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
                left = left.slice(whole)
        if len(left):
            writer.write_table(left, row_group_size=ROW_GROUP_ROWS)


def scatter_rows(index: RowIndex, columns: Columns, shard_of: np.ndarray, folder: Path, bar: tqdm) -> None:
    """First pass: each row to the bucket of its shard, with its place in the global order beside it."""
    folder.mkdir()
    schema = SHARD_SCHEMA.append(pa.field("number", pa.int64()))
    count, done = int(shard_of.max()) + 1, 0
    with naming_output(folder), ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(folder / f"{shard:05d}.arrow"), schema)) for shard in range(count)]
        for table in stack.enter_context(closing(in_background(read_rows(index, columns), 4))):
            numbers = np.arange(done, done + len(table))
            table, shards = table.append_column("number", pa.array(numbers)), shard_of[numbers]
            for shard in np.unique(shards).tolist():
                writers[shard].write_table(table.take(np.flatnonzero(shards == shard)).combine_chunks())
            done += len(table)
            bar.update(len(table))


def sorted_bucket(path: Path, order: np.ndarray, rows: int) -> pa.Table:
    """Second pass: the `rows` rows of one shard in the global order. Raises ValueError for a bucket that lost some."""
    with naming(path):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    if len(table) != rows:  # a stream that was cut between two messages, as by a power cut, reads without an error
        raise ValueError(f"{path}: holds {len(table)} of {rows} rows; delete {path.parent} and run the command again")
    return table.take(np.argsort(order[table["number"].to_numpy()])).drop_columns("number")


def cut(tables: Iterable[pa.Table], lengths: Iterable[int]) -> Iterator[Iterator[pa.Table]]:
    """Cut a sequence of tables into runs of so many rows, read as they are asked for: each run to its end, before the next."""
    tables, left = iter(tables), SHARD_SCHEMA.empty_table()

    def run(missing: int) -> Iterator[pa.Table]:
        nonlocal left
        while missing:
            left = left if len(left) else next(tables)
            table, left = left.slice(0, missing), left.slice(missing)
            missing -= len(table)
            yield table

    return map(run, lengths)


def in_background(items: Iterator, count: int) -> Iterator:
    """The same items, of which a thread makes up to `count` before they are asked for. An error in it is raised here."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, end) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(pool.submit(next, items, end))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


def write_side(index: RowIndex, columns: Columns, out_dir: Path, names: list[str], note: dict, size_bytes: int) -> None:
    """Write the shards `names` with `note` into a folder beside `out_dir`, which takes its place when all are there."""
    part, rows, shuffled = out_dir.with_name(f".{out_dir.name}.part"), len(index.unit), note["split"] == "train"
    marker, buckets = part / "note.json", part / "buckets"
    foreign = [p.name for p in out_dir.glob("*") if not re.fullmatch(re.escape(out_dir.name) + r"_\d{5}\.parquet", p.name)]
    if foreign:
        raise ValueError(f"{out_dir}: holds {foreign[:3]}, which is not ours to delete; choose another split.out_dir")
    if not marker.exists() or json.loads(marker.read_text()) != note:  # of another split, or none
        shutil.rmtree(part, ignore_errors=True)
        need_space(part, (2 if shuffled else 1) * size_bytes * 11 // 10, f"materialising {rows} {note['split']} images")
        with write_whole(marker) as temporary:
            temporary.write_text(json.dumps(note))
    order = np.random.default_rng(draw_seed(0, "materialize", rows)).permutation(rows) if shuffled else np.arange(rows)
    shard_of = order * len(names) // rows
    edges = np.bincount(shard_of).cumsum()  # rows in the shards until the end of each
    lengths, stop = np.diff(edges, prepend=0).tolist(), threading.Event()

    def read(run: list[int]) -> Iterator[Iterable[pa.Table]]:
        """The tables of each shard of a run, read as they are asked for."""
        if shuffled:  # by `map`, so that a bucket is in memory only while its shard is written
            yield from (map(sorted_bucket, [buckets / f"{n:05d}.arrow"], [order], [lengths[n]]) for n in run)
            return
        places = np.concatenate([np.arange(edges[n] - lengths[n], edges[n]) for n in run])
        with closing(in_background(read_rows(index, columns, places), 4)) as tables:
            yield from cut(tables, [lengths[n] for n in run])

    def write(run: list[int], bar: tqdm) -> None:
        with closing(read(run)) as shards:
            for n, tables in zip(run, shards, strict=True):
                if stop.is_set():
                    break
                write_shard(part / names[n], tables, note)
                with bar.get_lock():
                    bar.update(lengths[n])

    with progress(total=rows * (1 + shuffled), desc=f"{note['split']}/{out_dir.name}", unit="image") as bar:
        missing = [n for n, name in enumerate(names) if not (part / name).exists()]
        bar.update(rows - sum(lengths[n] for n in missing))
        if shuffled and not buckets.exists() and missing:
            shutil.rmtree(part / "dealing", ignore_errors=True)
            scatter_rows(index, columns, shard_of, part / "dealing", bar)
            os.replace(part / "dealing", buckets)
        runs = [run.tolist() for run in np.array_split(missing, min(WRITERS, len(missing)))] if missing else []
        with ThreadPoolExecutor(WRITERS) as pool:
            try:
                for written in as_completed([pool.submit(write, run, bar) for run in runs]):
                    written.result()
            finally:
                stop.set()  # after an error or Ctrl-C no thread begins another shard
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
    if split_name not in splits.identities:
        raise ValueError(f"split_name={split_name!r}: must be one of {sorted(splits.identities)}")
    index = build_index(input_glob, splits.identities[split_name], columns)
    size = image_bytes_of(index, columns)
    count = min(len(index.unit), -(-size // SHARD_BYTES))
    note = {"split": split_name, "table": splits.hash, "source": index.fingerprint, "rows": len(index.unit), "shards": count}
    names = [f"{out_dir.name}_{shard:05d}.parquet" for shard in range(count)]
    with locked(out_dir.with_name(f".{out_dir.name}.lock"), wait=True):
        if not out_dir.exists() or not all((out_dir / n).exists() and read_metadata(out_dir / n) == note for n in names):
            write_side(index, columns, out_dir, names, note, size)
    return [out_dir / name for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    digiface_glob: str
    digi2real_glob: str | None
    demo_identities: int | None = field(metadata={"at_least": 8})
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


def decode_image(data: bytes | memoryview, size: int, max_pixels: int) -> np.ndarray:
    """Encoded image -> RGB uint8 [size, size, 3]; a picture that is not square loses its longer side's ends. Raises ValueError.

    By Pillow: torchvision's decoder ends the process on a damaged PNG.
    """
    if not len(data):
        raise ValueError("no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_image_pixels={max_pixels}")
            if image.getexif().get(0x0112, 1) != 1:  # the camera was held sideways
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
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
        self.first_met: dict[tuple[Path, int], int] = {}  # number of the image that met it: threads decode ahead

    def add(self, path: Path, row: int, reason: str, met: int = 0) -> None:
        """Note a broken image. Raises ValueError where no number of good ones can make up for those that were found."""
        with self.lock:
            self.first_met[path, row] = min(met, self.first_met.get((path, row), met))
            if (path, row) not in self.found:
                self.found[path, row] = reason
                if len(self.found) <= 10:
                    log.warning("%s row %d: broken image (%s); %s", path, row, reason, self.instead)
            if len(self.found) > self.max_fraction * self.whole:
                self.refuse(len(self.found), self.whole)

    def judge(self, seen: int) -> None:
        """Raise ValueError if more than the allowed fraction of `seen` images is broken; judged from 1,000 on, or all there are."""
        seen_once = min(seen, self.whole)
        if seen < min(1000, self.whole) or len(self.found) <= self.max_fraction * seen_once:
            return
        with self.lock:
            count = sum(met < seen for met in self.first_met.values())
        if count > self.max_fraction * seen_once:
            self.refuse(count, seen_once)

    def refuse(self, count: int, seen: int) -> None:
        (path, row), reason = next(iter(self.found.items()))
        raise ValueError(
            f"{count} of {seen} images are broken, more than data.max_bad_fraction={self.max_fraction}; "
            f"the first: {path} row {row} ({reason})"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Streams: an endless sequence of images, addressed by number
# ---------------------------------------------------------------------------------------------------------------------


def yield_to_training() -> None:
    """Let this thread run where torch's leave room, which all wait for any of them that is held up: 1.25 x from PNG to views."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def load_batches(
    sources: Sequence, drawn: Callable[[int], Sequence[int]], start: int, stop: int, device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the images of steps start..stop-1 as uint8 [B, 3, S, S], channels last in memory, on `device`.

    `drawn(step)` says how many images of each source came before that step: the whole state of a loader. Threads decode PREFETCH
    batches ahead; an error in a thread is raised here.
    """
    device, size = torch.device(device), sources[0].image_size
    resident = sources[0].on_device
    pending: deque[tuple[int, Tensor, list[Future]]] = deque()

    def begin(step: int) -> None:
        ranges = list(zip(sources, drawn(step), drawn(step + 1), strict=True))
        rows = sum(last - first for _, first, last in ranges)
        where = {"device": device} if resident else {"pin_memory": device.type == "cuda"}
        images, done, futures = torch.empty(rows, size, size, 3, dtype=torch.uint8, **where), 0, []
        for source, first, last in ranges:
            if last > first:
                futures += source.submit(pool, first, last, images[done : done + last - first])
            done += last - first
        pending.append((step, images, futures))

    started = yield_to_training if device.type == "cpu" else None
    with ThreadPoolExecutor(workers or os.cpu_count(), "decode", started) as pool:
        try:
            for step in range(start, stop + PREFETCH):
                if step < stop:
                    begin(step)
                if step - start >= PREFETCH:
                    finished, images, futures = pending.popleft()
                    for future in futures:
                        future.result()
                    for source, last in zip(sources, drawn(finished + 1), strict=True):
                        source.bad.judge(last)
                    yield images.to(device, non_blocking=True).permute(0, 3, 1, 2)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for source in sources:
                source.next_image = -1  # reads that were cancelled must not be waited for


class ParquetImageStream:
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
        self.globs, self.columns = globs, columns
        self.index = index or build_index(globs, allowed_identities, columns)
        self.shuffle_files, self.shuffle_buffer, self.batch_read_rows = shuffle_files, shuffle_buffer, batch_read_rows
        self.image_size, self.seed, self.max_pixels = image_size, seed, max_image_pixels
        self.bad = BadImages(max_bad_fraction, len(self.index.unit), "a readable one of its row group stands in for it")
        self.loaded: dict[tuple[int, int], Future] = {}  # encoded rows by (pass, unit), from first to last use
        self.to_come: dict[int, np.ndarray] = {}  # by pass: images of each unit that are still to be drawn
        self.next_image = -1
        self.order = functools.lru_cache(maxsize=2)(self.order)

    def __len__(self) -> int:
        return len(self.index.unit)

    @property
    def fingerprint(self) -> str:
        return digest(self.order_kind, self.index.fingerprint, self.shuffle_files, self.shuffle_buffer)

    def order(self, number: int) -> np.ndarray:
        """Rows of the index [N] in the order of pass `number`."""
        rng = np.random.default_rng(draw_seed(self.seed, "order", number))
        return lane_order(self.index.unit, rng, self.shuffle_files, self.shuffle_buffer)

    def rows(self, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Images first..stop-1 of the endless sequence as (pass, rows of the index), one pair a pass."""
        while first < stop:
            number, start = divmod(first, len(self))
            rows = self.order(number)[start : start + stop - first]
            yield number, rows
            first += len(rows)

    def read_unit(self, unit: int) -> pa.ChunkedArray:
        """Encoded images of the allowed rows of one row group; a null where the file has none."""
        number, group = self.index.units[unit].tolist()
        path, wanted = self.index.paths[number], self.index.row[self.index.starts[unit] : self.index.starts[unit + 1]]
        parts, offset = [], 0
        try:
            parquet = open_indexed(self.index, number)
            for batch in parquet.iter_batches(
                self.batch_read_rows, row_groups=[group], columns=[self.columns.image], use_threads=False
            ):
                inside = wanted[(wanted >= offset) & (wanted < offset + len(batch))] - offset
                column = pc.cast(batch.column(0), pa.large_binary())
                parts.append(column if len(inside) == len(batch) else column.take(pa.array(inside)))
                offset += len(batch)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise ValueError(f"{path} row group {group}: cannot be read ({first_line(error)}); has the file changed?") from error
        if offset <= wanted[-1]:
            raise ValueError(
                f"{path} row group {group}: ends at row {offset}, the index expects row {wanted[-1]}; has the file changed?"
            )
        return pa.chunked_array(parts, pa.large_binary())

    def decode_row(self, unit: int, place: int, encoded: pa.ChunkedArray, image: int) -> np.ndarray:
        """Decode one image; for a broken one the next readable one of the row group, going round, then of the next row groups."""
        for step in range(len(self.index.units)):
            for i in range(len(encoded)):
                candidate = (place + i) % len(encoded)
                try:
                    data = encoded[candidate].as_buffer() if encoded[candidate].is_valid else b""
                    return decode_image(data, self.image_size, self.max_pixels)
                except ValueError as error:
                    self.bad.add(*place_of(self.index, int(self.index.starts[unit]) + candidate), str(error), image)
            unit, place = (unit + 1) % len(self.index.units), 0
            encoded = self.read_unit(unit) if step + 1 < len(self.index.units) else encoded
        raise ValueError(
            f"{self.globs}: not one of {len(self)} images can be decoded; the first: {next(iter(self.bad.found.items()))}"
        )

    def decode_rows(self, rows: np.ndarray, encoded: dict[int, Future], out: np.ndarray, first: int) -> None:
        """Decode rows of the index into out [len(rows), S, S, 3]; waits for their row groups, whose reading started before."""
        for image, (row, target) in enumerate(zip(rows.tolist(), out, strict=True), first):
            unit = int(self.index.unit[row])
            target[:] = self.decode_row(unit, row - int(self.index.starts[unit]), encoded[unit].result(), image)

    def submit(self, pool: ThreadPoolExecutor, first: int, stop: int, out: Tensor) -> list[Future]:
        """Start to decode images first..stop-1 of the sequence into uint8 [stop - first, S, S, 3]. For one caller, in order.

        Reading is requested before the decoding that waits for it, and the pool starts tasks in order, so one worker is enough.
        """
        if first != self.next_image:  # the start, or a jump to where a checkpoint was taken
            self.loaded, self.to_come = {}, {}
        self.next_image = stop
        for number, rows in self.rows(first, stop + min(READ_AHEAD, len(self))):
            if number not in self.to_come:
                still = self.order(number)[max(0, first - number * len(self)) :]
                self.to_come[number] = np.bincount(self.index.unit[still], minlength=len(self.index.units))
            for unit in np.unique(self.index.unit[rows]).tolist():
                if (number, unit) not in self.loaded:
                    self.loaded[number, unit] = pool.submit(self.read_unit, unit)
        futures, done = [], 0
        for number, rows in self.rows(first, stop):
            units, uses = np.unique(self.index.unit[rows], return_counts=True)
            encoded = {unit: self.loaded[number, unit] for unit in units.tolist()}
            for start in range(0, len(rows), TASK_IMAGES):
                part = rows[start : start + TASK_IMAGES]
                target = out[done + start : done + start + len(part)].numpy()
                futures.append(pool.submit(self.decode_rows, part, encoded, target, first + done + start))
            done += len(rows)
            self.to_come[number][units] -= uses
            for unit in units[self.to_come[number][units] == 0].tolist():  # its last image: tasks hold what they still need
                del self.loaded[number, unit]
            if not self.to_come[number].any():
                del self.to_come[number]
        return futures

    def __iter__(self) -> Iterator[Tensor]:
        for images in load_batches([self], lambda step: [min(64 * step, len(self))], 0, -(-len(self) // 64)):
            yield from images

    def in_file_order(self) -> "ParquetImageStream":
        """The same images in the order of the files."""
        return ParquetImageStream(
            self.globs, False, 0, self.batch_read_rows, None, columns=self.columns, image_size=self.image_size, seed=self.seed,
            max_bad_fraction=self.bad.max_fraction, max_image_pixels=self.max_pixels, index=self.index,
        )  # fmt: skip


class CacheNote(NamedTuple):
    """What is kept beside a decoded cache."""

    sums: list[int]  # checksums of the chunks that are finished
    broken: list[tuple[str, int, str]]  # file, row and reason of the images that another one stands in for


def read_cache_note(path: Path) -> CacheNote:
    """Raises ValueError for a file that is no such note."""
    try:
        note = CacheNote(**json.loads(path.read_bytes())) if path.exists() else CacheNote([], [])
        if all(isinstance(number, int) for number in note.sums):
            return CacheNote(note.sums, [(str(file), int(row), str(reason)) for file, row, reason in note.broken])
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path}: not the checksums of a cache; delete it and the files beside it, they will be made again")


def build_cache(stream: ParquetImageStream, part: Path, note_path: Path, shape: tuple[int, ...], workers: int | None) -> None:
    """Decode the images of `stream` into the file `part`, from where a stopped build left off; a `CacheNote` grows beside it."""
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
            with write_whole(note_path) as temporary:
                temporary.write_text(json.dumps(CacheNote(sums, broken)._asdict()))
            bar.update(len(batch))


def open_cache(stream: ParquetImageStream, folder: Path, workers: int | None) -> np.memmap:
    """The decoded images of `stream` as a read-only map uint8 [N, S, S, 3], made if it is not there, checked by its checksums.

    A build that was stopped goes on where it was; of two processes that want the same cache, one builds and the other waits.
    Raises OSError where the disk has no room, ValueError for a damaged cache, or one with too many broken images.
    """
    size = stream.image_size
    shape = (len(stream), size, size, 3)
    name = f"{digest(stream.index.fingerprint, size, stream.max_pixels, len(stream))}.u8"
    final, part, note_path = folder / name, folder / f"{name}.part", folder / f"{name}.json"
    with locked(folder / f".{name}.lock", wait=True):
        if not final.exists():
            build_cache(stream, part, note_path, shape, workers)
            os.replace(part, final)
    if final.stat().st_size != math.prod(shape) or not note_path.exists():
        raise ValueError(
            f"{final}: has {final.stat().st_size} bytes instead of {math.prod(shape)}, or its checksums are gone; delete it"
        )
    images, note = np.memmap(final, np.uint8, "r", shape=shape), read_cache_note(note_path)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # crc32 releases the GIL
        starts = range(0, len(images), CACHE_CHUNK)
        found = list(pool.map(lambda start: zlib.crc32(images[start : start + CACHE_CHUNK]), starts))
    if found != note.sums:
        bad = sum(a != b for a, b in itertools.zip_longest(found, note.sums))
        raise ValueError(f"{final}: {bad} of {len(found)} chunks are damaged; delete it, it will be made again")
    for file, row, reason in note.broken:
        stream.bad.add(Path(file), row, reason)
    return images


class DecodedCache:
    """The images of a stream, decoded once into a memory map uint8 [N, S, S, 3]; a true permutation of all of them each pass."""

    order_kind, on_device = "permutation", False

    def __init__(self, stream: ParquetImageStream, folder: str | Path, workers: int | None = None):
        self.index, self.seed, self.image_size, self.bad = stream.index, stream.seed, stream.image_size, stream.bad
        self.fingerprint = self.fingerprint_of(stream)
        self.images: np.ndarray | Tensor = open_cache(stream, Path(folder), workers)
        self.order = functools.lru_cache(maxsize=2)(self.order)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def fingerprint_of(cls, stream: ParquetImageStream) -> str:
        """What `fingerprint` will be, before the cache is made."""
        return digest(cls.order_kind, stream.index.fingerprint)

    rows = ParquetImageStream.rows

    def order(self, number: int) -> np.ndarray:
        return np.random.default_rng(draw_seed(self.seed, "order", number)).permutation(len(self))

    def submit(self, pool: ThreadPoolExecutor, first: int, stop: int, out: Tensor) -> list[Future]:
        """Start to copy images first..stop-1 of the sequence into uint8 [stop - first, S, S, 3]."""
        rows = np.concatenate([rows for _, rows in self.rows(first, stop)])
        parts = [(rows[i : i + TASK_IMAGES], out[i : i + TASK_IMAGES].numpy()) for i in range(0, len(rows), TASK_IMAGES)]
        return [pool.submit(np.take, self.images, part, 0, target, "clip") for part, target in parts]


class DeviceCache(DecodedCache):
    """A `DecodedCache` copied to the device once: no work on the CPU per image at all. The order is the same."""

    on_device = True

    def __init__(self, stream: ParquetImageStream, folder: str | Path, workers: int | None, device: torch.device):
        super().__init__(stream, folder, workers)
        decoded, need = self.images, self.images.nbytes
        if device.type == "cuda" and need > 0.6 * torch.cuda.mem_get_info(device)[0]:
            raise ValueError(
                f"data.cache=device: {need / 1e9:.1f} GB of images do not fit beside the training on {device}; set "
                f"data.cache=decoded"
            )
        self.images = torch.empty(decoded.shape, dtype=torch.uint8, device=device)
        for start in range(0, len(decoded), CACHE_CHUNK):
            self.images[start : start + CACHE_CHUNK] = torch.from_numpy(np.array(decoded[start : start + CACHE_CHUNK]))

    def submit(self, pool: ThreadPoolExecutor, first: int, stop: int, out: Tensor) -> list[Future]:
        rows = np.concatenate([rows for _, rows in self.rows(first, stop)])
        torch.index_select(self.images, 0, torch.from_numpy(rows).to(out.device, non_blocking=True), out=out)
        return []


def shuffle_quality(stream: ParquetImageStream, queue_size: int) -> float:
    """How many times as often the queue holds other pictures of an image's person as under a true shuffle of the same rows.

    Identities are read again for this figure only. 1 is ideal; nan where nobody has two pictures.
    """
    index, codes, known = stream.index, [], {}
    for unit, (number, group) in enumerate(index.units.tolist()):
        parquet = open_parquet(index.paths[number], index.files[number])
        names = read_identities(parquet, index.paths[number], group, stream.columns)
        names = names.take(pa.array(index.row[index.starts[unit] : index.starts[unit + 1]])).to_pylist()
        codes += [known.setdefault(name, len(known)) for name in names]
    kept = np.array(codes)
    true_shuffle = np.random.default_rng(0).permutation(len(kept))
    ideal = repeats_in_queue(kept[true_shuffle], queue_size)
    return repeats_in_queue(kept[stream.order(0)], queue_size) / ideal if ideal else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Curriculum
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class CurriculumConfig:
    name: str
    progress: list[float]
    digiface_share: list[float]


class Schedule:
    """How many images of each source come before each step: the curriculum as arithmetic.

    `digiface_share` is linear between the points `progress` in [0, 1] of the training; None keeps the natural share of the rows.
    """

    def __init__(self, cfg: CurriculumConfig | None, rows: Sequence[int], batch_size: int, epochs: int):
        if sum(rows) < batch_size:
            raise ValueError(f"train.batch_size={batch_size} is more than the {sum(rows)} train images; lower it")
        self.batch_size, self.steps_per_epoch = batch_size, sum(rows) // batch_size
        self.total_steps = epochs * self.steps_per_epoch
        middle = (np.arange(self.total_steps) + 0.5) / self.total_steps
        points = cfg and cfg.progress
        share = np.interp(middle, points, cfg.digiface_share) if points else np.full(len(middle), rows[0] / sum(rows))
        share = share if len(rows) == 2 else np.ones(len(middle))
        self.of_first = np.floor(np.concatenate([[0], np.cumsum(share * batch_size)]) + 0.5).astype(np.int64)  # [steps + 1]

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
                yield from (place_of(source.index, row) for row in rows.tolist())

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.batches():
            yield from images


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: whole batches on the device, each image with its own draw
# ---------------------------------------------------------------------------------------------------------------------


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
    low_resolution: Op
    blur: Op
    sharpness: Op
    posterise: Op
    solarise: Op
    autocontrast: Op
    equalise: Op
    noise: Op
    erase: Op


BLUR_REACH = 6  # pixels: more than three times the largest sigma of conf/augment
STRIP_PX = 16  # rows of a banded product at a time: fewer are less work, but slower work
NEUTRAL = {"zoom": 1.0, "aspect": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}  # the others: 0


def draw_strengths(cfg: AugmentConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Strength [count] of each operation for each image, NEUTRAL where it does not apply.

    With cfg.pick = n, just n of the operations with p > 0 (doing nothing is one more) apply to an image, as in RandAugment.
    """
    ops = {name: op for name, op in vars(cfg).items() if isinstance(op, Op)}
    chance, low, high = torch.tensor([[op.p, op.low, op.high] for op in ops.values()]).T[:, :, None]  # [ops, 1] each
    neutral = torch.tensor([NEUTRAL.get(name, 0.0) for name in ops])[:, None]
    gate = torch.rand(len(ops), count, generator=generator)
    applies = gate < chance
    if cfg.pick:
        scores = torch.cat([gate.masked_fill(chance == 0, -1), torch.rand(1, count, generator=generator)])
        applies = (scores >= scores.topk(min(cfg.pick, len(scores)), dim=0).values[-1])[:-1] & (chance > 0)
    even = torch.rand(len(ops), count, generator=generator)
    strengths = torch.where(applies, low + (high - low) * even, neutral)
    flip = (torch.rand(count, generator=generator) < cfg.flip).float()
    return dict(zip(ops, strengths, strict=True)) | {"flip": flip}


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


def resample(images: Tensor, maps: Tensor, far: bool) -> Tensor:
    """Pictures [n, 3, S, S] seen through `geometry` maps [n, 2, 4], bilinear; outside, the picture is mirrored.

    far: whether a view may reach beyond 3, past the mirrored picture. Views are made 1.05 times as fast where none does.
    """
    size = images.shape[-1]
    axis = (torch.arange(size, device=images.device) * 2 + 1) / size - 1  # centres of the pixels
    powers = torch.stack([torch.ones_like(axis), axis])  # (1, x) or (1, y): their products are the basis
    grid = powers.T @ maps.view(-1, 2, 2, 2) @ powers  # [n, 2, S, S]
    if not far:
        torch.lerp(grid, grid.clamp(-1, 1), 2.0, out=grid)  # mirrored once; "reflection" is for any distance
    outside = "reflection" if far else "border"
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode=outside, align_corners=False)


def colour_matrix(s: dict[str, Tensor]) -> Tensor:
    """All colour as one affine map per image, [n, 3, 4], for pixels in [-1, 1]: brightness, contrast, saturation, hue, grey."""
    n = len(s["hue"])
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    saturation = (s["saturation"] * (s["grey"] == 0)).view(n, 1, 1)
    turn = (2 * math.pi * s["hue"]).view(n, 1, 1)
    grey_axis = torch.ones(3, 3) / 3  # Rodrigues' rotation about (1, 1, 1)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = turn.cos() * torch.eye(3) + turn.sin() * cross + (1 - turn.cos()) * grey_axis
    gain = (s["brightness"] * s["contrast"]).view(n, 1, 1)
    offset = (
        ((s["brightness"] - 1) * s["contrast"]).view(n, 1, 1).expand(n, 3, 1)
    )  # brightness scales [0, 1], contrast about mid-grey
    return torch.cat([gain * (hue @ (saturation * torch.eye(3) + (1 - saturation) * luma)), offset], dim=2)


@functools.lru_cache(256)
def low_resolution_map(kept: int, size: int, device: torch.device) -> Tensor:
    """[size, size]: shrinks an axis of `size` pixels to `kept` of them and back; bilinear, without aliasing."""
    small = F.interpolate(torch.eye(size)[None, None], (kept, size), mode="bilinear", antialias=True)
    return F.interpolate(small, (size, size), mode="bilinear")[0, 0].to(device)


@functools.cache
def shift_maps(size: int, device: torch.device) -> Tensor:
    """[2 * BLUR_REACH + 1, size, size]: matrix k shifts an axis by k - BLUR_REACH pixels; outside, the picture is mirrored."""
    mirrored = F.pad(torch.eye(size, device=device)[None], (0, 0, BLUR_REACH, BLUR_REACH), mode="reflect")[0]
    return mirrored.unfold(0, size, 1).transpose(1, 2).contiguous()


def blur_maps(sigma_px: Tensor, size: int, device: torch.device) -> Tensor:
    """[n, size, size]: Gaussian blur of an axis with a sigma [n] each; 0 does nothing."""
    shift = torch.arange(-BLUR_REACH, BLUR_REACH + 1)
    kernel = torch.softmax(-0.5 * (shift / sigma_px.clamp(min=0.05)[:, None]) ** 2, dim=1)  # [n, 13]
    return torch.tensordot(kernel.to(device, non_blocking=True), shift_maps(size, device), 1)


def banded_product(maps: Tensor, x: Tensor, reach_px: int) -> Tensor:
    """maps [n, S, S] times x [n, S, W], for maps that are 0 further than `reach_px` off the diagonal; by strips: 1.35 x."""
    size = x.shape[1]
    strips = [(start, min(start + STRIP_PX, size), max(start - reach_px, 0)) for start in range(0, size, STRIP_PX)]
    return torch.cat([
        torch.bmm(maps[:, start:stop, first : stop + reach_px], x[:, first : stop + reach_px]) for start, stop, first in strips
    ], dim=1)  # fmt: skip


def soften(x: Tensor, side: Tensor, sigma_px: Tensor) -> Tensor:
    """Shrink to a share `side` [n] of the size, in whole pixels, and back; then blur by a Gaussian.

    A strength of 0 does nothing; not all are 0. Both are one matrix for each image, for its rows and its columns: 2.3 times as
    fast as `interpolate` for each size, and 1.2 times as one after the other. Gives [n, 3, S, S], channels last in memory.
    """
    n, channels, size, _ = x.shape
    kept = torch.where(side > 0, (size * side).round().clamp(1, size), size).long()
    maps, reach_px = None, 0
    if (side > 0).any():
        maps = torch.stack([low_resolution_map(k, size, x.device) for k in kept.tolist()])
        reach_px += math.ceil(2 * size / int(kept.min()))  # a pixel's two neighbours among the kept ones, and theirs
    if (sigma_px > 0).any():
        blurs = blur_maps(sigma_px, size, x.device)
        maps = blurs if maps is None else torch.bmm(blurs, maps)
        reach_px += BLUR_REACH
    x = banded_product(maps, x.flatten(1, 2).transpose(1, 2), reach_px)  # [n, S, 3 S], the rows of the channels last
    x = banded_product(maps, x.view(n, size * channels, size).transpose(1, 2), reach_px)  # [n, S, S 3]
    return x.view(n, size, size, channels).permute(0, 3, 1, 2)


def per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, x.dtype, non_blocking=True).view(-1, 1, 1, 1)


def sharpen(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the smoothed picture: 0 is smooth, 1 as it was, 2 sharp."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device).div(13).expand(3, 1, 3, 3)
    smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return smooth + per_image(factor, x) * (x - smooth)


def posterise(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` [n] of each 8-bit value."""
    step = per_image(2 ** (8 - bits.round()), x)
    return (((x + 1) * 127.5).round() / step).floor() * step / 127.5 - 1


def solarise(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is brighter than `threshold` [n], in [0, 1]."""
    return torch.where((x + 1) / 2 >= per_image(threshold, x), -x, x)


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel of each image to the whole range."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-3) * 2 - 1, x)


def equalise(x: Tensor, _: Tensor) -> Tensor:
    """Even out the histogram of each channel of each image."""
    levels = ((x + 1) * 127.5).round().clamp(0, 255).long().flatten(2)  # [n, 3, S*S]
    counts = torch.zeros(*levels.shape[:2], 256, device=x.device).scatter_add_(
        2, levels, torch.ones_like(levels, dtype=torch.float)
    )
    others = levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))  # [n, 3, 1]: pixels below the brightest level
    table = (counts.cumsum(2) - counts) / others.clamp(min=1) * 2 - 1  # the darkest level goes to -1, the brightest to 1
    return torch.where(others[..., None] > 0, table.gather(2, levels).view_as(x), x)


FILTERS = {"sharpness": sharpen, "posterise": posterise, "solarise": solarise, "autocontrast": autocontrast, "equalise": equalise}


def put_rows(into: Tensor, where: Tensor, rows: Tensor) -> None:
    """into[where] = rows, float32 [N, ...] and [n, ...], contiguous.

    The CPU moves one value after the other, so four are moved as one: views are made 1.04 times as fast.
    """
    into, rows = into.flatten(1), rows.flatten(1)
    wide = torch.complex128 if into.device.type == "cpu" and into.shape[1] % 4 == 0 else torch.float32
    into.view(wide).index_copy_(0, where, rows.view(wide))


def erase(x: Tensor, area: Tensor, u: Tensor) -> Tensor:
    """Paint into x [n, 3, S, S] a rectangle of a share `area` [n] of each picture, in a random colour, anywhere; 0 paints nothing.

    `u` [n, 6] in 0..1 says where and in which colour; it and `area` are on the CPU. x is channels last in memory.
    """
    n, channels, size, _ = x.shape
    ratio = torch.exp((u[:, 0] * 2 - 1) * math.log(2))
    half_w, half_h = (area * ratio).sqrt() / 2, (area / ratio).sqrt() / 2  # shares of the side
    axis = (torch.arange(size) + 0.5) / size
    column, row = ((axis - u[:, i, None]).abs() < half[:, None] for i, half in ((1, half_w), (2, half_h)))  # [n, S] each
    image, line = row.nonzero(as_tuple=True)  # only the lines that it crosses: 2.3 times as fast as whole pictures
    column, colour = column.repeat_interleave(channels, dim=1), (u[:, 3:] * 2 - 1).repeat(1, size)  # [n, S 3]: vectors, 1.5 x
    image, line, column, colour = (t.to(x.device, non_blocking=True) for t in (image, image * size + line, column, colour))
    lines = x.permute(0, 2, 3, 1).view(n * size, size * channels)
    painted = torch.where(column.index_select(0, image), colour.index_select(0, image), lines.index_select(0, line))
    put_rows(lines, line, painted)
    return x


def on_rows(x: Tensor, strength: Tensor, function: Callable[..., Tensor], *drawn: Tensor) -> Tensor:
    """Replace the images [n, 3, S, S], channels last in memory, whose strength is not 0 by `function(images, strength, *drawn)`.

    `strength` [n] is on the CPU.
    """
    rows = strength.nonzero().squeeze(1)
    if len(rows):
        where, pixels = rows.to(x.device, non_blocking=True), x.permute(0, 2, 3, 1)
        changed = function(pixels.index_select(0, where).permute(0, 3, 1, 2), strength[rows], *(values[rows] for values in drawn))
        put_rows(pixels, where, changed.permute(0, 2, 3, 1))
    return x


def to_float(images: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float in [-1, 1] (mean = std = 0.5), the preprocessing of training and of embed."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def augment(images: Tensor, cfg: AugmentConfig, generator: torch.Generator, views: int = 1) -> Tensor:
    """Random views of each picture: uint8 [n, 3, S, S] -> float [views * n, 3, S, S] in [-1, 1], channels last in memory.

    View v of picture i is row v * n + i. The draws are made on the CPU, so nothing waits for what the device computes.
    """
    count, device, size = views * len(images), images.device, images.shape[-1]
    s = draw_strengths(cfg, count, generator)
    corners = (torch.rand(count, 2, 4, generator=generator) * 2 - 1) * 2 * s["warp"].view(count, 1, 1)
    strip_source = torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
    picture = 3 * size * size
    strip = torch.randn(4 * picture, generator=strip_source, device=device)
    # of the strip each noisy view takes a picture's length, anywhere, so some of a batch share parts: 1.1 x of noise for each
    starts = torch.randint(3 * picture + 1, (count,), generator=generator)

    def add_noise(x: Tensor, sigma: Tensor, start: Tensor) -> Tensor:
        noise = strip.unfold(0, picture, 1)[start.to(device, non_blocking=True)].view(-1, size, size, 3).permute(0, 3, 1, 2)
        return torch.addcmul(x, per_image(sigma, x), noise)

    # images that are softened alike are made together, so that the others are left alone without a copy
    kind = (s["low_resolution"] > 0).long() + 2 * (s["blur"] > 0)
    order = (2 * kind + s["low_resolution"]).argsort(stable=True)
    groups = order.split(kind.bincount(minlength=4).tolist())
    at_once = 12 * torch.get_num_threads() if device.type == "cpu" else count  # few enough to stay in the cache: 1.2 x
    pixels, done = images.permute(0, 2, 3, 1), torch.empty(count, size, size, 3, device=device)
    maps, colours = geometry(s, corners), colour_matrix(s)
    far = bool((maps.abs().sum(dim=2) > 3).any())  # a sum of these is the largest x or y of a view, or more
    colours = torch.cat([colours[:, :, :3] / 127.5, colours[:, :, 3:] - colours[:, :, :3].sum(2, keepdim=True)], 2)  # of bytes
    filters = [(s[name], function) for name, function in FILTERS.items() if s[name].any()]
    for rows in (part for group in groups if len(group) for part in group.split(at_once)):
        where, side, sigma_px = rows.to(device, non_blocking=True), s["low_resolution"][rows], s["blur"][rows]
        map_, colour = (values[rows].to(device, non_blocking=True) for values in (maps, colours))
        x = resample(pixels.index_select(0, where % len(images)).float().permute(0, 3, 1, 2), map_, far)
        x = torch.bmm(colour[:, :, :3], x.flatten(2)).add_(colour[:, :, 3:]).view_as(x)
        x = soften(x, side, sigma_px) if kind[rows[0]] else x.contiguous(memory_format=torch.channels_last)
        for strength, function in filters:
            x = on_rows(x, strength[rows], function)
        x = on_rows(x, s["noise"][rows], add_noise, starts[rows])
        put_rows(done, where, x.clamp_(-1, 1).permute(0, 2, 3, 1))
    return erase(done.permute(0, 3, 1, 2), s["erase"], torch.rand(count, 6, generator=generator))


def two_views(images: Tensor, cfg: AugmentConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views of each picture, drawn apart: uint8 [B, 3, S, S] -> float [B, 3, S, S] twice."""
    return augment(images, cfg, generator, views=2).chunk(2)


# ---------------------------------------------------------------------------------------------------------------------
# Demo faces: drawn people, so that everything can be tried without a picture of anybody
# ---------------------------------------------------------------------------------------------------------------------

DEMO_PURPOSE = {"person": 1, "digiface": 2, "digi2real": 3}  # keys of the generators: a person, a picture in either style
# What makes a person: name -> (low, high). Lengths are in face units: 1 = about half the width of a face.
DEMO_TRAITS = {
    "width": (0.82, 1.04), "jaw": (0.5, 0.95), "chin": (1.2, 1.45), "skull": (1.12, 1.32), "square": (0.7, 1.05),
    "eye_x": (0.33, 0.45), "eye_width": (0.14, 0.23), "eye_up": (0.08, 0.15), "eye_down": (0.04, 0.1), "eye_tilt": (-0.25, 0.3),
    "iris": (0.07, 0.105), "brow_y": (0.2, 0.34), "brow_thick": (0.02, 0.1), "brow_tilt": (-0.22, 0.25), "brow_bend": (0, 0.1),
    "nose": (0.36, 0.6), "nose_width": (0.09, 0.23), "mouth_y": (0.78, 0.94), "mouth_width": (0.22, 0.42),
    "lip_up": (0.03, 0.1), "lip_down": (0.04, 0.13), "ear": (0.05, 0.2), "hairline": (-0.98, -0.68), "volume": (1.02, 1.2),
    "hair_length": (0.3, 1.5), "part": (-0.6, 0.6), "beard_y": (0.25, 0.7),
}  # fmt: skip
DEMO_SKIN = np.array([(236, 204, 182), (226, 176, 142), (205, 150, 110), (150, 100, 70), (95, 62, 48)], float)
DEMO_HAIR = np.array([(30, 26, 28), (70, 46, 32), (120, 78, 44), (205, 165, 95), (165, 75, 35), (150, 150, 155)], float)
DEMO_IRIS = np.array([(60, 38, 25), (110, 72, 38), (90, 120, 70), (80, 125, 165), (120, 130, 140)], float)
DEMO_CUTS = {  # hair style -> how its lower edge runs over the forehead, see `cap`
    "short": {"drop": 0.7, "bend": 4}, "fringe": {"drop": 0.3, "bend": 6, "wave": 0.04, "edge": -0.4},
    "parted": {"drop": 0.75, "bend": 1.2}, "long": {"drop": 0.8, "bend": 1.8}, "curly": {"drop": 0.4, "bend": 3, "wave": 0.06},
}  # fmt: skip


def demo_person(identity: int, seed: int) -> SimpleNamespace:
    """The traits of one identity: lengths within DEMO_TRAITS, RGB colours [3] in 0..255, hair, beard and marks."""
    rng = np.random.default_rng([seed, DEMO_PURPOSE["person"], identity, 0])
    person = SimpleNamespace(**{name: rng.uniform(low, high) for name, (low, high) in DEMO_TRAITS.items()})
    tone = rng.uniform(0, len(DEMO_SKIN) - 1)
    person.skin = np.array([np.interp(tone, range(len(DEMO_SKIN)), c) for c in DEMO_SKIN.T]) + rng.normal(0, 6, 3)
    person.lips = person.skin * (0.86, 0.62, 0.64) + rng.normal(0, 8, 3)
    person.hair = rng.choice(DEMO_HAIR) * rng.uniform(0.8, 1.15) + rng.normal(0, 6, 3)
    person.iris_colour = rng.choice(DEMO_IRIS) + rng.normal(0, 8, 3)
    person.cut = rng.choice(["bald", *DEMO_CUTS], p=[0.08, 0.2, 0.16, 0.2, 0.2, 0.16])
    person.beard = rng.choice(["none", "full", "moustache", "goatee"], p=[0.64, 0.14, 0.11, 0.11])
    marks = rng.choice([0, 1, 2, 24], p=[0.45, 0.25, 0.15, 0.15])  # a mole or two, or many freckles
    person.marks = rng.uniform((-0.6, 0.2), (0.6, 0.62 if marks == 24 else 1.1), (marks, 2))
    person.mark_size, person.mark_shade = (0.02, 0.78) if marks == 24 else (0.045, 0.5)
    person.curls = rng.uniform((-0.06, 0.2), (0.06, 0.34), (27, 2))
    return person


def demo_look(rng: np.random.Generator) -> SimpleNamespace:
    """What differs between two pictures of a person: pose (radians, face units), expression, light, things worn."""
    yaw, pitch, roll = np.clip(rng.normal(0, (0.16, 0.08, 0.18)), (-0.4, -0.2, -0.4), (0.4, 0.2, 0.4))
    return SimpleNamespace(
        yaw=yaw, pitch=pitch, roll=roll, scale=rng.uniform(0.31, 0.4), shift=rng.normal(0, 0.035, 2),
        smile=rng.normal(0.05, 0.04), gape=max(0.0, rng.normal(0.0, 0.05)), lids=rng.uniform(0.6, 1.1),
        brows=rng.normal(0, 0.03), gaze=rng.normal(0, 0.03), light=rng.normal(0, 0.15, 2), warmth=rng.normal(0, 0.05),
        exposure=rng.uniform(0.55, 1.25), cloth=np.full(3, rng.uniform(60, 150)),
        glasses=rng.random() < 0.1, hat=rng.random() < 0.05, scarf=rng.random() < 0.05,
    )  # fmt: skip


def lens(x: float, y: float, half: float, up: float, down: float, tilt: float = 0.0, power: float = 0.5) -> np.ndarray:
    """Points [26, 2] round what lies between two arcs over x - half .. x + half: an oval, or an eye with power 1."""
    s = np.sin(np.linspace(-math.pi / 2, math.pi / 2, 13))  # dense where an oval is steep
    arc, middle = np.clip(1 - s**2, 0, 1) ** power, y + tilt * half * s
    upper, lower = np.stack([x + half * s, middle - up * arc], 1), np.stack([x + half * s, middle + down * arc], 1)
    return np.concatenate([upper, lower[::-1]])


def outline(person: SimpleNamespace, grow: float = 1.0) -> np.ndarray:
    """Points [48, 2] of the head, from the chin over the left ear, the top and the right ear back towards the chin."""
    angle = np.linspace(-math.pi, math.pi, 48, endpoint=False)
    x, y = np.sin(angle), -np.cos(angle)
    x = np.sign(x) * np.abs(x) ** person.square * person.width * (1 - (1 - person.jaw) * np.clip(y, 0, 1) ** 2)
    return np.stack([x * grow, 0.05 + y * grow * np.where(y < 0, person.skull, person.chin)], 1)


def cap(person: SimpleNamespace, grow: float, level: float, edge: float, drop=0.0, bend=1.0, wave=0.0, part=0.0) -> np.ndarray:
    """Points [N, 2] of what covers the head down to `edge` at `part`, falling from there to `level` at the temples."""
    points = outline(person, grow)
    over = points[points[:, 1] < level]
    x = np.linspace(over[-1, 0], over[0, 0], 25)
    edge = edge + drop * np.abs(x - part) ** bend + wave * np.sin(16 * x)
    return np.concatenate([over, np.stack([x, np.minimum(edge, level)], 1)])


class Pen:
    """Draws in face units (x right, y down, origin between the eyes) on a head turned and placed as `look` says."""

    def __init__(self, image: Image.Image, look: SimpleNamespace) -> None:
        self.draw, self.look, self.unit_px = ImageDraw.Draw(image), look, look.scale * image.width
        self.centre_px = (np.array((0.5, 0.46)) + look.shift) * image.width

    def place(self, points: np.ndarray, lift: float) -> list[float]:
        """Points [N, 2] on the skin (an ellipsoid), or `lift` before it, to pixels in a row as Pillow takes them."""
        look, (x, y) = self.look, np.asarray(points, float).T
        z = 0.62 * np.sqrt(np.clip(1 - x**2 - (y - 0.15) ** 2 / 2.4, 0, 1)) + lift - 0.4
        x, y = x * math.cos(look.yaw) + z * math.sin(look.yaw), y * math.cos(look.pitch) + z * math.sin(look.pitch)
        cos, sin = math.cos(look.roll) * self.unit_px, math.sin(look.roll) * self.unit_px
        return (np.stack([x * cos - y * sin, x * sin + y * cos], 1) + self.centre_px).ravel().tolist()

    def fill(self, points: np.ndarray, colour: np.ndarray, lift: float = 0.0) -> None:
        self.draw.polygon(self.place(points, lift), tuple(np.clip(colour, 0, 255).astype(int).tolist()))

    def line(self, points: np.ndarray, colour: np.ndarray, lift: float = 0.0) -> None:
        width_px = max(2, round(0.045 * self.unit_px))
        self.draw.line(self.place(points, lift), tuple(np.clip(colour, 0, 255).astype(int).tolist()), width_px, "curve")


def draw_head(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """From the back: hair behind the head, neck, shoulders, ears, a face that is lighter to one side, a full beard."""
    if person.cut != "bald":
        pen.fill(cap(person, person.volume, 0.05, edge=0.05), person.hair * 0.8)
    if person.cut == "long":
        half = person.width * person.volume * 1.15
        pen.fill(lens(0, 0, half, 1.3, 0.3 + person.hair_length, power=0.3), person.hair * 0.8)
    if person.cut == "curly":
        for (x, y), (wobble, radius) in zip(outline(person, person.volume)[11:38], person.curls, strict=True):
            pen.fill(lens(x + wobble, y, radius, radius, radius), person.hair * (0.9 + wobble))
    pen.fill(lens(0, 1.2, 0.5, 0.5, 0.6, power=0.2), person.skin * 0.7)
    pen.fill(lens(0, 2.0, 1.7, 0.5, 0.4, power=0.4), look.cloth)
    for side in (-1, 1):
        pen.fill(lens(side * person.width, 0.12, person.ear, 0.24, 0.26), person.skin * 0.84)
    for depth, grow in enumerate((1.0, 0.94, 0.86, 0.74)):
        pen.fill(outline(person, grow) + look.light * (1 - grow), person.skin * (0.86 + 0.05 * depth))
    if person.beard == "full":
        lower = np.roll(outline(person, 1.02), 24, axis=0)
        lower = lower[lower[:, 1] > person.beard_y]
        inner = lens(0, person.beard_y, person.width * 0.8, 0, person.mouth_y - person.beard_y - 0.12)[13:]
        pen.fill(np.concatenate([lower, inner[::-1]]), person.hair * 0.85 + person.skin * 0.1)


def draw_eyes(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """Socket, white, iris, pupil, upper lid and brow of each eye; a lowered lid covers the iris."""
    up, down, thick = person.eye_up * look.lids, person.eye_down, person.brow_thick
    bend = person.brow_bend + thick
    for side in (-1, 1):
        x, tilt = side * person.eye_x, -side * person.eye_tilt
        pen.fill(lens(x, 0, person.eye_width * 1.2, up + 0.06, down + 0.04, tilt), person.skin * 0.82)
        pen.fill(lens(x, 0, person.eye_width, up, down, tilt, power=1), np.array((240, 238, 234)))
        for radius, colour in ((person.iris, person.iris_colour), (person.iris * 0.5, person.iris_colour * 0.15)):
            pen.fill(lens(x + look.gaze, 0, radius, min(radius, up), min(radius, down)), colour)
        pen.line(lens(x, 0, person.eye_width * 1.05, up, down, tilt, power=1)[:13], person.hair * 0.3)
        y, tilt = -person.brow_y - look.brows, side * person.brow_tilt
        pen.fill(lens(x * 1.05, y, person.eye_width * 1.4, bend, thick - bend, tilt, 0.6), person.hair * 0.75)


def draw_nose_and_mouth(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """Moles or freckles, a nose that stands out from the face, whiskers, and lips that smile and part."""
    tip, wing = person.nose, person.nose_width
    mouth, half = person.mouth_y - look.smile * 0.7, person.mouth_width * (1 + look.smile)
    for x, y in person.marks:
        pen.fill(lens(x, y, person.mark_size, person.mark_size, person.mark_size), person.skin * person.mark_shade)
    for side, shade in ((1, 0.9), (-1, 1.04)):
        pen.fill([(0, -0.05), (side * 0.06, 0), (side * wing, tip), (0, tip + 0.04)], person.skin * shade, 0.1)
    pen.fill(lens(0, tip, wing, 0.09, 0.08), person.skin * 0.94, 0.14)
    for side in (-1, 1):
        pen.fill(lens(side * wing * 0.5, tip + 0.05, wing * 0.25, 0.02, 0.02), person.skin * 0.5, 0.12)
    if person.beard == "goatee":
        pen.fill(lens(0, person.chin - 0.08, 0.25, person.chin - mouth - 0.2, 0.12), person.hair * 0.85)
    if person.beard in ("goatee", "moustache", "full"):
        pen.fill(lens(0, mouth - 0.02, half * 1.25, 0.16, -0.04, power=0.7), person.hair * 0.85)
    low = look.smile + look.gape  # the middle of the lower lip's upper edge
    pen.fill(lens(0, mouth, half * 0.95, -look.smile, low, power=1), np.array((70, 22, 26)))
    pen.fill(lens(0, mouth, half * 0.8, -look.smile, min(low, look.smile + 0.06), power=1), np.array((235, 230, 222)))
    pen.fill(lens(0, mouth, half, person.lip_up - look.smile, look.smile + 0.01, power=1), person.lips * 0.9)
    pen.fill(lens(0, mouth, half, -low, low + person.lip_down, power=1), person.lips)


def draw_over(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """What lies over the face: hair on the forehead, glasses, hat, scarf."""
    if person.cut != "bald":
        cut = {"edge": person.hairline, "part": person.part if person.cut in ("parted", "long") else 0.0}
        pen.fill(cap(person, person.volume, 0.05, **cut | DEMO_CUTS[person.cut]), person.hair)
    rim = look.cloth * 0.4
    if look.glasses:
        for side in (-1, 1):
            pen.line(lens(side * 0.4, 0.02, 0.29, 0.24, 0.24, power=0.3), rim, 0.1)
            pen.line([(side * 0.69, 0), (side * person.width, -0.03)], rim, 0.1)
        pen.line([(-0.11, 0), (0.11, 0)], rim, 0.12)
    if look.hat:
        pen.fill(cap(person, person.volume + 0.06, -0.5, -0.5), look.cloth)
        pen.fill(lens(0, -0.5, person.width * 1.1, 0.1, 0.1), look.cloth * 0.7, 0.1)
    if look.scarf:
        pen.fill(lens(0, 1.5, 1.25, 0.42, 0.5, power=0.3), 255 - look.cloth, 0.1)


def light_up(image: Image.Image, look: SimpleNamespace, style: str, rng: np.random.Generator) -> Image.Image:
    """Light from one side, its warmth and the exposure; a photograph also has blur, paler colours, a vignette, noise."""
    if style == "digi2real":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.1)))
    x, y = np.meshgrid(*[np.linspace(-1, 1, image.width, dtype=np.float32)] * 2)
    shade = look.exposure * np.clip(1 + look.light[0] * x + look.light[1] * y, 0.3, 1.8)
    pixels = np.asarray(image, np.float32) * shade[..., None] * np.float32([1 + look.warmth, 1, 1 - look.warmth])
    if style == "digi2real":
        pixels = 0.8 * pixels + 0.2 * pixels.mean(axis=2, keepdims=True) + np.float32([10, 6, 0])
        pixels *= (1.05 - 0.15 * (x**2 + y**2))[..., None]
        pixels += rng.normal(0, rng.uniform(2, 6), (*x.shape, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_face(identity: int, variation: int, style: str, seed: int, size: int = 112) -> Image.Image:
    """Picture number `variation` of a person, RGB, eyes at 46 % of the height; style is "digiface" or "digi2real".

    A function of its arguments alone: the same person whatever the style, the same picture whatever else is drawn.
    """
    rng = np.random.default_rng([seed, DEMO_PURPOSE[style], identity, variation])
    person, look = demo_person(identity, seed), demo_look(rng)
    cells = 2 if style == "digiface" else 7  # a plain gradient, or blobs of colour
    backdrop = rng.uniform(90, 150) + rng.normal(0, 6, 3) + rng.normal(0, 12, (cells, cells, 1))
    image = Image.fromarray(np.clip(backdrop, 0, 255).astype(np.uint8))
    image = image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)  # drawn twice as large, for smooth edges
    pen = Pen(image, look)
    for draw in (draw_head, draw_eyes, draw_nose_and_mouth, draw_over):
        draw(pen, person, look)
    return light_up(image.reduce(2), look, style, rng)


def write_demo_faces(folder: Path, identities: int, images_digiface: int, images_digi2real: int, size: int, seed: int) -> None:
    """Write digiface1m_000.parquet (PNG) and digi2real_000.parquet (JPEG) into `folder`, in the shape of the real data.

    The first nine tenths of the identities are in the first file; the second has half of those, and the last tenth.
    """
    png, jpg = {"format": "png", "compress_level": 3}, {"format": "jpeg", "quality": 90}
    sources = (
        ("digiface1m_000.parquet", "digiface", range(identities - identities // 10), images_digiface, "png", png),
        ("digi2real_000.parquet", "digi2real", range(identities * 9 // 20, identities), images_digi2real, "jpg", jpg),
    )
    for name, style, people, images, suffix, encoding in sources:
        rows = []
        for i, k in progress([(i, k) for i in people for k in range(images)], f"drawing demo faces, {style}", unit="image"):
            encoded = io.BytesIO()
            draw_face(i, k, style, seed, size).save(encoded, **encoding)
            rows.append({"identity_id": str(i), "image_filename": f"{i}/{k}.{suffix}", "image_bytes": encoded.getvalue()})
        table = pa.Table.from_pylist(rows)
        table = table.cast(with_metadata(table.schema, {"drawn": identities}))
        with write_whole(folder / name) as temporary:
            pq.write_table(table, temporary, row_group_size=100, compression="none")
