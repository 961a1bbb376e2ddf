"""The search space: conditions, branches, starts, sizes, and what holds for every space."""

import math
import time
from itertools import product

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.errors import InputError
from hpo.study.space import Dimension, build
from hpo.study.spec import parse_param


def parsed(params):
    return {name: parse_param(entry) for name, entry in params.items()}


def space_of(**params):
    space, faults = build(parsed(params), ())
    assert not faults
    return space


def messages(params, *start_with):
    return [(fault.path, fault.message) for fault in build(parsed(params), start_with)[1]]


def suggestions(space, n_trials, seed=0):
    """Return the params of some random trials, each with what Optuna's storage has of it."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [(space.suggest(study.ask()), study.trials[-1].params) for _ in range(n_trials)]


def floats(low, high, **more):
    return {"type": "float", "low": low, "high": high, **more}


def ints(low, high, **more):
    return {"type": "int", "low": low, "high": high, **more}


def choices(*values, **more):
    return {"type": "categorical", "choices": list(values), **more}


CONDITIONAL = {
    "momentum": floats(0.5, 0.9, step=0.1, when={"optimizer": "sgd", "plain": False}),
    "nesterov": choices(True, False, when={"momentum": [0.8, 0.9]}),
    "optimizer": choices("sgd", "adam"),
    "plain": False,
}


def test_a_parameter_is_asked_for_only_under_its_condition():
    seen = set()
    for params, _ in suggestions(space_of(**CONDITIONAL), 60):
        assert params["plain"] is False
        assert ("momentum" in params) == (params["optimizer"] == "sgd")
        assert ("nesterov" in params) == (params.get("momentum", 0) > 0.75)
        seen.add(frozenset(params))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("low", "high", "step", "value"),
    [
        (0, 0.5, 0.1, 0.3),
        (0, 22, 1.1, 13.2),
        (-0.3, 0.3, 0.1, 0),
    ],
)
def test_a_condition_on_a_step_holds_though_floats_are_rounded(low, high, step, value):
    space = space_of(a=floats(low, high, step=step), b=choices(1, 2, when={"a": value}))
    assert {round(params["a"], 6) for params, _ in suggestions(space, 99) if "b" in params} == {value}


def test_a_branch_is_exactly_its_value_or_one_from_the_range():
    space = space_of(decay=floats(1e-6, 1e-1, log=True, **{"or": 0}))
    drawn = [params["decay"] for params, _ in suggestions(space, 40)]
    assert 5 < drawn.count(0) < 35
    assert all(value == 0 or 1e-6 <= value <= 1e-1 for value in drawn)


@pytest.mark.parametrize(
    ("params", "faults"),
    [
        ({"a": ints(1, 3, when={"bb": 1}), "b": 1}, [("a", "bb", "there is no parameter 'bb'; did you mean \"b\"?")]),
        ({"a": ints(1, 3, when={"a": 1}), "b": 1}, [("a", "a", "there is no parameter 'a'; known: b")]),
        (
            {"a": ints(1, 3, when={"b": ["x", "z"]}), "b": choices("x", "y")},
            [("a", "b", "b cannot be 'z'; it is x | y")],
        ),
        ({"a": ints(1, 3, when={"b": 0.5}), "b": floats(1, 2)}, [("a", "b", "b cannot be 0.5; it is 1 .. 2")]),
        ({"a": ints(1, 3, when={"b": True}), "b": choices(1, 2)}, [("a", "b", "b cannot be True; it is 1 | 2")]),
        ({"a": ints(1, 3, when={"b": "x"}), "b": "y"}, [("a", "b", "b cannot be 'x'; it is fixed to 'y'")]),
        ({"a": ints(1, 3, when={"b": 1}), "b": True}, [("a", "b", "b cannot be 1; it is fixed to True")]),
    ],
)
def test_a_condition_that_cannot_be_met_is_a_fault(params, faults):
    found = [(*path[1:2], path[-1], message) for path, message in messages(params) if "circle" not in message]
    assert found == faults


def test_conditions_in_a_circle_are_a_fault():
    params = {"a": choices(1, 2, when={"b": 1}), "b": choices(1, 2, when={"c": 1}), "c": choices(1, 2, when={"a": 1})}
    assert messages({**params, "d": choices(1, 2)}) == [(("params", "a", "when"), "goes in a circle: a -> b -> c")]


START = {
    "lr": floats(1e-4, 1, log=True),
    "n": ints(1, 9, step=4),
    "decay": floats(1e-3, 1, **{"or": 0}),
    "act": choices("relu", None),
    "deep": ints(1, 2, when={"act": "relu"}),
    "fixed": 3,
}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"lr": 2}, "2 is outside of the space: 0.0001 .. 1, log"),
        ({"n": 6}, "6 is outside of the space: 1 .. 9, step 4"),
        ({"n": math.inf}, "inf is outside of the space: 1 .. 9, step 4"),
        ({"n": True}, "True is outside of the space: 1 .. 9, step 4"),
        ({"deep": 1.5}, "1.5 is outside of the space: 1 .. 2  when act is relu"),
        ({"decay": "0"}, "'0' is outside of the space: 0.001 .. 1, or 0"),
        ({"act": "tanh"}, "'tanh' is outside of the space: relu | None"),
        ({"fixed": 4}, "fixed is fixed to 3, so it cannot start with 4"),
        ({"lrr": 1}, "there is no parameter 'lrr'; did you mean \"lr\"?"),
    ],
)
def test_a_start_outside_of_the_space_is_a_fault(entry, message):
    [name] = entry
    assert messages(START, {}, entry) == [(("start_with", 1, name), message)]


@pytest.mark.parametrize(
    "entry",
    [
        {"lr": 0.5, "n": 5, "decay": 0, "act": None, "fixed": 3},
        {"lr": 1, "n": 9.0, "decay": 0.25, "act": "relu", "deep": 2},
        {"decay": 0.001},
        {},
    ],
)
def test_a_start_in_the_space_is_what_the_next_trial_has(entry):
    assert not messages(START, entry)
    space, study = space_of(**START), optuna.create_study()
    study.enqueue_trial(space.queued(entry))
    params = space.suggest(study.ask())
    assert {name: params[name] for name in entry} == entry
    assert space.resolve(study.trials[0].params) == params


def test_a_grid_has_every_value_of_every_parameter():
    space = space_of(a=floats(0.1, 0.3, step=0.1), b=ints(1, 8, step=3), c=choices("x", None), d=1)
    assert space.grid() == {"a": [0.1, 0.2, 0.3], "b": [1, 4, 7], "c": ["x", None]}
    assert space.size() == 18


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": floats(0, 1)}, "grid needs a step or choices, but a has neither"),
        ({"a": ints(1, 9, log=True)}, "grid needs a step or choices, but a has neither"),
        ({"a": ints(1, 9, **{"or": 0})}, "grid takes neither `when` nor `or`, but a has one; use brute_force"),
        (
            {"a": ints(1, 9, when={"b": 1}), "b": 1},
            "grid takes neither `when` nor `or`, but a has one; use brute_force",
        ),
    ],
)
def test_a_grid_needs_values_that_end_and_no_conditions(params, message):
    with pytest.raises(InputError) as caught:
        space_of(**params).grid()
    assert str(caught.value) == message


def test_a_size_is_counted_along_the_conditions():
    assert space_of(**CONDITIONAL).size() == 1 + (3 + 2 * 2)
    assert space_of(a=ints(1, 3, **{"or": 0}), b=choices(1, 2, when={"a": 0})).size() == 3 + 2
    assert space_of(a=floats(0, 1), b=choices(1, 2)).size() is None
    assert space_of(a=1).size() == 1


def test_a_large_space_is_counted_and_sampled_at_its_corners_at_once():
    gated = {f"x{i}": ints(0, 10**9 - 1, when={"kind": "b"}) for i in range(30)}
    space, start = space_of(kind=choices("a", "b"), **gated), time.perf_counter()
    assert space.size() == 1 + 10**270
    assert len(space.corners()) == 16
    assert time.perf_counter() - start < 0.5


def test_corners_are_the_ends_that_can_be_reached():
    space = space_of(a=ints(1, 8, step=3), b=choices("x", "y", "z"), c=floats(0, 1, when={"b": "y"}), d=5)
    corners = space.corners()
    found = [(p["a"], p["b"], p.get("c")) for p in corners]
    assert found[:2] == [(1, "x", None), (7, "z", None)]
    assert len(found) == 8
    assert set(found) == {(a, b, c) for a in (1, 7) for b, c in (("x", None), ("y", 0), ("y", 1), ("z", None))}
    assert all(p["d"] == 5 for p in corners)
    assert space.corners(most=3) == corners[:3]


def test_extremes_are_the_highest_and_the_lowest_and_each_parameter_alone_at_its_ends():
    space = space_of(a=ints(1, 8, step=3), b=choices("x", "y", "z"), c=floats(0, 1, when={"b": "y"}), d=5)
    assert space.extremes() == [
        {"a": 7, "b": "z", "d": 5},
        {"a": 1, "b": "x", "d": 5},
        {"a": 1, "b": "z", "d": 5},
        {"a": 7, "b": "x", "d": 5},
        {"a": 7, "b": "y", "c": 1.0, "d": 5},  # what now applies is at its highest
    ]
    assert space.extremes(most=2) == space.extremes()[:2]
    assert space_of(d=5).extremes() == [{"d": 5}]


def test_extremes_are_few_however_many_parameters_there_are():
    space = space_of(**{f"x{i}": ints(0, 9) for i in range(20)}, kind=choices(*"abcde"))
    assert len(space.extremes()) == 2 + 20 + 4
    assert len(space_of(**{f"x{i}": ints(0, 9) for i in range(100)}).extremes()) == 64


def test_completed_is_what_applies_and_the_highest_of_what_is_missing():
    space = space_of(**CONDITIONAL)
    assert space.completed({"optimizer": "adam", "momentum": 0.8, "more": 1}) == {"optimizer": "adam", "plain": False}
    assert space.completed({"optimizer": "sgd"}) == {
        "optimizer": "sgd",
        "plain": False,
        "momentum": 0.9,
        "nesterov": False,
    }


def test_searched_leaves_out_what_is_fixed_or_not_asked_for():
    space = space_of(**CONDITIONAL)
    params = {"optimizer": "adam", "momentum": 0.9, "plain": False}
    assert space.searched(params) == {"optimizer": "adam"}


def test_equal_spaces_have_equal_identities():
    one, other = space_of(a=floats(0, 1), b=choices(1, 2), c=3), space_of(b=choices(1, 2), c=3, a=floats(0, 1.0))
    assert one.identity() == other.identity()
    assert one.identity() != space_of(a=floats(0, 2), b=choices(1, 2), c=3).identity()


def entry_of(draw, discrete):
    """Draw one entry: a small range with or without steps and an `or`, choices, or a fixed value."""
    low, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    branch = draw(st.sampled_from([{}, {"or": 0}, {"or": -1}]))
    step = draw(st.sampled_from([0.1, 0.25, 0.3, 1]))
    endless = [
        floats(low, low + width, **branch),
        floats(low, low + width, log=True, **branch),
        ints(low, low + width, log=True, **branch),
    ]
    return draw(
        st.sampled_from(
            [
                floats(low / 10, round(low / 10 + width * step, 2), step=step, **branch),
                ints(low, low + width, **branch),
                ints(low, low + width, step=draw(st.integers(1, width)), **branch),
                choices(
                    *draw(
                        st.lists(st.sampled_from(["x", "y", None, True, 2, 0.5]), min_size=1, max_size=3, unique=True)
                    )
                ),
                draw(st.sampled_from(["x", 3, None])),
                *([] if discrete else endless),
            ]
        )
    )


def values_of(name, entry):
    """Return all values of one entry, or None where there is no end of them."""
    return Dimension(name=name, searched=parse_param(entry)).values() if isinstance(entry, dict) else [entry]


@st.composite
def spaces(draw, discrete=False):
    """Draw a space of up to four parameters, each of which may depend on earlier ones."""
    raw = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        entry = entry_of(draw, discrete)
        if isinstance(entry, dict) and raw and draw(st.booleans()):
            on = draw(st.sampled_from(list(raw)))
            held = values_of(on, raw[on])
            if held:
                entry = {**entry, "when": {on: draw(st.lists(st.sampled_from(held), min_size=1, max_size=2))}}
        raw[name] = entry
    return space_of(**dict(draw(st.permutations(list(raw.items())))))


@given(spaces(), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_what_optuna_stored_is_what_was_suggested(space, seed):
    for params, stored in suggestions(space, 4, seed):
        assert space.resolve(stored) == params
        assert all(d.takes(params[d.name]) for d in space.dimensions if d.name in params)
        assert set(params) == set(space.fixed) | {d.name for d in space.dimensions if d.applies(params)}


@given(spaces(discrete=True))
@settings(max_examples=50, deadline=None)
def test_the_size_is_the_number_of_distinct_configurations(space):
    """The slow way: every combination of all values, without those parameters that are not asked for."""
    configurations = set()
    for values in product(*(d.values() for d in space.dimensions)):
        params = dict(space.fixed)
        for dimension, value in zip(space.dimensions, values, strict=True):
            params |= {dimension.name: value} if dimension.applies(params) else {}
        configurations.add(frozenset((name, type(value), value) for name, value in params.items()))
    assert space.size() == len(configurations)


@given(spaces())
@settings(max_examples=50, deadline=None)
def test_every_value_and_every_corner_is_one_the_parameter_takes(space):
    for dimension in space.dimensions:
        values = dimension.values()
        assert dimension.n_values == (None if values is None else len(values))
        assert all(dimension.takes(value) for value in values or ())
    for corner in space.corners():
        assert all(d.takes(corner[d.name]) for d in space.dimensions if d.name in corner)


@given(spaces(), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_extremes_and_draws_are_configurations_of_the_space(space, seed):
    drawn = space.draw(5, seed)
    assert drawn == space.draw(5, seed) == [params for params, _ in suggestions(space, 5, seed)]
    for params in (*drawn, *space.extremes()):
        assert set(params) == set(space.fixed) | {d.name for d in space.dimensions if d.applies(params)}
        assert all(d.takes(params[d.name]) for d in space.dimensions if d.name in params)
        assert space.completed(params) == params
