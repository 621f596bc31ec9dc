"""Whether matmuls run in bfloat16: where the hardware has units for it, the same on all ranks and at every start; and rows on the wire."""

import torch

from moetrain.dist.world import World
from moetrain.parallel.config import EngineConfig


def autocast_dtype(config: EngineConfig, world: World) -> torch.dtype | None:
    """torch.bfloat16, or None for no autocast. float64 models are never cast."""
    if config.autocast == "off" or config.dtype == "float64":
        return None
    if config.autocast == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if world.agree(faster_in_bfloat16(world.device)) else None


def wire_dtype(name: str, autocast: torch.dtype | None) -> torch.dtype | None:
    """`parallel.wire_dtype` as Link.wire_dtype. auto: as experts compute, which cast the rows that arrive, and widen their gradients,
    themselves. Cast before the journey they are the same bits in half the bytes."""
    return autocast if name == "auto" else None if name == "same" else torch.bfloat16


def faster_in_bfloat16(device: torch.device) -> bool:
    """CUDA: compute capability 8 and up. CPU: only with tile units (AMX). Without any bfloat16 is emulated, a hundred times slower, and
    with AVX512_BF16 it was half as fast as float32. Nothing is timed: a restart on a busy machine must compute in the same bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.cpu._is_amx_tile_supported()
