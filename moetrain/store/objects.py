"""A checkpoint folder: immutable objects, receipts and manifests, each of which appears whole or not at all.

claims/<epoch>                            who may commit: the newest one
objects/<save>/<rank>-<random>/<label>/   one Zarr array each; `.part` behind <random> until all are durable
receipts/<save>/<rank>.json               what one rank wrote;  receipts/<save>/abandoned: the reason there is no manifest
manifests/<save>.json                     the commit
pins/<name>@<save>                        a recovery point that no sweep removes;  gc/: what a sweep is about to remove (`sweep.py`)
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.store.backend import Backend, Item, is_s3, open_backend
from moetrain.store.encode import DATA, METADATA, ArrayReader, Encoded
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, SaveId, seal, unseal
from moetrain.store.owner import Owner, are_two
from moetrain.store.parsing import parsing
from moetrain.store.pins import Pins
from moetrain.store.sweep import Sweep

ABANDONED = "abandoned"


class Superseded(CheckpointError):
    """Another job has claimed the folder since; this one may not commit any more."""


class CheckpointFolder:
    """Reads and writes of one checkpoint folder, none of them ever in place. No torch.

    `path`: a folder, or `s3://bucket/prefix` as a Path. `io`: file operations, or a whole backend in their place.
    """

    def __init__(self, path: Path, io: Io | Backend) -> None:
        self.path = path
        self.io = open_backend(path, io)
        self._claims = path / "claims"
        self._manifests = path / "manifests"
        self._objects = path / "objects"
        self._receipts = path / "receipts"
        self._pins = Pins(path / "pins", path / "gc", self.io)

    # who may write

    def claim(self, now: float) -> SaveId:
        """Takes the folder over from whoever had it: a new epoch, and the number of its first save.

        Raises CheckpointError when the folder cannot be written.
        """
        try:
            self.io.prepare([self._claims, self._manifests, self._objects, self._receipts])
            owner = Owner.of_this_process(now).to_json()
            epoch = 1 + max([self.newest_epoch(), *(save.epoch for save in self._used())])  # of these where somebody removed the claims
            while True:
                try:
                    self.io.create(self._claims / f"{epoch:06d}", seal(json.dumps(owner).encode()))
                    break
                except FileExistsError:  # two jobs start at once: the other one won this number
                    epoch += 1
            return SaveId(epoch, 1 + max((save.seq for save in self._used()), default=0))
        except OSError as error:
            hint = "checkpoint folders need a writable file system with hard links and rename."
            if is_s3(self.path):
                hint = "check the bucket and the AWS environment variables; conditional writes (If-None-Match) are needed."
            raise CheckpointError(f"The checkpoint folder {self.path} cannot be written: {error.strerror}.", hint) from error

    def newest_epoch(self) -> int:
        epoch = max((int(name) for name in self.io.list(self._claims) if name.isdigit()), default=0)
        while self.io.exists(self._claims / f"{epoch + 1:06d}"):  # a list may be late; claims have no gaps and are never removed
            epoch += 1
        return epoch

    def run(self) -> str:
        """What tells this folder from another one at the same path: the token of its first claim. "" where that does not say."""
        path = self._claims / f"{1:06d}"
        try:
            with parsing(str(path)):
                return Owner(**unseal(self.io.read(path), str(path))).token
        except (FileNotFoundError, CheckpointError):
            return ""

    def check_claim(self, epoch: int, run: str = "") -> None:
        """Raises Superseded when there is a newer one, or this is no longer the folder that said `run`; CheckpointError when `epoch`
        itself is gone: claims are never removed."""
        newest = self.newest_epoch()
        if newest and are_two(run, self.run()):
            raise Superseded(f"The checkpoint folder {self.path} was removed, and another job has made it anew.")
        if newest > epoch:
            raise Superseded(f"Another job has taken over the checkpoint folder {self.path} (epoch {newest}, this job has {epoch}).")
        if newest < epoch:
            hint = "Bring it back: the next save goes on where the last one ended."
            raise CheckpointError(f"The claims of the checkpoint folder {self.path} are gone: was it moved or unmounted?", hint)

    def _used(self) -> Iterator[SaveId]:
        for folder in (self._manifests, self._objects, self._receipts):
            yield from (save for name in self.io.list(folder) if (save := SaveId.parse(name)))

    # objects

    def new_share(self, save: SaveId, rank: int) -> str:
        """A name that nobody has used for one rank's objects of one save. The object `label` in it is `<share>/<label>`."""
        return f"{save}/{rank:05d}-{secrets.token_hex(4)}"

    def put_share(self, share: str, objects: Iterable[tuple[str, Encoded]]) -> None:
        """Writes labelled objects; all of them are durable when it returns, and nobody may count on any of them before."""
        self.io.put_group(self._objects / share, (_item(label, encoded) for label, encoded in objects))

    def drop_share(self, share: str) -> None:
        """Removes what was written of a share that failed and that nobody is told of."""
        assert "/" in share, "the share of one rank, never more"
        for name in (share, f"{share}.part"):
            with suppress(OSError):  # a later sweep takes what is left
                self.io.remove_tree(self._objects / name)

    def object_folder(self, name: str) -> Path:
        return self._objects / name

    def open(self, name: str) -> ArrayReader:
        """An object by its name in a manifest. Raises CheckpointError when its description, length or index is damaged."""
        return ArrayReader(self.object_folder(name), self.io)

    # receipts and outcomes

    def put_receipt(self, save: SaveId, rank: int, receipt: dict) -> None:
        content = json.dumps({"save": str(save), "of": rank, "receipt": receipt}, separators=(",", ":")).encode()
        self.io.create(self._receipts / str(save) / f"{rank:05d}.json", seal(content))

    def receipt(self, save: SaveId, rank: int) -> dict | None:
        """What the rank has handed in; None while it has not. Raises CheckpointError when damaged."""
        path = self._receipts / str(save) / f"{rank:05d}.json"
        try:
            found = unseal(self.io.read(path), str(path))
        except FileNotFoundError:
            return None
        if (found.get("save"), found.get("of")) != (str(save), rank):
            raise CheckpointError(f"{path} is the receipt of another rank or save.")
        return found["receipt"]

    def give_up(self, save: SaveId, reason: str, needs_full: bool = False) -> None:
        """Says that this save is not to be committed; nothing happens when it was decided before. Anybody may: it removes nothing, so that
        a commit that has just passed its own look at this is as good as any, and counts. `needs_full`: the next save has nothing to
        refer to."""
        if self.outcome(save) is None:
            content = json.dumps({"reason": reason, "needs_full": needs_full}).encode()
            with suppress(FileExistsError):  # somebody else said so
                self.io.create(self._receipts / str(save) / ABANDONED, seal(content))

    def abandon(self, save: SaveId, reason: str, needs_full: bool = False) -> None:
        """`give_up`, and removes what was written for it. Only for the process that would commit it, when it no longer will."""
        if self.outcome(save) is True:
            return
        with suppress(OSError):  # before what may take long: all ranks wait for it
            self.give_up(save, reason, needs_full)
        with suppress(OSError):  # a late rank may still be writing there; a later sweep takes what is left
            self.io.remove_tree(self._objects / str(save))
        self.give_up(save, reason, needs_full)  # where the disk was full there is room now

    def outcome(self, save: SaveId) -> bool | None:
        """True: committed, False: abandoned, None: not known yet."""
        if self.io.exists(self._manifests / f"{save}.json"):
            return True
        return False if self.io.exists(self._receipts / str(save) / ABANDONED) else None

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
        """Makes the recovery point exist. Raises Superseded, or CheckpointError when this save was decided before or the claim is gone."""
        self.check_claim(manifest.save.epoch)
        decided = CheckpointError(f"The save {manifest.save} was decided before.")
        if self.outcome(manifest.save) is not None:
            raise decided
        try:
            self.io.create(self._manifests / f"{manifest.save}.json", manifest.to_bytes())
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

    def unfinished(self) -> list[SaveId]:
        """Saves after the newest committed one whose ranks wrote something and of which nothing more is known, newest first: they
        were interrupted, or somebody removed their manifest."""
        newest = next(iter(self.saves()), SaveId(0, 0))
        late = {save for folder in (self._receipts, self._objects) for name in self.io.list(folder) if (save := SaveId.parse(name))}
        return sorted((save for save in late if save > newest and self.outcome(save) is None), reverse=True)

    def gaps(self) -> list[SaveId]:
        """Recovery points that somebody removed: a younger one was built on each, and older ones, which a sweep would have taken first,
        are still there. Of what rollbacks left behind a sweep may have taken any."""
        points = [point for point in self.history() if isinstance(point, Manifest)]
        points = [point for point in points if points[0].went_through(point.save)]
        unpinned = set(self.saves()) - set(self.pins().values())
        parents = {point.parent for point in points if point.parent} - set(self.saves())
        return sorted((parent for parent in parents if any(save < parent for save in unpinned)), reverse=True)

    # room

    def pin(self, name: str, save: SaveId) -> None:
        """Keeps a recovery point until `unpin`. Raises CheckpointError when it is damaged or being removed, or the name taken."""
        self._pins.add(name, self.manifest(save).save, self._manifests / f"{save}.json")

    def unpin(self, name: str) -> None:
        """Raises CheckpointError when there is no such pin."""
        self._pins.remove(name)

    def pins(self) -> dict[str, SaveId]:
        """Name -> the recovery point it keeps."""
        return self._pins.all()

    def sweep(self, keep: int, current: SaveId) -> list[str]:
        """Removes all but the newest `keep` recovery points and the pinned ones, then what none of them needs.

        Manifests go first and are gone for good before any object does: a crash leaks, it never loses. What a save newer than
        `current` or another job wrote is left alone. Does nothing about objects while a manifest is unreadable: returns what is wrong
        with each of these. Raises as `check_claim` does.
        """
        self.check_claim(current.epoch)
        if current not in self.saves():  # the list is late: a later sweep knows more
            return []
        return Sweep(self, self.path, self.io, current).run(keep)

    def prune(self, keep: int, take_over: bool = False) -> list[str]:
        """A sweep by hand, for a folder that no job uses: it is claimed first, so that a job that does use it stops. Returns as `sweep`.

        Raises CheckpointError, unless `take_over`, when such a job is alive or may be.
        """
        if not take_over:
            self.check_free()
        return Sweep(self, self.path, self.io, self.claim(time.time())).run(keep)

    def sorted_out(self, keep: int) -> tuple[list[SaveId], list[SaveId]]:
        """What a sweep now would leave, and what it would remove."""
        return Sweep(self, self.path, self.io, SaveId(0, 0)).sorted_out(keep)

    def check_free(self) -> None:
        """For a command that will claim the folder. Raises CheckpointError when a job that writes here is alive or may be."""
        if (owner := self._owner()) is not None:
            hint = "Wait for its end, or add --take-over: if it is alive, it can then commit no more and stops."
            raise CheckpointError(f"{owner} may be writing to {self.path}.", hint)

    def _owner(self) -> str | None:
        """The job that has the newest claim, unless it is known not to write any more."""
        epoch = self.newest_epoch()
        if not epoch:
            return "A job whose claim is gone" if self.saves() else None
        path = self._claims / f"{epoch:06d}"
        try:
            found = unseal(self.io.read(path), str(path))
            with parsing(str(path)):
                owner = Owner(**found)
        except (OSError, CheckpointError):
            return f"The owner of epoch {epoch}"
        return None if owner.is_known_not_to_write() else str(owner)


def _item(label: str, encoded: Encoded) -> Item:
    data = [(DATA, encoded.data)] if encoded.data else []
    return label, [*data, (METADATA, [encoded.metadata])]


PLACE = "checkpoint"  # in a run folder: the checkpoint folder, or a file of one line that says where it lies


def place_of(run: Path) -> Path:
    """Where the checkpoints of a run lie, whether there are any or not."""
    place = run / PLACE
    try:
        return Path(place.read_text(encoding="utf-8").strip()) if place.is_file() else place
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place} does not say where the checkpoints lie: it is no text.", "Write the path into it.") from error


def resolve(path: Path) -> Path:
    """The checkpoint folder of a run folder, or the folder itself. Raises CheckpointError when there is none."""
    for folder in (path, place_of(path)):
        if open_backend(folder).is_folder(folder / "manifests"):
            return folder
    raise CheckpointError(f"There is no checkpoint in {path}.", "Name a run folder, or its folder `checkpoint`.")
