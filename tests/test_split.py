"""The identity split table: who is on which side, and that nobody ever changes sides silently."""

import itertools
import os
import re
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PEOPLE, numbered_rows, shuffled, split, write_rows
from runs import job, refusal, with_note

import dataio
import sniperface


@pytest.mark.parametrize(("count", "ratio"), [(2, 0.5), (7, 0.75), (100, 0.75), (101, 0.75), (1000, 0.1), (33, 0.9)])
def test_the_train_ratio_is_exact_and_no_identity_is_on_two_sides(tmp_path, count, ratio):
    ids = [f"id{i}" for i in range(count)]
    splits = split(ids, tmp_path, ratio)
    assert len(splits.identities["train"]) == round(ratio * count)
    assert sorted(itertools.chain(*splits.identities.values())) == sorted(ids)


def test_the_split_of_an_identity_does_not_depend_on_the_order_or_repetition_of_the_input(tmp_path):
    ids = [f"id{i}" for i in range(50)]
    expected = split(ids, tmp_path)
    for order in (ids[::-1], shuffled(ids).tolist(), ids + ids[:20], set(ids), iter(ids)):
        assert split(order, tmp_path) == expected


def test_the_split_never_changes_silently(tmp_path):
    """Golden values: a change of these sides would move test identities of published runs into training."""
    splits = split([str(i) for i in range(20)], tmp_path)
    assert splits.identities["test"] == ["1", "18", "19", "6", "9"]
    assert splits.hash == "f901cf4a11730408"
    assert dataio.draw_seed(42, "order", 3) == 374074118411474


def test_another_seed_gives_another_split_of_the_same_size(tmp_path):
    ids = [f"id{i}" for i in range(100)]
    one, other = split(ids, tmp_path, seed=1), split(ids, tmp_path, seed=2)
    assert one.identities["train"] != other.identities["train"]
    assert one.hash != other.hash
    assert len(one.identities["train"]) == len(other.identities["train"]) == 75


def test_the_integer_1_and_the_string_1_are_the_same_person(tmp_path):
    texts, integers = write_rows(tmp_path / "a.parquet", numbered_rows(["1", "2", "3"])), tmp_path / "b.parquet"
    write_rows(integers, numbered_rows([2, 3, 4]), types={"identity_id": pa.int64()})
    assert dataio.collect_unique_identities([str(texts), str(integers)]) == ["1", "2", "3", "4"]
    assert len(dataio.build_index([str(texts), str(integers)], [2, "4"]).unit) == 3
    assert split([1, 2, 3, 4], tmp_path) == split(["1", "2", "3", "4"], tmp_path)


def test_integers_and_strings_may_be_mixed_in_one_split(tmp_path):
    assert split([1, "1", 2, "3", 4], tmp_path) == split(["1", "2", "3", "4"], tmp_path)


def test_extending_a_table_keeps_every_side_and_restores_the_ratio(tmp_path):
    old, new = [f"id{i}" for i in range(40)], [f"new{i}" for i in range(60)]
    first = split(old, tmp_path)
    known = {name: side for side, names in first.identities.items() for name in names}
    second = split(old + new, tmp_path, known=known)
    sides = {name: side for side, names in second.identities.items() for name in names}
    assert {name: sides[name] for name in old} == known
    assert len(second.identities["train"]) == 75
    assert len(sides) == 100


def test_an_extension_with_too_few_new_identities_puts_them_all_where_they_are_missing(tmp_path):
    known = dict.fromkeys([f"t{i}" for i in range(10)], "test") | {"a": "train"}
    splits = split([*known, "b", "c"], tmp_path, known=known)
    assert splits.identities["train"] == ["a", "b", "c"]
    known = dict.fromkeys([f"t{i}" for i in range(10)], "train") | {"a": "test"}
    assert split([*known, "b", "c"], tmp_path, known=known).identities["test"] == ["a", "b", "c"]


def test_validation_identities_come_out_of_the_train_side_only(tmp_path):
    ids = [f"id{i}" for i in range(200)]
    plain, with_val = split(ids, tmp_path), split(ids, tmp_path, validation_ratio=0.1)
    assert with_val.identities["test"] == plain.identities["test"]
    assert sorted(with_val.identities["train"] + with_val.identities["val"]) == plain.identities["train"]
    assert len(with_val.identities["val"]) == 15
    assert plain.identities["val"] == []


def test_the_table_says_how_it_was_made_and_its_hash_follows_its_content(tmp_path):
    splits = split(PEOPLE, tmp_path, 0.6, 7, validation_ratio=0.25)
    counts = {"train": 27, "val": 9, "test": 24}
    assert splits.note == {"seed": 7, "train_ratio": 0.6, "validation_ratio": 0.25, "counts": counts, "extends": []}
    table = pq.read_table(tmp_path / "splits.parquet")
    assert Counter(table["split"].to_pylist()) == counts
    pq.write_table(table.take(shuffled(np.arange(60))), tmp_path / "reordered.parquet")
    assert dataio.read_identity_splits(tmp_path / "reordered.parquet") == splits
    sides = table["split"].to_pylist()
    sides[0] = {"train": "test", "test": "train", "val": "test"}[sides[0]]
    pq.write_table(table.set_column(1, "split", pa.array(sides)), tmp_path / "changed.parquet")
    assert dataio.read_identity_splits(tmp_path / "changed.parquet").hash != splits.hash


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


PERSON = {"identity_id": "1", "split": "train"}
REFUSED = {  # and what is told beside the file's name
    "text": (lambda path: path.write_text("identity_id,split\n1,train\n"), ""),
    "folder": (lambda path: (path.unlink(), path.mkdir()), ""),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), ""),
    "one column": (table(a=[1]), "not a split table"),
    "other columns": (table(identity_id=["a", "b"], side=["train", "test"]), "not a split table.*side"),
    "two sides": (table(identity_id=["1", "1"], split=["train", "test"]), "each identity once"),
    "twice": (table(identity_id=[1, 1], split=["train", "train"]), "each identity once"),
    "another side": (table(identity_id=["a", "b"], split=["train", "exam"]), "as train, val or test"),
    "number sides": (table(identity_id=["a", "b"], split=[0, 1]), "as train, val or test"),
    "null side": (table(identity_id=["1", "2"], split=["train", None]), ""),
    "null identity": (table(identity_id=["a", None], split=["train", "test"]), "1 of 2 rows have no 'identity_id'"),
    "lists": (table(identity_id=[["1"]], split=["train"]), ""),
    "column twice": (
        lambda path: pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, ["identity_id", "split", "split"]), path), ""
    ),
    "note is no json": (lambda path: with_note(b"\x80\x04.")(path, [PERSON]), ""),
    "note is a list": (lambda path: with_note(b"[1]")(path, [PERSON]), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_split_table_is_refused_by_name_and_left_as_it_is(data, unbroken, tmp_path, kind):
    path, (make, message) = tmp_path / "splits" / "identity_splits.parquet", REFUSED[kind]
    shutil.copytree(unbroken / "splits", tmp_path / "splits")
    make(path)
    before = path.is_dir() or path.read_bytes()
    for read in (
        lambda: dataio.read_identity_splits(path),
        lambda: sniperface.train(job(tmp_path, data), tmp_path / "run"),
        lambda: sniperface.split(job(tmp_path, data), tmp_path / "run"),
    ):
        assert re.search(f"identity_splits.parquet.*{message}", refusal(read))
    assert before == (path.is_dir() or path.read_bytes())


def test_a_table_that_does_not_say_how_it_was_made_is_refused_by_the_commands(data, tmp_path):
    path = tmp_path / "splits" / "identity_splits.parquet"
    path.parent.mkdir()
    table(identity_id=["1", "2"], split=["train", "test"])(path)
    for command in (sniperface.train, sniperface.split):
        assert path.name in refusal(lambda command=command: command(job(tmp_path, data), tmp_path / "run"))


@pytest.mark.parametrize("ids", [[], ["a"]])
def test_a_split_without_train_or_test_identities_is_refused_and_writes_nothing(tmp_path, ids):
    with pytest.raises(ValueError, match="both train and test need at least one"):
        split(ids, tmp_path)
    assert list(tmp_path.iterdir()) == []
