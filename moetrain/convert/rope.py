"""Rotary scalings of Hugging Face configurations as RopeConfig, both ways.

Old keys (rope_theta, rope_scaling) and new ones (rope_parameters) are read, the old ones written: every transformers reads them.
"""

import math

from moetrain.convert.keys import Keys
from moetrain.model.config import RopeConfig

SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read_rope(keys: Keys) -> RopeConfig:
    """The rotary part of a config.json, with the precedences of transformers 5. BundleError names what moetrain does not compute."""
    old, new = keys.take("rope_scaling"), keys.take("rope_parameters")
    name, group = ("rope_scaling", old) if old else ("rope_parameters", new)
    if not isinstance(group, dict | None):
        raise keys.refuse(name, "a group of keys is needed")
    theta = keys.number("rope_theta")
    rope = Keys(group or {}, {"rope_theta": theta, "rope_type": "default"}, keys.where, f"{name}.")
    for each in (keys, rope):
        each.only("partial_rotary_factor", 1, None)
    kind = rope.take("rope_type", "type")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise rope.refuse("rope_type" if "rope_type" in rope.values else "type", f"moetrain computes {', '.join(SCALINGS)} only")
    config = RopeConfig(theta=rope.number("rope_theta"), scaling=SCALINGS[kind])
    outer = keys.optional_whole("original_max_position_embeddings")
    if kind in ("llama3", "yarn"):
        inner = rope.optional_whole("original_max_position_embeddings")
        config.original_max_position = outer or inner or keys.whole("max_position_embeddings")
    if kind in ("linear", "llama3"):
        config.factor = rope.number("factor")
    if kind == "llama3":
        config.low_frequency_factor, config.high_frequency_factor = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if kind == "yarn":
        _read_yarn(rope, config, keys.whole("max_position_embeddings"))
    rope.finish()
    return config


def _read_yarn(rope: Keys, config: RopeConfig, max_position: int) -> None:
    rope.only("truncate", True)
    config.factor = rope.optional_number("factor") or max_position / config.original_max_position
    config.beta_fast = rope.optional_number("beta_fast") or 32.0
    config.beta_slow = rope.optional_number("beta_slow") or 1.0
    config.attention_factor = rope.optional_number("attention_factor")
    scale, scale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if config.attention_factor is None and scale and scale_all:
        config.attention_factor = _amplitude(config.factor, scale) / _amplitude(config.factor, scale_all)


def _amplitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def write_rope(rope: RopeConfig) -> dict[str, object] | None:
    """The value of rope_scaling; None for the plain embedding."""
    if rope.scaling == "none":
        return None
    values: dict[str, object] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        values["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        values |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
    if rope.scaling == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            values["attention_factor"] = rope.attention_factor
    return values
