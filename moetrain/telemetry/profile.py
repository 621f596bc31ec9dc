"""torch.profiler over a few steps of this rank, as a Chrome trace in `trace/` of the run folder, with the lanes of each step beside it."""

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moetrain.base.log import logger
from moetrain.telemetry.config import ProfileConfig
from moetrain.telemetry.lanes import GRADIENT, MICROSECONDS, Lanes, lanes_file, trace_events, write_lanes

_PID = 1 << 30  # of the lanes in a trace; no process has it


class Profiler:
    """Records steps start_step .. start_step + num_steps - 1 (the first step is 1). Each rank writes `trace/rank{r}.json`."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self.first, self.last = config.start_step, config.start_step + config.num_steps - 1
        self.memory = config.memory
        self.folder, self.rank = folder, rank
        self.file = folder / "trace" / f"rank{rank}.json"
        self._profile: profile | None = None
        self._lanes: list[Lanes] = []

    def asks(self, step: int) -> bool | None:
        """Whether to record the lanes of `step`: False is as it runs, None is not."""
        return False if 0 < self.first <= step <= self.last else None

    def after(self, step: int, seconds: float = 0.0, lanes: Lanes | None = None) -> None:
        """Call when `step` has ended (before the first: with the step resumed from). Starts or ends the recording."""
        if lanes is not None and self._profile is not None:
            self._lanes.append(lanes)
        if self._profile is not None and step >= self.last:
            self.stop()
        elif self._profile is None and self.first > 0 and step == self.first - 1:
            self._start()

    def stop(self) -> None:
        """Writes what was recorded, if anything is being recorded."""
        if self._profile is None:
            return
        recording, self._profile = self._profile, None
        recording.stop()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(self.file))
            if self._lanes:
                trace = json.loads(self.file.read_text())
                add_lanes(trace["traceEvents"], self._lanes)
                self.file.write_text(json.dumps(trace))
                last = self.first + len(self._lanes) - 1  # a run may end before self.last
                write_lanes(lanes_file(self.folder, self.rank, serial=False), self._lanes[-1], last)
        except (OSError, RuntimeError) as error:  # a full disk costs the profile, not the run
            logger("telemetry").warning("The profile %s cannot be written: %s", self.file, error)
            return
        logger("telemetry").info("Wrote the profile of steps %d to %d to %s; open it in ui.perfetto.dev.", self.first, self.last, self.file)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities, profile_memory=self.memory, record_shapes=True)
        self._profile.start()


def add_lanes(events: list[dict], steps: list[Lanes]) -> None:
    """Appends the lanes of consecutive steps to a trace's events, in its own time.

    The recorder names every forward computation in the trace too: where the first of a step stands is where its lanes begin. (On a GPU
    that is when the host launched it.)
    """
    forward = [[its for its in lanes.computations if not its.name.startswith(GRADIENT)] for lanes in steps]
    names = {its.name for computations in forward for its in computations}
    marks = sorted(event["ts"] for event in events if event.get("cat") == "user_annotation" and event["name"] in names)
    for lanes, computations in zip(steps, forward, strict=True):
        mine, marks = marks[: len(computations)], marks[len(computations) :]
        if mine:
            events += trace_events(lanes, _PID, mine[0] / MICROSECONDS - computations[0].start)
