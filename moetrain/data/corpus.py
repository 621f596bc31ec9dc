"""The prepared corpora of a run, checked to belong together."""

import math
from dataclasses import dataclass
from pathlib import Path

from moetrain.base.errors import ConfigError, DataError
from moetrain.data.config import DataConfig
from moetrain.data.manifest import Manifest
from moetrain.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """A prepared folder and its share of the training samples."""

    folder: Path
    manifest: Manifest
    weight: float

    def tokenizer(self) -> Tokenizer:
        """DataError when the file is not the one that the tokens were made with."""
        tokenizer = Tokenizer.load(self.folder)
        if tokenizer.fingerprint != self.manifest.tokenizer.sha256:
            hint = "Restore the file, or prepare the corpus again with --overwrite."
            raise DataError(f"The tokenizer in {self.folder} is not the one its tokens were made with.", hint)
        return tokenizer


def open_corpora(config: DataConfig) -> list[Corpus]:
    """The corpora in the order of the configuration. ConfigError: none, a bad weight; DataError: not prepared, different tokenizers."""
    if not config.corpora:
        raise ConfigError.of("data.corpora", [], "training needs at least one prepared corpus", "Make one: moetrain data prepare")
    for number, corpus in enumerate(config.corpora):
        if not (math.isfinite(corpus.weight) and corpus.weight > 0):
            raise ConfigError.of(f"data.corpora[{number}].weight", corpus.weight, "it must be a number above 0")
    corpora = [Corpus(Path(corpus.path), Manifest.read(Path(corpus.path)), corpus.weight) for corpus in config.corpora]
    first = corpora[0]
    for other in corpora[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            hint = f"Prepare one with the other's: --tokenizer {first.folder / 'tokenizer.json'}"
            raise DataError(f"The corpora {first.folder} and {other.folder} have different tokenizers.", hint)
    return corpora
