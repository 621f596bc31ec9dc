"""The errors a user may see: one clear sentence, and a hint that says the way out."""

import difflib
from collections.abc import Iterable


class MoetrainError(Exception):
    """A failure with a sentence for the user. `hint` says what to do about it; printed on the next line."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(MoetrainError):
    """A key or value of the configuration that breaks a rule."""

    @classmethod
    def of(cls, key: str, value: object, rule: str, hint: str = "") -> "ConfigError":
        """The standard sentence: key, value, rule; `hint` is the way out."""
        return cls(f"{key}={value!r} is not possible: {rule}.", hint)


class PlanError(MoetrainError):
    """A parallel layout that cannot be: axes, placement, memory."""


class DataError(MoetrainError):
    """Text or a prepared corpus that cannot be read."""


class CheckpointError(MoetrainError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class BundleError(MoetrainError):
    """A bundle or Hugging Face folder that cannot be read, written or computed."""


class TrainingError(MoetrainError):
    """Training cannot go on: a non-finite loss, a lost rank, a time-out."""


class MissingExtraError(MoetrainError):
    """An optional package is absent; the hint names the extra that installs it."""

    @classmethod
    def of(cls, package: str, extra: str) -> "MissingExtraError":
        return cls(f"The package {package} is not installed.", f"Install it with: pip install 'moetrain[{extra}]'")


def closest(word: str, choices: Iterable[str]) -> str:
    """The choice nearest to a mistyped word as a sentence for a hint, or the list of all choices."""
    names = sorted(choices)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean {match[0]}?" if match else f"Possible: {', '.join(names)}."


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    names = list(choices)
    if value not in names:
        raise ConfigError.of(key, value, f"it must be one of {', '.join(names)}", closest(str(value), names))
