"""Bits per byte on held-out bytes, the same number at every world size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from moetrain.data.batch import Batch
from moetrain.data.manifest import Split
from moetrain.parallel.engine import Engine


@dataclass
class EvaluationResult:
    """Of a split or its first part. Every token, document ends included, was predicted exactly once."""

    nats: float
    num_tokens: int
    num_bytes: float  # of the documents' UTF-8 text; of a part, its share by tokens

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.num_tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes; comparable between tokenizers and with a compressor."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)


def evaluate(engine: Engine, batches: Iterable[Batch], split: Split, max_batches: int = 0) -> EvaluationResult:
    """Over all batches, or the first `max_batches`. Every rank calls it with equally many."""
    nats, num_tokens = 0.0, 0
    for batch in islice(batches, max_batches or None):
        sums = engine.evaluate(batch)
        nats += sums.nats
        num_tokens += sums.num_tokens
    return EvaluationResult(nats, num_tokens, num_tokens * split.num_bytes / max(split.tokens, 1))
