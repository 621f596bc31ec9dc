"""The collective-order check: a rehearsal on torch's fake backend records which calls a rank is about to make, and ranks compare notes.

Ranks that call in different orders wait for each other for ever, or add what does not belong together. Nothing of a rehearsal travels;
only digests are compared, over the store.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.base.errors import TrainingError
from moetrain.dist.transport import imitate
from moetrain.dist.watch import Watch
from moetrain.dist.world import World

T = TypeVar("T")
COMPARING = "comparing the order of collective calls"
_NOTHING = "nothing more"


@dataclass(frozen=True)
class Group:
    """The members of one process group, as every one of them would name it."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} of ranks {self.ranks[0]}-{self.ranks[-1]}"


@dataclass(frozen=True)
class Call:
    """One collective call of one rank; `text` is equal on all members of its group where they agree."""

    group: Group
    text: str


class Rehearsal(World):
    """This rank's place in its world on a stage: CPU, groups of the fake backend, and everybody else sends what this rank sends.

    A context manager; everything under it that is given this world instead of the real one is recorded. Leaving it keeps `calls`.
    """

    def __init__(self, world: World) -> None:
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend

        super().__init__(world.rank, world.size, world.local_rank, torch.device("cpu"), "fake", world.watch.timeout_seconds)
        self.played = world.backend
        self.stage = Stage(world.rank, world.watch.timeout_seconds)
        self.watch = self.stage
        self.calls: list[Call] = []
        self.groups: dict[str, Group] = {}  # by torch's name; this rank is in all of them
        self._made: list[dist.ProcessGroup] = []
        self.group = self.new_group("all", [tuple(range(world.size))])
        self._recorder = _Recorder(self)

    def __enter__(self) -> "Rehearsal":
        self._recorder.__enter__()
        return self

    def close(self, error: str = "") -> None:
        self._recorder.__exit__(None, None, None)
        for group in self._made:
            dist.destroy_process_group(group)

    def new_group(self, name: str, parts: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """A fake group of this rank's part only: nobody else hears of it."""
        mine = next(part for part in parts if self.rank in part)
        if len(mine) == 1:
            return None
        group = dist.new_group(list(mine), backend="fake", group_desc=name)
        assert isinstance(group, dist.ProcessGroup)
        self._made.append(group)
        self.groups[group.group_name] = Group(name, mine)
        return group

    def agree(self, value: T, name: str = "agreeing on a value of rank 0") -> T:
        """This rank's own value."""
        self.sum_(torch.zeros(1), name=name)
        return json.loads(json.dumps(value))

    def gather(self, value: T, name: str = "gathering a value of every rank") -> list[T]:
        """This rank's value, as if every other had the same."""
        self.sum_(torch.zeros(1), name=name)
        return [json.loads(json.dumps(value)) for _ in range(self.size)]

    def of(self, group: Group) -> list[str]:
        """What all members of `group` must do in the same order: the calls on every group that holds them all, and among them, without
        their shapes, those that each makes with others. Pairs of ranks that agree could still wait for each other in a ring.
        """
        members = set(group.ranks)
        return [
            call.text if set(call.group.ranks) >= members else f"a call on the {call.group.name} axis with other ranks"
            for call in self.calls
        ]

    def note(self, fact: str) -> None:
        """Something that all ranks must have alike, in its place among the calls."""
        everyone = Group("all", tuple(range(self.size)))
        self.calls.append(Call(everyone, fact))


class Stage(Watch):
    """Knows the name of the operation under way."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        super().__init__(rank, timeout_seconds)
        self.names = ["no operation of ours"]

    @contextmanager
    def operation(self, name: str, timed: bool = True) -> Iterator[None]:
        self.names.append(name)
        try:
            yield
        finally:
            self.names.pop()


class _Recorder(TorchDispatchMode):
    """Sees every c10d operator, whoever calls it: ours, FSDP2's, a functional collective's."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._record(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and len(args) > 1:
            outputs, inputs = ([leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args[:2])
            for output in outputs if inputs else ():
                imitate(inputs[0], output)
        return result

    def _record(self, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
        name = given.get("group_name")
        if "process_group" in given:
            name = dist.ProcessGroup.unbox(given["process_group"]).group_name  # type: ignore[arg-type]
        if name is None:
            return  # wait_tensor: no call
        assert name in self._rehearsal.groups, f"a rehearsal called {func} on a live group"
        within = self._rehearsal.stage.names[-1]
        text = f"{func.__name__.split('.')[0].strip('_')} of {_shapes(given)} in: {within}"
        self._rehearsal.calls.append(Call(self._rehearsal.groups[str(name)], text))


def _shapes(given: dict[str, object]) -> str:
    """Type and shape of every tensor, and whatever else must be the same. Of an uneven exchange the number of rows is each rank's own."""
    uneven = bool(given.get("output_split_sizes"))
    tensors = [leaf for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]
    shapes = [[*(["rows"] if uneven else tensor.shape[:1]), *tensor.shape[1:]] for tensor in tensors]
    parts = [f"{str(tensor.dtype).removeprefix('torch.')} {shape}" for tensor, shape in zip(tensors, shapes, strict=True)]
    root = given.get("root_rank")
    return ", ".join(dict.fromkeys(parts)) + ("" if root is None else f" from rank {root}")


def compare(rehearsal: Rehearsal, world: World) -> None:
    """Raises TrainingError on every member of a group whose members are about to make different calls. Calls no collective.

    The order between the calls on different groups is compared as well.
    """
    store = world.notes()
    lines = {group: rehearsal.of(group) for group in rehearsal.groups.values()}
    for group, mine in lines.items():
        store.set(f"{group}/{world.rank}/digest", hashlib.sha256("\n".join(mine).encode()).hexdigest())
    different = dict[Group, int]()
    with world.watch.operation(COMPARING):
        for group in lines:
            first, *others = store.multi_get([f"{group}/{rank}/digest" for rank in group.ranks])
            odd = [rank for rank, digest in zip(group.ranks[1:], others, strict=True) if digest != first]
            if odd:
                different[group] = odd[0]
                store.set(f"{group}/{world.rank}/calls", json.dumps(lines[group]))
        for group, odd in different.items():
            pair = group.ranks[0], odd
            one, other = (json.loads(text) for text in store.multi_get([f"{group}/{rank}/calls" for rank in pair]))
            raise TrainingError(*_disagreement(group, pair, one, other))


def _disagreement(group: Group, pair: tuple[int, int], one: list[str], other: list[str]) -> tuple[str, str]:
    """The sentence and its hint."""
    both = enumerate(zip_longest(one, other, fillvalue=_NOTHING), start=1)
    number, (mine, theirs) = next((number, calls) for number, calls in both if calls[0] != calls[1])
    sentence = (
        f"Ranks {pair[0]} and {pair[1]} are about to make different collective calls in the group {group}: "
        f"as number {number}, rank {pair[0]} has [{mine}] and rank {pair[1]} has [{theirs}]."
    )
    return sentence, "Every rank must run the same code, packages and configuration; parallel.check_order=false starts without this check."
