"""What a prune by hand leaves behind must be enough to go on from: it is read before anything is removed. No torch."""

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import Look, check, check_object, remembered
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder


def check_rest(folder: CheckpointFolder, keep: int) -> list[str]:
    """Reads recovery points that a prune leaves, the newest first, until one is good. Returns what is wrong with newer ones.

    Raises CheckpointError when none is good and some would go.
    """
    look = remembered(check_object)
    stay, going = folder.sorted_out(keep)
    damage: list[str] = []
    for save in stay:
        bad = _damage(folder, save, look)
        if not bad:
            return damage
        damage.append(f"seq {save.seq}: {bad[0]}" + (f" {len(bad) - 1} more objects are damaged." if len(bad) > 1 else ""))
    if going:
        message = f"No recovery point that --keep {keep} leaves is good: {' '.join(damage)} Nothing was removed."
        raise CheckpointError(message, _way_out(folder, going, look))
    return damage


def _damage(folder: CheckpointFolder, save: SaveId, look: Look) -> list[str]:
    try:
        return list(check(folder, folder.manifest(save), look).values())
    except CheckpointError as error:
        return [error.message]


def _way_out(folder: CheckpointFolder, going: list[SaveId], look: Look) -> str:
    good = next((save for save in going if not _damage(folder, save, look)), None)
    if good is None:
        return "No other one is good either: resume the run, which takes damaged experts from older ones, and prune then."
    return f"seq {good.seq} is good: pin it (`moetrain checkpoint pin RUN good --seq {good.seq}`), or give a larger --keep."
