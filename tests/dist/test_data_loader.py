"""The training order over real processes: Megatron lets global rank 0 alone write sample indices."""

import json
from pathlib import Path

import pytest

from moetrain.data.config import CorpusConfig, DataConfig
from moetrain.data.corpus import open_corpora
from moetrain.data.loader import TrainLoader
from moetrain.data.prepare import Request, prepare
from moetrain.dist.world import World
from tests.kit import run_ranks

STEPS = 12  # over several epochs


def config(folder: Path) -> DataConfig:
    return DataConfig(corpora=[CorpusConfig(str(folder / "corpus"))], seq_len=16)


def own_rows(world: World, folder: Path) -> list[list[list[int]]]:
    """Per step, this rank's rows."""
    data = config(folder)
    loader = TrainLoader(data, open_corpora(data), 4, 2, world.rank, world.size, 0, world.is_main, lambda: world.barrier("epoch"))
    return [next(loader)[0].tokens_BS.tolist() for _ in range(STEPS)]


@pytest.mark.dist
def test_two_processes_share_the_samples_of_one(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"document {number} " * 3}) for number in range(6)))
    prepare(Request([str(source)], tmp_path / "corpus", "byte", validation=0.0, test=0.0))
    first, second = run_ranks(own_rows, 2, tmp_path, tmp_path, limit=90.0)  # importing megatron takes seconds, more on a busy machine
    data = config(tmp_path)
    alone = TrainLoader(data, open_corpora(data), 4, 4)
    assert [a + b for a, b in zip(first, second, strict=True)] == [next(alone)[0].tokens_BS.tolist() for _ in range(STEPS)]
