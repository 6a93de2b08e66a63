"""Training as a user runs it, on small drawn faces."""

import json
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import assert_same, assert_same_run, bits, draw_no_plots, job, log_of, settings, state_of, train, training_bits, words_of

import dataio
import moco
import sniperface


def test_any_exception_in_a_decoding_thread_ends_the_run(data, tmp_path, monkeypatch):
    def breaks(*arguments):
        raise KeyError("a bug of ours")

    monkeypatch.setattr(dataio, "decode_image", breaks)
    with pytest.raises(KeyError, match="a bug of ours"):
        sniperface.train(job(tmp_path, data), tmp_path / "run")


def test_an_overflow_in_fp16_is_skipped_and_rescaled_and_does_not_end_the_run(data, tmp_path, monkeypatch):
    cfg, real = job(tmp_path, data, "train.amp=fp16"), torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, enabled=enabled, init_scale=2.0**21))
    before = bits(sniperface.build_model(cfg).query.state_dict())
    sniperface.train(cfg, tmp_path / "run")
    state = sniperface.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    after = bits({key.removeprefix("query."): value for key, value in state["model"].items() if key.startswith("query.")})
    assert state["step"] == 8
    assert state["scaler"]["scale"] < 2.0**21
    assert after["/backbone.conv1.weight"] != before["/backbone.conv1.weight"]
    assert all(value.double().sum().isfinite() for value in state["model"].values())
    for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize(
    "override", ["data.image_size=16", "data.shuffle_buffer=1000000000000", "data.batch_read_rows=1", "seed=1000000000000000000"]
)
def test_odd_but_allowed_settings_of_training_train(data, tmp_path, override):
    sniperface.train(job(tmp_path, data, override, "train.max_steps=1"), tmp_path / "run")
    assert sniperface.latest_checkpoint(tmp_path / "run")["step"] == 1


def losses(words, folder, *more):
    # a small step, or rounding grows from step to step until the batch decides
    train(words, folder, "data.cache=decoded", "train.lr=0.005", "train.log_every=1", "train.max_steps=20", *more)
    return [line["loss"] for line in log_of(folder)]


@pytest.fixture(scope="module")
def plain_losses(people, tmp_path_factory):
    home = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        draw_no_plots(patch)
        return losses(words_of(people, home), home / "run")


@pytest.mark.parametrize(
    ("faster", "tolerance"),
    [
        ("data.cache=device", 0),  # the same images in the same order, in the same arithmetic
        ("train.amp=bf16", 0.1),
        pytest.param("train.compile=true", 0.05, marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")),
    ],
)
def test_twenty_steps_of_each_faster_path_have_the_losses_of_the_plain_one(words, tmp_path, plain_losses, faster, tolerance):
    signal.alarm(300)  # a compiler takes its time
    assert len(plain_losses) == 20
    assert losses(words, tmp_path / "faster", faster) == pytest.approx(plain_losses, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("cpu", "bf16_instructions", "amx", "picked"),
    [
        ("Intel Xeon", True, False, torch.float32), ("Intel Xeon", True, True, torch.bfloat16),
        ("Intel Xeon", False, False, torch.float32), ("AMD EPYC", True, False, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32), (None, True, False, torch.bfloat16),
    ],
)  # fmt: skip
def test_the_precision_of_a_cpu_is_bf16_only_where_that_is_faster(monkeypatch, cpu, bf16_instructions, amx, picked):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu} if cpu else {})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert moco.pick_precision("auto", torch.device("cpu")) is picked
    assert moco.pick_precision("bf16", torch.device("cpu")) is torch.bfloat16


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
    assert_same(*(training_bits(tmp_path / name) for name in ("found", "glob")))
    with pytest.raises(ValueError, match="train on"):
        train(words, tmp_path / "wrong", *[word.replace("/train/", "/test/") for word in by_glob])
    raw, shards = settings(*words).data.digiface_glob, f"{tmp_path}/splits/train/digiface/*.parquet"
    shutil.copy(dataio.find_files(shards)[0], tmp_path / "z.parquet")
    shutil.copy(dataio.find_files(raw)[0], tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="matches shards of command=split and other files"):
        train(words, tmp_path / "both", f"data.digiface_glob={tmp_path}/?.parquet")


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_lists_its_pictures(words, tmp_path, monkeypatch):
    real, calls, drawn = moco.MarginNCE.of_cosines, [], {}

    def breaks(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 5 else 1)

    train(words, tmp_path, "train.max_steps=2", "train.log_every=1")
    monkeypatch.setattr(moco.MarginNCE, "of_cosines", breaks)
    views = sniperface.Run.views

    def noted(run, images, purpose, step, others=None):
        drawn[purpose, step] = images
        return views(run, images, purpose, step, others)

    monkeypatch.setattr(sniperface.Run, "views", noted)
    with pytest.raises(FloatingPointError, match=r"step 7 .*bad_batch\.json"):
        train(words, tmp_path, "train.log_every=4")
    assert state_of(tmp_path)["step"] == 2
    assert [line["step"] for line in log_of(tmp_path)] == [1, 4]  # no line that holds a NaN
    told = json.loads((tmp_path / "bad_batch.json").read_text())
    assert (told["step"], told["seed"], len(told["pictures"])) == (7, 42, 16)
    for place, image in zip(told["pictures"], drawn["augment", 6], strict=True):
        row = pq.read_table(place["file"])["image_bytes"][place["row"]].as_py()
        assert np.array_equal(dataio.decode_image(row, 32, 10**6), image.permute(1, 2, 0))


def test_averages_that_overflowed_in_a_skipped_step_of_fp16_stop_the_run(words):
    cfg = settings(*words, "train.amp=fp16")
    training = moco.Training(sniperface.build_model(cfg), cfg.train, torch.device("cpu"))
    training.step = 7
    assert training.find_bad_step() is None
    training.model.query.backbone.bn1.running_var[0] = torch.inf
    assert training.find_bad_step() == 7


def test_one_epoch_with_the_default_warm_up_trains_and_says_that_it_was_shortened(words, tmp_path, caplog):
    train(words, tmp_path, "train.epochs=1", "train.log_every=1")
    assert caplog.text.count("train.warmup_epochs=1 does not fit: the warm-up is a tenth of the run") == 1
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates.index(max(rates)) == np.ceil(len(rates) / 10)
    assert rates[-1] < 0.05 * max(rates)


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
    assert list(moco.signs_of_failure(HEALTHY | change, 4.0, settings(*words).train, warmed_up)) == causes
    from_good_weights = settings(*words, "train.init=good.pt").train  # need not get better within an epoch
    found = list(moco.signs_of_failure(HEALTHY | change, 4.0, from_good_weights, warmed_up))
    assert found == [cause for cause in causes if cause != "not learning"]


def test_what_is_done_while_a_timer_pauses_counts_neither_as_steps_nor_as_waiting(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 101.0, 102.0, 110.0])  # made, next begins, pause, its end, next is back, lap
    monkeypatch.setattr(sniperface.time, "perf_counter", lambda: next(now))
    timer = sniperface.Timer()

    def batches():
        with timer.paused():
            pass
        yield torch.zeros(20), None

    timer.next(batches())
    assert timer.lap() == {"images_per_s": 2.0, "data_wait": 0.2, "seconds": 110.0}


def test_a_collapse_is_told_once_an_epoch_or_stops_the_run_and_a_sound_run_hears_nothing(words, tmp_path, monkeypatch, caplog):
    train(words, tmp_path / "sound")
    assert "collapse" not in caplog.text
    assert "no contrast" not in caplog.text
    query = moco.MoCo.encode_queries
    one_point = lambda model, views: torch.nn.functional.normalize(query(model, views) * 1e-3 + 1)  # noqa: E731
    monkeypatch.setattr(moco.MoCo, "encode_queries", one_point)
    train(words, tmp_path / "warned", "train.log_every=1")
    told = [record.message for record in caplog.records if "collapse" in record.message]
    assert len(told) == 2  # one an epoch
    assert "train.lr" in told[0]
    with pytest.raises(ValueError, match=r"stopped at step 1, collapse, as train\.when_stuck=stop asks; .*spread 0\.00"):
        train(words, tmp_path / "stopped", "train.log_every=1", "train.when_stuck=stop")
    with pytest.raises(ValueError, match="collapse, as train"):
        train(words, tmp_path / "epoch", "train.log_every=1000", "train.when_stuck=stop")
    assert state_of(tmp_path / "epoch", "epoch_01")["step"] == json.loads((tmp_path / "epoch/train_log.jsonl").read_text())["step"]


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


def test_a_queue_and_a_key_momentum_that_do_not_fit_the_data_are_told_with_what_would(words, tmp_path, caplog):
    train(words, tmp_path / "fits", "train.max_steps=1")
    assert "moco.queue_size=" not in caplog.text
    train(words, tmp_path / "run", "train.max_steps=1", "moco.queue_size=100", "moco.key_momentum=0.999")
    assert "moco.queue_size=100 exceeds a sixteenth of the" in caplog.text
    assert "set moco.queue_size=64" in caplog.text
    assert "moco.key_momentum=0.999: in " in caplog.text
