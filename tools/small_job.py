"""The small MoE made smaller, as overrides: a job for tools that break it on purpose, or run it many times."""

TOKENS_PER_STEP = 1024
HEAD = 32  # width of one attention head


def small_job(width: int, seq_len: int) -> list[str]:
    """`width` of the hidden state, a multiple of 32; experts are as wide, dense layers twice. No samples."""
    heads = width // HEAD
    return [
        "+experiment=gpt_moe_8e", f"data.seq_len={seq_len}", f"train.global_batch_tokens={TOKENS_PER_STEP}", "train.sample_every=0",
        f"model.hidden_size={width}", f"model.ffn_size={2 * width}", f"model.expert_ffn_size={width}", f"model.shared_ffn_size={width}",
        f"model.attention.num_heads={heads}", f"model.attention.num_kv_heads={heads}", f"model.attention.head_dim={HEAD}",
    ]  # fmt: skip
