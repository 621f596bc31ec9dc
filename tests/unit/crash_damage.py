"""Damage of every kind to every kind of file: all of it is noticed, and recovery comes to what an independent oracle says."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import check, check_object, choose, remembered
from moetrain.store.encode import chunk_length, num_chunks
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_crash import SIZE, check_values
from tests.unit.crash_fs import PAGE, MemoryFs, paths, tree_of
from tests.unit.crash_states import ROOT, save

KINDS = ("flip", "zero page", "truncate", "empty", "delete", "swap", "stale")
PLACES = ("data", "index", "zarr.json", "receipt", "manifest")
NUM_SAVES = 6
NEWEST = SaveId(NUM_SAVES, NUM_SAVES)


@dataclass
class Found:
    """`outcomes`: (kind, place) -> injected, noticed, with the right fallback."""

    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    noticed: Counter[tuple[str, str]] = field(default_factory=Counter)
    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Base:
    """A good folder: its files, its recovery points, and a receipt that an earlier save left."""

    files: dict[str, bytes]
    points: list[Manifest]
    old_receipt: bytes

    @classmethod
    def make(cls) -> "Base":
        fs = MemoryFs()
        folder = CheckpointFolder(ROOT, fs)
        old = b""
        for version in range(1, NUM_SAVES + 1):
            save(fs, version, NUM_SAVES, Random(1))
            old = old if version == NUM_SAVES else fs.read(ROOT / "receipts" / str(SaveId(version, version)) / "00000.json")
        for pin in folder.pins():
            folder.unpin(pin)
        folder.put_receipt(NEWEST, 1, {"rank": 1})
        return cls(paths(fs.tree()), [point for point in folder.history() if isinstance(point, Manifest)], old)


def simulate(runs: int, seed: int) -> Found:
    """Injects `runs` damages, one at a time, every kind in every place in turn."""
    random, found, base = Random(seed), Found(), Base.make()
    for run in range(runs):
        kind, place = KINDS[run % len(KINDS)], PLACES[run // len(KINDS) % len(PLACES)]
        alike = list(_files(base.files, place))
        changed, files = base.files, list[str]()
        while not files:  # a damage that changes nothing is none
            changed = _damage(base, random.choice(alike), kind, place, alike, random)
            files = [path for path, content in base.files.items() if changed.get(path) != content]
        found.injected[kind, place] += 1
        try:
            noticed, right = _examine(base, changed, files)
        except Exception as error:
            noticed = right = False
            found.failures.append(f"{type(error).__name__}: {error}")
        found.noticed[kind, place] += noticed
        found.right[kind, place] += right
        if not (noticed and right):
            found.failures.append(f"seed {seed}, run {run}: {kind} in {files}: noticed {noticed}, right {right}")
    return found


def _files(good: dict[str, bytes], place: str) -> Iterator[str]:
    """The oldest manifest is left out: it may be deleted, which costs nothing and nobody can know."""
    manifests = sorted(path for path in good if "/manifests/" in path)
    for path in sorted(good):
        name = path.rpartition("/")[2]
        if place in ("data", "index"):
            yield from [path] * (name == "c.0")
        elif place == "zarr.json":
            yield from [path] * (name == "zarr.json")
        elif place == "receipt":
            yield from [path] * ("/receipts/" in path)
        elif path in manifests[1:]:
            yield path


def _damage(base: Base, target: str, kind: str, place: str, alike: list[str], random: Random) -> dict[str, bytes]:
    """The files after the damage."""
    changed, content = dict(base.files), bytearray(base.files[target])
    index = len(content) - 16 * num_chunks(2 * SIZE, chunk_length(2 * SIZE, 4)) - 4  # where it begins
    first, last = (index, len(content)) if place == "index" else (0, index) if place == "data" else (0, len(content))
    other = random.choice(alike)
    if kind == "flip":
        content[random.randrange(first, last)] ^= 1 << random.randrange(8)
        changed[target] = bytes(content)
    elif kind == "zero page":
        page = random.choice(range(first, last, PAGE))
        stop = min(page + PAGE, last)
        changed[target] = bytes(content[:page]) + bytes(stop - page) + bytes(content[stop:])
    elif kind == "truncate":
        changed[target] = bytes(content[: random.randrange(first, last)])
    elif kind == "empty":
        changed[target] = b""
    elif kind == "delete":
        del changed[target]
    elif kind == "swap":
        whole = place == "data" and random.random() < 0.5
        for name in ("c.0", "zarr.json") if whole else (Path(target).name,):
            one, two = (str(Path(path).with_name(name)) if whole else path for path in (target, other))
            changed[one], changed[two] = base.files[two], base.files[one]
    else:  # an older version under the right name, as a file system without its last writes would give
        older = [path for path in alike if path < target and _label(path) == _label(target)]
        changed[target] = base.old_receipt if place == "receipt" else base.files[random.choice(older)] if older else base.files[target]
    return changed


def _label(path: str) -> str:
    """What an object, receipt or manifest is about, whichever save it belongs to."""
    parts = path.split("/")
    return "/".join(parts[-2:]) if "/objects/" in path else parts[-3]


def _examine(base: Base, files: dict[str, bytes], damaged: list[str]) -> tuple[bool, bool]:
    """Whether every damaged file was noticed, and whether recovery came to what it should."""
    fs = MemoryFs(tree_of(files))
    objects = {path.removeprefix(f"{ROOT}/objects/").rpartition("/")[0] for path in damaged if "/objects/" in path}
    manifests = {save for path in damaged if "/manifests/" in path and (save := SaveId.parse(Path(path).stem))}
    receipts = {path for path in damaged if "/receipts/" in path}
    noticed = _notice(CheckpointFolder(ROOT, fs)) >= {*objects, *manifests, *receipts}
    expected = _oracle(base, objects, manifests)
    if expected is None:  # two versions of one expert changed places: both are damaged, and there is no third
        return noticed, _refuses(fs)
    choice = choose(ROOT, fs)
    assert choice is not None
    check_values(ROOT, choice.manifest, fs)
    is_newest_hurt = bool(objects & base.points[0].objects.keys()) or (NEWEST in manifests and f"{ROOT}/manifests/{NEWEST}.json" in files)
    assert bool(choice.damage) == is_newest_hurt, choice.damage
    return noticed, _content(choice.manifest) == expected


def _refuses(fs: MemoryFs) -> bool:
    try:
        choose(ROOT, fs)
    except CheckpointError:
        return True
    return False


def _notice(folder: CheckpointFolder) -> set[object]:
    """Everything that the store says is damaged or missing."""
    found: set[object] = {*folder.gaps(), *folder.unfinished()}
    look = remembered(check_object)
    for save_id in folder.saves():
        try:
            found |= set(check(folder, folder.manifest(save_id), look))
        except CheckpointError:
            found.add(save_id)
    for rank in (0, 1):
        try:
            receipt = folder.receipt(NEWEST, rank)
        except CheckpointError:
            receipt = None
        if receipt is None:
            found.add(f"{ROOT}/receipts/{NEWEST}/{rank:05d}.json")
    return found


Content = tuple[int, dict[int | None, str]]
"""Step of a recovery point, and the object of every expert (None: of all the rest)."""


def _content(point: Manifest) -> Content:
    return point.step, {tensor.expert: tensor.pieces[0].object for tensor in point.tensors.values()}


def _oracle(base: Base, objects: set[str], manifests: set[SaveId]) -> Content | None:
    """The newest recovery point whose dense object is good and whose experts are each good there or in an older one."""
    good = [_content(point) for point in base.points if point.save not in manifests]
    for number, (step, names) in enumerate(good):
        versions = {who: [older[who] for _, older in good[number:] if older[who] not in objects] for who in names}
        if names[None] not in objects and all(versions.values()):
            return step, {who: found[0] for who, found in versions.items()}
    return None
