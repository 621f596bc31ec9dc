"""Records on disk: strict JSON, survived kills, and the last record of a step."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.base.errors import MoetrainError
from moetrain.telemetry.record import METRICS_FILE, Record, decode, encode, read_records, series
from moetrain.telemetry.sinks import JsonlSink

values = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False), st.text())


@given(st.dictionaries(st.text(min_size=1), values))
def test_a_record_survives_its_line(record: Record) -> None:
    line = encode(record)
    assert "\n" not in line
    assert decode(line) == record


def test_values_that_are_not_finite_are_strict_json_and_come_back_as_nan() -> None:
    line = encode({"train/step": 3, "train/loss": math.inf, "perf/mfu": math.nan})
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "train/step": 3,
        "train/loss": None,
        "perf/mfu": None,
    }
    record = decode(line)
    assert record is not None
    assert math.isnan(float(record["train/loss"]))


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = JsonlSink(tmp_path)
        sink.log({"train/step": step})
        sink.close()
    assert read_records(tmp_path) == [{"train/step": 1}, {"train/step": 2}]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_torn_by_a_kill_is_repaired_on_opening(tmp_path: Path, cut: int) -> None:
    file = tmp_path / METRICS_FILE
    whole, last = '{"train/step": 1}\n', '{"train/step": 2}\n'
    file.write_text(whole + last[: min(cut, len(last))])
    sink = JsonlSink(tmp_path)
    sink.log({"train/step": 3})
    sink.close()
    complete = cut >= len(last) - 1  # only the line end may be missing
    expected = [1, 2, 3] if complete else [1, 3]
    assert [json.loads(line)["train/step"] for line in file.read_text().splitlines()] == expected


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log({"train/step": 1})
    assert read_records(tmp_path) == [{"train/step": 1}]
    sink.close()


def test_a_live_run_is_read_up_to_its_torn_line(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"train/step": 1}\n{"train/st')
    assert read_records(tmp_path) == [{"train/step": 1}]


def test_the_last_record_of_a_step_counts_and_steps_rise() -> None:
    records: list[Record] = [
        {"train/step": 1, "train/loss": 5.0},
        {"train/step": 2, "train/loss": 4.0},
        {"train/step": 2, "evaluation/loss": 4.5},
        {"train/step": 1, "event": "resume"},
        {"train/step": 2, "train/loss": 4.25},
        {"train/step": 3, "train/loss": 3.0},
    ]
    assert series(records, "train/loss") == ([1, 2, 3], [5.0, 4.25, 3.0])
    assert series(records, "evaluation/loss") == ([2], [4.5])
    assert series(records, "event") == ([], [])


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoetrainError, match=METRICS_FILE):
        read_records(tmp_path)
