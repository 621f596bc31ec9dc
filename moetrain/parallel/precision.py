"""Whether matmuls run in bfloat16: where the hardware has units for it, decided by a probe, the same on all ranks; and rows on the wire."""

import time

import torch

from moetrain.dist.world import World
from moetrain.parallel.config import EngineConfig

WIRE_DTYPES: dict[str, torch.dtype | None] = {"same": None, "bfloat16": torch.bfloat16}  # parallel.wire_dtype as Link.wire_dtype


def autocast_dtype(config: EngineConfig, world: World) -> torch.dtype | None:
    """torch.bfloat16, or None for no autocast. float64 models are never cast."""
    if config.autocast == "off" or config.dtype == "float64":
        return None
    if config.autocast == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if world.agree(faster_in_bfloat16(world.device)) else None


def faster_in_bfloat16(device: torch.device) -> bool:
    """CUDA: compute capability 8 and up. CPU: a small matmul is timed in both types, since CPUs without bfloat16 units
    emulate it a hundred times slower; the best of several, since a busy core can make any one look slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    single, half = (min(_seconds(torch.ones(256, 256, dtype=dtype)) for _ in range(5)) for dtype in (torch.float32, torch.bfloat16))
    return half < 0.8 * single


def _seconds(x: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.matmul(x, x)
    return time.perf_counter() - start
