"""The generations that a node keeps in its arena, each with a sealed description beside it: an agent takes over from one that was killed.

No torch, and no lock: whoever has it takes turns.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.arena import Arena, NoRoom, Slot, State, own_folder, slot_bytes
from moetrain.checkpoint.generation import Generation, Key, needed
from moetrain.store.backend import FULL
from moetrain.store.manifest import SaveId

GENERATIONS = "generations"  # the folder of descriptions


class Shelf:
    """`generations` by key, their slots held as READY. Room is made by taking away what nobody needs, or what was asked to give way."""

    def __init__(self, folder: Path, arena: Arena) -> None:
        """Takes over what an agent before this one left in `folder`."""
        self.arena = arena
        self.generations: dict[Key, Generation] = {}
        self._folder = folder / GENERATIONS
        self._take_over()

    @property
    def job(self) -> tuple[str, int]:
        """The run and the epoch of the newest job that left something here."""
        newest = max(self.generations.values(), key=lambda one: one.save, default=None)
        return ("", 0) if newest is None else (newest.job.run, newest.save.epoch)

    def put(self, generation: Generation) -> None:
        """In the place of one with the same key. Its slots are the caller's to let go of. Raises OSError, NoRoom for its description."""
        description = generation.to_bytes()
        try:
            self._describe(generation.key, description)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self.arena.trim(self._folder.parent):
                sentence = f"There is no room in {self._folder} for the description of a copy."
                raise NoRoom(sentence, "Make room there.", is_passing=True) from error  # costs this save alone
            return self.put(generation)
        self._forget(generation.key)
        self.generations[generation.key] = generation
        self.arena.hold(self._slots(generation), State.READY)

    def remove(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            self._description(key).unlink(missing_ok=True)
            self._forget(key)

    def keep(self, complete: SaveId) -> None:
        """Frees what no recovery needs when `complete` is the newest save that every rank has."""
        for key, names in needed(self.generations.values(), complete).items():
            generation = self.generations[key]
            if not names:
                self.remove([key])
            elif names < generation.held.keys():
                with suppress(OSError, NoRoom):  # it takes more memory than it has to
                    self.put(generation.only(names))

    def drop(self, rank: int, complete: SaveId | None, coming: SaveId) -> None:
        """As `keep`. A rank's parts between `complete` and the save that is coming will never be complete; without a `complete` that holds
        for all that its job made."""
        if complete is not None:
            self.keep(complete)
        floor = complete or SaveId(coming.epoch, 0)
        self.remove(key for key in self.generations if key[1] == rank and floor < key[0] < coming)

    def reserve(self, sizes: list[int]) -> list[Slot]:
        """What other nodes keep here makes room for what this one needs. Raises NoRoom."""
        try:
            return self.arena.reserve(sizes)
        except NoRoom:
            copies = sorted(key for key, one in self.generations.items() if one.is_copy)
            if not copies:
                raise
            self.give_way(sizes, copies)
            return self.arena.reserve(sizes)

    def give_way(self, sizes: list[int], keys: list[Key]) -> None:
        """Removes as many of these as it takes, in order, or none where all together are too few. Raises NoRoom then."""
        wanted = sum(map(slot_bytes, sizes))
        room, going = self.arena.room(), list[Key]()
        for key in keys:
            if room >= wanted:
                break
            room += sum(slot.num_bytes for slot in self._slots(self.generations[key]) if slot.holds == {State.READY: 1})
            going.append(key)
        if room < wanted:
            raise self.arena.no_room(wanted)
        self.remove(going)

    def _describe(self, key: Key, description: bytes) -> None:
        path = self._description(key)
        own_folder(path.parent)
        draft = path.with_name(f".{path.name}")
        try:
            draft.write_bytes(description)
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)

    def _forget(self, key: Key) -> None:
        if key in self.generations:
            self.arena.release(self._slots(self.generations.pop(key)), State.READY)

    def _slots(self, generation: Generation) -> list[Slot]:
        return [self.arena.slots[held.slot] for held in generation.held.values()]

    def _description(self, key: Key) -> Path:
        return self._folder / f"{key[0]}-{key[1]:05d}.json"

    def _take_over(self) -> None:
        for path in sorted(self._folder.glob("*.json")):
            try:
                generation = Generation.from_bytes(path.read_bytes(), str(path))
                slots = [self.arena.adopt(held.slot) for held in generation.held.values()]
                if any(slot.num_bytes < held.num_bytes for slot, held in zip(slots, generation.held.values(), strict=True)):
                    raise CheckpointError(f"{path} names slots of another size.")
                if path != self._description(generation.key):
                    raise CheckpointError(f"{path} is a draft.")
            except (OSError, ValueError, CheckpointError):
                with suppress(OSError):
                    path.unlink()
                continue
            self.generations[generation.key] = generation
            self.arena.hold(slots, State.READY)
        self.arena.remove_strangers()
