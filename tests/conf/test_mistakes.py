"""Every mistake ends in one sentence: key, value, rule, closest valid name."""

import shutil
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError, ConfigError
from moetrain.config import EXPLAINED, TrainConfig, check, compose, conf_folder, describe_horizon, diff, explain, require_same, to_config
from moetrain.config.mistakes import suggest
from moetrain.data.config import CorpusConfig
from moetrain.optim.config import OptimConfig

COMMAND_LINE = [
    ("optim.lrr=1", "optim.lrr=1 is not possible: there is no such key. Did you mean optim.lr?"),
    ("model.routing.num_expertss=2", "there is no such key. Did you mean model.routing.num_experts?"),
    ("top_k=2", "top_k=2 is not possible: there is no such key. Did you mean model.routing.top_k?"),
    ("routing.top_k=2", "routing.top_k=2 is not possible: there is no such key. Did you mean model.routing.top_k?"),
    ("modell=small_moe", "modell=small_moe is not possible: there is no such key. Did you mean model?"),
    ("+optim.momentum=1", "optim.momentum=1 is not possible: there is no such key. Possible: lr, beta1,"),
    ("++optim.lrr=1", "optim.lrr=1 is not possible: there is no such key. Did you mean optim.lr?"),
    ("+experimnt=gpt_moe_8e", "Did you mean experiment?"),
    ("ckpt=full", "Possible: run, train, model, data, parallel, engine, optim, checkpoint, telemetry, profile, debug"),
    ("optim.lr=fast", "optim.lr=fast is not possible: it must be a number."),
    ("model.num_layers=1.5", "model.num_layers=1.5 is not possible: it must be a whole number."),
    ("model.tie_embeddings=maybe", "model.tie_embeddings=maybe is not possible: it must be true or false."),
    ("optim.beta1=null", "optim.beta1=null is not possible: it cannot be null."),
    ("model.pattern=moe", "model.pattern=moe is not possible: it must be a list. Write model.pattern=[...]."),
    ("model.routing=top2", "it is a group of keys, not a value. The group is chosen with routing=top2."),
    ("data.corpora=[{path:a,weigth:2}]", "its items have no key weigth. Did you mean weight?"),
    ("optim.lr=${nope}", "optim.lr is not possible: it refers to a key that does not exist (Interpolation key 'nope' not found)."),
    ("optim.lr=???", "optim.lr is not possible: it has no value."),
    ("optim.lr=1e-3,2e-3", "For a list write 'optim.lr=[1e-3,2e-3]'; for one run per value use launch/submit.py -m."),
    ("model=small_mo", "model=small_mo is not possible: there is no such option in conf/model. Did you mean small_moe? Possible: "),
    ("+experiment=gpt_moe_8", "+experiment=gpt_moe_8 is not possible: there is no such experiment. Did you mean gpt_moe_8e? Possible:"),
    ("+experiment=nothing_like_it", "there is no such experiment. Possible: gpt_125m_8e, gpt_350m_16e, gpt_moe_8e,"),
    ("experiment=gpt_moe_8e", "An experiment is added with a plus. Write +experiment=gpt_moe_8e."),
    ("gpt_moe_8e", "gpt_moe_8e is an experiment. Write +experiment=gpt_moe_8e."),
    ("optim.lr", "optim.lr is not an override: missing EQUAL at '<EOF>'. Write KEY=VALUE."),
    ("optim=3", "A group takes the name of one of its options. Groups: model, routing,"),
    ("~optim.lr", "optim.lr is not possible:"),
    ("+model=small_moe", "Multiple values for model."),
]


def sentence(*overrides: str) -> str:
    with pytest.raises(EXPLAINED) as error:
        to_config(compose(overrides))
    return explain(error.value)


@pytest.mark.parametrize(("override", "expected"), COMMAND_LINE, ids=[override for override, _ in COMMAND_LINE])
def test_command_line(override: str, expected: str) -> None:
    text = sentence(override)
    assert expected in text
    assert "\n" not in text


YAML = [
    (
        "model:\n  routing:\n    num_expertss: 6\n",
        "model.routing.num_expertss=6 in conf/experiment/mine.yaml is not possible: there is no such key. "
        "Did you mean model.routing.num_experts?",
    ),
    ("optim:\n  lr: fast\n", "optim.lr=fast in conf/experiment/mine.yaml is not possible: it must be a number."),
    (
        "modle:\n  num_layers: 2\n",
        "modle={'num_layers': 2} in conf/experiment/mine.yaml is not possible: there is no such key. Did you mean model?",
    ),
    ("defaults:\n  - override /routing: topp\n", "routing=topp is not possible: there is no such option in conf/routing. Did"),
    ("defaults:\n  - override /routin: top2\n", "routin is no group of options. Did you mean routing?"),
    ("model: [\n", "A YAML file cannot be read: while parsing a flow node"),
]


@pytest.mark.parametrize(("body", "expected"), YAML, ids=["key", "value", "group", "option", "override", "syntax"])
def test_yaml(body: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + body, encoding="utf-8")
    for module in ("composition", "mistakes"):
        monkeypatch.setattr(f"moetrain.config.{module}.conf_folder", lambda: tmp_path / "conf")
    text = sentence("+experiment=mine")
    assert text.startswith(expected)
    assert "\n" not in text


def test_key_of_a_group_file_is_found_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / "routing" / "mine.yaml").write_text("# @package model.routing\ntopk: 2\n", encoding="utf-8")
    for module in ("composition", "mistakes"):
        monkeypatch.setattr(f"moetrain.config.{module}.conf_folder", lambda: tmp_path / "conf")
    assert sentence("routing=mine").startswith("model.routing.topk=2 in conf/routing/mine.yaml is not possible")


RULES = [
    ("engine.dtype", "float16", "must be one of float32, float64"),
    ("engine.name", "jax", "must be one of torch"),
    ("parallel.dense", "zero", "must be one of replicate, fsdp"),
    ("optim.schedule", "cosin", "Did you mean cosine?"),
    ("telemetry.wandb", "yes", "must be one of off, online, offline"),
    ("checkpoint.mode", "expert", "Did you mean experts?"),
    ("checkpoint.experts_per_save", 9, "a layer has model.routing.num_experts=8"),
    ("checkpoint.snapshot_experts", 9, "a layer has model.routing.num_experts=8"),
    ("checkpoint.keep", 0, "at least 1"),
    ("checkpoint.resume", "", "auto, must, never or a path"),
    ("train.tokens", 0, "at least 1"),
    ("train.global_batch_tokens", 1000, "multiple of data.seq_len=256"),
    ("train.micro_batch_size", 3, "must divide the 8 sequences"),
    ("train.sample_every", -1, "at least 0"),
    ("optim.lr", 0.0, "must be positive"),
    ("optim.lr", float("nan"), "must be a finite number"),
    ("model.routing.capacity_factor", float("inf"), "must be a finite number"),
    ("model.routing.bias_update_rate", float("nan"), "must be a finite number"),
    ("data.corpora", [CorpusConfig("a", float("inf"))], "must be a finite number"),
    ("model.routing.weight_scale", -1.0, "must be positive"),
    ("model.attention.qkv_clip", -8.0, "must be positive"),
    ("optim.beta2", 1.0, "below 1"),
    ("optim.min_lr_ratio", 1.5, "between 0 and 1"),
    ("parallel.ep", 3, "divide the world of 2"),
    ("run.name", "a/b", "name of one folder"),
    ("run.name", "", "name of one folder"),
    ("run.folder", "", "runs need a folder"),
    ("data.seq_len", 512, "model.max_position=256"),
    ("data.vocab_size", 5000, "model.vocab_size=4096 embeddings"),
    ("model.num_layers", 3, "cannot fill it exactly"),
    ("model.routing.top_k", 9, "between 1 and num_experts=8"),
    ("debug.world", -1, "at least 0"),
    ("parallel.wire_dtype", "float8", "must be one of auto, same, bfloat16"),
    ("parallel.overlap.slot", -1, "at least 0"),
    ("parallel.overlap.max_chunks", 0, "at least 1"),
    ("parallel.overlap.max_chunks", 17, "at most 16"),
    ("parallel.overlap.chunks", 64, "at most 16"),
    ("profile.what", "memory", "must be one of trace, comm"),
]


def valid() -> TrainConfig:
    config = TrainConfig()
    config.data.corpora = [CorpusConfig("somewhere")]
    config.data.source = ["stdlib"]
    return config


def put(config: TrainConfig, key: str, value: object) -> None:
    parent, _, leaf = key.rpartition(".")
    node: object = config
    for name in parent.split("."):
        node = getattr(node, name)
    setattr(node, leaf, value)


def test_a_valid_configuration_passes() -> None:
    check(valid(), 2)


@pytest.mark.parametrize(("key", "value", "rule"), RULES, ids=[f"{key}={value}" for key, value, _ in RULES])
def test_broken_rule_names_key_value_and_rule(key: str, value: object, rule: str) -> None:
    config = valid()
    put(config, key, value)
    with pytest.raises(ConfigError) as error:
        check(config, 2)
    assert str(error.value).startswith(key) and " is not possible: " in str(error.value)
    assert isinstance(value, list) or f"{key}={value!r} is" in str(error.value)
    assert rule in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "autocast", "width", "rule"),
    [
        ("float64", "off", 704, "knows no float64"),
        ("float32", "off", 702, "multiples of 4"),
        ("float32", "auto", 700, "multiples of 8"),
        ("float32", "off", 700, None),
        ("float32", "bfloat16", 704, None),
    ],
)
def test_grouped_matmuls_are_refused_where_torch_has_none(dtype: str, autocast: str, width: int, rule: str | None) -> None:
    config = valid()
    config.engine.experts, config.engine.dtype, config.engine.autocast = "grouped_mm", dtype, autocast
    config.model.expert_ffn_size = width
    if rule is None:
        return check(config, 2)
    with pytest.raises(ConfigError, match=rf"engine.experts='grouped_mm' is not possible: .*{rule}.* engine\.experts=auto"):
        check(config, 2)


def test_rules_across_keys() -> None:
    config = valid()
    config.optim = OptimConfig(schedule="wsd", warmup_fraction=0.5, decay_fraction=0.75)
    with pytest.raises(ConfigError, match=r"optim.decay_fraction=0.75 .* add up to at most 1\."):
        check(config, 2)
    config = valid()
    config.engine.dtype, config.engine.autocast = "float64", "bfloat16"
    with pytest.raises(ConfigError, match=r"engine.autocast='bfloat16'"):
        check(config, 2)
    config = valid()
    config.train.sample_every, config.train.sample_prompts = 10, []
    with pytest.raises(ConfigError, match=r"train.sample_prompts"):
        check(config, 2)
    config = valid()
    config.data.corpora.append(CorpusConfig("elsewhere"))
    with pytest.raises(ConfigError, match=r"data.source=.* which lists 2"):
        check(config, 2)
    config = valid()
    config.data.corpora[0].weight = 0.0
    with pytest.raises(ConfigError, match=r"data.corpora\[0\].weight=0.0"):
        check(config, 2)


def test_training_without_a_corpus_says_how_to_make_one_and_planning_needs_none() -> None:
    config = valid()
    config.data.corpora, config.data.source = [CorpusConfig("")], []
    with pytest.raises(ConfigError, match="moetrain data prepare"):
        check(config, 2)
    config.debug.plan = True
    check(config, 2)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optim.learning_rate", "Possible: lr, beta1,"),
        ("optin.lr_peak", "Did you mean optim.lr?"),
        ("lr", "Did you mean optim.lr?"),
        ("model.attention.heads", "Did you mean model.attention.num_heads?"),
        ("model.attention.zzz", "Possible: num_heads, num_kv_heads,"),
        ("seed", "Did you mean run.seed or data.seed?"),
        ("zzz", "Possible: run, train, model,"),
    ],
)
def test_suggestions(key: str, expected: str) -> None:
    assert suggest(key).startswith(expected)


def test_changed_identity_is_refused_with_the_changes() -> None:
    assert diff({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: absent -> 4"]
    require_same({"a": 1}, {"a": 1}, "x")
    with pytest.raises(CheckpointError, match=r"runs/x was started with other values: optim.lr: 0.001 -> 0.002\..*allow_changes=true"):
        require_same({"optim.lr": 0.001}, {"optim.lr": 0.002}, "runs/x")


def test_a_longer_run_is_said_aloud() -> None:
    assert describe_horizon(5, 5, OptimConfig()) == ""
    assert "lengthened from 1,000 to 2,000 tokens" in describe_horizon(1000, 2000, OptimConfig())
    assert "cosine schedule (warm-up and decay)" in describe_horizon(1000, 2000, OptimConfig())
    assert "shortened" in describe_horizon(2000, 1000, OptimConfig())
    assert "constant schedule (warm-up)" in describe_horizon(1000, 2000, OptimConfig(schedule="constant"))
