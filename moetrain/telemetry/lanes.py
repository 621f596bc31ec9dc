"""What one rank did in one step, on two lanes: computations, and the exchanges beside them with the time they were waited for.

Written as a small Chrome trace (ui.perfetto.dev opens it) that `moetrain plot` reads again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from moetrain.base.errors import MoetrainError

MICROSECONDS = 1e6
GRADIENT = "gradient of "  # how the name of everything in a backward pass begins
_COMPUTE, _EXCHANGE, _WAIT = 1, 2, 3  # threads of the Chrome trace


@dataclass(frozen=True)
class Computation:
    """One operator of a block. Seconds since the step's first event."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Journey:
    """One exchange of rows. Seconds since the step's first event; ready <= start <= end <= landed."""

    name: str
    num_bytes: int  # that left this rank for others
    ready: float  # this rank had its rows; in a serial step it waits here for the others
    start: float
    end: float  # seen to be complete, or waited for
    land: float  # the rows were needed: the wait begins
    landed: float  # the wait ends

    @property
    def waited(self) -> float:
        return self.landed - self.land


@dataclass(frozen=True)
class Lanes:
    """One step of one rank. `serial`: every exchange was waited for where it started, the others being there too."""

    serial: bool
    computations: list[Computation]
    journeys: list[Journey]


def trace_events(lanes: Lanes, pid: int, shift: float = 0.0) -> list[dict[str, object]]:
    """Chrome trace events in microseconds, `shift` seconds later, as process `pid`."""
    events: list[dict[str, object]] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": "moetrain lanes"}}]
    for tid, name in ((_COMPUTE, "computation"), (_EXCHANGE, "exchange"), (_WAIT, "waiting")):
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}})

    def add(tid: int, name: str, start: float, end: float, args: dict[str, object]) -> None:
        at, duration = (start + shift) * MICROSECONDS, (end - start) * MICROSECONDS
        events.append({"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": at, "dur": duration, "args": args})

    for computation in lanes.computations:
        add(_COMPUTE, computation.name, computation.start, computation.end, {})
    for journey in lanes.journeys:
        add(_EXCHANGE, journey.name, journey.start, journey.end, {"bytes": journey.num_bytes, "ready": journey.ready})
        add(_WAIT, journey.name, journey.land, journey.landed, {})
    return events


def write_lanes(file: Path, lanes: Lanes, step: int) -> None:
    """Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"traceEvents": trace_events(lanes, 0), "step": step, "serial": lanes.serial}
    file.write_text(json.dumps(content) + "\n")


def read_lanes(file: Path) -> tuple[int, Lanes]:
    """The step and its lanes. Raises MoetrainError when the file is not one of `write_lanes`."""
    try:
        content = json.loads(file.read_text())
        spans: dict[int, list[dict]] = {_COMPUTE: [], _EXCHANGE: [], _WAIT: []}
        for event in content["traceEvents"]:
            if event["ph"] == "X":
                spans[event["tid"]].append(event)
        computations = [Computation(event["name"], *_ends(event)) for event in spans[_COMPUTE]]
        journeys = [
            Journey(event["name"], event["args"]["bytes"], event["args"]["ready"], *_ends(event), *_ends(wait))
            for event, wait in zip(spans[_EXCHANGE], spans[_WAIT], strict=True)
        ]
        return content["step"], Lanes(content["serial"], computations, journeys)
    except (ValueError, KeyError, TypeError) as error:
        raise MoetrainError(f"{file} holds no lanes of a step: {error}.", "Remove it; profile=comm writes it anew.") from error


def _ends(event: dict) -> tuple[float, float]:
    start = event["ts"] / MICROSECONDS
    return start, start + event["dur"] / MICROSECONDS


def lanes_file(run: Path, rank: int, serial: bool) -> Path:
    """Where a run folder keeps the lanes of one step of a rank."""
    return run / "trace" / f"lanes-rank{rank}-{'serial' if serial else 'overlapped'}.json"


def load_lanes(run: Path) -> list[tuple[int, Lanes]]:
    """Steps and lanes of the lowest rank that a run folder has any of; the serial one first."""
    kept = sorted((run / "trace").glob("lanes-rank*.json"), key=lambda file: (int(file.stem.split("-")[1][4:]), file.stem))
    rank = kept[0].stem.split("-")[1] if kept else ""
    found = [read_lanes(file) for file in kept if file.stem.split("-")[1] == rank]
    return sorted(found, key=lambda its: not its[1].serial)
