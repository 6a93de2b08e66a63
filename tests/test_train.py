"""Training, embedding and evaluation as a user runs them, on small drawn faces."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_config import ROOT, settings

import dataio
import sniperface

SMALL = [
    "backbone=tiny", "backbone.layers=[1,1,1,1]", "backbone.width=0.125", "backbone.input_size=32", "moco.queue_size=48",
    "moco.temperature=0.2", "moco.shuffle_groups=2", "train.batch_size=16", "train.epochs=2", "train.monitor_images=64",
    "train.log_every=3", "train.lr=0.05", "eval.bootstrap=200", "eval.repeats=2", "eval.enroll_per_id=2", "device=cpu",
    "train.amp=fp32",
]  # fmt: skip


@pytest.fixture
def words(faces, tmp_path):
    """Overrides of a small run; its split and caches are its own."""
    return [
        *SMALL, f"data.digiface_glob={faces}/digiface1m_*.parquet", f"data.digi2real_glob={faces}/digi2real_*.parquet",
        f"split.out_dir={tmp_path}/splits", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip


def train(words, folder, *more):
    return sniperface.train(settings(*words, *more), folder)


def log_of(folder):
    timed = ("images_per_s", "data_wait", "seconds")
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def state_of(folder, name="last"):
    return sniperface.load_checkpoint(folder / "checkpoints" / f"{name}.pt")


def tensors(state):
    return {f"model.{k}": v for k, v in state["model"].items()} | {
        f"momentum.{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()
    }


def assert_same_run(one, other):
    a, b = tensors(state_of(one)), tensors(state_of(other))
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert log_of(one) == log_of(other)


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_a_run_stopped_inside_an_epoch_goes_on_to_the_same_bits_whatever_the_workers(words, tmp_path, cache):
    train(words, tmp_path / "whole", f"data.cache={cache}", "data.workers=2")
    train(words, tmp_path / "parts", f"data.cache={cache}", "data.workers=1", "train.max_steps=5")
    assert state_of(tmp_path / "parts")["step"] == 5
    train(words, tmp_path / "parts", f"data.cache={cache}", "data.workers=3", "train.max_steps=17")
    train(words, tmp_path / "parts", f"data.cache={cache}", "data.workers=2")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("faster", "tolerance"),
    [
        (["data.cache=device"], 0),  # the same images in the same order, in the same arithmetic
        (["train.amp=bf16"], 0.1),
        pytest.param(["train.compile=true"], 0.02, marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")),
    ],
)
def test_twenty_steps_of_each_faster_path_have_the_losses_of_the_plain_one(words, tmp_path, faster, tolerance):
    losses = []
    for name, more in (("plain", []), ("faster", faster)):
        # a small step, or rounding grows from step to step until the batch decides
        train(words, tmp_path / name, "data.cache=decoded", "train.lr=0.005", "train.log_every=1", "train.max_steps=20", *more)
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("cpu", "bf16_instructions", "amx", "picked"),
    [
        ("Intel Xeon", True, False, torch.float32),
        ("Intel Xeon", True, True, torch.bfloat16),
        ("Intel Xeon", False, False, torch.float32),
        ("AMD EPYC", True, False, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32),
        (None, True, False, torch.bfloat16),
    ],
)
def test_the_precision_of_a_cpu_is_bf16_only_where_that_is_faster(monkeypatch, cpu, bf16_instructions, amx, picked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu} if cpu else {})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert sniperface.pick_precision("auto", torch.device("cpu")) is picked
    assert sniperface.pick_precision("bf16", torch.device("cpu")) is torch.bfloat16


def test_every_step_changes_the_weights_and_the_log_says_what_a_user_needs(words, tmp_path):
    train(words, tmp_path)
    lines = log_of(tmp_path)
    steps = state_of(tmp_path)["step"]
    assert [line["step"] for line in lines] == sorted({*range(3, steps + 1, 3), steps // 2, steps})
    wanted = (
        "loss pos_sim neg_sim neg_max instance_top1 chance_loss lr key_momentum grad_norm digiface_share spread queue_ptr epoch"
    )
    assert all(set(wanted.split()) <= line.keys() for line in lines)
    assert lines[-1]["epoch"] == 2
    assert lines[0]["chance_loss"] == pytest.approx(np.log1p(48 * np.exp(0.1 / 0.2)), abs=1e-5)
    before, after = sniperface.build_model(settings(*words)).state_dict(), state_of(tmp_path)["model"]
    still = [key for key in before if torch.equal(before[key], after[key])]
    assert {key.removeprefix("query.").removeprefix("key.") for key in still} <= {"backbone.features.weight", "backbone.fc.bias"}


def test_the_checkpoints_are_those_of_the_contract(words, tmp_path):
    train(words, tmp_path, "train.epochs=6", "train.keep_last=2", "train.save_every_steps=4")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"last.pt", "best.pt", "epoch_05.pt", "epoch_06.pt"} <= names
    assert names - {"last.pt", "best.pt", "epoch_05.pt", "epoch_06.pt"} == {"step_0000072.pt", "step_0000076.pt"}
    last, final, best = (state_of(tmp_path, name) for name in ("last", "epoch_06", "best"))
    assert last["step"] == final["step"]
    figures = [line["monitor_loss"] for line in log_of(tmp_path) if "monitor_loss" in line]
    assert best["monitor"]["last"] == min(figures)


def test_a_finished_run_says_so_and_changes_nothing(words, tmp_path, caplog):
    first = train(words, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    with caplog.at_level("INFO", logger="sniperface"):
        assert train(words, tmp_path) == first
    assert "finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == before


def test_settings_that_would_make_it_another_run_are_refused_with_the_command_that_works(words, tmp_path):
    train(words, tmp_path / "run_001", "train.max_steps=2")
    with pytest.raises(ValueError, match=r"train.lr was 0.05, asked is 0.01[\s\S]*run=run_002"):
        train(words, tmp_path / "run_001", "train.lr=0.01")
    free = ["train.log_every=1", "data.workers=1", "data.max_bad_fraction=0.5"]
    train(words, tmp_path / "run_001", *free, "train.max_steps=3")
    assert state_of(tmp_path / "run_001")["step"] == 3


def test_a_cache_that_would_change_the_order_is_refused_before_it_is_made(words, tmp_path):
    train(words, tmp_path / "run", "train.max_steps=2")
    with pytest.raises(ValueError, match="decoded draws in another order"):
        train(words, tmp_path / "run", "data.cache=decoded")
    assert not (tmp_path / "cache").exists()


def test_what_a_killed_process_left_half_written_goes_with_the_next_start(words, tmp_path):
    stale = tmp_path / "checkpoints" / ".step_0000007.pt.~1~another-container.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    train(words, tmp_path, "train.max_steps=2")
    assert not stale.exists()


def test_demo_faces_are_never_drawn_over_or_beside_files_of_the_user(words, tmp_path, faces):
    mine = tmp_path / "mine" / "digiface1m_000.parquet"
    mine.parent.mkdir()
    mine.write_bytes((faces / "digi2real_000.parquet").read_bytes())
    pq.write_table(pq.read_table(mine).replace_schema_metadata(None), mine)
    before = mine.read_bytes()
    globs = [f"data.{source}_glob={mine.parent}/{source}_*.parquet" for source in ("digiface", "digi2real")]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        train(words, tmp_path / "run", *globs, "data.demo_identities=8")
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert mine.read_bytes() == before


def test_half_of_the_demo_faces_are_made_whole(words, tmp_path):
    globs = [f"data.{source}_glob={tmp_path}/demo/{file}_*.parquet" for source, file in
             (("digiface", "digiface1m"), ("digi2real", "digi2real"))]  # fmt: skip
    cfg = settings(*words, *globs, "data.demo_identities=8")
    drawn = sniperface.find_sources(cfg)
    kept = drawn["digi2real"][0].read_bytes()
    drawn["digi2real"][0].unlink()
    assert sniperface.find_sources(cfg) == drawn
    assert drawn["digi2real"][0].read_bytes() == kept


def test_no_two_jobs_of_a_sweep_share_a_folder():
    asked = ["a-1_b-2", "", "data.digiface_glob-x/y.parquet", "data.digiface_glob-x_y.parquet", "é" * 200, "é" * 201, "x" * 151]
    names = [sniperface.folder_name(overrides) for overrides in asked]
    assert len(set(names)) == len(names)
    assert names[0] == "a-1_b-2"
    assert all(name and "/" not in name and len(name.encode()) <= 150 for name in names)


def test_other_data_than_the_run_was_started_on_is_refused(words, tmp_path, faces):
    train(words, tmp_path / "run", "train.max_steps=2")
    cfg = settings(*words)
    streams = sniperface.open_streams(cfg, sniperface.locate_rows(cfg, "train"))
    kept = pq.read_table(faces / "digi2real_000.parquet").slice(0, 60)
    (tmp_path / "other").mkdir()
    pq.write_table(kept, tmp_path / "other" / "digi2real_000.parquet")
    assert len(streams["digi2real"]) > 30
    with pytest.raises(ValueError, match="the data is not what the run was started on"):
        train(words, tmp_path / "run", f"data.digi2real_glob={tmp_path}/other/*.parquet")


def test_damaged_checkpoints_are_noticed_and_the_one_before_is_used(words, tmp_path, caplog):
    train(words, tmp_path, "train.save_every_steps=2", "train.max_steps=6")
    newest = tmp_path / "checkpoints" / "step_0000006.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert "cannot be used" in caplog.text or sniperface.latest_checkpoint(tmp_path)["step"] == 4
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"none of .* checkpoints can be read"):
        train(words, tmp_path)


def test_resume_must_and_never_mean_what_they_say(words, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(words, tmp_path, "train.resume=must")
    train(words, tmp_path, "train.max_steps=2")
    with pytest.raises(ValueError, match=r"train\.resume=never"):
        train(words, tmp_path, "train.resume=never")


def test_a_second_process_in_the_run_folder_is_refused(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sniperface, time, pathlib\n"
    code += f"with sniperface.run_lock(pathlib.Path({str(tmp_path)!r})): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "locked"
        with pytest.raises(ValueError, match="another process"), sniperface.run_lock(tmp_path):
            pass
        holder.kill()
    with sniperface.run_lock(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_no_row_of_a_test_identity_is_decoded_in_training_though_row_groups_hold_both(words, tmp_path, monkeypatch):
    seen, real = set(), dataio.decode_image

    def counting(data, *rest):
        seen.add(bytes(data))
        return real(data, *rest)

    monkeypatch.setattr(dataio, "decode_image", counting)
    train(words, tmp_path / "run")
    sides = dataio.read_identity_splits(tmp_path / "splits" / "identity_splits.parquet").identities
    globs = (settings(*words).data.digiface_glob, settings(*words).data.digi2real_glob)
    rows = [row for path in dataio.find_files(globs) for row in pq.read_table(path).to_pylist()]
    owner = {row["image_bytes"]: row["identity_id"] for row in rows}
    trained = {owner[data] for data in seen}
    assert trained == set(sides["train"])
    assert not trained & set(sides["test"])
    mixed = pq.ParquetFile(dataio.find_files(settings(*words).data.digiface_glob)[0])
    kinds = [set(mixed.read_row_group(g)["identity_id"].to_pylist()) for g in range(mixed.num_row_groups)]
    assert any(group & set(sides["train"]) and group & set(sides["test"]) for group in kinds)


def test_shards_by_glob_and_shards_found_train_alike_and_do_not_split_again(words, tmp_path):
    sniperface.split(settings(*words), tmp_path)
    train(words, tmp_path / "found", "train.max_steps=4")
    assert state_of(tmp_path / "found")["meta"]["shards"] is True
    by_glob = [f"data.{s}_glob={tmp_path}/splits/train/{s}/*.parquet" for s in ("digiface", "digi2real")]
    train(words, tmp_path / "glob", "train.max_steps=4", f"split.out_dir={tmp_path}/unused", *by_glob)
    assert not (tmp_path / "unused").exists()
    assert state_of(tmp_path / "glob")["meta"]["table"] == state_of(tmp_path / "found")["meta"]["table"]
    a, b = (tensors(state_of(tmp_path / name)) for name in ("found", "glob"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="train on"):
        train(words, tmp_path / "wrong", *[word.replace("/train/", "/test/") for word in by_glob])


def run_all(words, folder):
    cfg = settings(*words, "command=all")
    sniperface.train_and_measure(cfg, folder, set())
    return json.loads((folder / "metrics.json").read_text())


def test_the_whole_path_and_embed_and_eval_alone_give_the_same_figures(words, tmp_path):
    whole = run_all(words, tmp_path)
    wanted = (
        "rank1 rank5 rank10 rank1_ci identities gallery probes distractors chance_rank1 enroll_per_id seed embeddings untrained pca"
    )
    assert set(wanted.split()) <= whole.keys()
    vectors = pq.read_table(tmp_path / "embeddings/test_embeddings.parquet")
    plain = settings(
        "run=x", "device=cpu", "eval.bootstrap=200", "eval.repeats=2", "eval.enroll_per_id=2"
    )  # data, model: from the run
    sniperface.embed(plain, tmp_path, {"run"})
    assert pq.read_table(tmp_path / "embeddings/test_embeddings.parquet").equals(vectors)
    assert sniperface.evaluate(plain, tmp_path, {"run"})["rank1"] == whole["rank1"]
    for name in ("views", "train", "cmc", "roc", "similarity", "neighbours"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000
    assert "Rank-1" in (tmp_path / "report.md").read_text()
    sides = dataio.read_identity_splits(tmp_path / "splits" / "identity_splits.parquet").identities
    assert set(vectors["identity_id"].to_pylist()) == set(sides["test"])
    assert set(vectors["source"].to_pylist()) == {"digiface", "digi2real"}


def test_eval_equals_a_plain_computation(words, tmp_path):
    metrics = run_all(words, tmp_path)
    table = pq.read_table(tmp_path / "embeddings/test_embeddings.parquet")
    vectors = np.array(table["embedding"].to_pylist(), np.float64)
    names = np.array(table["identity_id"].to_pylist())
    keys = np.array([f"{s}/{f}" for s, f in zip(table["source"].to_pylist(), table["image_filename"].to_pylist(), strict=True)])
    ranks = pq.read_table(tmp_path / "metrics.ranks.parquet").to_pylist()
    probe = np.isin(keys, [row["picture"] for row in ranks])
    people = sorted(set(names))
    centroids = np.array([vectors[(names == person) & ~probe].mean(axis=0) for person in people])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    scores = vectors[probe] @ centroids.T
    own = scores[np.arange(len(scores)), [people.index(name) for name in names[probe]]]
    rank = (scores >= own[:, None] - 1e-9).sum(axis=1)
    for k in (1, 5, 10):
        assert metrics[f"rank{k}"] == pytest.approx((rank <= k).mean(), abs=1e-12)
    assert metrics["probes"] == probe.sum() == len(rank)
    assert metrics["gallery"] == len(people)
    assert all(((names == person) & ~probe).sum() == 2 for person in people)


def test_vectors_do_not_depend_on_the_batch_nor_on_the_day(words, tmp_path):
    train(words, tmp_path, "train.max_steps=4")
    found = []
    for n, batch in enumerate((1, 64, 64)):
        sniperface.embed(
            settings(*words, f"embed.batch_size={batch}", f"embed.out=e{n}.parquet", "embed.references=false"), tmp_path
        )
        table = pq.read_table(tmp_path / f"e{n}.parquet")
        found.append(np.array(table["embedding"].to_pylist(), np.float32))
    assert found[0].shape[1] == 512
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert np.array_equal(found[1], found[2])


def test_an_override_that_contradicts_the_checkpoint_is_refused_and_data_may_be_typed(words, tmp_path):
    train(words, tmp_path / "run", "train.max_steps=2")
    state = state_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"moco\.margin=0\.5: the checkpoint was trained with 0\.1"):
        sniperface.settings_of(state, settings(*words, "moco.margin=0.5"), {"moco.margin"})
    with pytest.raises(ValueError, match=r"data\.image_size=96: the checkpoint was trained with 112"):
        sniperface.settings_of(state, settings("data.image_size=96"), {"data.image_size"})
    typed = sniperface.settings_of(state, settings("data.digiface_glob=other.parquet"), {"data.digiface_glob"})
    assert typed.data.digiface_glob == "other.parquet"
    assert typed.split.out_dir == f"{tmp_path}/splits"


def test_references_of_an_earlier_embed_do_not_stay_beside_other_vectors(words, tmp_path):
    run_all(words, tmp_path / "run")
    references = [tmp_path / "run" / "embeddings" / f"test_embeddings.{name}.parquet" for name in ("untrained", "pca")]
    assert all(path.exists() for path in references)
    sniperface.embed(settings(*words, "embed.references=false", "embed.flip=true"), tmp_path / "run")
    assert not any(path.exists() for path in references)
    assert "untrained" not in sniperface.evaluate(settings(*words), tmp_path / "run")


def test_embeddings_of_people_who_were_trained_on_are_not_measured(words, tmp_path, faces):
    train(words, tmp_path, "train.max_steps=2")
    glob = f"embed.test_glob={faces}/*.parquet"
    sniperface.embed(settings(*words, glob, "embed.references=false"), tmp_path, {"embed.test_glob"})
    with pytest.raises(ValueError, match="30 of its identities were trained on"):
        sniperface.evaluate(settings(*words), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_lists_its_pictures(words, tmp_path, monkeypatch):
    real, calls, drawn = sniperface.moco.cross_entropy_of, [], {}

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 5 else 1)

    train(words, tmp_path, "train.max_steps=2", "train.log_every=1")
    monkeypatch.setattr(sniperface.moco, "cross_entropy_of", breaks)
    views = sniperface.Training.views

    def noted(training, images, purpose, step):
        drawn[purpose, step] = images
        return views(training, images, purpose, step)

    monkeypatch.setattr(sniperface.Training, "views", noted)
    with pytest.raises(FloatingPointError, match=r"step 7 .*bad_batch\.json"):
        train(words, tmp_path, "train.log_every=4")
    assert state_of(tmp_path)["step"] == 2
    assert [line["step"] for line in log_of(tmp_path)] == [1, 4]  # no line that holds a NaN
    told = json.loads((tmp_path / "bad_batch.json").read_text())
    assert (told["step"], told["seed"], len(told["pictures"])) == (7, 42, 16)
    for place, image in zip(told["pictures"], drawn["augment", 6], strict=True):
        row = pq.read_table(place["file"])["image_bytes"][place["row"]].as_py()
        assert np.array_equal(dataio.decode_image(row, 112, 10**6), image.permute(1, 2, 0))


def test_averages_that_overflowed_in_a_skipped_step_of_fp16_stop_the_run(words, tmp_path):
    training = sniperface.Training(settings(*words, "train.amp=fp16"), torch.device("cpu"))
    mix = SimpleNamespace(places=lambda step: [])
    sniperface.stop_if_not_finite(training, mix, tmp_path)
    training.model.query.backbone.bn1.running_var[0] = torch.inf
    training.step = 7
    with pytest.raises(FloatingPointError, match="step 7 is not finite"):
        sniperface.stop_if_not_finite(training, mix, tmp_path)


HEALTHY = {"step": 9, "epoch": 2, "spread": 0.9, "pos_sim": 0.5, "neg_sim": 0.0, "monitor_loss": 3.0}


@pytest.mark.parametrize(
    ("change", "warmed_up", "causes"),
    [
        ({}, True, []),
        ({"spread": 0.05}, False, ["collapse"]),
        ({"neg_sim": 0.495}, True, ["no contrast"]),
        ({"neg_sim": 0.495, "monitor_loss": 4.5}, False, []),  # before the end of the warm-up nobody has learnt anything
        ({"monitor_loss": 4.0}, True, ["not learning"]),
        ({"monitor_loss": float("nan")}, True, ["not learning"]),
        ({"spread": 0.0, "pos_sim": 0.99, "neg_sim": 0.99, "monitor_loss": 5.0}, True, ["collapse", "no contrast", "not learning"]),
    ],
)
def test_the_signs_of_a_run_that_comes_to_nothing_are_told(words, change, warmed_up, causes):
    training = sniperface.Training(settings(*words), torch.device("cpu"))
    training.monitor["untrained"] = 4.0
    assert list(sniperface.signs_of_failure(HEALTHY | change, training, warmed_up)) == causes


def test_a_collapse_is_told_once_an_epoch_or_stops_the_run_and_a_sound_run_hears_nothing(words, tmp_path, monkeypatch, caplog):
    train(words, tmp_path / "sound")
    assert "collapse" not in caplog.text
    assert "no contrast" not in caplog.text
    query = sniperface.moco.MoCo.encode_queries
    one_point = lambda model, views: torch.nn.functional.normalize(query(model, views) * 1e-3 + 1)  # noqa: E731
    monkeypatch.setattr(sniperface.moco.MoCo, "encode_queries", one_point)
    train(words, tmp_path / "warned", "train.log_every=1")
    told = [record.message for record in caplog.records if "collapse" in record.message]
    assert len(told) == 2  # one an epoch
    assert "train.lr" in told[0]
    with pytest.raises(ValueError, match=r"stopped at step 1, collapse, as train\.when_stuck=stop asks; .*spread 0\.00"):
        train(words, tmp_path / "stopped", "train.log_every=1", "train.when_stuck=stop")


def test_deterministic_changes_nothing_on_the_cpu_and_no_setting_of_torch_leaks_into_the_next_command(words, tmp_path):
    train(words, tmp_path / "usual", "train.max_steps=4")
    train(words, tmp_path / "deterministic", "train.max_steps=4", "deterministic=true")
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_run(tmp_path / "usual", tmp_path / "deterministic")
    sniperface.embed(settings(*words, "embed.references=false"), tmp_path / "usual")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == (False, True)
    train(words, tmp_path / "usual", "train.max_steps=5")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == (True, False)
    assert not torch.are_deterministic_algorithms_enabled()


def in_shell(words, folder, *more, first=(), background=False):
    arguments = [sys.executable, ROOT / "sniperface.py", *first, *words, f"run_dir={folder}", *more]
    started = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent)
    return started if background else (started.communicate()[0], started.returncode)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_goes_on_to_the_same_bits(words, tmp_path, how):
    more = ["train.epochs=6", "train.save_every_steps=5"]
    train(words, tmp_path / "whole", *more)
    process = in_shell(words, tmp_path / "killed", *more, background=True)
    log = tmp_path / "killed" / "train_log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, how)
    told = process.communicate()[0]
    if how == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + how
        assert "the same command goes on" in told
    assert 0 < state_of(tmp_path / "killed")["step"] < state_of(tmp_path / "whole")["step"]
    told, code = in_shell(words, tmp_path / "killed", *more)
    assert code == 0, told
    assert "going on from step" in told
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_outside_the_training_loop_ends_with_a_line_and_nothing_half_written(words, tmp_path):
    with sniperface.dataio.locked(tmp_path / "splits" / "train" / ".digiface.lock", wait=True):  # where the process will wait
        process = in_shell(words, tmp_path / "run", "command=split", background=True)
        deadline = time.time() + 60
        while not (tmp_path / "splits" / "identity_splits.parquet").exists() and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
        told = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped; the same command goes on where it can" in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_sweep_of_whole_pipelines_ends_with_a_folder_a_job_and_a_table(words, tmp_path):
    told, code = in_shell(words, tmp_path / "sweep", "command=all", "train.max_steps=3", "moco.margin=0,0.1", first=["-m"])
    assert code == 0, told
    jobs = [path for path in (tmp_path / "sweep").iterdir() if (path / "metrics.json").exists()]
    assert len(jobs) == 2
    assert {json.loads((job / "train_log.jsonl").read_text().splitlines()[-1])["step"] for job in jobs} == {3}
    table = (tmp_path / "sweep" / "table.csv").read_text()
    assert "moco.margin" in table
    assert len(table.splitlines()) == 3


def test_failed_jobs_of_a_sweep_stand_in_its_table_and_the_others_go_on(words, tmp_path):
    told, code = in_shell(words, tmp_path / "sweep", "train.max_steps=2", "moco.queue_size=8,48", first=["-m"])
    assert code == 1
    assert "moco.queue_size=8: must be >= 16" in told
    with open(tmp_path / "sweep" / "table.csv") as file:
        states = {row["moco.queue_size"]: row["state"] for row in csv.DictReader(file)}
    assert states["48"] == "epoch 1 of 2"
    assert states["8"] == "not trained, see its log.txt"
