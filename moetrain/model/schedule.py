"""When a block's routed experts run among its main-stream computations, and in how many token chunks. Pure, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement


@dataclass(frozen=True)
class Schedule:
    """`slots[c]`: the experts of token chunk c run just before main-stream computation number `slots[c]`.

    Numbers count the n computations that follow the shortcut tensor, from 1; n + 1 is after all of them. Chunks run in order, so slots
    never decrease. Slots change no bit of what a block computes, the number of chunks changes it by rounding.
    """

    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.slots and self.slots[0] >= 1, f"no such schedule: {self.slots}"
        assert list(self.slots) == sorted(self.slots), f"chunks run in order, so slots must not decrease: {self.slots}"

    @property
    def num_chunks(self) -> int:
        return len(self.slots)

    def chunks_at(self, slot: int) -> list[int]:
        """The chunks whose experts run in `slot`."""
        return [chunk for chunk, its in enumerate(self.slots) if its == slot]

    @classmethod
    def default(cls, num_operators: int) -> "Schedule":
        """One chunk just before the last computation, which hides the way back; a single computation hides the way out."""
        return cls((max(num_operators, min(num_operators + 1, 2)),))

    @classmethod
    def every(cls, num_operators: int, num_chunks: int) -> Iterator["Schedule"]:
        """All schedules of a block with so many computations, in lexical order."""
        return map(cls, combinations_with_replacement(range(1, num_operators + 2), num_chunks))
