"""ScMoE beside its opponents on one GPU, over an emulated link: the arms and figures of tools/bench_overlap.py, timed by the device.

A point says what share of top-2's MoE time its exchanges shall take; the link's filler is chosen for it from times measured first, on the
same device. Before anything is timed, every kind of pair is held against float64 in one process, and every run's output must be equal to
the bit to that of the same model without a link, in as many chunks.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from moetrain.dist.transport import Null, Transport
from moetrain.parallel.timing import stopwatch
from tools import overlap_figures
from tools.bench_experts import now
from tools.gpu_link import AtOnce, EmulatedLink, pretended_axis
from tools.gpu_unit import RANKS, REFERENCE, DeviceUnit, check_against_float64
from tools.overlap_arms import Noting, Shipment
from tools.overlap_cases import EXCHANGE, NULL, OVERLAPPED, REST, SERIAL, SMALL, TOP_2, Run, Size, num_operators, opponents
from tools.overlap_unit import Lap, relative

WIDE = Size(hidden=2048, ffn=5632, experts=8, sequences=8, seq_len=2048)  # bfloat16: tens of milliseconds a lap on an H100
GRADIENT_LIMIT = 1e-2  # relative, bfloat16: some kernels add in no fixed order even when asked to
MIN_ROUNDS, ROUNDS = 5, 15


@dataclass(frozen=True)
class Point:
    """`share`: of top-2's MoE time, for its exchanges; as near as the link can come, whose fastest is a plain round trip."""

    share: float
    size: Size = WIDE
    evenly: bool = True


POINTS = {
    "75": Point(0.75),
    "60": Point(0.6),
    "60_real": Point(0.6, evenly=False),
    "15": Point(0.15, replace(WIDE, ffn=14336)),
}


class Bench:
    """The units of one point on one device, and their pretended axis."""

    def __init__(self, point: Point, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.runs, self.axis, self.link = opponents(), pretended_axis(RANKS, device), EmulatedLink(device)
        names = list(dict.fromkeys(run.model for run in self.runs))
        self.units = {model: DeviceUnit(model, point.size, self.axis, device, dtype, point.evenly) for model in names}
        self._shipments = {model: self._note(model) for model in names}

    def _note(self, model: str) -> tuple[list[Shipment], list[Shipment]]:
        """All exchanges of one lap, those of the forward pass and those of the backward pass."""
        noting = Noting(Null())
        with self.carried_by(noting):
            self.units[model].time()
        half = next(number for number, one in enumerate(noting.shipments) if one.name.startswith("gradient of "))
        return noting.shipments[:half], noting.shipments[half:]

    @contextmanager
    def carried_by(self, transport: Transport) -> Iterator[None]:
        self.axis.link.transport = transport
        try:
            yield
        finally:
            self.axis.link.transport = Null()

    def lap(self, run: Run) -> Lap:
        if run.arm == EXCHANGE:
            return self.exchange_only(run.model)
        unit = self.units[run.model]
        unit.schedule(run.slots)
        transports: dict[str, Transport] = {SERIAL: AtOnce(self.link), OVERLAPPED: self.link, NULL: Null(), REST: Null()}
        with self.carried_by(transports[run.arm]):
            return unit.time(run.arm)

    def exchange_only(self, model: str) -> Lap:
        """The exchanges of one lap one after the other and nothing else. Payload is random."""
        seconds = []
        for shipments in self._shipments[model]:
            sent = [torch.randn(sum(one.send_sizes), one.width, device=self.device).to(one.dtype) for one in shipments]
            received = [torch.empty(sum(one.receive_sizes), one.width, device=self.device, dtype=one.dtype) for one in shipments]
            watch = stopwatch(self.device)
            now(self.device)
            watch.take()
            for one, rows, places in zip(shipments, sent, received, strict=True):
                self.link.launch(one.name, rows, places, one.send_sizes, one.receive_sizes, self.axis).wait()
            watch.take()
            seconds.append(watch.seconds()[-1])
        forward, backward = seconds
        return Lap(forward, backward, 0.0, 0.0)

    def settle_on(self, share: float) -> dict[str, float]:
        """Makes the link as slow as the share asks for. What it was found from, in seconds of a lap."""
        runs = {"exchange": Run(TOP_2, EXCHANGE), "null": Run(TOP_2, NULL), "rest": Run(TOP_2, REST)}
        seconds = {name: statistics.median([self.lap(run).seconds for _ in range(6)][1:]) for name, run in runs.items()}
        slower = share / (1 - share) * (seconds["null"] - seconds["rest"]) / seconds["exchange"]
        self.link.slower = max(1.0, slower)
        return seconds | {"slower": self.link.slower}

    def check(self) -> dict[str, dict[str, object]]:
        """How far every run is from the same without a link. Raises RuntimeError when it is farther than it may."""
        found = {}
        with deterministic():
            for run in (run for run in self.runs if run.arm in (SERIAL, OVERLAPPED)):
                unit = self.units[run.model]
                self.lap(Run(run.model, NULL, (num_operators(run.model) + 1,) * len(run.slots)))
                wanted, output = unit.gradients(), unit.output_BSD
                self.lap(run)
                gradients = unit.gradients()
                error = max(relative(gradients[name], gradient.double()) for name, gradient in wanted.items())
                same = all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())
                found[run.name] = {"gradients equal to the bit": same, "gradient error": error}
                if not torch.equal(unit.output_BSD, output) or not error <= GRADIENT_LIMIT:
                    raise RuntimeError(f"{run.name} computes something else over the link: gradients are off by {error:.1e}")
        return found

    def rounds(self, least: int, most: int, deadline: float) -> dict[str, dict[str, list[float]]]:
        """Seconds by run and part; runs take turns, and begin with another one every round. The first round warms up."""
        laps: dict[str, list[Lap]] = {run.name: [] for run in self.runs}
        for number in range(most + 1):
            if number > least and time.monotonic() > deadline:
                break
            start = number % len(self.runs)
            with no_collection():
                for run in self.runs[start:] + self.runs[:start]:
                    lap = self.lap(run)
                    if number:
                        laps[run.name].append(lap)
        return {name: {part: [asdict(lap)[part] for lap in its] for part in asdict(its[0])} for name, its in laps.items()}

    def windows(self) -> dict[str, dict[str, dict[str, float]]]:
        """By model: the median of five laps of the null arm."""
        found = {}
        for run in (run for run in self.runs if run.arm == NULL):
            unit = self.units[run.model]
            unit.schedule(run.slots)
            laps = [unit.window(self.axis) for _ in range(6)][1:]
            self.axis.link.transport = Null()
            found[run.model] = {
                part: {kind: statistics.median(lap[part][kind] for lap in laps) for kind in its} for part, its in laps[0].items()
            }
        return found

    def bytes_per_second(self, laps: dict[str, dict[str, list[float]]]) -> float:
        """Payload that leaves for the other rank, one way, while exchanges are all there is."""
        its = laps[Run(TOP_2, EXCHANGE).name]
        seconds = statistics.median(a + b for a, b in zip(its["forward"], its["backward"], strict=True))
        return sum(one.bytes_out(0) for part in self._shipments[TOP_2] for one in part) / seconds


def measure(point: Point, device: torch.device, quick: bool, seconds: float) -> dict[str, object]:
    """Everything about one point, printed and returned for JSON; rounds end after about `seconds`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if quick:
        point = replace(point, size=SMALL)
    errors = reference_errors(device, quick)
    bench = Bench(point, device, dtype)
    busiest = {model: unit.busiest() for model, unit in bench.units.items()}
    settled = bench.settle_on(point.share)
    checked = bench.check()
    windows = bench.windows()
    laps = bench.rounds(2 if quick else MIN_ROUNDS, 2 if quick else ROUNDS, time.monotonic() + seconds)
    found = [{"laps": laps, "window": windows}]
    figures = overlap_figures.opponents(found)
    rate = bench.bytes_per_second(laps)
    print(f"{bench.link}: {rate / 1e9:.2f} GB/s of payload one way")
    print("\n".join(overlap_figures.lines(found, figures)))
    return {
        "link": str(bench.link), "payload_bytes_per_second": rate, "tax": "none is subtracted: copy engines take no SM, nccl would",
        "ranks": f"{RANKS}, one of them pretended", "share_asked_for": point.share, "evenly": point.evenly, "busiest": busiest,
        "size": asdict(point.size), "dtype": str(dtype), "settled_on": settled, "errors": errors, "checked": checked,
        "figures": figures, "window": windows, "laps": laps,
    }  # fmt: skip


def reference_errors(device: torch.device, quick: bool) -> dict[str, float]:
    """Of every run over the link, in float32 at a small size, against float64. Raises RuntimeError when one is wrong."""
    size = SMALL if quick else REFERENCE
    errors, axis, units = dict[str, float](), pretended_axis(RANKS, device), dict[str, DeviceUnit]()
    for run in (run for run in opponents() if run.arm in (SERIAL, OVERLAPPED)):
        axis.link.transport = Null()
        if run.model not in units:
            units[run.model] = DeviceUnit(run.model, size, axis, device, torch.float32, evenly=False)
        unit, link = units[run.model], EmulatedLink(device, 2.0)
        unit.schedule(run.slots)
        axis.link.transport = AtOnce(link) if run.arm == SERIAL else link
        errors[run.name] = check_against_float64(unit)
    return errors


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that add in a fixed order, where there are such."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage is collected before and not inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
