"""Intervals against simulated truths, p-values against tables, distances against closed forms."""

import math

import numpy as np
import pytest

from cosmos_cli.evaluate import statistics

RUNS = 2000


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (7, 2.36462), (23, 2.06866), (95, 1.98525)]
)
def test_t_quantiles_agree_with_the_tables(freedom, t):
    assert statistics._t_quantile(0.95, freedom) == pytest.approx(t, rel=1e-5)
    assert statistics._t_within(t, freedom) == pytest.approx(0.95, abs=1e-6)


def numbers(generator, count):
    """A score of videos that differ by their prompts, with noise of each video."""
    prompts = generator.normal(0, 3, count)
    return prompts + generator.normal(0, 1, count), prompts + generator.normal(0.4, 1, count)


def skewed(generator, count):
    """A positive score of videos that differ by their prompts, as sharpness and flicker do."""
    prompts = generator.lognormal(0, 0.3, count)
    noise = generator.exponential(1, count), generator.exponential(1, count)
    return prompts + noise[0], prompts + 0.3 + noise[1]


def shares(generator, count):
    """Half of the videos show what the prompt asks for, then four in five."""
    ranks = generator.random(count)
    again = np.where(generator.random(count) < 0.5, ranks, generator.random(count))
    return (ranks < 0.5).astype(float), (again < 0.8).astype(float)


@pytest.mark.parametrize("count", [8, 24, 96])
@pytest.mark.parametrize(("simulate", "truth"), [(numbers, 0.4), (skewed, 0.3), (shares, 0.3)])
def test_intervals_cover_the_truth_in_92_to_98_percent(simulate, truth, count):
    generator = np.random.default_rng(count)
    found = [statistics.paired(*map(list, simulate(generator, count))) for _ in range(RUNS)]
    assert 0.92 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.98


def page(generator, scores=10, count=12):
    """The p-values of a page without any difference. Its scores are of the same videos."""
    videos = generator.normal(0, 1, (2, count))
    p_values = []
    for score in range(scores):
        models = 0.5 * videos + generator.normal(0, 1, (2, count))
        models = models > 0 if score % 2 else models
        p_values.append(statistics.paired(*models.astype(float).tolist()).p)
    return statistics.holm(p_values)


def test_at_most_5_percent_of_pages_without_a_difference_show_one():
    generator = np.random.default_rng(0)
    assert np.mean([min(page(generator)) < 0.05 for _ in range(500)]) <= 0.05


def test_pairs_remove_what_the_prompts_differ_by():
    before = [1.0, 20.0, 300.0, 4000.0, 50000.0]
    after = [a + b for a, b in zip(before, [1.0, 1.1, 0.9, 1.05, 0.95], strict=True)]
    found = statistics.paired(before, after)
    assert found.difference == pytest.approx(1)
    # t of 4 degrees of freedom is 2.7764; the standard error is 0.0790569 / sqrt(5).
    assert found.low == pytest.approx(1 - 2.7764 * 0.0790569 / math.sqrt(5), abs=1e-4)
    assert found.p < 1e-4


def test_changed_shares_have_the_p_value_of_mcnemars_exact_test():
    found = statistics.paired([0.0] * 6 + [1.0] * 6, [1.0] * 6 + [1.0] * 5 + [0.0])
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)
    same = statistics.paired([1.0] * 24, [1.0] * 24)
    assert (same.p, same.difference) == (1, 0)
    assert same.high == -same.low == pytest.approx(1.96 / 26, rel=1e-4)


def test_no_certainty_comes_from_a_difference_without_spread():
    assert statistics.paired([0.5, 0.25], [1.0, 0.75]).p == 0.5
    assert statistics.paired([0.5, 0.25], [0.5, 0.25]).p == 1
    one = statistics.paired([0.5], [0.7])
    assert (one.p, one.low, one.high) == (1, -math.inf, math.inf)


@pytest.mark.parametrize("after", [[1.0], [], [1.0, math.nan]])
def test_scores_that_are_no_pairs_are_refused(after):
    with pytest.raises(ValueError, match=r"not pairs|not finite"):
        statistics.paired([1.0, 2.0], after)


def test_holm_multiplies_the_smallest_p_value_by_the_number_of_tests():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1, 1]
    assert statistics.holm([]) == []


# --- kernel distance ------------------------------------------------------------------------------


def gaussians(generator, runs, mean, deviation, features):
    sets = (generator.normal(0, 1, (60, features)) for _ in range(runs))
    others = (generator.normal(mean, deviation, (60, features)) for _ in range(runs))
    found = [statistics._mmd(*gram(*pair)) for pair in zip(sets, others, strict=True)]
    return np.mean(found), np.std(found) / math.sqrt(runs)


def gram(x, y):
    both = np.concatenate([x, y])
    return (both @ both.T / both.shape[1] + 1) ** 3, np.arange(len(both)) < len(x)


def expected_kernel(mean, variance, other_mean, other_variance):
    """The mean of (x y + 1)^3 over two Gaussians of one feature, from their moments."""

    def moments(m, v):
        return m, m**2 + v, m**3 + 3 * m * v

    pairs = zip(moments(mean, variance), moments(other_mean, other_variance), strict=True)
    first, second, third = (a * b for a, b in pairs)
    return 1 + 3 * first + 3 * second + third


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.0)])
def test_the_distance_of_two_gaussians_equals_the_formula(mean, variance):
    formula = (
        expected_kernel(0, 1, 0, 1)
        + expected_kernel(mean, variance, mean, variance)
        - 2 * expected_kernel(0, 1, mean, variance)
    )
    generator = np.random.default_rng(0)
    found, error = gaussians(generator, 400, mean, math.sqrt(variance), features=1)
    assert abs(found - formula) < 3 * error


def test_the_distance_of_wide_gaussians_is_that_of_their_variances():
    # With D features of variances a and b, the mean of (x.y / D + 1)^3 is 1 + 3 a b / D.
    found, error = gaussians(np.random.default_rng(0), 200, 0.0, 2.0, features=16)
    assert abs(found - 3 / 16 * (1 - 4) ** 2) < 3 * error


def test_equal_sets_have_no_distance_and_unequal_ones_a_small_p_value():
    generator = np.random.default_rng(0)
    x, y = generator.normal(0, 1, (2, 30, 8))
    distance, p = statistics.kernel_distance(x, y)
    assert abs(distance) < 0.5
    assert p > 0.05
    assert statistics.kernel_distance(x, y) == (distance, p)
    assert statistics.kernel_distance(x, x)[1] > 0.9
    distance, p = statistics.kernel_distance(x, y + 1)
    assert distance > 1
    assert p == 1 / (1 + statistics.PERMUTATIONS)
    with pytest.raises(ValueError, match="too small"):
        statistics.kernel_distance(x[:1], y)


def test_the_permutation_test_is_wrong_in_about_5_percent(monkeypatch):
    monkeypatch.setattr(statistics, "PERMUTATIONS", 99)
    sets = np.random.default_rng(1).lognormal(0, 0.5, (600, 2, 10, 4))
    wrong = np.mean([statistics.kernel_distance(*each)[1] <= 0.05 for each in sets])
    assert abs(wrong - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 600)


def test_paired_distances_compare_two_models_with_the_same_clips():
    generator = np.random.default_rng(0)
    clips, before, noise = generator.normal(0, 1, (3, 20, 8))
    near = 0.5 * before + 0.5 * clips
    for after in (near, before + 1):
        found = statistics.paired_distances(before, after, clips)
        assert found.before == pytest.approx(statistics.kernel_distance(before, clips)[0])
        assert found.after == pytest.approx(statistics.kernel_distance(after, clips)[0])
        assert found.count == 20 and found.low == -math.inf
    assert found.p == 1 / (1 + statistics.EXCHANGES)
    same = statistics.paired_distances(before, before, clips)
    assert (same.difference, same.p) == (0, 1)
    assert statistics.paired_distances(before, before + 0.01 * noise, clips).p > 0.01


def test_exchanging_pairs_is_wrong_in_about_5_percent(monkeypatch):
    monkeypatch.setattr(statistics, "EXCHANGES", 199)
    # The videos of a pair are alike, as those of the same prompt are.
    prompts, *models = np.random.default_rng(2).lognormal(0, 0.5, (3, 600, 10, 4))
    clips = np.random.default_rng(3).lognormal(0, 0.5, (600, 6, 4))
    pairs = zip(*(prompts + model for model in models), clips, strict=True)
    wrong = np.mean([statistics.paired_distances(*each).p <= 0.05 for each in pairs])
    assert abs(wrong - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 600)
