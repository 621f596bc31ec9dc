"""Folders of transformers models, in and out, against transformers itself."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moetrain.base.errors import BundleError
from moetrain.convert.huggingface import read_huggingface, write_huggingface
from moetrain.store.bundle import Bundle, Contents, write_bundle
from tests.unit.convert_kit import edit, folder_of, model, our_logits, prompts, their_logits

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 16}
YARN_ALL = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}
YARN_SCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, multi-head": ("mixtral", {"num_key_value_heads": 4}),
    "mixtral, one key head": ("mixtral", {"num_key_value_heads": 1}),
    "mixtral, wide heads": ("mixtral", {"head_dim": 16}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral, window": ("mixtral", {"sliding_window": 5}),
    "mixtral, theta": ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "mixtral, linear": ("mixtral", {"rope_parameters": LINEAR}),
    "mixtral, llama3": ("mixtral", {"rope_parameters": LLAMA3}),
    "mixtral, yarn": ("mixtral", {"rope_parameters": YARN, "head_dim": 12}),
    "mixtral, epsilon": ("mixtral", {"rms_norm_eps": 0.1}),
    "mixtral, all experts": ("mixtral", {"num_experts_per_tok": 5}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe, one expert": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen3_moe, bias": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe, window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    "qwen3_moe, window off": ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 5}),
    "qwen3_moe, dense layers": ("qwen3_moe", {"mlp_only_layers": [0, 2], "num_hidden_layers": 4}),
    "qwen3_moe, sparse step": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3_moe, step and dense": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4}),
    "qwen3_moe, only dense": ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    "qwen3_moe, yarn": ("qwen3_moe", {"rope_parameters": YARN_ALL}),
    "qwen3_moe, yarn scales": ("qwen3_moe", {"rope_parameters": YARN_SCALE}),
    "qwen3_moe, tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "olmoe": ("olmoe", {}),
    "olmoe, multi-head": ("olmoe", {"num_key_value_heads": None}),
    "olmoe, clip": ("olmoe", {"clip_qkv": 0.5}),
    "olmoe, renormalised": ("olmoe", {"norm_topk_prob": True}),
    "olmoe, bias": ("olmoe", {"attention_bias": True, "clip_qkv": 0.8}),
    "olmoe, tied": ("olmoe", {"tie_word_embeddings": True}),
    "olmoe, yarn": ("olmoe", {"rope_parameters": YARN}),
}
INVISIBLE = {"qwen3_moe, window off"}
# These change shapes, so the base model cannot hold the same weights.
SHAPED = {"num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings", "mlp_only_layers", "decoder_sparse_step"}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-4)


def loaded(folder: Path) -> PreTrainedModel:
    """What transformers makes of a folder; it must use every tensor and miss none."""
    made, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert not any(info.values()), info
    return made.eval().requires_grad_(False)


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return read_huggingface(folder_of(model("qwen3_moe", {"mlp_only_layers": [0]}), tmp_path / "source"))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_after_import_and_after_export(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    source = model(family, changes)
    expected = their_logits(source)
    assert expected.std() > 0.3
    contents = read_huggingface(folder_of(source, tmp_path / "source"))
    assert close(our_logits(contents), expected)
    assert write_huggingface(tmp_path / "out", contents, "card").name == family
    assert torch.equal(their_logits(loaded(tmp_path / "out")), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_way_out_and_back_changes_no_bit(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    first = read_huggingface(folder_of(model(family, changes), tmp_path / "source"))
    write_huggingface(tmp_path / "out", first, "card")
    second = read_huggingface(tmp_path / "out")
    assert second.config == first.config
    assert second.table == first.table
    assert all(torch.equal(second.load(name), first.load(name)) for name in first.table)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] and not set(CASES[case][1]) & SHAPED])
def test_each_option_shows_in_the_logits(case: str) -> None:
    family, changes = CASES[case]
    changed, base = model(family, changes), model(family, {})
    assert torch.allclose(their_logits(changed), their_logits(base), atol=1e-2) == (case in INVISIBLE)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_packed_experts_read_like_one_tensor_each(family: str, tmp_path: Path) -> None:
    source = model(family, {})
    apart = read_huggingface(folder_of(source, tmp_path / "apart"))
    packed = read_huggingface(folder_of(source, tmp_path / "packed", packed=True))
    assert packed.table == apart.table
    assert all(torch.equal(packed.load(name), apart.load(name)) for name in apart.table)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_published_names_are_written(family: str, tmp_path: Path) -> None:
    source = model(family, {})
    contents = read_huggingface(folder_of(source, tmp_path / "source"))
    write_huggingface(tmp_path / "out", contents, "card")
    from safetensors import safe_open

    with safe_open(tmp_path / "source/model.safetensors", "np") as theirs, safe_open(tmp_path / "out/model.safetensors", "np") as ours:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        assert ours.metadata() == {"format": "pt"}


def test_shards_and_their_index_are_read_by_transformers(tmp_path: Path, contents: Contents) -> None:
    write_huggingface(tmp_path / "out", contents, "card", shard_bytes=9000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert close(their_logits(loaded(tmp_path / "out")), our_logits(contents))
    assert torch.equal(our_logits(read_huggingface(tmp_path / "out")), our_logits(contents))


def test_bfloat16_stays_bfloat16_and_can_be_asked_for(tmp_path: Path, contents: Contents) -> None:
    write_huggingface(tmp_path / "half", contents, "card", dtype="bfloat16")
    made = loaded(tmp_path / "half")
    assert made.dtype == torch.bfloat16
    half = read_huggingface(tmp_path / "half")
    assert {info.dtype for info in half.table.values()} == {"bfloat16"}
    assert torch.equal(half.load("embedding.weight"), contents.load("embedding.weight").bfloat16())
    assert close(our_logits(half), made.float()(prompts()).logits)


def test_through_a_bundle_nothing_changes(tmp_path: Path, contents: Contents) -> None:
    write_bundle(tmp_path / "bundle", contents, "card")
    bundle = Bundle.open(tmp_path / "bundle").contents
    assert torch.equal(our_logits(bundle), our_logits(contents))
    write_huggingface(tmp_path / "out", bundle, "card")
    assert close(their_logits(loaded(tmp_path / "out")), our_logits(contents))


def test_token_ids_of_the_generation_config_stand_above_those_of_the_config(tmp_path: Path) -> None:
    folder = folder_of(model("mixtral", {"bos_token_id": 1, "eos_token_id": [2, 4]}), tmp_path / "source")
    facts = read_huggingface(folder).tokenizer
    assert (facts.type, facts.bos, facts.eos, facts.pad) == ("none", 1, [2, 4], None)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "pad_token_id": 0}')
    facts = read_huggingface(folder).tokenizer
    assert (facts.bos, facts.eos, facts.pad) == (1, [5], 0)
    write_huggingface(tmp_path / "out", read_huggingface(folder), "card")
    assert loaded(tmp_path / "out").generation_config.eos_token_id == 5


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    folder = folder_of(model("olmoe", {}), tmp_path / "source")
    add_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(3))
    assert "inv_freq" not in " ".join(read_huggingface(folder).table)


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(model("olmoe", {}), tmp_path / "source")
    add_tensor(folder, "model.layers.0.mlp.shared_expert.up_proj.weight", torch.ones(3))
    with pytest.raises(BundleError, match=r"model\.layers\.0\.mlp\.shared_expert\.up_proj\.weight"):
        read_huggingface(folder)


def test_an_output_projection_that_is_not_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    folder = folder_of(model("mixtral", {}), tmp_path / "source")
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(BundleError, match=r"lm_head\.weight"):
        read_huggingface(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = folder_of(model("qwen3_moe", {}), tmp_path / "source")
    edit(folder, num_hidden_layers=3)
    with pytest.raises(BundleError, match=r"lacks the tensor model\.layers\.2\."):
        read_huggingface(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = folder_of(model("qwen3_moe", {}), tmp_path / "source")
    edit(folder, moe_intermediate_size=18)
    with pytest.raises(BundleError, match=r"experts\.0\.gate_proj\.weight with shape \[16, 24\].*\[18, 24\]"):
        read_huggingface(folder)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = folder_of(model("olmoe", {}), tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BundleError, match="safetensors"):
        read_huggingface(folder)


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")
