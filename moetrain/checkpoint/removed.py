"""Recovery points that were committed and are gone, though no sweep took them. Only what is certain: a save that was interrupted looks much
like one whose manifest was removed. No torch."""

from collections.abc import Iterator
from itertools import pairwise

from moetrain.store.objects import CheckpointFolder


def removed(folder: CheckpointFolder, keep: int) -> Iterator[str]:
    """A sentence for each; `keep` as sweeps have it. Raises CheckpointError or OSError for a folder that cannot be read."""
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
