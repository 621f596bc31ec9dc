"""A bundle as the start of a run and under `moetrain evaluate`: only the same function, only the same tokenizer."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moetrain import cli
from moetrain.base.errors import BundleError, ConfigError
from moetrain.config import compose, conf_folder, to_config
from moetrain.data.prepare import Request, prepare
from moetrain.model.config import ModelConfig, RopeConfig
from moetrain.model.shapes import parameter_shapes
from moetrain.store.bundle import Bundle, Contents, TokenizerFacts, write_bundle
from moetrain.store.shards import TensorInfo
from moetrain.text.tokenizer import Tokenizer
from moetrain.train.command import evaluate_folder, read_source
from moetrain.train.weights import require_same_model, require_same_tokenizer

MODEL = ModelConfig(vocab_size=300, hidden_size=16, ffn_size=16, expert_ffn_size=16, shared_ffn_size=16, num_layers=2, max_position=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that speaks bytes and was trained on windows of 32 tokens with document boundaries."""
    table = {name: TensorInfo(shape, "float32") for name, shape in parameter_shapes(MODEL).items()}
    facts: dict[str, object] = {"data": {"seq_len": 32, "document_boundaries": True}}
    tokenizer = TokenizerFacts("byte", [256])
    contents = Contents(asdict(MODEL), facts, tokenizer, table, lambda name: torch.full(table[name].shape, 0.01))
    target = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(target, contents, "card")
    return target


def corpus(folder: Path, tokenizer: str) -> Path:
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"one two three {number} " * 5)
    prepare(Request([str(text)], folder / "corpus", tokenizer, 280, validation=0.3))
    return folder / "corpus"


def test_what_only_training_asks_for_may_differ(folder: Path) -> None:
    routing = replace(MODEL.routing, auxiliary_loss_weight=0.5, z_loss_weight=0.1, capacity_factor=2.0)
    require_same_model(Bundle.open(folder), replace(MODEL, routing=routing, init_std=1.0, max_position=32))


def test_another_function_of_the_same_shapes_is_refused_by_key(folder: Path) -> None:
    other = replace(MODEL, rope=RopeConfig(theta=5.0), routing=replace(MODEL.routing, top_k=2), max_position=128)
    with pytest.raises(BundleError) as error:
        require_same_model(Bundle.open(folder), other)
    assert error.value.message.endswith(
        "is another model: model.max_position: 64 -> 128; model.rope.theta: 10000.0 -> 5.0; model.routing.top_k: 1 -> 2."
    )
    assert "moetrain config --from-bundle" in error.value.hint


def test_another_tokenizer_is_refused(folder: Path) -> None:
    require_same_tokenizer(Bundle.open(folder), Tokenizer.byte().fingerprint)
    with pytest.raises(BundleError, match="another tokenizer than the corpus"):
        require_same_tokenizer(Bundle.open(folder), "0123")


def test_the_model_of_a_bundle_becomes_an_option(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", "--from-bundle", str(folder)]) == 0
    shutil.copytree(conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(capsys.readouterr().out)
    for module in ("composition", "mistakes"):
        monkeypatch.setattr(f"moetrain.config.{module}.conf_folder", lambda: tmp_path / "conf")
    assert to_config(compose(["model=mine"])).model == MODEL


def test_a_bundle_is_evaluated_as_it_was_trained(folder: Path, tmp_path: Path) -> None:
    source = read_source(folder)
    assert (source.seq_len, source.document_boundaries, source.tokenizer) == (32, True, Tokenizer.byte().fingerprint)
    result = evaluate_folder(folder, source, corpus(tmp_path, "byte"), "validation", source.seq_len)
    assert result.num_tokens > 100
    with pytest.raises(ConfigError, match="--seq-len=65"):
        evaluate_folder(folder, source, tmp_path / "corpus", "validation", 65)


def test_a_bundle_without_facts_has_a_window_that_fits_memory(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["training"], values["model"]["max_position"] = {}, 131_072
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_source(tmp_path).seq_len == 2048


def test_evaluation_refuses_the_text_of_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="was prepared with another tokenizer"):
        evaluate_folder(folder, read_source(folder), corpus(tmp_path, "train"), "validation", 32)
