"""The unit of tools/overlap_unit.py on one device, timed there: block pairs of the first of RANKS pretended ranks.

The other rank is imitated (tools/gpu_link.py): rows for its experts come back as if they were its own, to this rank's. So a one-process
model in which every rank has the same experts computes the same, and that is what errors are measured against.
"""

import torch
from torch import Tensor

from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Null
from moetrain.model.context import Timer, untimed
from moetrain.model.experts import Experts
from moetrain.parallel.timing import Recorder, stopwatch
from moetrain.telemetry.lanes import GRADIENT
from tools.bench_experts import now
from tools.overlap_cases import REST, Size
from tools.overlap_unit import AUXILIARY_WEIGHT, Lap, Unit, relative
from tools.overlap_window import window

RANKS = 2


# What is held against float64 in float32, which rounds in another order on every device.
REFERENCE = Size(hidden=128, ffn=352, sequences=2, seq_len=128)
ERROR = 1e-4


class DeviceUnit(Unit):
    """A Unit whose laps are timed by the device. `axis` None: all experts are here, and no exchange."""

    def __init__(self, model: str, size: Size, axis: Axis | None, device: torch.device, dtype: torch.dtype, evenly: bool) -> None:
        super().__init__(model, size, axis, dtype)
        self.device = device
        self.gpt.to(device)
        self.input_BSD, self.pull_BSD = super().inputs(0).to(device), super().pull(0).to(device)
        self.decide(evenly, 0)

    def inputs(self, rank: int) -> Tensor:
        return self.input_BSD

    def follow(self, decided: list[Tensor]) -> None:
        super().follow([select_NE.to(self.device) for select_NE in decided])

    def time(self, arm: str = "", timer: Timer = untimed) -> Lap:
        """Runs once; gradients are left in the parameters. Seconds are the device's; no processor time is counted."""
        self.gpt.zero_grad()
        h_BSD, forward = self.input_BSD.clone().requires_grad_(), self.rest if arm == REST else self.forward
        watch = stopwatch(self.device)
        now(self.device)
        watch.take()
        output_BSD, auxiliary = forward(h_BSD, timer)
        watch.take()
        ((output_BSD * self.pull_BSD).sum() + AUXILIARY_WEIGHT * auxiliary).backward()
        watch.take()
        self.output_BSD = output_BSD.detach()
        _, middle, end = watch.seconds()
        return Lap(middle, end - middle, 0.0, 0.0)

    def window(self, axis: Axis) -> dict[str, dict[str, float]]:
        """By pass: seconds of the computations that exchanges may hide under, and of the experts; no exchange beside them."""
        axis.link.transport = recorder = Recorder(Null(), self.device, serial=False)
        self.time(timer=recorder)
        passes: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for one in recorder.lanes().computations:
            its = passes["backward" if one.name.startswith(GRADIENT) else "forward"]
            name = one.name.removeprefix(GRADIENT)
            its[name] = its.get(name, 0.0) + one.end - one.start
        return {part: window(its, self.window_names()) for part, its in passes.items()}

    def error(self) -> float:
        """The largest relative error of the last lap's output and gradients, against float64 without any exchange."""
        exact = DeviceUnit(self.model, self.size, None, self.device, torch.float64, evenly=True)
        ranks = self.size.experts // self.layers[0].experts.gate_up_proj.shape[0]
        own = dict(self.gpt.named_parameters())
        with torch.no_grad():
            for name, parameter in exact.gpt.named_parameters():
                copies: list[Tensor] = [own[name]] * (ranks if is_of_experts(exact, name) else 1)
                parameter.copy_(torch.cat(copies))
        exact.input_BSD, exact.pull_BSD = self.input_BSD.double(), self.pull_BSD.double()
        exact.follow([select_NE.double() for select_NE in self.decided])
        exact.time()
        wanted, got = exact.gradients(), self.gradients()
        for name in wanted:
            if is_of_experts(exact, name):  # every rank's rows came to this one's experts
                wanted[name] = wanted[name].unflatten(0, (ranks, -1)).sum(0)
        update = relative(self.output_BSD - self.input_BSD, exact.output_BSD - exact.input_BSD)
        return max(update, *(relative(got[name], gradient) for name, gradient in wanted.items()))


def check_against_float64(unit: DeviceUnit) -> float:
    """Runs it. Raises RuntimeError when it computes something else than it should."""
    unit.time()
    error = unit.error()
    if not error < ERROR:
        raise RuntimeError(f"{unit.model} is off float64 by {error:.1e}, at most {ERROR:.0e} is rounding")
    return error


def is_of_experts(unit: Unit, name: str) -> bool:
    return isinstance(unit.gpt.get_submodule(name.rpartition(".")[0]), Experts)
