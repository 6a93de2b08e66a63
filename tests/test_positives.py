"""Whitened vectors, LBP, and positives beyond the same picture."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import encode, write_rows
from runs import SOURCES, assert_same, assert_same_run, bits, settings, state_of, train

import dataio
import moco
import sniperface
from dataio import DecodedCache, ParquetImageStream, Partners, load_batches


def lbp_by_a_plain_loop(view) -> np.ndarray:
    """Counts [3, 81, 59] for one picture [3, 112, 112], neighbour by neighbour."""
    grey = np.tensordot([0.299, 0.587, 0.114], view.double().numpy(), 1)[8:104, 8:104]
    padded = np.pad(grey, ((0, 1), (0, 1)), mode="edge")  # a weight of zero needs a pixel, too
    jumps = [sum((b >> i & 1) != (b >> (i + 1) % 8 & 1) for i in range(8)) for b in range(256)]
    uniform = [b for b in range(256) if jumps[b] <= 2]
    counts = np.zeros((3, 81, 59))
    for radius in (1, 2, 3):
        for y in range(3, 93):
            for x in range(3, 93):
                code = 0
                for bit in range(8):
                    at_y, at_x = y - radius * math.sin(math.pi * bit / 4), x + radius * math.cos(math.pi * bit / 4)
                    top, left = math.floor(at_y + 1e-9), math.floor(at_x + 1e-9)
                    down, right = at_y - top, at_x - left
                    upper = (1 - right) * padded[top, left] + right * padded[top, left + 1]
                    lower = (1 - right) * padded[top + 1, left] + right * padded[top + 1, left + 1]
                    code |= int((1 - down) * upper + down * lower > grey[y, x] - moco.TIE) << bit
                label = uniform.index(code) if code in uniform else 58
                counts[radius - 1, (y - 3) // 10 * 9 + (x - 3) // 10, label] += 1
    return counts


def test_lbp_counts_what_a_plain_loop_counts():
    view = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = moco.lbp_histograms(view)[0] ** 2
    assert len(found) == 14337
    assert torch.allclose(found.view(3, 81, 59).sum(2), torch.tensor(100.0), atol=1e-3)  # each pixel of a cell once
    assert np.abs(found.numpy().reshape(3, 81, 59) - lbp_by_a_plain_loop(view[0])).sum() < 0.1


def test_lbp_does_not_change_with_brightness_and_contrast():
    view = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)) - 0.5
    changed = (moco.lbp_histograms(view) ** 2 - moco.lbp_histograms(view * 0.6 + 0.2) ** 2).abs().sum(1) / 2
    assert (changed < 0.01 * 24300).all()


def rows_with_hidden_direction(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, 16] that a loud direction sets apart, and people whom only a faint one tells."""
    generator = torch.Generator().manual_seed(0)
    person = torch.arange(count) % 2
    rows = 0.01 * torch.randn(count, 16, generator=generator)
    rows[:, 0] = 5 * torch.randn(count, generator=generator)
    rows[:, 1] = 0.2 * (2.0 * person - 1)
    return rows, person


def test_whitening_brings_out_what_lies_in_little_variance():
    rows, person = rows_with_hidden_direction(4000)
    white = moco.fit_whitening(rows)(rows)
    assert white.shape == (4000, 512)
    assert torch.allclose(white.norm(dim=1), torch.ones(4000))
    assert not white[:, 16:].any()  # padded
    same = person[:, None] == person

    def gap(vectors):
        cosines = F.normalize(vectors) @ F.normalize(vectors).T
        return float(cosines[same].mean() - cosines[~same].mean())

    assert gap(rows) < 0.1
    assert gap(white) > 2 * gap(rows)


def exact_matrix(rows: torch.Tensor) -> torch.Tensor:
    _, scale, directions = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    variance = scale[:512] ** 2 / len(rows)
    return (directions[:512].T / variance.sqrt() ** moco.WHITENING_POWER).float()


def test_a_whitening_takes_the_place_of_the_last_layer():
    backbone, views = moco.IResNet((1, 1, 1, 1), 0.125, 32).eval(), torch.randn(6, 3, 32, 32)
    whitening = moco.Whitening(torch.randn(256), torch.randn(256, 512))
    both = backbone.penultimate(views) + backbone.penultimate(views.flip(3))
    encode = moco.freeze(backbone, torch.device("cpu"), flip=True, whitening=whitening)
    assert torch.allclose(encode(views), whitening(both), atol=1e-5)
    embed = moco.freeze(backbone, torch.device("cpu"), flip=True)
    assert torch.allclose(embed(views), F.normalize(backbone(views) + backbone(views.flip(3))), atol=1e-5)


def test_of_few_rows_less_is_whitened_and_that_is_told(caplog):
    rows, _ = rows_with_hidden_direction(4000)
    few = moco.fit_whitening(rows[:100])
    assert "a whitening of 100 pictures is rough" in caplog.text
    assert few.matrix[:, 15].norm() < moco.fit_whitening(rows).matrix[:, 15].norm()
    assert few(rows[:3]).isfinite().all()


@pytest.mark.parametrize("rows", [torch.ones(5, 7), torch.zeros(1, 3), torch.eye(40, 3), torch.arange(12.0).view(6, 2)])
def test_directions_without_variance_are_left_out(rows):
    vectors = moco.fit_whitening(rows)(rows)
    assert vectors.isfinite().all()
    lengths = vectors.norm(dim=1)
    assert torch.allclose(lengths, (rows - rows.mean(0)).norm(dim=1).gt(0).float(), atol=1e-5)


def test_features_that_are_not_finite_are_refused():
    rows = torch.randn(50, 20)
    rows[7, 3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        moco.fit_whitening(rows)


@pytest.mark.parametrize("shape", [(1000, 1500), (1500, 1000)], ids=["more features than rows", "more rows"])
def test_a_whitening_is_exact_and_of_no_order(shape):
    spectrum = torch.arange(1, shape[1] + 1) ** -0.5
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spectrum
    fitted = moco.fit_whitening(rows)
    scores = [F.normalize((rows - rows.mean(0)) @ basis) for basis in (fitted.matrix, exact_matrix(rows))]
    one, other = (vectors @ vectors.T for vectors in scores)
    assert (one - other).abs().max() < 1e-3
    again = moco.fit_whitening(rows.flip(0))
    assert F.cosine_similarity(fitted(rows), again(rows)).min() > 0.999


def groups_of_rows(people: int, each: int, spread: float) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(people, 64, generator=generator).repeat_interleave(each, 0)
    return F.normalize(centre + spread * torch.randn(centre.shape, generator=generator)), np.repeat(np.arange(people), each)


def test_mutual_neighbours_are_linked_best_first_and_both_ways():
    vectors, person = groups_of_rows(50, 4, 0.8)
    links = moco.mutual_links(vectors, neighbours=3, keep=0.5)
    rows, places = (links.partners >= 0).nonzero(as_tuple=True)
    partners = links.partners[rows, places]
    assert (links.partners[partners] == rows[:, None]).any(1).all()
    assert (person[rows] == person[partners]).mean() > 0.95
    assert (links.partners[:, 1:] <= links.partners[:, :-1]).all()  # those that are none stand last
    every = moco.mutual_links(vectors, neighbours=3, keep=1.0)
    assert links.count == pytest.approx(every.count / 2, abs=2)
    cosines = vectors @ vectors.T
    kept = cosines[rows, partners]
    others = [cosines[a, b] for a, row in enumerate(every.partners) for b in row if b >= 0 and b not in links.partners[a]]
    assert kept.min() >= max(others)


def test_the_closure_of_links_falls_with_the_share_of_right_ones():
    found = [moco.mutual_links(groups_of_rows(200, 5, spread)[0], 3, 0.5).closure for spread in (0.5, 1.0, 1.5, 2.5)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] + 0.2


def test_better_vectors_are_taken_up_with_more_links_and_worse_ones_are_not():
    good, middling, bad = (groups_of_rows(200, 5, spread)[0] for spread in (0.7, 1.2, 3.0))
    first = moco.mutual_links(middling, 3, 0.2)
    better = moco.mutual_links(good, 3, 0.2, at_least=first)
    assert better.closure >= first.closure
    assert better.count > first.count
    assert moco.mutual_links(bad, 3, 0.2, at_least=first) is None


def test_equal_rows_and_rows_without_neighbours_make_no_harm():
    vectors = F.normalize(torch.cat([torch.ones(20, 8), torch.eye(8)]))
    links = moco.mutual_links(vectors, 3, 1.0)
    own = torch.arange(len(vectors))[:, None]
    assert (links.partners != own).all()


def test_an_approximate_search_finds_nearly_all_of_the_nearest(monkeypatch):
    vectors, _ = groups_of_rows(1000, 5, 1.0)
    exact = moco.nearest_rows(vectors.numpy(), 3)[1]
    monkeypatch.setattr(moco, "EXACT_ROWS", 1000)
    found = moco.nearest_rows(vectors.numpy(), 3)[1]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]) > 0.9


@pytest.mark.parametrize("p", [0.0, 0.6, 1.0])
def test_partners_are_pictures_that_are_linked(make_stream, tmp_path, p):
    caches = [DecodedCache(make_stream(n), tmp_path) for n in (60, 40)]
    table = np.full((100, 2), -1)
    table[:50, 0] = np.arange(50, 100)  # of either source with one of the other
    table[50:, 0] = np.arange(50)
    table[30:50], table[80:] = -1, -1
    sources = [Partners(caches, number, table, p) for number in (0, 1)]
    drawn = [[min(16 * step, 60), min(16 * step, 40)] for step in range(5)]
    pairs = zip(*(load_batches(s, drawn.__getitem__, 0, 4) for s in (caches, sources)), strict=True)
    pictures = np.concatenate([cache.images for cache in caches])
    row_of = {picture.tobytes(): row for row, picture in enumerate(pictures)}
    chosen = []
    for images, others in pairs:
        for image, other in zip(images.permute(0, 2, 3, 1), others.permute(0, 2, 3, 1), strict=True):
            row, partner = (row_of[side.contiguous().numpy().tobytes()] for side in (image, other))
            assert partner in (row, table[row, 0])
            chosen += [partner != row] * int(table[row, 0] >= 0)
    assert np.mean(chosen) == pytest.approx(p, abs=0.2 * (0 < p < 1))


@pytest.fixture
def make_stream(tmp_path):
    """Streams of so many random pictures of 8 x 8."""
    rng, made = np.random.default_rng(0), []

    def make(count: int) -> ParquetImageStream:
        pictures = [encode(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(count)]
        made.append(tmp_path / f"{len(made)}.parquet")
        rows = [{"identity_id": f"{n // 4}", "image_filename": f"{n}", "image_bytes": data} for n, data in enumerate(pictures)]
        write_rows(made[-1], rows)
        return ParquetImageStream(str(made[-1]), image_size=8, seed=len(made))

    return make


MUTUAL = ("positives=mutual", "data.cache=decoded", "positives.every_epochs=1", "positives.keep=1")


def test_a_run_with_linked_pictures_goes_on_to_the_same_bits(words, tmp_path):
    train(words, tmp_path / "whole", *MUTUAL)
    whole = state_of(tmp_path / "whole")
    [links] = whole["links"].values()
    assert moco.Links(*links).count > 0
    steps = whole["step"] // 2
    train(words, tmp_path / "parts", *MUTUAL, f"train.max_steps={steps - 2}")
    train(words, tmp_path / "parts", *MUTUAL, f"train.max_steps={steps}")  # where the links are found anew
    train(words, tmp_path / "parts", *MUTUAL, f"train.max_steps={steps + 3}")
    train(words, tmp_path / "parts", *MUTUAL)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("spread_lbp", "spread_encoder", "by"), [(1.2, 9.0, "lbp"), (9.0, 1.2, "encoder"), (1.4, 1.4, "lbp and encoder")]
)
def test_links_are_by_whatever_links_more_rightly(spread_lbp, spread_encoder, by, monkeypatch):
    generator, cfg = torch.Generator().manual_seed(0), settings("backbone=tiny", *MUTUAL, "positives.keep=0.5")
    person = np.repeat(np.arange(250), 5)
    centre = torch.randn(250, 64, generator=generator).repeat_interleave(5, 0)
    views = [centre + spread * torch.randn(centre.shape, generator=generator) for spread in (spread_lbp, spread_encoder)]
    views = torch.cat(views, dim=1)[:, :, None, None]  # a descriptor sees its own half
    training = moco.Training(sniperface.build_model(cfg), cfg.train, torch.device("cpu"))
    monkeypatch.setattr(moco, "lbp_histograms", lambda views: views[:, :64, 0, 0])
    monkeypatch.setattr(training.model.query.backbone, "penultimate", lambda views: views[:, 64:, 0, 0])
    found = []
    for _ in range(2):
        training.renew_links(lambda: views.split(100), len(views), cfg.positives)
        found.append(training.links_in_use)
    assert [name for name, _ in found] == ["lbp", by]
    one, place = (found[1][1].partners >= 0).nonzero(as_tuple=True)
    right = (person[one] == person[found[1][1].partners[one, place]]).mean()
    assert right > 0.7


@pytest.mark.parametrize("parts", [[300] * 4, [1199, 1], [2, 600, 598]])
def test_descriptors_are_fitted_to_a_sample_whatever_the_parts(parts, monkeypatch):
    cfg, generator = settings("backbone=tiny", *MUTUAL), torch.Generator().manual_seed(0)
    monkeypatch.setattr(moco, "REFERENCE_ROWS", 3)  # each 400th: most parts hold none
    monkeypatch.setattr(moco, "FEW_ROWS", 3)
    views, fitted, real = torch.rand(1200, 3, 16, 16, generator=generator) * 2 - 1, [], moco.fit_whitening
    monkeypatch.setattr(moco, "lbp_histograms", lambda views: views.view(len(views), -1))
    monkeypatch.setattr(moco, "fit_whitening", lambda features: fitted.append(features) or real(features))
    training = moco.Training(sniperface.build_model(cfg), cfg.train, torch.device("cpu"))
    training.renew_links(lambda: views.split(parts), len(views), cfg.positives)
    expected = views[[0, 400, 800]]
    assert torch.equal(fitted[0], (expected + expected.flip(3)).flatten(1))


@pytest.mark.parametrize(("rows", "count", "sizes"), [([300, 211], 1000, [255] * 2), ([65], 40, [40]), ([9, 700], 512, [256] * 2)])
def test_a_sample_of_the_train_pictures_leaves_hardly_one_out(rows, count, sizes, monkeypatch):
    class Source(list):
        on_device = False

    def batches(first, last, *_):
        return [schedule.batch_size] * (last - first)

    def mixed(_, given):
        nonlocal schedule
        schedule = given
        return SimpleNamespace(batches=batches)

    schedule = None
    monkeypatch.setattr(dataio, "mix_from_start", mixed)
    assert sniperface.sample_images([Source(range(n)) for n in rows], settings(), count) == sizes
    assert schedule.steps_per_epoch >= len(sizes)


def test_links_are_judged_by_how_often_the_same_cosine_joins_one_person():
    first, others = groups_of_rows(200, 5, 1.0), groups_of_rows(60, 5, 1.2)
    links = moco.judge_links(moco.mutual_links(first[0], 3, 0.3), *others)
    cosines, person = others[0] @ others[0].T, others[1]
    nearest = cosines.fill_diagonal_(-2).topk(3).indices
    pairs = [(a, b) for a in range(300) for b in nearest[a].tolist() if a in nearest[b] and cosines[a, b] >= links.least]
    assert links.right == pytest.approx(np.mean([person[a] == person[b] for a, b in pairs]))
    assert links.covered == pytest.approx(len({a for a, _ in pairs}) / 300)
    assert 0 < links.covered < 1


def test_the_links_of_validation_pictures_are_logged_and_change_nothing(words, tmp_path, monkeypatch):
    sides = ("split.validation_ratio=0.3", f"split.out_dir={tmp_path}/splits", "split.materialize=no", "seed=3", *MUTUAL)
    train(words, tmp_path / "judged", *sides)
    lines = sniperface.read_log(tmp_path / "judged")
    assert all(0 <= line["links_covered"] <= 1 and line["links"] > 0 for line in lines)
    monkeypatch.setattr(moco, "judge_links", lambda links, *_: links)
    train(words, tmp_path / "unjudged", *sides)
    judged, unjudged = (state_of(tmp_path / run)["model"] for run in ("judged", "unjudged"))
    assert_same(*(bits(model) for model in (judged, unjudged)))


def test_validation_pictures_that_cannot_be_read_end_no_training(words, tmp_path, monkeypatch, caplog):
    sides = ("split.validation_ratio=0.3", f"split.out_dir={tmp_path}/splits", "split.materialize=no", "seed=3", *MUTUAL)
    monkeypatch.setattr(sniperface, "describe_rows", lambda *_: 1 / 0)
    train(words, tmp_path / "run", *sides)
    assert "no judgement of the links: division by zero" in caplog.text
    assert all(line["links"] > 0 for line in sniperface.read_log(tmp_path / "run"))


def test_linked_pictures_need_a_cache():
    with pytest.raises(ValueError, match=r"^positives=mutual: .* set data\.cache=decoded"):
        settings("positives=mutual")


def test_the_final_and_the_best_checkpoint_hold_their_own_whitening(words, tmp_path):
    train(words, tmp_path)
    final, best = (sniperface.load_checkpoint(tmp_path / "checkpoints" / f"{name}.pt") for name in ("last", "best"))
    for state in (final, best):
        assert state["whitening"]["matrix"].shape == state["model"]["query.backbone.fc.weight"].T.shape
    same = torch.equal(final["whitening"]["matrix"], best["whitening"]["matrix"])
    assert same == (final["step"] == best["step"])


def test_a_whitening_that_a_kill_prevented_is_made_by_the_same_command(words, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sniperface, "fit_whitening", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train(words, tmp_path / "parts", "data.cache=decoded")
    assert "whitening" not in state_of(tmp_path / "parts")
    for run in ("parts", "whole"):
        train(words, tmp_path / run, "data.cache=decoded")
    assert_same(*(bits(state_of(tmp_path / run)["whitening"]) for run in ("parts", "whole")))


def test_a_finished_run_without_a_best_checkpoint_or_a_whitening_gets_one_when_it_is_asked_for(words, tmp_path):
    train(words, tmp_path, "embed.whiten=none")
    assert "whitening" not in state_of(tmp_path)
    (tmp_path / "checkpoints" / "best.pt").unlink()
    train(words, tmp_path)
    assert "whitening" in state_of(tmp_path)
    assert not (tmp_path / "checkpoints" / "best.pt").exists()


def test_vectors_are_whitened_from_the_checkpoint_else_by_the_train_rows_else_not(words, people, tmp_path, caplog):
    train(words, tmp_path, "data.cache=decoded")
    out = tmp_path / "embeddings" / "test_embeddings.parquet"

    def vectors(*more: str) -> np.ndarray:
        cfg = settings(*words, "embed.leak_check=false", *more)
        sniperface.embed(cfg, tmp_path, sniperface.typed_keys(more))
        return dataio.read_vectors(out).vectors

    stored, raw = vectors(), vectors("embed.whiten=none")
    assert not np.allclose(stored, raw, atol=1e-2)
    path = tmp_path / "checkpoints" / "last.pt"
    state = sniperface.load_checkpoint(path)
    assert state["whitening"].keys() == {"mean", "matrix"}
    state["whitening"] = {"mean": torch.zeros(512), "basis": torch.eye(512)}  # of embeddings, as it once was
    sniperface.write_checkpoint(state, path)
    refitted = vectors()  # to the same pictures in another order
    assert np.einsum("nd,nd->n", refitted, stored).min() > 0.98
    assert "its whitening is of an older kind" in caplog.text
    gone = [f"data.{source}_glob={tmp_path}/gone.parquet" for source in SOURCES]
    given = f"embed.test_glob={people}/digi2real_*.parquet", f"embed.out={out}"
    raw = vectors(*given, "embed.whiten=none", "embed.references=false")
    assert np.allclose(vectors(*given, *gone), raw, atol=1e-6)
    assert "no references and no whitening, the run's train data is not here" in caplog.text
    train(words, tmp_path, "data.cache=decoded")
    assert sniperface.load_checkpoint(path)["whitening"].keys() == {"mean", "matrix"}
