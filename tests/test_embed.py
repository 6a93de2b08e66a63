"""Embedding and evaluating what was trained, and what of it does not fit together."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_rows
from runs import SOURCES, job, quoted, rows_of, settings, state_of, train, words_of

import dataio
import sniperface


@pytest.mark.parametrize("override", ["eval.top_k=[3]", "eval.top_k=[1000]"])
def test_odd_but_allowed_settings_of_eval_give_figures(data, unbroken, trained, override, no_pictures):
    metrics = sniperface.evaluate(job(unbroken, data, override, "eval.open_set_share=0.3"), trained)
    assert metrics["probes"] > 0
    assert json.loads((trained / "metrics.json").read_text())["probes"] == metrics["probes"]


@pytest.fixture(scope="module")
def piped(people, tmp_path_factory) -> tuple[list[str], Path]:
    """The words and the folder of a run from split to figures, with plots; not to be changed."""
    home = tmp_path_factory.mktemp("piped")
    words = words_of(people, home)
    sniperface.train_and_measure(settings(*words, "command=all"), home / "run", set())
    return words, home / "run"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_whole_path_and_embed_and_eval_alone_give_the_same_figures(piped, tmp_path):
    tmp_path = shutil.copytree(piped[1], tmp_path / "run")
    whole = metrics_of(tmp_path)
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
    for name in ("views", "train", "cmc", "roc", "similarity", "neighbours", "alignment"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000
    assert "Rank-1" in (tmp_path / "report.md").read_text()
    sides = dataio.read_identity_splits(piped[1].parent / "splits" / "identity_splits.parquet").identities
    assert set(vectors["identity_id"].to_pylist()) == set(sides["test"])
    assert set(vectors["source"].to_pylist()) == {"digiface", "digi2real"}


def test_references_that_are_not_beaten_are_told(piped, tmp_path, caplog, no_pictures):
    tmp_path = shutil.copytree(piped[1], tmp_path / "run")
    vectors = tmp_path / "embeddings" / "test_embeddings.parquet"
    shutil.copy(vectors, vectors.with_name("test_embeddings.untrained.parquet"))  # as good, so not beaten
    metrics = sniperface.evaluate(settings(*piped[0]), tmp_path)
    assert metrics["untrained"]["rank1_lead_ci"] == [0, 0]
    for name in sniperface.REFERENCES:
        assert metrics[name]["rank1_lead"] == pytest.approx(metrics["rank1"] - metrics[name]["rank1"])
        assert (f"not ahead of {name}: " in caplog.text) == (metrics[name]["rank1_lead_ci"][0] <= 0)


def test_eval_equals_a_plain_computation(piped):
    folder = piped[1]
    metrics = metrics_of(folder)
    table = pq.read_table(folder / "embeddings/test_embeddings.parquet")
    vectors = np.array(table["embedding"].to_pylist(), np.float64)
    names = np.array(table["identity_id"].to_pylist())
    keys = np.array([f"{s}/{f}" for s, f in zip(table["source"].to_pylist(), table["image_filename"].to_pylist(), strict=True)])
    ranks = pq.read_table(folder / "metrics.ranks.parquet").to_pylist()
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
    state = state_of(tmp_path / "run")["config"]
    with pytest.raises(ValueError, match=r"moco\.margin=0\.5: the checkpoint was trained with 0\.1"):
        sniperface.settings_of(state, settings(*words, "moco.margin=0.5"), {"moco.margin"})
    with pytest.raises(ValueError, match=r"data\.image_size=96: the checkpoint was trained with 32"):
        sniperface.settings_of(state, settings("data.image_size=96"), {"data.image_size"})
    typed = sniperface.settings_of(state, settings("data.digiface_glob=other.parquet"), {"data.digiface_glob"})
    assert typed.data.digiface_glob == "other.parquet"
    assert typed.split.out_dir == f"{tmp_path}/splits"


def test_references_of_an_earlier_embed_do_not_stay_beside_other_vectors(piped, tmp_path):
    words = piped[0]
    shutil.copytree(piped[1], tmp_path / "run")
    references = [tmp_path / "run" / "embeddings" / f"test_embeddings.{name}.parquet" for name in ("untrained", "pca")]
    assert all(path.exists() for path in references)
    sniperface.embed(settings(*words, "embed.references=false", "embed.flip=true"), tmp_path / "run")
    assert not any(path.exists() for path in references)
    assert "untrained" not in sniperface.evaluate(settings(*words), tmp_path / "run")


@pytest.mark.parametrize("extended", [False, True])
def test_embeddings_of_people_who_were_trained_on_are_not_measured(words, tmp_path, people, extended):
    train(words, tmp_path, "train.max_steps=2")
    if extended:
        table = settings(*words).split.table
        before = dataio.read_identity_splits(table)
        known = {name: side for side, names in before.identities.items() for name in names}
        dataio.write_identity_splits([*known, "a newcomer"], table, 0.75, before.note["seed"], known=known, extends=before.hashes)
        assert dataio.read_identity_splits(table).hash != before.hash
    glob = f"embed.test_glob={people}/*.parquet"
    sniperface.embed(settings(*words, glob, "embed.references=false"), tmp_path, {"embed.test_glob"})
    with pytest.raises(ValueError, match="30 of its identities were trained on"):
        sniperface.evaluate(settings(*words, glob), tmp_path)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("lfw.parquet", "lfw"), ("a/lfw_*.parquet", "lfw"), ("a/lfw/*.parquet", "lfw"), ("a/lfw/**/*.parquet", "lfw"),
        ("a/lfw", "lfw"), ("lfw-[0-9][0-9].parquet", "lfw"), ("part_?_lfw*", "part_lfw"), ("lfw.v2.parquet", "lfw_v2"),
        ("a/b c (1).parquet", "b_c_1"), ("/*.parquet", "files"), ("gesichter_é.parquet", "gesichter_é"),
        ("test_embeddings.parquet", "test"), ("splits/tests/*.parquet", "tests"), ("splits/test/*/*.parquet", "test_embeddings"),
        ("x/../splits/test/digi*/*", "test_embeddings"),
    ],
)  # fmt: skip
def test_vectors_are_named_after_what_is_embedded(pattern, name, tmp_path):
    words = (quoted("embed.test_glob", pattern), "split.out_dir=splits")
    assert sniperface.embedded_file(settings(*words), tmp_path) == f"embeddings/{name}.parquet"
    assert sniperface.embedded_file(settings(*words, "embed.out=mine.parquet"), tmp_path) == "mine.parquet"


@pytest.mark.parametrize(
    ("split_of", "seed", "name"), [("test", 42, "test_embeddings"), ("train", 42, "mine"), ("test", 7, "mine")]
)
def test_own_test_shards_that_were_moved_are_known_by_their_notes(piped, people, tmp_path, split_of, seed, name):
    globs = [str(people / f"{source}_000.parquet") for source in SOURCES.values()]
    splits = dataio.write_identity_splits(dataio.collect_unique_identities(globs), tmp_path / "splits.parquet", 0.75, seed)
    for source, glob in zip(SOURCES, globs, strict=True):
        dataio.materialize_split(glob, tmp_path / "splits.parquet", tmp_path / "shards" / source, split_of)
    (tmp_path / "shards").rename(tmp_path / "mine")
    cfg = settings(*piped[0], f"embed.test_glob={tmp_path}/mine/*/*.parquet")
    assert (splits.hash == sniperface.read_starts(piped[1])[-1]["table"]) == (seed == 42)
    assert sniperface.embedded_file(cfg, piped[1]) == f"embeddings/{name}.parquet"
    assert sniperface.files_of_evaluation(cfg, piped[1])["metrics"].name == (
        "metrics.json" if name != "mine" else "metrics_mine.json"
    )


def test_vectors_of_other_files_replace_neither_the_runs_own_nor_their_figures(piped, people, tmp_path, no_pictures):
    words, run = piped[0], shutil.copytree(piped[1], tmp_path / "run")
    report = (run / "report.md").read_text()
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix in (".parquet", ".json", ".png")}
    strangers = [row | {"identity_id": f"x{row['identity_id']}"} for row in rows_of(people)[:60]]
    write_rows(tmp_path / "lfw/lfw_0.parquet", strangers)
    cfg = settings(*words, f"embed.test_glob={tmp_path}/lfw/lfw_*.parquet")
    sniperface.embed(cfg, run, {"embed.test_glob"})
    metrics = sniperface.evaluate(cfg, run)
    assert metrics["identities"] == 10
    assert metrics == json.loads((run / "metrics_lfw.json").read_text())
    assert sniperface.evaluate(settings(*words, "eval.embeddings=embeddings/lfw.parquet"), run)["rank1"] == metrics["rank1"]
    assert {path: path.read_bytes() for path in kept} == kept
    written = {"lfw.parquet"} | {f"lfw.{name}.parquet" for name in sniperface.REFERENCES}
    assert {path.name for path in (run / "embeddings").glob("lfw*")} == written
    assert (run / "report.md").read_text().startswith(report.strip())
    assert "## metrics_lfw.json" in (run / "report.md").read_text()
