"""Power failures at any moment of saves and sweeps: in every state that may be left, recovery finds the last or the new checkpoint."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from unittest.mock import patch

from moetrain.base.clock import SystemClock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import check, check_object, choose
from moetrain.checkpoint.writer import commit, gather, persist
from moetrain.store.encode import DATA, METADATA
from moetrain.store.manifest import Manifest, ObjectRecord, Piece
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_crash import check_object_values, prepare, restored_step, views
from tests.unit.crash_fs import CrashStates, MemoryFs, Tree, paths, without_threads

ROOT = Path("/run/checkpoint")
BEGUN, DONE = "begun", "done"


@dataclass
class Tally:
    """What was seen. `recovered`: state -> how often recovery came to the last, or to the new checkpoint."""

    traces: int = 0
    events: int = 0
    drawn: int = 0
    distinct: int = 0
    recovered: dict[str, int] = field(default_factory=lambda: {"last": 0, "new": 0})
    went_on: int = 0  # states in which a next job saved twice and left nothing behind
    failures: list[str] = field(default_factory=list)


def save(fs: MemoryFs, version: int, keep: int, random: Random) -> None:
    """One job: it claims the folder, saves, sweeps, now and then pins or unpins."""
    with without_threads():
        _save(CheckpointFolder(ROOT, fs), fs, version, keep, random)


def _save(folder: CheckpointFolder, fs: MemoryFs, version: int, keep: int, random: Random) -> None:
    claimed = folder.claim(0.0)
    if random.random() < 0.3 and (saves := folder.saves()):
        with suppress(CheckpointError):  # an interrupted sweep was about to remove it
            folder.pin(f"pin{version}", random.choice(saves))
    arena = memoryview(bytearray(1 << 16))
    job = prepare(ROOT, claimed, version, arena, fs, keep)
    receipt = persist(job, views(job.objects, arena), folder)
    folder.put_receipt(job.save, 0, receipt.to_json())
    fs.mark(f"{BEGUN} {version}")
    commit(job, gather(job, receipt, folder, SystemClock(), lambda: True), folder, SystemClock())
    folder.sweep(job.keep, job.save)
    fs.mark(f"{DONE} {version}")
    if random.random() < 0.2 and (pins := folder.pins()):
        folder.unpin(random.choice(list(pins)))


def simulate(num_states: int, seed: int, tally: Tally, states_per_trace: int = 400) -> Tally:
    """Draws crash states until `num_states` different ones were tried. Every trace begins in a crash state of the one before it."""
    random, version, tree = Random(seed), 0, Tree()
    seen: set[int] = set()
    known = Known()
    while tally.distinct < num_states:
        version += 1
        fs = MemoryFs(tree)
        committed = _newest(tree)
        save(fs, version, random.randint(1, 3), random)
        if version == 1:  # before the first commit nothing was promised
            tree = fs.tree()
            continue
        states = CrashStates(fs)
        tally.traces += 1
        tally.events += len(states.events)
        for _ in range(states_per_trace):
            moment = random.randrange(len(states.events) + 1)
            tree = states.state(moment, random)
            tally.drawn += 1
            key = hash((frozenset(paths(tree).items()), moment))
            if key in seen:
                continue
            seen.add(key)
            tally.distinct += 1
            marks = {event.mark for event in states.events[:moment] if event.mark}
            with known:
                _examine(tree, committed, version, marks, tally, f"seed {seed}, version {version}, event {moment}", known)
        if version % 40 == 0:
            tree, version = Tree(), 0  # a fresh folder: names must not only grow
    return tally


def _newest(tree: Tree) -> int:
    points = CheckpointFolder(ROOT, MemoryFs(tree)).history()
    return max((point.step for point in points if isinstance(point, Manifest)), default=0)


class Known:
    """Answers that depend on the bytes of files alone, remembered by these bytes: most files are the same in most states."""

    def __init__(self) -> None:
        self._objects: dict[tuple[object, ...], str] = {}
        self._values: set[tuple[object, ...]] = set()
        self._manifests = lru_cache(1000)(Manifest.from_bytes)
        self._patch = patch("moetrain.store.objects.Manifest.from_bytes", self._manifests)

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *ignored: object) -> None:
        self._patch.stop()

    def look(self, folder: CheckpointFolder, record: ObjectRecord, pieces: list[Piece]) -> str:
        """`check_object`, once for the same bytes."""
        key = (record, tuple(pieces), self._contents(folder, record))
        if key not in self._objects:
            self._objects[key] = check_object(folder, record, pieces)
        return self._objects[key]

    def check_values(self, folder: CheckpointFolder, point: Manifest) -> None:
        """As the one of `checkpoint_crash`, once for the same bytes: the name of an object says which tensors are in it."""
        for name, record in point.objects.items():
            key = (record, self._contents(folder, record))
            if key not in self._values:
                tensors = [tensor for tensor in point.tensors.values() if tensor.pieces[0].object == name]
                check_object_values(folder.object_folder(name), tensors, record.step, folder.io)
                self._values.add(key)
        assert all(
            tensor.expert is not None or point.objects[tensor.pieces[0].object].step == point.step for tensor in point.tensors.values()
        )

    def _contents(self, folder: CheckpointFolder, record: ObjectRecord) -> tuple[bytes | None, ...]:
        files = [folder.object_folder(record.name) / file for file in (METADATA, DATA)]
        return tuple(folder.io.read(file) if folder.io.exists(file) else None for file in files)


def _examine(tree: Tree, last: int, new: int, marks: set[str], tally: Tally, where: str, known: Known) -> None:
    allowed = {last} if f"{BEGUN} {new}" not in marks else {new} if f"{DONE} {new}" in marks else {last, new}
    try:
        fs = MemoryFs(tree)
        folder = CheckpointFolder(ROOT, fs)
        choice = choose(ROOT, fs, known.look)
        assert choice is not None and not choice.damage, choice
        known.check_values(folder, choice.manifest)
        step = choice.manifest.step
        if step not in allowed:
            raise AssertionError(f"recovered step {step} instead of {allowed}")
        for pinned in set(folder.pins().values()):
            point = folder.manifest(pinned)
            if bad := check(folder, point, known.look):
                raise AssertionError(f"a pinned checkpoint is damaged: {bad}")
            known.check_values(folder, point)
        tally.recovered["last" if step == last else "new"] += 1
        if tally.distinct % 50 == 0:
            _go_on(fs, new)
            tally.went_on += 1
    except Exception as error:
        tally.failures.append(f"{where}: {type(error).__name__}: {error}")


def _go_on(fs: MemoryFs, version: int) -> None:
    """The next two jobs save as if nothing had happened, and what the crash left behind is gone then."""
    for later in (version + 1, version + 2):
        save(fs, later, 2, Random(version))
        assert restored_step(ROOT, fs) == later
    folder = CheckpointFolder(ROOT, fs)
    needed = {name for point in folder.history() if isinstance(point, Manifest) for name in point.objects}
    found = {path.removeprefix(f"{ROOT}/objects/").rpartition("/")[0] for path in paths(fs.tree()) if "/objects/" in path}
    assert found == needed, f"left behind: {sorted(found ^ needed)}"
