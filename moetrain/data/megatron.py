"""The only file of this room that imports megatron-core (a second): writing .bin/.idx, and one epoch of a GPTDataset."""

import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F")


def import_megatron() -> None:
    """Takes a second: ranks that will wait for each other import at the same time, before they do."""
    with _light_import():
        import megatron.core.datasets.gpt_dataset  # noqa: F401


class IndexedWriter:
    """Writes `prefix`.bin and .idx, one sequence per document; uint16 where the vocabulary allows."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        indexed = _indexed_dataset()
        self.dtype = np.dtype(indexed.DType.optimal_dtype(vocab_size))
        self._prefix = prefix
        self._builder = indexed.IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=self.dtype.type)

    def add(self, ids: list[int]) -> None:
        self._builder.add_document(np.array(ids, dtype=self.dtype), [len(ids)])

    def finish(self) -> None:
        self._builder.finalize(str(self._prefix.with_suffix(".idx")))


class Epoch:
    """One pass over a training split in Megatron's order: documents shuffled, concatenated, cut into samples, samples shuffled.

    The tail shorter than a sample is dropped, another one every epoch. Its index files are read from `index_folder`, or written there by
    the process that Megatron lets write: global rank 0, or any process without a process group.
    """

    def __init__(self, prefix: Path, index_folder: Path, seq_len: int, vocab_size: int, end_id: int, seed: int) -> None:
        with _light_import():
            from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
            from megatron.core.datasets.utils import Split
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_len,
            blend_per_split=[([str(prefix)], None), None, None],
            path_to_cache=str(index_folder),
            tokenizer=_Vocabulary(vocab_size, end_id),  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        tokens = GPTDataset.build_low_level_dataset(str(prefix), config)
        documents = np.arange(GPTDataset.numel_low_level_dataset(tokens), dtype=np.int32)
        self._dataset = GPTDataset(tokens, str(prefix), documents, None, Split.train, config)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels of one sample, int64 [seq_len] each."""
        sample = self._dataset[index]
        return sample["tokens"], sample["labels"]


class _Vocabulary:
    """What GPTDataset asks a tokenizer for."""

    def __init__(self, vocab_size: int, end_id: int) -> None:
        self.vocab_size = vocab_size
        self.eod = end_id
        self.eos = end_id
        self.pad = -1  # no token: our samples are never padded
        self.unique_identifiers = OrderedDict(vocab_size=vocab_size, end_id=end_id)


def _indexed_dataset() -> ModuleType:
    with _light_import():
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@contextmanager
def _light_import() -> Iterator[None]:
    """Megatron warns on import about GPU packages that the data path does not use, and decorates kernels that it does not use either with
    torch.compile, whose own import takes five seconds and 200 MB a rank. A part of the program that wants them imports Megatron before."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if "megatron.core" in sys.modules:
        yield
        return
    with warnings.catch_warnings(action="ignore"), mock.patch.object(torch, "compile", _left_alone):
        yield


def _left_alone(function: F | None = None, **_: object) -> F | Callable[[F], F]:
    """torch.compile that compiles nothing, with and without options."""
    return function if function is not None else lambda function: function
