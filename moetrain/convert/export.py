"""Export and import as functions: a run or bundle out, a Hugging Face folder in."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moetrain.base.errors import BundleError
from moetrain.convert.card import model_card
from moetrain.convert.huggingface import read_huggingface, write_huggingface
from moetrain.convert.run import find_tokenizer, read_run
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import check_tensors
from moetrain.store.bundle import FORMAT, Bundle, Contents, read_json, write_bundle


def export(
    source: Path,
    out: Path,
    form: str,
    architecture: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Contents:
    """Writes a run (its newest good checkpoint) or a bundle as a bundle or a Hugging Face folder; returns what was written.

    dtype None keeps that of the source (float32 for a run). Raises MoetrainError kinds with a sentence for everything that cannot be.
    """
    contents = _open(source, tokenizer)
    card = model_card(contents, out.absolute().name, form)
    if form == "huggingface":
        write_huggingface(out, contents, card, architecture, dtype, overwrite)
        return contents
    if architecture is not None:
        raise BundleError("--architecture names a Hugging Face class.", "Leave it out, or add --format huggingface.")
    write_bundle(out, in_dtype(contents, dtype), card, overwrite)
    return contents


def import_folder(source: Path, out: Path, tokenizer: str | None = None, dtype: str | None = None, overwrite: bool = False) -> Contents:
    """Writes a Mixtral, Qwen3-MoE or OLMoE folder as a bundle; returns what was written. dtype None keeps that of the folder."""
    contents = read_huggingface(source)
    if tokenizer is not None:
        contents = replace(contents, tokenizer=find_tokenizer(tokenizer))
    write_bundle(out, in_dtype(contents, dtype), model_card(contents, out.absolute().name, "bundle"), overwrite)
    return contents


def in_dtype(contents: Contents, dtype: str | None) -> Contents:
    """All weights in another dtype. The balance bias, a sum of tiny steps, stays in float32."""
    if dtype is None:
        return contents
    table = {name: info if name.endswith("balance_bias") else info._replace(dtype=dtype) for name, info in contents.table.items()}
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

    def load(name: str) -> Tensor:
        return contents.load(name).to(kinds[table[name].dtype])

    return replace(contents, table=table, load=load)


def _open(source: Path, tokenizer: str | None) -> Contents:
    """A bundle if its config.json says so, else a run."""
    if not (source / "config.json").is_file():
        return read_run(source, tokenizer)
    if read_json(source / "config.json", "").get("format") != FORMAT:
        hint = "Turn a Hugging Face folder into a bundle first: moetrain import DIR --out BUNDLE."
        raise BundleError(f"{source} is neither a run nor a bundle.", hint)
    bundle = Bundle.open(source)
    check_tensors(ModelConfig.from_dict(bundle.config), bundle.shapes, str(source))
    contents = bundle.contents
    return contents if tokenizer is None else replace(contents, tokenizer=find_tokenizer(tokenizer))
