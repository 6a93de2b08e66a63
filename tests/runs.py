"""Small runs for the tests: their settings, how they are started, and what they leave behind."""

import dataclasses
import functools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir

import dataio
import sniperface
from sniperface import CONF, load_config

ROOT = CONF.parent
SOURCES = {"digiface": "digiface1m", "digi2real": "digi2real"}  # and their files
NASTY = "a b,c'd\"e[1]=é人"  # a name that shells, globs and Hydra each dislike for another reason
SMALL = [
    "backbone=tiny", "backbone.layers=[1,1,1,1]", "backbone.width=0.125", "backbone.input_size=32", "moco.queue_size=48",
    "moco.temperature=0.2", "moco.shuffle_groups=2", "train.batch_size=16", "train.epochs=2", "train.monitor_images=64",
    "train.log_every=3", "train.lr=0.05", "eval.bootstrap=200", "eval.repeats=2", "eval.enroll_per_id=2", "device=cpu",
    "train.amp=fp32", "data.image_size=32",
]  # fmt: skip
RUN = [
    *SMALL, "train.monitor_images=32", "moco.queue_size=32", "train.save_every_steps=2", "train.log_every=1",
    "train.keep_last=1", "data.workers=2", "augment=light", "eval.bootstrap=100", "eval.repeats=1", "eval.enroll_sweep=[1]",
    "eval.open_set_share=0",
]  # fmt: skip


def settings(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_config(compose("config", list(overrides)), sniperface.typed_keys(overrides))


def quoted(key: str, value: object) -> str:
    """One override whose value may hold anything."""
    return key + "='" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


@functools.cache
def composed(*words: str) -> sniperface.Config:
    return settings(*RUN, *words)


def job(home: Path, data: Path, *more: str) -> sniperface.Config:
    """Settings of a run of eight steps (saved at 2, 4, 6, 8; two epochs) whose every file is below `home`."""
    cfg, typed = composed(*more), sniperface.typed_keys(more)
    globs = {f"{source}_glob": str(data / f"{name}_000.parquet") for source, name in SOURCES.items()}
    globs = {key: path for key, path in globs.items() if f"data.{key}" not in typed}
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, cache_dir=str(home / "cache"), **globs),
        split=dataclasses.replace(cfg.split, out_dir=str(home / "splits")),
    )


def run_all(cfg: sniperface.Config, home: Path) -> dict:
    sniperface.train(cfg, home / "run")
    sniperface.embed(cfg, home / "run")
    return sniperface.evaluate(cfg, home / "run")


def log_of(run: Path) -> list[dict]:
    timed = ("images_per_s", "data_wait", "seconds")
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def bits(value: object, prefix: str = "") -> dict:
    """A nested state as {path: bytes or value}; tensors and arrays by their bytes."""
    if isinstance(value, torch.Tensor):
        return {prefix: (str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes())}
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in bits(part, f"{prefix}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in bits(part, f"{prefix}/{i}").items()}
    return {prefix: repr(value)}


def training_result(run: Path) -> dict:
    """All that training leaves behind, by name; what measures time or says where it lies is left out."""
    found: dict = {"names": sorted(path.name for path in (run / "checkpoints").iterdir()), "log": log_of(run)}
    for path in sorted((run / "checkpoints").glob("*.pt")):
        state = sniperface.load_checkpoint(path)
        found |= {f"{path.name}{k}": v for k, v in bits({k: v for k, v in state.items() if k not in ("config", "meta")}).items()}
    return found


def result(run: Path) -> dict:
    """All that a whole run leaves behind."""
    found = training_result(run)
    for path in sorted((run / "embeddings").iterdir()):
        table = pq.read_table(path)
        found[path.name] = (table.schema.metadata, table.to_pylist())
    metrics = json.loads((run / "metrics.json").read_text())
    return found | {"metrics": {k: v for k, v in metrics.items() if k != "embeddings"}}


def without_measures(expected: dict) -> dict:
    """The part of `result` that training leaves, without the names of the files."""
    return {key: value for key, value in expected.items() if key == "log" or ".pt/" in key}


def assert_same(found: dict, expected: dict) -> None:
    differing = found.keys() ^ expected.keys() | {key for key in found.keys() & expected.keys() if found[key] != expected[key]}
    assert not differing, sorted(differing)


def in_child(function, *arguments) -> int:
    """Run in a fork of this process, so that it may die; its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # it hangs: see `no_hang`
        raise


def refusal(function) -> str:
    """What `function` says when it refuses; any other exception, or none, fails the test."""
    with pytest.raises((ValueError, OSError)) as refused:
        function()
    assert str(refused.value).strip()
    return str(refused.value)


def read_or_refused(read, name: str):
    """What `read` gives, None where it refuses a file called `name`."""
    try:
        return read()
    except ValueError as error:
        if name not in str(error):
            pytest.fail(f"does not name {name}: {error}")


def draw_no_plots(patch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is missing; plots take longer than a small run."""
    patch.setattr(sniperface, "can_draw", lambda: False)


def words_of(data: Path, home: Path) -> list[str]:
    """Overrides of a small run on the pictures in `data`; its split and caches are below `home`."""
    globs = [f"data.{source}_glob={data}/{name}_*.parquet" for source, name in SOURCES.items()]
    return [*SMALL, *globs, f"split.out_dir={home}/splits", f"data.cache_dir={home}/cache"]


def one_source(data):
    return [*RUN, quoted("data.digiface_glob", data / "digiface1m_*.parquet"), "data.digi2real_glob=null", "train.max_steps=1"]


def train(words, folder, *more):
    return sniperface.train(settings(*words, *more), folder)


def state_of(folder, name="last"):
    return sniperface.load_checkpoint(folder / "checkpoints" / f"{name}.pt")


def training_bits(run: Path) -> dict:
    """The weights and the momenta of the last checkpoint."""
    return bits({part: state_of(run)[part] for part in ("model", "optimizer")})


def assert_same_run(one, other):
    assert_same(*(training_bits(run) | {"log": log_of(run)} for run in (one, other)))


def rows_of(data: Path, source: str = "digiface1m_000") -> list[dict]:
    return pq.read_table(data / f"{source}.parquet").to_pylist()


def with_note(note: bytes):
    """Writes a table, or rows, whose file bears a note like ours."""

    def make(path: Path, rows: pa.Table | list[dict]) -> None:
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        pq.write_table(table.replace_schema_metadata({dataio.METADATA_KEY: note}), path)

    return make


SERVER = multiprocessing.get_context("forkserver")  # imports once what takes seconds, and forks before anything has run
SERVER.set_forkserver_preload(["pytest", "torch", "torchvision.transforms.v2", "hydra", "pyarrow.parquet", "PIL.Image", "tqdm"])


def run_script(arguments: list[str], folder: Path, told: Path) -> None:
    """What `python sniperface.py ...` does, started in `folder`, with all that it tells in the file `told`; it draws no plots."""
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.modules["matplotlib"] = None
    sys.argv = ["sniperface.py", *arguments]
    runpy.run_path(str(ROOT / "sniperface.py"), run_name="__main__")


class Command:
    """The command line in a process of its own."""

    def __init__(self, *arguments: str, cwd: Path):
        descriptor, told = tempfile.mkstemp(dir=cwd.parent, suffix=".told")
        os.close(descriptor)
        self.told = Path(told)
        self.process = SERVER.Process(target=run_script, args=([*arguments], cwd, self.told), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def wait(self) -> tuple[str, int]:
        """All that it told, and its exit status, negative for a signal."""
        self.process.join()
        return self.told.read_text(), self.process.exitcode


def in_shell(*arguments: str, cwd: Path) -> tuple[str, int]:
    return Command(*arguments, cwd=cwd).wait()
