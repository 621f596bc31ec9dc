"""A standard MoE goes to transformers and back: trained, exported, loaded there, imported, and the same greedy tokens everywhere."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moetrain import cli
from tests.e2e.jobs import losses, small_run, train_here

PROMPTS = ("def ", "import os\n", "    return self.")
NUM_TOKENS = 24
MARGIN = 1e-3  # between the best two logits, ten times what export may change


@pytest.mark.timeout(300)
def test_top2_trained_exported_loaded_imported_gives_equal_greedy_tokens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder, bundle = tmp_path / "run", tmp_path / "huggingface", tmp_path / "bundle"
    overrides = small_run(corpus, run, 200, "optim.lr=0.005", "checkpoint.every_steps=100", experiment="gpt_moe_8e_top2")
    assert train_here(overrides, monkeypatch) == 0
    curve = losses(run)
    assert len(curve) == 200
    assert curve[200] < curve[1] - 1, "it has learnt something"
    assert cli.main(["export", str(run), "--format", "huggingface", "--out", str(folder)]) == 0
    assert cli.main(["import", str(folder), "--out", str(bundle)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "MixtralForCausalLM"
    for prompt in PROMPTS:
        expected = tokenizer.decode(completion(model, tokenizer(prompt, return_tensors="pt").input_ids), skip_special_tokens=True)
        capsys.readouterr()
        assert cli.main(["generate", str(bundle), "--prompt", prompt, "--max-tokens", str(NUM_TOKENS), "--temperature", "0"]) == 0
        assert capsys.readouterr().out == expected + "\n"


def completion(model: PreTrainedModel, prompt_BS: Tensor) -> list[int]:
    """What transformers finds likeliest; no choice may be so close that rounding decides it."""
    found = model.generate(  # pyright: ignore[reportCallIssue]
        prompt_BS, max_new_tokens=NUM_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(found.logits)[:, 0].topk(2, dim=1).values
    assert float((best[:, 0] - best[:, 1]).min()) > MARGIN
    return found.sequences[0, prompt_BS.shape[1] :].tolist()
