"""What makes a checkpoint exist: a complete list of every logical tensor and where its bytes are. Pure values, JSON with a checksum.

Never a list of differences: one read says everything, so a missing chunk can never pass for zeros.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from moetrain.base.checksum import crc32c
from moetrain.base.errors import CheckpointError
from moetrain.store.boxes import Shape
from moetrain.store.parsing import parsing

FORMAT, VERSION = "moetrain.checkpoint", 1
WEIGHT16 = "weight16"  # component: an expert's master rounded to bfloat16, written where the master's turn has not come
Group = tuple[str, int]
"""A bank and one of its experts: what is saved and restored together."""


class SaveId(NamedTuple):
    """Which save: the epoch of the job that made it, and a number that grows over the life of the folder. Sorts by age."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch:06d}-{self.seq:08d}"

    @classmethod
    def parse(cls, text: str) -> "SaveId | None":
        """The id a file or folder name starts with (a leading dot is skipped); None for any other name."""
        match = re.match(r"\.?(\d{6})-(\d{8})(?!\d)", text)
        return cls(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Piece:
    """A box of one logical tensor: the values [start, start + size) of an object's array, or the one value of an integer scalar."""

    offset: Shape
    shape: Shape
    object: str  # name under objects/
    start: int = 0
    crc: int = 0  # CRC32C of the piece's little-endian bytes: also tells a wrong object from the right one
    value: int | None = None


@dataclass(frozen=True)
class Tensor:
    """One logical tensor: one component of one parameter, of one expert. Names as in `model.state.Fragment`."""

    name: str
    component: str
    bank: str | None
    expert: int | None
    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """`name:component` or `name:component:expert`."""
        return f"{self.name}:{self.component}" + ("" if self.expert is None else f":{self.expert}")

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def group(self) -> Group | None:
        return None if self.bank is None or self.expert is None else (self.bank, self.expert)

    def to_json(self) -> dict:
        return vars(self) | {"pieces": [vars(piece) for piece in self.pieces]}

    @classmethod
    def of_json(cls, found: dict) -> "Tensor":
        pieces = tuple(Piece(**piece | {"offset": tuple(piece["offset"]), "shape": tuple(piece["shape"])}) for piece in found["pieces"])
        return cls(**found | {"shape": tuple(found["shape"]), "pieces": pieces})


@dataclass(frozen=True)
class ObjectRecord:
    """One Zarr array of one rank and save. `step`: the training step whose state it holds."""

    name: str
    step: int
    num_bytes: int
    metadata_crc: int  # of its zarr.json


@dataclass(frozen=True)
class Manifest:
    """One recovery point. `parent`: the recovery point from which experts not written this time were taken over. `ancestors`: of every
    earlier start that this one goes back to, the save at which the next start went on, oldest first."""

    save: SaveId
    parent: SaveId | None
    index: int  # number of commits before this one in its line; drives the rotation
    step: int
    time: float  # seconds since the epoch
    mode: str
    full: bool
    new_bytes: int  # written by this save
    world: int
    ep: int  # number of different sets of experts that ranks held
    progress: dict
    objects: dict[str, ObjectRecord]
    tensors: dict[str, Tensor]
    ledger: dict = field(default_factory=dict)  # tokens per expert: routed, held by its objects, lost; {} when nobody counted
    ancestors: tuple[SaveId, ...] = ()

    def went_through(self, save: SaveId) -> bool:
        """Whether the training that led here had made that save, or is it: what a rollback left behind is as old, but of another course."""
        return is_on(self.way, save)

    @property
    def way(self) -> tuple[SaveId, ...]:
        """The last save of every start that led here."""
        return (*self.ancestors, self.save)

    @property
    def seq(self) -> int:
        return self.save.seq

    @property
    def total_bytes(self) -> int:
        """Of every object this recovery point needs."""
        return sum(record.num_bytes for record in self.objects.values())

    def groups(self) -> list[Group]:
        """Every expert, bank by bank in the order of the model."""
        return sorted({tensor.group for tensor in self.tensors.values() if tensor.group}, key=lambda group: (natural(group[0]), group[1]))

    def banks(self) -> dict[str, int]:
        """Number of experts of every bank, in the order of the model."""
        return {bank: expert + 1 for bank, expert in self.groups()}  # the last one wins: experts come in order

    def ages(self) -> dict[Group, int]:
        """For every expert, how many steps older than this recovery point its oldest object is."""
        return self._oldest(tensor for tensor in self.tensors.values() if tensor.component != WEIGHT16)

    def weight_ages(self) -> dict[Group, int]:
        """For every expert, how many steps older than this recovery point the weights are that it restores."""
        return self._oldest(self.newest_weights(tensor) for tensor in self.tensors.values() if tensor.component == "master")

    def newest_weights(self, tensor: Tensor) -> Tensor:
        """What to read for a tensor: of an expert's master its bfloat16 copy, when that is newer; else the tensor itself."""
        if tensor.component != "master" or tensor.group is None:
            return tensor
        copy = self.tensors.get(replace(tensor, component=WEIGHT16).key)
        return copy if copy is not None and self.step_of(copy) > self.step_of(tensor) else tensor

    def step_of(self, tensor: Tensor) -> int:
        """The training step of a tensor's oldest object."""
        return min(self.objects[piece.object].step for piece in tensor.pieces)

    def _oldest(self, tensors: Iterable[Tensor]) -> dict[Group, int]:
        oldest: dict[Group, int] = dict.fromkeys(self.groups(), 0)
        for tensor in tensors:
            if tensor.group:
                oldest[tensor.group] = max(oldest[tensor.group], self.step - self.step_of(tensor))
        return oldest

    def adam_steps(self) -> dict[Group, int]:
        """For every expert that has one, its own count of Adam updates."""
        steps = (tensor for tensor in self.tensors.values() if tensor.group and tensor.component == "step")
        return {tensor.group: tensor.pieces[0].value for tensor in steps if tensor.group and tensor.pieces[0].value is not None}

    def to_bytes(self) -> bytes:
        found = vars(self) | {"format": FORMAT, "version": VERSION}  # asdict copies deeply: seconds for 50 thousand tensors
        found |= {"objects": [vars(record) for record in self.objects.values()], "tensors": [t.to_json() for t in self.tensors.values()]}
        return seal(json.dumps(found, separators=(",", ":")).encode())

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Manifest":
        """Raises CheckpointError, naming `what`, when it is damaged or of another format."""
        found = unseal(data, what)
        if found.pop("format", None) != FORMAT or found.pop("version", None) != VERSION:
            raise CheckpointError(f"{what} is no checkpoint manifest of version {VERSION}.", "Read it with the release that wrote it.")
        with parsing(what):
            parent = None if found["parent"] is None else SaveId(*found["parent"])
            found |= {
                "save": SaveId(*found["save"]),
                "parent": parent,
                "ancestors": tuple(SaveId(*one) for one in found.get("ancestors", [parent] if parent else [])),  # absent: an early one's
                "objects": {record["name"]: ObjectRecord(**record) for record in found["objects"]},
                "tensors": by_key(Tensor.of_json(tensor) for tensor in found["tensors"]),
            }
            return cls(**found)


def is_on(way: Iterable[SaveId], save: SaveId) -> bool:
    """Whether starts whose last saves are these made that save, or one of them is it."""
    return any(save.epoch == last.epoch and save.seq <= last.seq for last in way)


def by_key(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {tensor.key: tensor for tensor in tensors}


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key by which blocks.2 comes before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def seal(payload: bytes) -> bytes:
    """The payload and a last line with its CRC32C in hexadecimal."""
    return payload + f"\n{crc32c(payload):08x}\n".encode()


def unseal(data: bytes, what: str) -> dict:
    """The JSON object under a seal. Raises CheckpointError when a bit of it changed or the end is missing."""
    payload, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    if not data.endswith(b"\n") or last != f"{crc32c(payload):08x}".encode():
        raise CheckpointError(f"{what} is damaged: its checksum does not match.")
    with parsing(what):
        found = json.loads(payload)
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is damaged.")
    return found
