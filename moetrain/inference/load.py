"""A bundle's model into memory: whole, on one device, every expert resident."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moetrain.base.errors import ConfigError, one_of
from moetrain.inference.language import Language
from moetrain.model.config import ModelConfig
from moetrain.model.gpt import GPT, meta_model
from moetrain.model.shapes import check_tensors
from moetrain.store.bundle import Bundle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load(path: Path | str, device: str = "auto", dtype: str = "float32") -> tuple[GPT, Language]:
    """The model of a bundle, ready to infer, and its language. One tensor at a time is held twice.

    Raises BundleError or DataError for a bundle that cannot be read, ConfigError for a device or dtype that is not there.
    """
    where = device_of(device)
    one_of("dtype", dtype, DTYPES)
    bundle = Bundle.open(path)
    config = dropless(ModelConfig.from_dict(bundle.config))
    check_tensors(config, bundle.shapes, str(path))
    model = meta_model(config)
    state = {name: _weight(name, tensor, where, DTYPES[dtype]) for name, tensor in bundle.tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), Language.of(bundle)


def dropless(config: ModelConfig) -> ModelConfig:
    """Without expert capacity: whom an expert drops depends on who shares the batch, and a completion must not."""
    return replace(config, routing=replace(config.routing, capacity_factor=None))


def device_of(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError.of("device", name, "it must be auto, cpu, cuda or cuda:N") from error
    one_of("device", device.type, ("cpu", "cuda"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError.of("device", name, f"this machine has {torch.cuda.device_count()} CUDA devices", "Use device=cpu.")
    return device


def _weight(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy: the bundle's own tensor is a file, which may change or go. The balance bias, a sum of tiny steps, stays at least float32."""
    if name.endswith("balance_bias"):
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(device, dtype, copy=True)
