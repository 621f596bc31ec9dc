"""The bundle: a trained model as one folder that needs nothing else. Layout in docs/design.md. No torch at import.

The model's configuration travels here as plain data; `moetrain.model` turns it into a ModelConfig and checks the shapes.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.base.errors import BundleError
from moetrain.store.folder import new_folder
from moetrain.store.shards import SHARD_BYTES, Shards, Table, write_shards

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "moetrain-bundle"
VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass
class TokenizerFacts:
    """Which tokenizer a model speaks. Its files are copied into the bundle under their own names (TOKENIZER_FILES)."""

    type: str = "none"  # file: tokenizer.json | byte: one token per byte | none: the source had none
    eos: list[int] = field(default_factory=list)  # tokens that end a text
    bos: int | None = None  # token that begins a text, if the model was trained with one
    pad: int | None = None
    files: dict[str, Path] = field(default_factory=dict)  # by name in the bundle

    @classmethod
    def of_folder(cls, folder: Path, eos: list[int], bos: int | None, pad: int | None) -> "TokenizerFacts":
        """The tokenizer whose files stand in `folder`; type none if tokenizer.json is not there."""
        files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
        return cls("file" if "tokenizer.json" in files else "none", eos, bos, pad, files)


@dataclass
class Contents:
    """What a bundle or a Hugging Face folder is made of, before or after it is one."""

    config: dict[str, object]  # ModelConfig as plain data (`dataclasses.asdict`)
    training: dict[str, object]  # facts: run, step, tokens, data, evaluation, git, ...; may be empty
    tokenizer: TokenizerFacts
    table: Table  # shape and dtype of every tensor by name (docs/design.md)
    load: Callable[[str], "Tensor"]  # a CPU tensor by name


@dataclass
class Bundle:
    """An opened bundle: `Bundle.open(path)`."""

    folder: Path
    config: dict[str, object]  # ModelConfig as plain data: ModelConfig.from_dict(bundle.config)
    training: dict[str, object]  # see Contents
    tokenizer_facts: TokenizerFacts
    tensors: Shards  # by name (docs/design.md), lazily through a memory map

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json, or None (`tokenizer_facts.type` says byte or none)."""
        return self.tokenizer_facts.files.get("tokenizer.json")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; give them to `moetrain.model.shapes.check_tensors`."""
        return {name: info.shape for name, info in self.tensors.table.items()}

    @property
    def contents(self) -> Contents:
        """To write it again in another format."""
        return Contents(self.config, self.training, self.tokenizer_facts, self.tensors.table, self.tensors.__getitem__)

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Reads config.json and the headers of the weights. Raises BundleError, one sentence, for anything missing or damaged."""
        folder = Path(path)
        values = read_json(folder / "config.json", "Give the folder of a bundle, as `moetrain export` writes it.")
        if values.get("format") != FORMAT:
            hint = "Turn a Hugging Face folder into a bundle with: moetrain import DIR --out BUNDLE."
            raise BundleError(f"{folder} is not a moetrain bundle.", hint)
        if values.get("version") != VERSION:
            sentence = f"{folder} is a bundle of version {values.get('version')}, this moetrain reads version {VERSION}."
            raise BundleError(sentence, "Export it again with this version.")
        model, training, tokenizer = (values.get(key) for key in ("model", "training", "tokenizer"))
        if not isinstance(model, dict) or not isinstance(training, dict) or not isinstance(tokenizer, dict):
            raise BundleError(f"{folder / 'config.json'} lacks the group model, training or tokenizer.", "Export it again.")
        return cls(folder, model, training, _read_tokenizer(folder, tokenizer), Shards(folder))


def write_bundle(target: Path, contents: Contents, card: str, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a bundle that appears at `target` when it is complete. `contents.load` is asked once for each tensor.

    Raises BundleError when the target is taken (see `new_folder`).
    """
    tokenizer = contents.tokenizer
    values = {
        "format": FORMAT,
        "version": VERSION,
        "model": contents.config,
        "tokenizer": {"type": tokenizer.type, "eos": tokenizer.eos, "bos": tokenizer.bos, "pad": tokenizer.pad},
        "training": contents.training,
    }
    with new_folder(target, overwrite) as folder:
        write_shards(folder, contents.table, contents.load, shard_bytes=shard_bytes)
        copy_files(tokenizer.files, folder)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        (folder / "README.md").write_text(card)


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    for name, source in files.items():
        shutil.copyfile(source, folder / name)


def read_json(path: Path, hint: str) -> dict[str, object]:
    """A JSON object; BundleError with `hint` if the file is missing or is none."""
    if not path.is_file():
        raise BundleError(f"{path} does not exist.", hint)
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}.", hint) from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} holds no JSON object.", hint)
    return values


def token_ids(value: object, where: str) -> list[int]:
    """The list of token ids that a config value `null`, 3 or [3, 4] means."""
    given = [] if value is None else value if isinstance(value, list) else [value]
    ids = [token for token in given if type(token) is int]
    if len(ids) != len(given):
        raise BundleError(f"{where}={value!r} is neither a token id nor a list of them.", "Correct it in config.json.")
    return ids


def _read_tokenizer(folder: Path, values: Mapping[str, object]) -> TokenizerFacts:
    kind = values.get("type")
    if kind not in ("file", "byte", "none"):
        raise BundleError(f"{folder / 'config.json'} names the tokenizer type {kind!r}; file, byte and none are known.", "Export it again.")
    bos, pad = (next(iter(token_ids(values.get(key), f"tokenizer.{key}")), None) for key in ("bos", "pad"))
    tokenizer = TokenizerFacts.of_folder(folder, token_ids(values.get("eos"), "tokenizer.eos"), bos, pad)
    if kind == "file" and tokenizer.type != "file":
        raise BundleError(f"{folder / 'tokenizer.json'} is missing.", "Copy the whole folder again from its source.")
    tokenizer.type = kind
    return tokenizer
