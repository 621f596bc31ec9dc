"""From a bundle on disk to text: loading, the language of a bundle, streaming, stop strings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Core
from tokenizers.processors import TemplateProcessing

from moetrain.base.errors import BundleError, ConfigError
from moetrain.inference.config import SamplingParams
from moetrain.inference.generate import Piece, Stopper, generate, several
from moetrain.inference.language import Language
from moetrain.inference.load import load
from moetrain.inference.runtime import Runtime
from moetrain.store.bundle import Bundle, TokenizerFacts
from moetrain.text.tokenizer import Tokenizer
from tests.unit.inference_kit import CONFIGS, SMALL, filled, greedy_without_cache, routing, tokens, write_tiny_bundle

BYTES = replace(SMALL, vocab_size=257)
BYTE_FACTS = TokenizerFacts("byte", [256])
GREEDY = SamplingParams(max_tokens=20, temperature=0)


def texts_of(
    runtime: Runtime, prompts: list[str], params: list[SamplingParams], stop: list[str] | None = None
) -> tuple[list[str], list[Piece]]:
    """Whole completions, and the last piece of each."""
    texts, ends = [""] * len(prompts), {}
    for piece in generate(runtime, prompts, params, stop or []):
        assert piece.index not in ends
        texts[piece.index] += piece.text
        if piece.reason is not None:
            ends[piece.index] = piece
    return texts, [ends[index] for index in range(len(prompts))]


def byte_runtime(**changes: int) -> Runtime:
    return Runtime(filled(BYTES), Language(Tokenizer.byte(), (256,)), **changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bundle_computes_what_its_model_computed(name: str, tmp_path: Path) -> None:
    model = write_tiny_bundle(tmp_path / "bundle", CONFIGS[name], TokenizerFacts())
    loaded, language = load(tmp_path / "bundle", device="cpu")
    assert torch.equal(loaded(tokens(1, 2, 20)).logits_BSV, model(tokens(1, 2, 20)).logits_BSV)
    assert language.tokenizer is None


def test_a_bundle_opens_in_other_dtypes_with_its_balance_bias_kept_exact(tmp_path: Path) -> None:
    config = CONFIGS["sigmoid with bias balancing"]
    model = write_tiny_bundle(tmp_path / "bundle", config, TokenizerFacts())
    double, low = (load(tmp_path / "bundle", "cpu", dtype)[0] for dtype in ("float64", "bfloat16"))
    torch.testing.assert_close(double(tokens(1, 1, 9)).logits_BSV.float(), model(tokens(1, 1, 9)).logits_BSV, rtol=1e-4, atol=1e-4)
    assert low.embedding.weight.dtype == torch.bfloat16
    assert bool(low(tokens(1, 1, 9)).logits_BSV.isfinite().all())
    buffers = dict(low.named_buffers())
    for name, bias in model.named_buffers():
        assert torch.equal(buffers[name], bias)


def test_inference_is_dropless_so_company_cannot_change_a_completion(tmp_path: Path) -> None:
    """With the capacity of training, the model itself drops rows of a long sequence; the loaded one does not."""
    model = write_tiny_bundle(tmp_path / "bundle", routing(capacity_factor=0.3), TokenizerFacts())
    text = tokens(1, 1, 30)
    assert int(sum(stats.num_dropped for stats in model(text).stats)) > 0
    loaded, _ = load(tmp_path / "bundle", "cpu")
    assert int(sum(stats.num_dropped for stats in loaded(text).stats)) == 0
    assert torch.equal(loaded(text).logits_BSV, filled(SMALL, torch.float32)(text).logits_BSV)


@pytest.mark.parametrize(
    ("device", "dtype", "key"),
    [("tpu-ish", "float32", "device"), ("meta", "float32", "device"), ("cuda:99", "float32", "device"), ("cpu", "int8", "dtype")],
)
def test_a_device_or_dtype_that_is_not_there_is_named(device: str, dtype: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        load(tmp_path, device, dtype)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Runtime.open(tmp_path / "nothing", device="cpu")


def test_a_runtime_on_a_bundle_speaks_its_tokenizer(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle", BYTES, BYTE_FACTS)
    with Runtime.open(tmp_path / "bundle", "cpu", "float64") as runtime:
        (text,), (end,) = texts_of(runtime, ["Hi"], [GREEDY])
        expected = greedy_without_cache(runtime.model, [72, 105], 20)
    assert text == Tokenizer.byte().decode(expected)
    assert (end.num_tokens, end.reason) == (20, "length")


def test_prompts_begin_as_the_tokenizer_template_says(tmp_path: Path) -> None:
    core = Core.from_str(Tokenizer.byte().core.to_str())
    core.add_special_tokens([AddedToken("<s>", special=True)])
    core.post_processor = TemplateProcessing(single="<s> $A <|end|>", special_tokens=[("<s>", 257), ("<|end|>", 256)])
    core.save(str(tmp_path / "tokenizer.json"))
    write_tiny_bundle(tmp_path / "bundle", replace(SMALL, vocab_size=258), TokenizerFacts.of_folder(tmp_path, [256, 9], None, None))
    language = Language.of(Bundle.open(tmp_path / "bundle"))
    assert language.encode("Hi") == [257, 72, 105]
    assert language.end_ids == (256, 9)
    plain = Language(Tokenizer.byte(), (256,))
    assert plain.encode("Hi") == [72, 105]
    assert plain.encode("") == [256]


def test_a_bundle_without_tokenizer_refuses_text_in_a_sentence() -> None:
    with pytest.raises(BundleError, match="has no tokenizer"):
        next(generate(Runtime(filled(SMALL), Language(None, ())), ["Hi"], [GREEDY]))


def test_completions_of_a_batch_equal_those_made_alone() -> None:
    params = several(SamplingParams(max_tokens=25, temperature=1.5, top_p=1.0, seed=40), 5, stop=(256,))
    prompts = ["def f(", "", "x = 1\n", "import ", "a"]
    together, _ = texts_of(byte_runtime(max_batch=2), prompts, params)
    alone = [texts_of(byte_runtime(), [prompt], [asked])[0][0] for prompt, asked in zip(prompts, params, strict=True)]
    assert together == alone
    assert [asked.seed for asked in params] == [40, 41, 42, 43, 44]


def test_a_stop_token_is_not_shown_and_a_stop_string_ends_before_itself() -> None:
    runtime = byte_runtime()
    ids = greedy_without_cache(runtime.model, [72], 20)
    text = Tokenizer.byte().decode(ids)
    stop = next(token for token in ids[3:] if ids.index(token) >= 3)
    (cut,), (end,) = texts_of(runtime, ["H"], [replace(GREEDY, stop=(stop,))])
    assert cut == Tokenizer.byte().decode(ids[: ids.index(stop)])
    assert (end.num_tokens, end.reason) == (ids.index(stop) + 1, "stop")
    word = text[4:6]
    (cut,), (end,) = texts_of(runtime, ["H"], [GREEDY], ["never there", word])
    assert (cut, end.reason) == (text[: text.index(word)], "stop")
    assert runtime.idle


def test_leaving_early_frees_the_runtime() -> None:
    runtime = byte_runtime()
    pieces = generate(runtime, ["a", "b", "c"], [GREEDY] * 3)
    next(pieces)
    pieces.close()
    assert runtime.idle


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_wherever_the_pieces_break(pieces: list[str], stop: list[str]) -> None:
    stopper, whole = Stopper(stop), "".join(pieces)
    shown = "".join(stopper.push(piece) for piece in pieces) + stopper.flush()
    ends = [whole.find(word) for word in stop if word in whole]
    # The search goes piece by piece, so the stop string that is complete first wins; it is never shown, and nothing before it is lost.
    assert stopper.hit == bool(ends)
    assert whole.startswith(shown)
    if not stopper.hit:
        assert shown == whole
    else:
        assert all(word not in shown for word in stop)
        assert any(whole[len(shown) :].startswith(word) for word in stop)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string() -> None:
    stopper = Stopper(["\n\nclass"])
    assert [stopper.push(text) for text in ("a\n", "b\n", "\n", "cl", "ock", "\n\nclass x")] == ["a", "\nb", "", "", "\n\nclock", ""]
    assert stopper.hit
