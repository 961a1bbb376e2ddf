"""How sure a mean is, and which configuration is really the best: against hand-computed numbers, and simulated."""

import random

import numpy as np
import pytest

from hpo.search.certainty import chances_of_best, deviation_of, interval_of, mean_of

FIVE = [0.80, 0.82, 0.78, 0.81, 0.79]
"""Mean 0.80, sum of squares 0.001: the standard deviation is sqrt(0.001 / 4), the error of the mean sqrt(5e-5)."""


def test_mean_deviation_and_interval_are_those_of_a_book():
    assert mean_of(FIVE) == pytest.approx(0.80)
    assert deviation_of(FIVE) == pytest.approx(0.0158113883)
    interval = interval_of(FIVE, maximize=True)
    half = 2.7764451 * 0.0070710678  # Student's t of 4 degrees of freedom at 97.5%
    assert (interval.low, interval.high) == (pytest.approx(0.80 - half), pytest.approx(0.80 + half))


def test_an_interval_reaches_farther_to_the_worse_side_for_one_that_was_picked():
    lower, upper = 4.6040949 * 0.0070710678, 2.7764451 * 0.0070710678  # at 1 - 0.025 / 5, and at 97.5%
    up, down = (interval_of(FIVE, maximize=maximize, picked_of=5) for maximize in (True, False))
    assert (up.low, up.high) == (pytest.approx(0.80 - lower), pytest.approx(0.80 + upper))
    assert (down.low, down.high) == (pytest.approx(0.80 - upper), pytest.approx(0.80 + lower))


def test_splits_that_overlap_widen_it():
    """The error is sqrt(1/5 + 1/4) of the deviation, not sqrt(1/5): Nadeau and Bengio's correction."""
    plain, wide = (interval_of(FIVE, maximize=True, overlap=overlap) for overlap in (0.0, 0.25))
    assert (wide.high - 0.80) / (plain.high - 0.80) == pytest.approx((0.45 / 0.2) ** 0.5)


def test_of_one_result_nothing_is_known():
    assert deviation_of([0.8]) is None
    assert interval_of([0.8], maximize=True) is None
    assert chances_of_best([[0.8], [0.9]], maximize=True) == [0.5, 0.5]


@pytest.mark.parametrize("maximize", [True, False])
def test_chances_sum_to_one_and_go_the_right_way(maximize):
    better, worse = (FIVE, [x - 0.02 for x in reversed(FIVE)])[:: 1 if maximize else -1]
    chances = chances_of_best([better, worse], maximize=maximize)
    assert sum(chances) == pytest.approx(1)
    assert chances[0] > 0.9


def test_equal_results_share_the_chance():
    assert chances_of_best([FIVE, FIVE, [x - 1 for x in FIVE]], maximize=True) == [0.5, 0.5, 0.0]


def test_a_difference_that_each_seed_shows_is_sure_however_much_seeds_differ():
    """As of a split that is hard for all: seeds are resampled for all configurations together."""
    split = [0.1, 0.5, 0.9, 0.3, 0.7]
    assert chances_of_best([split, [x - 0.01 for x in split]], maximize=True) == [1.0, 0.0]


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_chance_of_the_winner_is_what_it_says(spread):
    """However much five configurations differ really, beside seeds that differ by 1: it wins as often as is said."""
    rng = np.random.default_rng(0)
    right, said = [], []
    for _ in range(400):
        truth = rng.normal(0, spread, 5) if spread else np.zeros(5)
        results = truth[:, None] + rng.normal(0, 1, (5, 5))
        winner = int(results.mean(1).argmax())
        said.append(chances_of_best(results.tolist(), maximize=True)[winner])
        right.append(truth[winner] == truth.max() if spread else 0.2)
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.1 if spread else 0.2)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_interval_of_the_best_of_five_holds_its_true_mean(spread):
    """Where all five are equally good, the plain interval of the best holds it in about 90%, this in 95% or more."""
    draw = random.Random(0)
    plain = picked = 0
    for _ in range(3000):
        truth = [draw.gauss(0, spread) for _ in range(5)]
        results = [[draw.gauss(mean, 1) for _ in range(5)] for mean in truth]
        best = max(range(5), key=lambda i: sum(results[i]))
        within = [interval_of(results[best], maximize=True, picked_of=n) for n in (1, 5)]
        plain += within[0].low <= truth[best] <= within[0].high
        picked += within[1].low <= truth[best] <= within[1].high
    assert picked / 3000 >= 0.95
    assert spread or plain / 3000 < 0.91
