"""What the code around exchanges costs when nothing is exchanged: a ScMoE pair with and without it, in turns. On a GPU and on a CPU.

The plain path has half of the experts, all here, runs them at once and knows no ranks. The others run the same matmuls on as many rows:
an axis of one rank, whose exchanges return the rows themselves, and a pretended axis of two with the null transport, which copies them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from unittest import mock

import torch

from moetrain.dist import comm
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.parallel.timing import Stopwatch, stopwatch
from tools.checkpoint_figures import with_interval
from tools.gpu_link import pretended_axis
from tools.gpu_overlap import WIDE, no_collection
from tools.gpu_unit import RANKS, REFERENCE, DeviceUnit, check_against_float64
from tools.overlap_cases import SCMOE, SMALL, Size
from tools.overlap_figures import interval
from tools.overlap_unit import Lap, relative

PLAIN, AGAIN, ALONE, NULL = "plain", "plain again", "axis of one rank", "null transport"
AT_ONCE, OVERLAPPED = (1,), (3,)
TARGET = 0.02  # of a lap
ROUNDING = 1e-2  # relative, bfloat16
MIN_ROUNDS, ROUNDS = 15, 60


class Calls:
    """Seconds in the calls that start and end exchanges, while `counting`: of the device and of the host."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._spans = list[tuple[int, int]]()
        self.host_seconds = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        start, land = self._timed(comm.launch), self._timed(comm.Flight.land)
        with mock.patch.object(comm, "launch", start), mock.patch.object(comm.Flight, "land", land):
            yield

    def device_seconds(self) -> float:
        """Call it when the lap is over."""
        seconds = self._watch.seconds()
        return sum(seconds[end] - seconds[begin] for begin, end in self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def _timed(self, work: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            begin, started = self._watch.take(), time.perf_counter()
            found = work(*given)
            self.host_seconds += time.perf_counter() - started
            self._spans.append((begin, self._watch.take()))
            return found

        return call


def units(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, DeviceUnit]:
    """The same pair by the way its rows take; forced balance, so that all compute as many rows."""
    fewer, alone = replace(size, experts=size.experts // RANKS), Mesh(World.single(device), 1).ep
    found = {
        PLAIN: DeviceUnit(SCMOE, fewer, None, device, dtype, evenly=True),
        ALONE: DeviceUnit(SCMOE, fewer, alone, device, dtype, evenly=True),
        NULL: DeviceUnit(SCMOE, size, pretended_axis(RANKS, device), device, dtype, evenly=True),
    }
    for name, unit in found.items():
        unit.schedule(AT_ONCE if name == PLAIN else OVERLAPPED)
    return found | {AGAIN: found[PLAIN]}


def overhead(device: torch.device, quick: bool, seconds: float) -> dict[str, object]:
    """Everything, printed and returned for JSON; rounds end after about `seconds`."""
    if quick:
        return compared(SMALL, SMALL, device, 3, 3, seconds)
    return compared(WIDE, REFERENCE, device, MIN_ROUNDS, ROUNDS, seconds)


def compared(size: Size, reference: Size, device: torch.device, least: int, most: int, seconds: float) -> dict[str, object]:
    """As `overhead`, of one size; errors are those of the `reference` size. `least` rounds, and `most` if the seconds are enough."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    small = units(reference, device, torch.float32)
    errors = {name: check_against_float64(unit) for name, unit in small.items()}
    pair = units(size, device, dtype)
    apart = same_results(pair)
    laps = rounds(pair, least, most, time.monotonic() + seconds)
    walls = {name: [lap.seconds for lap in its] for name, its in laps.items()}
    ratios = {name: with_interval([a / b for a, b in zip(walls[name], walls[PLAIN], strict=True)]) for name in (AGAIN, ALONE, NULL)}
    added = [added_code(pair[NULL]) for _ in range(5)]
    of_device = with_interval([one["device_seconds"] / one["seconds"] for one in added])
    for name, ratio in ratios.items():
        print(f"{name:18} {1e3 * median(walls[name]):8.3f} ms, over the plain path's: {interval(ratio)}")
    print(f"calls that start and end exchanges take {of_device['median']:.2%} of a lap with the null transport, its copies included")
    return {
        "size": asdict(size), "dtype": str(dtype), "errors": errors, "one rank against plain": apart, "target": TARGET,
        "wall_ratios": ratios, "added_share": of_device, "added_meets_target": of_device["high"] <= TARGET,
        "wall_meets_target": ratios[NULL]["high"] - 1 <= TARGET, "added": added,
        "laps": {name: [asdict(lap) for lap in its] for name, its in laps.items()},
    }  # fmt: skip


def same_results(pair: dict[str, DeviceUnit]) -> float:
    """The relative difference of the axis of one rank to the plain path. Raises RuntimeError when it is more than rounding."""
    for name in (PLAIN, ALONE):
        pair[name].time()
    apart = relative(pair[ALONE].output_BSD, pair[PLAIN].output_BSD.double())
    if not apart < ROUNDING:
        raise RuntimeError(f"the {ALONE} is off the {PLAIN} path by {apart:.1e}, at most {ROUNDING:.0e} is rounding")
    return apart


def rounds(pair: dict[str, DeviceUnit], least: int, most: int, deadline: float) -> dict[str, list[Lap]]:
    """Laps in turns, beginning with another one every round; the first round warms up."""
    laps: dict[str, list[Lap]] = {name: [] for name in pair}
    names = list(pair)
    for number in range(most + 1):
        if number > least and time.monotonic() > deadline:
            break
        start = number % len(names)
        with no_collection():
            for name in names[start:] + names[:start]:
                lap = pair[name].time()
                if number:
                    laps[name].append(lap)
    return laps


def added_code(unit: DeviceUnit) -> dict[str, float]:
    """One lap in which every call is timed: its own seconds and theirs."""
    calls = Calls(stopwatch(unit.device))
    with calls.counting(), no_collection():
        seconds = unit.time().seconds
    return {"seconds": seconds, "device_seconds": calls.device_seconds(), "host_seconds": calls.host_seconds, "calls": float(len(calls))}
