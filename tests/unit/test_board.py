"""A notice board: the newest text under a key, and no waiting for a store that is lost."""

from threading import Event

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.dist.board import Board, DictBoard, StoreBoard


@pytest.mark.parametrize("make", [DictBoard, lambda: StoreBoard(HashStore())])
def test_the_newest_text_under_each_posted_key_is_read(make: type[DictBoard]) -> None:
    board: Board = make()
    assert board.read(["a", "b"]) == {}
    board.post("a", "1")
    board.post("a", "ä2")
    board.post("c", "")
    assert board.read(["a", "b", "c"]) == {"a": "ä2", "c": ""}


class LostStore(HashStore):
    """Fails, or never answers, as a store does whose host is gone or cut off."""

    def __init__(self, answers: Event | None) -> None:
        super().__init__()
        self.answers, self.calls = answers, 0

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        if self.answers is None:
            raise RuntimeError("connection reset by peer")
        self.answers.wait()


def lost_board(answers: Event | None) -> tuple[StoreBoard, LostStore]:
    store = LostStore(answers)
    board = StoreBoard(HashStore(), deadline_seconds=0.05)
    board._store = store  # pyright: ignore[reportAttributeAccessIssue]
    return board, store


def test_a_failing_store_forgets_the_post() -> None:
    board, store = lost_board(None)
    board.post("a", "1")
    board.post("a", "2")
    assert store.calls == 2


def test_a_store_that_does_not_answer_is_left_alone_until_it_does() -> None:
    answers = Event()
    board, store = lost_board(answers)
    board.post("a", "1")
    board.post("a", "2")
    assert board.read(["a"]) == {}
    assert store.calls == 1
    answers.set()
    assert board._stuck is not None
    board._stuck.join()
    board.post("a", "3")
    assert store.calls == 2
