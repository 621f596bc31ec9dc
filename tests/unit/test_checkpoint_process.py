"""A rank and the agent of its node: what is waited for, and for how long. Sockets and clocks, no processes."""

import errno
import mmap
import os
import socket
from contextlib import ExitStack
from math import inf
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import pytest

from moetrain.base.clock import SystemClock
from moetrain.checkpoint import process
from moetrain.checkpoint.agent import Agent
from moetrain.checkpoint.arena import Arena, map_slot
from moetrain.checkpoint.node_memory import HungUp, Needs, NodeMemory
from moetrain.checkpoint.process import AgentDied, AgentLate, Link, SocketLink
from moetrain.checkpoint.serve import PULSE, SOCKET, Server, remove_stale
from moetrain.checkpoint.wire import receive, send
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from tests.clock import FakeClock
from tests.unit.checkpoint_kit import LocalLink, LocalNode

PAGE = mmap.PAGESIZE


class Stoppable:
    """An agent of which a rank hears nothing while `stopped`. `asked`: how long each question would have waited in silence."""

    def __init__(self) -> None:
        self.folder, self.spare = Path("/nowhere"), list[Path]()
        self.stopped = self.killed = False
        self.asked: list[float] = []

    def __call__(self, start: bool) -> Link:
        return self

    def is_gone(self) -> bool:
        return self.killed

    def call(self, request: dict, limit_seconds: float, silence_seconds: float = inf) -> dict:
        self.asked.append(min(limit_seconds, silence_seconds))
        if self.stopped:
            raise TimeoutError
        return {"slots": [], "address": None}

    def close(self) -> None: ...


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_a_stopped_agent_holds_up_training_for_seconds_and_then_ever_more_rarely():
    agent, clock = Stoppable(), FakeClock()
    memory = NodeMemory(agent, 0, 1, clock)
    agent.stopped = True
    tried = []
    for _ in range(3600):  # a copy every second
        agent.asked.clear()
        with pytest.raises(AgentLate):
            memory.reserve(SaveId(1, 1), Needs(), [])
        assert sum(agent.asked) <= process.SILENCE_SECONDS
        tried += [clock.time] if agent.asked else []
        clock.sleep(1.0)
    assert tried == [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030]
    agent.stopped = False
    clock.sleep(600.0)
    assert memory.reserve(SaveId(1, 1), Needs(), []) == {}
    agent.stopped = True
    with pytest.raises(AgentLate, match="without a sign of life"):
        memory.reserve(SaveId(1, 1), Needs(), [])
    clock.sleep(9.0)
    with pytest.raises(AgentLate, match="asked again in 1 s"):
        memory.reserve(SaveId(1, 1), Needs(), [])


def test_a_stopped_agent_that_is_killed_is_followed_by_another_one_at_once():
    agent = Stoppable()
    memory = NodeMemory(agent, 0, 1, FakeClock())
    agent.stopped = True
    for _ in range(2):
        with pytest.raises(AgentLate):
            memory.reserve(SaveId(1, 1), Needs(), [])
    agent.stopped, agent.killed = False, True
    assert memory.reserve(SaveId(1, 1), Needs(), []) == {}


def test_only_an_agent_without_a_listening_socket_is_gone(tmp_path):
    launcher = process.Launcher(tmp_path / "run", process.AgentConfig(folder=str(tmp_path)))
    assert launcher.is_gone()
    launcher.folder.mkdir()
    with listening(launcher.folder / PULSE) as pulse:
        pulse.listen(0)
        assert [launcher.is_gone() for _ in range(3)] == [False] * 3, "nobody picks up, and then nobody else can call"
    assert launcher.is_gone()


def test_a_recovery_waits_longer_for_an_agent_than_training_does():
    agent = Stoppable()
    assert NodeMemory(agent, 0, 1, FakeClock()).list() == {"slots": [], "address": None}
    assert set(agent.asked) == {process.CALL_SECONDS}


def test_an_agent_that_works_on_a_large_copy_is_waited_for(tmp_path):
    with listening(tmp_path / SOCKET) as local, listening(tmp_path / PULSE) as pulse:

        def work() -> None:
            connection, _ = local.accept()
            with connection:
                receive(connection)
                for _ in range(3):  # it is asked for signs of life before it has an answer
                    pulse.accept()[0].close()
                send(connection, {"is": "done"})

        thread = Thread(target=work)
        thread.start()
        assert SocketLink(tmp_path).call({"op": "reserve"}, 60.0, silence_seconds=0.01) == {"is": "done"}
        thread.join()


def test_a_live_agent_shows_it_whatever_it_is_busy_with(tmp_path):
    (tmp_path / "arena").mkdir(mode=0o700)
    agent = Agent(tmp_path / "arena", Arena([tmp_path / "arena" / "slots"]), Io(), SystemClock())
    server = Server(agent, "127.0.0.1", 60.0, SystemClock())
    thread = Thread(target=server.serve)
    thread.start()
    link = SocketLink(agent.folder)
    with agent._lock:  # as long as it allocates slots for another rank
        for _ in range(3):
            link._feel_pulse(60.0)
    link.close()
    agent.is_stopped = True
    thread.join()
    server.close()
    with pytest.raises(OSError):
        link._feel_pulse(60.0)


def test_a_stopped_agent_is_noticed_although_it_can_be_called(tmp_path):
    with listening(tmp_path / SOCKET), listening(tmp_path / PULSE), pytest.raises(TimeoutError):
        SocketLink(tmp_path).call({"op": "reserve"}, 60.0, silence_seconds=0.01)


def test_calls_that_nobody_picks_up_do_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SILENCE_SECONDS", 0.01)
    with listening(tmp_path / SOCKET) as local:
        local.listen(0)
        waiting = SocketLink(tmp_path)
        with pytest.raises(TimeoutError):
            SocketLink(tmp_path)
        waiting.close()


def test_an_agent_that_ended_is_no_late_one(tmp_path):
    memory = NodeMemory(process.Launcher(tmp_path / "run", process.AgentConfig(folder=str(tmp_path))), 0, 1, FakeClock())
    assert memory.list() is None
    with pytest.raises(AgentDied, match="no agent"):
        memory._call("copy", {"op": "status"}, start=False)


def test_a_persist_link_that_ends_while_slots_are_mapped_disturbs_no_copy(monkeypatch):
    memory = NodeMemory(LocalNode(), 0, 1, SystemClock())

    def map_and_drop(path: str):
        for lane in ("persist", "copy"):  # as both lanes' threads, and those that wait for the partner, may at any moment
            memory._drop(lane)
        return map_slot(path)

    monkeypatch.setattr("moetrain.checkpoint.node_memory.map_slot", map_and_drop)
    assert len(memory.reserve(SaveId(1, 1), Needs(), [100, 5000])) == 2


def test_a_slot_that_makes_room_gives_its_pages_back_although_they_are_mapped():
    node = LocalNode(free=lambda base: 10 * PAGE - 512 * sum(os.fstat(one.fileno()).st_blocks for one in seen))
    memory = NodeMemory(node, 0, 1, SystemClock())
    with ExitStack() as files:
        seen: list[BinaryIO] = []
        for number, sizes in enumerate(([2 * PAGE] * 4, [5 * PAGE], [9 * PAGE]), start=1):
            maps = memory.reserve(SaveId(1, number), Needs(), sizes)
            seen += [files.enter_context(open(path, "rb")) for path in maps]
            assert memory._maps.keys() == node.agent.arena.slots.keys()
        views = list(map(memoryview, maps.values()))
        memory.reserve(SaveId(1, 4), Needs(), [10 * PAGE])
        assert not any(map(any, views))


class Leaving(LocalNode):
    """A node whose agent ends while a rank connects, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def __call__(self, start: bool) -> LocalLink:
        link = super().__call__(start)
        if self.times:
            self.times -= 1
            link.call = reset
        return link


def reset(request: dict, limit_seconds: float, silence_seconds: float = inf) -> dict:
    raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def test_an_agent_that_is_about_to_end_is_followed_by_another_one():
    assert NodeMemory(Leaving(1), 0, 1, SystemClock()).reserve(SaveId(1, 1), Needs(), []) == {}
    with pytest.raises(AgentDied, match="reset by peer"):
        NodeMemory(Leaving(2), 0, 1, SystemClock()).reserve(SaveId(1, 1), Needs(), [])


def test_a_slot_whose_rank_hung_up_keeps_its_pages_for_what_that_still_writes():
    node = LocalNode(room=4 * PAGE)
    memory = NodeMemory(node, 0, 1, SystemClock())
    (left,) = memory.reserve(SaveId(1, 1), Needs(), [4 * PAGE]).values()
    left[:4] = b"half"
    memory._drop("copy")  # while it copies
    memory.reserve(SaveId(1, 2), Needs(), [2 * PAGE])
    assert left[:4] == b"half"


def test_who_still_waits_for_the_partner_does_not_join_again_after_the_leave():
    node = LocalNode()
    memory = NodeMemory(node, 0, 1, SystemClock())
    memory.reserve(SaveId(1, 1), Needs(), [])
    memory.leave(done=True)
    with pytest.raises(HungUp):
        memory.replicated(SaveId(1, 1))
    assert node.agent.has_taken_leave
    assert not node.agent.sessions
    assert memory.reserve(SaveId(1, 2), Needs(), []) == {}  # a later save does


def test_an_agent_that_has_let_somebody_in_does_not_end_before_he_has_spoken(tmp_path, monkeypatch):
    """All ranks of the job before have taken their leave. On a busy machine the thread that attends to the newcomer begins late."""
    agent = Agent(tmp_path, Arena([tmp_path / "slots"]), Io(), SystemClock())
    server = Server(agent, "127.0.0.1", 60.0, SystemClock())
    agent.left = {0: True}
    looks = []

    class Late:
        def __init__(self, target, args, daemon) -> None: ...

        def start(self) -> None:
            looks.append("let in")

    def looked() -> None:
        looks.append("looked")
        agent.is_stopped = looks.count("looked") > 3

    monkeypatch.setattr("moetrain.checkpoint.serve.Thread", Late)
    monkeypatch.setattr(server, "_show_life", looked)
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(str(tmp_path / SOCKET))
    server.serve()
    server.close()
    caller.close()
    assert looks == ["looked", "let in", "looked", "looked", "looked"]


def test_what_an_agent_leaves_is_as_old_as_its_death(tmp_path):
    """The agent of another run that starts beside one that has just been killed."""
    own, spare = (tmp_path / base / f"moetrain-{os.getuid()}-x" for base in ("shared", "temporary"))
    for folder in (own, spare):
        folder.mkdir(mode=0o700, parents=True)
    agent = Agent(own, Arena([own / "slots", spare / "slots"]), Io(), SystemClock())
    server = Server(agent, "127.0.0.1", 60.0, SystemClock())
    for folder in (own, spare):
        os.utime(folder, (0, 0))  # it started long ago
    agent.left = {0: True}  # it looks once whether it is over
    server.serve()
    server.close()
    for folder in (own, spare):
        remove_stale(folder.parent, folder.parent / "another")
        assert folder.exists()
