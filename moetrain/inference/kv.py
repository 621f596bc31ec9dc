"""Keys and values of the sequences under way. B rows of a call, S new tokens, T columns, G key/value heads, d head_dim, N = B*S.

Every sequence is a row; its tokens stand in columns in the order they came, each with its absolute position (-1: empty). Rows have
lengths of their own: attention masks by position, so nothing is ever padded or realigned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.model.config import ModelConfig

BLOCK = 256  # columns the memory grows by


class KeyValues:
    """The cache of one model. Rows are 0..num_rows-1; `remove` keeps them so by moving the last row into the gap.

    With a sliding window, memory is bounded by the window plus the larger of one block and the longest call, whatever the length.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, block: int = BLOCK) -> None:
        self.window = config.attention.sliding_window
        self.block = block
        self.lengths: list[int] = []  # tokens so far of every row = position of its next token
        self._shape_Gd = (config.attention.num_kv_heads, config.attention.head_dim)
        self._num_layers, self._dtype, self._device = config.num_layers, dtype, device
        self._release()

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return sum(x.numel() * x.element_size() for x in (*self.key, *self.value, self.position))

    def add(self) -> int:
        """A new empty row; its number is num_rows - 1."""
        self.lengths.append(0)
        self._used.append(0)
        self._fit(len(self.lengths), 0)
        return len(self.lengths) - 1

    def remove(self, row: int) -> None:
        """Forgets a row; the last row takes its number. The last of all gives the memory back."""
        last = self.num_rows - 1
        for x in (*self.key, *self.value):
            x[row] = x[last]
            x[last] = 0  # an empty column must be finite: it is masked to weight 0, and 0 times NaN is NaN
        self.position[row] = self.position[last]
        self.position[last] = -1
        for numbers in (self.lengths, self._used):
            numbers[row] = numbers[last]
            numbers.pop()
        if not self.lengths:
            self._release()

    def append(self, rows: range, num_tokens: int, valid_BS: Tensor | None = None) -> "Appending":
        """Reserves columns for the next `num_tokens` tokens of each row and returns the cache for this one forward.

        `rows` has step 1. `valid_BS` (bool, on this device) marks real tokens when rows bring different numbers of them: padding,
        left or right, is not stored and gets position -1. If the forward fails, `rollback` the tokens.
        """
        count_B = [num_tokens] * len(rows) if valid_BS is None else valid_BS.sum(1).tolist()
        for row, count in zip(rows, count_B, strict=True):
            self._trim(row, count)
        self._fit(self.num_rows, max(self._used[row] + count for row, count in zip(rows, count_B, strict=True)))
        if valid_BS is None:
            order_BS = torch.arange(num_tokens, device=self._device).expand(len(rows), num_tokens)
            source_N = None
        else:
            order_BS = torch.where(valid_BS, valid_BS.cumsum(1) - 1, -1)
            source_N = valid_BS.flatten().nonzero().squeeze(1)
        position_BS = torch.where(order_BS < 0, -1, order_BS + self._column(self.lengths, rows))
        column_N, position_N = (order_BS + self._column(self._used, rows)).flatten(), position_BS.flatten()
        row_N = torch.arange(rows.start, rows.stop, device=self._device).repeat_interleave(num_tokens)
        if source_N is not None:
            row_N, column_N, position_N = row_N[source_N], column_N[source_N], position_N[source_N]
        self.position[row_N, column_N] = position_N
        for row, count in zip(rows, count_B, strict=True):
            self.lengths[row] += count
            self._used[row] += count
        return Appending(self, rows, position_BS, row_N, column_N, source_N, max(self._used[row] for row in rows))

    def rollback(self, row: int, num_tokens: int) -> None:
        """Forgets the last tokens of a row. With a sliding window only as far as the tokens before them are still held: always
        those of the latest `append`. ValueError otherwise.
        """
        length, used = self.lengths[row] - num_tokens, self._used[row] - num_tokens
        oldest = self.lengths[row] - self._used[row]
        needed = 0 if self.window is None else max(0, length - self.window + 1)
        if length < 0 or oldest > needed:
            gone = f"positions {needed} to {oldest - 1} are no longer held"
            raise ValueError(f"cannot roll back {num_tokens} of {self.lengths[row]} tokens: {gone}")
        self.position[row, used : self._used[row]] = -1
        self.lengths[row], self._used[row] = length, used

    def _trim(self, row: int, count: int) -> None:
        """Drops what lies before the window once a block of it has gathered, so that a column moves once per block of tokens."""
        used = self._used[row]
        if self.window is None or used + count <= self.window - 1 + max(self.block, count):
            return
        keep = min(used, self.window - 1)  # the next token itself is the window's last place
        for x in (*self.key, *self.value):
            x[row, :, :keep] = x[row, :, used - keep : used].clone()
        self.position[row, :keep] = self.position[row, used - keep : used].clone()
        self.position[row, keep:used] = -1
        self._used[row] = keep

    def _fit(self, num_rows: int, num_columns: int) -> None:
        """Grows the memory to hold that many rows and columns, by whole blocks of columns."""
        held_rows, held_columns = self.position.shape
        num_rows, num_columns = max(num_rows, held_rows), max(-(-num_columns // self.block) * self.block, held_columns)
        if (num_rows, num_columns) == (held_rows, held_columns):
            return
        heads, head_dim = self._shape_Gd
        for tensors in (self.key, self.value):
            for layer, old in enumerate(tensors):  # one layer at a time: never twice the whole cache
                tensors[layer] = old.new_zeros(num_rows, heads, num_columns, head_dim)
                tensors[layer][:held_rows, :, :held_columns] = old
        old, self.position = self.position, self.position.new_full((num_rows, num_columns), -1)
        self.position[:held_rows, :held_columns] = old

    def _release(self) -> None:
        heads, head_dim = self._shape_Gd
        self._used: list[int] = []  # columns taken in every row; fewer than its length once the window has been trimmed
        empty = torch.empty(0, heads, 0, head_dim, dtype=self._dtype, device=self._device)
        self.key, self.value = [empty] * self._num_layers, [empty] * self._num_layers  # per layer [rows, G, columns, d]
        self.position = torch.empty(0, 0, dtype=torch.int64, device=self._device)

    def _column(self, numbers: list[int], rows: range) -> Tensor:
        return torch.tensor([[numbers[row]] for row in rows], device=self._device)


@dataclass
class Appending:
    """A KeyValueCache for one forward: every attention layer extends it once. `position_BS` goes into the ForwardContext."""

    cache: KeyValues
    rows: range
    position_BS: Tensor
    row_N: Tensor
    column_N: Tensor
    source_N: Tensor | None  # which of the B*S tokens are real; None: all
    num_columns: int

    def extend(self, layer: int, key_BGSd: Tensor, value_BGSd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores this call's keys and values; returns views of all of these rows' and their positions (-1: empty).

        The views are valid until the cache's next `append`, `rollback` or `remove`.
        """
        held = slice(self.rows.start, self.rows.stop)
        views = []
        for store_RGTd, new_BGSd in ((self.cache.key[layer], key_BGSd), (self.cache.value[layer], value_BGSd)):
            new_NGd = new_BGSd.transpose(1, 2).flatten(0, 1)
            store_RGTd[self.row_N, :, self.column_N] = new_NGd if self.source_N is None else new_NGd[self.source_N]
            views.append(store_RGTd[held, :, : self.num_columns])
        return views[0], views[1], self.cache.position[held, : self.num_columns]
