"""Ranks meet in a store that still holds what killed ranks of an earlier start left in it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from moetrain.base.errors import TrainingError
from moetrain.dist.meeting import meet
from moetrain.dist.watch import Watch
from tests.clock import FakeClock

T = TypeVar("T")


def on_threads(size: int, fn: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(fn, range(size)))


def shared() -> HashStore:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    return store


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_start_has_keys_of_its_own(size: int) -> None:
    store = shared()

    def start(rank: int) -> Store:
        return meet(store, rank, size, Watch(rank, 20.0))

    def publish(stores: list[Store], word: str) -> list[bytes]:
        def exchange(rank: int) -> bytes:
            stores[rank].set(f"address/{rank}", f"{word} {rank}")
            return stores[rank].get(f"address/{(rank + 1) % size}")

        return on_threads(size, exchange)

    for word in ("first", "second", "third"):
        stores = on_threads(size, start)
        assert not stores[0].check(["address/0"]), "a key of an earlier start is seen"
        assert publish(stores, word) == [f"{word} {(rank + 1) % size}".encode() for rank in range(size)]


def test_a_rank_that_was_greeted_and_died_is_greeted_again() -> None:
    store = shared()
    store.set("moetrain/hello/1", "of a process that is gone")
    first, second = on_threads(2, lambda rank: meet(store, rank, 2, Watch(rank, 20.0)))
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert isinstance(first, PrefixStore)


def test_ranks_that_do_not_come_are_named() -> None:
    store = shared()
    store.set("moetrain/hello/2", "of a process that is gone")
    sentence = r"Rank 0 waited 10\.\d s for the other ranks in: joining the process group \(missing: 1, 2\)\."
    with pytest.raises(TrainingError, match=sentence):
        meet(store, 0, 3, Watch(0, 10.0, FakeClock()))
