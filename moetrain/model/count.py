"""Parameters and floating-point operations of a model, from its shape alone. Pure arithmetic, no torch."""

from dataclasses import dataclass
from math import prod

from moetrain.model.config import ModelConfig
from moetrain.model.shapes import is_expert, parameter_shapes


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of values; the balance bias is a buffer and not among them."""

    dense: int  # everything that is not a routed expert: every token passes it
    expert: int  # the routed experts of all banks
    per_expert: int  # one routed expert
    num_banks: int
    chosen: int  # experts that a token passes in a forward: top_k per gating

    @property
    def total(self) -> int:
        return self.dense + self.expert

    @property
    def active(self) -> int:
        """What one token uses, embeddings included: the usual "active parameters"."""
        return self.dense + self.chosen * self.per_expert


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of docs/design.md. Requires a checked model."""
    shapes = {name: shape for name, shape in parameter_shapes(model).items() if not name.endswith("balance_bias")}
    return ParameterCount(
        dense=sum(prod(shape) for name, shape in shapes.items() if not is_expert(name)),
        expert=sum(prod(shape) for name, shape in shapes.items() if is_expert(name)),
        per_expert=3 * model.hidden_size * model.expert_ffn_size,
        num_banks=len(model.banks()),
        chosen=model.num_gatings() * model.routing.top_k,
    )


def active_matmul_parameters(model: ModelConfig) -> int:
    """Matrix values that multiply one token: projections, gates, chosen experts, the output projection; no norm, bias or
    look-up. A gate that is used twice multiplies twice."""
    count = count_parameters(model)
    lookups = () if model.tie_embeddings else ("embedding.weight",)
    matrices = [shape for name, shape in parameter_shapes(model).items() if len(shape) == 2 and name not in lookups]
    gates_again = (model.num_gatings() - count.num_banks) * model.routing.num_experts * model.hidden_size
    return sum(prod(shape) for shape in matrices) + gates_again + count.chosen * count.per_expert


def mean_keys(seq_len: int, sliding_window: int | None) -> float:
    """Keys a token sees on average over a sequence under the causal mask, itself included."""
    window = min(seq_len, sliding_window or seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Multiplications and additions of a forward pass per token: 2 per active matrix value, 4 per head value and key seen."""
    attention = model.attention
    scores = 4 * attention.num_heads * attention.head_dim * mean_keys(seq_len, attention.sliding_window)
    return 2 * active_matmul_parameters(model) + model.num_layers * scores


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward, the backward twice the forward (arXiv 2204.02311 appendix B). Recomputation is not counted as work."""
    return 3 * forward_flops_per_token(model, seq_len)


def bank_bytes(model: ModelConfig, bytes_per_value: int) -> int:
    """Bytes of all experts of one bank at so many bytes per value (12: float32 master with both Adam moments)."""
    return model.routing.num_experts * count_parameters(model).per_expert * bytes_per_value
