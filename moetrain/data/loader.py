"""Training batches of one rank, step by step; where it stands is one number, the samples consumed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from moetrain.base.errors import ConfigError
from moetrain.data.batch import Batch, make_batch
from moetrain.data.blend import Blend
from moetrain.data.config import DataConfig
from moetrain.data.corpus import Corpus
from moetrain.data.megatron import import_megatron
from moetrain.data.source import Barrier, CorpusSamples

INDEX_FOLDER = "index"


class TrainLoader(Iterator[list[Batch]]):
    """Each `next` is one optimizer step: this rank's micro-batches of shape [micro_batch_size, seq_len], without end.

    Sample n of the run is a function of corpora, weights, seq_len and seed alone. A step takes the next `global_batch_size` samples; its
    sample s goes to micro-batch s // (dp_size * micro_batch_size), rank s // micro_batch_size % dp_size, row s % micro_batch_size. So a
    step holds the same samples at every data-parallel size, and a run goes on from `consumed_samples` at any size, length or batch.

    `next` is collective now and then (a new epoch: `leader`, global rank 0, writes its index, then all meet at `barrier`): every rank
    calls it equally often. `index_folder` holds those small files; by default `index` inside each corpus.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: Sequence[Corpus],
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
        leader: bool = True,
        barrier: Barrier = lambda: None,
        index_folder: Path | None = None,
    ) -> None:
        """Batch sizes are in samples. ConfigError: the global batch is no multiple of micro_batch_size * dp_size; DataError: no text."""
        per_round = micro_batch_size * dp_size
        if global_batch_size < 1 or per_round < 1 or global_batch_size % per_round:
            rule = f"the global batch of {global_batch_size} samples is no multiple of it times {dp_size} data-parallel ranks"
            raise ConfigError.of("train.micro_batch_size", micro_batch_size, rule, "Use a divisor, or 0 to have it chosen.")
        import_megatron()
        self.consumed_samples = consumed_samples  # includes the step that `next` returned last
        self.num_micro_batches = global_batch_size // per_round
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._end_id = corpora[0].manifest.tokenizer.end_id
        self._document_boundaries = config.document_boundaries
        self._blend = Blend([corpus.weight for corpus in corpora])
        self._samples = [
            CorpusSamples(corpus, config.seq_len, config.seed, index_folder or corpus.folder / INDEX_FOLDER, leader, barrier)
            for corpus in corpora
        ]

    def __next__(self) -> list[Batch]:
        step = self._blend.assign(self.consumed_samples, self._global_batch_size)
        for number, samples in enumerate(self._samples):
            samples.open([index for corpus, index in step if corpus == number])
        self.consumed_samples += self._global_batch_size
        return [self._micro_batch(step, micro) for micro in range(self.num_micro_batches)]

    def _micro_batch(self, step: list[tuple[int, int]], micro: int) -> Batch:
        first = (micro * self._dp_size + self._dp_rank) * self._micro_batch_size
        rows = [self._samples[corpus][index] for corpus, index in step[first : first + self._micro_batch_size]]
        tokens_BS = torch.stack([tokens_S for tokens_S, _ in rows])
        labels_BS = torch.stack([labels_S for _, labels_S in rows])
        return make_batch(tokens_BS, labels_BS, torch.ones_like(tokens_BS, dtype=torch.bool), self._end_id, self._document_boundaries)
