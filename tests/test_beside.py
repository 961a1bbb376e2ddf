"""What is said of a result beside baselines and the default configuration: sentences, and what a storage holds."""

import copy
import math

import pytest

from hpo.search.beside import Baseline, Beside, Default, Difference, beside_in
from hpo.search.certainty import Interval, interval_of_difference

CLEAR = Interval(low=0.01, high=0.05)


def beside(by=0.03, interval=CLEAR, default=None, **keys):
    """Return a result of 0.95 beside a baseline that is worse by `by`."""
    known = {
        "metric": "accuracy",
        "maximize": True,
        "network": 0.95,
        "rows": 114,
        "of_rows": 114,
        "baselines": [
            Baseline(name="majority class", metrics={"accuracy": 0.6}, seconds=0.0),
            Baseline(name="logistic regression", metrics={"accuracy": 0.95 - by}, seconds=0.42),
        ],
        "difference": Difference(by=by, interval=interval),
        "default": default,
    }
    return Beside(**known | keys)


def test_a_network_that_is_better_says_by_how_much():
    assert beside().verdict == (
        "The network is better than the best baseline, logistic regression, by 0.03: accuracy 0.95 against 0.92 (95% "
        "interval of the difference 0.01 to 0.05, 114 test rows)."
    )


def test_a_network_that_loses_says_so_with_the_seconds():
    said = beside(-0.03, Interval(low=-0.05, high=-0.01)).verdict
    assert said == (
        "Logistic regression is better than the network, by 0.03: accuracy 0.98 against 0.95 (95% interval of the "
        "difference 0.01 to 0.05, 114 test rows); it took 0.42 s."
    )


@pytest.mark.parametrize("by", [0.03, -0.03])
def test_what_the_rows_could_show_by_chance_is_no_difference(by):
    said = beside(by, Interval(low=by - 0.04, high=by + 0.04)).verdict
    assert "no difference that 114 test rows could show" in said
    assert "better" not in said


def test_equal_is_equal_and_what_is_not_known_is_said():
    assert "as good as the network: accuracy 0.95 of both" in beside(0.0, Interval(low=0, high=0)).verdict
    assert "how much of it is chance is not known" in beside(0.03, None).verdict
    some = beside(0.0001, Interval(low=0.00005, high=0.0002), rows=50_000, of_rows=60_000).verdict
    assert "accuracy 0.95 against 0.9499" in some
    assert "50,000 of 60,000 test rows" in some


def test_less_is_better_where_the_metric_says_so():
    models = [
        Baseline(name="a", metrics={"loss": 0.3}, seconds=0.0),
        Baseline(name="b", metrics={"loss": 0.2}, seconds=0),
    ]
    found = beside(metric="loss", maximize=False, network=0.1, baselines=models)
    assert found.best_baseline.name == "b"
    assert "loss 0.1 against 0.2" in found.verdict


def test_without_a_baseline_that_has_the_metric_there_is_no_verdict():
    models = [Baseline(name="majority class", metrics={}, seconds=0.0)]
    found = beside(baselines=models, difference=None, absent=["no HistGradientBoosting: why"])
    assert found.verdict == ""
    assert found.sentences() == [
        "Baselines: accuracy on test: majority class not known (0.00 s); no HistGradientBoosting: why."
    ]


DEFAULTS = {
    "best": (Default(number=0, is_best=True), "that (trial 0) was itself the best."),
    "gained": (
        Default(metrics={"accuracy": 0.92}, network=0.95, difference=Difference(by=0.03, interval=CLEAR)),
        "The search gained 0.03 over the default configuration: test accuracy 0.95 against 0.92 (95% interval",
    ),
    "nothing": (
        Default(
            metrics={"accuracy": 0.952},
            network=0.95,
            gain_on_validation=0.02,
            difference=Difference(by=-0.002, interval=Interval(low=-0.03, high=0.02)),
        ),
        "The search gained nothing over the default configuration that 114 test rows could show: test accuracy 0.95 "
        "against 0.952. On validation it had gained 0.02.",
    ),
    "lost": (
        Default(
            metrics={"accuracy": 0.99},
            network=0.95,
            difference=Difference(by=-0.04, interval=Interval(low=-0.06, high=-0.02)),
        ),
        "The search lost 0.04 against the default configuration: test accuracy 0.95 against 0.99 (95% interval of the "
        "difference 0.02 to 0.06, 114 test rows).",
    ),
    "ensemble": (
        Default(metrics={"accuracy": 0.91}, network=0.94, difference=Difference(by=0.03, interval=CLEAR)),
        "test accuracy 0.94 of one network against 0.91",
    ),
    "validation": (
        Default(number=3, gain_on_validation=0.02, why="it takes an hour"),
        "the search gained 0.02 over the default configuration (trial 3); on test it was not compared: it takes an",
    ),
    "unknown": (Default(why="width has no default"), "It is not known what the search gained"),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_what_the_search_gained_over_the_default_configuration(case):
    default, said = DEFAULTS[case]
    assert said in beside(default=default).default_text


@pytest.mark.parametrize("case", DEFAULTS)
def test_what_is_stored_is_read_back(case):
    found = beside(default=DEFAULTS[case][0], absent=["no linear model: ValueError: x"])
    assert beside_in(found.as_dict()) == found


@pytest.mark.parametrize("key", [*beside(default=DEFAULTS["gained"][0]).as_dict()])
@pytest.mark.parametrize("value", [None, "x", [], {}, -1, math.nan, [[1]], {"by": "x"}, [{"name": 1}]])
def test_whatever_others_wrote_into_the_storage_breaks_nothing(key, value):
    stored = copy.deepcopy(beside(default=DEFAULTS["gained"][0]).as_dict())
    stored[key] = value
    found = beside_in(stored)
    if found is not None:
        assert found.sentences()
        assert beside_in(found.as_dict()) == found
    del stored[key]
    assert beside_in(stored) is None or key in ("best", "said", "maximize")


@pytest.mark.parametrize("stored", [None, [], 1, "x", {}])
def test_what_is_none_of_ours_is_nothing(stored):
    assert beside_in(stored) is None


def test_the_interval_of_a_mean_is_the_textbooks():
    """Of the mean of n numbers, left out one at a time, the jackknife is the standard error to the last digit."""
    from scipy import stats

    values = [0.3, 0.1, -0.2, 0.5, 0.4, 0.0]
    n, mean = len(values), sum(values) / len(values)
    without = [(sum(values) - x) / (n - 1) for x in values]
    found = interval_of_difference(mean, without)
    low, high = stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(values))
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert not found.is_clear


@pytest.mark.parametrize(("by", "without"), [(0.1, []), (0.1, [0.1]), (math.nan, [0.1, 0.2]), (0.1, [0.1, math.inf])])
def test_an_interval_that_cannot_be_said_is_none(by, without):
    assert interval_of_difference(by, without) is None
