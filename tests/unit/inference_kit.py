"""Tiny models with decisive random weights for the inference tests; greedy decoding without a cache, the reference of them all."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from moetrain.model.config import AttentionConfig, ModelConfig, RopeConfig, ShortcutConfig
from moetrain.model.gpt import GPT
from moetrain.routing.config import RoutingConfig
from moetrain.store.bundle import Contents, TokenizerFacts, write_bundle
from moetrain.store.shards import TensorInfo

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    pattern=["moe"],
    ffn_size=32,
    expert_ffn_size=20,
    shared_ffn_size=28,
    max_position=64,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    routing=RoutingConfig(num_experts=5, top_k=2),
)


def attention(**changes: object) -> ModelConfig:
    return replace(SMALL, attention=replace(SMALL.attention, **changes))


def rope(config: RopeConfig) -> ModelConfig:
    return replace(SMALL, rope=config)


def routing(**changes: object) -> ModelConfig:
    return replace(SMALL, routing=replace(SMALL.routing, **changes))


def shortcut(position: int) -> ModelConfig:
    return replace(SMALL, pattern=["scmoe"], shortcut=ShortcutConfig([position]))


CONFIGS = {
    "dense": replace(SMALL, pattern=["dense"]),
    "moe": SMALL,
    "shared": replace(SMALL, pattern=["shared"]),
    "shared, plain sum": replace(SMALL, pattern=["shared"], shared_gate="add"),
    "scmoe 1": shortcut(1),
    "scmoe 2": shortcut(2),
    "scmoe 3": shortcut(3),
    "scmoe, two positions": replace(SMALL, pattern=["scmoe"], num_layers=4, shortcut=ShortcutConfig([1, 3])),
    "scmoe, two-way gate": replace(shortcut(2), shared_gate="cg2", num_shared_experts=2),
    "shortcut": replace(SMALL, pattern=["shortcut"]),
    "dgmoe": replace(SMALL, pattern=["dgmoe"]),
    "dgmoe, shared bank": replace(SMALL, pattern=["dgmoe"], num_layers=4, shortcut=ShortcutConfig(pairs_per_bank=2)),
    "all blocks": replace(SMALL, pattern=["dense", "scmoe", "moe", "shared", "shortcut"], num_layers=6),
    "multi-head": attention(num_kv_heads=4),
    "one key head": attention(num_kv_heads=1),
    "wide heads": attention(head_dim=12),
    "qk-norm full": attention(qk_norm="full"),
    "qk-norm head": attention(qk_norm="head"),
    "clip and bias": attention(qkv_clip=0.7, bias=True),
    "window 6": attention(sliding_window=6),
    "window 1": attention(sliding_window=1),
    "scmoe, window 6": replace(shortcut(2), attention=replace(SMALL.attention, sliding_window=6)),
    "rope linear": rope(RopeConfig(scaling="linear", factor=2.0)),
    "rope llama3": rope(RopeConfig(500.0, "llama3", 4.0, original_max_position=16)),
    "rope yarn": rope(RopeConfig(scaling="yarn", factor=4.0, original_max_position=16)),
    "sigmoid with bias balancing": routing(score="sigmoid", bias_update_rate=0.01, renormalize=True, weight_scale=2.5),
    "softmax after": routing(softmax_order="after"),
    "untied": replace(SMALL, tie_embeddings=False),
}


def filled(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    """A model whose weights are large enough for its choices to differ clearly."""
    model = GPT(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model


def tokens(seed: int, *shape: int) -> Tensor:
    """Random token ids."""
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def greedy_without_cache(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    """The whole text is computed again for every token."""
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(model(torch.tensor([text])).logits_BSV[0, -1].argmax()))
    return text[len(prompt) :]


def write_tiny_bundle(target: Path, config: ModelConfig, tokenizer: TokenizerFacts, seed: int = 0) -> GPT:
    """A bundle of `filled(config)` in float32; returns that model."""
    model = filled(config, torch.float32, seed)
    state = model.state_dict()
    table = {name: TensorInfo(tuple(x.shape), "float32") for name, x in state.items()}
    write_bundle(target, Contents(asdict(config), {}, tokenizer, table, state.__getitem__), "A tiny random model.\n")
    return model
