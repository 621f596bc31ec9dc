"""A trainer without torch that is killed on purpose; run as a program, so that a kill is a real one.

`hooks FOLDER`: one child for each hook point of a save and its sweep, killed there.  `trainers FOLDER`: children with real
agents, killed after ever longer times. Prints one JSON object.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, count, pairwise
from pathlib import Path
from random import Random

import numpy as np

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.choose import choose
from moetrain.checkpoint.config import AgentConfig
from moetrain.checkpoint.gate import Gate
from moetrain.checkpoint.job import Reply, SaveJob
from moetrain.checkpoint.modes import is_written
from moetrain.checkpoint.node_memory import Needs, NodeMemory
from moetrain.checkpoint.plan import ObjectPlan, Part, lay_out
from moetrain.checkpoint.process import AGENT, AgentDied, Launcher
from moetrain.checkpoint.writer import handle, with_checksums
from moetrain.store.encode import ArrayReader, Reads
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, Piece, SaveId, Tensor
from moetrain.store.objects import CheckpointFolder
from tests.unit.rotation import rotation

BANK = "blocks.0.moe.experts"
SIZE = 1500


def parts() -> list[Part]:
    names = [("embedding.weight", None, None), *(("w", BANK, expert) for expert in range(3))]
    made = []
    for name, bank, expert in names:
        for component in ("master", "m"):
            made.append(Part(Tensor(name, component, bank, expert, "float32", (SIZE,), (Piece((0,), (SIZE,), ""),)), (0,)))
    return made


def value_of(tensor: Tensor, version: int) -> np.ndarray:
    """The values of a tensor in the state of a version: no two are alike."""
    which = (0 if tensor.expert is None else 1 + tensor.expert) * 2 + (tensor.component == "m")
    return np.arange(SIZE, dtype=np.float32) + SIZE * (which + 8 * version)


def prepare(
    folder: Path, save: SaveId, version: int, arena: memoryview, io: Io | None = None, keep: int = 2, rank: int = 0, world: int = 1
) -> SaveJob:
    """The job of one rank that saves the state of `version`. Every rank holds all of it and writes the parts whose turn it is."""
    newest = next((point for point in CheckpointFolder(folder, io or Io()).history() if isinstance(point, Manifest)), None)
    selection = None if newest is None else rotation(version, {BANK: 3}, 1)
    all_parts = parts()
    written = [number for number, part in enumerate(all_parts) if is_written(part.tensor, "experts", selection)]
    mine = [number for number in written if number // 2 % world == rank]
    plans = lay_out([all_parts[number] for number in mine])
    for plan, view in zip(plans, views(plans, arena), strict=True):
        values = np.frombuffer(view, np.float32)
        for tensor in plan.tensors:
            values[tensor.pieces[0].start :][:SIZE] = value_of(tensor, version)
    held = [replace(part.tensor, pieces=()) for number, part in enumerate(all_parts) if number not in mine]
    parent = newest.save if newest else None
    limit = 30.0 if world == 1 else 0.3  # a rank that was killed is not waited for
    values = (version, version, "experts", selection, plans, held, {"step": version}, keep, limit)
    share = CheckpointFolder(folder, io or Io()).new_share(save, rank)
    job = SaveJob(str(folder), save, parent, rank, world, *values, share=share, ancestors=newest.way if newest else ())
    objects = [with_checksums(plan, share, view) for plan, view in zip(plans, views(plans, arena), strict=True)]
    return replace(job, objects=objects)


def views(plans: Sequence[ObjectPlan], arena: memoryview) -> list[memoryview]:
    """The memory of every object, one after the other."""
    ends = list(accumulate(4 * plan.size for plan in plans))
    return [arena[start:end] for start, end in pairwise([0, *ends])]


def save_here(folder: Path, version: int, io: Io) -> Reply:
    """One save of one job in this process: claim, write, commit, sweep."""
    save = CheckpointFolder(folder, io).claim(0.0)
    arena = memoryview(bytearray(1 << 16))
    job = prepare(folder, save, version, arena)
    return handle(job, views(job.objects, arena), io, SystemClock(), lambda: True, Gate())


def restored_step(folder: Path, io: Io | None = None) -> int:
    """The step that recovery comes to; every value is compared with what that recovery point says of its age."""
    io = io or Io()
    choice = choose(folder, io)
    assert choice is not None
    assert not choice.damage, choice.damage
    check_values(folder, choice.manifest, io)
    return choice.manifest.step


def check_values(folder: Path, manifest: Manifest, io: Io) -> None:
    """Every value is what a save of its object's step wrote."""
    for name, record in manifest.objects.items():
        tensors = [tensor for tensor in manifest.tensors.values() if tensor.pieces[0].object == name]
        check_object_values(folder / "objects" / name, tensors, record.step, io)
        assert all(tensor.expert is not None or record.step == manifest.step for tensor in tensors)


def check_object_values(path: Path, tensors: Sequence[Tensor], step: int, source: Reads) -> None:
    reader = ArrayReader(path, source)
    values = reader.read(0, reader.size)
    for tensor in tensors:
        assert np.array_equal(values[tensor.pieces[0].start :][:SIZE], value_of(tensor, step)), tensor.key


def leaks(folder: Path) -> list[str]:
    """What lies in the folder and no live manifest needs."""
    live = {name for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest) for name in point.objects}
    objects = {str(path.relative_to(folder / "objects")) for path in folder.glob("objects/*/*/*")} - live
    return sorted(objects) + sorted(str(path) for path in folder.rglob(".*"))


def killer(after: int) -> Io:
    """File operations, of which the one after `after` kills the process. Reads do not count: a kill there equals one at the next."""
    left = [after]

    def hook(operation: str, path: Path) -> None:
        left[0] -= operation not in ("read", "list")
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    io = Io(hook)
    io.direct_bytes = 1  # objects are small here; large ones are written like this
    return io


def forked(work: Callable[[], Reply]) -> int:
    """The process of a child that does one save; its exit status is 0 when that was committed or written."""
    child = os.fork()
    if child == 0:
        os._exit(0 if work().outcome in ("committed", "written") else 1)
    return child


def ended(child: int) -> int | None:
    """Waits for a child. Its exit status; None when it was killed."""
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def settled(trial: Path, version: int, world: int = 1) -> None:
    """The next two jobs save as if nothing had happened, and nothing is left behind."""
    for later in (version + 1, version + 2):  # a half-made claim is swept by the job after the one that takes its number
        if world == 1:
            assert save_here(trial, later, Io()).outcome == "committed"
        else:
            assert [ended(child) for child in save_by_ranks(trial, later, [Io()] * world)] == [0] * world
        assert restored_step(trial) == later
    assert leaks(trial) == [], leaks(trial)


def kill_at_every_hook(folder: Path, first: int = 3) -> dict:
    """`first`: the last version before the kills; what is inherited from where depends on it."""
    base = folder / "base"
    for version in range(1, first + 1):
        assert save_here(base, version, Io()).outcome == "committed"
    steps = []
    for number in count():
        trial = folder / f"trial-{number}"
        shutil.copytree(base, trial)
        status = ended(forked(lambda trial=trial, number=number: save_here(trial, first + 1, killer(number))))
        step = restored_step(trial)
        settled(trial, first + 1)
        shutil.rmtree(trial)
        if status is not None:
            shutil.rmtree(base)
            return {"steps": steps, "final": step, "exit": status}
        steps.append(step)
    raise AssertionError


def kill_at_random_times(folder: Path, runs: int, random: Random) -> list[int]:
    """What was restored, as the distance to the version before the kill: 0 or 1."""
    base = folder / "base"
    for version in (1, 2, 3):
        started = time.monotonic()
        assert save_here(base, version, Io()).outcome == "committed"
    longest, found = 2.0 * (time.monotonic() - started), []
    for run in range(runs):
        trial = folder / f"trial-{run}"
        shutil.copytree(base, trial)
        child = forked(lambda trial=trial: save_here(trial, 4, Io()))
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        ended(child)
        found.append(restored_step(trial) - 3)
        settled(trial, 4)
        shutil.rmtree(trial)
    shutil.rmtree(base)
    return found


def save_by_ranks(folder: Path, version: int, ios: Sequence[Io]) -> list[int]:
    """The processes of the ranks of one job that begins now and saves once."""
    save = CheckpointFolder(folder, Io()).claim(0.0)
    world = len(ios)

    def work(rank: int, io: Io) -> Reply:
        arena = memoryview(bytearray(1 << 16))
        job = prepare(folder, save, version, arena, rank=rank, world=world)
        return handle(job, views(job.objects, arena), io, SystemClock(), lambda: True, Gate())

    return [forked(lambda rank=rank, io=io: work(rank, io)) for rank, io in enumerate(ios)]


def kill_pairs(folder: Path, runs: int, random: Random) -> dict:
    """Two ranks; one of them or both are killed, at a numbered operation or at a random time."""
    base, found = folder / "base", {"last": 0, "new": 0, "one": 0, "both": 0}
    for version in (1, 2, 3):
        started = time.monotonic()
        assert [ended(child) for child in save_by_ranks(base, version, [Io(), Io()])] == [0, 0]
    longest = 1.5 * (time.monotonic() - started)
    for run in range(runs):
        trial = folder / f"trial-{run}"
        shutil.copytree(base, trial)
        victims = random.choice(([0], [1], [0, 1]))
        if run % 2:
            children = save_by_ranks(trial, 4, [killer(random.randrange(60)) if rank in victims else Io() for rank in (0, 1)])
        else:
            children = save_by_ranks(trial, 4, [Io(), Io()])
            time.sleep(random.uniform(0, longest))
            for rank in victims:
                os.kill(children[rank], signal.SIGKILL)
        for child in children:
            ended(child)
        found["last" if restored_step(trial) == 3 else "new"] += 1
        assert restored_step(trial) in (3, 4)
        found["both" if len(victims) > 1 else "one"] += 1
        settled(trial, 4, world=2)
        shutil.rmtree(trial)
    shutil.rmtree(base)
    return found


def agent_config(folder: Path) -> AgentConfig:
    return AgentConfig(folder=str(folder.with_name("memory")), linger_seconds=0.3)


def train(folder: Path) -> None:
    """Saves without end through a real agent, as a trainer would."""
    claimed = CheckpointFolder(folder, Io()).claim(0.0)
    newest = CheckpointFolder(folder, Io()).saves()
    version = newest[0].seq if newest else 0
    memory = NodeMemory(Launcher(folder, agent_config(folder)), 0, claimed.epoch, SystemClock())
    for seq in count(claimed.seq):
        version += 1
        save, arena = SaveId(claimed.epoch, seq), memoryview(bytearray(1 << 16))
        job = prepare(folder, save, seq, arena)
        with suppress(AgentDied):  # that costs this save; another agent serves the next one
            slots = memory.reserve(save, Needs(), [plan.size * 4 for plan in job.objects])
            for plan, view, slot in zip(job.objects, views(job.objects, arena), slots.values(), strict=True):
                slot[: plan.size * 4] = view
            memory.filled(job, list(slots))
            memory.persist(save, job.parent, {}, 30.0)


def agents_of(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if AGENT.encode() in command and str(folder.with_name("memory")).encode() in command:
                found.append(int(process.name))
    return found


def kill_trainers(folder: Path, runs: int) -> dict:
    steps, killed_with_agent = [], 0
    assert save_here(folder, 1, Io()).outcome == "committed"
    for run in range(runs):
        before = CheckpointFolder(folder, Io()).saves()
        child = os.fork()
        if child == 0:
            train(folder)
        deadline = time.monotonic() + 30
        # Half of them die while the agent starts, the others a little after their first commit.
        while not (agents_of(folder) if run % 2 else CheckpointFolder(folder, Io()).saves() != before) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.003 * run)
        killed_with_agent += bool(agents_of(folder))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps.append(restored_step(folder))
    deadline = time.monotonic() + 40
    while agents_of(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not agents_of(folder), "an agent outlived its trainers"
    assert save_here(folder, 10_000, Io()).outcome == "committed"
    left = [str(path) for path in folder.with_name("memory").glob("*")]
    return {"steps": steps, "killed_with_agent": killed_with_agent, "leaks": leaks(folder) + left}


def kill_agents(folder: Path, runs: int, random: Random) -> dict[str, int]:
    """A trainer and its agent, two processes that save without end: one or both are killed at a random time after a commit.

    Recovery comes to what was committed at the kill or, from an agent that survived, to what it was still writing.
    """
    found = {"trainer": 0, "agent": 0, "both": 0, "last": 0, "newer": 0}
    assert save_here(folder, 1, Io()).outcome == "committed"
    for _ in range(runs):
        child = os.fork()
        if child == 0:
            train(folder)
        _next_commit(folder)
        victim = random.choice(("trainer", "agent", "both"))
        time.sleep(random.uniform(0, 0.1))
        victims = ([child] if victim != "agent" else []) + (agents_of(folder) if victim != "trainer" else [])
        newest = CheckpointFolder(folder, Io()).saves()[0].seq
        for process in victims:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        step = restored_step(folder)
        assert step >= newest, f"{victim} killed: step {step} came back, {newest} was committed"
        if victim == "agent":  # the trainer goes on with another one
            _next_commit(folder)
            os.kill(child, signal.SIGKILL)
        ended(child)
        found[victim] += 1
        found["last" if step == newest else "newer"] += 1
    while agents_of(folder):
        time.sleep(0.01)
    return found


def _next_commit(folder: Path) -> None:
    before, deadline = CheckpointFolder(folder, Io()).saves(), time.monotonic() + 60
    while CheckpointFolder(folder, Io()).saves()[0] == before[0]:
        assert time.monotonic() < deadline, "no save was committed within a minute"
        time.sleep(0.002)


if __name__ == "__main__":
    mode, where = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(kill_at_every_hook(where) if mode == "hooks" else kill_trainers(where, int(sys.argv[3]))))
