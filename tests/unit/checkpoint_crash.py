"""A trainer without torch that is killed on purpose; run as a program, so that a kill is a real one.

`hooks FOLDER`: one child for each hook point of a save and its sweep, killed there.  `trainers FOLDER`: children with real writer
processes, killed after ever longer times. Prints one JSON object.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.arena import Arena, usual_folders
from moetrain.checkpoint.choose import choose
from moetrain.checkpoint.job import Reply, SaveJob
from moetrain.checkpoint.modes import is_written
from moetrain.checkpoint.plan import Part, lay_out
from moetrain.checkpoint.process import WriterProcess
from moetrain.checkpoint.select import rotation
from moetrain.checkpoint.writer import handle
from moetrain.store.encode import ArrayReader
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, Piece, SaveId, Tensor
from moetrain.store.objects import CheckpointFolder

BANK = "blocks.0.moe.experts"
SIZE = 50


def parts() -> list[Part]:
    names = [("embedding.weight", None, None), *(("w", BANK, expert) for expert in range(3))]
    made = []
    for name, bank, expert in names:
        for component in ("master", "m"):
            made.append(Part(Tensor(name, component, bank, expert, "float32", (SIZE,), (Piece((0,), (SIZE,), ""),)), (0,)))
    return made


def prepare(folder: Path, save: SaveId, version: int, arena: memoryview) -> SaveJob:
    """The job of one process that saves the state of `version`: every value of every tensor is the version."""
    newest = next((point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest)), None)
    selection = None if newest is None else rotation(version, {BANK: 3}, 1)
    all_parts = parts()
    mine = [number for number, part in enumerate(all_parts) if is_written(part.tensor, "experts", selection)]
    plans, _ = lay_out([all_parts[number] for number in mine])
    for plan in plans:
        np.frombuffer(arena, np.float32, plan.size, plan.offset)[:] = version
    held = [replace(part.tensor, pieces=()) for number, part in enumerate(all_parts) if number not in mine]
    parent = newest.save if newest else None
    return SaveJob(str(folder), save, parent, 0, 1, version, version, "experts", selection, plans, held, {"step": version}, 2, 30.0)


def save_here(folder: Path, version: int, io: Io) -> Reply:
    """One save of one job in this process: claim, write, commit, sweep."""
    save = CheckpointFolder(folder, io).claim(0.0)
    arena = memoryview(bytearray(1 << 16))
    return handle(prepare(folder, save, version, arena), arena, io, SystemClock(), lambda: True)


def restored_step(folder: Path) -> int:
    """The step that recovery comes to; every value is compared with what that recovery point says of its age."""
    choice = choose(folder, Io())
    assert choice is not None
    assert not choice.damage, choice.damage
    for tensor in choice.manifest.tensors.values():
        (piece,) = tensor.pieces
        values = ArrayReader(folder / "objects" / piece.object, Io()).read(piece.start, SIZE)
        assert (values == choice.manifest.objects[piece.object].step).all(), tensor.key
        assert tensor.expert is not None or values[0] == choice.manifest.step
    return choice.manifest.step


def leaks(folder: Path) -> list[str]:
    """What lies in the folder and no live manifest needs."""
    live = {name for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest) for name in point.objects}
    objects = {str(path.relative_to(folder / "objects")) for path in folder.glob("objects/*/*/*")} - live
    return sorted(objects) + sorted(str(path) for path in folder.rglob(".*"))


def kill_at_every_hook(folder: Path) -> dict:
    base = folder / "base"
    for version in (1, 2, 3):
        assert save_here(base, version, Io()).outcome == "committed"
    steps = []
    for number in count():
        trial = folder / f"trial-{number}"
        shutil.copytree(base, trial)
        left = [number]

        def hook(operation: str, path: Path, left: list[int] = left) -> None:
            left[0] -= operation not in ("read", "list")  # these change nothing: a kill there equals one at the next operation
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            os._exit(0 if save_here(trial, 4, Io(hook)).outcome == "committed" else 1)
        _, status = os.waitpid(child, 0)
        step = restored_step(trial)
        for version in (5, 6):  # a half-made claim is swept by the job after the one that takes its number
            assert save_here(trial, version, Io()).outcome == "committed"
            assert restored_step(trial) == version
        assert leaks(trial) == [], leaks(trial)
        shutil.rmtree(trial)
        if os.WIFEXITED(status):
            return {"steps": steps, "final": step, "exit": os.WEXITSTATUS(status)}
        steps.append(step)
    raise AssertionError


def train(folder: Path) -> None:
    """Saves without end through a real writer process, as a trainer would."""
    claimed = CheckpointFolder(folder, Io()).claim(0.0)
    newest = CheckpointFolder(folder, Io()).saves()
    version = newest[0].seq if newest else 0
    arena, writer = Arena(1 << 16, usual_folders()), WriterProcess()
    for seq in count(claimed.seq):
        version += 1
        writer.run(prepare(folder, SaveId(claimed.epoch, seq), seq, memoryview(arena.memory)), arena.descriptor, 30.0)


def writers_of(trainer: int) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"moetrain.checkpoint.writer" in command and str(trainer).encode() in command:
                found.append(int(process.name))
    return found


def kill_trainers(folder: Path, runs: int) -> dict:
    steps, killed_with_writer = [], 0
    assert save_here(folder, 1, Io()).outcome == "committed"
    for run in range(runs):
        before = CheckpointFolder(folder, Io()).saves()
        child = os.fork()
        if child == 0:
            train(folder)
        deadline = time.monotonic() + 30
        # Half of them die while the writer starts, the others a little after their first commit.
        while not (writers_of(child) if run % 2 else CheckpointFolder(folder, Io()).saves() != before) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.003 * run)
        killed_with_writer += bool(writers_of(child))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps.append(restored_step(folder))
        while writers_of(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not writers_of(child), "a writer process outlived its trainer"
    assert save_here(folder, 10_000, Io()).outcome == "committed"
    return {"steps": steps, "killed_with_writer": killed_with_writer, "leaks": leaks(folder)}


if __name__ == "__main__":
    mode, where = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(kill_at_every_hook(where) if mode == "hooks" else kill_trainers(where, int(sys.argv[3]))))
