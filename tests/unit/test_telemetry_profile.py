"""The profiler wrapper: which steps, which file."""

import json
from pathlib import Path

import pytest
import torch

from moetrain.telemetry.config import ProfileConfig
from moetrain.telemetry.lanes import Computation, Lanes, load_lanes
from moetrain.telemetry.profile import Profiler


def steps_in(trace: Path) -> list[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name", "")).startswith("step ")})


def drive(profiler: Profiler, first: int, last: int) -> None:
    """Ends of steps as a run makes them; the work of each step carries its name."""
    profiler.after(first - 1)
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
        profiler.after(step)
    profiler.stop()


def test_exactly_the_configured_steps_are_recorded(tmp_path: Path) -> None:
    drive(Profiler(ProfileConfig(start_step=2, num_steps=2), tmp_path, rank=3), 1, 6)
    assert steps_in(tmp_path / "trace" / "rank3.json") == ["step 2", "step 3"]


def test_the_first_step_can_be_profiled_and_a_short_run_writes_what_it_has(tmp_path: Path) -> None:
    drive(Profiler(ProfileConfig(start_step=1, num_steps=100), tmp_path, rank=0), 1, 2)
    assert steps_in(tmp_path / "trace" / "rank0.json") == ["step 1", "step 2"]


@pytest.mark.parametrize("start", [0, 50])
def test_off_or_out_of_reach_writes_nothing(tmp_path: Path, start: int) -> None:
    drive(Profiler(ProfileConfig(start_step=start), tmp_path, rank=0), 1, 3)
    assert not list(tmp_path.iterdir())


def test_memory_adds_allocations_to_the_trace(tmp_path: Path) -> None:
    for memory in (False, True):
        drive(Profiler(ProfileConfig(start_step=1, num_steps=1, memory=memory), tmp_path / str(memory), rank=0), 1, 1)
    traces = [(tmp_path / str(memory) / "trace" / "rank0.json").read_text() for memory in (False, True)]
    assert ["[memory]" in trace for trace in traces] == [False, True]


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "trace").touch()  # a file where the folder should be fails like a full disk
    drive(Profiler(ProfileConfig(start_step=1, num_steps=1), tmp_path, rank=0), 1, 2)
    assert (tmp_path / "trace").is_file()


def test_lanes_of_a_run_that_ended_early_are_those_of_its_last_step(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(start_step=2, num_steps=5), tmp_path, rank=0)
    for step in range(1, 4):
        profiler.after(step, 1.0, Lanes(False, [Computation("a", 0.0, 1.0)], []) if step > 1 else None)
    profiler.stop()
    assert [step for step, _ in load_lanes(tmp_path)] == [3]
