"""The training order: one sequence of samples, whatever the ranks, the length, or where it is entered."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError, DataError
from moetrain.data import source
from moetrain.data.batch import Batch
from moetrain.data.config import CorpusConfig, DataConfig
from moetrain.data.corpus import open_corpora
from moetrain.data.loader import TrainLoader
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import Request, prepare
from moetrain.text.tokenizer import Tokenizer

SEQ = 16
END = Tokenizer.byte().end_id


def make(folder: Path, name: str, documents: int) -> Path:
    """A byte corpus whose text carries its name, so a sample shows where it comes from."""
    source = folder / f"{name}.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"{name * 3} {number}. " * (1 + number % 3)}) for number in range(documents)))
    prepare(Request([str(source)], folder / name, "byte", validation=0.1, test=0.0))
    return folder / name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loader")
    return [make(folder, "a", 30), make(folder, "b", 12)]


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[tuple[int, ...]]:
    """The first samples of the blend 3 : 1, over several epochs of both corpora."""
    return samples(config(folders, (3.0, 1.0)), 200)


def config(folders: list[Path], weights: tuple[float, ...] = (1.0,), seed: int = 5, boundaries: bool = False) -> DataConfig:
    corpora = [CorpusConfig(str(folder), weight) for folder, weight in zip(folders, weights, strict=False)]
    return DataConfig(corpora=corpora, seq_len=SEQ, seed=seed, document_boundaries=boundaries)


def loader(data: DataConfig, batch: int = 4, micro: int = 1, rank: int = 0, size: int = 1, consumed: int = 0) -> TrainLoader:
    return TrainLoader(data, open_corpora(data), batch, micro, rank, size, consumed)


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], dim=1).tolist()]


def samples(data: DataConfig, count: int) -> list[tuple[int, ...]]:
    return rows(next(loader(data, count, count)))


@given(consumed=st.integers(0, 150), batches=st.integers(1, 3), micro=st.integers(1, 3), size=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_resuming_anywhere_at_any_size_continues_the_sequence(
    folders: list[Path], expected: list[tuple[int, ...]], consumed: int, batches: int, micro: int, size: int
) -> None:
    data = config(folders, (3.0, 1.0))
    total = batches * micro * size
    ranks = [loader(data, total, micro, rank, size, consumed) for rank in range(size)]
    for step in range(2):
        own = [next(rank) for rank in ranks]
        assert [len(each) for each in own] == [batches] * size
        in_order = [row for j in range(batches) for each in own for row in rows([each[j]])]
        first = consumed + step * total
        assert in_order == expected[first : first + total]
        assert {rank.consumed_samples for rank in ranks} == {first + total}


def test_a_longer_run_starts_with_the_shorter_one(folders: list[Path]) -> None:
    data = config(folders, (0.6, 0.4))
    assert samples(data, 300)[:40] == samples(data, 40)


def test_an_epoch_shows_every_token_once_but_for_the_tail(folders: list[Path]) -> None:
    data = config(folders)
    split = Manifest.read(folders[0]).splits["train"]
    per_epoch = (split.tokens - 1) // SEQ
    stored = Counter(torch.from_file(str(folders[0] / "train.bin"), size=split.tokens, dtype=torch.uint16).tolist())
    both = samples(data, 2 * per_epoch)
    for epoch in (both[:per_epoch], both[per_epoch:]):
        shown = Counter(token for row in epoch for token in row[:-1])
        assert not shown - stored
        assert sum((stored - shown).values()) == split.tokens - per_epoch * SEQ
    assert both[:per_epoch] != both[per_epoch:]


def test_labels_are_the_next_tokens_and_all_count(folders: list[Path]) -> None:
    (batch,) = next(loader(config(folders), 4, 4))
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    assert batch.valid_BS.all()
    assert (batch.tokens_BS.dtype, batch.labels_BS.dtype, batch.valid_BS.dtype) == (torch.int64, torch.int64, torch.bool)
    assert batch.document_BS is None


def test_the_seed_changes_the_order(folders: list[Path]) -> None:
    assert samples(config(folders, seed=5), 20) != samples(config(folders, seed=6), 20)


def test_weights_decide_the_share_of_each_corpus(folders: list[Path]) -> None:
    b = sum(1 for row in samples(config(folders, (3.0, 1.0)), 80) if ord("b") in row)
    assert b == 20


def test_document_boundaries_restart_positions_at_the_end_token(folders: list[Path]) -> None:
    (batch,) = next(loader(config(folders, boundaries=True), 32, 32))
    assert batch.document_BS is not None
    opens = batch.tokens_BS == END
    assert opens.any()
    assert (batch.position_BS[opens] == 0).all()
    assert torch.equal(batch.document_BS.diff(dim=1) == 1, opens[:, 1:])
    plain = next(loader(config(folders), 32, 32))[0]
    assert torch.equal(plain.tokens_BS, batch.tokens_BS)


def test_nothing_is_written_outside_the_index_folder(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = config(folders, seed=77)
    before = set(folders[0].rglob("*"))
    next(TrainLoader(data, open_corpora(data), 2, 1, index_folder=tmp_path / "index"))
    assert set(folders[0].rglob("*")) == before
    assert not list((tmp_path / "here").iterdir())
    (epoch,) = (tmp_path / "index").iterdir()
    assert epoch.name.endswith("-epoch-0")


def test_followers_wait_for_the_index_and_then_meet(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(folders, seed=78)
    order: list[str] = []

    def leader_writes(seconds: float) -> None:
        order.append("index")
        assert not list(tmp_path.glob("index/*"))
        next(TrainLoader(data, open_corpora(data), 2, 1, 0, 2, index_folder=tmp_path / "index"))

    def meet() -> None:
        order.append("barrier")

    monkeypatch.setattr(source, "sleep", leader_writes)
    follower = TrainLoader(data, open_corpora(data), 2, 1, 1, 2, leader=False, barrier=meet, index_folder=tmp_path / "index")
    assert rows(next(follower)) == samples(data, 2)[1:]
    assert order == ["index", "barrier"]  # no collective waits for the index
    next(follower)
    assert order == ["index", "barrier"]


def test_an_index_that_never_comes_is_said(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(folders, seed=79)
    monkeypatch.setattr(source, "LONGEST_INDEX_SECONDS", -1.0)
    with pytest.raises(DataError, match="did not appear"):
        next(TrainLoader(data, open_corpora(data), 2, 1, 1, 2, leader=False, index_folder=tmp_path / "index"))


@pytest.mark.parametrize(("batch", "micro", "size"), [(5, 2, 1), (4, 2, 4), (0, 1, 1)])
def test_a_global_batch_that_does_not_divide_is_refused(folders: list[Path], batch: int, micro: int, size: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size"):
        loader(config(folders), batch, micro, 0, size)


def test_a_corpus_shorter_than_a_sample_is_refused(folders: list[Path]) -> None:
    data = config(folders)
    data.seq_len = 10**6
    with pytest.raises(DataError, match="too few for one sample"):
        loader(data)


def test_corpora_of_different_tokenizers_are_refused(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text to train on " * 50)
    prepare(Request([str(tmp_path / "t.txt")], tmp_path / "bpe", vocab_size=270, validation=0.0, test=0.0))
    with pytest.raises(DataError, match="different tokenizers"):
        open_corpora(config([folders[0], tmp_path / "bpe"], (1.0, 1.0)))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_no_share_are_refused(folders: list[Path], weight: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora\[0\]\.weight"):
        open_corpora(config(folders, (weight,)))


def test_no_corpus_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora"):
        open_corpora(DataConfig())
