"""Random schedules of saves, pins, prunes, sweeps, new jobs and crashes: nothing that is alive is ever removed.

Manifests here name objects of one byte: only the folder's own code is at work, so that very many schedules can be tried.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from moetrain.base.errors import CheckpointError
from moetrain.store.encode import Encoded
from moetrain.store.io import no_hook
from moetrain.store.manifest import Manifest, ObjectRecord, SaveId
from moetrain.store.objects import CheckpointFolder
from tests.unit.crash_fs import CrashStates, MemoryFs, without_threads

ROOT = Path("/run")
NUM_KEYS = 4
STEPS = ("save", "save", "save", "late save", "pin", "unpin", "prune", "sweep", "new job")


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Tally:
    schedules: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class KnownFolder(CheckpointFolder):
    """Parses a manifest of the same bytes once: contents never change, and parsing is most of the work."""

    known: dict[bytes, Manifest]

    def manifest(self, save: SaveId) -> Manifest:
        path = self.path / "manifests" / f"{save}.json"
        if not self.io.exists(path):
            return super().manifest(save)
        content = self.io.read(path)
        if content not in self.known:
            self.known[content] = super().manifest(save)
        return self.known[content]


class Schedule:
    """One life of a checkpoint folder. What it promised is kept beside it: the newest commit, and the pins that were granted."""

    def __init__(self, random: Random, known: dict[bytes, Manifest], tally: Tally) -> None:
        self._random, self._known, self._tally = random, known, tally
        self._fs = MemoryFs()
        self._keep = random.randint(1, 3)
        self._newest: SaveId | None = None
        self._pinned: dict[str, SaveId] = {}
        self._current: SaveId | None = None

    def run(self, length: int) -> None:
        for _ in range(length):
            step = self._random.choice(STEPS) if self._current else "new job"
            self._tally.steps[step] += 1
            left = self._random.randrange(1, 40) if self._random.random() < 0.4 else None
            self._step(step, left)
            self._check(step)

    def _step(self, step: str, left: int | None) -> None:
        """One step, killed at one of its operations unless `left` is None; then the power may fail too."""
        remaining = [left or 0]

        def hook(operation: str, path: Path) -> None:
            if left is not None and operation not in ("read", "list"):
                remaining[0] -= 1
                if remaining[0] < 0:
                    raise Killed

        power = left is not None and self._random.random() < 0.5
        if power:  # what was synced before this step is sure, so that what it does can be told apart
            self._fs = MemoryFs(self._fs.tree())
        self._fs.hook(hook)
        try:
            self._act(step, self._folder())
            self._tally.crashes["none"] += 1
        except Killed:
            self._current = None
            self._tally.crashes["power" if power else "kill"] += 1
            if power:
                self._fs = MemoryFs(CrashStates(self._fs).state(len(self._fs.events), self._random))
        self._fs.hook(no_hook)

    def _folder(self) -> CheckpointFolder:
        folder = KnownFolder(ROOT, self._fs)
        folder.known = self._known
        return folder

    def _act(self, step: str, folder: CheckpointFolder) -> None:
        saves = folder.saves()
        if step == "new job":
            self._current = folder.claim(0.0)
        elif step in ("save", "late save"):
            self._save(folder, sweeps=step == "save")
        elif step == "sweep" and self._newest is not None and self._newest.epoch == self._epoch():
            folder.sweep(self._random.randint(1, 3), self._newest)
        elif step == "prune" and saves:
            self._current = None
            folder.prune(self._random.randint(1, 3), take_over=True)
        elif step == "pin" and saves:
            name, save = self._random.choice("abc"), self._random.choice(saves)
            try:
                folder.pin(name, save)
            except CheckpointError:
                return
            self._pinned[name] = save
        elif step == "unpin" and self._pinned:
            name = self._random.choice(list(self._pinned))
            del self._pinned[name]  # before it is sure
            folder.unpin(name)

    def _epoch(self) -> int:
        return self._current.epoch if self._current else -1

    def _save(self, folder: CheckpointFolder, sweeps: bool) -> None:
        """Writes the dense object and some of the others; takes the rest over from the newest recovery point."""
        save = self._current
        assert save is not None
        self._current = SaveId(save.epoch, save.seq + 1)
        parent = next((point for point in folder.history() if isinstance(point, Manifest)), None)
        share = folder.new_share(save, 0)
        written = range(NUM_KEYS) if parent is None else [0, *self._random.sample(range(1, NUM_KEYS), 1)]
        names = {key: f"{share}/{key}" for key in written}
        inherited = {} if parent is None else {int(name[-1]): name for name in parent.objects}
        folder.put_share(share, [(str(key), Encoded(b"{}", [])) for key in written])
        folder.put_receipt(save, 0, {})
        records = {name: ObjectRecord(name, save.seq, 2, 0) for name in (inherited | names).values()}
        values = (save, parent and parent.save, 0, save.seq, 0.0, "experts", parent is None, 2, 1, 1, {}, records, {})
        folder.commit(Manifest(*values, ancestors=parent.way if parent else ()))
        self._newest = save
        if sweeps:
            folder.sweep(self._keep, save)

    def _check(self, step: str) -> None:
        """Everything that a manifest names is there; so are the newest commit and every pin that was granted."""
        folder = self._folder()
        for save in folder.saves():
            for name in folder.manifest(save).objects:
                if not folder.io.exists(folder.object_folder(name) / "zarr.json"):
                    raise AssertionError(f"after {step}: {save} lacks {name}")
        saves = folder.saves()
        if self._newest is not None and (not saves or saves[0] < self._newest):
            raise AssertionError(f"after {step}: {self._newest} is gone, there is {saves}")
        self._newest = saves[0] if saves else None
        for name, save in list(self._pinned.items()):
            if folder.pins().get(name) != save or save not in saves:
                raise AssertionError(f"after {step}: pin {name} of {save} is gone")


def simulate(schedules: int, seed: int, tally: Tally, length: int = 8) -> Tally:
    known: dict[bytes, Manifest] = {}
    for number in range(schedules):
        known.clear()
        try:
            with without_threads():
                Schedule(Random(f"{seed}/{number}"), known, tally).run(length)
        except Exception as error:
            tally.failures.append(f"seed {seed}, schedule {number}: {type(error).__name__}: {error}")
        tally.schedules += 1
    return tally
