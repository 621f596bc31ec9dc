"""Positions and document numbers of a batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.batch import make_batch

END = 9
ROWS = st.integers(1, 12).flatmap(lambda size: st.lists(st.lists(st.sampled_from([1, 2, END]), min_size=size, max_size=size), min_size=1))


def batch(rows: list[list[int]], boundaries: bool):
    tokens_BS = torch.tensor(rows)
    return make_batch(tokens_BS, tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool), END, boundaries)


def test_the_end_token_opens_the_next_document() -> None:
    made = batch([[1, 2, END, 1, 1, END, END, 2], [END, 1, 2, 1, END, 1, 1, 1]], boundaries=True)
    assert made.position_BS.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert made.document_BS is not None
    assert made.document_BS.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1]]


@given(rows=ROWS)
def test_positions_count_up_within_each_document(rows: list[list[int]]) -> None:
    made = batch(rows, boundaries=True)
    assert made.document_BS is not None
    for tokens, positions, documents in zip(rows, made.position_BS.tolist(), made.document_BS.tolist(), strict=True):
        assert documents[0] == positions[0] == 0
        for i in range(1, len(tokens)):
            opens = tokens[i] == END
            assert documents[i] == documents[i - 1] + opens
            assert positions[i] == (0 if opens else positions[i - 1] + 1)


def test_without_boundaries_positions_run_through() -> None:
    made = batch([[1, END, 2], [END, 1, 2]], boundaries=False)
    assert made.position_BS.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert made.document_BS is None
    assert made.position_BS.dtype == torch.int64
