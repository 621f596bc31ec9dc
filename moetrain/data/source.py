"""Training samples of one corpus, numbered 0, 1, 2, ... without end: Megatron's GPTDataset, one per epoch, each with its own seed.

Megatron shuffles by the number of samples asked for; asked for one epoch at a time, the order does not depend on the length of the run.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from uuid import uuid4

from torch import Tensor

from moetrain.base.errors import DataError
from moetrain.data.corpus import Corpus
from moetrain.data.manifest import prefix
from moetrain.data.megatron import Epoch
from moetrain.data.split import TRAIN

Barrier = Callable[[], None]

LONGEST_INDEX_SECONDS = 3600.0


class CorpusSamples:
    """`leader` (global rank 0) writes the index files of an epoch; when they are there, all ranks meet at `barrier` and read them."""

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, index_folder: Path, leader: bool, barrier: Barrier) -> None:
        self._corpus = corpus
        self._seq_len = seq_len
        self._seed = seed
        self._index_folder = index_folder
        self._leader = leader
        self._barrier = barrier
        self._epochs: dict[int, Epoch] = {}
        tokens = corpus.manifest.splits[TRAIN].tokens
        self._per_epoch = (tokens - 1) // seq_len
        if self._per_epoch == 0:
            hint = "Prepare more text, or shorten data.seq_len."
            raise DataError(f"The corpus {corpus.folder} has {tokens} training tokens, too few for one sample of {seq_len}.", hint)

    def open(self, numbers: list[int]) -> None:
        """Makes these samples readable, closes epochs without any of them. Collective: every rank passes the same numbers."""
        wanted = sorted({number // self._per_epoch for number in numbers})
        for epoch in wanted:
            if epoch not in self._epochs:
                if self._leader:
                    self._write_index(epoch)
                else:
                    _wait_for(self._index(epoch))
                self._barrier()
                self._epochs[epoch] = self._read(epoch, self._index(epoch))
        self._epochs = {epoch: self._epochs[epoch] for epoch in wanted}

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels, int64 [seq_len] each; the sample must be open."""
        epoch, index = divmod(number, self._per_epoch)
        return self._epochs[epoch][index]

    def _read(self, epoch: int, folder: Path) -> Epoch:
        facts = self._corpus.manifest.tokenizer
        digest = hashlib.sha256(f"{self._seed}:{epoch}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")  # numpy's RandomState takes 32 bits
        return Epoch(self._prefix, folder, self._seq_len, facts.vocab_size, facts.end_id, seed)

    def _write_index(self, epoch: int) -> None:
        """Written aside and renamed: another run on the same corpus may be reading or writing the same epoch."""
        folder = self._index(epoch)
        if folder.is_dir():
            return
        partial = folder.parent / f".partial-{uuid4().hex}"
        try:
            partial.mkdir(parents=True)
            self._read(epoch, partial)
            partial.rename(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.is_dir():
                raise DataError(f"The sample index cannot be written to {folder}: {error.strerror}.", "Make it writable.") from error

    def _index(self, epoch: int) -> Path:
        """Named by all that its content depends on; Megatron's own file names carry the path of the corpus."""
        content = self._corpus.manifest.splits[TRAIN].bin_sha256
        key = hashlib.sha256(f"{self._prefix}:{content}:{self._seq_len}:{self._seed}".encode()).hexdigest()[:16]
        return self._index_folder / f"{key}-epoch-{epoch}"

    @property
    def _prefix(self) -> Path:
        return prefix(self._corpus.folder.resolve(), TRAIN)


def _wait_for(folder: Path) -> None:
    """Returns when the folder, which appears whole, is there: writing it may take longer than a collective is given."""
    deadline, pause = monotonic() + LONGEST_INDEX_SECONDS, 0.05
    while not folder.is_dir():
        if monotonic() > deadline:
            sentence = f"The sample index {folder} did not appear within {LONGEST_INDEX_SECONDS:g} s."
            raise DataError(sentence, "All ranks need the corpus on a file system that they share.")
        sleep(pause)
        pause = min(1.5 * pause, 1.0)
