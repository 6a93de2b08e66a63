"""The measures agree with plain NumPy, keep their symmetries, refuse the unmeasurable; their intervals cover the truth."""

import numpy as np
import pytest

import moco as m

FARS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def faces(identities=40, images=(1, 12), noise=1.0, dim=32, seed=0):
    """Unit vectors [N, D] of drawn people, with their names and keys: a centre and noise around it."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(images[0], images[1] + 1, identities)
    centres = generator.standard_normal((identities, dim))
    person = np.repeat(np.arange(identities), counts)
    vectors = centres[person] + noise * generator.standard_normal((len(person), dim))
    names = np.array([f"id_{p:04d}" for p in person])
    keys = np.array([f"digiface/{k}.png" for n in counts for k in range(n)])
    return unit(vectors), names, keys


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def gallery_and_probes(vectors, names, keys, per_id=2, seed=1, template="centroid"):
    drawn = m.enrol(names, keys, per_id, seed)
    gallery = m.build_gallery(vectors[drawn.enrolled], drawn.identity[drawn.enrolled], template)
    return gallery, vectors[drawn.probes], gallery.index(drawn.identity[drawn.probes]), drawn


def look_up(probes, own, gallery, last_rank=40):
    return m.search(probes, np.arange(len(probes)), own, gallery, last_rank)


def compare(probes, own, gallery):
    return m.count_pairs(probes, np.arange(len(probes)), own, gallery)


def plain_scores(vectors, drawn, template):
    """[P, G] in float64, one template at a time."""
    codes = np.unique(drawn.identity[drawn.enrolled])
    columns = []
    for code in codes:
        images = vectors[[row for row in drawn.enrolled if drawn.identity[row] == code]].astype(np.float64)
        probes = vectors[drawn.probes].astype(np.float64)
        centre = images.mean(axis=0)
        columns.append(probes @ (centre / np.linalg.norm(centre)) if template == "centroid" else (probes @ images.T).max(axis=1))
    return np.stack(columns, axis=1), np.searchsorted(codes, drawn.identity[drawn.probes])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda v: v[:0], "expected vectors"),
        (lambda v: np.where(np.arange(len(v))[:, None] == 7, np.nan, v), "1 of .* NaN or infinity, first row 7"),
        (lambda v: np.where(np.arange(len(v))[:, None] == 3, np.inf, v), "first row 3"),
        (lambda v: v * np.where(np.arange(len(v)) > 4, 1.01, 1)[:, None], "not of unit length, first row 5"),
        (lambda v: v * (np.arange(len(v)) != 3)[:, None], "1 of .* are zero, first row 3"),
        (lambda v: np.repeat(v[:1], 9, axis=0), "all 9 vectors are equal"),
    ],
)
def test_vectors_that_would_make_the_figures_wrong_are_refused(spoil, says):
    vectors = faces()[0]
    m.check_vectors(vectors * np.float32(1.0005))
    with pytest.raises(ValueError, match=says):
        m.check_vectors(spoil(vectors))


def test_enrolment_partitions_the_rows_and_takes_per_id_of_each():
    _, names, keys = faces()
    drawn = m.enrol(names, keys, per_id=5, seed=3, open_set_share=0.2)
    assert sorted(np.concatenate([drawn.enrolled, drawn.probes, drawn.unknown])) == list(range(len(names)))
    people, counts = np.unique(names, return_counts=True)
    left_out = set(names[drawn.unknown])
    assert len(left_out) == 8
    for person, count in zip(people, counts, strict=True):
        assert (names[drawn.enrolled] == person).sum() == (0 if person in left_out else min(5, count))
    assert drawn.distractors == sum(c <= 5 and p not in left_out for p, c in zip(people, counts, strict=True))


def test_enrolment_depends_on_the_seed_and_the_set_of_rows_only():
    _, names, keys = faces()
    order = np.random.default_rng(0).permutation(len(names))

    def picked(names, keys, seed):
        drawn = m.enrol(names, keys, 3, seed, 0.1)
        return {
            kind: [*zip(names[rows], keys[rows], strict=True)]
            for kind, rows in drawn._asdict().items()
            if kind in ("enrolled", "probes", "unknown")
        }

    assert picked(names, keys, 1) == picked(names[order], keys[order], 1)
    assert picked(names, keys, 1)["enrolled"] != picked(names, keys, 2)["enrolled"]
    some = names < "id_0030"  # who else is in the file changes nobody's enrolment images
    whole, part = m.enrol(names, keys, 3, 1), m.enrol(names[some], keys[some], 3, 1)
    assert set(part.enrolled) == {row for row in whole.enrolled if some[row]}


def test_enrolment_draws_each_image_equally_often():
    names, keys = np.repeat(["a", "b"], 6), np.array([*map(str, range(6))] * 2)
    often = np.zeros(12)
    for seed in range(600):
        often[m.enrol(names, keys, 2, seed).enrolled] += 1
    assert np.abs(often - 200).max() < 4.5 * np.sqrt(600 * (1 / 3) * (2 / 3))


def test_enrolment_refuses_doubled_images_and_a_file_without_probes():
    names, keys = np.array(["a", "a", "a", "b"]), np.array(["1", "2", "1", "1"])
    with pytest.raises(ValueError, match="1 rows repeat an image, first '1' of identity 'a'"):
        m.enrol(names, keys, 1, 0)
    with pytest.raises(ValueError, match=r"no probes left: 5 images .* largest of 2 enrolled identities has 2; lower eval"):
        m.enrol(names[[0, 1, 3]], keys[[0, 1, 3]], 5, 0)


def test_a_template_without_direction_is_refused():
    opposite = np.array([[1, 0], [-1, 0]], np.float32)
    with pytest.raises(ValueError, match="centroids have no direction"):
        m.build_gallery(opposite, np.array([0, 0]))


@pytest.mark.parametrize("template", ["centroid", "best"])
@pytest.mark.parametrize("pairs", [1, 100, 2**22])
@pytest.mark.parametrize("last_rank", [3, 40])
def test_ranks_and_scores_agree_with_plain_numpy(template, pairs, last_rank, monkeypatch):
    monkeypatch.setattr(m, "PAIRS", pairs)
    vectors, names, keys = faces(noise=1.5)
    gallery, probes, own, drawn = gallery_and_probes(vectors, names, keys, template=template)
    score, own_plain = plain_scores(vectors, drawn, template)
    true = score[np.arange(len(score)), own_plain]
    rank = (score >= true[:, None]).sum(axis=1)
    assert rank.max() > 1
    assert (rank == 1).any()
    found, (genuine, impostors) = look_up(probes, own, gallery, last_rank), compare(probes, own, gallery)
    np.testing.assert_array_equal(own, own_plain)
    np.testing.assert_array_equal(found.rank, np.minimum(rank, last_rank + 1))
    np.testing.assert_allclose(genuine, true, atol=1e-6)
    np.testing.assert_array_equal(gallery.owner[found.row[:, 0]], score.argmax(axis=1))
    np.testing.assert_allclose(found.score[:, 0], score.max(axis=1), atol=1e-6)
    rest = np.delete(score.ravel(), np.arange(len(score)) * score.shape[1] + own_plain)
    edges = np.linspace(-1, 1, 33)
    assert impostors.sum() == rest.size
    np.testing.assert_array_equal(impostors.reshape(32, -1).sum(axis=1), np.histogram(rest, edges)[0])


def test_closed_set_columns_are_the_cmc():
    columns = m.closed_set(np.array([1, 2, 2, 30]), (1, 2, 3))
    assert {name: float(np.mean(c)) for name, c in columns.items()} == {"rank1": 0.25, "rank2": 0.75, "rank3": 0.75}


def test_an_encoder_that_maps_all_faces_to_one_point_has_the_worst_rank():
    _, names, keys = faces()
    same = unit(np.tile(np.random.default_rng(0).standard_normal(512), (len(names), 1)))
    for template in ("centroid", "best"):
        gallery, probes, own, _ = gallery_and_probes(same, names, keys, template=template)
        assert (look_up(probes, own, gallery).rank == 40).all()


@pytest.mark.parametrize(("dim", "floor", "small"), [(128, 1.5, 1e-4), (512, 1.8, 1e-3)])
def test_a_tie_is_a_tie_where_products_round_most(dim, floor, small):
    """Few large values among many small ones: two ways to add the same products differ by 3e-6 and 5e-6."""
    person = unit((np.random.default_rng(7).standard_normal((1024, dim)) - floor).clip(0) + small)
    own = np.random.default_rng(8).permutation(2048)
    twice = m.Gallery(np.concatenate([person, person]), *[np.arange(2048)] * 2)  # everyone under two names, far apart
    assert (look_up(twice.vectors[own], own, twice).rank == 2).all()
    once = m.Gallery(person, *[np.arange(1024)] * 2)
    assert (look_up(person, np.arange(1024), once).rank == 1).all()


def test_a_small_gallery_shows_all_its_rows():
    vectors, names, keys = faces(identities=4, images=(5, 8), noise=4)
    for template, shown in (("centroid", 4), ("best", m.NEIGHBOURS)):
        gallery, probes, own, _ = gallery_and_probes(vectors, names, keys, template=template)
        found = look_up(probes, own, gallery)
        assert found.row.shape == found.score.shape == (len(probes), shown)
        assert found.row.min() >= 0
        assert found.rank.max() <= 4


def test_unknown_people_are_found_at_no_rank():
    vectors, names, keys = faces()
    gallery, probes, own, _ = gallery_and_probes(vectors, names, keys)
    assert gallery.index(np.array([-5, 9999])).tolist() == [-1, -1]
    for last_rank in (3, 60):
        assert (look_up(probes, np.full_like(own, -1), gallery, last_rank).rank == last_rank + 1).all()
    half, known = look_up(probes, np.where(np.arange(len(own)) % 2, own, -1), gallery), look_up(probes, own, gallery)
    np.testing.assert_array_equal(half.rank, np.where(np.arange(len(own)) % 2, known.rank, 41))


@pytest.mark.parametrize("change", ["permuted", "scaled"])
def test_order_of_the_rows_and_length_of_the_vectors_change_no_figure(change):
    vectors, names, keys = faces(noise=1.5)
    generator = np.random.default_rng(5)
    if change == "permuted":
        order = generator.permutation(len(names))
        other = (vectors[order], names[order], keys[order])
    else:
        other = (unit(vectors * generator.uniform(0.1, 9, (len(vectors), 1))), names, keys)

    def figures(vectors, names, keys):
        gallery, probes, own, drawn = gallery_and_probes(vectors, names, keys)
        found, scores = look_up(probes, own, gallery), compare(probes, own, gallery)
        columns = m.closed_set(found.rank) | {"mrr": 1 / found.rank} | m.verification(*scores, FARS)[0]
        found = m.rates(columns, drawn.identity[drawn.probes], seed=1, draws=50)
        order = np.lexsort((keys, names))
        space = m.geometry_of_space(vectors, drawn.identity, order, seed=1, sample=50)
        return np.array([*(x for rate in found.values() for x in rate), *space.values()])

    np.testing.assert_allclose(figures(*other), figures(vectors, names, keys), rtol=1e-5)


def test_perfect_embeddings_give_one():
    vectors, names, keys = faces(noise=0.001)
    gallery, probes, own, drawn = gallery_and_probes(vectors, names, keys)
    found, scores = look_up(probes, own, gallery), compare(probes, own, gallery)
    columns = m.closed_set(found.rank) | {"mrr": 1 / found.rank} | m.verification(*scores, [1e-1, 1e-2])[0]
    assert columns.pop("eer").mean() == 0
    found = m.rates(columns, drawn.identity[drawn.probes], seed=0)
    assert [rate.value for rate in found.values()] == [1.0] * len(found)
    assert all(rate.low < 1 and rate.high == 1 for rate in found.values())


def test_random_embeddings_give_chance_within_the_interval(monkeypatch):
    monkeypatch.setattr(m, "GRID", 2**14)  # 40 small tables instead of large ones
    chance = {"rank1": 0.02, "rank5": 0.1, "rank10": 0.2, "mrr": (1 / np.arange(1, 51)).mean()}
    chance |= {"auc": 0.5, "eer": 0.5, "tar@0.1": 0.1, "tar@0.01": 0.01}
    inside = dict.fromkeys(chance, 0)
    for seed in range(40):
        vectors, names, keys = faces(identities=50, images=(30, 30), noise=1e6, seed=seed)
        gallery, probes, own, drawn = gallery_and_probes(vectors, names, keys)
        found, scores = look_up(probes, own, gallery), compare(probes, own, gallery)
        columns = m.closed_set(found.rank) | {"mrr": 1 / found.rank} | m.verification(*scores, [1e-1, 1e-2])[0]
        found = m.rates(columns, drawn.identity[drawn.probes], seed, draws=80)
        for name, value in chance.items():
            inside[name] += found[name].low <= value <= found[name].high
    assert min(inside.values()) >= 33, inside  # 38 of 40 expected; fewer than 33 once in 500


def plain_tar(genuine, impostors, far):
    """TAR at the lowest threshold, among all scores and infinity, that lets in at most that share of impostors."""
    candidates = np.append(np.unique(np.concatenate([genuine, impostors])), np.inf)
    best = next(t for t in candidates if (impostors >= t).mean() <= far)
    return (genuine >= best).mean()


@pytest.mark.parametrize("decimals", [5, 1])  # 5: coarser than the grid, 1: most scores are tied
def test_verification_agrees_with_plain_numpy(decimals):
    generator = np.random.default_rng(0)
    genuine = np.round(generator.normal(0.4, 0.15, 300).clip(-1, 1), decimals).astype(np.float32)
    impostors = np.round(generator.normal(0.0, 0.15, 3000).clip(-1, 1), decimals).astype(np.float32)
    columns, at = m.verification(genuine, m.count_scores(impostors), FARS)
    assert [far for far in FARS if at[far] is None] == [1e-3, 1e-4, 1e-5, 1e-6]  # 3 of 3,000 are too few to quote
    for far in (1e-1, 1e-2):
        assert columns[f"tar@{far:g}"].mean() == plain_tar(genuine, impostors, far)
        assert (impostors >= np.float32(at[far])).mean() <= far
    auc = np.mean((genuine[:, None] > impostors) + 0.5 * (genuine[:, None] == impostors))
    assert columns["auc"].mean() == pytest.approx(auc, abs=1e-9)
    values = np.append(np.unique(np.concatenate([genuine, impostors])), np.inf)
    far, frr = np.array([[(impostors >= t).mean(), (genuine < t).mean()] for t in values]).T
    grid = np.linspace(0, 1, 200_001)  # the equal error rate on the ROC's line, by a fine grid
    eer = grid[np.abs(1 - grid - np.interp(grid, far[::-1], 1 - frr[::-1])).argmin()]
    assert columns["eer"].mean() == pytest.approx(eer, abs=2e-3 if decimals == 7 else 1e-5)


def test_a_rate_is_quoted_from_ten_errors_and_not_from_nine():
    table = m.count_scores(np.linspace(-0.5, 0.5, 10_000).astype(np.float32))
    at = m.thresholds(table, [1e-3, 9e-4])
    assert at[9e-4] is None
    assert (np.linspace(-0.5, 0.5, 10_000).astype(np.float32) >= np.float32(at[1e-3])).sum() == 10


def test_equal_impostors_are_all_let_in_or_none():
    columns, at = m.verification(np.full(50, 0.5, np.float32), m.count_scores(np.full(1000, 0.5, np.float32)), [1e-1])
    assert columns["tar@0.1"].mean() == 0
    assert at[1e-1] > 0.5
    assert columns["auc"].mean() == columns["eer"].mean() == 0.5


def test_the_interval_of_the_equal_error_rate_knows_that_the_threshold_gives_way():
    generator = np.random.default_rng(0)
    genuine, impostors = generator.normal(0.15, 0.15, 4000), generator.normal(-0.15, 0.15, 40_000)  # mirrored: half each
    column = m.verification(genuine, m.count_scores(impostors), [])[0]["eer"]
    assert column.std() == pytest.approx(0.5 * np.sqrt(column.mean() * (1 - column.mean())), rel=0.1)


def test_a_gallery_of_one_identity_has_no_impostors_and_is_refused():
    with pytest.raises(ValueError, match="no impostor pairs"):
        m.verification(np.ones(3, np.float32), m.count_scores(np.empty(0, np.float32)), FARS)


def searched(rank, score):
    """A search's result of which only ranks [N] and scores [N, 1] matter."""
    return m.Found(rank, np.zeros(score.shape, np.int32), score)


def test_where_everybody_is_an_alarm_tpir_is_rank_1():
    rank, score = np.array([1, 1, 2, 3, 1, 2]), np.linspace(0.2, 0.7, 6, dtype=np.float32)[:, None]
    unknown = searched(np.zeros(40, int), np.linspace(0, 1, 40, dtype=np.float32)[:, None])
    columns, _ = m.open_set(searched(rank, score), unknown, [1.0])
    assert columns["tpir@1"].mean() == pytest.approx(0.5)


def test_unknown_probes_do_not_narrow_the_interval_of_a_tpir_of_one():
    score = np.full((200, 1), 0.9, np.float32)
    known = searched(np.ones(200, int), score)  # 5 people, all found
    unknown = searched(np.zeros(200, int), np.linspace(-0.5, 0.5, 200, dtype=np.float32)[:, None])
    columns, _ = m.open_set(known, unknown, [0.1])
    people = np.concatenate([np.repeat(np.arange(5), 40), np.repeat(np.arange(5, 45), 5)])
    found = m.rates(columns, people, 0, trials=200)["tpir@0.1"]
    alone = m.rates({"hit": np.ones(200)}, people[:200], 0)["hit"]
    assert found == alone
    assert found.low < 0.6


def open_set_case(generator, known=400, unknown=200):
    """Search results of drawn scores: a third of the known probes finds somebody else."""
    rank = np.where(generator.random(known) < 1 / 3, 2, 1)
    known_score, unknown_score = generator.normal(0.5, 0.1, (known, 1)), generator.normal(0.3, 0.1, (unknown, 1))
    return searched(rank, known_score.astype(np.float32)), searched(np.zeros(unknown, int), unknown_score.astype(np.float32))


def test_tpir_agrees_with_plain_numpy_and_refuses_too_few_unknown_probes():
    known, unknown = open_set_case(np.random.default_rng(0))
    columns, at = m.open_set(known, unknown, [0.1, 0.01, 0.001])
    assert at[0.01] is None
    assert at[0.001] is None
    assert list(columns) == ["tpir@0.1"]
    alarms = np.sort(unknown.score[:, 0])[::-1]
    plain = ((known.rank == 1) & (known.score[:, 0] > alarms[20])).mean()  # 20 of 200 may find someone
    assert columns["tpir@0.1"].mean() == pytest.approx(plain)
    assert (unknown.score[:, 0] >= np.float32(at[0.1])).sum() <= 20


def test_the_interval_of_tpir_counts_the_unknown_probes_too(monkeypatch):
    monkeypatch.setattr(m, "GRID", 2**12)  # 300 small tables instead of large ones
    generator = np.random.default_rng(0)
    truth = np.array([m.open_set(*open_set_case(generator), [0.1])[0]["tpir@0.1"].mean() for _ in range(150)])
    hits, wide = 0, []
    for seed in range(150):
        column = m.open_set(*open_set_case(generator), [0.1])[0]
        found = m.rates(column, np.arange(600), seed, draws=100)["tpir@0.1"]
        hits += found.low <= truth.mean() <= found.high
        wide.append(found.high - found.low)
    assert 0.90 <= hits / 150 <= 0.99
    assert np.mean(wide) == pytest.approx(2 * 1.96 * truth.std(), rel=0.2)


def test_pair_accuracy_takes_each_threshold_from_the_other_folds():
    generator = np.random.default_rng(0)
    same, fold = np.tile([True, False], 300), np.repeat(np.arange(10), 60)
    score = generator.normal(np.where(same, 0.5, 0.2), 0.2)
    found = m.pair_accuracy(score, same, fold)
    for one in range(10):
        rest, here = fold != one, fold == one
        right = [((score[rest] >= t) == same[rest]).mean() for t in np.append(score[rest], 2)]
        assert ((score[rest] >= found.threshold[one]) == same[rest]).mean() == max(right)
        assert found.accuracy[one] == ((score[here] >= found.threshold[one]) == same[here]).mean()
    assert found.mean == pytest.approx(found.accuracy.mean())
    assert found.standard_error == pytest.approx(found.accuracy.std(ddof=1) / np.sqrt(10))
    order = generator.permutation(600)
    assert m.pair_accuracy(score[order], same[order], fold[order]).mean == found.mean


def test_the_fold_that_is_judged_does_not_move_its_threshold():
    same, fold = np.tile([True, False], 20), np.repeat([0, 1], 20)
    score = np.where(same, 0.8, 0.2)
    upside_down = np.where(fold == 1, 1 - score, score)
    assert m.pair_accuracy(score, same, fold).accuracy.tolist() == [1, 1]
    assert m.pair_accuracy(upside_down, same, fold).threshold[1] == m.pair_accuracy(score, same, fold).threshold[1]
    assert m.pair_accuracy(upside_down, same, fold).accuracy[1] == 0


def test_pairs_without_folds_or_of_one_kind_are_refused():
    score, same = np.linspace(0, 1, 8), np.tile([True, False], 4)
    with pytest.raises(ValueError, match="give at least 2"):
        m.pair_accuracy(score, same, np.zeros(8, int))
    with pytest.raises(ValueError, match="only one kind"):
        m.pair_accuracy(score, np.ones(8, bool), np.arange(8) % 2)


def trials(generator, rate, identities, icc):
    """Hits and persons of a drawn set: 1 to 67 probes a person, whose own rate is beta-distributed around `rate`."""
    size = generator.integers(1, 68, identities)
    own = generator.beta(rate * (1 / icc - 1), (1 - rate) * (1 / icc - 1), identities)
    person = np.repeat(np.arange(identities), size)
    return generator.random(len(person)) < own[person], person


@pytest.mark.parametrize(("identities", "icc"), [(100, 0.05), (300, 0.15)])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9, 0.98, 0.995])
def test_the_interval_covers_the_truth_in_90_to_98_percent(identities, icc, rate):
    generator, sets, inside = np.random.default_rng(7), 300, 0
    for seed in range(sets):
        hits, person = trials(generator, rate, identities, icc)
        found = m.rates({"hit": hits}, person, seed, draws=80)["hit"]
        inside += found.low <= rate <= found.high
    noise = 2 * np.sqrt(0.95 * 0.05 / sets)  # of this simulation
    assert 0.90 - noise <= inside / sets <= 0.98 + noise / 2


def test_intervals_over_pairs_instead_of_persons_would_be_too_narrow():
    hits, person = trials(np.random.default_rng(1), 0.7, 200, 0.2)
    by_person = m.rates({"hit": hits}, person, seed=0)["hit"]
    by_image = m.rates({"hit": hits}, np.arange(len(hits)), seed=0)["hit"]
    assert by_person.high - by_person.low > 2 * (by_image.high - by_image.low)


def test_independent_images_have_the_plain_wilson_interval():
    hits = np.arange(2000) < 1900
    found = m.rates({"hit": hits}, np.arange(2000), seed=0, draws=4000)["hit"]
    z, n, p = 1.959964, 2000, 0.95
    centre, half = (p + z**2 / 2 / n), z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert (found.low, found.high) == pytest.approx(((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)), abs=1e-3)


def test_no_interval_ends_at_a_negative_zero():
    counts = np.linspace(1, 50, 500)
    assert not any(np.signbit(end).any() for rate in (0.0, 1.0) for end in m.wilson(np.full(500, rate), counts))


def test_a_figure_without_a_miss_counts_each_identity_once():
    found = m.rates({"hit": np.ones(500, bool)}, np.repeat(np.arange(50), 10), seed=0)["hit"]
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(50 / (50 + 1.959964**2))


def test_intervals_are_a_pure_function_of_the_seed_and_the_set_of_rows():
    hits, person = trials(np.random.default_rng(2), 0.7, 60, 0.2)
    order = np.random.default_rng(3).permutation(len(hits))
    first = m.rates({"hit": hits}, person, seed=1)
    assert first == m.rates({"hit": hits}, person, seed=1)
    assert first["hit"] == pytest.approx(m.rates({"hit": hits[order]}, person[order], seed=1)["hit"], abs=1e-12)
    assert first != m.rates({"hit": hits}, person, seed=2)


def test_a_part_of_the_probes_is_measured_by_a_mask_and_an_empty_one_is_refused():
    hits, person = trials(np.random.default_rng(2), 0.7, 60, 0.2)
    part = person < 30
    found = m.rates({"hit": hits[part]}, person[part], seed=1)["hit"]
    assert found.value == pytest.approx(hits[: part.sum()].mean())
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="no probes in this part"):
        m.rates({"hit": hits[:0]}, person[:0], seed=1)


def test_a_paired_difference_is_sharper_than_two_intervals_and_covers_the_truth():
    generator, inside, sets = np.random.default_rng(0), 0, 200
    for seed in range(sets):
        hits, person = trials(generator, 0.8, 100, 0.2)
        better = hits | (generator.random(len(hits)) < 0.1)  # 0.02 more on average
        change = m.paired_difference(better, hits, person, seed, draws=80)
        inside += change.low <= 0.02 <= change.high
    assert 0.90 <= inside / sets <= 0.99
    alone = m.rates({"hit": hits}, person, seed=0)["hit"]
    assert change.high - change.low < 0.3 * (alone.high - alone.low)
    assert m.paired_difference(hits, hits, person, 0) == (0, 0, 0)


def test_geometry_agrees_with_plain_numpy():
    vectors, _, _ = faces(identities=12)
    identity = np.random.default_rng(0).integers(0, 12, len(vectors))
    x = vectors.astype(np.float64)
    squared = ((x[:, None] - x) ** 2).sum(axis=2)
    pair = (identity[:, None] == identity) & ~np.eye(len(x), dtype=bool)
    sigma = np.linalg.svd(x, compute_uv=False)
    share = sigma / sigma.sum()
    found = m.geometry_of_space(vectors, identity, np.arange(len(identity)), seed=0)
    assert found["alignment"] == pytest.approx(squared[pair].mean(), abs=1e-6)
    assert found["uniformity"] == pytest.approx(np.log(np.exp(-2 * squared)[~np.eye(len(x), dtype=bool)].mean()), abs=1e-5)
    assert found["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_geometry_knows_its_extremes():
    whole = m.geometry_of_space(np.eye(16, dtype=np.float32), np.arange(16), np.arange(16), seed=0)
    assert whole["effective_rank"] == pytest.approx(16)
    assert np.isnan(whole["alignment"])
    assert whole["uniformity"] == pytest.approx(-4)
    line = m.geometry_of_space(np.tile(np.eye(16, dtype=np.float32)[:1], (9, 1)), np.zeros(9, int), np.arange(9), seed=0)
    assert line == pytest.approx({"alignment": 0, "uniformity": 0, "effective_rank": 1}, abs=1e-6)
