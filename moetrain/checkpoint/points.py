"""The recovery point that somebody names by its number or a pin, and what is said of one that is not there. No torch."""

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.removed import missing
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder


def find(folder: CheckpointFolder, which: str | None) -> Manifest:
    """The recovery point of a number or pin; the newest that can be read for None. Raises CheckpointError for a missing or damaged one."""
    if which is None:
        return _newest(folder)
    pins, saves = folder.pins(), folder.saves()
    if which in pins:
        wanted = [save for save in saves if save == pins[which]]
        missing = CheckpointError(
            f"The pin {which} keeps seq {pins[which].seq}, which is not there any more.",
            f"`moetrain checkpoint unpin RUN {which}` takes it away; there are seq {_numbers(folder)}.",
        )
    elif which.isdigit():
        wanted = [save for save in saves if str(save.seq) == which]
        missing = CheckpointError(f"There is no recovery point {which} in {folder.path}.", f"There are seq {_numbers(folder)}.")
    else:
        hint = f"Pins: {', '.join(pins) or 'none'}; `moetrain checkpoint list` shows the numbers."
        raise CheckpointError(f"{which} is neither the number of a recovery point nor a pin.", hint)
    if not wanted:
        raise missing
    try:
        return folder.manifest(wanted[0])
    except CheckpointError as error:
        message = f"Recovery point {wanted[0].seq} cannot be used: {error.message}"
        raise CheckpointError(message, f"There are seq {_numbers(folder)}.") from error


def dangling(folder: CheckpointFolder) -> list[str]:
    """A sentence for each pin whose recovery point is gone."""
    pins, saves = folder.pins(), folder.saves()
    return [
        f"The pin {name} keeps seq {save.seq}, which is not there any more: `moetrain checkpoint unpin RUN {name}` takes it away."
        for name, save in pins.items()
        if save not in saves
    ]


def _newest(folder: CheckpointFolder) -> Manifest:
    damage: list[str] = []
    for point in folder.history():
        if isinstance(point, Manifest):
            return point
        damage.append(point.message)
    if damage:
        raise CheckpointError(f"No recovery point in {folder.path} can be read: {' '.join(damage)}", "Bring the files back from a copy.")
    if gone := missing(folder):
        message = f"There is no recovery point in {folder.path}: {next(iter(gone.values()))}."
        raise CheckpointError(message, "If it was there, bring it back from a copy; else the next save makes one.")
    raise CheckpointError(f"There is no recovery point in {folder.path} yet.", "The first save of the run makes one.")


def _numbers(folder: CheckpointFolder) -> str:
    return ", ".join(str(save.seq) for save in reversed(folder.saves())) or "none"
