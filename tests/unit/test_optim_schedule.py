"""The learning rate over a run, and the rules of its configuration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError
from moetrain.optim.config import SCHEDULES, OptimConfig
from moetrain.optim.schedule import lr_at


def curve(total_steps: int, config: OptimConfig) -> list[float]:
    return [lr_at(step, total_steps, config) for step in range(total_steps)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimConfig(lr=1.0, schedule="constant", warmup_fraction=0.4)
    assert curve(10, config) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_minimum() -> None:
    config = OptimConfig(lr=2.0, schedule="cosine", warmup_fraction=0.0, min_lr_ratio=0.1)
    lrs = curve(100, config)
    assert lrs[49] == pytest.approx(1.1)  # half of the way is done with update 50
    assert lrs[-1] == pytest.approx(0.2)
    assert lr_at(500, 100, config) == pytest.approx(0.2)


def test_wsd_is_constant_then_falls_linearly() -> None:
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2, min_lr_ratio=0.0)
    lrs = curve(20, config)
    assert lrs[1:16] == [1.0] * 15
    assert lrs[15:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


@given(
    total_steps=st.integers(1, 300),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    ratio=st.floats(0, 1),
)
def test_every_schedule_rises_once_then_never_and_stays_in_bounds(
    total_steps: int, schedule: str, warmup: float, decay: float, ratio: float
) -> None:
    config = OptimConfig(lr=3.0, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay, min_lr_ratio=ratio)
    config.check()
    lrs = curve(total_steps, config)
    peak = lrs.index(max(lrs))
    assert lrs[: peak + 1] == sorted(lrs[: peak + 1])
    assert all(a >= b - 1e-12 for a, b in zip(lrs[peak:], lrs[peak + 1 :], strict=False))
    assert all(0 <= lr <= 3.0 + 1e-12 for lr in lrs)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", 0.0, "must be positive"),
        ("lr", float("nan"), "must be positive"),
        ("eps", -1.0, "must be positive"),
        ("beta2", 1.0, "at least 0 and below 1"),
        ("weight_decay", -0.1, "must not be negative"),
        ("grad_clip", -1.0, "Use 0 for off"),
        ("warmup_fraction", 1.5, "between 0 and 1"),
        ("min_lr_ratio", -0.5, "between 0 and 1"),
        ("schedule", "cosin", "Did you mean cosine?"),
    ],
)
def test_a_wrong_value_names_key_value_and_rule(key: str, value: float | str, words: str) -> None:
    config = OptimConfig()
    setattr(config, key, value)
    with pytest.raises(ConfigError) as error:
        config.check()
    assert f"optim.{key}={value!r}" in str(error.value) and words in str(error.value)


def test_wsd_refuses_warm_up_and_decay_longer_than_the_run() -> None:
    with pytest.raises(ConfigError, match=r"optim\.decay_fraction=0\.7 .* longer than the whole run"):
        OptimConfig(schedule="wsd", warmup_fraction=0.4, decay_fraction=0.7).check()
