"""Encoders that leave, and weights that come in."""

import json

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from runs import SOURCES, bits, job, refusal, settings, state_of, train

import dataio
import moco
import sniperface
from sniperface import typed_keys


def pictures_of(vectors: dataio.VectorTable, data) -> np.ndarray:
    """The pictures of a table of vectors, as decoded: uint8 [n, S, S, 3]."""
    tables = [dataio.pq.read_table(data / f"{name}_000.parquet").to_pylist() for name in SOURCES.values()]
    of = {(row["identity_id"], row["image_filename"]): row["image_bytes"] for table in tables for row in table}
    keys = zip(vectors.names.tolist(), vectors.files.tolist(), strict=True)
    return np.stack([dataio.decode_image(of[key], 32, 10**6) for key in keys])


@pytest.mark.parametrize("given", ["uint8", "float", "normalised"])
def test_embed_the_files_and_the_notebook_give_the_same_vectors(trained, unbroken, data, given, tmp_path, no_pictures, caplog):
    flip = given == "uint8"  # the run was trained without
    words = f"embed.flip={str(flip).lower()}", f"export.input={given}"
    cfg = job(unbroken, data, *words)
    sniperface.embed(cfg, trained, typed_keys(words))
    sniperface.export(cfg, trained, typed_keys(words))
    vectors = dataio.read_vectors(trained / "embeddings" / "test_embeddings.parquet")
    decoded = pictures_of(vectors, data)
    files = ["export/encoder.safetensors", *["checkpoints/last.pt"] * (not flip)]
    for encode in (moco.load_encoder(trained / file) for file in files):
        assert np.abs(encode(decoded).numpy() - vectors.vectors).max() < 1e-5
        assert torch.equal(encode(torch.from_numpy(decoded[:9])), encode(decoded[:9].transpose(0, 3, 1, 2) / np.float32(127.5) - 1))
    words = f"embed.checkpoint={trained}/export/encoder.safetensors", "embed.references=false", "embed.out=again.parquet"
    sniperface.embed(job(unbroken, data, *words), tmp_path, typed_keys(words))  # mirrored and whitened as the file says
    assert np.abs(dataio.read_vectors(tmp_path / "again.parquet").vectors - vectors.vectors).max() < 1e-5
    session = onnxruntime.InferenceSession(trained / "export" / "encoder.onnx")
    pictures = decoded if given == "uint8" else decoded.astype(np.float32).transpose(0, 3, 1, 2)
    pictures = pictures / np.float32(127.5) - 1 if given == "normalised" else pictures
    for count in (1, 3, len(pictures)):
        found = session.run(["vectors"], {"pictures": pictures[:count]})[0]
        assert np.abs(found - vectors.vectors[:count]).max() < 1e-4
    modes = {path.stat().st_mode for path in (trained / "export").glob("encoder.*")}
    assert len(modes) == 1  # whoever may read one may read all
    note = json.loads((trained / "export" / "encoder.json").read_text())
    assert note["flip"] == flip
    assert note["whitened"]
    assert "no whitening" not in caplog.text
    assert moco.load_encoder(trained / "checkpoints/last.pt", flip=True).mean is None  # its whitening is of plain vectors
    assert "checkpoints/last.pt: no whitening for these vectors" in caplog.text
    assert note["input"]["pictures"].startswith("uint8" if given == "uint8" else "float32")
    assert note["input"]["pictures"].endswith("minus 1") == (given == "normalised")
    assert "$" not in (trained / "export" / "README.md").read_text()


def test_the_public_names_go_out_and_come_in_again(trained, unbroken, data, tmp_path, no_pictures, caplog):
    words = "export.formats=[pt]", "embed.whiten=none", "data.digiface_glob=/not/here/*.parquet"  # only ONNX needs pictures
    sniperface.export(job(unbroken, data, *words), trained, typed_keys(words))
    weights = torch.load(trained / "export" / "encoder.pt", weights_only=True)
    model = state_of(trained)["model"]
    assert bits(weights) == bits({name: model[f"query.backbone.{name}"] for name in weights})
    of_another_program = {"config": {"lr": 0.1}, "state_dict": {f"module.{name}": value for name, value in weights.items()}}
    torch.save(of_another_program, tmp_path / "public.pth")
    sniperface.export(job(unbroken, data, "export.formats=[safetensors]", "embed.whiten=none"), trained, {"embed.whiten"})
    assert not (trained / "export" / "encoder.pt").exists()  # it may be of another encoder than the card
    sniperface.embed(job(unbroken, data, "embed.whiten=none"), trained, {"embed.whiten"})
    ours = dataio.read_vectors(trained / "embeddings" / "test_embeddings.parquet").vectors
    words = "embed.whiten=none", f"embed.checkpoint={tmp_path}/public.pth", "embed.references=false", "embed.out=public.parquet"
    sniperface.embed(job(unbroken, data, *words), tmp_path / "new", typed_keys(words))
    assert np.array_equal(dataio.read_vectors(tmp_path / "new" / "public.parquet").vectors, ours)
    assert "nobody can tell here whom they were trained on" in caplog.text
    sniperface.embed(job(unbroken, data, *words[:3]), trained, typed_keys(words[:3]))
    sniperface.evaluate(job(unbroken, data), trained)
    assert "is by weights of another program, the run is at step 8" in caplog.text
    words = *words, "export.formats=[pt]"
    sniperface.export(job(unbroken, data, *words), tmp_path / "new", typed_keys(words))
    assert "`public.pth` holds weights of another program" in (tmp_path / "new" / "export" / "README.md").read_text()


def test_an_unfinished_run_is_exported_as_embedded_and_the_card_holds_no_figures_of_another_encoder(words, people, tmp_path):
    folder, asked = tmp_path / "run", settings(*words, "export.formats=[safetensors]", "train.max_steps=1")
    sniperface.train(asked, folder)
    sniperface.embed(asked, folder)
    sniperface.evaluate(asked, folder)
    sniperface.export(asked, folder)
    vectors = dataio.read_vectors(folder / "embeddings" / "test_embeddings.parquet")
    encode = moco.load_encoder(folder / "export" / "encoder.safetensors")
    assert vectors.note["whitened"]
    assert np.abs(encode(pictures_of(vectors, people)).numpy() - vectors.vectors).max() < 1e-5
    what = f"test_embeddings, {len(set(vectors.names))} people enrolled with {asked.eval.enroll_per_id} pictures, template centroid"
    assert f"| {what} | rank1 |" in (folder / "export" / "README.md").read_text()
    with safetensors.safe_open(folder / "export" / "encoder.safetensors", "pt") as file:
        tensors, note = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["whitening.projection"] = tensors.pop("whitening.matrix")  # of an older kind
    safetensors.torch.save_file(tensors, tmp_path / "older.safetensors", note)
    assert moco.load_encoder(tmp_path / "older.safetensors").mean is None
    sniperface.export(settings(*words, "export.formats=[pt]", "embed.whiten=none"), folder, {"embed.whiten"})
    assert "None were measured with this encoder" in (folder / "export" / "README.md").read_text()


def test_weights_that_fit_in_part_are_refused_with_what_does_not(trained, tmp_path):
    weights = moco.read_weights(trained / "checkpoints" / "last.pt").backbone
    weights["fc.weight"] = weights["fc.weight"][:, :-4]
    del weights["layer2.0.conv1.weight"]
    torch.save(weights, tmp_path / "part.pt")
    told = refusal(lambda: moco.load_encoder(tmp_path / "part.pt"))
    assert str(tmp_path / "part.pt") in told
    assert "1 missing, such as layer2.0.conv1.weight" in told
    assert "1 of another shape, such as fc.weight" in told
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "other.pt")
    assert "holds no weights of an iResNet" in refusal(lambda: moco.load_encoder(tmp_path / "other.pt"))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")  # would be executed
    (tmp_path / "junk.pt").write_text("junk")
    for path in (tmp_path / "module.pt", tmp_path / "junk.pt"):
        told = refusal(lambda path=path: moco.load_encoder(path))
        assert f"{path}: cannot be used: damaged, or no state_dict of tensors" in told


def test_an_onnx_file_of_other_vectors_is_refused(trained, unbroken, data, monkeypatch):
    monkeypatch.setattr(moco, "PARITY", -1)
    assert "differ from torch's by up to" in refusal(lambda: sniperface.export(job(unbroken, data), trained))
    assert not (trained / "export" / "encoder.onnx").exists()


def test_a_missing_extra_is_one_line(trained, unbroken, data, monkeypatch):
    monkeypatch.setattr(moco.importlib.util, "find_spec", lambda name: None)
    told = refusal(lambda: sniperface.export(job(unbroken, data), trained))
    assert (
        told
        == "onnx, onnxscript, onnxruntime, safetensors: not installed; run with `uv run --extra export python sniperface.py ...`"
    )


def test_a_run_starts_from_weights_with_a_new_queue(words, tmp_path):
    train(words, tmp_path / "first")
    first = state_of(tmp_path / "first")["model"]
    train(words, tmp_path / "second", f"train.init={tmp_path}/first/checkpoints/last.pt", "train.lr=1e-9", "train.max_steps=1")
    second = state_of(tmp_path / "second")["model"]
    for name, value in second.items():
        if name.startswith("query.backbone") and name.endswith("conv1.weight"):
            assert torch.allclose(value, first[name], atol=1e-6)
    assert not torch.equal(second["queue"], first["queue"])


def test_weights_of_a_run_with_another_split_are_refused(words, tmp_path):
    train(words, tmp_path / "first")
    other = "split.seed=9", f"split.out_dir={tmp_path}/other", f"train.init={tmp_path}/first/checkpoints/last.pt"
    assert "it may have seen the test identities" in refusal(lambda: train(words, tmp_path / "second", *other))


def test_the_validation_identities_are_measured_while_it_trains(words, tmp_path, monkeypatch, caplog):
    sides = "split.validation_ratio=0.3", "train.probe_every_epochs=1", "split.materialize=no"
    train(words, tmp_path / "run", *sides)
    lines = sniperface.read_log(tmp_path / "run")
    assert [line["epoch"] for line in lines if "probe_rank1" in line] == [1, 2]
    of_val = "embed.split=val", "embed.references=false", "eval.embeddings=embeddings/val_embeddings.parquet"
    of_val = settings(*words, *sides, *of_val)
    sniperface.embed(of_val, tmp_path / "run", {"embed.split"})
    metrics = sniperface.evaluate(of_val, tmp_path / "run")
    assert abs(metrics["rank1"] - lines[-1]["probe_rank1"]) < 0.02
    train(words, tmp_path / "unmeasured", *sides[::2])
    assert bits(state_of(tmp_path / "unmeasured")["model"]) == bits(state_of(tmp_path / "run")["model"])
    assert "needs split.validation_ratio" in refusal(lambda: settings("train.probe_every_epochs=1"))
    monkeypatch.setattr(moco, "measure", lambda *_: moco.enrol(np.array(["one person"] * 5), np.arange(5), 5, 0))  # refused
    train(words, tmp_path / "blind", *sides)
    assert "no probe: " in caplog.text
    assert [line["step"] for line in sniperface.read_log(tmp_path / "blind")] == [line["step"] for line in lines]
