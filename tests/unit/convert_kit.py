"""Tiny transformers models with decisive random weights, as folders; our model's logits on the same tokens."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from moetrain.model.config import ModelConfig
from moetrain.model.gpt import GPT
from moetrain.store.bundle import Contents

SIZES = {
    "vocab_size": 59, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 3,
    "pad_token_id": None,
}  # fmt: skip
OWN = {
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 5},
}


def model(family: str, changes: dict[str, object], seed: int = 0) -> PreTrainedModel:
    """A float32 model of the family; weights so large that every option shows in the logits."""
    logging.disable_progress_bar()
    config = AutoConfig.for_model(family, **SIZES | OWN[family] | changes)
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return made


def folder_of(made: PreTrainedModel, folder: Path, packed: bool = False) -> Path:
    """The model as a Hugging Face folder, one tensor per expert or all experts in one."""
    made.save_pretrained(folder, save_original_format=not packed)
    return folder


def prompts() -> Tensor:
    """Two sequences, longer than the windows of the tests."""
    return torch.randint(0, SIZES["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(7))


def our_logits(contents: Contents) -> Tensor:
    """Logits of our model on `prompts()`."""
    ours = GPT(ModelConfig.from_dict(contents.config)).requires_grad_(False)
    ours.load_state_dict({name: contents.load(name).float() for name in contents.table})
    return ours(prompts()).logits_BSV


def their_logits(made: PreTrainedModel) -> Tensor:
    return made(prompts()).logits


def edit(folder: Path, **changes: object) -> None:
    """Changes keys of a folder's config.json; the value ... removes a key."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
