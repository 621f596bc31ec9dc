"""Tokenizers: exact round trips, the end token, streaming, and the files that transformers reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError, DataError
from moetrain.text.tokenizer import END_TOKEN, StreamDecoder, Tokenizer

SOURCE = Path(json.__file__).read_text()
BPE = Tokenizer.train([SOURCE, "naïve café 日本語 🙂\n"], 600)
BYTE = Tokenizer.byte()
EITHER = pytest.mark.parametrize("tokenizer", [BPE, BYTE], ids=["bpe", "byte"])
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(list(" \t\r\n.:()_ab0<|>🙂é\u0301\ufeff\x00"))), max_size=200)


@EITHER
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_any_text_survives_encode_and_decode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@EITHER
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_streamed_text_equals_decoded_text_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(index) for index in ids] + [stream.finish()]) == tokenizer.decode(ids)


def test_a_stream_never_shows_half_a_character() -> None:
    stream = StreamDecoder(BYTE)
    assert [stream.push(byte) for byte in "é🙂!".encode()] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.finish() == ""


def test_a_stream_cut_inside_a_character_ends_with_the_replacement_character() -> None:
    stream = StreamDecoder(BYTE)
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


@EITHER
def test_the_end_token_cannot_be_written_in_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = f"before {END_TOKEN} after"
    tokenizer.save(tmp_path)
    for each in (tokenizer, Tokenizer.load(tmp_path)):
        assert each.end_id not in each.encode(text)
        assert each.decode(each.encode(text)) == text
        assert each.decode([each.end_id, *each.encode("x"), each.end_id]) == "x"


def test_byte_ids_are_byte_values() -> None:
    assert BYTE.encode("aé\n") == list("aé\n".encode())
    assert (BYTE.end_id, BYTE.vocab_size, BYTE.is_byte, BPE.is_byte) == (256, 257, True, False)


def test_a_line_break_and_its_indentation_are_one_token_and_the_word_keeps_its_space() -> None:
    ids = BPE.encode("\n        return")
    assert [BPE.decode([index]) for index in ids] == ["\n       ", " return"]


def test_training_twice_gives_the_same_tokenizer() -> None:
    again = Tokenizer.train([SOURCE, "naïve café 日本語 🙂\n"], 600)
    assert again.fingerprint == BPE.fingerprint
    assert again.vocab_size == 600
    assert Tokenizer.train([SOURCE[:3000]], 600).fingerprint != BPE.fingerprint


def test_a_short_text_gives_a_smaller_vocabulary() -> None:
    assert 257 <= Tokenizer.train(["abab"], 4096).vocab_size < 300


def test_batches_equal_single_texts() -> None:
    texts = ["", "def f():\n    return 1\n", SOURCE[:500]]
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]


def test_a_loaded_tokenizer_is_the_same_from_file_or_folder(tmp_path: Path) -> None:
    BPE.save(tmp_path / "mine.json")
    BPE.save(tmp_path)
    for path in (tmp_path, tmp_path / "mine.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == BPE.fingerprint
        assert loaded.encode(SOURCE) == BPE.encode(SOURCE)


def test_a_foreign_end_token_is_found_in_tokenizer_config(tmp_path: Path) -> None:
    core = Tokenizer.byte().core
    core.add_special_tokens(["<|im_end|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.load(tmp_path).end_id == 257


def test_streaming_works_for_tokenizers_that_are_not_byte_level(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models

    vocab = {"</s>": 0, "▁a": 1, "b": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    core = Core(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    stream = StreamDecoder(tokenizer)
    ids = [2, 1, *(3 + byte for byte in "é".encode()), 2, tokenizer.end_id]
    assert [stream.push(index) for index in ids] == ["b", " a", "", "é", "b", ""]


@pytest.mark.parametrize(("content", "message"), [(None, "no tokenizer"), ("{", "not a tokenizer"), ("model", "no end-of-document")])
def test_unusable_tokenizer_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    from tokenizers import Tokenizer as Core
    from tokenizers import models

    if content is not None:
        text = Core(models.BPE(vocab={"a": 0}, merges=[])).to_str() if content == "model" else content
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=256"):
        Tokenizer.train(["a"], 256)


@EITHER
def test_transformers_reads_the_saved_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save_huggingface(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = SOURCE[:2000] + f" é🙂 {END_TOKEN} don 't\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.end_id, tokenizer.vocab_size)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert fast(text)["input_ids"] == tokenizer.encode(text)


def test_the_tokenizer_works_with_torch_blocked() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moetrain.text.tokenizer import Tokenizer\n"
        "assert Tokenizer.byte().decode(Tokenizer.train(['ab ab'], 260).encode('')) == ''\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
