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
MARGIN = 1e-4  # between the best two logits: nearer than this rounding may decide, which is another on every processor


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
    num_compared = 0
    for prompt in PROMPTS:
        tokens = completion(model, tokenizer(prompt, return_tensors="pt").input_ids)
        num_compared += len(tokens)
        capsys.readouterr()
        assert cli.main(["generate", str(bundle), "--prompt", prompt, "--max-tokens", str(len(tokens)), "--temperature", "0"]) == 0
        assert capsys.readouterr().out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    assert num_compared >= NUM_TOKENS


def completion(model: PreTrainedModel, prompt_BS: Tensor) -> list[int]:
    """What transformers finds likeliest, up to the first choice that is so close that rounding decides it."""
    found = model.generate(  # pyright: ignore[reportCallIssue]
        prompt_BS, max_new_tokens=NUM_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(found.logits)[:, 0].topk(2, dim=1).values
    is_close = (best[:, 0] - best[:, 1] <= MARGIN).tolist()
    num_sure = is_close.index(True) if True in is_close else NUM_TOKENS
    return found.sequences[0, prompt_BS.shape[1] :][:num_sure].tolist()
