"""The recovery points of a folder as recovery looks at them: a manifest is read when it is asked for."""

from collections.abc import Callable, Sequence

from moetrain.base.errors import CheckpointError
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder


class History:
    """Reads no manifest twice. `saves`: newest first, damaged ones too."""

    def __init__(self, folder: CheckpointFolder | None) -> None:
        """None: there are none."""
        self.saves: Sequence[SaveId] = folder.saves() if folder else ()
        self._folder = folder
        self._found: dict[SaveId, Manifest | CheckpointError] = {}

    def look(self, save: SaveId) -> Manifest | CheckpointError:
        """One of `saves`, or what is wrong with it."""
        if save not in self._found:
            assert self._folder is not None
            try:
                self._found[save] = self._folder.manifest(save)
            except CheckpointError as error:
                self._found[save] = error
        return self._found[save]

    def newest(self, is_wanted: Callable[[SaveId], bool]) -> Manifest | None:
        """The newest good one of those."""
        points = (self.look(save) for save in self.saves if is_wanted(save))
        return next((point for point in points if isinstance(point, Manifest)), None)
