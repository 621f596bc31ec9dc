"""What an agent does with a rank's part of a save: objects and a receipt; rank 0's also commits. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import numpy as np

from moetrain.base.checksum import crc32c
from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.gate import Gate
from moetrain.checkpoint.job import Receipt, Reply, SaveJob
from moetrain.checkpoint.merge import merge
from moetrain.checkpoint.plan import ObjectPlan
from moetrain.store.backend import NoAnswer
from moetrain.store.encode import Encoded, checksums, encode, stored_dtype
from moetrain.store.io import Io
from moetrain.store.manifest import FORMAT, Manifest, ObjectRecord, SaveId, Tensor
from moetrain.store.objects import CheckpointFolder, Superseded

ORPHAN_SECONDS = 5.0  # how long rank 0's agent still waits for news when its rank is dead,
ORPHAN_BUSY_SECONDS = 20.0  # and how long when every rank without a receipt has begun to write
POLLS_PER_WAIT = 20  # a receipt is seen at most a twentieth later than it comes

Alive = Callable[[], bool]


class LostParent(CheckpointError):
    """The recovery point that this save refers to cannot be read; the next one must hold every expert."""


class Unsure(CheckpointError):
    """The manifest was sent and no answer came: it may appear yet, so what it refers to stays until a sweep that does not find it."""


def persist(job: SaveJob, memories: Sequence[memoryview], folder: CheckpointFolder) -> Receipt:
    """Writes this rank's objects, durable when it returns; `memories` are parallel to `job.objects`, whose checksums were taken before.

    Raises OSError, and CheckpointError for an object that is not in memory as it was copied.
    """
    records: list[ObjectRecord] = []
    written: list[Tensor] = []

    def objects() -> Iterator[tuple[str, Encoded]]:
        for plan, memory in zip(job.objects, memories, strict=True):
            values = values_of(plan, memory)
            sums = checksums(values, [_span(tensor) for tensor in plan.tensors])
            if sums.pieces != [tensor.pieces[0].crc for tensor in plan.tensors]:
                raise CheckpointError(f"the copy of {plan.label} in the memory of this node is damaged.")
            name = f"{job.share}/{plan.label}"
            encoded = encode(values, attributes(job, plan.tensors), sums.chunks)
            num_bytes = len(encoded.metadata) + sum(len(buffer) for buffer in encoded.data)
            records.append(ObjectRecord(name, job.step, num_bytes, crc32c(encoded.metadata)))
            written.extend(plan.tensors)
            yield plan.label, encoded

    folder.put_share(job.share, objects())
    held = [replace(tensor, pieces=()) for plan in job.extras for tensor in plan.tensors]
    return Receipt(job.rank, job.index, job.selection, records, [*written, *held, *job.tensors])


def values_of(plan: ObjectPlan, memory: memoryview) -> np.ndarray:
    """The flat values of an object."""
    dtype = stored_dtype(plan.dtype)
    return np.frombuffer(memory, dtype, plan.size) if plan.size else np.empty(0, dtype)


def with_checksums(plan: ObjectPlan, share: str, memory: memoryview) -> ObjectPlan:
    """With the object's name and the checksums of its bytes in memory, taken before anything else is done with them."""
    sums = checksums(values_of(plan, memory), [_span(tensor) for tensor in plan.tensors])
    name = f"{share}/{plan.label}"
    tensors = [
        replace(tensor, pieces=(replace(tensor.pieces[0], object=name, crc=crc),))
        for tensor, crc in zip(plan.tensors, sums.pieces, strict=True)
    ]
    return replace(plan, tensors=tensors)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First value and number of values in the object's array; none for an integer scalar, which is not in it."""
    (piece,) = tensor.pieces
    return piece.start, 0 if piece.value is not None else prod(piece.shape)


def attributes(job: SaveJob, tensors: list[Tensor]) -> dict[str, object]:
    """What an object says about itself: enough to read it without the manifest."""
    table = [asdict(tensor) | asdict(tensor.pieces[0]) for tensor in tensors]
    for row, tensor in zip(table, tensors, strict=True):
        row |= {"shape": list(tensor.shape), "box_offset": list(row.pop("offset")), "box_shape": list(tensor.pieces[0].shape)}
        del row["pieces"], row["object"]
    steps = {tensor.pieces[0].value for tensor in tensors if tensor.component == "step"}
    adam_step = steps.pop() if len(steps) == 1 else None
    return {"format": FORMAT, "save": str(job.save), "rank": job.rank, "step": job.step, "adam_step": adam_step, "tensors": table}


def gather(job: SaveJob, own: Receipt, folder: CheckpointFolder, clock: Clock, alive: Alive) -> list[Receipt]:
    """The receipts of all ranks, in order of rank.

    Raises CheckpointError for a rank that reports an error or the ranks that handed in nothing within the time limit, Superseded
    when another job took over. Without its rank it waits no longer than receipts keep coming.
    """
    receipts = {job.rank: own}
    news = started = clock.monotonic()
    orphaned: float | None = None
    while True:
        for rank in range(job.world):
            if rank not in receipts and (found := folder.receipt(job.save, rank)) is not None:
                receipts[rank] = Receipt.of_json(found)
                news = clock.monotonic()
                if receipts[rank].error:
                    raise CheckpointError(f"rank {rank} could not write its part: {receipts[rank].error}")
                if any(record.step != job.step for record in receipts[rank].objects):
                    raise CheckpointError(f"rank {rank} wrote its part of another step.")
        missing = [rank for rank in range(job.world) if rank not in receipts]
        if not missing:
            return [receipts[rank] for rank in range(job.world)]
        folder.check_claim(job.save.epoch, job.run)
        limit = started + job.timeout_seconds
        if not alive():
            orphaned = clock.monotonic() if orphaned is None else orphaned
            busy = folder.begun(job.save).issuperset(missing)
            limit = min(limit, max(news, orphaned) + (ORPHAN_BUSY_SECONDS if busy else ORPHAN_SECONDS))
        if clock.monotonic() > limit:
            names = ", ".join(map(str, missing))
            raise CheckpointError(f"no receipt came from rank {names} within {clock.monotonic() - started:.1f} s.")
        clock.sleep(min(max((clock.monotonic() - started) / POLLS_PER_WAIT, 0.005), 0.2))


def commit(job: SaveJob, receipts: list[Receipt], folder: CheckpointFolder, clock: Clock) -> Manifest:
    """Rank 0: makes the recovery point exist. Raises CheckpointError or OSError when it does not, Unsure when it may yet."""
    folder.check_claim(job.save.epoch, job.run)  # first: where the whole folder is away its newest checkpoint is not damaged
    manifest = merge(job, receipts, _parent(job, folder), clock.now())
    try:
        folder.commit(manifest)
    except OSError as error:
        if not _is_there(job.save, folder):
            if isinstance(error, NoAnswer):
                raise Unsure(str(error)) from error
            raise
    return manifest  # an error after the name appeared, as of the last fsync, undoes nothing


def _is_there(save: SaveId, folder: CheckpointFolder) -> bool:
    """Whether it is known to be committed."""
    with suppress(OSError):
        return folder.outcome(save) is True
    return False


def _parent(job: SaveJob, folder: CheckpointFolder) -> Manifest | None:
    if job.parent is None or job.selection is None:
        return None
    try:
        return folder.manifest(job.parent)
    except CheckpointError as error:
        raise LostParent(f"{error.message} The next checkpoint is a full one.") from error


def handle(job: SaveJob, memories: Sequence[memoryview], io: Io, clock: Clock, alive: Alive, gate: Gate) -> Reply:
    """One job from memory to its outcome. Never raises for a full or failing disk: the save is given up, training goes on."""
    started = clock.monotonic()
    folder = CheckpointFolder(Path(job.folder), io)
    with suppress(OSError):
        if folder.outcome(job.save) is False:
            if not job.rank:
                folder.abandon(job.save, "it was given up.")
            return Reply("abandoned")
    receipt = _attempt(job, memories, folder)
    num_bytes = sum(record.num_bytes for record in receipt.objects)
    if job.rank:
        outcome = "abandoned" if receipt.error else "written"
        with suppress(OSError):
            if receipt.error and folder.outcome(job.save) is False:  # what was written went meanwhile; why, rank 0 has said
                receipt = replace(receipt, error=folder.reason(job.save) or receipt.error)
            folder.put_receipt(job.save, job.rank, receipt.to_json())
        return Reply(outcome, receipt.error, num_bytes, clock.monotonic() - started)
    try:
        folder.check_claim(job.save.epoch, job.run)  # first: where the whole folder is away nothing else is news
        if receipt.error:
            raise CheckpointError(f"rank 0 could not write its part: {receipt.error}")
        receipts = gather(job, receipt, folder, clock, alive)
        with gate.passage(job.save, job.timeout_seconds):
            manifest = commit(job, receipts, folder, clock)
            gate.committed(job.save)
            seconds = clock.monotonic() - started
            swept = _sweep(job, folder)
    except Superseded as error:
        return Reply("superseded", str(error), num_bytes, clock.monotonic() - started)
    except Unsure as error:
        with suppress(OSError):
            folder.give_up(job.save, str(error))
        return Reply("abandoned", str(error), num_bytes, clock.monotonic() - started)
    except (OSError, CheckpointError) as error:
        with suppress(OSError):
            folder.abandon(job.save, str(error), needs_full=isinstance(error, LostParent))
        return Reply("abandoned", str(error), num_bytes, clock.monotonic() - started)
    oldest = max(manifest.ages().values(), default=0)
    return Reply("committed", "", manifest.new_bytes, seconds, oldest, swept)


def _sweep(job: SaveJob, folder: CheckpointFolder) -> str:
    """Returns what hindered it: that only leaves more behind."""
    try:
        damaged = folder.sweep(job.keep, job.save)
    except OSError as error:
        where = Path(error.filename).parent if error.filename else job.folder  # of each file it would be another sentence every time
        return f"What no recovery point needs cannot be removed from {where}: {error.strerror}."
    except CheckpointError as error:
        return f"What no recovery point needs is not removed: {error.message}"
    if not damaged:
        return ""
    return f"No object is removed until these recovery points are unpinned or gone, since what they need is not known: {' '.join(damaged)}"


def _attempt(job: SaveJob, memories: Sequence[memoryview], folder: CheckpointFolder) -> Receipt:
    """Where it fails nothing stays: a full disk has room again, also for the news."""
    try:
        return persist(job, memories, folder)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename or job.folder})"
    except CheckpointError as error:
        reason = error.message
    folder.drop_share(job.share)
    return Receipt(job.rank, job.index, job.selection, [], [], reason)
