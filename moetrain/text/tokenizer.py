"""Text to token ids and back: byte-level BPE of the tokenizers library, or plain bytes (the same thing without merges). No torch."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from moetrain.base.errors import BundleError, ConfigError, DataError

END_TOKEN = "<|end|>"
MIN_VOCAB_SIZE = 257  # every byte and the end-of-document token
FILE = "tokenizer.json"

# What foreign tokenizers call the token behind a document, if no tokenizer_config.json says it.
_END_NAMES = (END_TOKEN, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer:
    """Token ids of a text, without any special token added; the end token's text inside a document is ordinary text.

    Any UTF-8 text survives encode and decode unchanged, for tokenizers made here and for loaded byte-level ones without a normalizer.
    """

    def __init__(self, core: tokenizers.Tokenizer, end_token: str) -> None:
        core.add_special_tokens([AddedToken(end_token, special=True, normalized=False)])
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self.core = core
        self.end_token = end_token
        end_id = core.token_to_id(end_token)
        assert end_id is not None
        self.end_id: int = end_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """BPE with at most `vocab_size` tokens (fewer when the text runs out of pairs). ConfigError below 257."""
        if vocab_size < MIN_VOCAB_SIZE:
            rule = f"256 bytes and the end-of-document token need {MIN_VOCAB_SIZE}"
            raise ConfigError.of("vocab_size", vocab_size, rule, "Use tokenizer=byte for the smallest vocabulary.")
        core = _byte_level(models.BPE(), use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(END_TOKEN, special=True, normalized=False)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core, END_TOKEN)

    @classmethod
    def byte(cls) -> "Tokenizer":
        """Token id = byte value, and 256 for the end of a document."""
        vocab = {character: byte for character, byte in _byte_of_character().items()}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False), END_TOKEN)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads a tokenizer.json, or the folder it lies in. DataError: absent, damaged, or without an end-of-document token."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"There is no tokenizer at {path}.", f"Expected a {FILE} or a folder that holds one.")
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for everything it cannot parse
            raise DataError(f"{file} is not a tokenizer: {error}.", "Expected the tokenizer.json of the tokenizers library.") from error
        return cls(core, _end_token(core, file))

    @property
    def vocab_size(self) -> int:
        """The highest id plus one: rows an embedding needs."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def is_byte(self) -> bool:
        """Whether ids are byte values."""
        return self.core.get_vocab(with_added_tokens=False) == _byte_of_character()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the meaning of the tokenizer.json; equal for equal tokenizers."""
        return hashlib.sha256(json.dumps(json.loads(self.core.to_str()), sort_keys=True).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> dict[int, bytes] | None:
        """The bytes of every ordinary token; None when the tokenizer does not work on bytes."""
        if not isinstance(self.core.decoder, decoders.ByteLevel):
            return None
        byte_of = _byte_of_character()
        added = self.core.get_added_tokens_decoder()
        table = {index: bytes(byte_of[c] for c in token) for token, index in self.core.get_vocab(False).items() if index not in added}
        return table | {index: token.content.encode() for index, token in added.items() if not token.special}

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; uses every core unless TOKENIZERS_PARALLELISM=false."""
        return [encoding.ids for encoding in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self.core.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path | str) -> None:
        """Writes a tokenizer.json; into the folder if `path` is one."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        file.write_text(self.core.to_str(pretty=True), encoding="utf-8")

    def save_huggingface(self, folder: Path | str) -> None:
        """Writes what transformers' AutoTokenizer reads: tokenizer.json and tokenizer_config.json. BundleError: no such folder."""
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder.", "Create it before the tokenizer is written.")
        self.save(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_token,
            "bos_token": self.end_token,
            "pad_token": self.end_token,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class StreamDecoder:
    """Text of a growing sequence of ids; holds bytes back until their character is complete. One per sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces = decoders.DecodeStream(skip_special_tokens=True)  # for tokenizers that do not work on bytes

    def push(self, token_id: int) -> str:
        """The text that this id completes, often "" inside a multi-byte character."""
        table = self._tokenizer.token_bytes
        if table is None:
            return self._pieces.step(self._tokenizer.core, token_id) or ""
        return self._utf8.decode(table.get(token_id, b""))

    def finish(self) -> str:
        """U+FFFD if the sequence ended inside a character, else ""."""
        return self._utf8.decode(b"", final=True)


def _byte_level(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    """With GPT-2's rule for what may merge: a word with one space in front, a run of digits, of signs, or of white space.

    Measured on the standard library at 4096 tokens: rules that glue line breaks, dots and brackets on give up to 9 % more bytes per token,
    but a small model trained on equally many tokens then needs 1.6 % more bits per byte: it has more to learn per token.
    """
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    core.decoder = decoders.ByteLevel()
    return core


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in that byte-level tokenizers use for each byte: itself, or the next free character from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _end_token(core: tokenizers.Tokenizer, file: Path) -> str:
    """The end-of-document token's text: `eos_token` of the tokenizer_config.json beside the file, or a usual name."""
    config = file.parent / "tokenizer_config.json"
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise DataError(f"{config} is not JSON: {error}.") from error
        name = named["content"] if isinstance(named, dict) else named
        if name and core.token_to_id(name) is not None:
            return name
    for name in _END_NAMES:
        if core.token_to_id(name) is not None:
            return name
    raise DataError(f"{file} has no end-of-document token.", f"Name it as eos_token in {config}, or use one of {', '.join(_END_NAMES)}.")
