"""Held-out documents: a function of the path alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError
from moetrain.data.split import SPLITS, TEST, TRAIN, VALIDATION, check_fractions, split_of

FRACTION = st.floats(0, 0.49)


def test_known_paths_fall_where_they_always_fell() -> None:
    paths = [f"package/module_{number}.py" for number in range(60)]
    held_out = {path: split_of(path, 0.05, 0.05) for path in paths if split_of(path, 0.05, 0.05) != TRAIN}
    assert held_out == {
        **dict.fromkeys([f"package/module_{number}.py" for number in (2, 23, 43)], VALIDATION),
        **dict.fromkeys([f"package/module_{number}.py" for number in (9, 11, 32, 39, 58)], TEST),
    }


def test_fractions_are_met_over_many_documents() -> None:
    splits = [split_of(f"{number}.txt", 0.05, 0.1) for number in range(20000)]
    assert splits.count(VALIDATION) / 20000 == pytest.approx(0.05, abs=0.006)
    assert splits.count(TEST) / 20000 == pytest.approx(0.1, abs=0.008)


@given(path=st.text(max_size=30), validation=FRACTION, test=FRACTION, more=FRACTION)
def test_holding_out_more_only_takes_from_training(path: str, validation: float, test: float, more: float) -> None:
    before = split_of(path, validation, test)
    after = split_of(path, max(validation, more), test)
    assert before in SPLITS
    assert after == before or (before, after) == (TRAIN, VALIDATION)


@given(path=st.text(max_size=30))
def test_nothing_is_held_out_at_zero(path: str) -> None:
    assert split_of(path, 0.0, 0.0) == TRAIN


@pytest.mark.parametrize(("validation", "test", "key"), [(-0.1, 0.1, "validation"), (0.1, 1.0, "test"), (0.5, 0.5, "validation")])
def test_fractions_that_leave_nothing_are_refused(validation: float, test: float, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        check_fractions(validation, test)
