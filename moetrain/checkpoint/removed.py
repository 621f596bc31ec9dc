"""Recovery points that are not there and ought to be. A save that was interrupted looks much like one whose manifest was removed, so there
are two answers: `removed`, only what is certain, for a resume; `missing`, all that deserves a look, for somebody who asks. No torch."""

from collections.abc import Iterator
from itertools import pairwise

from moetrain.base.errors import CheckpointError
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder


def removed(folder: CheckpointFolder, keep: int) -> Iterator[str]:
    """Committed and gone, though no sweep took them: a sentence for each. `keep`: as sweeps have it.

    Raises CheckpointError or OSError for a folder that cannot be read.
    """
    yield from _newer(folder)
    yield from _between(folder, keep)


def _newer(folder: CheckpointFolder) -> Iterator[str]:
    """Receipts go with the sweep after a younger commit of the same job; a sweep of another one would have taken unfinished saves too."""
    newest = next(iter(folder.saves()), None)
    if newest is None or folder.manifest(newest).world == 1 or folder.receipt(newest, 1) is not None:  # rank 0 hands in none
        return
    left = [str(save.seq) for save in folder.unfinished() if save.epoch == newest.epoch and folder.begun(save)]
    if left:
        which = f"seq {left[0]}" if len(left) == 1 else f"one of seq {', '.join(reversed(left))}"
        yield f"A checkpoint newer than seq {newest.seq} was committed, and its manifest is gone: {which}."


def _between(folder: CheckpointFolder, keep: int) -> Iterator[str]:
    """One that another was built on, with fewer than `keep` younger ones, so that no sweep took it, and with an older one still there."""
    saves, pinned = folder.saves(), set(folder.pins().values())
    for num_younger, (younger, older) in enumerate(pairwise(saves), 1):
        if num_younger >= keep or pinned.issuperset(saves[num_younger:]):
            return
        if younger.seq == older.seq + 1:  # spares reading its manifest
            continue
        parent = folder.manifest(younger).parent
        if parent is not None and parent > older:
            yield f"The checkpoint seq {parent.seq}, on which seq {younger.seq} was built, is gone although older ones are still there."


def missing(folder: CheckpointFolder) -> dict[SaveId, str]:
    """Recovery points that ought to be there, and why."""
    kept = {save.seq for save in folder.saves()} - {save.seq for save in folder.pins().values()}
    holes = (save for save in folder.gaps() if save.seq - 1 in kept)  # else it may have been swept: one further back was pinned for a time
    gaps = {save: f"seq {save.seq}: MISSING, although seq {save.seq - 1} is there and a younger one was built on it" for save in holes}
    newest = next((point for point in folder.history() if isinstance(point, Manifest)), None)
    written = (save for save in folder.unfinished() if _is_written(folder, save, newest.world if newest else 1))
    late = {
        save: f"seq {save.seq}: MISSING, every rank wrote its part but there is no manifest (removed, or never begun)" for save in written
    }
    return gaps | late


def _is_written(folder: CheckpointFolder, save: SaveId, world: int) -> bool:
    """Whether every rank wrote its part, so that there should be a manifest; in an interrupted save something is half-made or absent."""
    shares = folder.io.list(folder.path / "objects" / str(save))
    if 0 not in folder.begun(save) or any(name.endswith(".part") for name in shares):  # rank 0 commits without a receipt
        return False
    try:
        receipts = [folder.receipt(save, rank) for rank in range(1, world)]
    except CheckpointError:
        return True
    return all(receipt is not None and not receipt["error"] for receipt in receipts)
