"""Seeds by purpose: the same everywhere and for ever, and never shared."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.seeds import derive


def test_a_seed_is_the_same_on_every_machine_and_in_every_version():
    assert [derive(42, "init", 0), derive(42, "order", 0), derive(0, "init", 1)] == [1946109171, 1600145605, 1691539943]


def test_purposes_indices_and_studies_share_no_stream():
    purposes = ("init", "order", "sampler")
    seen = [derive(seed, purpose, index) for seed in range(10) for purpose in purposes for index in range(100)]
    assert len(set(seen)) == len(seen)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**70), st.text(max_size=9), st.integers(0, 10**9))
def test_a_seed_is_one_that_torch_and_numpy_take(seed, purpose, index):
    assert 0 <= derive(seed, purpose, index) < 2**31
