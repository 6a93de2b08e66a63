"""Evaluating a file of vectors: what it refuses, what it warns of, pair protocols, reports over several runs."""

import csv
import json
import re

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


def evaluate(folder, path, *more, plots=False):
    words = ["eval.enroll_per_id=2", "eval.bootstrap=200", "eval.repeats=2", "eval.open_set_share=0.5", "eval.fpirs=[0.5]"]
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
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
    assert json.loads((tmp_path / "metrics_foreign.json").read_text()) == metrics


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


def draw_pairs(path, count=150):
    """A protocol of so many equal and as many different pairs of the vectors in `path`, as columns with the identities."""
    table, rng = pq.read_table(path), np.random.default_rng(1)
    names, files = (np.array(table[column].to_pylist()) for column in ("identity_id", "image_filename"))
    a, b = rng.integers(0, len(names), (2, 4000))
    same = names[a] == names[b]
    keep = np.concatenate([np.flatnonzero(same)[:count], np.flatnonzero(~same)[:count]])
    columns = {"fold": keep % 10, "same": same[keep]}
    for side, rows in (("a", a[keep]), ("b", b[keep])):
        columns |= {f"image_filename_{side}": files[rows], f"identity_id_{side}": names[rows]}
    return columns


def without_people(pairs):
    return {name: column for name, column in pairs.items() if not name.startswith("identity_id")}


def test_a_pair_protocol_takes_the_threshold_from_the_other_folds_and_is_the_main_figure(tmp_path, caplog):
    caplog.set_level("INFO", logger="sniperface")
    path = write_vectors(tmp_path / "a.parquet", noise=1.2)
    write_vectors(tmp_path / "a.pca.parquet", noise=5)
    pairs = without_people(draw_pairs(path))
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    metrics = evaluate(tmp_path, path, f"eval.pairs={tmp_path}/pairs.parquet")
    found = metrics["pair_protocol"]["pairs"]
    assert metrics["pca"]["pair_protocol"]["pairs"]["accuracy"] < found["accuracy"]
    for told in (caplog.text, (tmp_path / "report.md").read_text()):
        assert re.search(r"Accuracy of pairs +trained +pca +chance +TAR, trained\n", told)
        row = f"pairs, 300          {found['accuracy']:.4f} +- {found['standard_error']:.4f}    "
        assert row + f"{metrics['pca']['pair_protocol']['pairs']['accuracy']:.4f} +- " in told
        assert told.index("Accuracy of pairs") < told.index("Rank-1 ")
    assert "tar@0.001 of the pairs" in (tmp_path / "report.md").read_text()
    assert found["pairs"] == 300
    assert found["chance"] == 0.5
    assert 0.7 < found["accuracy"] < 1
    assert 0 < found["standard_error"] < 0.05
    assert "tar@0.001" in found["refused"]
    pq.write_table(pa.table(pairs | {"image_filename_a": ["nobody.png"] * 300}), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"nobody\.png"):
        evaluate(tmp_path, path, f"eval.pairs={tmp_path}/pairs.parquet")


def test_a_report_sets_runs_side_by_side_with_paired_differences(tmp_path):
    for number, noise in enumerate((2.5, 0.5)):
        run = tmp_path / f"run_{number}"
        note = {"flip": True, "whitened": f"penultimate^0.{number}", "step": 4}
        template = ("centroid", "best")[number]
        evaluate(run, write_vectors(run / "a.parquet", noise=noise, note=note), f"eval.template={template}")
        (run / "train_log.jsonl").write_text('{"step": 4, "epoch": 2, "loss": 5.0}\n')
    (tmp_path / "run_0" / "config.yaml").write_text("data:\n  workers: 1\ntrain:\n  epochs: 3\n  lr: 0.1\n")
    newer = "data:\n  workers: 1\ntrain:\n  epochs: 3\n  lr: 0.2\n  lr_schedule: constant\n"
    (tmp_path / "run_1" / "config.yaml").write_text(newer)
    (tmp_path / "run_1" / "train_log.jsonl").write_text('{"step": 8, "epoch": 3, "loss": 4.0}\n')
    sniperface.report(settings("eval.embeddings=a.parquet"), f"{tmp_path}/run_*")
    first, second = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (first["train.lr"], second["train.lr"]) == ("0.1", "0.2")
    assert (first["vectors.whitened"], second["vectors.whitened"]) == ("penultimate^0.0", "penultimate^0.1")
    assert (first["train.lr_schedule"], second["train.lr_schedule"]) == ("cosine", "constant")  # one run is older than the setting
    assert (first["eval.template"], second["eval.template"]) == ("centroid", "best")
    assert "vectors.flip" not in first
    assert first["state"] == "epoch 2 of 3, measured"
    assert second["state"] == "epoch 3 of 3, measured at step 4"
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


def test_names_that_repeat_between_people_need_the_identities_beside_them(tmp_path):
    path = write_vectors(tmp_path / "a.parquet")
    pq.write_table(pa.table(without_people(draw_pairs(path))), tmp_path / "plain.parquet")
    wanted = evaluate(tmp_path, path, f"eval.pairs={tmp_path}/plain.parquet")["pair_protocol"]["plain"]
    names = [f"{n % PICTURES}.png" for n in range(PEOPLE * PICTURES)]
    path, protocol = write_vectors(tmp_path / "b.parquet", image_filename=names), tmp_path / "pairs.parquet"
    pairs = draw_pairs(path)

    def measured(pairs):
        pq.write_table(pa.table(pairs), protocol)
        return evaluate(tmp_path, path, f"eval.pairs={protocol}")["pair_protocol"]["pairs"]

    in_folders = {
        f"image_filename_{s}": [f"{p}/{n}" for p, n in zip(pairs[f"identity_id_{s}"], pairs[f"image_filename_{s}"], strict=True)]
        for s in "ab"
    }
    for ambiguous, told in (({}, "more than one embedding"), (in_folders, "no embedding")):
        with pytest.raises(ValueError, match=rf"pairs\.parquet: .*{told}.*: add columns identity_id_a and identity_id_b"):
            measured(without_people(pairs) | ambiguous)
    assert measured(pairs) == wanted
    with pytest.raises(ValueError, match=r"needs .*'identity_id_b'.*look at \['identity_id_b'\]"):
        measured({name: column for name, column in pairs.items() if name != "identity_id_b"})
    with pytest.raises(ValueError, match=r"same contradicts the identities in 1 rows, first row 7"):
        measured(pairs | {"same": pairs["same"] ^ (np.arange(300) == 7)})


def test_a_name_that_stands_twice_outside_the_pairs_is_no_matter(tmp_path):
    path, names = write_vectors(tmp_path / "a.parquet"), [f"{n}.png" for n in range(PEOPLE * PICTURES)]
    pairs = without_people(draw_pairs(path, 10))
    spare = [n for n, name in enumerate(names) if name not in {*pairs["image_filename_a"], *pairs["image_filename_b"]}]
    names[spare[0]] = names[spare[-1]]
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    path = write_vectors(path, image_filename=names)
    assert evaluate(tmp_path, path, f"eval.pairs={tmp_path}/pairs.parquet")["pair_protocol"]["pairs"]["pairs"] == 20


@pytest.mark.parametrize("people", [2, 3])
def test_too_few_pairs_leave_the_ranks_and_are_listed_as_refused(tmp_path, people):
    rng, names = np.random.default_rng(0), np.repeat([f"p{i}" for i in range(people)], 6)
    vectors, files = rng.normal(size=(len(names), WIDTH)), [f"{n}.png" for n in range(len(names))]
    path = write_vectors(tmp_path / "few.parquet", vectors, identity_id=names, image_filename=files)
    metrics = evaluate(tmp_path, path, "eval.enroll_per_id=5", plots=True)
    assert metrics["impostor_pairs"] == people * (people - 1) < 10
    assert metrics["rank1_ci"][0] <= metrics["rank1"] <= metrics["rank1_ci"][1]
    assert {"auc", "eer", "tar@0.1"} <= {*metrics["refused"]}
    assert not {"auc", "eer", "tar@0.1"} & metrics.keys()
    assert ", auc, eer" in (tmp_path / "report.md").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"few_cmc.png", "few_similarity.png"}


def sections(folder):
    return dict(part.split("\n", 1) for part in (folder / "report.md").read_text().split("## ")[1:])


def test_an_evaluation_replaces_its_own_files_and_touches_no_others(tmp_path):
    ours, _ = (write_vectors(tmp_path / f"embeddings/{name}.parquet", seed=n) for n, name in enumerate(("test_embeddings", "lfw")))
    stale, others = tmp_path / "plots/neighbours.png", tmp_path / "plots/lfw_neighbours.png"
    for path in (stale, others):  # of earlier evaluations, whose pictures were there
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a picture")
    evaluate(tmp_path, ours, plots=True)
    assert others.read_bytes() == b"a picture"
    assert not stale.exists()
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "report.md"}
    first = sections(tmp_path)
    assert "(plots/cmc.png)" in first["metrics.json"]
    assert "neighbours" not in first["metrics.json"]
    evaluate(tmp_path, "embeddings/lfw.parquet", plots=True)
    assert not others.exists()
    assert {path: path.read_bytes() for path in kept if path != others} == {p: b for p, b in kept.items() if p != others}
    made = {"metrics_lfw.json", "metrics_lfw.ranks.parquet", "plots/lfw_cmc.png", "plots/lfw_roc.png", "plots/lfw_similarity.png"}
    assert all((tmp_path / name).exists() for name in made)
    both = sections(tmp_path)
    assert [*both] == ["metrics.json", "metrics_lfw.json"]
    assert both["metrics.json"].strip() == first["metrics.json"].strip()
    assert "(plots/lfw_cmc.png)" in both["metrics_lfw.json"]
    evaluate(tmp_path, ours, "eval.enroll_per_id=3")
    last = sections(tmp_path)
    assert [*last] == [*both]
    assert last["metrics_lfw.json"].strip() == both["metrics_lfw.json"].strip()
    assert "enrolled with 3 pictures" in last["metrics.json"]
    assert ".png" not in last["metrics.json"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"lfw_cmc.png", "lfw_roc.png", "lfw_similarity.png"}


def test_a_file_of_figures_that_is_asked_for_names_its_pictures(tmp_path):
    files = sniperface.files_of_evaluation(settings("eval.out=metrics_one.json"), tmp_path)
    assert [files[what].name for what in ("metrics", "ranks", "cmc")] == [
        "metrics_one.json",
        "metrics_one.ranks.parquet",
        "one_cmc.png",
    ]
    elsewhere = sniperface.files_of_evaluation(settings("eval.embeddings=runs/b/embeddings/test_embeddings.parquet"), tmp_path)
    assert elsewhere["metrics"] == tmp_path / "metrics_test_embeddings.json"


def test_no_two_files_of_figures_share_a_picture(tmp_path):
    names = ["metrics.json", "metrics_x.json", "x.json", "a/x.json", "b/x.json", "a/metrics.json", f"{tmp_path.parent}/x.json"]
    owned = [sniperface.files_of_evaluation(settings(f"eval.out={name}"), tmp_path) for name in names]
    assert len({path for files in owned for path in files.values()}) == sum(map(len, owned))
    assert sniperface.files_of_evaluation(settings("eval.out=./metrics.json"), tmp_path) == owned[0]
    assert owned[3]["cmc"] == tmp_path / "a" / "x.cmc.png"
    with pytest.raises(ValueError, match=r"^eval.out=a/x: must end in \.json"):  # it would share those of a/x.json
        settings("eval.out=a/x")


def test_no_table_shows_a_negative_zero():
    figures = {"pair_protocol": {}, "gallery": 9, "made_from": {}, "enroll_per_id": 1, "distractors": 0, "probes": 9}
    figures |= {"rank1": -1e-12, "rank1_ci": [-0.0, 0.4]}
    table = sniperface.results_table(figures, ["trained"], settings("eval.top_k=[1]").eval)
    assert "trained     0.000 [0.000, 0.400]" in table


KINDS = {
    "lists of doubles": pa.list_(pa.float64()), "large lists": pa.large_list(pa.float32()),
    "halves": pa.list_(pa.float16(), WIDTH), "lists of halves": pa.list_(pa.float16()), "doubles": pa.list_(pa.float64(), WIDTH),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_other_programs_are_read_whatever_their_type_and_length(tmp_path, caplog, kind):
    caplog.set_level("INFO", logger="sniperface")
    path = write_vectors(tmp_path / "a.parquet")
    wanted, unit = evaluate(tmp_path, path), sniperface.read_vectors(path).vectors
    assert "divided by its length" not in caplog.text
    scaled = unit * np.linspace(0.1, 30, len(unit), dtype=np.float32)[:, None]
    values = scaled.astype(KINDS[kind].value_type.to_pandas_dtype())
    write_vectors(path, embedding=pa.array(list(values), KINDS[kind]))
    found = sniperface.read_vectors(path).vectors
    assert caplog.text.count("of 72 vectors are not of unit length: each is divided by its length") == 1
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, unit, atol=1e-3 if "halves" in kind else 1e-6)
    assert evaluate(tmp_path, path)["rank1"] == pytest.approx(wanted["rank1"], abs=0 if "halves" not in kind else 0.03)


@pytest.mark.parametrize(
    ("value", "told"), [(0, "1 of 72 vectors are zero, first row 5"), (np.nan, "NaN or infinity, first row 5")]
)
def test_vectors_without_a_direction_are_refused_from_other_programs_too(tmp_path, value, told):
    vectors = np.random.default_rng(0).normal(size=(PEOPLE * PICTURES, WIDTH))
    vectors[5] *= value
    with pytest.raises(ValueError, match=rf"a\.parquet: .*{told}; leave these rows out"):
        evaluate(tmp_path, write_vectors(tmp_path / "a.parquet", vectors))


def test_the_width_of_vectors_is_one_for_the_whole_file(tmp_path):
    table = pq.read_table(write_vectors(tmp_path / "a.parquet")).slice(0, 4)
    for rows in ([[1.0, 2], [1, 2], [1, 2, 3], [1, 2]], [[1.0], [1, 2], [1, 2], [1]], [[]] * 4):
        column = pa.array(rows, pa.list_(pa.float64()))
        pq.write_table(table.set_column(2, "embedding", column), tmp_path / "b.parquet", row_group_size=2)
        with pytest.raises(ValueError, match=r"b\.parquet: .*all need one width above 0"):
            dataio.read_vectors(tmp_path / "b.parquet")
