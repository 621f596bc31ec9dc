"""Ways to save the state of a rank, behind one interface, for tools/bench_checkpoint.py. Each in the best mode it offers on a CPU.

A save starts with `save`, `before_update` returns when the state may change, `drain` when everything is durable. Every checkpoint goes into
a folder of its own; `tidy` removes older ones, which nobody times (ours sweeps by itself, in the background).
"""

import os
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.checkpointer import Checkpointer, Pending
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import restore_together
from moetrain.dist.world import World
from moetrain.model.state import ModelState
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Live:
    """The state of one rank. `fragments`: as ours takes it; `whole`: the same memory as whole parameters by name, experts of this rank
    stacked; `share`: names in `whole` that this rank writes, where one file for each rank is written."""

    world: World
    fragments: ModelState
    whole: Tensors
    share: list[str]

    @property
    def mine(self) -> Tensors:
        return {name: self.whole[name] for name in self.share}


class Contender(Protocol):
    name: str
    folder: Path

    def save(self, step: int) -> None: ...

    def before_update(self) -> None: ...

    def drain(self) -> None: ...

    def load(self) -> list[str]:
        """Reads the newest checkpoint into the live state; the names in `whole` that it filled."""
        ...

    def files(self) -> list[Path]:
        """Of the newest checkpoint, those with this rank's values."""
        ...

    def tidy(self) -> None: ...

    def close(self) -> None: ...


class Nothing:
    """Training without checkpoints."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def save(self, step: int) -> None: ...

    def before_update(self) -> None: ...

    def drain(self) -> None: ...

    def load(self) -> list[str]:
        return []

    def files(self) -> list[Path]:
        return []

    def tidy(self) -> None: ...

    def close(self) -> None: ...


class Ours:
    """moetrain's Checkpointer as a run uses it."""

    def __init__(self, name: str, folder: Path, live: Live, mode: str) -> None:
        self.name, self.folder, self._live = name, folder, live
        config = CheckpointConfig(mode=mode, keep=2)
        world = live.world
        self._checkpointer = Checkpointer(
            folder, config, world.rank, world.size, world.agree, SystemClock(), gather=world.gather, board=world.board()
        )
        self._checkpointer.load(live.fragments, "auto")
        self._started = list[Pending]()

    def save(self, step: int) -> None:
        self._started.append(self._checkpointer.save(self._live.fragments, {"step": step}))

    def before_update(self) -> None:
        self._checkpointer.wait_copied()

    def drain(self) -> None:
        for pending in self._started[-2:]:
            pending.done.wait()

    @property
    def committed_seconds(self) -> float:
        """Of the last save, from the copy in memory to the commit (rank 0) or to this rank's durable part."""
        return self._checkpointer.status().committed_seconds

    def outcome(self) -> str:
        """How many saves were committed, and why others were not."""
        committed = sum(pending.committed for pending in self._started)
        reasons = sorted({pending.reason for pending in self._started if not pending.committed})
        return " ".join([f"{committed} of {len(self._started)} saves committed.", *reasons])

    def load(self) -> list[str]:
        """From the store, whatever is in memory."""
        world = self._live.world
        restore_together(self.folder, "must", self._live.fragments, world.rank, world.size, world.gather)
        return list(self._live.whole)

    def load_from_memory(self) -> None:
        """As a rank does that was killed while its node lived on."""
        self._checkpointer.load(self._live.fragments, "must")

    def point(self) -> Manifest:
        found = next(CheckpointFolder(self.folder, Io()).history())
        if not isinstance(found, Manifest):
            raise found
        return found

    def files(self) -> list[Path]:
        """What its newest save wrote."""
        point, mine = self.point(), f"/{self._live.world.rank:05d}-"
        names = [name for name in point.objects if name.startswith(f"{point.save}{mine}")]
        return [path for name in names for path in (self.folder / "objects" / name).iterdir()]

    def tidy(self) -> None: ...

    def close(self) -> None:
        self._checkpointer.finish()


class PerRank:
    """One file for each rank, written by `_write`, under a temporary name, synced, renamed."""

    def __init__(self, name: str, folder: Path, live: Live) -> None:
        self.name, self.folder, self._live = name, folder, live
        self._newest = folder

    def save(self, step: int) -> None:
        self._newest = self.folder / f"step-{step}"
        self._newest.mkdir(parents=True, exist_ok=True)
        part = self._file().with_suffix(".part")
        self._write(part)
        sync(part)
        part.rename(self._file())
        sync(self._newest)

    def before_update(self) -> None: ...

    def drain(self) -> None: ...

    def load(self) -> list[str]:
        for name, tensor in self._read(self._file()).items():
            self._live.whole[name].copy_(tensor)
        return self._live.share

    def files(self) -> list[Path]:
        return [self._file()]

    def tidy(self) -> None:
        remove_older(self.folder, self._newest, self._live.world.rank)

    def close(self) -> None: ...

    def _file(self) -> Path:
        return self._newest / f"rank{self._live.world.rank}.bin"

    def _write(self, path: Path) -> None:
        torch.save(self._live.mine, path)

    def _read(self, path: Path) -> Tensors:
        return torch.load(path, weights_only=True)


class Safetensors(PerRank):
    def _write(self, path: Path) -> None:
        save_file(self._live.mine, path)

    def _read(self, path: Path) -> Tensors:
        return load_file(path)


class DeepSpeed(PerRank):
    """DeepSpeed's checkpoint engine, which engine.save_checkpoint calls for every file; no sync is its own, ours is added."""

    def __init__(self, name: str, folder: Path, live: Live) -> None:
        super().__init__(name, folder, live)
        module = import_module("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine")
        self._engine = module.TorchCheckpointEngine()

    def _write(self, path: Path) -> None:
        self._engine.save(self._live.mine, str(path))

    def _read(self, path: Path) -> Tensors:
        return self._engine.load(str(path))


def dcp_writer(folder: Path) -> FileSystemWriter:
    return FileSystemWriter(folder, thread_count=2)


class Dcp:
    """torch.distributed.checkpoint, saving while training waits. It writes with two threads and plans once, which is its fastest here."""

    def __init__(self, name: str, folder: Path, live: Live) -> None:
        self.name, self.folder, self._live = name, folder, live
        self._newest = folder

    def save(self, step: int) -> None:
        self._newest = self.folder / f"step-{step}"
        planner = DefaultSavePlanner(enable_plan_caching=True)
        state_dict_saver.save(self._live.whole, storage_writer=dcp_writer(self._newest), planner=planner)

    def before_update(self) -> None: ...

    def drain(self) -> None: ...

    def load(self) -> list[str]:
        state_dict_loader.load(self._live.whole, storage_reader=FileSystemReader(self._newest))
        return list(self._live.whole)

    def files(self) -> list[Path]:
        return sorted(self._newest.glob(f"__{self._live.world.rank}_*.distcp"))

    def tidy(self) -> None:
        remove_older(self.folder, self._newest, self._live.world.rank)

    def close(self) -> None: ...


class DcpAsync(Dcp):
    """DCP's async_save: staged in a thread while training goes on, uploaded by a thread or a process. A save waits for the one before."""

    def __init__(self, name: str, folder: Path, live: Live, by_process: bool) -> None:
        super().__init__(name, folder, live)
        self._by_process = by_process
        self._stager = DefaultStager(
            StagingOptions(use_pinned_memory=False, use_shared_memory=by_process, use_async_staging=True, use_non_blocking_copy=False)
        )
        group = dist.new_group(backend="gloo")  # its collectives run beside those of training
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._response: AsyncSaveResponse | None = None

    def save(self, step: int) -> None:
        self.drain()
        self._newest = self.folder / f"step-{step}"
        response = state_dict_saver.async_save(
            self._live.whole,
            storage_writer=dcp_writer(self._newest),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            process_group=self._group,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS if self._by_process else AsyncCheckpointerType.THREAD,
            async_stager=self._stager,
        )
        assert not isinstance(response, Future)
        self._response = response

    def before_update(self) -> None:
        if self._response is not None:
            self._response.staging_completion.result()

    def drain(self) -> None:
        if self._response is not None:
            self._response.upload_completion.result()

    def close(self) -> None:
        self.drain()
        self._stager.close()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove_older(folder: Path, newest: Path, rank: int) -> None:
    """Rank 0 removes what is older; another rank may have begun a newer one."""
    if rank == 0 and folder.exists():  # a writer in the background makes it
        for old in folder.iterdir():
            if step_of(old) < step_of(newest):
                shutil.rmtree(old)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
