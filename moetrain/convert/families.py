"""The Hugging Face architectures moetrain reads and writes: their configurations as ModelConfig, both ways.

Checked against transformers 5.23 (configuration_*.py and modeling_*.py of mixtral, qwen3_moe, olmoe).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moetrain.base.errors import BundleError, ConfigError, closest
from moetrain.convert.keys import Keys
from moetrain.convert.rope import read_rope, write_rope
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.routing.config import RoutingConfig

# Keys that change no logit: what forward returns, caches, classification heads, how weights were stored, where they came from.
HARMLESS = (
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path", "dtype", "id2label", "label2id", "model_type",
    "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
# Keys that change nothing at these values, and something moetrain does not compute at others.
INERT: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "router_jitter_noise": (0,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "tie_last_hidden_states": (None,),
}


@dataclass(frozen=True)
class Family:
    """One architecture. `defaults` are those of its configuration class, for keys a config.json leaves out."""

    name: str  # model_type
    class_name: str
    qk_norm: str
    defaults: Mapping[str, object]


_COMMON: dict[str, object] = {
    "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False, "head_dim": None, "rope_theta": 10000.0,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sliding_window": None, "router_aux_loss_coef": 0.001,
    "attention_bias": False, "norm_topk_prob": False, "clip_qkv": None,
}  # fmt: skip
MIXTRAL = Family("mixtral", "MixtralForCausalLM", "none", _COMMON | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2,
})  # fmt: skip
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", "head", _COMMON | {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": None, "use_sliding_window": False,
    "sliding_window": 4096,
})  # fmt: skip
OLMOE = Family("olmoe", "OlmoeForCausalLM", "full", _COMMON | {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
    "router_aux_loss_coef": 0.01, "pad_token_id": 1, "eos_token_id": 50279,
})  # fmt: skip
FAMILIES = {family.name: family for family in (MIXTRAL, QWEN3_MOE, OLMOE)}


def family_of(values: Mapping[str, object], where: str) -> Family:
    """The family a config.json names. BundleError for another one, or for a class that is no causal language model."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise BundleError(f"{where} names model_type={name!r}, which moetrain does not read.", f"It reads: {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    if values.get("architectures") not in (None, [family.class_name]):
        raise BundleError(f"{where} names architectures={values['architectures']!r}, only [{family.class_name!r}] is read for {name}.")
    return family


def read_config(values: Mapping[str, object], where: str) -> ModelConfig:
    """The ModelConfig of a config.json. BundleError names any key (and its value) that moetrain does not compute."""
    family = family_of(values, where)
    keys = Keys(values, family.defaults, where)
    keys.skip((*HARMLESS, "architectures", "bos_token_id", "eos_token_id", "pad_token_id"))
    for name, allowed in INERT.items():
        keys.only(name, *allowed)
    layers = keys.whole("num_hidden_layers")
    pattern = _read_pattern(keys, family, layers)
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        hidden_size=keys.whole("hidden_size"),
        num_layers=layers,
        pattern=shortest_period(pattern),
        ffn_size=keys.whole("intermediate_size"),
        max_position=keys.whole("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        init_std=keys.number("initializer_range"),
        attention=_read_attention(keys, family),
        rope=read_rope(keys),
        routing=_read_routing(keys, family, pattern.count("moe")),
    )
    config.expert_ffn_size = keys.whole("moe_intermediate_size") if family is QWEN3_MOE else config.ffn_size
    config.shared_ffn_size = config.expert_ffn_size
    keys.finish()
    try:
        config.check()
    except ConfigError as error:
        raise BundleError(f"{where} describes no model that moetrain builds: {error.message}", error.hint) from error
    return config


def shortest_period(pattern: list[str]) -> list[str]:
    """The shortest list whose repetition is `pattern`."""
    lengths = (n for n in range(1, len(pattern) + 1) if len(pattern) % n == 0 and pattern == pattern[:n] * (len(pattern) // n))
    return pattern[: next(lengths, 0)]


def _read_pattern(keys: Keys, family: Family, layers: int) -> list[str]:
    """dense or moe for every layer."""
    if family is not QWEN3_MOE:
        return ["moe"] * layers
    step, dense = keys.whole("decoder_sparse_step"), keys.take("mlp_only_layers")
    if step < 1:
        raise keys.refuse("decoder_sparse_step", "every how many layers experts come must be at least 1")
    if not (dense is None or (isinstance(dense, list) and all(type(layer) is int for layer in dense))):
        raise keys.refuse("mlp_only_layers", "a list of layer numbers is needed")
    return ["moe" if layer not in (dense or []) and (layer + 1) % step == 0 else "dense" for layer in range(layers)]


def _read_attention(keys: Keys, family: Family) -> AttentionConfig:
    hidden, heads, head_dim = keys.whole("hidden_size"), keys.whole("num_attention_heads"), keys.optional_whole("head_dim")
    if heads < 1:
        raise keys.refuse("num_attention_heads", "it must be positive")
    if family is OLMOE and (hidden % heads or head_dim not in (None, hidden // heads)):
        raise keys.refuse("head_dim" if head_dim else "num_attention_heads", "OLMoE's q_norm needs heads that fill hidden_size exactly")
    if family is MIXTRAL:
        keys.only("attention_bias", False)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=keys.optional_whole("num_key_value_heads") or heads,
        head_dim=head_dim or hidden // heads,
        qk_norm=family.qk_norm,
        qkv_clip=keys.optional_number("clip_qkv") if family is OLMOE else None,
        bias=False if family is MIXTRAL else keys.flag("attention_bias"),
        sliding_window=_read_window(keys, family),
    )
    kind = "full_attention" if attention.sliding_window is None else "sliding_attention"
    layer_types = keys.take("layer_types")
    if not (layer_types is None or (isinstance(layer_types, list) and set(layer_types) <= {kind})):
        raise keys.refuse("layer_types", f"moetrain gives every layer the same attention, here {kind!r}")
    return attention


def _read_window(keys: Keys, family: Family) -> int | None:
    if family is OLMOE:
        keys.only("sliding_window", None)
        return None
    window = keys.optional_whole("sliding_window")
    if family is MIXTRAL:
        return window
    if not keys.flag("use_sliding_window"):
        keys.skip(["max_window_layers"])
        return None
    keys.only("max_window_layers", 0)
    return window


def _read_routing(keys: Keys, family: Family, num_moe: int) -> RoutingConfig:
    routing = RoutingConfig(
        num_experts=keys.whole("num_local_experts", "num_experts") if family is MIXTRAL else keys.whole("num_experts", "num_local_experts"),
        top_k=keys.whole("num_experts_per_tok"),
        renormalize=True if family is MIXTRAL else keys.flag("norm_topk_prob"),
    )
    routing.auxiliary_loss_weight = _rounded(keys.number("router_aux_loss_coef") * routing.top_k / max(num_moe, 1))
    return routing


def choose(config: ModelConfig, name: str | None = None) -> Family:
    """The family that computes `config` (or the one asked for). BundleError names the first feature that none, or it, has."""
    if name is not None and name not in FAMILIES:
        raise BundleError(f"--architecture {name} is not known.", closest(name, FAMILIES))
    family = FAMILIES[name] if name else next(family for family in FAMILIES.values() if family.qk_norm == config.attention.qk_norm)
    for block in config.blocks():
        if block not in ("dense", "moe"):
            raise BundleError(f"The block {block} has no Hugging Face class.", "Use --format bundle.")
    for key, (value, supported) in _features(config, family).items():
        if not supported:
            sentence = f"model.{key}={value!r} has no counterpart in the Hugging Face class {family.class_name}."
            raise BundleError(sentence, "Use --format bundle.")
    return family


def _features(config: ModelConfig, family: Family) -> dict[str, tuple[object, bool]]:
    """Key -> its value, and whether the family computes it at that value."""
    attention, routing = config.attention, config.routing
    features: dict[str, tuple[object, bool]] = {
        "routing.score": (routing.score, routing.score == "softmax"),
        "routing.weight_scale": (routing.weight_scale, routing.weight_scale == 1),
        "routing.bias_update_rate": (routing.bias_update_rate, routing.bias_update_rate == 0),
        "routing.capacity_factor": (routing.capacity_factor, routing.capacity_factor is None),
        "attention.qk_norm": (attention.qk_norm, attention.qk_norm == family.qk_norm),
        "pattern": (config.pattern, family is QWEN3_MOE or "dense" not in config.blocks()),
        "attention.qkv_clip": (attention.qkv_clip, family is OLMOE or attention.qkv_clip is None),
    }
    if family is MIXTRAL:
        features["attention.bias"] = attention.bias, not attention.bias
        features["routing.renormalize"] = routing.renormalize, renormalized(routing)
    if family is OLMOE:
        features["attention.sliding_window"] = attention.sliding_window, attention.sliding_window is None
        features["attention.head_dim"] = attention.head_dim, attention.num_heads * attention.head_dim == config.hidden_size
    return features


def renormalized(routing: RoutingConfig) -> bool:
    """A softmax over the selected experts equals a softmax over all, renormalised over the selected."""
    return routing.renormalize or routing.softmax_order == "after"


def write_config(config: ModelConfig, family: Family, dtype: str) -> dict[str, object]:
    """The config.json of a family that `choose` allowed, without the token ids. Keys as published checkpoints write them:
    transformers 4 and 5 read it. The auxiliary losses agree when experts are balanced (docs/convert.md)."""
    attention, routing, blocks = config.attention, config.routing, config.blocks()
    coefficient = _rounded(routing.auxiliary_loss_weight * max(blocks.count("moe"), 1) / routing.top_k)
    values: dict[str, object] = {
        "architectures": [family.class_name],
        "model_type": family.name,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size if family is QWEN3_MOE else config.expert_ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_position,
        "num_experts_per_tok": routing.top_k,
        "output_router_logits": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope(config.rope),
        "router_aux_loss_coef": coefficient,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if family is MIXTRAL:
        own: dict[str, object] = {"head_dim": attention.head_dim, "num_local_experts": routing.num_experts}
        return values | own | {"router_jitter_noise": 0.0, "sliding_window": attention.sliding_window}
    values |= {"attention_bias": attention.bias, "norm_topk_prob": renormalized(routing), "num_experts": routing.num_experts}
    if family is OLMOE:
        return values | {"clip_qkv": attention.qkv_clip}
    return values | {
        "head_dim": attention.head_dim,
        "moe_intermediate_size": config.expert_ffn_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, block in enumerate(blocks) if block == "dense"],
        "use_sliding_window": attention.sliding_window is not None,
        "sliding_window": attention.sliding_window,
        "max_window_layers": 0,
    }


def _rounded(value: float) -> float:
    """Twelve digits: the way there and back gives the same number."""
    return float(f"{value:.12g}")
