"""Configuration keys: each is mapped, harmless, or refused by name with its value; a model without a class is refused too."""

from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from moetrain.base.errors import BundleError
from moetrain.config.composition import compose, to_config
from moetrain.convert.families import FAMILIES, choose, family_of, read_config, shortest_period, write_config
from moetrain.model.config import ModelConfig
from tests.unit.convert_kit import OWN, SIZES


def published(family: str, **changes: object) -> dict[str, object]:
    """A small config.json of the family; the value ... leaves a key out."""
    values = {"model_type": family, "architectures": [FAMILIES[family].class_name], **SIZES, **OWN[family], **changes}
    return {key: value for key, value in values.items() if value is not ...}


def read(family: str, **changes: object) -> ModelConfig:
    return read_config(published(family, **changes), "config.json")


REFUSED = [
    ("mixtral", {"hidden_act": "gelu"}),
    ("qwen3_moe", {"attention_dropout": 0.1}),
    ("mixtral", {"router_jitter_noise": 0.01}),
    ("mixtral", {"quantization_config": {"bits": 4}}),
    ("mixtral", {"partial_rotary_factor": 0.5}),
    ("mixtral", {"attention_bias": True}),
    ("mixtral", {"logit_softcapping": 30.0}),
    ("mixtral", {"num_experts": 7}),
    ("olmoe", {"sliding_window": 8}),
    ("olmoe", {"head_dim": 8}),
    ("olmoe", {"hidden_size": 26}),
    ("olmoe", {"tie_word_embeddings": "yes"}),
    ("olmoe", {"num_hidden_layers": 2.5}),
    ("olmoe", {"rms_norm_eps": None}),
    ("qwen3_moe", {"max_window_layers": 1, "use_sliding_window": True, "sliding_window": 4}),
    ("qwen3_moe", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen3_moe", {"decoder_sparse_step": 0}),
    ("qwen3_moe", {"mlp_only_layers": "all"}),
    ("qwen3_moe", {"auto_map": {"AutoModel": "remote.Model"}}),
    ("mixtral", {"rope_scaling": "linear"}),
]


@pytest.mark.parametrize(("family", "changes"), REFUSED)
def test_what_is_not_computed_is_refused_with_key_and_value(family: str, changes: dict[str, object]) -> None:
    name = next(iter(changes))
    shown = "num_attention_heads" if name == "hidden_size" else f"{name}={changes[name]!r}"
    with pytest.raises(BundleError) as error:
        read(family, **changes)
    assert shown in error.value.message
    assert error.value.message.startswith("config.json holds ")
    assert error.value.hint


@pytest.mark.parametrize(
    ("rope", "shown"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "type='longrope'"),
        ({"rope_type": "linear"}, "factor=None"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate=False"),
        ({"rope_type": "default", "mrope_section": [4, 4]}, "mrope_section=[4, 4]"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor=None"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention="),
    ],
)
def test_rotary_scalings_are_refused_by_name(rope: dict[str, object], shown: str) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(BundleError) as error:
            read("mixtral", **{key: rope})
        assert f"config.json holds {key}.{shown}" in error.value.message


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe", None])
def test_another_architecture_is_refused_with_the_known_ones(name: str | None) -> None:
    with pytest.raises(BundleError, match=f"model_type={name!r}") as error:
        family_of({"model_type": name}, "config.json")
    assert "mixtral, qwen3_moe, olmoe" in error.value.hint


def test_a_classifier_is_refused() -> None:
    with pytest.raises(BundleError, match="MixtralForSequenceClassification"):
        read("mixtral", architectures=["MixtralForSequenceClassification"])


def test_a_shape_that_cannot_be_is_refused() -> None:
    with pytest.raises(BundleError, match=r"top_k=9"):
        read("olmoe", num_experts_per_tok=9)
    with pytest.raises(BundleError, match=r"num_kv_heads=3"):
        read("mixtral", num_key_value_heads=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_keys_are_passed_over(family: str) -> None:
    extra = {"use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "4.40", "output_router_logits": True}
    assert read(family, **extra, pretraining_tp=1, quantization_config=None) == read(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_installed_transformers(family: str) -> None:
    made = AutoConfig.for_model(family)
    theirs, declared = made.to_dict(), made.default_config_fields()
    ours = dict(FAMILIES[family].defaults)
    assert ours.pop("rope_theta") == theirs["rope_parameters"]["rope_theta"]
    if family == "qwen3_moe":
        theirs |= {"num_experts": theirs["num_local_experts"], "sliding_window": declared["sliding_window"]}
        ours["mlp_only_layers"] = ours["mlp_only_layers"] or []
    if family == "olmoe":
        theirs["num_key_value_heads"] = declared.get("num_key_value_heads")
    assert {key: value for key, value in ours.items() if key in theirs} == {key: theirs[key] for key in ours if key in theirs}
    assert set(theirs) - set(ours) <= {
        "architectures", "attention_dropout", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "is_encoder_decoder",
        "model_type", "num_local_experts", "output_attentions", "output_hidden_states", "output_router_logits", "problem_type",
        "return_dict", "rope_parameters",
        "router_jitter_noise", "transformers_version", "use_cache", "_name_or_path",
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_is_understood(family: str) -> None:
    values = AutoConfig.for_model(family).to_dict()
    sizes = read_config({"model_type": family}, "config.json")
    assert read_config(values | {"architectures": [FAMILIES[family].class_name]}, "config.json") == sizes


def test_old_and_new_rotary_keys_mean_the_same() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    old = read("mixtral", rope_theta=77.0, rope_scaling=scaling)
    new = read("mixtral", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0})
    assert old == new
    assert (old.rope.theta, old.rope.factor) == (77.0, 2.0)


def test_rotary_keys_have_the_precedence_of_transformers() -> None:
    outer: dict[str, object] = {"rope_theta": 5.0, "original_max_position_embeddings": 32}
    scaling = {"rope_type": "yarn", "factor": None, "rope_theta": 9.0}
    theirs = AutoConfig.for_model("mixtral", **SIZES | OWN["mixtral"] | outer | {"rope_scaling": dict(scaling)})
    theirs.standardize_rope_params()  # as its rotary embedding does
    ours = read("mixtral", **outer, rope_scaling=scaling).rope
    assert ours.theta == theirs.rope_parameters["rope_theta"] == 9.0
    assert ours.original_max_position == theirs.rope_parameters["original_max_position_embeddings"] == 32
    assert ours.factor == 64 / 32


def test_balance_losses_agree_when_experts_are_even() -> None:
    # Hugging Face: coef * E * sum f P with sum f = k, over all layers at once; ours: 1 per layer and token, times its weight.
    config = read("olmoe", router_aux_loss_coef=0.06, num_hidden_layers=3)
    assert config.routing.auxiliary_loss_weight == pytest.approx(0.06 * 2 / 3)
    assert write_config(config, FAMILIES["olmoe"], "float32")["router_aux_loss_coef"] == 0.06


@given(st.lists(st.sampled_from(["dense", "moe"]), min_size=1, max_size=4), st.integers(1, 3))
def test_the_shortest_period_repeats_to_the_pattern(unit: list[str], times: int) -> None:
    period = shortest_period(unit * times)
    assert period * (len(unit) * times // len(period)) == unit * times
    assert len(period) <= len(unit)


BASE = {family: read(family) for family in FAMILIES}


def set_in(config: ModelConfig, key: str, value: object) -> ModelConfig:
    group, _, leaf = key.rpartition(".")
    if not group:
        return replace(config, **{leaf: value})
    held = {"attention": config.attention, "rope": config.rope, "routing": config.routing, "shortcut": config.shortcut}[group]
    return replace(config, **{group: replace(held, **{leaf: value})})


ROPE = {"scaling": "yarn", "factor": 2.0, "original_max_position": 32}


def with_rope(config: ModelConfig, **changes: object) -> ModelConfig:
    return replace(config, rope=replace(config.rope, **ROPE | changes))


# Where a field takes effect, for fields that need company.
SETTING: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "rope.scaling": lambda config: with_rope(config),
    "rope.factor": lambda config: with_rope(config, factor=3.0),
    "rope.original_max_position": lambda config: with_rope(config, original_max_position=16),
    "rope.low_frequency_factor": lambda config: with_rope(config, scaling="llama3", low_frequency_factor=2.0),
    "rope.high_frequency_factor": lambda config: with_rope(config, scaling="llama3", high_frequency_factor=8.0),
    "rope.beta_fast": lambda config: with_rope(config, beta_fast=16.0),
    "rope.beta_slow": lambda config: with_rope(config, beta_slow=2.0),
    "rope.attention_factor": lambda config: with_rope(config, attention_factor=1.5),
}
CHANGED: dict[str, object] = {
    "vocab_size": 61, "hidden_size": 32, "num_layers": 4, "pattern": ["dense", "moe"], "ffn_size": 44, "expert_ffn_size": 28,
    "max_position": 128, "norm_eps": 1e-3, "tie_embeddings": True, "init_std": 0.5, "attention.num_heads": 8,
    "attention.num_kv_heads": 1, "attention.head_dim": 12, "attention.qk_norm": "other", "attention.qkv_clip": 2.0,
    "attention.bias": True, "attention.sliding_window": 9,
    "rope.theta": 3.0, "routing.num_experts": 7, "routing.top_k": 3, "routing.score": "sigmoid", "routing.renormalize": "other",
    "routing.weight_scale": 2.5, "routing.auxiliary_loss_weight": 0.3, "routing.bias_update_rate": 0.01, "routing.capacity_factor": 1.25,
}  # fmt: skip
# No class reads these from a model that `choose` lets through: they belong to blocks it refuses, or only to training.
WITHOUT_EFFECT = {
    "shared_ffn_size", "num_shared_experts", "shared_gate", "shortcut.positions", "shortcut.distinct", "shortcut.pairs_per_bank",
    "routing.softmax_order", "routing.auxiliary_loss_scope",
    "routing.z_loss_weight", "routing.drop_order",
}  # fmt: skip


def leaves(cls: type, prefix: str = "") -> list[str]:
    found = []
    for entry in fields(cls):
        held = entry.default_factory() if callable(entry.default_factory) else entry.default
        found += leaves(type(held), f"{prefix}{entry.name}.") if is_dataclass(held) else [prefix + entry.name]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", [key for key in leaves(ModelConfig) if key not in WITHOUT_EFFECT])
def test_every_field_survives_the_export_or_is_refused_by_name(key: str, family: str) -> None:
    base = BASE[family]
    value = CHANGED.get(key)
    if value == "other":
        value = {"attention.qk_norm": "none" if family != "mixtral" else "full"}.get(key, not base.routing.renormalize)
    changed = SETTING[key](base) if key in SETTING else set_in(base, key, value)
    assert asdict(changed) != asdict(base)
    try:
        written = write_config(changed, choose(changed, family), "float32")
    except BundleError as error:
        # OLMoE's heads must fill hidden_size: whichever of the three moved, head_dim is what does not fit.
        named = "attention.head_dim" if family == "olmoe" and key in ("hidden_size", "attention.num_heads") else key
        assert f"model.{named}=" in error.message
        assert error.hint == "Use --format bundle."
        return
    back = read_config(written, "config.json")
    # A class with one FFN width has no second one to give back.
    ignored = {"shared_ffn_size": 0} | ({} if family == "qwen3_moe" else {"ffn_size": 0})
    if family != "qwen3_moe" and key == "ffn_size":
        assert write_config(changed, choose(changed, family), "float32") == write_config(base, choose(base), "float32")
        return
    assert replace(back, **ignored) == replace(changed, **ignored)


@pytest.mark.parametrize("block", ["scmoe", "shared", "shortcut", "dgmoe"])
def test_a_block_without_a_class_is_refused_with_the_way_out(block: str) -> None:
    with pytest.raises(BundleError, match=f"The block {block} has no Hugging Face class") as error:
        choose(replace(BASE["mixtral"], pattern=[block]))
    assert "--format bundle" in error.value.hint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_follows_from_the_model(family: str) -> None:
    assert choose(BASE[family]).name == family


def test_a_softmax_over_the_selected_is_a_renormalised_softmax() -> None:
    config = set_in(set_in(BASE["mixtral"], "routing.softmax_order", "after"), "routing.renormalize", False)
    assert choose(config).name == "mixtral"
    assert read_config(write_config(config, FAMILIES["mixtral"], "float32"), "config.json").routing.renormalize
    with pytest.raises(BundleError, match=r"model\.routing\.renormalize=False"):
        choose(set_in(BASE["mixtral"], "routing.renormalize", False))


def test_a_forced_class_must_fit_and_exist() -> None:
    with pytest.raises(BundleError, match=r"model\.attention\.qk_norm='none'.*OlmoeForCausalLM"):
        choose(BASE["mixtral"], "olmoe")
    with pytest.raises(BundleError, match="--architecture mixtrl") as error:
        choose(BASE["mixtral"], "mixtrl")
    assert error.value.hint == "Did you mean mixtral?"


@pytest.mark.parametrize(
    ("experiment", "family"),
    [("gpt_moe_8e_top2", "mixtral"), ("olmoe_1b_7b", "olmoe"), ("qwen3_30b_a3b", "qwen3_moe"), ("gpt_moe_8e", None)],
)
def test_the_shipped_experiments_have_the_class_they_promise(experiment: str, family: str | None) -> None:
    config = to_config(compose([f"+experiment={experiment}"])).model
    if family is None:
        with pytest.raises(BundleError, match="The block scmoe"):
            choose(config)
        return
    assert choose(config).name == family
    back = read_config(write_config(config, FAMILIES[family], "bfloat16"), "config.json")
    assert (back.attention, back.rope, back.blocks()) == (config.attention, config.rope, config.blocks())
