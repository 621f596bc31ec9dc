"""Which recovery point to trust, and from where: the newest that verifies, damaged experts replaced by older versions. No torch."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np

from moetrain.base.checksum import crc32c
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import is_derived
from moetrain.store.encode import ArrayReader
from moetrain.store.history import History
from moetrain.store.io import Io
from moetrain.store.manifest import Group, Manifest, ObjectRecord, Piece
from moetrain.store.objects import CheckpointFolder

PointsInMemory = Callable[[History], list[Manifest]]
"""Recovery points in the memory of nodes, newest first, given those of the folder that they may refer to."""
Look = Callable[[CheckpointFolder, ObjectRecord, list[Piece]], str]
"""What is wrong with an object of which a manifest needs these pieces; "" when nothing is."""


@dataclass(frozen=True)
class Choice:
    """A recovery point that was looked at and found good. `damage`: sentences about what had to be passed over or replaced."""

    folder: Path
    manifest: Manifest
    damage: list[str]
    is_in_memory: bool = False  # and not, or not all of it, in the folder


def open_object(folder: CheckpointFolder, record: ObjectRecord) -> ArrayReader:
    """Its description, length and chunk index checked. Raises CheckpointError."""
    reader = folder.open(record.name)
    if crc32c(reader.metadata) != record.metadata_crc:
        raise CheckpointError(f"{reader.folder} is damaged: its description is not the one in the manifest.")
    return reader


def read_values(reader: ArrayReader, piece: Piece, out: np.ndarray | None = None) -> np.ndarray:
    """The flat values of a piece, in `out` where it is given. Raises CheckpointError unless they are those that were saved."""
    return reader.read_checked(piece.start, prod(piece.shape), piece.crc, out)


def check_object(folder: CheckpointFolder, record: ObjectRecord, pieces: list[Piece]) -> str:
    """Reads every byte of an object, also those that only other readers look at, and compares it with the manifest."""
    try:
        reader = open_object(folder, record)
        reader.verify([(piece.start, prod(piece.shape), piece.crc) for piece in pieces if piece.value is None])
    except CheckpointError as error:
        return error.message
    return ""


def glance(folder: CheckpointFolder, record: ObjectRecord, pieces: list[Piece]) -> str:
    """Everything about an object but its values: two small reads."""
    try:
        open_object(folder, record)
    except CheckpointError as error:
        return error.message
    return ""


def remembered(look: Look) -> Look:
    """Looks once at an object that many recovery points share; its twin in memory is another one."""
    known: dict[tuple[ObjectRecord, tuple[int, ...]], str] = {}

    def recall(folder: CheckpointFolder, record: ObjectRecord, pieces: list[Piece]) -> str:
        key = record, tuple(piece.start for piece in pieces)
        if key not in known:
            known[key] = look(folder, record, pieces)
        return known[key]

    return recall


def check(folder: CheckpointFolder, manifest: Manifest, look: Look) -> dict[str, str]:
    """Object name -> damage of every bad object of a recovery point."""
    members: dict[str, list[Piece]] = defaultdict(list)
    for tensor in manifest.tensors.values():
        for piece in tensor.pieces:
            members[piece.object].append(piece)
    damage: dict[str, str] = {}
    for name, record in manifest.objects.items():
        if sentence := look(folder, record, sorted(members[name], key=lambda piece: piece.start)):
            damage[name] = sentence
    return damage


def nothing_in_memory(on_disk: History) -> list[Manifest]:
    return []


def newest_first(on_disk: History, memory: Sequence[Manifest]) -> Iterator[Manifest | CheckpointError]:
    """All recovery points; of one save the one in memory first, for it may hold more experts of that step. A damaged one on disk comes
    before any in memory, so that it is told."""
    left = list(memory)
    for save in on_disk.saves:
        point = on_disk.look(save)
        while isinstance(point, Manifest) and left and left[0].save >= save:
            yield left.pop(0)
        yield point
    yield from left


def choose(path: Path, io: Io, look: Look = check_object, in_memory: PointsInMemory = nothing_in_memory) -> Choice | None:
    """The newest recovery point of a checkpoint folder that can be restored in full; None when there never was one.

    An expert whose object is damaged comes from the newest recovery point that it went through and that has a good version of all of it;
    when none has, or anything else is damaged, the next older one is tried. `look` finds the damage: by default it reads every byte.
    Raises CheckpointError when none is left.
    """
    folder = CheckpointFolder(path, io)
    on_disk = History(folder)
    memory = in_memory(on_disk)
    look = remembered(look)
    damage: list[str] = []
    for number, manifest in enumerate(newest_first(on_disk, memory)):
        if isinstance(manifest, CheckpointError):
            damage.append(manifest.message)
            continue
        is_in_memory = any(manifest is point for point in memory)
        bad = check(folder, manifest, look)
        damage += bad.values()
        below = islice(newest_first(on_disk, memory), number + 1, None)
        older = (point for point in below if isinstance(point, Manifest) and manifest.went_through(point.save))
        repaired = repair(folder, manifest, bad, older, look, damage)
        if repaired is not None:
            return Choice(path, repaired, damage, is_in_memory)
        what = "copy in memory" if is_in_memory else "checkpoint"
        damage.append(f"The {what} of step {manifest.step} (seq {manifest.seq}) cannot be restored.")
    if not on_disk.saves and not memory:
        return None
    raise CheckpointError(f"No checkpoint in {path} can be restored: {shortened(damage)}", "Start anew with checkpoint.resume=never.")


def shortened(damage: list[str], most: int = 5) -> str:
    """The first of many sentences, and how many more there are."""
    more = [f"And {len(damage) - most} more like these; `moetrain checkpoint verify` names all."] if len(damage) > most else []
    return " ".join([*damage[:most], *more])


def repair(
    folder: CheckpointFolder, manifest: Manifest, bad: dict[str, str], older: Iterator[Manifest], look: Look, damage: list[str]
) -> Manifest | None:
    """The manifest with every expert that touches a bad object taken from an older recovery point; None when that cannot be done."""
    touched = [tensor for tensor in manifest.tensors.values() if any(piece.object in bad for piece in tensor.pieces)]
    if any(tensor.group is None for tensor in touched):
        return None
    missing = {tensor.group for tensor in touched if tensor.group}
    while missing and (source := next(older, None)) is not None:
        bad_there = check(folder, source, look)
        for group in sorted(missing):
            replaced = take_group(manifest, source, group, bad_there)
            if replaced is not None:
                manifest = replaced
                missing.discard(group)
                damage.append(f"Expert {group[1]} of {group[0]} is taken from the checkpoint of step {source.step} (seq {source.seq}).")
    return None if missing else manifest


def take_group(manifest: Manifest, source: Manifest, group: Group, bad: dict[str, str]) -> Manifest | None:
    """`manifest` with all tensors of one expert as `source` has them; None when they are not all there, alike and good."""
    mine, others = ({key: tensor for key, tensor in point.tensors.items() if tensor.group == group} for point in (manifest, source))
    for key, tensor in mine.items():
        if not is_derived(tensor) and (key not in others or (others[key].shape, others[key].dtype) != (tensor.shape, tensor.dtype)):
            return None
    if any(piece.object in bad for tensor in others.values() for piece in tensor.pieces):
        return None
    tensors = {key: tensor for key, tensor in manifest.tensors.items() if key not in mine} | others
    needed = {piece.object for tensor in tensors.values() for piece in tensor.pieces}
    taken = {piece.object: source.objects[piece.object] for tensor in others.values() for piece in tensor.pieces}
    objects = {name: record for name, record in (manifest.objects | taken).items() if name in needed}
    return replace(manifest, tensors=tensors, objects=objects, ledger=_ledger(manifest, source, group))


def _ledger(manifest: Manifest, source: Manifest, group: Group) -> dict:
    """What the older expert does not know becomes unsaved, and is lost by the recovery."""
    if not (manifest.ledger and source.ledger):
        return manifest.ledger
    banks = manifest.banks()
    return Ledger.of_json(manifest.ledger, banks).with_expert(group, Ledger.of_json(source.ledger, banks)).to_json()
