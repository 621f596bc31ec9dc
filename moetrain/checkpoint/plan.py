"""Who writes which fragment, and which objects a rank's share makes. Pure, no torch.

No rank asks another: all see the same holdings and come to the same answer. Experts go first, whole, each to the holder that has least;
what many ranks hold alike then fills the gaps (arXiv 2408.04307, adaptive sharding of non-expert state), cut along dim 0 where needed.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod

from moetrain.checkpoint.modes import Selection, is_written
from moetrain.store.encode import stored_dtype
from moetrain.store.manifest import Group, Tensor

SMALLEST_CUT = 4096  # bytes: no tensor is cut into smaller pieces than this

Holders = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A fragment without its data, or rows of it: the logical tensor with one piece (the box), and the ranks whose bytes are equal."""

    tensor: Tensor
    holders: Holders
    number: int = 0  # of the fragment in the state

    @property
    def is_value(self) -> bool:
        """An integer scalar travels in the object's attributes, not in its array."""
        return self.tensor.shape == () and self.tensor.dtype in ("int32", "int64")

    @property
    def size(self) -> int:
        return prod(self.tensor.pieces[0].shape)

    @property
    def num_bytes(self) -> int:
        return self.size * stored_dtype(self.tensor.dtype).itemsize

    @property
    def order(self) -> tuple[int, str, tuple[int, ...]]:
        """Largest first, the same on every holder."""
        return -self.num_bytes, self.tensor.key, self.tensor.pieces[0].offset

    def rows(self, start: int, stop: int) -> "Part":
        """Rows `start` to `stop` of this box."""
        (piece,) = self.tensor.pieces
        piece = replace(piece, offset=(piece.offset[0] + start, *piece.offset[1:]), shape=(stop - start, *piece.shape[1:]))
        return replace(self, tensor=replace(self.tensor, pieces=(piece,)))


@dataclass(frozen=True)
class Holding:
    """Bytes of one component that some ranks hold alike: of one expert, or of all that is no expert's (`group` None)."""

    group: Group | None
    component: str
    holders: Holders
    num_bytes: int

    @classmethod
    def of_json(cls, found: list) -> "Holding":
        group, component, holders, num_bytes = found
        return cls(None if group is None else (group[0], group[1]), component, tuple(holders), num_bytes)

    def to_json(self) -> list:
        return [self.group, self.component, self.holders, self.num_bytes]


def holdings_of(parts: Iterable[Part]) -> list[Holding]:
    """What one rank knows by itself. Gathered from all ranks once and passed to `merged`, it is what `writes` needs to balance them all."""
    sizes: dict[tuple[Group | None, str, Holders], int] = defaultdict(int)
    for part in parts:
        sizes[part.tensor.group, part.tensor.component, tuple(sorted(part.holders))] += part.num_bytes
    return [Holding(*key, num_bytes) for key, num_bytes in sizes.items()]


def merged(answers: Iterable[Iterable[Holding]]) -> list[Holding]:
    """The holdings of all ranks, each once, in one order. Holders of the same bytes say the same."""
    found = {holding for answer in answers for holding in answer}
    return sorted(found, key=lambda h: (h.group or ("", -1), h.component, h.holders))


@dataclass(frozen=True)
class Writes:
    """Who writes what in one checkpoint: the writer of every expert (by its holders), and the bytes every rank takes of what is shared."""

    experts: dict[tuple[Group, Holders], int]
    quotas: dict[Holders, dict[int, int]]
    loads: dict[int, int]  # bytes of every rank
    bound: float  # bytes that the heaviest rank writes at least, whoever decides

    @property
    def imbalance(self) -> float:
        """Heaviest rank over the mean."""
        return max(self.loads.values()) * len(self.loads) / (sum(self.loads.values()) or 1)


def writes(holdings: list[Holding], mode: str, selection: Selection | None) -> Writes:
    """The division of one checkpoint over all ranks that appear in `holdings`."""
    experts: dict[tuple[Group, Holders], int] = defaultdict(int)
    shared: dict[Holders, int] = defaultdict(int)
    for holding in holdings:
        if not is_written(tensor_of(holding), mode, selection):
            continue
        if holding.group is None:
            shared[holding.holders] += holding.num_bytes
        else:
            experts[holding.group, holding.holders] += holding.num_bytes
    loads = dict.fromkeys(sorted({rank for holding in holdings for rank in holding.holders}), 0)
    for (rank,) in [holders for holders in shared if len(holders) == 1]:
        loads[rank] += shared[rank,]
    writers = {}
    for unit in sorted(experts, key=lambda unit: (len(unit[1]) > 1, -experts[unit], unit)):
        writers[unit] = min(unit[1], key=lambda rank: (loads[rank], rank))
        loads[writers[unit]] += experts[unit]
    quotas = {}
    for holders in sorted((holders for holders in shared if len(holders) > 1), key=lambda holders: (len(holders), holders)):
        quotas[holders] = _filled(loads, holders, shared[holders])
        for rank, num_bytes in quotas[holders].items():
            loads[rank] += num_bytes
    return Writes(writers, quotas, loads, _bound(experts, shared, len(loads)))


def tensor_of(holding: Holding) -> Tensor:
    """Any tensor of a holding, for asking what is written."""
    bank, expert = holding.group or (None, None)
    return Tensor("", holding.component, bank, expert, "", (), ())


def _filled(loads: dict[int, int], holders: Holders, num_bytes: int) -> dict[int, int]:
    """How much of `num_bytes` every holder takes so that their loads come to one level, as water does."""
    by_load = sorted(holders, key=lambda rank: (loads[rank], rank))
    level, lowest = 0.0, 0
    for count in range(1, len(by_load) + 1):
        lowest += loads[by_load[count - 1]]
        level = (num_bytes + lowest) / count
        if count == len(by_load) or level <= loads[by_load[count]]:
            break
    return {rank: max(0, round(level - loads[rank])) for rank in holders}


def _bound(experts: dict[tuple[Group, Holders], int], shared: dict[Holders, int], num_ranks: int) -> float:
    """The heaviest rank of the best division: over all sets of holders, what only they have shared evenly; experts as whole ones."""
    whole: dict[Holders, list[int]] = defaultdict(list)
    for (_, holders), num_bytes in experts.items():
        whole[holders].append(num_bytes)
    least = (sum(shared.values()) + sum(experts.values())) / max(1, num_ranks)
    for holders in whole.keys() | shared.keys():
        inside = sum(sum(units) for other, units in whole.items() if set(other) <= set(holders))
        inside += sum(num_bytes for other, num_bytes in shared.items() if set(other) <= set(holders))
        least = max(least, inside / len(holders))
    for holders, units in whole.items():
        loads = [shared.get((rank,), 0) for rank in holders]  # theirs alone
        least = max(least, min(loads) + max(units))
        for _ in units:  # as if all were as small as the smallest: then the least loaded is the best choice
            loads[loads.index(min(loads))] += min(units)
        least = max(least, *loads)
    return least


def my_parts(
    parts: list[Part], rank: int, mode: str = "full", selection: Selection | None = None, holdings: list[Holding] | None = None
) -> list[Part]:
    """What `rank` writes of the parts it holds. Every value of the checkpoint is written by exactly one of its holders.

    `holdings`: of all ranks (`merged`). Without it ranks know only what they hold themselves: each set of holders is balanced by itself.
    """
    parts = [part for part in parts if is_written(part.tensor, mode, selection)]
    if holdings is not None:
        return _share(parts, rank, writes(holdings, mode, selection))
    by_holders: dict[Holders, list[Part]] = defaultdict(list)
    for part in parts:
        by_holders[tuple(sorted(part.holders))].append(part)
    return [part for some in by_holders.values() for part in _share(some, rank, writes(holdings_of(some), mode, selection))]


def _share(parts: list[Part], rank: int, plan: Writes) -> list[Part]:
    mine = []
    shared: dict[Holders, list[Part]] = defaultdict(list)
    for part in parts:
        holders = tuple(sorted(part.holders))
        if part.tensor.group is not None:
            if plan.experts[part.tensor.group, holders] == rank:
                mine.append(part)
        elif holders == (rank,):
            mine.append(part)
        else:
            shared[holders].append(part)
    for holders, members in shared.items():
        mine += _taken(members, rank, dict(plan.quotas[holders]))
    return sorted(mine, key=lambda part: (part.number, part.tensor.pieces[0].offset))


def _taken(parts: list[Part], rank: int, quotas: dict[int, int]) -> list[Part]:
    """The largest part goes to the holder with the greatest quota left; rows that are too many for it go on to the next."""
    mine = []
    for part in sorted(parts, key=lambda part: part.order):
        left: Part | None = part
        while left is not None:
            writer = min(quotas, key=lambda holder: (-quotas[holder], holder))
            taken, left = _cut(left, quotas[writer])
            quotas[writer] -= taken.num_bytes
            if writer == rank:
                mine.append(taken)
    return mine


def _cut(part: Part, num_bytes: int) -> tuple[Part, Part | None]:
    """About `num_bytes` of a part and the rest; all of it where either would be too small."""
    if part.num_bytes < 2 * SMALLEST_CUT or not part.tensor.shape:
        return part, None
    rows = part.tensor.pieces[0].shape[0]
    row_bytes = part.num_bytes // rows
    least = ceil(SMALLEST_CUT / row_bytes)
    wanted = max(least, round(num_bytes / row_bytes))
    if rows - wanted < least:
        return part, None
    return part.rows(0, wanted), part.rows(wanted, rows)


@dataclass(frozen=True)
class ObjectPlan:
    """One future Zarr array and its tensors. `parts`: numbers of the fragments they come from."""

    label: str
    dtype: str  # as stored
    size: int  # values
    tensors: list[Tensor]
    parts: list[int]


def lay_out(parts: list[Part]) -> list[ObjectPlan]:
    """The objects of a rank's share, one for each expert (and one for all else) and stored type."""
    objects = []
    for label, dtype, members in _arrays(parts):
        size, tensors = 0, []
        for part in members:
            piece = replace(part.tensor.pieces[0], start=size)
            tensors.append(replace(part.tensor, pieces=(piece,)))
            size += 0 if part.is_value else part.size
        objects.append(ObjectPlan(f"{label}.{dtype}", dtype, size, tensors, [part.number for part in members]))
    return objects


def _arrays(parts: list[Part]) -> list[tuple[str, str, list[Part]]]:
    """(label, stored type, parts) of every object. Integer scalars join the label's longest list: no files of their own."""
    arrays: dict[str, dict[str, list[Part]]] = defaultdict(dict)
    values: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        label = "dense" if part.tensor.group is None else f"{part.tensor.bank}.{part.tensor.expert}"
        if part.is_value:
            values[label].append(part)
        else:
            arrays[label].setdefault(stored_dtype(part.tensor.dtype).name, []).append(part)
    for label, members in values.items():
        home = max(arrays[label], key=lambda dtype: len(arrays[label][dtype]), default="int64")
        arrays[label].setdefault(home, []).extend(members)
    return [(label, dtype, members) for label, by_dtype in arrays.items() for dtype, members in by_dtype.items()]
