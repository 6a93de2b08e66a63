"""Evaluating a file of vectors: what it refuses, what it warns of, pair protocols, reports over several runs."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import draw_no_plots, settings

import dataio
import sniperface

PEOPLE, PICTURES, WIDTH = 12, 6, 32


def write_vectors(path, vectors=None, noise=0.6, seed=0, note=None, **columns):
    """An embeddings file of PEOPLE identities with PICTURES vectors each, scattered about a centre a person."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"p{i}" for i in range(PEOPLE)], PICTURES)
    if vectors is None:
        centres = rng.normal(size=(PEOPLE, WIDTH)) / np.sqrt(WIDTH)
        vectors = np.repeat(centres, PICTURES, axis=0) + noise * rng.normal(size=(len(names), WIDTH)) / np.sqrt(WIDTH)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(vectors, np.float32).reshape(-1)), vectors.shape[1])
    table = {"identity_id": names, "image_filename": [f"{n}.png" for n in range(len(names))], "embedding": embedding, **columns}
    table = pa.table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.cast(dataio.with_metadata(table.schema, note)) if note else table, path)
    return path


def evaluate(folder, path, *more):
    words = ["eval.enroll_per_id=2", "eval.bootstrap=200", "eval.repeats=2", "eval.open_set_share=0.5", "eval.fpirs=[0.5]"]
    with pytest.MonkeyPatch.context() as patch:
        draw_no_plots(patch)
        return sniperface.evaluate(settings(f"eval.embeddings={path}", *words, *more), folder)


def test_a_foreign_file_is_scored_and_one_line_says_what_could_not_be_checked(tmp_path, caplog):
    metrics = evaluate(tmp_path, write_vectors(tmp_path / "foreign.parquet"))
    assert 0.5 < metrics["rank1"] <= 1
    assert metrics["rank1_ci"][0] <= metrics["rank1"] <= metrics["rank1_ci"][1]
    assert metrics["probes"] == PEOPLE * (PICTURES - 2)
    assert caplog.text.count("not written by embed") == 1
    assert "tpir@0.5" in metrics["open_set"]
    assert "tar@1e-06" in metrics["refused"]
    assert metrics["cmc"] == sorted(metrics["cmc"])
    assert set(metrics["enroll_sweep"]) == {"1", "2", "5"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_perfect_vectors_find_everybody_and_equal_ones_are_refused(tmp_path):
    metrics = evaluate(tmp_path, write_vectors(tmp_path / "a.parquet", noise=1e-3))
    assert metrics["rank1"] == metrics["mrr"] == metrics["auc"] == 1
    with pytest.raises(ValueError, match="collapsed"):
        evaluate(tmp_path, write_vectors(tmp_path / "b.parquet", np.tile(np.eye(1, WIDTH), (PEOPLE * PICTURES, 1))))


@pytest.mark.parametrize("template", ["centroid", "best"])
def test_both_templates_beat_chance(tmp_path, template):
    metrics = evaluate(tmp_path, write_vectors(tmp_path / "a.parquet"), f"eval.template={template}")
    assert metrics["rank1_ci"][0] > metrics["chance_rank1"]


def test_a_file_joined_from_several_is_noticed(tmp_path):
    table = pq.read_table(write_vectors(tmp_path / "a.parquet"))
    with pq.ParquetWriter(tmp_path / "b.parquet", table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"sniperface.rows": str(len(table) // 2)})
    with pytest.raises(ValueError, match="joined from several"):
        evaluate(tmp_path, tmp_path / "b.parquet")


def test_an_open_set_without_probes_leaves_the_closed_set_alone(tmp_path, caplog):
    names = np.repeat(["many", "a", "b", "c", "d"], [7, 2, 2, 2, 2])
    vectors = np.random.default_rng(0).normal(size=(len(names), WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder = tmp_path / "run"
    for seed in range(5):  # until it is the one with probes who is left out
        files = [f"{n}.png" for n in range(len(names))]
        path = write_vectors(tmp_path / "few.parquet", vectors, identity_id=names, image_filename=files)
        metrics = evaluate(folder, path, "eval.open_set_share=0.2", f"eval.seed={seed}", "eval.enroll_sweep=[1]")
        assert metrics["probes"] == 5
        if metrics["open_set"] == {}:
            assert "no open-set figures: enrol: no probes left" in caplog.text
            assert "the largest of 4 enrolled identities has 2" in caplog.text
            return
    raise AssertionError("no seed left out the one with probes")


def test_only_embed_can_say_that_identities_are_unseen(tmp_path, caplog):
    caplog.set_level("INFO", logger="sniperface")
    evaluate(tmp_path, write_vectors(tmp_path / "foreign.parquet"))
    assert "12 identities, not known to be unseen, enrolled" in caplog.text
    evaluate(tmp_path, write_vectors(tmp_path / "ours.parquet", note={"table": "t", "trained_on": 0}))
    assert "12 unseen identities enrolled" in caplog.text


def test_equal_pictures_in_gallery_and_probes_and_in_train_are_told_loudly(tmp_path, caplog):
    hashes = pa.array(np.repeat(np.arange(PEOPLE * PICTURES // 2), 2), pa.int64())  # each picture stands twice
    note = {"table": "t", "trained_on": 0, "pictures_in_train": 7}
    metrics = evaluate(tmp_path, write_vectors(tmp_path / "a.parquet", note=note, image_hash=hashes))
    assert metrics["leaks"]["probes_equal_to_enrolled"] > 0
    assert metrics["leaks"]["pictures_in_train"] == 7
    assert caplog.text.count("LEAK") == 2


def test_a_pair_protocol_takes_the_threshold_from_the_other_folds(tmp_path):
    path = write_vectors(tmp_path / "a.parquet", noise=1.2)
    names, rng = pq.read_table(path)["identity_id"].to_pylist(), np.random.default_rng(1)
    a, b = rng.integers(0, len(names), (2, 4000))
    same = np.array([names[i] == names[j] for i, j in zip(a, b, strict=True)])
    keep = np.concatenate([np.flatnonzero(same)[:150], np.flatnonzero(~same)[:150]])
    pairs = {"fold": keep % 10, "same": same[keep]} | {
        f"image_filename_{s}": [f"{n}.png" for n in x[keep]] for s, x in (("a", a), ("b", b))
    }
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    found = evaluate(tmp_path, path, f"eval.pairs={tmp_path}/pairs.parquet")["pair_protocol"]
    assert found["pairs"] == 300
    assert 0.7 < found["accuracy"] < 1
    assert 0 < found["standard_error"] < 0.05
    assert "tar@0.001" in found["refused"]
    pq.write_table(pa.table(pairs | {"image_filename_a": ["nobody.png"] * 300}), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"nobody\.png"):
        evaluate(tmp_path, path, f"eval.pairs={tmp_path}/pairs.parquet")


def test_a_report_sets_runs_side_by_side_with_paired_differences(tmp_path):
    for number, noise in enumerate((2.5, 0.5)):
        run = tmp_path / f"run_{number}"
        evaluate(run, write_vectors(run / "a.parquet", noise=noise))
        (run / "config.yaml").write_text(f"data:\n  workers: 1\ntrain:\n  epochs: 3\n  lr: 0.{number + 1}\n")
        (run / "train_log.jsonl").write_text('{"step": 4, "epoch": 2, "loss": 5.0}\n')
    sniperface.report(settings(), f"{tmp_path}/run_*")
    first, second = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (first["train.lr"], second["train.lr"]) == ("0.1", "0.2")
    assert first["state"] == "epoch 2 of 3, measured"
    assert float(first["rank1_change"]) == 0
    assert float(second["rank1_change"]) == pytest.approx(float(second["rank1"]) - float(first["rank1"]))
    assert float(second["rank1_change_low"]) > 0
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_order_of_the_rows_changes_nothing(tmp_path):
    path = write_vectors(tmp_path / "a.parquet")
    first = evaluate(tmp_path, path)
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    second = evaluate(tmp_path, path)
    same = [key for key in first if key not in ("geometry", "cmc")]
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert second["geometry"] == pytest.approx(first["geometry"], rel=1e-5)


def write_table(folder, test):
    """The split table of a run whose test side is the people with these numbers; the others were trained on."""
    sides = {f"p{i}": "test" if i in test else "train" for i in range(PEOPLE)}
    return dataio.write_identity_splits(sides, folder / "identity_splits.parquet", 0.5, 0, known=sides)


def test_vectors_of_another_split_or_of_the_train_side_are_refused(tmp_path):
    splits, more = write_table(tmp_path / "splits", range(PEOPLE)[1:]), f"split.out_dir={tmp_path}/splits"
    note = {"table": splits.hash, "split": "test", "trained_on": 0}
    with pytest.raises(ValueError, match=r"1 of its identities, such as 'p0', are not on the test side of .*identity_splits"):
        evaluate(tmp_path, write_vectors(tmp_path / "a.parquet", note=note), more)
    (tmp_path / "environment.json").write_text(json.dumps([{"table": "another"}]))
    with pytest.raises(ValueError, match=f"trained with split table {splits.hash}, the run in .* with another"):
        evaluate(tmp_path, write_vectors(tmp_path / "a.parquet", note=note), more)


def test_names_of_the_train_side_in_a_foreign_file_are_told_loudly(tmp_path, caplog):
    write_table(tmp_path / "splits", range(3))
    evaluate(tmp_path, write_vectors(tmp_path / "a.parquet"), f"split.out_dir={tmp_path}/splits")
    assert "LEAK? 9 of its identities, such as 'p10'" in caplog.text
