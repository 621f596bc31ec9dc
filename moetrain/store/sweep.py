"""Garbage collection of a checkpoint folder: what no recovery point and no pin needs, in an order in which a crash can only leak.

1. `gc/<save>.manifests.json` says which manifests will go; pins are read once more; manifests go, durably.
2. Manifests are listed again. `gc/<save>.objects.json` says what none of them names; that goes, and the journals last.
An interrupted sweep leaves its journals. The next one removes what the second names (a dead object never comes to life again: names
are never reused, and a save takes over only what a manifest names) and forgets the first.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moetrain.base.errors import CheckpointError
from moetrain.store.backend import Backend
from moetrain.store.manifest import Manifest, SaveId, is_on, seal, unseal
from moetrain.store.pins import INTENT, Pins

DEAD = ".objects.json"


class Points(Protocol):
    """The recovery points of a folder, newest first. `manifest` raises CheckpointError."""

    def saves(self) -> list[SaveId]: ...

    def manifest(self, save: SaveId) -> Manifest: ...

    def check_claim(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Needs:
    """What a recovery point refers to. `objects`: names; `way`: as of a Manifest."""

    parent: SaveId | None
    objects: frozenset[str]
    way: tuple[SaveId, ...]


class Sweep:
    """One sweep of the folder at `root`, by the holder of its newest epoch. `current`: the newest save whose remains may be removed."""

    def __init__(self, points: Points, root: Path, backend: Backend, current: SaveId) -> None:
        self._points, self._root, self._backend, self._current = points, root, backend, current
        self._journals, self._manifests = root / "gc", root / "manifests"
        self._pins = Pins(root / "pins", self._journals, backend)
        self._needs: dict[SaveId, Needs] = {}  # a manifest never changes, and a large one takes a second to read
        self._damage: dict[SaveId, str] = {}

    def run(self, keep: int) -> list[str]:
        """Returns what is wrong with recovery points because of which no object could go: nobody knows what they need."""
        self._finish_earlier()
        self._drop_manifests(keep)
        live = self._live()
        if live is not None:
            dead = [*self._dead(live), *self._leftovers()]
            if dead:
                self._points.check_claim(self._current.epoch)  # a coordinator that slept must not remove what its successor builds on
                journal = self._say(DEAD, {"dead": dead})
                self._remove(dead)
                self._backend.remove(journal)
        intent = self._journals / f"{self._current}{INTENT}"
        if self._backend.exists(intent):
            self._backend.remove(intent)
        return list(self._damage.values())

    def _say(self, kind: str, content: dict[str, list[str]]) -> Path:
        path = self._journals / f"{self._current}{kind}"
        self._backend.prepare([self._journals])
        self._backend.remove(path)  # of a sweep after the same save that came to nothing
        self._backend.create(path, seal(json.dumps(content).encode()))
        return path

    def _finish_earlier(self) -> None:
        for name in self._backend.list(self._journals):
            path = self._journals / name
            if name.endswith(DEAD) and not name.startswith("."):
                with suppress(CheckpointError):  # damaged: what it named is found again below
                    self._remove(unseal(self._backend.read(path), str(path))["dead"])
            if (save := SaveId.parse(name)) and save <= self._current:
                self._backend.remove(path)

    def sorted_out(self, keep: int) -> tuple[list[SaveId], list[SaveId]]:
        """Recovery points that stay, and those that go. The newest `keep` that the newest one went through stay, as many of what rollbacks
        left behind among them, all among them that cannot be read, and the pinned ones."""
        stay, go, num_on, num_left = list[SaveId](), list[SaveId](), 0, 0
        pinned = self._pins.kept()
        way: tuple[SaveId, ...] = ()  # of the newest that can be read
        for save in self._points.saves():
            needs = self._needs_of(save)
            way = way or (needs.way if needs else ())
            is_left = needs is not None and not is_on(way, save)
            stays = save in pinned or (num_on < keep and (num_left < keep or not is_left))
            (stay if stays else go).append(save)
            num_left += is_left
            num_on += needs is not None and not is_left
        return stay, go

    def _drop_manifests(self, keep: int) -> None:
        _, drop = self.sorted_out(keep)
        if not drop:
            return
        self._say(INTENT, {"manifests": [str(save) for save in drop]})
        for save in set(drop) - self._pins.kept():
            self._backend.remove(self._manifests / f"{save}.json")
        self._backend.settle(self._manifests)

    def _live(self) -> set[str] | None:
        """Every object that a recovery point names; None while that cannot be known."""
        live, parents, listed = set[str](), set[SaveId](), self._points.saves()
        self._damage.clear()  # of those that have just gone
        for save in listed:
            if (needs := self._needs_of(save)) is not None:
                live |= needs.objects
                parents |= {needs.parent} if needs.parent else set()
        if self._damage:
            return None
        if any(self._backend.exists(self._manifests / f"{parent}.json") for parent in parents.difference(listed)):  # the list is late
            return None
        return live

    def _needs_of(self, save: SaveId) -> Needs | None:
        """None for a damaged one, or one that somebody removed since it was listed."""
        if save not in self._needs:
            try:
                point = self._points.manifest(save)
            except CheckpointError as error:
                self._damage[save] = error.message
                return None
            self._needs[save] = Needs(point.parent, frozenset(point.objects), point.way)
        return self._needs[save]

    def _dead(self, live: set[str]) -> Iterator[str]:
        """Paths below the root, as few as say it all: a whole save, a whole share or an object."""
        kept = {part for name in live for part in (name, name.rpartition("/")[0], name.partition("/")[0])}
        for save in self._of_older_saves("objects"):
            if save not in kept:
                yield f"objects/{save}"
                continue
            for share in self._backend.list(self._root / "objects" / save):
                if f"{save}/{share}" not in kept:
                    yield f"objects/{save}/{share}"
                    continue
                for label in self._backend.list(self._root / "objects" / save / share):
                    if f"{save}/{share}/{label}" not in kept:
                        yield f"objects/{save}/{share}/{label}"
        yield from (f"receipts/{save}" for save in self._of_older_saves("receipts"))

    def _of_older_saves(self, folder: str) -> list[str]:
        names = self._backend.list(self._root / folder)
        return [name for name in names if (save := SaveId.parse(name)) and save < self._current]

    def _leftovers(self) -> Iterator[str]:
        """Temporary names of crashed writers."""
        yield from (f"manifests/{name}" for name in self._of_older_saves("manifests") if name.startswith("."))
        for name in self._backend.list(self._root / "claims"):
            epoch = name.removeprefix(".").partition(".")[0]
            if name.startswith(".") and epoch.isdigit() and int(epoch) < self._current.epoch:
                yield f"claims/{name}"

    def _remove(self, dead: list[str]) -> None:
        for name in dead:
            path = self._root / name
            if name.startswith(("objects/", "receipts/")):
                self._backend.remove_tree(path)
            else:
                self._backend.remove(path)
        for folder in sorted({(self._root / name).parent for name in dead}):
            if self._backend.is_folder(folder):
                self._backend.settle(folder)
