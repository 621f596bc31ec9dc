"""Where each of our tensors is in a Hugging Face folder: one table, used both ways. E experts, D hidden, F FFN."""

import re
from typing import NamedTuple

from moetrain.convert.families import MIXTRAL, Family
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import Shape

ENDS = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}
LEAVES = {
    "attention.norm.weight": "input_layernorm.weight",
    "mlp.norm.weight": "post_attention_layernorm.weight",
    "moe.norm.weight": "post_attention_layernorm.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
    "moe.router.weight": "mlp.gate.weight",
}
MIXTRAL_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Buffers that old releases stored and every release computes anew.
COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Part(NamedTuple):
    """A tensor of the folder, and which part of our tensor it is: all of it, one expert of it, a range of (that expert's) rows."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def shape(self, whole: Shape) -> Shape:
        """The shape of the folder's tensor, given ours."""
        shape = whole if self.expert is None else whole[1:]
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])


def parts(name: str, config: ModelConfig, family: Family) -> list[Part]:
    """The tensors of the folder that make up our tensor `name`, as published checkpoints name them: one per expert."""
    if name in ENDS:
        return [Part(ENDS[name])]
    _, layer, leaf = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    moe = prefix + ("block_sparse_moe." if family is MIXTRAL else "mlp.")
    if leaf == "moe.router.weight":
        return [Part(f"{moe}gate.weight")]
    if leaf == "mlp.gate_up_proj.weight":
        return _gate_up(f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight", None, config.ffn_size)
    if leaf.startswith("moe.experts."):
        own = MIXTRAL_EXPERT if family is MIXTRAL else {}
        gate, down, up = (f"{moe}experts.{{}}.{own.get(proj, proj)}.weight" for proj in MIXTRAL_EXPERT)
        if leaf == "moe.experts.down_proj":
            return [Part(down.format(expert), expert) for expert in range(config.routing.num_experts)]
        pairs = (_gate_up(gate.format(e), up.format(e), e, config.expert_ffn_size) for e in range(config.routing.num_experts))
        return [part for pair in pairs for part in pair]
    return [Part(prefix + LEAVES.get(leaf, leaf.replace("attention.", "self_attn.")))]


def packed(name: str, family: Family) -> str | None:
    """The one tensor [E, 2F, D] or [E, D, F] that newer folders may hold instead of one per expert; None if `name` has none."""
    _, _, leaf = name.partition(".moe.")
    layer = name.split(".")[1]
    prefix = f"model.layers.{layer}." + ("block_sparse_moe." if family is MIXTRAL else "mlp.")
    return prefix + leaf if leaf in ("experts.gate_up_proj", "experts.down_proj") else None


def published(name: str, family: Family) -> str:
    """The name published checkpoints use: newer Mixtral folders may say mlp for block_sparse_moe."""
    return re.sub(r"^(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name) if family is MIXTRAL else name


def _gate_up(gate: str, up: str, expert: int | None, ffn: int) -> list[Part]:
    return [Part(gate, expert, (0, ffn)), Part(up, expert, (ffn, 2 * ffn))]
