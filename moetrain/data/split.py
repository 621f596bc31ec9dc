"""Which documents are held out: decided by a hash of the document's path, so the same on every machine, whatever else the corpus holds."""

import hashlib

from moetrain.base.errors import ConfigError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)


def split_of(path: str, validation: float, test: float) -> str:
    """The split of a document. A larger fraction only moves documents out of `train`."""
    position = int.from_bytes(hashlib.sha256(path.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
    if position < validation:
        return VALIDATION
    return TEST if position >= 1.0 - test else TRAIN


def check_fractions(validation: float, test: float) -> None:
    """ConfigError unless both are fractions that leave something to train on."""
    for key, value in (("validation", validation), ("test", test)):
        if not 0.0 <= value < 1.0:
            raise ConfigError.of(key, value, "it is the fraction of documents held out, at least 0 and below 1")
    if validation + test >= 1.0:
        raise ConfigError.of("validation", validation, f"together with test={test} nothing is left to train on")
