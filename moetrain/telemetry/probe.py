"""How fast this machine could multiply matrices: the denominator of MFU. A table for known GPUs, a measurement elsewhere."""

import torch

from moetrain.base.clock import Clock

GPU_PEAKS = {
    # name contains -> dense bfloat16 FLOP/s of the data sheet; the first match counts, so special models come first
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of one rank's device for matrices of `dtype`: the data sheet's for bfloat16 on a known GPU, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_gpu(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return matmul_flops(device, dtype, clock)


def known_gpu(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name, or None."""
    words = name.replace("-", " ")
    return next((peak for part, peak in GPU_PEAKS.items() if f" {part} " in f" {words} "), None)


def matmul_flops(device: torch.device, dtype: torch.dtype, clock: Clock, size: int = 0, repeats: int = 5) -> float:
    """Best FLOP/s of `repeats` square products, with the threads torch has now. About 0.2 s on a CPU core.

    `size` 0 takes 1024 on a CPU and 8192 on a GPU. Other processes on the same cores make it smaller: it is what this rank can have now.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, size, device=device, dtype=dtype)
    out = left @ right
    best = float("inf")
    for _ in range(repeats):
        start = _time(device, clock)
        torch.matmul(left, right, out=out)
        best = min(best, _time(device, clock) - start)
    return 2 * size**3 / max(best, 1e-9)


def _time(device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock.monotonic()
