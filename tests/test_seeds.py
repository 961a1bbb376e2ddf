"""Seeds by purpose: the same everywhere and for ever, and never shared."""

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpo.seeds import derive
from hpo.stacks.padding import PaddingPlan
from hpo.stacks.pool import Pool
from hpo.training.loop import order
from hpo.training.stack import Member
from tests.searches import Opener, claims
from tests.stacking import CPU, INFO, Built, sines


def test_a_seed_is_the_same_on_every_machine_and_in_every_version():
    assert [derive(42, "init", 0), derive(42, "order", 0), derive(0, "init", 1)] == [1946109171, 1600145605, 1691539943]


def test_purposes_indices_and_studies_share_no_stream():
    purposes = ("init", "order", "sampler", "confirm", "confirm order", "confirm split", "refit")
    seen = [derive(seed, purpose, index) for seed in range(10) for purpose in purposes for index in range(100)]
    assert len(set(seen)) == len(seen)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**70), st.text(max_size=9), st.integers(0, 10**9))
def test_a_seed_is_one_that_torch_and_numpy_take(seed, purpose, index):
    assert 0 <= derive(seed, purpose, index) < 2**31


def test_no_two_trials_of_a_study_have_one_seed_and_it_depends_on_the_studys_alone(tmp_path):
    several = []
    for i, seed in enumerate((42, 42, 7)):
        opener = Opener(tmp_path / str(i))
        (tmp_path / str(i)).mkdir()
        several.append([claim.seed for claim in claims(opener(trials=30, seed=seed))])
        opener.close()
    first, same, other = several
    assert first == same
    assert len({*first, *other}) == 60


def test_a_stack_changes_no_members_initial_weights():
    from hpo.study.space import build
    from hpo.training.stack import Task

    task = Task(objective=Built(lambda params: nn.Linear(6, 1)), info=INFO, device=CPU, n_rows=40, epochs=2)
    params = {"batch_size": 8, "learning_rate": 0.1, "optimizer": "adam", "weight_decay": 0.0}
    members = [Member(number=i, seed=derive(42, "init", i), params=params) for i in range(4)]
    space, _ = build({}, ())
    pool = Pool(task, 4, sines(8), PaddingPlan(space, task.network, "fine"))
    pool.join(members)
    (stack,) = pool.active
    assert len(stack.members) == 4
    for member in members:
        alone = task.drawn(Member(number=9, seed=member.seed, params=params)).state_dict()
        for name, weight in stack.module(member).state_dict().items():
            assert weight.equal(alone[name]), name


def test_the_order_of_rows_is_the_studys_and_the_rounds_and_repeats():
    assert order(50, 42, 3).tolist() == order(50, 42, 3).tolist()
    assert len({tuple(order(50, seed, rounds).tolist()) for seed in (1, 2) for rounds in range(20)}) == 40
