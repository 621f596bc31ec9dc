"""The cache computes what the whole sequence computes, row by row, whatever was padded, rolled back, trimmed or moved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.inference.kv import KeyValues
from moetrain.model.context import ForwardContext
from moetrain.model.gpt import GPT
from tests.unit.inference_kit import CONFIGS, SMALL, attention, filled, tokens


def cache_of(model: GPT, block: int = 8) -> KeyValues:
    return KeyValues(model.config, model.embedding.weight.dtype, torch.device("cpu"), block)


def forward(model: GPT, cache: KeyValues, rows: range, tokens_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    appending = cache.append(rows, tokens_BS.shape[1], valid_BS)
    return model(tokens_BS, ForwardContext(position_BS=appending.position_BS, cache=appending)).logits_BSV


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Logits here are of size 1 to 10; the cache changes only the order of sums inside matmuls."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_logits_equal_whole_sequence_logits(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, text = filled(CONFIGS[name], dtype), tokens(1, 1, 30)
    cache = cache_of(model)
    rows = range(cache.add(), 1)
    pieces = [forward(model, cache, rows, piece) for piece in text.split([13, 4] + [1] * 13, dim=1)]
    close(torch.cat(pieces, 1), model(text).logits_BSV, tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 5])
def test_padding_on_either_side_changes_nothing(side: str, window: int | None) -> None:
    model = filled(attention(sliding_window=window))
    texts = [tokens(2, 7), tokens(3, 2), tokens(4, 11)]
    batch, valid = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(11 - len(text), 11)
        batch[row, place], valid[row, place] = text, True
    cache = cache_of(model)
    rows = range(0, len([cache.add() for _ in texts]))
    padded, after = forward(model, cache, rows, batch, valid), forward(model, cache, rows, tokens(5, 3, 1))
    assert cache.lengths == [8, 3, 12]
    for row, text in enumerate(texts):
        whole = model(torch.cat([text, tokens(5, 3, 1)[row]])[None]).logits_BSV[0]
        close(padded[row][valid[row]], whole[:-1], 1e-10)
        close(after[row, 0], whole[-1], 1e-10)


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from([None, 1, 3, 6]),
    moves=st.lists(st.tuples(st.sampled_from(["add", "append", "rollback", "remove"]), st.integers(0, 3), st.integers(1, 9)), max_size=12),
)
def test_any_history_of_rows_gives_the_logits_of_their_texts(window: int | None, moves: list[tuple[str, int, int]]) -> None:
    """A model of the cache: a list of texts. Every append is compared to the whole text computed at once."""
    model = filled(attention(sliding_window=window))
    cache, texts, newest = cache_of(model, block=4), list[list[int]](), list[int]()
    for step, (move, place, size) in enumerate(moves):
        if move == "add" or not texts:
            assert cache.add() == len(texts)
            texts.append([])
            newest.append(0)
            continue
        row = place % len(texts)
        if move == "remove":
            cache.remove(row)
            texts[row], newest[row] = texts[-1], newest[-1]
            del texts[-1], newest[-1]
        elif move == "rollback":
            size = min(size, newest[row])
            cache.rollback(row, size)
            texts[row], newest[row] = texts[row][: len(texts[row]) - size], newest[row] - size
        else:
            rows = range(row, len(texts))
            new = tokens(step, len(rows), size)
            logits = forward(model, cache, rows, new)
            for i, r in enumerate(rows):
                texts[r], newest[r] = texts[r] + new[i].tolist(), size
                close(logits[i], model(torch.tensor([texts[r]])).logits_BSV[0, -size:], 1e-10)
        assert cache.lengths == [len(text) for text in texts]
        for length, position_T in zip(cache.lengths, cache.position.tolist(), strict=False):
            held = [position for position in position_T if position >= 0]
            assert held == list(range(length - len(held), length))
            assert position_T == held + [-1] * (len(position_T) - len(held))


def test_window_bounds_memory_and_full_attention_grows_by_blocks() -> None:
    def held(window: int | None) -> list[int]:
        model = filled(attention(sliding_window=window))
        cache = cache_of(model, block=8)
        cache.add()
        sizes = []
        for token in tokens(6, 60, 1, 1):
            forward(model, cache, range(0, 1), token)
            sizes.append(cache.position.shape[1])
        return sizes

    assert held(None) == [-(-n // 8) * 8 for n in range(1, 61)]
    assert max(held(6)) == 16  # window - 1 + one block, rounded up to blocks


def test_rollback_reaches_as_far_as_the_window_is_held() -> None:
    model, text = filled(attention(sliding_window=3)), tokens(7, 20)
    cache = cache_of(model, block=6)
    cache.add()
    for token in text.view(20, 1, 1):
        forward(model, cache, range(0, 1), token)
    oldest = int(cache.position[cache.position >= 0].min())
    far = 20 - oldest - 2  # the window of the next token begins at the oldest token held
    assert far > 1
    with pytest.raises(ValueError, match="no longer held"):
        cache.rollback(0, far + 1)
    assert cache.lengths == [20]
    cache.rollback(0, far)
    close(forward(model, cache, range(0, 1), text[None, 20 - far :]), model(text[None]).logits_BSV[:, -far:], 1e-10)
    with pytest.raises(ValueError, match="cannot roll back"):
        cache.rollback(0, 21)


def test_trimmed_rows_of_different_lengths_decode_together() -> None:
    model = filled(attention(sliding_window=4))
    cache, texts = cache_of(model, block=5), [tokens(12, 3), tokens(13, 9), tokens(14, 1)]
    for row, text in enumerate(texts):
        cache.add()
        forward(model, cache, range(row, row + 1), text[None])
    for step in range(20):
        new = tokens(20 + step, 3, 1)
        texts = [torch.cat([text, token]) for text, token in zip(texts, new, strict=True)]
        logits = forward(model, cache, range(0, 3), new)
        for row, text in enumerate(texts):
            close(logits[row, 0], model(text[None]).logits_BSV[0, -1], 1e-10)


def test_removing_the_last_row_gives_memory_back() -> None:
    model = filled(SMALL)
    cache = cache_of(model)
    cache.add()
    cache.add()
    forward(model, cache, range(0, 2), tokens(8, 2, 5))
    assert cache.num_bytes > 0
    cache.remove(0)
    cache.remove(0)
    assert cache.num_bytes == 0 and cache.num_rows == 0


def test_a_row_that_held_nan_does_not_spoil_its_successor() -> None:
    model = filled(SMALL)
    cache = cache_of(model)
    cache.add()
    cache.add()
    forward(model, cache, range(0, 2), tokens(9, 2, 6))
    cache.value[0][1] = float("nan")
    cache.remove(1)
    text = tokens(10, 1, 3)
    row = cache.add()
    forward(model, cache, range(0, 1), tokens(9, 1, 4))  # the longer neighbour makes the empty columns of the new row visible to a mask
    close(forward(model, cache, range(row, row + 1), text), model(text).logits_BSV, 1e-10)
    both = forward(model, cache, range(0, 2), tokens(11, 2, 1))
    assert bool(both.isfinite().all())
