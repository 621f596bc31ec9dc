"""Where recovery reads an object: the memory of this node, the memory of another node, or the store. Checked alike. No torch."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import numpy as np

from moetrain.base.checksum import crc32c
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import open_object, read_values
from moetrain.checkpoint.generation import Generation, Held, points_in_memory
from moetrain.checkpoint.wire import Address, ask
from moetrain.store.encode import ArrayReader, stored_dtype
from moetrain.store.history import History
from moetrain.store.manifest import Manifest, ObjectRecord, Piece
from moetrain.store.objects import CheckpointFolder

HERE, DISK = "the memory of this node", "disk"
BLOCK_BYTES = 1 << 18  # what was copied is still in the processor's cache when its checksum is taken


class Memory:
    """What lies in the memory of all nodes of a job, as one rank sees it: `lists` are the answers of all agents, `own` is this node's."""

    def __init__(self, lists: Sequence[dict], own: dict | None) -> None:
        self.generations: list[Generation] = []
        self._places: dict[str, list[tuple[Address | None, Held]]] = defaultdict(list)
        for found in sorted(lists, key=lambda found: found != own):
            address = None if found == own or found["address"] is None else Address(**found["address"])
            for generation in map(Generation.of_json, found["generations"]):
                self.generations.append(generation)
                for name, held in generation.held.items():
                    self._places[name].append((address, held))

    @classmethod
    def empty(cls) -> "Memory":
        return cls([], None)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def is_here(self, name: str) -> bool:
        return name in self and self._places[name][0][0] is None

    @property
    def newest_seq(self) -> int:
        """0: nothing is here."""
        return max((one.save.seq for one in self.generations), default=0)

    def points(self, on_disk: History) -> list[Manifest]:
        """Recovery points, newest first."""
        return points_in_memory(self.generations, on_disk)

    def open(self, name: str) -> "MemoryReader":
        return MemoryReader(name, self._places[name])


class MemoryReader:
    """One object, in one or several memories."""

    def __init__(self, name: str, places: Sequence[tuple[Address | None, Held]]) -> None:
        self.source = HERE
        self._name, self._left = name, list(places)
        self._place: SlotFile | Received | None = None

    def read(self, piece: Piece, out: np.ndarray | None = None) -> np.ndarray:
        """The flat values of a piece, in `out` where it is given. Raises CheckpointError when no memory has them as they were saved."""
        while True:
            if self._place is not None:
                dtype = stored_dtype(self._place.held.dtype)
                values = np.empty(prod(piece.shape), dtype) if out is None else out
                with suppress(OSError):
                    if self._place.read_into(values.view(np.uint8).data, piece.start * dtype.itemsize) == piece.crc:
                        return values
            if not self._left:
                raise CheckpointError(f"{self._name} is damaged in memory: its values are not the ones that were saved.")
            self._place = None
            with suppress(OSError):
                self._place = self._open(*self._left.pop(0))

    def _open(self, address: Address | None, held: Held) -> "SlotFile | Received":
        """Raises OSError."""
        self.source = HERE if address is None else f"the copy on {address.host}:{address.port}"
        return SlotFile(held) if address is None else Received(held, ask(address, {"op": "read", "name": self._name})[1])


class SlotFile:
    """An object in the arena of this node: a file, which is read, not mapped: a page that cannot be read is an error and no signal."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def read_into(self, memory: memoryview, offset: int) -> int | None:
        """Fills `memory` and returns the CRC32C of what it holds now; None when the slot ends early. Raises OSError."""
        crc, position = 0, 0
        descriptor = os.open(self.held.slot, os.O_RDONLY)
        try:
            while position < len(memory):
                block = memory[position : position + BLOCK_BYTES]
                count = os.preadv(descriptor, [block], offset + position)
                if not count:
                    return None
                crc = crc32c(block[:count], crc)
                position += count
        finally:
            os.close(descriptor)
        return crc


class Received:
    """An object that another node sent."""

    def __init__(self, held: Held, content: memoryview) -> None:
        self.held, self._content = held, content

    def read_into(self, memory: memoryview, offset: int) -> int | None:
        """As of a SlotFile."""
        found = self._content[offset : offset + len(memory)]
        if len(found) != len(memory):
            return None
        memory[:] = found
        return crc32c(memory)


class ObjectReader:
    """One object, from memory where it lies there, else from the store. Used by one thread."""

    def __init__(self, record: ObjectRecord, memory: MemoryReader | None, folder: CheckpointFolder) -> None:
        self.bytes_from: Counter[str] = Counter()  # the memory of each node
        self._record, self._memory, self._folder = record, memory, folder
        self._disk: ArrayReader | None = None

    def read(self, piece: Piece, out: np.ndarray | None = None) -> np.ndarray:
        """The flat values of a piece, in `out` where it is given, which holds anything after an error.

        Raises CheckpointError unless they are those that were saved.
        """
        if self._memory is not None:
            try:
                values = self._memory.read(piece, out)
                self.bytes_from[self._memory.source] += values.nbytes
                return values
            except CheckpointError:
                if not self._record.metadata_crc:  # only memory knew it
                    raise
                self._memory = None
        if self._disk is None:
            self._disk = open_object(self._folder, self._record)
        return read_values(self._disk, piece, out)


class Sources:
    """Opens objects wherever they are nearest."""

    def __init__(self, folder: CheckpointFolder, memory: Memory) -> None:
        self._folder, self._memory = folder, memory

    def is_here(self, name: str) -> bool:
        """Whether it lies in this node's memory."""
        return self._memory.is_here(name)

    def open(self, record: ObjectRecord) -> ObjectReader:
        return ObjectReader(record, self._memory.open(record.name) if record.name in self._memory else None, self._folder)
