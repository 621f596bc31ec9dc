"""What becomes of the copies in memory when no rank comes back for them: the newest that is whole goes to the store. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.checkpoint.gate import Gate
from moetrain.checkpoint.generation import Generation
from moetrain.checkpoint.job import SaveJob
from moetrain.checkpoint.plan import ObjectPlan
from moetrain.checkpoint.writer import handle
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder

POLL_SECONDS = 0.5
MORE = ".more"  # of an expert of which a save would have brought one object to the store, and kept another in memory only


def whole_saves(generations: Iterable[Generation]) -> list[list[Generation]]:
    """The own parts of saves that hold every expert, the newest save first; of each rank 0's part last, which commits."""
    whole = [one for one in generations if one.job.selection is None and not one.is_trimmed and not one.is_copy]
    saves = sorted({one.save for one in whole}, reverse=True)
    return [sorted((one for one in whole if one.save == save), key=lambda one: -one.job.rank) for save in saves]


def rescue(parts: list[Generation], memory: Callable[[str], memoryview], io: Io, clock: Clock, gate: Gate) -> bool:
    """Writes one save, of which other agents write their parts at the same time; whether there is nothing more to try.

    `memory`: of a slot. Raises OSError when the folder cannot be read.
    """
    job = parts[-1].job
    folder = CheckpointFolder(Path(job.folder), io)
    if not _is_wanted(job.save, folder):
        return True
    replies = [
        handle(job_of(one, folder), [memory(held.slot) for held in one.held.values()], io, clock, lambda: True, gate) for one in parts
    ]
    return replies[-1].outcome in ("committed", "superseded") if job.rank == 0 else _is_committed(job, folder, clock)


def job_of(one: Generation, folder: CheckpointFolder) -> SaveJob:
    """What a rank would have asked for if all of this had been for the store."""
    share = folder.new_share(one.save, one.job.rank)
    plans: list[ObjectPlan] = []
    for name, held in one.held.items():
        label = name.rpartition("/")[2]
        label += MORE if any(plan.label == label for plan in plans) else ""
        tensors = [
            replace(tensor, pieces=tuple(replace(piece, object=f"{share}/{label}") for piece in tensor.pieces))
            for tensor in one.receipt.tensors
            if any(piece.object == name for piece in tensor.pieces)
        ]
        plans.append(ObjectPlan(label, held.dtype, held.size, tensors, []))
    rest = [tensor for tensor in one.receipt.tensors if not tensor.pieces]
    return replace(one.job, objects=plans, tensors=rest, share=share)


def _is_wanted(save: SaveId, folder: CheckpointFolder) -> bool:
    """No younger job has the folder, and nothing as new lies there."""
    newest = next(iter(folder.saves()), None)
    return folder.newest_epoch() == save.epoch and (newest is None or newest < save)


def _is_committed(job: SaveJob, folder: CheckpointFolder, clock: Clock) -> bool:
    """Waits for the agent of rank 0."""
    deadline = clock.monotonic() + 2 * job.timeout_seconds
    while (outcome := folder.outcome(job.save)) is None and clock.monotonic() < deadline:
        clock.sleep(POLL_SECONDS)
    return outcome is True
