"""Grouped-query attention with its norm. B sequences, S tokens, T keys, D hidden, H query heads, G key/value heads, d head_dim."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moetrain.model.config import ModelConfig
from moetrain.model.context import ForwardContext, KeyValueCache
from moetrain.model.norm import RMSNorm
from moetrain.model.rope import rotary, rotate


@dataclass
class AttentionInputs:
    """What every attention layer of one forward shares."""

    cos: Tensor  # [B, 1, S, d]
    sin: Tensor
    position_BS: Tensor
    mask_BST: Tensor | None  # bool, True: visible; None: plain causal
    cache: KeyValueCache | None
    window: int | None

    @classmethod
    def of(cls, config: ModelConfig, context: ForwardContext, shape_BS: tuple[int, int], device: torch.device) -> "AttentionInputs":
        position_BS = context.position_BS
        if position_BS is None:
            position_BS = torch.arange(shape_BS[1], device=device).expand(shape_BS)
        cos, sin = rotary(position_BS, config.attention.head_dim, config.rope)
        window, mask_BST = config.attention.sliding_window, None
        if context.cache is None and (context.document_BS is not None or (window is not None and window < shape_BS[1])):
            order_BS = torch.arange(shape_BS[1], device=device).expand(shape_BS)
            mask_BST = visible(order_BS, order_BS, window)
            if context.document_BS is not None:
                mask_BST = mask_BST & (context.document_BS.unsqueeze(2) == context.document_BS.unsqueeze(1))
        return cls(cos, sin, position_BS, mask_BST, context.cache, window)


def visible(query_BS: Tensor, key_BT: Tensor, window: int | None) -> Tensor:
    """bool [B, S, T]: keys at positions 0..query's, within the window. A query without a position (-1) sees every key slot."""
    query, key = query_BS.unsqueeze(2), key_BT.unsqueeze(1)
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen = seen & (key > query - window)
    return seen | (query < 0)


class Attention(nn.Module):
    """norm -> q, k, v -> clip -> q/k norm -> rotary -> attention -> output projection; the caller adds the residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        shape = config.attention
        self.shape, self.layer = shape, layer
        query_size, key_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=shape.bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=shape.bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=shape.bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=shape.bias)
        if shape.qk_norm != "none":
            full = shape.qk_norm == "full"
            self.q_norm = RMSNorm(query_size if full else shape.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(key_size if full else shape.head_dim, config.norm_eps)

    def forward(self, h_BSD: Tensor, inputs: AttentionInputs) -> Tensor:
        """The residual update [B, S, D]."""
        query, key, value = self._project(self.norm(h_BSD))
        query, key = rotate(query, inputs.cos, inputs.sin), rotate(key, inputs.cos, inputs.sin)
        mask_BST = inputs.mask_BST
        if inputs.cache is not None:
            key, value, key_BT = inputs.cache.extend(self.layer, key, value)
            mask_BST = visible(inputs.position_BS, key_BT, inputs.window)
        return self.o_proj(self._mix(query, key, value, mask_BST).transpose(1, 2).flatten(2))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask_BST: Tensor | None) -> Tensor:
        """[B, H, S, d]. Masked grouped queries get their keys repeated: CUDA's fused kernels take a mask or groups, not both."""
        groups = self.shape.num_heads // self.shape.num_kv_heads
        if mask_BST is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups > 1)
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask_BST.unsqueeze(1))

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, S, d], k and v [B, G, S, d], before rotation."""
        query, key, value = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        clip, norm = self.shape.qkv_clip, self.shape.qk_norm
        if norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        if clip is not None:
            query, key, value = query.clamp(-clip, clip), key.clamp(-clip, clip), value.clamp(-clip, clip)
        query, key, value = (x.unflatten(-1, (-1, self.shape.head_dim)) for x in (query, key, value))
        if norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
