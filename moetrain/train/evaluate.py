"""Bits per byte on every held-out byte, the same number at every world size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moetrain.data.batch import Batch
from moetrain.parallel.engine import Engine


@dataclass
class EvaluationResult:
    """Of one split. Every token of every held-out document, its end included, was predicted exactly once."""

    nats: float
    num_tokens: int
    num_bytes: int  # of the documents' UTF-8 text

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.num_tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes; comparable between tokenizers and with a compressor."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)


def evaluate(engine: Engine, batches: Iterable[Batch], num_bytes: int) -> EvaluationResult:
    """Every rank calls it with equally many batches."""
    nats, num_tokens = 0.0, 0
    for batch in batches:
        sums = engine.evaluate(batch)
        nats += sums.nats
        num_tokens += sums.num_tokens
    return EvaluationResult(nats, num_tokens, num_bytes)
