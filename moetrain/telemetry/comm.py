"""What the exchanges of a step cost and how much of it was hidden, from steps that alternate: exchanges waited for at once, overlapped.

hidden = (serial step - overlapped step) / seconds of the exchanges alone. Of a serial step the seconds in which ranks came together before
its exchanges are left out: only the measurement asks for them. Computation that an exchange slowed down counts against it, which
`1 - waited / alone` would not see.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from moetrain.base.log import logger
from moetrain.telemetry.config import ProfileConfig
from moetrain.telemetry.format import share, size
from moetrain.telemetry.lanes import Journey, Lanes, lanes_file, write_lanes


@dataclass(frozen=True)
class ExchangeCost:
    """All exchanges of one name in one step."""

    name: str
    times: float
    num_bytes: float  # that left this rank
    alone_seconds: float  # in serial steps, all ranks starting together
    waited_seconds: float  # in overlapped steps

    @property
    def unwaited(self) -> float:
        """The share of it that nobody waited for: at least what was hidden."""
        return max(1 - self.waited_seconds / self.alone_seconds, 0.0) if self.alone_seconds else 0.0


@dataclass(frozen=True)
class CommProfile:
    """Of one rank; medians over the steps."""

    serial_seconds: float  # of a step, without the coming together of ranks before each exchange
    overlapped_seconds: float
    costs: list[ExchangeCost]

    @property
    def alone_seconds(self) -> float:
        return sum(cost.alone_seconds for cost in self.costs)

    @property
    def hidden(self) -> float:
        """Share of the exchanges' time that overlapped steps do not take; nan without exchanges."""
        alone = self.alone_seconds
        return (self.serial_seconds - self.overlapped_seconds) / alone if alone else float("nan")

    def lines(self) -> list[str]:
        """A table for people."""
        width = max([len(cost.name) for cost in self.costs], default=0)
        found = [f"{'exchange':{width}}  times      bytes   alone ms  waited ms  not waited for"]
        for cost in self.costs:
            numbers = f"{cost.times:5.0f} {size(cost.num_bytes):>10} {1e3 * cost.alone_seconds:10.2f} {1e3 * cost.waited_seconds:10.2f}"
            found.append(f"{cost.name:{width}}  {numbers}  {share(cost.unwaited):>14}")
        serial, overlapped = 1e3 * self.serial_seconds, 1e3 * self.overlapped_seconds
        found.append(
            f"A step takes {serial:.2f} ms with every exchange waited for at once and {overlapped:.2f} ms overlapped: "
            f"{share(self.hidden)} of {1e3 * self.alone_seconds:.2f} ms of exchanges are hidden."
        )
        return found

    def as_dict(self) -> dict[str, object]:
        """For a file."""
        costs = [
            {
                "name": cost.name, "times": cost.times, "bytes": cost.num_bytes, "alone_seconds": cost.alone_seconds,
                "waited_seconds": cost.waited_seconds,
            }
            for cost in self.costs
        ]  # fmt: skip
        steps: dict[str, object] = {"serial_step_seconds": self.serial_seconds, "overlapped_step_seconds": self.overlapped_seconds}
        return steps | {"hidden": self.hidden if self.costs else None, "exchanges": costs}


def comm_profile(steps: Sequence[tuple[float, Lanes]]) -> CommProfile:
    """From the seconds and the lanes of steps of both kinds, at least one of each."""
    serial = [(seconds, lanes) for seconds, lanes in steps if lanes.serial]
    overlapped = [(seconds, lanes) for seconds, lanes in steps if not lanes.serial]
    alone = [_by_name(lanes) for _, lanes in serial]
    together = [_by_name(lanes) for _, lanes in overlapped]
    names = list(dict.fromkeys(name for found in (*alone, *together) for name in found))
    costs = [
        ExchangeCost(
            name,
            median(len(found.get(name, [])) for found in alone),
            median(sum(journey.num_bytes for journey in found.get(name, [])) for found in alone),
            median(sum(journey.end - journey.start for journey in found.get(name, [])) for found in alone),
            median(sum(journey.waited for journey in found.get(name, [])) for found in together),
        )
        for name in names
    ]
    serial_seconds = [seconds - sum(journey.start - journey.ready for journey in lanes.journeys) for seconds, lanes in serial]
    return CommProfile(median(serial_seconds), median(seconds for seconds, _ in overlapped), costs)


def _by_name(lanes: Lanes) -> dict[str, list[Journey]]:
    found: dict[str, list[Journey]] = {}
    for journey in lanes.journeys:
        found.setdefault(journey.name, []).append(journey)
    return found


class CommProfiler:
    """Asks for num_steps pairs of steps from start_step on, serial and overlapped in turn. Each rank writes `trace/comm-rank{r}.json` and
    the lanes of its last pair; rank 0 also prints the table.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self.first, self.last = config.start_step, config.start_step + 2 * config.num_steps - 1
        self.folder, self.rank = folder, rank
        self._steps: list[tuple[float, Lanes]] = []

    def asks(self, step: int) -> bool | None:
        """Whether to record the lanes of `step`: True is with serial exchanges, False as it runs, None is not."""
        return (step - self.first) % 2 == 0 if 0 < self.first <= step <= self.last else None

    def after(self, step: int, seconds: float = 0.0, lanes: Lanes | None = None) -> None:
        """Call when `step` has ended."""
        if lanes is not None:
            self._steps.append((seconds, lanes))
        if step >= self.last:
            self.stop()

    def stop(self) -> None:
        """Writes what was recorded, if it is a pair at least."""
        steps, self._steps = self._steps, []
        if len({lanes.serial for _, lanes in steps}) < 2:
            if steps:
                logger("telemetry").warning("profile.what=comm has nothing to show: the run ended between a serial and an overlapped step.")
            return
        if not any(lanes.journeys for _, lanes in steps):
            logger("telemetry").warning("profile.what=comm has nothing to show: the experts of this run are all on this rank.")
            return
        found, file = comm_profile(steps), self.folder / "trace" / f"comm-rank{self.rank}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
            for serial in (True, False):
                at, lanes = [(at, lanes) for at, (_, lanes) in enumerate(steps, self.first) if lanes.serial is serial][-1]
                write_lanes(lanes_file(self.folder, self.rank, serial), lanes, at)
        except OSError as error:  # a full disk costs the profile, not the run
            logger("telemetry").warning("The profile %s cannot be written: %s", file, error)
        for line in found.lines():
            logger("telemetry").info("%s", line)
