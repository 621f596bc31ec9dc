"""A checkpoint folder: immutable objects, receipts and manifests, and the renames that make them appear whole.

claims/<epoch>                            who may commit: the newest one
objects/<save>/<rank>-<random>/<label>/   one Zarr array each; `.part` behind <random> until all are durable
receipts/<save>/<rank>.json               what one rank wrote;  receipts/<save>/abandoned: the reason there is no manifest
manifests/<save>.json                     the commit
"""

import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.store.encode import DATA, METADATA, Encoded
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, SaveId, seal, unseal

ABANDONED = "abandoned"


class Superseded(CheckpointError):
    """Another job has claimed the folder since; this one may not commit any more."""


class CheckpointFolder:
    """Reads and writes of one checkpoint folder, none of them ever in place. No torch."""

    def __init__(self, path: Path, io: Io) -> None:
        self.path = path
        self.io = io
        self._claims = path / "claims"
        self._manifests = path / "manifests"
        self._objects = path / "objects"
        self._receipts = path / "receipts"

    # who may write

    def claim(self, now: float) -> SaveId:
        """Takes the folder over from whoever had it: a new epoch, and the number of its first save.

        Raises CheckpointError when the folder cannot be written.
        """
        try:
            for folder in (self._claims, self._manifests, self._objects, self._receipts):
                self.io.mkdir(folder)
            self.io.fsync_folder(self.path)
            owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": now}).encode()
            while True:
                epoch = self.newest_epoch() + 1
                try:
                    self._put_new(self._claims / f"{epoch:06d}", seal(owner))
                    break
                except FileExistsError:  # two jobs start at once: the other one won this number
                    continue
            return SaveId(epoch, 1 + max((save.seq for save in self._used()), default=0))
        except OSError as error:
            hint = "checkpoint folders need a writable file system with hard links and rename."
            raise CheckpointError(f"The checkpoint folder {self.path} cannot be written: {error.strerror}.", hint) from error

    def newest_epoch(self) -> int:
        return max((int(name) for name in self.io.list(self._claims) if name.isdigit()), default=0)

    def check_claim(self, epoch: int) -> None:
        """Raises Superseded unless `epoch` is still the newest."""
        newest = self.newest_epoch()
        if newest != epoch:
            raise Superseded(f"Another job has taken over the checkpoint folder {self.path} (epoch {newest}, this job has {epoch}).")

    def _used(self) -> Iterator[SaveId]:
        for folder in (self._manifests, self._objects, self._receipts):
            yield from (save for name in self.io.list(folder) if (save := SaveId.parse(name)))

    # objects

    def new_share(self, save: SaveId, rank: int) -> str:
        """A name that nobody has used for one rank's objects of one save. The object `label` in it is `<share>/<label>`."""
        return f"{save}/{rank:05d}-{secrets.token_hex(4)}"

    def put_share(self, share: str, objects: Iterable[tuple[str, Encoded]]) -> None:
        """Writes labelled objects; all of them are there and durable when it returns, none of them before."""
        target = self._objects / share
        part = target.with_name(f"{target.name}.part")
        self.io.mkdir(part)
        self.io.fsync_folder(self._objects)
        for label, encoded in objects:
            folder = part / label
            self.io.mkdir(folder)
            if encoded.data:
                self.io.write_new(folder / DATA, encoded.data)
            self.io.write_new(folder / METADATA, [encoded.metadata])
            self.io.fsync_folder(folder)
        self.io.fsync_folder(part)
        self.io.rename(part, target)
        self.io.fsync_folder(target.parent)

    def object_folder(self, name: str) -> Path:
        return self._objects / name

    # receipts and outcomes

    def put_receipt(self, save: SaveId, rank: int, receipt: dict) -> None:
        folder = self._receipts / str(save)
        self.io.mkdir(folder)
        self._put_new(folder / f"{rank:05d}.json", seal(json.dumps(receipt, separators=(",", ":")).encode()))

    def receipt(self, save: SaveId, rank: int) -> dict | None:
        """What the rank has handed in; None while it has not. Raises CheckpointError when damaged."""
        path = self._receipts / str(save) / f"{rank:05d}.json"
        try:
            return unseal(self.io.read(path), str(path))
        except FileNotFoundError:
            return None

    def abandon(self, save: SaveId, reason: str, needs_full: bool = False) -> None:
        """Says for good that this save will not be committed, then removes what was written for it. Nothing happens when it was
        decided before. Only for the process that would commit it. `needs_full`: the next save has nothing to refer to."""
        if self.outcome(save) is not None:
            return
        folder = self._receipts / str(save)
        self.io.mkdir(folder)
        self._put_new(folder / ABANDONED, seal(json.dumps({"reason": reason, "needs_full": needs_full}).encode()))
        with suppress(OSError):  # a late rank may still be writing there; a later sweep takes what is left
            self.io.remove_tree(self._objects / str(save))

    def outcome(self, save: SaveId) -> bool | None:
        """True: committed, False: abandoned, None: not known yet."""
        if (self._manifests / f"{save}.json").exists():
            return True
        return False if (self._receipts / str(save) / ABANDONED).exists() else None

    def reason(self, save: SaveId) -> str:
        """Why a save was abandoned; "" when nobody says."""
        return self._abandoned(save).get("reason", "")

    def needs_full(self, save: SaveId) -> bool:
        """Whether it was abandoned because what it referred to is lost."""
        return self._abandoned(save).get("needs_full", False)

    def _abandoned(self, save: SaveId) -> dict:
        path = self._receipts / str(save) / ABANDONED
        try:
            return unseal(self.io.read(path), str(path))
        except (OSError, CheckpointError):
            return {}

    def begun(self, save: SaveId) -> set[int]:
        """The ranks that have written something for this save, whole or not."""
        return {int(name.partition("-")[0]) for name in self.io.list(self._objects / str(save))}

    # manifests

    def commit(self, manifest: Manifest) -> None:
        """Makes the recovery point exist. Raises Superseded, or CheckpointError when this save was decided before."""
        self.check_claim(manifest.save.epoch)
        decided = CheckpointError(f"The save {manifest.save} was decided before.")
        if self.outcome(manifest.save) is not None:
            raise decided
        try:
            self._put_new(self._manifests / f"{manifest.save}.json", manifest.to_bytes())
        except FileExistsError:
            raise decided from None

    def saves(self) -> list[SaveId]:
        """Every committed save, newest first, damaged manifests too."""
        names = self.io.list(self._manifests)
        return sorted((save for name in names if name.endswith(".json") and (save := SaveId.parse(name))), reverse=True)

    def manifest(self, save: SaveId) -> Manifest:
        """Raises CheckpointError when it is damaged, missing or unreadable."""
        path = self._manifests / f"{save}.json"
        try:
            manifest = Manifest.from_bytes(self.io.read(path), str(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if manifest.save != save:
            raise CheckpointError(f"{path} is the manifest of another save, {manifest.save}.")
        return manifest

    def history(self) -> Iterator[Manifest | CheckpointError]:
        """Recovery points, newest first, read one at a time; for a damaged one what is wrong with it."""
        for save in self.saves():
            try:
                yield self.manifest(save)
            except CheckpointError as error:
                yield error

    # room

    def sweep(self, keep: int, current: SaveId) -> None:
        """Removes all but the newest `keep` recovery points, then what none of them needs.

        Manifests go first and are gone for good before any object does: a crash leaks, it never loses. What a save newer than
        `current` or another job wrote is left alone. Raises Superseded; does nothing about objects while a manifest is unreadable.
        """
        self.check_claim(current.epoch)
        self._drop_manifests(keep)
        live: set[str] = set()
        for manifest in self.history():
            if isinstance(manifest, CheckpointError):
                return
            live |= manifest.objects.keys()
        for folder in (self._receipts, self._objects):
            for name in self.io.list(folder):
                if (save := SaveId.parse(name)) and save < current:
                    self._remove_dead(folder / name, live if folder == self._objects else set())
        self._remove_leftovers(current)

    def _drop_manifests(self, keep: int) -> None:
        good = 0
        for save, manifest in zip(self.saves(), self.history(), strict=True):
            if good >= keep:
                self.io.unlink(self._manifests / f"{save}.json")
            good += isinstance(manifest, Manifest)
        self.io.fsync_folder(self._manifests)

    def _remove_dead(self, folder: Path, live: set[str]) -> None:
        """Removes the shares of one save (or its receipts) except live objects, and the folders that are empty then."""
        for share in self.io.list(folder):
            if not (folder / share).is_dir():
                self.io.unlink(folder / share)
                continue
            for label in self.io.list(folder / share):
                if f"{folder.name}/{share}/{label}" not in live:
                    self.io.remove_tree(folder / share / label)
            if not self.io.list(folder / share):
                self.io.rmdir(folder / share)
        if not self.io.list(folder):
            self.io.rmdir(folder)

    def _remove_leftovers(self, current: SaveId) -> None:
        """Temporary names of crashed writers, and claims that were superseded."""
        for name in self.io.list(self._manifests):
            if name.startswith(".") and (save := SaveId.parse(name)) and save < current:
                self.io.unlink(self._manifests / name)
        for name in self.io.list(self._claims):
            epoch = name.removeprefix(".").partition(".")[0]
            if epoch.isdigit() and int(epoch) < current.epoch:
                self.io.unlink(self._claims / name)

    def _put_new(self, path: Path, data: bytes) -> None:
        """Creates a file that is whole and durable from its first moment. FileExistsError when the name is taken."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self.io.write_new(temporary, [data])
            self._link(temporary, path)
        finally:
            self.io.unlink(temporary)
        self.io.fsync_folder(path.parent)

    def _link(self, source: Path, target: Path) -> None:
        try:
            self.io.link(source, target)
        except FileExistsError:
            if source.stat().st_nlink != 2:  # a network file system may do it, lose the answer, and be asked again
                raise


def resolve(path: Path) -> Path:
    """The checkpoint folder of a run folder, or the folder itself. Raises CheckpointError when there is none."""
    for folder in (path, path / "checkpoint"):
        if (folder / "manifests").is_dir():
            return folder
    raise CheckpointError(f"There is no checkpoint in {path}.", "Name a run folder, or its folder `checkpoint`.")
