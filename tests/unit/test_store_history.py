"""The recovery points of a folder, read when they are asked for."""

from moetrain.base.errors import CheckpointError
from moetrain.store.history import History
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, flip


def test_the_newest_good_one_is_found_and_none_is_read_twice(tmp_path):
    job = Job(tmp_path, 1, 1, keep=5)
    for step in (1, 2, 3):
        job.save(step)
    folder = CheckpointFolder(tmp_path, Io())
    history = History(folder)
    newest, middle, oldest = history.saves
    assert history.saves == folder.saves()
    flip(tmp_path / "manifests" / f"{newest}.json", 40)
    (tmp_path / "manifests" / f"{middle}.json").unlink()  # a sweep, after it was listed
    assert isinstance(history.look(newest), CheckpointError)
    assert isinstance(history.look(middle), CheckpointError)
    found = history.newest(lambda save: True)
    assert isinstance(found, Manifest) and found.save == oldest
    assert history.newest(lambda save: save > oldest) is None
    (tmp_path / "manifests" / f"{oldest}.json").unlink()
    assert history.newest(lambda save: save == oldest) is found


def test_there_may_be_none():
    assert History(None).newest(lambda save: True) is None
