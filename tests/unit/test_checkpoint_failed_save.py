"""What a save that fails costs: it is given up with a reason, training goes on, older checkpoints stay."""

import errno
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import check, check_object
from moetrain.checkpoint.job import Receipt, SaveJob
from moetrain.checkpoint.pending import Pending
from moetrain.checkpoint.writer import gather
from moetrain.store.io import Buffer, Io
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import Job, LocalLink, LocalNode, assert_equal, expected, experts_by_step, flip, manifests


def test_missing_receipt_abandons_this_save_and_the_next_takes_the_same_experts(tmp_path):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.nodes[1].dead = True
    lost = job.save(2)
    assert not any(pending.committed for pending in lost)
    assert "rank 1" in lost[0].reason
    assert job.ranks[0].status().failures == 1
    assert not (tmp_path / "objects" / str(lost[0].save)).exists()
    job.nodes[1].dead = False
    assert all(pending.committed for pending in job.save(3))
    newest, first = manifests(tmp_path)
    assert newest.index == first.index + 1
    with pytest.raises(CheckpointError, match=r"no receipt|not committed") as caught:
        job.nodes[0].dead = True
        job.save(4)
        job.ranks[0].finish()
    assert "step 3" in caught.value.hint


@pytest.mark.parametrize("trouble", ["damaged pin", "refused removal"])
def test_a_sweep_that_cannot_remove_objects_is_told_once(tmp_path, caplog, trouble):
    job = Job(tmp_path, 1, 1, keep=1)
    job.save(1)
    folder = CheckpointFolder(tmp_path, Io())
    if trouble == "damaged pin":
        folder.pin("best", folder.saves()[0])
        job.save(2)
        (broken := tmp_path / "manifests" / f"{folder.saves()[-1]}.json").write_text("")
    else:
        broken = tmp_path / "manifests"

        def refuse(name: str, path: Path) -> None:
            if name == "unlink" and path.parent == broken:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        job.nodes[0].io = Io(refuse)
    with caplog.at_level(logging.WARNING):
        assert all(job.save(step)[0].committed for step in (3, 4, 5))
    said = [record.getMessage() for record in caplog.records if "remove" in record.getMessage()]
    assert len(said) == 1
    assert str(broken) in said[0]


FAILURES = {"mkdir": errno.ENOSPC, "write": errno.ENOSPC, "fsync": errno.EIO, "rename": errno.EIO, "link": errno.ENOSPC}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("operation", FAILURES)
def test_failing_disk_never_stops_training_or_hurts_old_checkpoints(tmp_path, rank, operation):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.settings.timeout_seconds = 0.1  # a rank that cannot even hand in a receipt is waited for
    broken = [True]

    def fail(name: str, path: Path) -> None:
        if broken[0] and name == operation:
            raise OSError(FAILURES[name], os.strerror(FAILURES[name]), str(path))

    job.nodes[rank].io = Io(fail)
    assert not any(pending.committed for pending in job.save(2))
    broken[0] = False
    job.settings.timeout_seconds = 60
    assert_equal(Job(tmp_path / "none", 1, 1).load(str(tmp_path))[1], expected(1))
    assert all(pending.committed for pending in job.save(3))
    assert not list(tmp_path.glob("objects/*/*.part"))
    left = {path.parent.parent.name for path in tmp_path.glob("objects/*/*/*")}
    assert left == {str(point.save) for point in manifests(tmp_path)}


def test_a_second_job_takes_over_and_the_first_can_not_commit(tmp_path):
    old = Job(tmp_path, 1, 1)
    old.save(1)
    new = Job(tmp_path, 1, 1)
    new.load()
    assert not old.save(2)[0].committed
    with pytest.raises(CheckpointError, match="taken over"):
        old.ranks[0].save(old.states(3)[0], {"step": 3})
    assert new.save(2)[0].committed
    assert [point.save.epoch for point in manifests(tmp_path)] == [2, 1]


def test_a_folder_that_is_away_for_a_while_costs_the_saves_of_that_time(tmp_path):
    place, away = tmp_path / "checkpoint", tmp_path / "away"
    job = Job(place, 2, 2)
    job.save(1)
    place.rename(away)
    for step in (2, 3):
        lost = job.save(step)
        assert not any(pending.committed for pending in lost)
        assert "was it moved or unmounted?" in lost[0].reason
    assert not place.exists(), "it could not be moved back"
    away.rename(place)
    assert all(pending.committed for pending in job.save(4))
    newest, first = manifests(place)
    assert (newest.parent, newest.full) == (first.save, False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_disk_on_one_rank_costs_saves_and_never_holds_up_training(tmp_path, rank):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(operation: str, path: Path) -> None:
        hangs.set()
        assert goes_on.wait(60)

    job.nodes[rank].io = Io(hang)
    hanging = job.start(2)
    assert hangs.wait(60)
    saves = [hanging]
    for step in (3, 4):
        saves.append(job.start(step))
        for one in job.ranks:
            one.wait_copied()  # the disk still hangs
    assert not hanging[rank].done.is_set()
    for pending in saves[2]:  # one hangs, one waits for it
        assert pending.done.wait(60)
        assert "in memory only" in pending.reason
    saves.append(job.start(5, full=True))  # the last one of a run waits for its turn
    goes_on.set()
    assert all(pending.done.wait(60) for save in saves for pending in save)
    assert [[pending.committed for pending in save] for save in saves] == [[True] * 2, [True] * 2, [False] * 2, [True] * 2]
    assert job.ranks[rank].status().failures == 0
    assert [(point.step, point.index) for point in manifests(tmp_path)] == [(5, 3), (3, 2), (2, 1)]


def test_a_lost_parent_costs_one_save_and_the_next_is_full(tmp_path):
    job = Job(tmp_path, 2, 2)
    job.save(1)
    job.save(2)
    flip(sorted((tmp_path / "manifests").glob("*.json"))[-1], 100)
    lost = job.save(3)
    assert not any(pending.committed for pending in lost)
    assert "full" in lost[1].reason
    assert all(pending.committed for pending in job.save(4))
    assert manifests(tmp_path)[0].full
    assert all(pending.committed for pending in job.save(5))
    assert not manifests(tmp_path)[0].full
    assert_equal(Job(tmp_path, 1, 1).load()[1], expected(5, experts_by_step(manifests(tmp_path)[0])))


def test_no_room_for_the_copy_is_said_before_the_next_update(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=[LocalNode(free=lambda folder: 100)])
    job.start(1)
    with pytest.raises(CheckpointError, match="fits nowhere"):
        job.ranks[0].wait_copied()


def test_the_last_save_asks_an_agent_once_more_that_did_not_answer(tmp_path):
    job = Job(tmp_path / "checkpoint", 1, 1)
    job.save(10)
    job.nodes[0].stopped = True
    (given_up,) = job.save(20)
    job.nodes[0].stopped = False
    (too_soon,) = job.save(30)
    assert "asked again" in too_soon.reason and not given_up.committed
    (last,) = job.save(40, full=True)
    assert last.committed
    job.ranks[0].finish()


class LateNode(LocalNode):
    """A node whose agent, while `is_late`, goes on with a save that its rank waits no longer for."""

    def __init__(self) -> None:
        self.is_late = False
        self.late: list[threading.Thread] = []
        super().__init__()

    def __call__(self, start: bool) -> "LateLink":
        return LateLink(self)


class LateLink(LocalLink):
    def __init__(self, node: LateNode) -> None:
        super().__init__(node)
        self._late_node = node

    def call(self, request: dict, limit_seconds: float, silence_seconds: float = inf) -> dict:
        if request["op"] != "persist" or not self._late_node.is_late:
            return super().call(request, limit_seconds)
        self._late_node.late.append(threading.Thread(target=super().call, args=(request, limit_seconds), daemon=True))
        self._late_node.late[-1].start()
        raise TimeoutError


def late_save(job: Job, version: int, is_there: threading.Event) -> Pending:
    """A full save that its trainer gives up waiting for, once the agent is where the test wants it."""
    node = job.nodes[0]
    assert isinstance(node, LateNode)
    node.is_late = True
    (pending,) = job.save(version, full=True)
    assert is_there.wait(60)
    node.is_late = False
    assert not pending.committed
    assert "took more than" in pending.reason
    return pending


def test_a_commit_that_nobody_waited_for_is_whole_and_the_next_save_builds_on_it(tmp_path):
    node = LateNode()
    job = Job(tmp_path, 1, 1, nodes=[node], keep=1)
    job.save(1, full=True)
    is_there, goes_on = threading.Event(), threading.Event()

    def hang(operation: str, path: Path) -> None:
        if operation == "link" and path.parent.name == "manifests":
            is_there.set()
            assert goes_on.wait(60)

    node.io = Io(hang)
    late = late_save(job, 2, is_there)
    node.io = Io()
    job.settings.timeout_seconds = 0.1
    (beside,) = job.save(3)
    assert "earlier checkpoint" in beside.reason  # it would have built on what the late one is about to remove
    goes_on.set()
    node.late[0].join(60)
    assert [point.save for point in manifests(tmp_path)] == [late.save]
    assert_equal(Job(tmp_path / "none", 1, 1).load(str(tmp_path))[1], expected(2))
    job.settings.timeout_seconds = 60
    assert job.save(4)[0].committed
    (newest,) = manifests(tmp_path)
    assert newest.parent == late.save
    assert_equal(Job(tmp_path / "none", 1, 1).load(str(tmp_path))[1], expected(4, experts_by_step(newest)))


def test_a_save_that_a_younger_one_overtook_is_not_committed(tmp_path, monkeypatch):
    node = LateNode()
    job = Job(tmp_path, 1, 1, nodes=[node], keep=2)
    job.save(1, full=True)
    is_there, goes_on = threading.Event(), threading.Event()

    def slow(job: SaveJob, *others: Any) -> list[Receipt]:
        found = gather(job, *others)
        if job.step == 2:
            is_there.set()
            assert goes_on.wait(60)
        return found

    monkeypatch.setattr("moetrain.checkpoint.writer.gather", slow)
    late = late_save(job, 2, is_there)
    assert job.save(3)[0].committed  # and swept: nothing of the late one is left
    goes_on.set()
    node.late[0].join(60)
    folder = CheckpointFolder(tmp_path, Io())
    assert folder.outcome(late.save) is False
    assert [point.step for point in manifests(tmp_path)] == [3, 1]
    assert all(check(folder, point, check_object) == {} for point in manifests(tmp_path))


class SmallDisk(Io):
    """Of one rank, with room for `room` bytes more; what is removed is given back. A write that finds none fills it up."""

    def __init__(self, folder: Path, rank: int, room: int) -> None:
        super().__init__()
        self._folder, self._rank, self.size_bytes = folder, rank, 0
        self.size_bytes = room - self.free

    @property
    def free(self) -> int:
        taken = 0
        for folder, _, names in os.walk(self._folder):  # other ranks rename and remove theirs meanwhile
            if f"/{self._rank:05d}-" in folder:
                with suppress(FileNotFoundError):
                    taken += sum(os.stat(f"{folder}/{name}").st_size for name in names)
        return self.size_bytes - taken

    def write_new(self, path: Path, buffers: Sequence[Buffer]) -> int:
        free = self.free
        if sum(memoryview(buffer).nbytes for buffer in buffers) <= free:
            return super().write_new(path, buffers)
        path.write_bytes(bytes(max(free, 0)))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_save_that_fills_the_disk_gives_the_room_back(tmp_path, monkeypatch, full_rank):
    job = Job(tmp_path, 2, 2)
    job.save(1, full=True)
    job.save(2)
    monkeypatch.setattr("moetrain.store.backend.WRITERS", 1)  # none fills up what another one has just freed
    before = set(tmp_path.glob(f"objects/*/{full_rank:05d}-*"))
    disk = SmallDisk(tmp_path, full_rank, manifests(tmp_path)[0].total_bytes // 4)
    job.nodes[full_rank].io = disk
    lost = job.save(3, full=True)
    assert not any(pending.committed for pending in lost)
    assert "No space left" in lost[full_rank].reason
    assert CheckpointFolder(tmp_path, Io()).outcome(lost[0].save) is False
    assert set(tmp_path.glob(f"objects/*/{full_rank:05d}-*")) == before  # another rank may have come with its share afterwards
    disk.size_bytes += 1 << 20
    assert all(pending.committed for pending in job.save(4))
    assert not list(tmp_path.glob(f"objects/{lost[0].save}/*"))


def test_rank_0_takes_its_agents_word_when_not_even_that_can_be_written(tmp_path):
    job = Job(tmp_path, 1, 1)
    job.save(1)

    def fail(operation: str, path: Path) -> None:
        if operation in ("open", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    job.nodes[0].io = Io(fail)
    (lost,) = job.save(2)  # which would else last three times the limit
    assert "No space left" in lost.reason
    job.nodes[0].io = Io()
    assert job.save(3)[0].committed
