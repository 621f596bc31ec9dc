"""Every YAML file composes, is checked, planned, and says only what differs; published models have their published sizes."""

from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from moetrain.config import TrainConfig, check, compose, conf_folder, identity, options, plan, to_config
from moetrain.config.changes import flatten
from moetrain.config.folder import GROUPS
from moetrain.config.mistakes import all_keys
from moetrain.model.count import count_parameters

EXPERIMENTS = list(options("experiment"))
CHOICES = [(group, option) for group in GROUPS if group != "experiment" for option in options(group)]
FILES = sorted(conf_folder().rglob("*.yaml"))
WORLDS = (1, 2, 3, 8, 64, 512)


@cache
def composed(*overrides: str) -> DictConfig:
    return compose(overrides)


def configured(*overrides: str) -> TrainConfig:
    return to_config(composed(*overrides))


def experiment(name: str, *overrides: str) -> TrainConfig:
    return configured(f"+experiment={name}", *overrides)


def test_the_promised_experiments_are_there() -> None:
    assert set(EXPERIMENTS) >= {"gpt_moe_8e", "gpt_moe_8e_top2", "gpt_125m_8e", "gpt_350m_16e", "olmoe_1b_7b", "qwen3_30b_a3b"}


def test_nothing_chosen_is_the_defaults_of_the_dataclasses() -> None:
    chosen, plain = flatten(configured()), flatten(TrainConfig())
    assert {key for key in chosen if chosen[key] != plain[key]} == {"data.corpora", "data.source"}


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    config = configured(f"{group}={option}")
    config.debug.plan = True  # no corpus is needed to look
    check(config, 1)
    assert plan(config, 1).num_steps > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_planned_for_any_world(name: str) -> None:
    config = experiment(name)
    config.debug.plan = True
    assert config.run.name == name
    for world in WORLDS:
        check(config, world)
        assert plan(config, world).axes.world == world


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_would_start(name: str) -> None:
    """On one, two and four ranks, with a corpus given where the experiment does not bring one."""
    config = experiment(name)
    config.data.corpora[0].path = config.data.corpora[0].path or "somewhere"
    for world in (1, 2, 4):
        check(config, world)
        assert plan(config, world).notes == ()


def test_no_experiment_is_in_the_primary_file() -> None:
    """With an entry for it, `+experiment=x` would fail, or lose against the primary file."""
    primary = OmegaConf.load(conf_folder() / "train.yaml")
    assert isinstance(primary, DictConfig)
    assert not any("experiment" in str(entry) for entry in primary.defaults)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(conf_folder())))
def test_every_file_begins_with_what_it_is(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    packages = {"experiment": "# @package _global_", "routing": "# @package model.routing"}
    if file.parent.name in packages:
        assert lines.pop(0) == packages[file.parent.name]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize(("group", "option"), [*CHOICES, *[("experiment", name) for name in EXPERIMENTS]])
def test_files_hold_differences_only(group: str, option: str) -> None:
    prefix = {"experiment": "", "routing": "model.routing."}.get(group, f"{group}.")
    tree = OmegaConf.load(conf_folder() / group / f"{option}.yaml")
    defaults = flatten(TrainConfig())
    for key, value in leaves(OmegaConf.to_container(tree) or {}, prefix):
        if not key.startswith("defaults"):
            assert defaults[key] != value, f"{key}={value} is the default"


def leaves(tree: object, prefix: str) -> list[tuple[str, object]]:
    if not isinstance(tree, dict):
        return [(prefix.rstrip("."), tree)]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}{key}.")]


def test_routing_group_writes_into_the_model_and_wins_over_it() -> None:
    config = configured("model=olmoe_1b_7b", "routing=top2", "debug=plan")
    assert (config.model.routing.top_k, config.model.routing.num_experts) == (2, 64)


def test_command_line_wins_over_the_experiment() -> None:
    assert experiment("gpt_350m_16e", "optim.lr=1e-5").optim.lr == 1e-5


def test_stdlib_follows_the_vocabulary_of_the_model() -> None:
    config = configured("model.vocab_size=8192")
    assert config.data.vocab_size == 8192
    assert config.data.corpora[0].path == "prepared/stdlib-8192"


@pytest.mark.parametrize(
    ("name", "total", "tolerance"),
    [
        ("gpt_125m_8e", 323e6, 0.01),
        ("gpt_350m_16e", 1.867e9, 0.002),
        ("olmoe_1b_7b", 6_919_161_856, 0),
        ("qwen3_30b_a3b", 30_532_122_624, 0),
    ],
)
def test_published_sizes(name: str, total: float, tolerance: float) -> None:
    assert count_parameters(experiment(name).model).total == pytest.approx(total, rel=tolerance, abs=0)


@pytest.mark.parametrize(("name", "active"), [("olmoe_1b_7b", 1.28e9), ("qwen3_30b_a3b", 3.35e9)])
def test_published_active_sizes(name: str, active: float) -> None:
    assert count_parameters(experiment(name).model).active == pytest.approx(active, rel=0.005)


PUBLISHED = {
    "olmoe_1b_7b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_layers": 16,
        "expert_ffn_size": 1024,
        "max_position": 4096,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "rope.theta": 1e4,
        "attention.num_heads": 16,
        "attention.num_kv_heads": 16,
        "attention.head_dim": 128,
        "attention.qk_norm": "full",
        "attention.qkv_clip": None,
        "attention.bias": False,
        "routing.num_experts": 64,
        "routing.top_k": 8,
        "routing.renormalize": False,
        "routing.auxiliary_loss_weight": 0.01,
        "routing.z_loss_weight": 0.001,
    },
    "qwen3_30b_a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_layers": 48,
        "expert_ffn_size": 768,
        "max_position": 40960,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "rope.theta": 1e6,
        "attention.num_heads": 32,
        "attention.num_kv_heads": 4,
        "attention.head_dim": 128,
        "attention.qk_norm": "head",
        "attention.qkv_clip": None,
        "attention.bias": False,
        "routing.num_experts": 128,
        "routing.top_k": 8,
        "routing.renormalize": True,
        "routing.auxiliary_loss_weight": 0.001,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    model = flatten(experiment(name).model)
    assert {key: model[key] for key in PUBLISHED[name]} == PUBLISHED[name]


SAME_RUN = {
    "parallel.ep": 2,
    "parallel.dense": "fsdp",
    "parallel.timeout_seconds": 9,
    "train.micro_batch_size": 4,
    "train.accumulation": 4,
    "run.folder": "elsewhere",
    "telemetry.wandb": "offline",
    "checkpoint.mode": "full",
    "checkpoint.every_steps": 7,
    "train.tokens": 9999,
    "train.evaluate_every": 3,
    "profile.start_step": 9,
    "engine.recompute": True,
    "engine.autocast": "off",
    "run.stop_after": 4,
    "data.name": "other",
}
OTHER_RUN = {
    "run.seed": 2,
    "train.global_batch_tokens": 8192,
    "model.num_layers": 6,
    "model.routing.top_k": 2,
    "optim.lr": 1,
    "optim.schedule": "wsd",
    "data.seed": 1,
    "data.seq_len": 128,
    "data.document_boundaries": True,
    "engine.dtype": "float64",
    "data.corpora.0.weight": 2,
    "checkpoint.init_from": "x",
    "model.shortcut.positions": [1],
}


def test_identity_knows_the_run_and_not_where_it_runs() -> None:
    base = identity(experiment("gpt_moe_8e"))
    for key, value in (SAME_RUN | OTHER_RUN).items():
        changed = composed("+experiment=gpt_moe_8e").copy()
        OmegaConf.update(changed, key, value)
        assert (identity(to_config(changed)) == base) == (key in SAME_RUN), key


def test_every_key_is_known_to_identity_or_left_out_on_purpose() -> None:
    """A new group must be thought about: this list is short, and keys outside it and outside IDENTITY fail."""
    from moetrain.config.changes import IDENTITY

    free = ("run.", "train.", "data.", "parallel.", "engine.", "checkpoint.", "telemetry.", "profile.", "debug.")
    for key in flatten(TrainConfig()):
        assert key.startswith(free) or any(key.startswith(root) for root in IDENTITY)
    assert set(IDENTITY) <= set(all_keys())


def test_a_config_survives_yaml() -> None:
    config = experiment("qwen3_30b_a3b")
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert asdict(to_config(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.create(text)))) == asdict(config)  # pyright: ignore
