"""What becomes of the copies in memory when no rank comes back for them: the newest that is whole goes to the store. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.checkpoint.gate import Gate
from moetrain.checkpoint.generation import Generation, Held
from moetrain.checkpoint.job import SaveJob
from moetrain.checkpoint.modes import is_derived
from moetrain.checkpoint.plan import ObjectPlan
from moetrain.checkpoint.writer import handle
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder, Superseded

MORE = ".more"  # of an expert of which a save would have brought one object to the store, and kept another in memory only


def whole_saves(generations: Iterable[Generation]) -> list[list[Generation]]:
    """The own parts of saves that hold every expert, the newest save first; of each rank 0's part last, which commits."""
    whole = [one for one in generations if one.job.selection is None and not one.is_trimmed and not one.is_copy]
    saves = sorted({one.save for one in whole}, reverse=True)
    return [sorted((one for one in whole if one.save == save), key=lambda one: -one.job.rank) for save in saves]


def rescue(parts: list[Generation], epoch: int, memory: Callable[[str], memoryview], io: Io, clock: Clock, gate: Gate) -> bool:
    """Writes this node's parts of one save; with rank 0's among them it is committed once the other nodes' are there. Whether nothing older
    is of use: it is committed, or there is something as new, or the folder is another job's.

    `epoch`: of the newest job here, which this save belongs to, or went on from it; `memory`: of a slot. A node that has not this save but
    an older one makes rank 0's agent go on to that, so every agent writes all it has and waits for none.
    Raises OSError, or CheckpointError, when the folder is not there now.
    """
    folder = CheckpointFolder(Path(parts[0].job.folder), io)
    save = SaveId(epoch, parts[0].save.seq)
    try:
        folder.check_claim(epoch, parts[0].job.run)
    except Superseded:
        return True
    if (newest := next(iter(folder.saves()), None)) is not None and newest >= parts[0].save:
        return True
    jobs = [job_of(one, save, folder) for one in parts]
    replies = [handle(job, [memory(held.slot) for held in kept], io, clock, lambda: True, gate) for job, kept in jobs]
    return replies[-1].outcome in ("committed", "superseded")


def job_of(one: Generation, save: SaveId, folder: CheckpointFolder) -> tuple[SaveJob, list[Held]]:
    """What a rank would have asked for if all of this had been for the store, under the number `save`, and where its objects lie."""
    share = folder.new_share(save, one.job.rank)
    plans: list[ObjectPlan] = []
    kept: list[Held] = []
    derived = {piece.object for tensor in one.receipt.tensors if is_derived(tensor) for piece in tensor.pieces}
    for name, held in one.held.items():
        if name in derived:  # beside what it was made from
            continue
        label = name.rpartition("/")[2]
        label += MORE if any(plan.label == label for plan in plans) else ""
        tensors = [
            replace(tensor, pieces=tuple(replace(piece, object=f"{share}/{label}") for piece in tensor.pieces))
            for tensor in one.receipt.tensors
            if any(piece.object == name for piece in tensor.pieces)
        ]
        plans.append(ObjectPlan(label, held.dtype, held.size, tensors, []))
        kept.append(held)
    rest = [tensor for tensor in one.receipt.tensors if not tensor.pieces and not is_derived(tensor)]
    return replace(one.job, save=save, objects=plans, tensors=rest, share=share, ancestors=(*one.job.ancestors, one.save)), kept
