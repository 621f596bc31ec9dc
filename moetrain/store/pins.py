"""Pins: names that keep a recovery point whatever `keep` says. A pin is the name of a file, so that damage cannot change it."""

import re
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.store.backend import Backend
from moetrain.store.manifest import SaveId, seal, unseal

INTENT = ".manifests.json"  # a sweep's journal in gc/: the manifests that it is about to remove


class Pins:
    """The pins of one checkpoint folder.

    A pin and a sweep may meet. The sweep says which manifests it will remove *before* it looks at the pins for the last time; a pin
    looks at what sweeps have said *after* it exists. So one of the two sees the other, and a pin that was granted is never swept.
    """

    def __init__(self, folder: Path, journals: Path, backend: Backend) -> None:
        self._folder, self._journals, self._backend = folder, journals, backend

    def all(self) -> dict[str, SaveId]:
        return dict(sorted(self._list()))

    def kept(self) -> set[SaveId]:
        return {save for _, save in self._list()}

    def add(self, name: str, save: SaveId, manifest: Path) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
            raise CheckpointError(f"{name!r} is no name for a pin.", "Use letters, digits, dots, hyphens and underscores.")
        if name.isdigit():
            raise CheckpointError(f"{name!r} is no name for a pin: it would be taken for the number of a recovery point.", "Add a letter.")
        if (known := self.all().get(name)) is not None:
            if known == save:
                return
            raise CheckpointError(f"The pin {name} keeps seq {known.seq} already.", "Choose another name, or unpin it first.")
        path = self._folder / f"{name}@{save}"
        try:
            self._backend.prepare([self._folder])
            self._backend.create(path, seal(b"{}"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            is_granted = save not in self._going() and self._backend.exists(manifest)
        except (OSError, CheckpointError):
            self._take_back(path)
            raise
        if not is_granted:
            self._take_back(path)
            raise CheckpointError(f"seq {save.seq} is just being removed.", "Pin another one; `moetrain checkpoint list` shows them.")

    def remove(self, name: str) -> None:
        found = [save for known, save in self._list() if known == name]
        if not found:
            raise CheckpointError(f"There is no pin {name}.", f"Pins: {', '.join(self.all()) or 'none'}.")
        for save in found:
            self._backend.remove(self._folder / f"{name}@{save}")
        self._backend.settle(self._folder)

    def _take_back(self, path: Path) -> None:
        self._backend.remove(path)
        self._backend.settle(self._folder)

    def _list(self) -> list[tuple[str, SaveId]]:
        parts = [name.rpartition("@") for name in self._backend.list(self._folder) if not name.startswith(".")]
        return [(name, save) for name, _, text in parts if name and (save := SaveId.parse(text))]

    def _going(self) -> set[SaveId]:
        """What sweeps have said they will remove. A journal that went away meanwhile is done; one that cannot be read may mean anything."""
        going: set[SaveId] = set()
        for name in self._backend.list(self._journals):
            if name.startswith(".") or not name.endswith(INTENT):
                continue
            try:
                found = unseal(self._backend.read(self._journals / name), str(self._journals / name))
            except FileNotFoundError:
                continue
            going |= {save for text in found["manifests"] if (save := SaveId.parse(text))}
        return going
