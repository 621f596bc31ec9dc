"""What rank 0 may conclude from what ranks say about copies."""

import pytest

from moetrain.checkpoint.accord import Accord
from moetrain.dist.board import DictBoard
from moetrain.store.manifest import SaveId
from tests.clock import FakeClock

FIRST, SECOND = SaveId(1, 1), SaveId(1, 2)


@pytest.fixture
def ranks() -> list[Accord]:
    board, clock = DictBoard(), FakeClock()
    return [Accord(board, "checkpoint/x", rank, 2, clock) for rank in (0, 1)]


def test_a_copy_is_complete_when_every_rank_is_ready(ranks):
    ranks[0].ready(FIRST)
    assert ranks[0].is_complete(FIRST, 0.0) is None
    ranks[1].ready(FIRST)
    assert ranks[0].is_complete(FIRST, 0.0) is True


def test_a_copy_that_a_rank_left_out_is_given_up(ranks):
    ranks[0].ready(FIRST)
    ranks[1].leave_out(FIRST)
    assert ranks[0].is_complete(FIRST, 0.0) is False


def test_leaving_out_a_newer_save_does_not_give_up_the_copy_that_is_on_its_way_to_the_partner(ranks):
    for rank in ranks:
        rank.leave_out(SECOND)
    assert ranks[0].is_complete(FIRST, 0.0) is None
    for rank in ranks:
        rank.ready(FIRST)
    assert ranks[0].is_complete(FIRST, 0.0) is True


def test_a_rank_that_is_ready_with_a_newer_copy_has_no_older_one(ranks):
    ranks[0].ready(FIRST)
    ranks[1].ready(SECOND)
    assert ranks[0].is_complete(FIRST, 0.0) is False
