"""What one save put into the memory of the nodes, as recovery sees it: receipts as on disk, and where each object lies. No torch."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from moetrain.base.checksum import crc32c
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.arena import Slot
from moetrain.checkpoint.job import Receipt, SaveJob
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.merge import collect, merge
from moetrain.checkpoint.modes import Selection, keeps_weights_fresh
from moetrain.checkpoint.writer import with_checksums
from moetrain.store.boxes import tiles
from moetrain.store.encode import stored_dtype
from moetrain.store.history import History
from moetrain.store.manifest import Group, Manifest, ObjectRecord, Piece, SaveId, Tensor, seal, unseal
from moetrain.store.parsing import parsing

Key = tuple[SaveId, int]
"""A save and a rank."""


@dataclass(frozen=True)
class Held:
    """One object in memory: the raw values of its array."""

    slot: str  # path on the node that holds it
    dtype: str  # as stored
    size: int  # values
    num_bytes: int
    group: Group | None  # None: of no expert


@dataclass(frozen=True)
class Generation:
    """One rank's part of what one save put into memory. `job` says what the save is, without objects and tensors."""

    job: SaveJob
    receipt: Receipt
    held: dict[str, Held]  # by object name
    time: float
    is_copy: bool = False  # for a rank of another node
    is_trimmed: bool = False  # only what newer generations do not hold is left

    @property
    def save(self) -> SaveId:
        return self.job.save

    @property
    def key(self) -> Key:
        return self.job.save, self.job.rank

    @property
    def num_bytes(self) -> int:
        return sum(held.num_bytes for held in self.held.values())

    def experts(self, newer: set[Group] | None) -> set[str]:
        """The objects of experts that this save copied whole, and of which there is nothing newer. `newer` None: there is of all."""
        if newer is None:
            return set()
        whole = None if self.job.selection is None else _groups(self.job.selection)
        return {
            name for name, held in self.held.items() if held.group and held.group not in newer and (whole is None or held.group in whole)
        }

    def only(self, names: set[str]) -> "Generation":
        """Without the other objects and what lies in them."""
        held = {name: one for name, one in self.held.items() if name in names}
        objects = [record for record in self.receipt.objects if record.name in names]
        tensors = [tensor for tensor in self.receipt.tensors if all(piece.object in names for piece in tensor.pieces)]
        return replace(self, held=held, receipt=replace(self.receipt, objects=objects, tensors=tensors), is_trimmed=True)

    def check(self, memories: dict[str, memoryview]) -> None:
        """Raises CheckpointError unless the slots (by path) hold what the receipt says."""
        for tensor in self.receipt.tensors:
            for piece in tensor.pieces:
                held = self.held[piece.object]
                if piece.value is None and piece_crc(memories[held.slot], held, piece) != piece.crc:
                    raise CheckpointError(f"the copy of {tensor.key} (step {self.job.step}) in memory is damaged.")

    def to_json(self) -> dict:
        held = {name: vars(one) for name, one in self.held.items()}
        return vars(self) | {"job": self.job.to_json(), "receipt": self.receipt.to_json(), "held": held}

    @classmethod
    def of_json(cls, found: dict) -> "Generation":
        held = {name: Held(**one | {"group": one["group"] and tuple(one["group"])}) for name, one in found["held"].items()}
        return cls(**found | {"job": SaveJob.of_json(found["job"]), "receipt": Receipt.of_json(found["receipt"]), "held": held})

    def to_bytes(self) -> bytes:
        return seal(json.dumps(self.to_json(), separators=(",", ":")).encode())

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Generation":
        """Raises CheckpointError when it is damaged."""
        with parsing(what):
            return cls.of_json(unseal(data, what))


def sealed(job: SaveJob, share: str, slots: Sequence[Slot], now: float) -> tuple[SaveJob, Generation]:
    """The job with the checksums of what lies in the slots (parallel to `job.plans`), and what is to be kept of it in memory."""
    job = replace(
        job,
        share=share,
        objects=[with_checksums(plan, share, memoryview(slot.memory)) for plan, slot in zip(job.objects, slots, strict=False)],
        extras=[
            with_checksums(plan, f"{share}-memory", memoryview(slot.memory))
            for plan, slot in zip(job.extras, slots[len(job.objects) :], strict=True)
        ],
    )
    held, records, tensors = {}, [], list(job.tensors)
    for plan, slot in zip(job.plans, slots, strict=True):
        name, num_bytes = plan.tensors[0].pieces[0].object, plan.size * stored_dtype(plan.dtype).itemsize
        held[name] = Held(slot.path, plan.dtype, plan.size, num_bytes, plan.tensors[0].group)
        records.append(ObjectRecord(name, job.step, num_bytes, 0))
        tensors += plan.tensors
    about = replace(job, objects=[], extras=[], tensors=[], selection=job.in_memory)
    return job, Generation(about, Receipt(job.rank, job.index, job.in_memory, records, tensors), held, now)


def needed(generations: Iterable[Generation], complete: SaveId) -> dict[Key, set[str]]:
    """Which objects are needed when `complete` is the newest save that every rank has: all of that one and of newer ones, and of older
    ones the experts that were copied whole and in no newer copy. Whichever rank copied them: a selection is the same on all nodes."""
    keep: dict[Key, set[str]] = {}
    newer: set[Group] | None = set()  # experts in newer copies; None: all
    of_save = defaultdict(list)
    for one in generations:
        of_save[one.save].append(one)
    for save in sorted(of_save, reverse=True):
        selection = of_save[save][0].job.selection
        for one in of_save[save]:
            keep[one.key] = set(one.held) if save >= complete else one.experts(newer) if save.epoch == complete.epoch else set()
        if save <= complete:
            newer = None if newer is None or selection is None else newer | _groups(selection)
    return keep


def _groups(selection: Selection) -> set[Group]:
    return {(bank, expert) for bank, experts in selection.items() for expert in experts}


def points_in_memory(generations: Sequence[Generation], disk: History) -> list[Manifest]:
    """The recovery points that lie in memory, newest first: those of which every rank's part is there.

    Experts that a generation left out come from older generations of the same job or from the newest manifest on disk that is no younger,
    each at its newest step, and the ledger says what these hold. A part that several nodes have counts once, the fullest of them.
    """
    by_save: dict[SaveId, dict[int, Generation]] = defaultdict(dict)
    for one in sorted(generations, key=lambda one: len(one.held)):
        by_save[one.save][one.job.rank] = one
    points = []
    for save, parts in sorted(by_save.items(), reverse=True):
        first = parts.get(0)  # which knows the parent
        if first is None or len(parts) != first.job.world or any(one.is_trimmed for one in parts.values()):
            continue
        older = {before: list(its.values()) for before, its in by_save.items() if before < save and before.epoch == save.epoch}
        try:
            found = _older(first.job, older, disk)
            point = merge(first.job, [parts[rank].receipt for rank in sorted(parts)], found.manifest, first.time)
            points.append(replace(point, ledger=_ledger(point, found)))
        except CheckpointError:
            continue  # it refers to what is gone
    return points


@dataclass(frozen=True)
class _Older:
    """What a generation can be completed from. `ledgers`: of every object, one that says what it knows."""

    manifest: Manifest
    ledgers: dict[str, dict]


def _below(job: SaveJob, disk: History) -> Manifest | None:
    """The newest checkpoint that its experts can come from: of the save itself, of one of its start before it, which may still have been
    on its way when the copy was made, or its parent."""
    own = disk.newest(lambda save: save <= job.save and save.epoch == job.save.epoch)
    return own or disk.newest(lambda save: save == job.parent)


def _older(job: SaveJob, older: dict[SaveId, list[Generation]], disk: History) -> _Older:
    """Every expert at its newest step, whole, in memory (parts by save) or on disk."""
    found = _Older(_empty(job), {})
    if job.selection is None:
        return found
    tensors, objects, ledgers = found.manifest.tensors, found.manifest.objects, found.ledgers
    if (below := _below(job, disk)) is not None:
        tensors |= below.tensors
        objects |= below.objects
        ledgers |= dict.fromkeys(below.objects, below.ledger)
    for _, parts in sorted(older.items()):
        new = {record.name: record for one in parts for record in one.receipt.objects}
        written: dict[Group, list[Tensor]] = defaultdict(list)
        for tensor, pieces in collect(one.receipt for one in parts).values():
            if tensor.group and pieces:
                written[tensor.group].append(replace(tensor, pieces=tuple(pieces)))
        for group_tensors in written.values():
            if all(tiles([(piece.offset, piece.shape) for piece in tensor.pieces], tensor.shape) for tensor in group_tensors):
                step = parts[0].job.step
                tensors |= {
                    tensor.key: tensor
                    for tensor in group_tensors
                    if tensor.key not in tensors or found.manifest.step_of(tensors[tensor.key]) <= step
                }
        objects |= new
        ledgers |= dict.fromkeys(new, parts[0].job.ledger)
    return found


def _ledger(point: Manifest, older: _Older) -> dict:
    """What the point holds of every expert: less than its save thought when a part of an older one is gone."""
    ledger = Ledger.of_json(point.ledger, point.banks())
    for tensor in point.tensors.values():
        known = older.ledgers.get(tensor.pieces[0].object)
        if point.ledger and known and tensor.group and tensor.component == "m":
            ledger = ledger.with_expert(tensor.group, Ledger.of_json(known, {}), weights=not keeps_weights_fresh(point.mode))
    return ledger.to_json() if point.ledger else {}


def piece_crc(memory: memoryview, held: Held, piece: Piece) -> int:
    item = stored_dtype(held.dtype).itemsize
    return crc32c(memory[piece.start * item : (piece.start + prod(piece.shape)) * item])


def _empty(job: SaveJob) -> Manifest:
    return Manifest(
        save=job.save, parent=job.parent, index=job.index, step=job.step, time=0.0, mode=job.mode, full=False, new_bytes=0,
        world=job.world, ep=0, progress=job.progress, objects=dict[str, ObjectRecord](), tensors={},
    )  # fmt: skip
