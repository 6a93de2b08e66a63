"""A second opinion: the measures agree with scikit-learn and SciPy where those are installed (group `interop`)."""

import numpy as np
import pytest

import moco as m

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@pytest.fixture(params=[7, 2], ids=["distinct", "tied"])
def pairs(request):
    """Scores of 500 genuine and 40,000 impostor pairs."""
    generator = np.random.default_rng(0)
    genuine, impostors = generator.normal(0.35, 0.15, 500), generator.normal(0, 0.12, 40_000)
    return tuple(np.round(scores.clip(-1, 1), request.param).astype(np.float32) for scores in (genuine, impostors))


def test_verification_agrees_with_scikit_learn(pairs):
    genuine, impostors = pairs
    same, score = np.repeat([1, 0], [len(genuine), len(impostors)]), np.concatenate(pairs)
    columns, _ = m.verification(genuine, m.count_scores(impostors), [1e-1, 1e-2, 1e-3])
    fpr, tpr, _ = metrics.roc_curve(same, score, drop_intermediate=False)
    for far in (1e-1, 1e-2, 1e-3):
        assert columns[f"tar@{far:g}"].mean() == pytest.approx(tpr[fpr <= far + 1e-12].max())
    assert columns["auc"].mean() == pytest.approx(metrics.roc_auc_score(same, score), abs=1e-6)
    at = np.flatnonzero(1 - tpr <= fpr)[0]
    line = np.linspace(0, 1, 100_001)[:, None] * [fpr[at] - fpr[at - 1], tpr[at] - tpr[at - 1]] + [fpr[at - 1], tpr[at - 1]]
    assert columns["eer"].mean() == pytest.approx(line[np.abs(1 - line.sum(axis=1)).argmin(), 0], abs=1e-5)


def test_rank_k_agrees_with_scikit_learn():
    generator = np.random.default_rng(0)
    templates = generator.standard_normal((30, 16))
    own = generator.integers(0, 30, 400)
    unit = [
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (templates, templates[own] + 1.5 * generator.standard_normal((400, 16)))
    ]
    gallery = m.build_gallery(unit[0], np.arange(30))
    rank = m.search(unit[1], np.arange(400), own, gallery, 30).rank
    columns = m.closed_set(rank)
    for k in (1, 5, 10, 20):
        plain = metrics.top_k_accuracy_score(own, unit[1] @ unit[0].T, k=k, labels=np.arange(30))
        assert columns[f"rank{k}"].mean() == pytest.approx(plain)
    mrr = metrics.label_ranking_average_precision_score(np.eye(30)[own], unit[1] @ unit[0].T)
    assert (1 / rank).mean() == pytest.approx(mrr)


def test_students_t_and_wilsons_interval_agree_with_scipy():
    df = np.array([4, 5, 7.5, 12, 50, 1e6])
    np.testing.assert_allclose(m.student_t(df), stats.t.ppf(0.975, df), atol=1e-3)
    for hits, trials in ((0, 10), (3, 10), (995, 1000), (10, 10)):
        plain = stats.binomtest(hits, trials).proportion_ci(method="wilson")
        assert m.wilson(np.float64(hits / trials), np.float64(trials)) == pytest.approx((plain.low, plain.high), abs=1e-6)
