"""From a run's checkpoint to a bundle and a Hugging Face folder, and back in, through the commands."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moetrain.base.clock import SystemClock
from moetrain.base.errors import BundleError, CheckpointError, MoetrainError
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import alone
from moetrain.convert.card import model_card
from moetrain.convert.command import add_parsers
from moetrain.convert.run import code_commit, fragments
from moetrain.model.config import ModelConfig
from moetrain.model.state import ModelState
from moetrain.store.bundle import Bundle
from moetrain.telemetry.experts import Snapshot, save_snapshot
from moetrain.text.tokenizer import Tokenizer
from tests.unit.convert_kit import folder_of, model, their_logits
from tests.unit.inference_kit import CONFIGS, filled

# Routing that Mixtral has: renormalised top-2.
MIXTRAL_LIKE = replace(CONFIGS["untied"], vocab_size=300, routing=replace(CONFIGS["moe"].routing, renormalize=True))


def moetrain(*words: object) -> int:
    """One command line, in this process."""
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def state_of(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in filled(config, seed=seed).state_dict().items()}


def fragments_of(state: dict[str, torch.Tensor]) -> ModelState:
    return [fragment for name, tensor in state.items() for fragment in fragments(name, tensor)]


def save_run(folder: Path, config: ModelConfig, states: list[dict[str, torch.Tensor]]) -> Path:
    """A run folder with one checkpoint per state: the first full, the others one expert per layer."""
    run = folder / "runs/tiny"
    checkpointer = Checkpointer(run / "checkpoint", CheckpointConfig(), 0, 1, alone, SystemClock())
    for number, state in enumerate(states):
        checkpointer.save(fragments_of(state), {"step": 10 * (number + 1), "tokens": 640 * (number + 1), "samples": 0}).wait_copied()
    checkpointer.finish(60)
    corpus = folder / "prepared/text"
    corpus.mkdir(parents=True)
    Tokenizer.train(["one two three " * 20], 290).save(corpus)
    data = {"name": "text", "seq_len": 32, "corpora": [{"path": "prepared/text", "weight": 1.0}]}
    settings = {"run": {"name": "tiny", "seed": 3, "folder": "runs"}, "model": asdict(config), "data": data}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    records = [
        {"train/step": 10, "train/tokens": 640, "evaluation/loss": 3.5, "evaluation/bits_per_byte": 2.5},
        {"train/step": 10 * len(states) + 5, "train/tokens": 1, "evaluation/loss": 1.0, "evaluation/bits_per_byte": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    load_LE = np.array([[5, 0, 5, 5, 5], [4, 4, 4, 4, 4]])[: len(config.banks())]
    save_snapshot(run, Snapshot(10, load_LE, tuple(config.banks())))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("work"), MIXTRAL_LIKE, [state_of(MIXTRAL_LIKE, 1), state_of(MIXTRAL_LIKE, 2)])


def test_a_bundle_holds_what_the_checkpoint_restores(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moetrain("export", run, "--out", tmp_path / "bundle") == 0
    assert "Wrote the model of step 20" in capsys.readouterr().out
    bundle = Bundle.open(tmp_path / "bundle")
    assert ModelConfig.from_dict(bundle.config) == MIXTRAL_LIKE
    old, new = state_of(MIXTRAL_LIKE, 1), state_of(MIXTRAL_LIKE, 2)
    assert list(bundle.tensors) == list(new)
    for name, tensor in bundle.tensors.items():
        if ".experts." not in name:
            assert torch.equal(tensor, new[name])
            continue
        fresh = [torch.equal(tensor[e], new[name][e]) for e in range(5)]
        stale = [torch.equal(tensor[e], old[name][e]) for e in range(5)]
        assert (sum(fresh), sum(stale)) == (1, 4)  # the second save was partial: one expert per layer


def test_facts_and_card_say_what_the_run_folder_says(run: Path, tmp_path: Path) -> None:
    moetrain("export", run, "--out", tmp_path / "bundle")
    facts = Bundle.open(tmp_path / "bundle").training
    assert (facts["run"], facts["step"], facts["tokens"], facts["seed"]) == ("tiny", 20, 1280, 3)
    assert facts["evaluation"] == {"step": 10, "loss": 3.5, "bits_per_byte": 2.5}  # not the one after the exported step
    assert facts["experts"] == [
        {"bank": "blocks.0.moe.experts", "oldest_steps": 10, "load_max_over_mean": 1.25, "dead_experts": 1},
        {"bank": "blocks.1.moe.experts", "oldest_steps": 10, "load_max_over_mean": 1.0, "dead_experts": 0},
    ]
    card = (tmp_path / "bundle/README.md").read_text()
    assert "| evaluation bits per byte | 2.5 |" in card
    assert "| blocks.0.moe.experts | 10 | 1.25 | 1 |" in card
    assert "| tokens | 1280 |" in card
    assert "moetrain generate" in card
    total = sum(tensor.numel() for tensor in state_of(MIXTRAL_LIKE, 1).values())
    assert f"| parameters, total | {total:,} |" in card
    if (commit := code_commit()) is not None:
        assert f"| commit | {commit} |" in card


def test_a_run_becomes_a_folder_that_transformers_loads(run: Path, tmp_path: Path) -> None:
    assert moetrain("export", run, "--format", "huggingface", "--out", tmp_path / "hf") == 0
    moetrain("export", run, "--out", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    ours = filled(MIXTRAL_LIKE, torch.float32)
    ours.load_state_dict(dict(bundle.tensors))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "one two three"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == Tokenizer.load(tmp_path / "hf").encode(text)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids).logits_BSV, rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == Tokenizer.load(tmp_path / "hf").end_id
    assert "from_pretrained" in (tmp_path / "hf/README.md").read_text()


def test_a_bundle_becomes_a_folder_and_a_folder_a_bundle(run: Path, tmp_path: Path) -> None:
    moetrain("export", run, "--out", tmp_path / "first")
    moetrain("export", tmp_path / "first", "--format", "huggingface", "--out", tmp_path / "hf")
    assert moetrain("import", tmp_path / "hf", "--out", tmp_path / "second") == 0
    first, second = Bundle.open(tmp_path / "first"), Bundle.open(tmp_path / "second")
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in first.tensors.items())
    assert second.tokenizer_facts.eos == first.tokenizer_facts.eos
    assert second.tokenizer is not None
    assert ModelConfig.from_dict(second.config).routing == MIXTRAL_LIKE.routing


def test_half_precision_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    moetrain("export", run, "--out", tmp_path / "full")
    moetrain("export", run, "--dtype", "bfloat16", "--out", tmp_path / "half")
    full, half = Bundle.open(tmp_path / "full"), Bundle.open(tmp_path / "half")
    assert {info.dtype for info in half.tensors.table.values()} == {"bfloat16"}
    assert torch.equal(half.tensors["embedding.weight"], full.tensors["embedding.weight"].bfloat16())


def test_a_run_with_an_own_block_exports_as_a_bundle_only(tmp_path: Path) -> None:
    config = replace(CONFIGS["scmoe 2"], routing=replace(CONFIGS["moe"].routing, bias_update_rate=0.01))
    state = state_of(config, 4)
    run = save_run(tmp_path, config, [state])
    with pytest.raises(BundleError, match="The block scmoe has no Hugging Face class") as error:
        moetrain("export", run, "--format", "huggingface", "--out", tmp_path / "hf")
    assert "--format bundle" in error.value.hint
    assert not (tmp_path / "hf").exists()
    moetrain("export", run, "--out", tmp_path / "bundle", "--dtype", "float16")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.tensors.table["blocks.0.moe.router.balance_bias"].dtype == "float32"
    assert torch.equal(bundle.tensors["blocks.0.moe.router.balance_bias"], state["blocks.0.moe.router.balance_bias"])


def test_the_tokenizer_can_be_given(run: Path, tmp_path: Path) -> None:
    moetrain("export", run, "--out", tmp_path / "byte", "--tokenizer", "byte")
    assert Bundle.open(tmp_path / "byte").tokenizer_facts.type == "byte"
    moetrain("export", tmp_path / "byte", "--format", "huggingface", "--out", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("né").input_ids == list("né".encode())
    source = folder_of(model("mixtral", {}), tmp_path / "source")
    moetrain("import", source, "--out", tmp_path / "imported", "--tokenizer", run.parent.parent / "prepared/text/tokenizer.json")
    assert Bundle.open(tmp_path / "imported").tokenizer is not None


def test_an_imported_folder_serves_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = model("olmoe", {})
    assert moetrain("import", folder_of(made, tmp_path / "source"), "--out", tmp_path / "bundle") == 0
    assert "Wrote the model to" in capsys.readouterr().out
    assert Bundle.open(tmp_path / "bundle").training == {"imported_from": "OlmoeForCausalLM"}
    moetrain("export", tmp_path / "bundle", "--format", "huggingface", "--out", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").requires_grad_(False)
    assert torch.equal(their_logits(again), their_logits(made))


def test_mistakes_are_sentences_with_a_way_out(run: Path, tmp_path: Path) -> None:
    source = folder_of(model("mixtral", {}), tmp_path / "source")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((run / "config.yaml").read_text())
    mistakes: list[tuple[type[MoetrainError], str, list[object]]] = [
        (BundleError, "neither a run", ["export", tmp_path / "nothing", "--out", tmp_path / "x"]),
        (BundleError, "moetrain import", ["export", source, "--out", tmp_path / "x"]),
        (BundleError, "Hugging Face class", ["export", run, "--architecture", "mixtral", "--out", tmp_path / "x"]),
        (BundleError, "olmoe", ["export", run, "--format", "huggingface", "--architecture", "olmo", "--out", tmp_path / "x"]),
        (CheckpointError, "no checkpoint", ["export", bare, "--out", tmp_path / "x"]),
        (BundleError, "does not exist", ["import", tmp_path / "nothing", "--out", tmp_path / "x"]),
        (BundleError, "exists", ["import", source, "--out", source]),
        (MoetrainError, "no tokenizer", ["export", run, "--out", tmp_path / "x", "--tokenizer", tmp_path / "none.json"]),
    ]
    for kind, sentence, words in mistakes:
        with pytest.raises(kind) as error:
            moetrain(*words)
        assert sentence in str(error.value)
        assert error.value.hint
    assert not (tmp_path / "x").exists()


def test_a_missing_corpus_asks_for_the_tokenizer(tmp_path: Path) -> None:
    run = save_run(tmp_path, MIXTRAL_LIKE, [state_of(MIXTRAL_LIKE, 1)])
    (tmp_path / "prepared/text/tokenizer.json").unlink()
    with pytest.raises(BundleError, match="prepared/text is not here") as error:
        moetrain("export", run, "--out", tmp_path / "x")
    assert "--tokenizer" in error.value.hint


def test_a_damaged_configuration_is_a_sentence(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for text, sentence in (("a: [", "damaged"), ("run: {}", "no group model"), ("[1]", "no configuration")):
        (broken / "config.yaml").write_text(text)
        with pytest.raises(BundleError, match=sentence):
            moetrain("export", broken, "--out", tmp_path / "x")


def test_a_card_without_facts_says_so(tmp_path: Path, run: Path) -> None:
    moetrain("export", run, "--out", tmp_path / "bundle")
    contents = Bundle.open(tmp_path / "bundle").contents
    contents.training = {}
    assert "Nothing is recorded." in model_card(contents, "tiny", "bundle")
