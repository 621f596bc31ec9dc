"""How long rank 0's writer waits for the receipts of others. Time is a counter."""

from collections.abc import Callable

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.job import Receipt, SaveJob
from moetrain.checkpoint.writer import gather
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder
from tests.clock import FakeClock

SAVE = SaveId(1, 1)


class EventfulClock(FakeClock):
    """`events` happen while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.events: dict[float, Callable[[], None]] = {}

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        for when in [when for when in self.events if when <= self.time]:
            self.events.pop(when)()


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    found = CheckpointFolder(tmp_path, Io())
    found.claim(0.0)
    return found


def receipt(rank: int, error: str = "") -> Receipt:
    return Receipt(rank, 0, None, [], [], error)


def wait(folder: CheckpointFolder, clock: EventfulClock, dies_at: float = 1e9) -> list[Receipt]:
    job = SaveJob(str(folder.path), SAVE, None, 0, 3, 0, 10, "experts", None, [], [], {}, 3, 60.0)
    return gather(job, receipt(0), folder, clock, lambda: clock.time < dies_at)


def hand_in(folder: CheckpointFolder, rank: int, error: str = ""):
    return lambda: folder.put_receipt(SAVE, rank, receipt(rank, error).to_json())


def begin(folder: CheckpointFolder, *ranks: int) -> None:
    for rank in ranks:
        (folder.path / "objects" / f"{folder.new_share(SAVE, rank)}.part").mkdir(parents=True)


def test_a_living_trainers_writer_waits_for_its_time_limit(folder):
    clock = EventfulClock()
    clock.events = {50.0: hand_in(folder, 1)}
    with pytest.raises(CheckpointError, match="no receipt came from rank 2"):
        wait(folder, clock)
    assert 60 < clock.time < 61


def test_a_rank_that_reports_an_error_ends_the_save_at_once(folder):
    clock = EventfulClock()
    clock.events = {3.0: hand_in(folder, 2, "No space left")}
    with pytest.raises(CheckpointError, match="rank 2 could not write its part: No space left"):
        wait(folder, clock)
    assert clock.time < 4


def test_an_orphan_soon_gives_up_ranks_that_never_began(folder):
    clock = EventfulClock()
    begin(folder, 1)
    with pytest.raises(CheckpointError, match="no receipt came from rank 1, 2"):
        wait(folder, clock, dies_at=30.0)
    assert 35 < clock.time < 36


def test_an_orphan_waits_for_ranks_that_write_as_long_as_receipts_keep_coming(folder):
    clock = EventfulClock()
    begin(folder, 1, 2)
    clock.events = {15.0: hand_in(folder, 1), 33.0: hand_in(folder, 2)}
    assert [found.rank for found in wait(folder, clock, dies_at=1.0)] == [0, 1, 2]


def test_an_orphan_gives_up_writers_that_fell_silent(folder):
    clock = EventfulClock()
    begin(folder, 1, 2)
    clock.events = {15.0: hand_in(folder, 1)}
    with pytest.raises(CheckpointError, match="rank 2"):
        wait(folder, clock, dies_at=1.0)
    assert 35 < clock.time < 36
