"""Going on with a run: to the same bits, and only with the settings and data that it was started on."""

import shutil
import time

import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_rows
from runs import SERVER, assert_same_run, log_of, refusal, settings, state_of, train

import moco
import sniperface


def test_a_setting_that_is_newer_than_a_run_counts_as_what_was_done_before_it(words, tmp_path):
    train(words, tmp_path / "run", "train.max_steps=3")
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = sniperface.load_checkpoint(path)
    del state["config"]["train"]["lr_schedule"]
    sniperface.write_checkpoint(state, path)
    with pytest.raises(ValueError, match=r"train\.lr_schedule was 'cosine', asked is 'constant'"):
        train(words, tmp_path / "run", "train.lr_schedule=constant")
    with pytest.raises(ValueError, match=r"train\.lr_schedule=constant: the checkpoint was trained with cosine"):
        sniperface.settings_of(state["config"], settings("train.lr_schedule=constant"), {"train.lr_schedule"})
    train(words, tmp_path / "run", "train.max_steps=4")
    assert state_of(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_a_run_stopped_inside_an_epoch_goes_on_to_the_same_bits_whatever_the_workers(words, tmp_path, cache):
    train(words, tmp_path / "whole", f"data.cache={cache}", "data.workers=2")
    train(words, tmp_path / "parts", f"data.cache={cache}", "data.workers=1", "train.max_steps=5")
    assert state_of(tmp_path / "parts")["step"] == 5
    train(words, tmp_path / "parts", f"data.cache={cache}", "data.workers=3", "train.max_steps=17")
    train(words, tmp_path / "parts", f"data.cache={cache}", "data.workers=2")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


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


def test_a_finished_run_is_extended_by_a_new_schedule_to_the_same_bits_however_often_it_stops(words, tmp_path, caplog):
    caplog.set_level("INFO", logger="sniperface")
    train(words, tmp_path / "whole")
    first, longer = log_of(tmp_path / "whole"), ["train.epochs=4", "train.lr=0.02", "train.log_every=1"]
    with pytest.raises(ValueError, match=r"train.epochs was 2, asked is 4[\s\S]*run=[\s\S]*add train\.extend=true$"):
        train(words, tmp_path / "whole", *longer)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    train(words, tmp_path / "whole", *longer, "train.extend=true")
    end = first[-1]["step"]
    train(words, tmp_path / "parts", *longer, "train.extend=true", f"train.max_steps={end + 3}")
    train(words, tmp_path / "parts", *longer, f"train.max_steps={end + end // 2 + 1}")  # once extended, it is a run like others
    with pytest.raises(ValueError, match=rf"{end + end // 2 + 1} of {2 * end}; .* finish it, with train.epochs=4"):
        train(words, tmp_path / "parts", "train.epochs=5", "train.lr=0.02", "train.extend=true")
    train(words, tmp_path / "parts", *longer, "train.extend=true")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    lines = log_of(tmp_path / "parts")
    assert lines[: len(first)] == first
    rates = [line["lr"] for line in lines[len(first) :]]
    top = end // 2  # the warm-up is an epoch, as typed
    assert rates == pytest.approx([moco.lr_at(step, end, end // 2, settings(*words, *longer).train) for step in range(end)])
    assert rates[0] < rates[1] < rates[top] == max(rates) == 0.02
    assert rates[-1] < 0.001
    assert f"extended from step {end} on" in caplog.text
    assert (tmp_path / "parts" / "config.yaml").read_text().startswith("# extended after epochs [2]")
    assert sniperface.read_starts(tmp_path / "parts")[-1]["extended"] == [2]
    sniperface.embed(settings(*words, "embed.references=false"), tmp_path / "parts")
    sniperface.evaluate(settings(*words), tmp_path / "parts")
    assert '"extended": [2]' in (tmp_path / "parts" / "report.md").read_text()


def test_an_extension_changes_nothing_but_the_length_and_the_rate(words, tmp_path):
    train(words, tmp_path)
    for more in (["train.epochs=1"], ["train.epochs=3", "seed=1"], ["train.lr=0.01"]):
        with pytest.raises(ValueError, match="holds another run"):
            train(words, tmp_path, *more, "train.extend=true")


def test_a_cache_that_would_change_the_order_is_refused_before_it_is_made(words, tmp_path):
    train(words, tmp_path / "run", "train.max_steps=2")
    with pytest.raises(ValueError, match="decoded draws in another order"):
        train(words, tmp_path / "run", "data.cache=decoded")
    assert not (tmp_path / "cache").exists()


def written_anew(path, new, group, **options):
    """The rows of a file in a new one that takes its place."""
    rows = pq.read_table(path).to_pylist()
    path.unlink()
    write_rows(new, rows, group=group, **options)


@pytest.mark.parametrize(("cache", "group"), [("none", None), ("decoded", None), ("decoded", 13)])
def test_a_run_goes_on_to_the_same_bits_when_files_were_renamed_and_written_anew(words, tmp_path, people, cache, group, caplog):
    mine = shutil.copytree(people, tmp_path / "data")
    path, new = mine / "digiface1m_000.parquet", mine / "digiface1m_new name=1.parquet"
    more = [f"data.digiface_glob={mine}/digiface*.parquet", f"data.cache={cache}"]
    rows = pq.ParquetFile(path).metadata.row_group(0).num_rows
    written_anew(path, path, rows, compression="zstd")
    train(words, tmp_path / "whole", *more)
    train(words, tmp_path / "parts", *more, "train.max_steps=5")
    written_anew(path, new, group or rows, compression="zstd", compression_level=19)
    train(words, tmp_path / "parts", *more)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "digiface: 1 files, such as digiface1m_new name=1.parquet, were written anew: rows, people and" in caplog.text


def test_a_run_on_shards_goes_on_when_the_files_that_they_were_made_from_were_written_anew(words, tmp_path, people):
    mine = shutil.copytree(people, tmp_path / "data")
    path, more = mine / "digiface1m_000.parquet", [f"data.digiface_glob={mine}/digiface*.parquet"]
    sniperface.split(settings(*words, *more, "command=split"))
    train(words, tmp_path / "whole", *more)
    train(words, tmp_path / "parts", *more, "train.max_steps=5")
    assert state_of(tmp_path / "parts")["meta"]["shards"]
    written_anew(path, path, 13, compression="gzip")
    train(words, tmp_path / "parts", *more)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_other_row_groups_and_another_order_of_the_files_are_refused_and_told(words, tmp_path, people):
    mine = shutil.copytree(people, tmp_path / "data")
    path, copy = mine / "digiface1m_000.parquet", mine / "digiface1m_001.parquet"
    shutil.copy(mine / "digi2real_000.parquet", copy)
    more = [f"data.digiface_glob={mine}/digiface*.parquet", "train.max_steps=3"]
    train(words, tmp_path / "run", *more)
    copy.rename(mine / "digiface1m_.parquet")
    told = refusal(lambda: train(words, tmp_path / "run", *more))
    assert "digiface1m_000.parquet, now digiface1m_.parquet, differs in rows, people, pictures" in told
    assert "; restore files and order" in told
    (mine / "digiface1m_.parquet").rename(copy)
    written_anew(path, path, 13, compression="gzip")
    assert "digiface: digiface1m_000.parquet differs in row groups;" in refusal(lambda: train(words, tmp_path / "run", *more))


def test_a_checkpoint_without_marks_of_its_files_is_refused_on_resume(words, tmp_path):
    train(words, tmp_path / "run", "train.max_steps=2")
    state, path = state_of(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "last.pt"
    del state["meta"]["files"]
    path.unlink()
    torch.save(state, path)
    moco.seal(path)
    assert "are of an older program" in refusal(lambda: train(words, tmp_path / "run"))
    sniperface.embed(settings(*words), tmp_path / "run")  # which needs none


def test_what_a_killed_process_left_half_written_goes_with_the_next_start(words, tmp_path):
    stale = tmp_path / "checkpoints" / ".step_0000007.pt.~1~another-container.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    train(words, tmp_path, "train.max_steps=2")
    assert not stale.exists()


def test_resume_must_and_never_mean_what_they_say(words, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(words, tmp_path, "train.resume=must")
    train(words, tmp_path, "train.max_steps=2")
    with pytest.raises(ValueError, match=r"train\.resume=never"):
        train(words, tmp_path, "train.resume=never")


def hold_lock(folder, pipe):
    with sniperface.run_lock(folder):
        pipe.send("locked")
        time.sleep(60)


def test_a_second_process_in_the_run_folder_is_refused(tmp_path):
    here, there = SERVER.Pipe()
    holder = SERVER.Process(target=hold_lock, args=(tmp_path, there), daemon=True)
    holder.start()
    assert here.recv() == "locked"
    with pytest.raises(ValueError, match="another process"), sniperface.run_lock(tmp_path):
        pass
    holder.kill()
    holder.join()
    with sniperface.run_lock(tmp_path):
        assert (tmp_path / ".lock").exists()
