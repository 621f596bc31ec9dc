"""Hugging Face folders as bundle contents, and bundle contents as Hugging Face folders. Never computes something else than it read."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from moetrain.base.errors import BundleError
from moetrain.base.log import logger
from moetrain.convert.families import Family, choose, family_of, read_config, write_config
from moetrain.convert.names import COMPUTED, Part, packed, parts, published
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import Shape, parameter_shapes
from moetrain.store.bundle import Contents, TokenizerFacts, copy_files, read_json, token_ids
from moetrain.store.folder import new_folder
from moetrain.store.shards import SHARD_BYTES, Shards, TensorInfo, write_shards
from moetrain.text.tokenizer import Tokenizer


def read_huggingface(folder: Path) -> Contents:
    """The model of a Mixtral, Qwen3-MoE or OLMoE folder; tensors are read when asked for.

    Raises BundleError naming the configuration key or the tensor that moetrain does not compute, lacks, or did not expect.
    """
    file = folder / "config.json"
    values = read_json(file, "Give a Hugging Face model folder: config.json beside safetensors files.")
    config, family = read_config(values, str(file)), family_of(values, str(file))
    weights = Weights(folder, config, family)
    facts: dict[str, object] = {"imported_from": family.class_name}
    return Contents(asdict(config), facts, _read_tokenizer(folder, values, family, str(file)), weights.table, weights.load)


class Weights:
    """Our tensors out of a folder's, per expert or packed. `table` is complete and checked before any tensor is read."""

    def __init__(self, folder: Path, config: ModelConfig, family: Family) -> None:
        self.shards = Shards(folder)
        self.stored = {published(name, family): name for name in self.shards}
        self.parts: dict[str, list[Part]] = {}
        self.table: dict[str, TensorInfo] = {}
        for name, shape in parameter_shapes(config).items():
            single = packed(name, family)
            self.parts[name] = [Part(single)] if single in self.stored else parts(name, config, family)
            self.table[name] = TensorInfo(shape, self._dtype(name, shape, folder))
        self._check_rest(folder, config)

    def load(self, name: str) -> Tensor:
        info, pieces = self.table[name], self.parts[name]
        if pieces == [Part(pieces[0].name)]:
            return self._stored(pieces[0])
        whole = torch.empty(info.shape, dtype=_dtype(info.dtype))
        for piece in pieces:
            cut(whole, piece).copy_(self._stored(piece))
        return whole

    def _stored(self, part: Part) -> Tensor:
        return self.shards[self.stored[part.name]]

    def _dtype(self, name: str, shape: Shape, folder: Path) -> str:
        """The common dtype of the parts; float32 if they differ. Raises BundleError if one is missing or of another shape."""
        dtypes: set[str] = set()
        for part in self.parts[name]:
            if part.name not in self.stored:
                raise BundleError(f"{folder} lacks the tensor {part.name}.", "Its config.json and its weights belong to different models.")
            info, expected = self.shards.table[self.stored[part.name]], part.shape(shape)
            if info.shape != expected:
                sentence = f"{folder} holds {part.name} with shape {list(info.shape)}, its config.json asks for {list(expected)}."
                raise BundleError(sentence, "Its config.json and its weights belong to different models.")
            dtypes.add(info.dtype)
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def _check_rest(self, folder: Path, config: ModelConfig) -> None:
        """Every other tensor must be one that changes nothing."""
        used = {part.name for pieces in self.parts.values() for part in pieces}
        for name in self.stored:
            if name in used or COMPUTED.fullmatch(name):
                continue
            if name == "lm_head.weight" and config.tie_embeddings and torch.equal(self.shards[name], self.load("embedding.weight")):
                continue
            raise BundleError(f"{folder} holds the tensor {name}, which moetrain does not compute.", "The folder cannot be imported.")


def write_huggingface(
    target: Path,
    contents: Contents,
    card: str,
    architecture: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Family:
    """Writes a folder that `transformers` loads: config, safetensors, tokenizer, model card. Returns the family it chose.

    dtype: of all weights; None keeps that of the embedding. Raises BundleError for a model that has no Hugging Face class.
    """
    config = ModelConfig.from_dict(contents.config)
    family = choose(config, architecture)
    dtype = dtype or contents.table["embedding.weight"].dtype
    origin = {part.name: (name, part) for name in parameter_shapes(config) for part in parts(name, config, family)}
    table = {part.name: TensorInfo(part.shape(contents.table[name].shape), dtype) for name, part in origin.values()}

    def load(stored: str) -> Tensor:
        name, part = origin[stored]
        return cut(contents.load(name), part).to(_dtype(dtype))

    special = _special_tokens(contents.tokenizer)
    with new_folder(target, overwrite) as folder:
        write_shards(folder, table, load, single=True, shard_bytes=shard_bytes)
        _write_tokenizer(folder, contents.tokenizer)
        (folder / "config.json").write_text(json.dumps(write_config(config, family, dtype) | special, indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
        (folder / "README.md").write_text(card)
    return family


def cut(whole: Tensor, part: Part) -> Tensor:
    """The view of our tensor that a part is."""
    piece = whole if part.expert is None else whole[part.expert]
    return piece if part.rows is None else piece[slice(*part.rows)]


def _special_tokens(tokenizer: TokenizerFacts) -> dict[str, object]:
    """null is written too: the classes have defaults of their own, which would name other tokens."""
    eos = tokenizer.eos[0] if len(tokenizer.eos) == 1 else tokenizer.eos or None
    return {"bos_token_id": tokenizer.bos, "eos_token_id": eos, "pad_token_id": tokenizer.pad}


def _write_tokenizer(folder: Path, facts: TokenizerFacts) -> None:
    """What AutoTokenizer reads: the files of the source, completed by a tokenizer_config.json where it had none."""
    if facts.type == "none":
        logger("convert").warning("The model came without a tokenizer: the folder holds none.")
    elif "tokenizer_config.json" not in facts.files:
        tokenizer = Tokenizer.byte() if facts.type == "byte" else Tokenizer.load(facts.files["tokenizer.json"])
        tokenizer.save_huggingface(folder)
    copy_files(facts.files, folder)


def _read_tokenizer(folder: Path, values: Mapping[str, object], family: Family, where: str) -> TokenizerFacts:
    """Token ids of generation_config.json stand above those of config.json, as in transformers."""
    path = folder / "generation_config.json"
    generation = read_json(path, "Remove it or copy it again.") if path.is_file() else {}
    ids = {}
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = generation.get(key)
        ids[key] = token_ids(values.get(key, family.defaults[key]) if value is None else value, f"{where}: {key}")
    bos, pad = (next(iter(ids[key]), None) for key in ("bos_token_id", "pad_token_id"))
    return TokenizerFacts.of_folder(folder, ids["eos_token_id"], bos, pad)


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
