"""The life of a node's agent as a process: who starts it, what ends it, that nothing is left. No ranks, no torch in it."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.agent import Agent
from moetrain.checkpoint.arena import Arena, arena_folder
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import AgentConfig, CheckpointConfig
from moetrain.checkpoint.node_memory import Needs, NodeMemory
from moetrain.checkpoint.process import Launcher, own_address
from moetrain.checkpoint.recover import alone
from moetrain.checkpoint.serve import SOCKET, Server, clear, lock, owned, remove_stale, short_path
from moetrain.checkpoint.wire import Address, Refused, WireError, ask
from moetrain.cli import main
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from tests.clock import FakeClock
from tests.dist.test_checkpoint_processes import agents, wait_for_no_agent
from tests.unit.checkpoint_kit import manifests, state_of

pytestmark = pytest.mark.dist


def launcher(tmp_path: Path, linger_seconds: float = 20.0) -> Launcher:
    return Launcher(tmp_path / "run" / "checkpoint", AgentConfig(folder=str(tmp_path / "memory"), linger_seconds=linger_seconds))


def is_free(folder: Path) -> bool:
    held = lock(folder)
    if held is not None:
        os.close(held)
    return held is not None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("starts", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_many_starts_leave_no_process_and_no_memory(tmp_path, starts):
    for _ in range(starts):
        config = CheckpointConfig(agent=AgentConfig(folder=str(tmp_path / "memory")))
        one = Checkpointer(tmp_path / "run" / "checkpoint", config, 0, 1, alone, SystemClock())
        assert one.save(state_of(0, 1, 1, 1), {"step": 1}).done.wait(60)
        assert agents(tmp_path)
        one.finish()
        wait_for_no_agent(tmp_path)
        assert list((tmp_path / "memory").iterdir()) == []


def test_ranks_that_start_together_share_one_agent_in_a_session_of_its_own(tmp_path):
    memories = [NodeMemory(launcher(tmp_path), rank, 1, SystemClock()) for rank in range(3)]
    threads = [threading.Thread(target=memory.address) for memory in memories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    addresses = [memory.address() for memory in memories]
    assert addresses == addresses[:1] * 3
    wait_until(lambda: len(agents(tmp_path)) == 1)  # the others find the folder taken and end
    (pid,) = agents(tmp_path)
    assert os.getsid(pid) != os.getsid(0)
    assert b"libtorch" not in Path(f"/proc/{pid}/maps").read_bytes()
    os.kill(pid, signal.SIGTERM)  # what a scheduler sends to all processes of a job
    assert memories[0].address() == addresses[0]
    for memory in memories:
        memory.leave(done=True)
    wait_for_no_agent(tmp_path)


def test_an_agent_ends_a_while_after_its_last_rank_was_killed(tmp_path):
    child = os.fork()
    if child == 0:
        NodeMemory(launcher(tmp_path, 0.3), 0, 1, SystemClock()).reserve(SaveId(1, 1), Needs(), [5000])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert agents(tmp_path)
    wait_for_no_agent(tmp_path)
    assert list((tmp_path / "memory").iterdir()) == []


def test_an_agent_whose_rank_never_comes_back_writes_what_it_holds(tmp_path):
    """One checkpoint, a copy in memory, kill -9."""
    folder = tmp_path / "run" / "checkpoint"
    child = os.fork()
    if child == 0:
        config = CheckpointConfig(agent=AgentConfig(folder=str(tmp_path / "memory"), linger_seconds=0.3))
        one = Checkpointer(folder, config, 0, 1, alone, SystemClock())
        one.save(state_of(0, 1, 1, 1), {"step": 1}).done.wait(60)
        one.save(state_of(0, 1, 1, 2), {"step": 2}, persists=False).done.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for_no_agent(tmp_path)
    assert [point.step for point in manifests(folder)] == [2, 1]
    assert list((tmp_path / "memory").iterdir()) == []


def test_a_child_that_holds_the_connection_of_a_dead_rank_deceives_nobody(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        memory = NodeMemory(launcher(tmp_path), 0, 1, SystemClock())
        memory.reserve(SaveId(1, 1), Needs(), [5000])
        grandchild = os.fork()
        if grandchild == 0:
            signal.pause()
        os.write(writing, str(grandchild).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    grandchild = int(os.read(reading, 20))
    other = launcher(tmp_path)(start=False)
    assert other is not None
    wait_until(lambda: other.call({"op": "status"}, 10)["slots"] == {"FREE": 8192})
    other.call({"op": "stop"}, 10)
    os.kill(grandchild, signal.SIGKILL)
    wait_for_no_agent(tmp_path)


def test_commands_show_and_stop_an_agent(tmp_path, capsys):
    folder, where = tmp_path / "run" / "checkpoint", ["--memory", str(tmp_path / "memory")]
    config = CheckpointConfig(agent=AgentConfig(folder=str(tmp_path / "memory")))
    one = Checkpointer(folder, config, 0, 1, alone, SystemClock())
    assert one.save(state_of(0, 1, 1, 1), {"step": 7}).done.wait(60)
    assert main(["checkpoint", "agent", "status", str(tmp_path / "run"), *where]) == 0
    said = capsys.readouterr().out
    assert "ranks 0 are connected" in said
    assert "READY" in said
    assert said.splitlines()[-1].split()[1:3] == ["7", "0"]
    assert main(["checkpoint", "agent", "stop", str(folder), *where]) == 0
    assert "has ended" in capsys.readouterr().out
    wait_for_no_agent(tmp_path)
    assert main(["checkpoint", "agent", "stop", str(folder), *where]) == 0
    assert "no agent" in capsys.readouterr().out
    assert main(["checkpoint", "agent", "status", str(folder), *where]) == 1


def test_the_memory_of_killed_agents_is_removed_by_the_next_one_and_by_stop(tmp_path, capsys):
    memory = NodeMemory(launcher(tmp_path, 0.1), 0, 1, SystemClock())
    memory.reserve(SaveId(1, 1), Needs(), [5000])
    (pid,) = agents(tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait_for_no_agent(tmp_path)
    left = arena_folder(tmp_path / "run" / "checkpoint", str(tmp_path / "memory"))
    assert left.exists()
    wait_until(lambda: is_free(left))  # a process that is killed lets go of its files last
    os.utime(left, (time.time() - 60, time.time() - 60))
    remove_stale(tmp_path / "memory", tmp_path / "memory" / "mine")
    assert not left.exists()
    left.mkdir(mode=0o700, parents=True)
    (tmp_path / "run" / "checkpoint" / "manifests").mkdir(parents=True)
    assert main(["checkpoint", "agent", "stop", str(tmp_path / "run"), "--memory", str(tmp_path / "memory")]) == 0
    assert "killed agent" in capsys.readouterr().out
    assert not left.exists()


def test_a_living_agents_memory_is_never_taken_for_a_dead_ones(tmp_path):
    memory = NodeMemory(launcher(tmp_path, 0.1), 0, 1, SystemClock())
    memory.reserve(SaveId(1, 1), Needs(), [5000])
    folder = arena_folder(tmp_path / "run" / "checkpoint", str(tmp_path / "memory"))
    os.utime(folder, (0, 0))
    remove_stale(tmp_path / "memory", tmp_path / "memory" / "mine")
    assert folder.exists()
    assert lock(folder) is None
    memory.leave(done=True)
    wait_for_no_agent(tmp_path)


def test_the_spare_folder_lives_and_dies_with_its_agent(tmp_path):
    first, spare = tmp_path / "shared" / f"moetrain-{os.getuid()}-x", tmp_path / "temporary" / f"moetrain-{os.getuid()}-x"
    held = owned([first, spare], SystemClock())
    agent = Agent(
        first, Arena([first / "slots", spare / "slots"], lambda base: 1 << 30 if base.name == "temporary" else 0), Io(), SystemClock()
    )
    Server(agent, "127.0.0.1", 120.0, SystemClock()).close()
    (slot,) = agent.arena.reserve([5000])

    def another_run_starts() -> bool:
        for folder in (first, spare):
            remove_stale(folder.parent, folder.parent / "another")
        return Path(slot.path).exists()

    os.utime(spare, (0, 0))
    assert another_run_starts()
    assert owned([spare], FakeClock()) == {}  # waits, but not for ever
    for descriptor in held.values():  # as when it is killed
        os.close(descriptor)
    os.utime(spare, (time.time() - 60, time.time() - 60))
    assert another_run_starts()  # its ranks may come back
    assert clear(first)
    assert not first.exists() and not spare.exists()


def test_strangers_on_the_network_get_nothing(tmp_path):
    memory = NodeMemory(launcher(tmp_path), 0, 1, SystemClock())
    found = memory.address()
    assert found is not None
    address = Address(**found)
    assert ask(address, {"op": "list"})[0]["generations"] == []
    with pytest.raises(Refused, match="not in the memory"):
        ask(address, {"op": "read", "name": "nothing"})
    with pytest.raises(WireError, match="closed"):
        ask(Address(address.host, address.port, "guess"), {"op": "list"})
    with pytest.raises(OSError):
        ask(Address(address.host, address.port, "guess"), {"op": "put", "num_bytes": 5}, b"12345")
    with socket.create_connection((address.host, address.port)) as noise:
        noise.sendall(os.urandom(4096))
    assert ask(address, {"op": "list"})[0]["folder"] == str(memory._connect.folder)
    memory.leave(done=True)
    wait_for_no_agent(tmp_path)


def test_a_socket_may_lie_in_a_folder_with_a_long_name(tmp_path):
    folder = tmp_path / ("x" * 200)
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        with short_path(folder / SOCKET) as name:
            listener.bind(name)
        listener.listen()
        with short_path(folder / SOCKET) as name:
            caller.connect(name)


def test_the_address_is_that_of_the_way_to_the_jobs_host():
    assert own_address({}) == "127.0.0.1"
    assert own_address({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1"}) == "127.0.0.1"
    assert own_address({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}) == "127.0.0.1"


def test_a_slot_lies_in_the_second_folder_when_the_first_is_full(tmp_path):
    folders = [tmp_path / name / "arena" / "slots" for name in ("small", "large")]
    for folder in folders:
        folder.parent.parent.mkdir()
    arena = Arena(folders, free=lambda base: 10 if base.name == "small" else 1 << 30)
    (slot,) = arena.reserve([5000])
    assert slot.path.startswith(str(folders[1]))
    agent = Agent(folders[0].parent, arena, Io(), SystemClock())
    assert json.dumps(agent.for_ranks["status"](agent.open(lambda: True), {}, memoryview(b""))[0])
