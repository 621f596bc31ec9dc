"""What a prepared corpus holds, as a file: counts, hashes, and the settings it was made with. No torch, no machine's paths."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moetrain.base.errors import DataError
from moetrain.data.documents import Document

FORMAT = "moetrain-corpus-1"
FILE = "manifest.json"


@dataclass(frozen=True)
class Settings:
    """What decides the content of a corpus."""

    tokenizer: str  # train | byte | file
    vocab_size: int  # asked for; 0 unless tokenizer is train
    validation: float
    test: float
    sources: list[str]  # last part of each source's path, or "stdlib"
    source_fingerprint: str  # names and sizes of all source files


@dataclass(frozen=True)
class Split:
    """One of train, validation, test. `tokens` counts an end token for every document, `num_bytes` the UTF-8 text without."""

    documents: int
    tokens: int
    num_bytes: int
    dtype: str
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class TokenizerFacts:
    sha256: str  # Tokenizer.fingerprint
    vocab_size: int
    end_id: int


@dataclass(frozen=True)
class Manifest:
    settings: Settings
    tokenizer: TokenizerFacts
    splits: dict[str, Split]
    skipped: dict[str, int] = field(default_factory=dict)  # files and records left out, by reason

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """DataError: no prepared corpus there, or one of another format."""
        try:
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise DataError(f"The corpus {folder} has the format {content['format']!r}, not {FORMAT!r}.", "Prepare it again.")
            return cls(
                settings=Settings(**content["settings"]),
                tokenizer=TokenizerFacts(**content["tokenizer"]),
                splits={name: Split(**values) for name, values in content["splits"].items()},
                skipped=content["skipped"],
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"There is no prepared corpus at {folder}.", f"Make it: moetrain data prepare SOURCE --out {folder}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / FILE} is damaged: {error!r}.", "Prepare the corpus again with --overwrite.") from error


def is_prepared(folder: Path) -> bool:
    return (folder / FILE).is_file()


def prefix(folder: Path, split: str) -> Path:
    """The Megatron path prefix of a split: add .bin or .idx."""
    return folder / split


def held_out_file(folder: Path, split: str) -> Path:
    """The held-out text itself: gzipped JSONL of {path, text}, in the order of the tokens."""
    return folder / "held_out" / f"{split}.jsonl.gz"


def read_held_out(folder: Path, split: str) -> Iterator[Document]:
    """The documents of `validation` or `test` with their paths. DataError: not prepared."""
    path = held_out_file(folder, split)
    if not path.is_file():
        raise DataError(f"The corpus {folder} has no held-out text for {split!r}.", "Held out are: validation, test.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))
