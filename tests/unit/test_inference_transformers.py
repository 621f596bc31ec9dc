"""Greedy text of an imported model is what transformers' own generate makes of it.

Both sides round differently (transformers computes norms, gates and rotations in float32 whatever the dtype), so a near tie of two
logits could fall either way. The test therefore asserts as well that no such tie occurs: the margin between the best two logits is
far larger than the difference of 1e-4 that import allows.
"""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moetrain.convert.huggingface import read_huggingface
from moetrain.inference.config import SamplingParams
from moetrain.inference.runtime import Runtime
from moetrain.store.bundle import write_bundle
from tests.unit.convert_kit import folder_of, model

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, window": ("mixtral", {"sliding_window": 5}),
    "mixtral, linear": ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, dense layers, bias": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3, "attention_bias": True}),
    "olmoe": ("olmoe", {}),
    "olmoe, clip": ("olmoe", {"clip_qkv": 0.5, "num_key_value_heads": None}),
}
PROMPT = [7, 31, 2, 58, 11, 0, 44, 19]
NUM_TOKENS = 30
MARGIN = 1e-3


def theirs(made: PreTrainedModel, eos: int | None) -> list[int]:
    """Their completion with its cache; ends with `eos` if that is drawn."""
    prompt = torch.tensor([PROMPT])
    text = made.generate(  # pyright: ignore[reportCallIssue]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return text[0, len(PROMPT) :].tolist()


def smallest_margin(made: PreTrainedModel, completion: list[int]) -> float:
    """Of all its choices, the closest second best."""
    logits_SV = made(torch.tensor([PROMPT + completion])).logits[0, len(PROMPT) - 1 : -1]
    best = logits_SV.topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).min())


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    made = model(family, changes)
    contents = read_huggingface(folder_of(made, tmp_path / "source"))
    write_bundle(tmp_path / "bundle", contents, "")
    expected = theirs(made, eos=None)
    assert len(expected) == NUM_TOKENS
    assert smallest_margin(made, expected) > MARGIN
    with Runtime.open(tmp_path / "bundle", device="cpu") as runtime:
        assert drawn(runtime, ()) == expected
        eos = expected[5]
        assert drawn(runtime, (eos,)) == theirs(made, eos)


def test_the_end_token_of_the_folder_ends_a_text(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", read_huggingface(folder_of(model("olmoe", {"eos_token_id": [3, 5]}), tmp_path / "source")), "")
    with Runtime.open(tmp_path / "bundle", device="cpu") as runtime:
        assert runtime.language.end_ids == (3, 5)


def drawn(runtime: Runtime, stop: tuple[int, ...]) -> list[int]:
    runtime.submit(PROMPT, SamplingParams(NUM_TOKENS, temperature=0, stop=stop))
    tokens: list[int] = []
    while not runtime.idle:
        tokens += [event.token for event in runtime.step()]
    return tokens
