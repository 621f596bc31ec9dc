"""The console: words, time left, a panel that fits, plain lines, and log lines above the live panel."""

import io
import logging
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from rich.console import Console

from moetrain.base.log import logger
from moetrain.telemetry.console import LinesSink, LiveSink, open_console
from moetrain.telemetry.format import duration, quantity, share, size, sparkline
from moetrain.telemetry.panel import condense, panel
from moetrain.telemetry.record import Record
from moetrain.telemetry.status import RunStatus
from tests.clock import FakeClock

STEP: Record = {
    "train/step": 10,
    "train/tokens": 40960,
    "train/loss": 3.25,
    "train/lr": 0.0003,
    "train/grad_norm": 0.8,
    "perf/tokens_per_second": 12400.0,
    "perf/mfu": 0.312,
    "perf/peak_memory_bytes": 1_310_000_000,
    "perf/step_seconds": 0.33,
    "moe/auxiliary_loss": 1.0,
    "moe/z_loss": 0.1,
    "moe/load_max_over_mean": 1.42,
    "moe/load_entropy": 0.97,
    "moe/dead_experts": 2,
    "moe/dropped_fraction": 0.015,
}
COMMIT: Record = {
    "train/step": 11,
    "checkpoint/seq": 4,
    "checkpoint/step": 8,
    "checkpoint/bytes": 13_200_000,
    "checkpoint/seconds": 0.4,
    "checkpoint/oldest_expert_steps": 6,
    "checkpoint/pending": 0,
    "checkpoint/failures": 1,
}
EVALUATION: Record = {"train/step": 12, "evaluation/loss": 3.5, "evaluation/bits_per_byte": 2.01}
WORDS = ["3.250", "3.00e-04", "0.80", "12.4k tokens/s", "0.33s", "31.2 %", "1.31 GB", "1.42", "0.970", "dead 2", "1.5 %"]
LATER_WORDS = ["#4 at step 8", "13.2 MB", "oldest expert 6 steps", "1 failed", "3.500", "2.010 bits per byte"]


def status_of(*records: Record, total_steps: int = 40) -> RunStatus:
    status = RunStatus("gpt", total_steps, started=0.0)
    for number, record in enumerate(records):
        status.update(record, float(number))
    return status


def rendered(status: RunStatus, width: int, height: int, now: float = 0.0) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(panel(status, now, width, height, "touch STOP"))
    return capture.get().splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.96, "1.00k"), (12400, "12.4k"), (999_999, "1.00M"), (3.1e6, "3.10M"), (2e9, "2.00G"), (7.5e12, "7.50T")],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.341, "0.34s"), (9.7, "9.7s"), (9.96, "10s"), (59.6, "1m00s"), (161, "2m41s"), (11100, "3h05m"), (187200, "2d04h"), (np.nan, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_shares() -> None:
    assert [size(512), size(13_200_000), share(0.312), share(float("nan"))] == ["512 B", "13.2 MB", "31.2 %", "?"]


def test_sparkline_spans_its_own_range_and_leaves_gaps_for_nan() -> None:
    assert sparkline([9.0, 0.0, float("nan"), 7.0], 3) == "▁ █"
    assert sparkline([], 5) == ""
    assert sparkline([2.0, 2.0], 5) == "▅▅"


def test_time_left_follows_the_pace_and_runs_down_between_records() -> None:
    status = RunStatus("gpt", 100, started=0.0)
    assert np.isnan(status.seconds_left(0.0))
    for step in (10, 20, 30):
        status.update(STEP | {"train/step": step}, now=float(step) / 2)  # two steps a second
    assert status.seconds_left(15.0) == pytest.approx(35.0)
    assert status.seconds_left(20.0) == pytest.approx(30.0)
    assert status.seconds_left(1000.0) == 0.0


def test_a_resume_does_not_count_the_steps_before_it() -> None:
    status = RunStatus("gpt", 100, started=0.0)
    status.update({"train/step": 50, "event": "resume"}, now=5.0)
    status.update(STEP | {"train/step": 60}, now=15.0)
    assert status.seconds_left(15.0) == pytest.approx(40.0)


def test_live_and_lines_show_the_same_fields() -> None:
    records = (STEP, COMMIT, EVALUATION, STEP | {"train/step": 13})
    status = status_of(*records)
    line = status.line(records[-1], now=3.0)
    live = "\n".join(rendered(status, 120, 40, now=3.0))
    for word in [*WORDS, *LATER_WORDS, "13/40", duration(status.seconds_left(3.0)) + " left"]:
        assert word in line, word
        assert word in live, word


def test_the_last_step_has_no_time_left() -> None:
    first_line = rendered(status_of(STEP | {"train/step": 40}), 80, 24)[1]
    assert "done" in first_line and "left" not in first_line


def test_before_the_first_step_nothing_is_invented() -> None:
    live = "\n".join(rendered(status_of(), 80, 24))
    assert "0/40" in live
    assert "none yet" in live
    assert "experts" not in live


@given(
    arrays(np.int64, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=140), elements=st.integers(0, 9)),
    st.sampled_from([(80, 24), (200, 60), (60, 20)]),
)
def test_the_panel_fits_every_terminal(load_LE: np.ndarray, terminal: tuple[int, int]) -> None:
    width, height = terminal
    status = status_of(STEP, COMMIT, EVALUATION)
    status.load_LE = load_LE
    lines = rendered(status, width, height)
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width


@given(
    arrays(np.float64, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20), elements=st.floats(0, 9)),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_condensing_keeps_the_most_uneven_cell(relative_LE: np.ndarray, rows: int, columns: int) -> None:
    cells = condense(relative_LE, rows, columns)
    assert cells.shape == (min(rows, relative_LE.shape[0]), min(columns, relative_LE.shape[1]))
    assert np.abs(cells - 1).max() == np.abs(relative_LE - 1).max()


def test_busy_experts_stand_higher_than_idle_ones() -> None:
    status = status_of(STEP)
    status.load_LE = np.array([[10, 10, 40, 0]])
    row = next(line for line in rendered(status, 80, 24) if "layer 0" in line)
    assert row.replace("│", "").split()[2:] == ["▃▃▃", "▃▃▃", "███", "▁▁▁"]


def test_lines_are_one_per_record() -> None:
    stream = io.StringIO()
    sink = LinesSink(RunStatus("gpt", 40, 0.0), FakeClock(), stream)
    sample: Record = {"train/step": 13, "sample/prompt": "def ", "sample/text": "f():\n  pass"}
    for record in (STEP, COMMIT, EVALUATION, sample, {"train/step": 14, "event": "stop", "reason": "SIGTERM"}):
        sink.log(record)
        sink.show_load(1, np.ones((1, 2), dtype=np.int64))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" ")[1].split("/")[0] for line in lines] == ["10", "11", "12", "13", "14"]
    assert lines[3] == r"step 13 | sample: 'def ' -> 'f():\n  pass'"
    assert lines[4] == "step 14 | event stop, reason SIGTERM"


@pytest.fixture
def log_stream() -> Iterator[logging.StreamHandler]:
    handler = logging.StreamHandler(sys.stderr)
    root = logger()
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)


def test_log_lines_and_samples_scroll_above_the_live_panel(log_stream: logging.StreamHandler) -> None:
    screen, stderr = io.StringIO(), sys.stderr
    console = Console(file=screen, width=80, height=24, force_terminal=True, color_system=None)
    sink = LiveSink(RunStatus("gpt", 40, 0.0), FakeClock(), console)
    logger("train").warning("Rank 3 is slow.")
    sink.log(STEP)
    sink.show_load(10, np.ones((1, 2), dtype=np.int64))
    sink.log({"train/step": 10, "sample/prompt": "def ", "sample/text": "f():\n  pass"})
    sink.close()
    shown = screen.getvalue()
    assert "Rank 3 is slow." in shown
    assert "    def f():\n      pass\n" in shown
    assert "12.4k tokens/s" in shown[shown.index("pass") :]
    assert "layer 0" in shown[shown.index("pass") :]
    assert sys.stderr is stderr
    assert log_stream.stream is stderr


def test_auto_is_lines_without_a_terminal_and_off_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert [type(sink) for sink in open_console("auto", "gpt", 1, FakeClock())] == [LinesSink]
    assert open_console("off", "gpt", 1, FakeClock()) == []
    live = open_console("live", "gpt", 1, FakeClock())
    assert [type(sink) for sink in live] == [LiveSink]
    live[0].close()
