"""Evaluation windows: every held-out token exactly once, enough context, equally many batches on every rank."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError, DataError
from moetrain.data.batch import Batch
from moetrain.data.manifest import Manifest, read_held_out
from moetrain.data.prepare import Request, prepare
from moetrain.data.windows import evaluation_windows
from moetrain.text.tokenizer import Tokenizer

END = Tokenizer.byte().end_id


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes as tokens; a handful of short documents in each held-out split."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "d.jsonl").write_text("\n".join(json.dumps({"text": f"document {number} é" * (number % 3 + 1)}) for number in range(40)))
    prepare(Request([str(folder / "d.jsonl")], folder / "corpus", "byte", validation=0.15, test=0.1))
    return folder / "corpus"


def stream(corpus: Path) -> list[int]:
    return [token for document in read_held_out(corpus, "validation") for token in [*document.text.encode(), END]]


def by_rank(corpus: Path, seq_len: int, stride: int, batch_size: int, dp_size: int, boundaries: bool = False) -> list[list[Batch]]:
    return [
        list(evaluation_windows(corpus, "validation", seq_len, stride, batch_size, rank, dp_size, boundaries)) for rank in range(dp_size)
    ]


def in_order(ranks: list[list[Batch]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tokens, labels, valid) of every row, in the order of the text."""
    rounds = zip(*ranks, strict=True)
    return [row for batches in rounds for batch in batches for row in zip(batch.tokens_BS, batch.labels_BS, batch.valid_BS, strict=True)]


@given(seq_len=st.integers(1, 700), data=st.data(), batch_size=st.integers(1, 5), dp_size=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_token_is_predicted_exactly_once(corpus: Path, seq_len: int, data: st.DataObject, batch_size: int, dp_size: int) -> None:
    stride = data.draw(st.integers(max(1, seq_len // 8), seq_len))
    expected = stream(corpus)
    assert len(expected) == Manifest.read(corpus).splits["validation"].tokens
    ranks = by_rank(corpus, seq_len, stride, batch_size, dp_size)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.tokens_BS.shape == (batch_size, seq_len) for batches in ranks for batch in batches)
    predicted: list[int] = []
    for tokens_S, labels_S, valid_S in in_order(ranks):
        for index in valid_S.nonzero().flatten().tolist():
            place = len(predicted)
            context = tokens_S[: index + 1].tolist()
            assert context == [END, *expected][place - index : place + 1]
            assert index >= min(place, seq_len - stride)
            predicted.append(int(labels_S[index]))
    assert predicted == expected


def test_a_document_is_predicted_from_the_end_token_in_front_of_it(corpus: Path) -> None:
    (batch,) = evaluation_windows(corpus, "validation", 2048, 2048, 1, document_boundaries=True)
    assert batch.document_BS is not None
    documents = [document.text.encode() for document in read_held_out(corpus, "validation")]
    for number, text in enumerate(documents):
        own = (batch.document_BS[0] == number) & batch.valid_BS[0]
        assert batch.tokens_BS[0][own].tolist() == [END, *text]
        assert batch.labels_BS[0][own].tolist() == [*text, END]
        assert batch.position_BS[0][own].tolist() == list(range(len(text) + 1))


def test_ranks_without_text_get_batches_without_valid_labels(corpus: Path) -> None:
    ranks = by_rank(corpus, 4096, 4096, 2, 3)
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert [int(batches[0].valid_BS.sum()) for batches in ranks] == [len(stream(corpus)), 0, 0]


def test_impossible_strides_and_unknown_splits_are_refused(corpus: Path) -> None:
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"stride={stride}"):
            next(evaluation_windows(corpus, "validation", 8, stride, 1))
    with pytest.raises(DataError, match="no split 'dev'"):
        next(evaluation_windows(corpus, "dev", 8, 8, 1))
    with pytest.raises(DataError, match="no prepared corpus"):
        next(evaluation_windows(corpus / "elsewhere", "validation", 8, 8, 1))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one document")
    prepare(Request([str(tmp_path / "one.txt")], tmp_path / "corpus", "byte", validation=0.0, test=0.0))
    with pytest.raises(DataError, match="no document in 'validation'"):
        next(evaluation_windows(tmp_path / "corpus", "validation", 8, 8, 1))
