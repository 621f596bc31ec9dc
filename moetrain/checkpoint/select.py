"""Whose turn it is: the experts of one partial checkpoint. Pure functions, no torch.

A rule ranks the experts of a bank, the most urgent first; `first_of` takes K of them and keeps an upper limit of the age.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

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
    """The oldest first: with a constant K the rotation of the paper (arXiv 2408.04307, sequential selection)."""
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


def rotation(index: int, banks: dict[str, int], experts_per_save: int) -> Selection:
    """What `sequential` comes to with a constant K after a full checkpoint; `index`: number of checkpoints before this one.

    `banks` gives the number of experts of every bank in the order of the model. The layers start at points spread evenly over the
    experts, so that the experts of one checkpoint live on different ranks (for contiguous placements; the paper's offset of one per
    layer does that only when a rank holds one expert). Any ceil(E / K) checkpoints in a row contain every expert.
    """
    selection = {}
    for layer, (bank, num_experts) in enumerate(banks.items()):
        first = first_expert(index, layer, len(banks), num_experts, experts_per_save)
        count = min(experts_per_save, num_experts)
        selection[bank] = sorted((first + i) % num_experts for i in range(count))
    return selection


def first_expert(index: int, layer: int, num_layers: int, num_experts: int, experts_per_save: int) -> int:
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
    chosen = {bank: set(experts) for bank, experts in selection.items()}
    place = {bank: {expert: number for number, expert in enumerate(ranking)} for bank, ranking in rankings.items()}
    load: dict[tuple[int, ...], int] = defaultdict(int, dict.fromkeys(homes.values(), 0))
    for bank, experts in chosen.items():
        for expert in experts:
            load[homes[bank, expert]] += 1
    num_ranks = len({rank for home in load for rank in home})
    limit = TOLERANCE * (sum(load.values()) + spread) / num_ranks
    while (heaviest := max(load, key=lambda home: (load[home] / len(home), home))) and load[heaviest] / len(heaviest) > limit:
        lighter = {home for home in load if (load[home] + 1) / len(home) < load[heaviest] / len(heaviest)}
        exchanges = []
        for bank, experts in chosen.items():
            heavy = max((e for e in experts - forced[bank] if homes[bank, e] == heaviest), key=place[bank].__getitem__, default=None)
            light = next((e for e in rankings[bank] if e not in experts and homes[bank, e] in lighter), None)
            if heavy is not None and light is not None:
                exchanges.append((place[bank][light] - place[bank][heavy], bank, heavy, light))
        if not exchanges:
            break
        _, bank, heavy, light = min(exchanges)
        chosen[bank] = chosen[bank] - {heavy} | {light}
        load[heaviest] -= 1
        load[homes[bank, light]] += 1
    return {bank: sorted(experts) for bank, experts in chosen.items()}
