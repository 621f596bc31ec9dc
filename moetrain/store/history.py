"""The recovery points of a folder as recovery looks at them: a manifest is read when it is asked for, and once."""

from collections.abc import Iterator, Mapping

from moetrain.base.errors import CheckpointError
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder


class History(Mapping[SaveId, Manifest]):
    """Newest first. A damaged one is listed and not there: `get` gives None, `look` what is wrong with it."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder, self._saves = folder, folder.saves()
        self._read: dict[SaveId, Manifest | CheckpointError] = {}

    def look(self, save: SaveId) -> Manifest | CheckpointError:
        if save not in self._read:
            try:
                self._read[save] = self._folder.manifest(save)
            except CheckpointError as error:
                self._read[save] = error
        return self._read[save]

    def __getitem__(self, save: SaveId) -> Manifest:
        found = self.look(save) if save in self._saves else None
        if not isinstance(found, Manifest):
            raise KeyError(save)
        return found

    def __iter__(self) -> Iterator[SaveId]:
        return iter(self._saves)

    def __len__(self) -> int:
        return len(self._saves)
