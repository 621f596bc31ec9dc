"""Parameter and FLOP counts against hand computation, published totals and the real model."""

import pytest

from moetrain.model.config import AttentionConfig, ModelConfig, ShortcutConfig
from moetrain.model.count import (
    active_matmul_parameters,
    bank_bytes,
    count_parameters,
    forward_flops_per_token,
    mean_keys,
    training_flops_per_token,
)
from moetrain.routing.config import RoutingConfig


def tiny(**changes: object) -> ModelConfig:
    """D=8, H=G=2, d=4, F=16, V=32, E=4, K=2; one layer unless changed."""
    values: dict[str, object] = {
        "vocab_size": 32,
        "hidden_size": 8,
        "num_layers": 1,
        "pattern": ["moe"],
        "ffn_size": 16,
        "expert_ffn_size": 12,
        "shared_ffn_size": 10,
        "attention": AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4),
        "routing": RoutingConfig(num_experts=4, top_k=2),
    }
    return ModelConfig(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_moe_block_equals_hand_count() -> None:
    count = count_parameters(tiny())
    attention = 8 + 4 * 8 * 8
    assert count.dense == 32 * 8 + 8 + attention + 8 + 4 * 8
    assert count.per_expert == 3 * 8 * 12
    assert count.expert == 4 * count.per_expert
    assert count.total == count.dense + count.expert
    assert count.active == count.dense + 2 * count.per_expert


def test_scmoe_pair_equals_hand_count() -> None:
    count = count_parameters(tiny(num_layers=2, pattern=["scmoe"], tie_embeddings=False))
    attention = 8 + 4 * 8 * 8
    preceding = attention + 8 + 3 * 8 * 16
    routed = 8 + 4 * 8
    shared = 8 + 3 * 8 * 10 + 8  # own norm, matrices, sigmoid gate
    assert count.dense == 2 * 32 * 8 + 8 + preceding + attention + routed + shared
    assert count.num_banks == 1
    two_way = tiny(num_layers=2, pattern=["scmoe"], tie_embeddings=False, shared_gate="cg2", num_shared_experts=3)
    assert count_parameters(two_way).dense == count.dense + 8 + 2 * 3 * 8 * 10


def test_a_bank_under_two_pairs_is_counted_once_and_used_by_both() -> None:
    pairs = tiny(num_layers=4, pattern=["dgmoe"])
    shared = tiny(num_layers=4, pattern=["dgmoe"], shortcut=ShortcutConfig(pairs_per_bank=2))
    apart, together = count_parameters(pairs), count_parameters(shared)
    assert (apart.num_banks, together.num_banks) == (2, 1)
    assert apart.total - together.total == 4 * 3 * 8 * 12 + 4 * 8 + 8  # experts, gate and norm
    assert apart.chosen == together.chosen == 2 * 2 * 2  # pairs, gatings, K
    pair = 2 * 4 * 8 * 8 + 3 * 8 * 16 + 2 * 4 * 8 + 2 * 2 * 3 * 8 * 12  # attentions, MLP, the gate twice, four experts
    assert active_matmul_parameters(pairs) == active_matmul_parameters(shared) == 2 * pair + 32 * 8


def test_attention_options_add_their_parameters() -> None:
    plain = count_parameters(tiny()).dense
    grouped = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    assert count_parameters(tiny(attention=grouped)).dense == plain - 2 * 4 * 8
    bias = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, bias=True)
    assert count_parameters(tiny(attention=bias)).dense == plain + 4 * 8
    full = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, qk_norm="full")
    assert count_parameters(tiny(attention=full)).dense == plain + 2 * 8
    head = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, qk_norm="head")
    assert count_parameters(tiny(attention=head)).dense == plain + 2 * 4


def test_balance_bias_is_no_parameter() -> None:
    with_bias = tiny(routing=RoutingConfig(num_experts=4, top_k=2, bias_update_rate=0.001))
    assert count_parameters(with_bias) == count_parameters(tiny())


def test_matmul_parameters_leave_out_lookup_norms_and_biases() -> None:
    block = 4 * 8 * 8 + 4 * 8 + 2 * 3 * 8 * 12
    head = 32 * 8
    bias = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, bias=True, qk_norm="full")
    assert active_matmul_parameters(tiny()) == block + head
    assert active_matmul_parameters(tiny(tie_embeddings=False)) == block + head
    assert active_matmul_parameters(tiny(attention=bias)) == block + head


def test_flops_add_causal_attention_scores() -> None:
    model = tiny()
    scores = 2 * 2 * 2 * 4 * (1 + 2 + 3 + 4 + 5) / 5  # two products, two operations each, two heads of four values, mean keys
    assert forward_flops_per_token(model, 5) == 2 * active_matmul_parameters(model) + scores
    assert training_flops_per_token(model, 5) == 3 * forward_flops_per_token(model, 5)


@pytest.mark.parametrize(("seq_len", "window"), [(7, None), (7, 3), (7, 7), (7, 9), (1, 1)])
def test_mean_keys_equals_counting_the_mask(seq_len: int, window: int | None) -> None:
    seen = [sum(1 for key in range(query + 1) if window is None or query - key < window) for query in range(seq_len)]
    assert mean_keys(seq_len, window) == pytest.approx(sum(seen) / seq_len)


def test_bank_bytes_of_master_and_moments() -> None:
    assert bank_bytes(tiny(), 12) == 4 * 3 * 8 * 12 * 12


@pytest.mark.parametrize("pattern", [
    ["dense"], ["moe"], ["shared"], ["shortcut"], ["scmoe"], ["dgmoe"], ["dense", "moe"], ["dense", "scmoe", "shared"]
])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", ["none", "full", "head"])
def test_count_equals_the_real_model(pattern: list[str], tied: bool, qk_norm: str) -> None:
    from moetrain.model.gpt import meta_model

    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=qk_norm, bias=not tied)
    routing = RoutingConfig(num_experts=4, top_k=2, bias_update_rate=0.001)
    shared_gate = "cg1" if tied else "cg2"
    model = tiny(num_layers=4, pattern=pattern, tie_embeddings=tied, attention=attention, routing=routing, shared_gate=shared_gate)
    real = {name: parameter.numel() for name, parameter in meta_model(model).named_parameters()}
    count = count_parameters(model)
    assert count.total == sum(real.values())
    assert count.expert == sum(size for name, size in real.items() if ".moe.experts." in name)
