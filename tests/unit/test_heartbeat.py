"""Who is missed, by whom, and what is said; time and store are the test's own."""

from datetime import timedelta

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.dist.heartbeat import Heartbeat
from tests.clock import FakeClock

LIMIT = 10.0


class DeadStore(HashStore):
    """Fails as a store does whose host is gone."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("broken pipe")


class Ranks:
    """Heartbeats of several ranks on one store and one clock; a beat of all who run every 2 s."""

    def __init__(self, size: int) -> None:
        self.clock, self.store = FakeClock(), HashStore()
        self.said: dict[int, list[str]] = {rank: [] for rank in range(size)}
        self.running = set(range(size))
        self.hearts = [Heartbeat(self.store, rank, size, LIMIT, self.said[rank].append, self.clock) for rank in range(size)]

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / 2)):
            self.clock.sleep(2.0)
            for rank in sorted(self.running):
                self.hearts[rank].beat()
                self.hearts[rank].judge()


def test_nothing_is_said_while_all_ranks_run() -> None:
    ranks = Ranks(3)
    ranks.run(120)
    assert ranks.said == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("lost", [0, 2])
def test_a_silent_rank_is_named_by_every_other_within_15_seconds(lost: int) -> None:
    ranks = Ranks(4)
    ranks.run(20)
    ranks.running.remove(lost)
    ranks.run(LIMIT - 2)
    assert not any(ranks.said.values()), "not before the limit"
    ranks.run(15 - (LIMIT - 2))
    assert ranks.said[lost] == []
    for rank in ranks.running:
        assert f"Nothing was heard from rank {lost} on " in ranks.said[rank][0]
        assert "killed, frozen or cut off" in ranks.said[rank][0]


def test_a_rank_that_never_beat_is_missed_too() -> None:
    ranks = Ranks(2)
    ranks.running.remove(1)
    ranks.run(14)
    assert "Nothing was heard from rank 1 for" in ranks.said[0][0]


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_left_in_order_is_not_missed(leaver: int) -> None:
    ranks = Ranks(3)
    ranks.run(4)
    ranks.hearts[leaver].stop()
    ranks.running.remove(leaver)
    ranks.run(60)
    assert not any(ranks.said.values())


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_ended_with_an_error_is_named_with_it(failing: int) -> None:
    ranks = Ranks(3)
    ranks.run(4)
    ranks.hearts[failing].stop("OutOfMemoryError: tried to allocate 5 GiB.")
    ranks.running.remove(failing)
    ranks.run(LIMIT - 2)
    assert not any(ranks.said.values()), "it has time to end by itself"
    ranks.run(6)
    for rank in ranks.running:
        assert ranks.said[rank][0].startswith(f"Rank {failing} on ")
        assert " ended: OutOfMemoryError: tried to allocate 5 GiB. Every rank ends" in ranks.said[rank][0]


def test_a_store_that_does_not_answer_ends_the_rank() -> None:
    ranks = Ranks(2)
    ranks.run(4)
    ranks.hearts[1]._store = DeadStore()  # pyright: ignore[reportAttributeAccessIssue]
    ranks.running = {1}
    ranks.run(14)
    assert ranks.said[0] == []
    assert "has had no answer from the job's store for" in ranks.said[1][0]
    assert "Start the same command again" in ranks.said[1][0]


def test_calls_to_the_store_have_the_limit_as_their_time_limit() -> None:
    heart = Heartbeat(HashStore(), 0, 2, 7.0, lambda sentence: None)
    assert heart._store.timeout == timedelta(seconds=7)  # pyright: ignore[reportAttributeAccessIssue]
