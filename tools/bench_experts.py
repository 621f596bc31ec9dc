"""The grouped expert matmul: which method is right and fast where, beside what this device could do at most.

    python -m tools.bench_experts --device cpu --json benchmarks/experts_cpu.json

Every method is held against the loop in float64 before it is timed. Methods take turns; figures are medians over rounds, ratios are
medians of the rounds' own ratios to the loop. The roofline of a shape is the matrix peak, or the bandwidth times its operations per
unavoidable byte (weights, rows in and out, their gradients, once each), whichever is less; both are measured here on random data.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.model.experts import grouped_swiglu

METHODS = ("loop", "bmm", "grouped_mm", "loop again")  # the last one shows how far two runs of the same thing differ
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative norm of the difference to float64
SEED = 0


@dataclass(frozen=True)
class Shape:
    """rows R over E experts of width D -> F -> D."""

    rows: int
    experts: int
    hidden: int
    ffn: int

    def roofline(self, peak: float, bytes_per_second: float, item: int) -> float:
        """FLOP/s that nothing of this shape can exceed."""
        return min(peak, self.flops / self.bytes(item) * bytes_per_second)

    @property
    def flops(self) -> float:
        """Forward and backward: three matrices, three products each."""
        return 18.0 * self.rows * self.hidden * self.ffn

    def bytes(self, item: int) -> float:
        """Weights read twice and their gradients written, rows and outputs with their gradients once each."""
        return item * (3 * 3 * self.experts * self.hidden * self.ffn + 4 * self.rows * self.hidden)


SHAPES = {
    "gpt_moe_8e": Shape(2048, 8, 256, 704),
    "gpt_moe_8e_ep2": Shape(2048, 4, 256, 704),  # on each of two ranks
    "gpt_125m_8e": Shape(8192, 8, 768, 2048),
    "olmoe_1b_7b": Shape(32768, 64, 2048, 1024),
    "qwen3_30b_a3b": Shape(32768, 128, 2048, 768),
}
QUICK = {"quick": Shape(24, 4, 16, 8)}


@dataclass
class Timing:
    """One method at one shape and type; seconds of forward and backward together."""

    shape: str
    dtype: str
    method: str
    error: float  # relative to float64, the worst of output and gradients
    seconds: float = 0.0
    low: float = 0.0  # 10th percentile
    high: float = 0.0  # 90th
    over_loop: float = 0.0  # median of paired ratios; below 1 is faster than the loop
    flops_per_second: float = 0.0
    of_roofline: float = 0.0  # what part of the roofline's FLOP/s they are
    refused: str = ""  # why it was not timed


def now(device: torch.device) -> float:
    """Seconds, after all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The fastest of several calls, the first one not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return min(seconds)


def peak_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product of random matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: left @ right, device)


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device)


def uneven_counts(shape: Shape) -> Tensor:
    """int64 [E] that sum to the rows, as a gate in training leaves them: the busiest expert about twice the even share."""
    generator = torch.Generator().manual_seed(SEED)
    share = torch.softmax(0.4 * torch.randn(shape.experts, generator=generator), 0)
    return torch.bincount(torch.multinomial(share, shape.rows, replacement=True, generator=generator), minlength=shape.experts)


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Rows, gate_up and down with gradients, and the gradient of the output; random, the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = (
        (shape.rows, shape.hidden),
        (shape.experts, 2 * shape.ffn, shape.hidden),
        (shape.experts, shape.hidden, shape.ffn),
        (shape.rows, shape.hidden),
    )
    *inputs, pull = ((torch.randn(size, generator=generator) / size[-1] ** 0.5).to(device, dtype) for size in sizes)
    return [x.requires_grad_() for x in inputs], pull


def run(inputs: list[Tensor], counts: Tensor, pull: Tensor, method: str) -> list[Tensor]:
    """Output and all gradients."""
    out = grouped_swiglu(inputs[0], counts, inputs[1], inputs[2], method.removesuffix(" again"))
    return [out.detach(), *torch.autograd.grad(out, inputs, pull)]


def worst_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(got, wanted, strict=True))


def compare(name: str, shape: Shape, dtype_name: str, device: torch.device, rounds: int, roofline: float) -> list[Timing]:
    """All methods on one problem, the wrong and the impossible ones untimed."""
    counts = uneven_counts(shape)
    inputs, pull = problem(shape, DTYPES[dtype_name], device)
    exact = run([x.detach().double().requires_grad_() for x in inputs], counts, pull.double(), "loop")
    timings = []
    for method in METHODS:
        timing = Timing(name, dtype_name, method, float("nan"))
        try:
            timing.error = worst_error(run(inputs, counts, pull, method), exact)
        except RuntimeError as error:  # a type or shape that this build of torch has no kernel for
            timing.refused = str(error).splitlines()[0]
        if not timing.refused and not timing.error <= LIMITS[dtype_name]:
            timing.refused = f"wrong: off by {timing.error:.1e}, at most {LIMITS[dtype_name]:.0e} is rounding"
        timings.append(timing)
    del exact
    seconds: dict[str, list[float]] = {timing.method: [] for timing in timings if not timing.refused}
    for _ in range(rounds):
        for method, found in seconds.items():
            start = now(device)
            run(inputs, counts, pull, method)
            found.append(now(device) - start)
    for timing in timings:
        if found := seconds.get(timing.method):
            ordered = sorted(found)
            timing.seconds = statistics.median(found)
            timing.low, timing.high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
            timing.over_loop = statistics.median(a / b for a, b in zip(found, seconds["loop"], strict=True)) if "loop" in seconds else 0.0
            timing.flops_per_second = shape.flops / timing.seconds
            timing.of_roofline = timing.flops_per_second / roofline
    return timings


def benchmark(
    device: torch.device, shapes: dict[str, Shape], dtypes: list[str], rounds: int, size: int, copy_bytes: int
) -> dict[str, object]:
    """Everything, printed as it comes and returned for JSON. `size` and `copy_bytes`: of the products and copies that find the ceilings."""
    bytes_per_second = bandwidth(device, copy_bytes)
    peaks = {dtype: peak_flops(device, DTYPES[dtype], size) for dtype in dtypes}
    print(f"copy {bytes_per_second / 1e9:,.0f} GB/s; " + "; ".join(f"{dtype} {peak / 1e12:,.2f} TFLOP/s" for dtype, peak in peaks.items()))
    timings, rooflines = list[Timing](), dict[str, dict[str, object]]()
    for name, shape in shapes.items():
        for dtype in dtypes:
            roofline = shape.roofline(peaks[dtype], bytes_per_second, DTYPES[dtype].itemsize)
            rooflines[f"{name} {dtype}"] = {"flops_per_second": roofline, "bound by": "matmul" if roofline == peaks[dtype] else "memory"}
            found = compare(name, shape, dtype, device, rounds, roofline)
            timings += found
            for timing in found:
                print(line(timing), flush=True)
    ceilings: dict[str, object] = {"bytes_per_second": bytes_per_second, "flops": peaks}
    sizes = {name: asdict(shape) for name, shape in shapes.items()}
    found = [asdict(timing) for timing in timings]
    return {"ceilings": ceilings, "rooflines": rooflines, "shapes": sizes, "rounds": rounds, "seed": SEED, "timings": found}


def line(timing: Timing) -> str:
    head = f"{timing.shape:14} {timing.dtype:9} {timing.method:11}"
    if timing.refused:
        return f"{head} not timed: {timing.refused}"
    spread = f"{1e3 * timing.seconds:8.3f} ms ({1e3 * timing.low:.3f} to {1e3 * timing.high:.3f})"
    return f"{head} {spread}, {timing.over_loop:.2f} x loop, {timing.of_roofline:.0%} of the roofline, off by {timing.error:.0e}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *QUICK], default=["gpt_moe_8e", "gpt_moe_8e_ep2"], help="%(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shapes = {name: (SHAPES | QUICK)[name] for name in options.shapes}
    on_gpu = device.type == "cuda"
    result = benchmark(device, shapes, options.dtypes, options.rounds, 8192 if on_gpu else 1024, 2**30 if on_gpu else 2**27)
    facts: dict[str, object] = {"torch": torch.__version__, "device": device_name(device), "threads": torch.get_num_threads()}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts | result, indent=1) + "\n", encoding="utf-8")
    return 0


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's instruction set as torch sees it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
