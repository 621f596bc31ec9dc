"""The memory of a node that its agent owns: slots, plain files on shared memory that ranks and agent map. No torch.

One slot holds one object of one save. Slots are used again for objects of the same size, so that a copy meets no page that is not there.
"""

import hashlib
import mmap
import os
import secrets
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.store.backend import is_s3

SHARED_MEMORY = Path("/dev/shm")
SLOTS = "slots"
DESCRIPTION_BYTES, MOST_DESCRIPTION_BYTES = 1 << 20, 1 << 30  # kept free for descriptions: a 128th of the file system, within these


class State(Enum):
    """Why a slot is held. One that nobody holds is free; a held one is never filled again."""

    FREE = 0
    FILLING = 1  # by a rank
    READY = 2  # part of a generation
    PERSISTING = 3  # being written to the store, or sent to the partner
    RECOVERY = 4  # being read by a rank


def usual_folders() -> tuple[Path, ...]:
    """Shared memory first, then the folder for temporary files."""
    return SHARED_MEMORY, Path(tempfile.gettempdir())


def arena_folder(checkpoint: Path, folder: str = "") -> Path:
    """Where the arena of a run lies on this node. The same for every rank and for a later start, through symbolic links, too."""
    place = checkpoint if is_s3(checkpoint) else checkpoint.resolve()
    name = f"moetrain-{os.getuid()}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"
    if folder:
        return Path(folder).absolute() / name
    usable = (base for base in usual_folders() if base.is_dir() and os.access(base, os.W_OK))
    return next(usable, Path(tempfile.gettempdir())) / name


def own_folder(path: Path) -> Path:
    """Makes a folder that nobody else can look into. Raises CheckpointError when it is another user's."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or path.is_symlink():
        raise CheckpointError(f"{path} belongs to somebody else or is open to others.", "Remove it, or set checkpoint.agent.folder.")
    return path


def free_bytes(folder: Path) -> int:
    """Bytes that slots can still have there, once the folder is made: less what their descriptions may take. What lies on shared memory
    must fit the machine's too."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    descriptions = min(max(DESCRIPTION_BYTES, found.f_blocks * found.f_frsize // 128), MOST_DESCRIPTION_BYTES)
    room = max(0, found.f_bavail * found.f_frsize - descriptions)
    return min(room, available_memory()) if folder.is_relative_to(SHARED_MEMORY) else room


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping, less a reserve of 5 % for everybody else."""
    with open("/proc/meminfo") as lines:
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB\n")}
    return max(0, found["MemAvailable"] - found["MemTotal"] // 20)


def spare_folders(arena: Path, folder: str = "") -> list[Path]:
    """Where slots lie that find no room in the arena's own folder. `folder`: as in `arena_folder`; who chose one wants no other."""
    spare = Path(tempfile.gettempdir()) / arena.name
    return [] if folder or spare == arena else [spare]


def possible_bytes(folders: Iterable[Path], free: Callable[[Path], int] = free_bytes) -> int:
    """What an arena could hold in all: what it holds, and what is free where its slots may lie (in one of `folders`, not in all)."""
    found = [0]
    for folder in folders:
        slots = folder / SLOTS
        used = sum(path.stat().st_size for path in slots.iterdir()) if slots.is_dir() else 0
        found.append(used + free(folder.parent))
    return max(found)


def slot_bytes(num_bytes: int) -> int:
    """Whole pages."""
    return -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE


def map_slot(path: str) -> mmap.mmap:
    """All of a slot, its pages present. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)


class NoRoom(CheckpointError):
    """The arena has no slots for a copy now. `is_passing`: something there is being written or read, and will be free; `is_empty`: no
    copy lies there that could give way."""

    def __init__(self, message: str, hint: str, is_passing: bool, is_empty: bool = False) -> None:
        super().__init__(message, hint)
        self.is_passing, self.is_empty = is_passing, is_empty


class Slot:
    """A file and this process's view of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.memory = map_slot(path)
        self.num_bytes = len(self.memory)
        self.holds: Counter[State] = Counter()
        self.is_abandoned = False  # by a rank that did not say it has done with it

    @property
    def state(self) -> State:
        return max(self.holds, key=lambda state: state.value, default=State.FREE)


class Arena:
    """The slots of one node and run. Not thread-safe: the agent holds its lock."""

    def __init__(self, folders: Sequence[Path], free: Callable[[Path], int] = free_bytes) -> None:
        """`folders`: where slots may lie, the best first; made when needed."""
        self.folders, self._free = folders, free
        self.slots: dict[str, Slot] = {}

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self.slots.values())

    def reserve(self, sizes: Sequence[int]) -> list[Slot]:
        """A slot for each number of bytes, held as FILLING. Raises NoRoom and holds nothing when they do not all fit."""
        spare: dict[int, list[Slot]] = defaultdict(list)
        for slot in self.slots.values():
            if slot.state is State.FREE:
                spare[slot.num_bytes].append(slot)
        taken: list[Slot] = []
        try:
            for size in map(slot_bytes, sizes):
                slot = spare[size].pop() if spare[size] else self._new(size, spare)
                self.hold([slot], State.FILLING)
                taken.append(slot)
        except NoRoom:
            self.release(taken, State.FILLING)
            raise
        return taken

    def hold(self, slots: Iterable[Slot], state: State) -> None:
        for slot in slots:
            slot.holds[state] += 1

    def release(self, slots: Iterable[Slot], state: State) -> None:
        for slot in slots:
            slot.holds[state] -= 1
            if not slot.holds[state]:
                del slot.holds[state]

    def adopt(self, path: str) -> Slot:
        """A slot that an agent before this one made. Raises OSError."""
        if path not in self.slots:
            self.slots[path] = Slot(path)
        return self.slots[path]

    def remove_strangers(self) -> None:
        """Unlinks files that are no slot of this arena; whoever has mapped one keeps its pages to himself."""
        for folder in self.folders:
            if folder.is_dir():
                for name in os.listdir(folder):
                    if str(folder / name) not in self.slots:
                        (folder / name).unlink()

    def trim(self, folder: Path) -> bool:
        """Gives the memory of free slots below `folder` back; whether there were any."""
        free = [slot for slot in self.slots.values() if slot.state is State.FREE and folder in Path(slot.path).parents]
        for slot in free:
            self._remove(slot)
        return bool(free)

    def room(self) -> int:
        """Bytes that could be reserved now."""
        free = sum(slot.num_bytes for slot in self.slots.values() if slot.state is State.FREE)
        return free + max((self._free(folder.parent.parent) for folder in self.folders), default=0)

    def no_room(self, num_bytes: int) -> NoRoom:
        """For `num_bytes` more."""
        room = ", ".join(f"{self._free(folder.parent.parent) / 1e9:.1f} GB in {folder.parent.parent}" for folder in self.folders)
        return NoRoom(
            f"A checkpoint copy of {num_bytes / 1e9:.2f} GB more fits nowhere: there is {room}.",
            "Make room, raise the container's --shm-size, set checkpoint.snapshot_experts, or use more ranks.",
            any(slot.state in (State.PERSISTING, State.RECOVERY) for slot in self.slots.values()),
        )

    def _new(self, size: int, spare: dict[int, list[Slot]]) -> Slot:
        slot = self._create(size)
        while slot is None and any(spare.values()):  # of sizes that are not asked for any more
            self._remove(next(slots for slots in spare.values() if slots).pop())
            slot = self._create(size)
        if slot is None:
            raise self.no_room(size)
        return slot

    def _remove(self, slot: Slot) -> None:
        """Its pages are given back at once, whoever still maps them: zeros are read there from now on. Where somebody may still write,
        or the file system cannot, that waits for the last of those maps."""
        if not slot.is_abandoned:
            with suppress(OSError):
                slot.memory.madvise(mmap.MADV_REMOVE)
        del self.slots[slot.path]
        os.unlink(slot.path)

    def _create(self, size: int) -> Slot | None:
        for folder in self.folders:
            if self._free(folder.parent.parent) < size:
                continue
            own_folder(folder.parent)
            own_folder(folder)
            path = folder / secrets.token_hex(8)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, size)  # in full: writing to it never fails
                finally:
                    os.close(descriptor)
                slot = self.slots[str(path)] = Slot(str(path))
                return slot
            except OSError:
                with suppress(OSError):
                    path.unlink()
        return None
