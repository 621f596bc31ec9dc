"""Whose turn it is: the experts of one partial checkpoint. Pure functions, no torch.

A rule ranks the experts of a bank, the most urgent first; `first_of` takes K of them and keeps an upper limit of the age.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moetrain.checkpoint.modes import Selection
from moetrain.store.manifest import Group

TOLERANCE = 1.05  # heaviest rank over the mean


@dataclass(frozen=True)
class Waiting:
    """The experts of one bank. `ages`: checkpoints since the one that wrote it; `unsaved`: assignments since; `first`: breaks ties."""

    ages: list[int]
    unsaved: list[int]
    first: int

    def order(self, expert: int) -> int:
        """The place in a rotation that begins with `first`."""
        return (expert - self.first) % len(self.ages)


def sequential(waiting: Waiting) -> list[int]:
    """The oldest first: with a constant K and even ranks the rotation of the paper (arXiv 2408.04307, sequential selection)."""
    return sorted(range(len(waiting.ages)), key=lambda e: (-waiting.ages[e], waiting.order(e)))


def greedy(waiting: Waiting) -> list[int]:
    """The most unsaved assignments first (arXiv 2408.04307, load-aware selection). Experts that get few starve."""
    return sorted(range(len(waiting.ages)), key=lambda e: (-waiting.unsaved[e], -waiting.ages[e], waiting.order(e)))


def unsaved_age(waiting: Waiting) -> list[int]:
    """The greatest unsaved x age first.

    The least total loss at a given rate saves an expert at intervals proportional to 1 / sqrt(load); unsaved is load x age, so the index
    load x age^2 is equal for all experts saved at such intervals.
    """
    ages, unsaved = waiting.ages, waiting.unsaved
    return sorted(range(len(ages)), key=lambda e: (-unsaved[e] * (ages[e] + 1), -ages[e], waiting.order(e)))


Rule = Callable[[Waiting], list[int]]
RULES: dict[str, Rule] = {"sequential": sequential, "greedy": greedy, "unsaved_age": unsaved_age}


def first_of(ranking: list[int], ages: list[int], count: int, max_age: int) -> tuple[list[int], set[int]]:
    """The `count` most urgent experts, and which of them `max_age` forces.

    No expert's age exceeds `max_age` (at least E / count - 1) from here on, now or when later checkpoints write `count` as well:
    of the experts that must be written within the next j checkpoints no more than fit into j - 1 are left for later. Ages that are
    already too great (K went down and up again) are served oldest first.
    """
    place = {expert: number for number, expert in enumerate(ranking)}
    due = sorted(ranking, key=lambda e: -ages[e])
    forced: set[int] = set()
    for number, expert in enumerate(due):
        checkpoints = max(1, max_age - ages[expert] + 1)  # left for it, this one included
        while number + 1 - (checkpoints - 1) * count > len(forced) and len(forced) < count:
            forced.add(min((e for e in due[: number + 1] if e not in forced), key=lambda e: place[e]))
    rest = (expert for expert in ranking if expert not in forced)
    chosen = [*forced, *(expert for expert, _ in zip(rest, range(count - len(forced)), strict=False))]
    return sorted(chosen), forced


def first_expert(index: int, layer: int, num_layers: int, num_experts: int, experts_per_save: int) -> int:
    """Where a layer's turn begins after `index` checkpoints. Layers start at points spread evenly over the experts, so that the experts of
    one checkpoint live on different ranks (for contiguous placements; the paper's offset of one per layer does that only when a rank
    holds one expert)."""
    return (index * experts_per_save + layer * num_experts // num_layers) % num_experts


def balanced(
    selection: Selection,
    forced: dict[str, set[int]],
    rankings: dict[str, list[int]],
    homes: dict[Group, tuple[int, ...]],
    spread: float = 0.0,
) -> Selection:
    """The selection after exchanges within banks that take experts from the heaviest ranks to lighter ones.

    `homes`: the ranks that hold an expert alike, one of which writes it; `spread`: what all ranks share out among themselves besides, in
    experts. Of the exchanges that help, the one that goes least far down a ranking comes first; none touches a forced expert. It ends when
    no rank writes more than 1.05 times what it would if all wrote the same, or when no exchange helps.
    """
    if not homes:
        return selection
    banks, places = sorted(rankings), sorted(set(homes.values()))
    chosen = {bank: set(experts) for bank, experts in selection.items()}
    movable = {bank: experts - forced[bank] for bank, experts in chosen.items()}
    number = {home: index for index, home in enumerate(places)}
    home_BE = _table(banks, rankings, lambda bank, expert: number[homes[bank, expert]])
    free_BE = _table(banks, rankings, lambda bank, expert: expert not in chosen[bank]) == 1
    movable_BE = _table(banks, rankings, lambda bank, expert: expert in movable[bank]) == 1
    width_H = np.array([len(home) for home in places])
    load_H = np.bincount(home_BE[~free_BE & (home_BE >= 0)], minlength=len(places))
    limit = TOLERANCE * (load_H.sum() + spread) / len({rank for home in places for rank in home})
    while True:
        share_H = load_H / width_H
        heaviest = len(places) - 1 - int(share_H[::-1].argmax())
        if share_H[heaviest] <= limit:
            break
        exchange = _exchange(movable_BE & (home_BE == heaviest), free_BE & ((load_H + 1) / width_H < share_H[heaviest])[home_BE])
        if exchange is None:
            break
        bank, heavy, light = exchange
        free_BE[bank, [heavy, light]] = movable_BE[bank, [light, heavy]] = True, False
        load_H[[heaviest, home_BE[bank, light]]] += -1, 1
    free = dict(zip(banks, free_BE, strict=True))
    return {bank: sorted(e for e, is_free in zip(ranking, free[bank], strict=False) if not is_free) for bank, ranking in rankings.items()}


def _table(banks: list[str], rankings: dict[str, list[int]], value: Callable[[str, int], int]) -> np.ndarray:
    """A value of every expert, [banks, E]: row by row in the order of the rankings, -1 behind the end of a short one."""
    table_BE = np.full((len(banks), max(map(len, rankings.values()))), -1)
    for row, bank in zip(table_BE, banks, strict=True):
        row[: len(rankings[bank])] = [value(bank, expert) for expert in rankings[bank]]
    return table_BE


def _exchange(heavy_BE: np.ndarray, light_BE: np.ndarray) -> tuple[int, int, int] | None:
    """Bank, place of the expert that is left out and of the one that is taken: of every bank the last heavy and the first light one, of
    these pairs the closest."""
    heavy_B = heavy_BE.shape[1] - 1 - heavy_BE[:, ::-1].argmax(axis=1)
    light_B = light_BE.argmax(axis=1)
    possible_B = np.flatnonzero(heavy_BE.any(axis=1) & light_BE.any(axis=1))
    if not possible_B.size:
        return None
    bank = int(possible_B[(light_B - heavy_B)[possible_B].argmin()])
    return bank, int(heavy_B[bank]), int(light_B[bank])
