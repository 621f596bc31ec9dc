"""Tokenizer files of a Hugging Face folder."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moetrain.base.log import logger
from moetrain.model.config import ModelConfig
from moetrain.store.bundle import TokenizerFacts, copy_files


def write_tokenizer(folder: Path, tokenizer: TokenizerFacts, config: ModelConfig) -> None:
    """Copies the tokenizer's files; a byte tokenizer is written as a tokenizer.json that encodes the same ids.

    A tokenizer_config.json is made if the bundle carries none, so that AutoTokenizer finds class and special tokens.
    """
    if tokenizer.type == "none":
        logger("convert").warning("The bundle has no tokenizer: the folder will hold none.")
        return
    copy_files(tokenizer.files, folder)
    if tokenizer.type == "byte":
        byte_tokenizer(tokenizer.eos).save(str(folder / "tokenizer.json"))
    if "tokenizer_config.json" not in tokenizer.files:
        known = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.eos), None), "pad_token": tokenizer.pad}
        words = {name: known.id_to_token(token) for name, token in special.items() if token is not None}
        values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position, "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(values | words, indent=2) + "\n")


def byte_tokenizer(eos: list[int]) -> Tokenizer:
    """Token i is byte i; `eos` are the ids of text ends, from 256 on."""
    # The byte-level alphabet gives every byte a printable character; alphabet() is unordered, so ask for each byte's.
    character = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={character[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>" if n == 0 else f"<|end{n}|>", special=True) for n in range(len(eos))])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that stands for each byte: printable ones for themselves, the others 256, 257, ... in order (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
