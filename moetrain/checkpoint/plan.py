"""Who writes which fragment, and how a rank's share lies in its arena. Pure, no torch.

No rank asks another: holders of the same box see the same list and come to the same answer.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from math import prod

from moetrain.store.encode import stored_dtype
from moetrain.store.manifest import Tensor

ALIGNMENT = 64  # bytes, of every object in the arena


@dataclass(frozen=True)
class Part:
    """A fragment without its data: the logical tensor with one piece (the box), and the ranks whose bytes are equal."""

    tensor: Tensor
    holders: tuple[int, ...]

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


@dataclass(frozen=True)
class ObjectPlan:
    """One future Zarr array: where its values lie in the arena, and its tensors. `parts`: numbers in the list that was planned."""

    label: str
    dtype: str  # as stored
    offset: int  # bytes into the arena
    size: int  # values
    tensors: list[Tensor]
    parts: list[int]


def my_parts(parts: list[Part], rank: int) -> list[int]:
    """The numbers of the parts that `rank` writes.

    Among parts with the same holders, the largest goes to the holder that has least so far. An expert stays with one writer.
    Loads are balanced within each set of holders: up to one unit, each of them writes the same number of bytes.
    """
    units: dict[tuple[int, ...], dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, part in enumerate(parts):
        units[tuple(sorted(part.holders))][part.tensor.group or _box(part)].append(number)
    mine = []
    for holders, members in units.items():
        load = dict.fromkeys(holders, 0)
        sizes = {unit: sum(parts[number].num_bytes for number in numbers) for unit, numbers in members.items()}
        for unit in sorted(members, key=lambda unit: (-sizes[unit], str(unit))):
            writer = min(holders, key=lambda holder: (load[holder], holder))
            load[writer] += sizes[unit]
            if writer == rank:
                mine += members[unit]
    return sorted(mine)


def _box(part: Part) -> tuple[str, tuple[int, ...]]:
    return part.tensor.key, part.tensor.pieces[0].offset


def lay_out(parts: list[Part], mine: list[int]) -> tuple[list[ObjectPlan], int]:
    """The objects of a rank's share, one for each expert (and one for all else) and stored type, and the arena bytes they need."""
    objects, offset = [], 0
    for label, dtype, numbers in _arrays(parts, mine):
        size, tensors = 0, []
        for number in numbers:
            piece = replace(parts[number].tensor.pieces[0], start=size)
            tensors.append(replace(parts[number].tensor, pieces=(piece,)))
            size += 0 if parts[number].is_value else parts[number].size
        objects.append(ObjectPlan(f"{label}.{dtype}", dtype, offset, size, tensors, numbers))
        offset += -(-size * stored_dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
    return objects, offset


def _arrays(parts: list[Part], mine: list[int]) -> list[tuple[str, str, list[int]]]:
    """(label, stored type, parts) of every object. Integer scalars join the label's longest list: no files of their own."""
    arrays: dict[str, dict[str, list[int]]] = defaultdict(dict)
    values: dict[str, list[int]] = defaultdict(list)
    for number in mine:
        tensor = parts[number].tensor
        label = "dense" if tensor.group is None else f"{tensor.bank}.{tensor.expert}"
        if parts[number].is_value:
            values[label].append(number)
        else:
            arrays[label].setdefault(stored_dtype(tensor.dtype).name, []).append(number)
    for label, numbers in values.items():
        home = max(arrays[label], key=lambda dtype: len(arrays[label][dtype]), default="int64")
        arrays[label].setdefault(home, []).extend(numbers)
    return [(label, dtype, numbers) for label, by_dtype in arrays.items() for dtype, numbers in by_dtype.items()]
