"""Held-out text as overlapping windows in which every token is predicted exactly once: what bits per byte are summed over."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from moetrain.base.errors import ConfigError, DataError
from moetrain.data.batch import Batch, make_batch
from moetrain.data.manifest import Manifest, prefix


def evaluation_windows(
    folder: Path,
    split: str,
    seq_len: int,
    stride: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    document_boundaries: bool = False,
) -> Iterator[Batch]:
    """Batches [batch_size, seq_len] of this rank; equally many on every rank, filled up with rows without a valid label.

    The split is one stream of tokens behind an end token, so a document's first token is predicted from the end token in front of it, and
    its own end token is predicted too. `valid_BS` marks each of the split's `tokens` once over all ranks: sum of their nats / ln 2 /
    `num_bytes` of the manifest is bits per byte over every held-out byte. From the second window on a token has at least
    seq_len - stride tokens of context (less only at a document boundary). ConfigError: stride; DataError: no such text.
    """
    if not 1 <= stride <= seq_len:
        raise ConfigError.of("stride", stride, f"it must be between 1 and the window of {seq_len} tokens")
    manifest = Manifest.read(folder)
    if split not in manifest.splits:
        raise DataError(f"The corpus {folder} has no split {split!r}.", f"It has: {', '.join(manifest.splits)}.")
    facts = manifest.splits[split]
    if not facts.tokens:
        raise DataError(f"The corpus {folder} has no document in {split!r}.", "Prepare it with more documents or a larger fraction.")
    tokens_N = np.memmap(prefix(folder, split).with_suffix(".bin"), dtype=facts.dtype, mode="r")
    end_id = manifest.tokenizer.end_id
    windows = num_windows(facts.tokens, seq_len, stride)
    for first in range(0, windows, dp_size * batch_size):
        own = range(first + dp_rank * batch_size, first + (dp_rank + 1) * batch_size)
        yield _batch(tokens_N, own, seq_len, stride, end_id, document_boundaries)


def num_windows(num_tokens: int, seq_len: int, stride: int) -> int:
    """Windows over `num_tokens` labels: the first gives seq_len of them, every other up to `stride`."""
    return 1 + -(-max(0, num_tokens - seq_len) // stride)


def _batch(tokens_N: np.memmap, windows: range, seq_len: int, stride: int, end_id: int, document_boundaries: bool) -> Batch:
    """Window w predicts the tokens w * stride ... + seq_len; the last is moved back to end with the text; behind it they are empty."""
    tokens_BS = torch.full((len(windows), seq_len), end_id)
    labels_BS = torch.full((len(windows), seq_len), end_id)
    valid_BS = torch.zeros((len(windows), seq_len), dtype=torch.bool)
    num_tokens = len(tokens_N)
    for row, window in enumerate(windows):
        seen = 0 if window == 0 else min(num_tokens, (window - 1) * stride + seq_len)
        if seen == num_tokens:
            continue
        start = min(window * stride, max(0, num_tokens - seq_len))
        label_S = torch.from_numpy(tokens_N[start : start + seq_len].astype(np.int64))
        labels_BS[row, : len(label_S)] = label_S
        tokens_BS[row, 1 : len(label_S)] = label_S[:-1]
        if start:
            tokens_BS[row, 0] = int(tokens_N[start - 1])
        valid_BS[row, seen - start : len(label_S)] = True
    return make_batch(tokens_BS, labels_BS, valid_BS, end_id, document_boundaries)
