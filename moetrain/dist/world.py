"""The processes of a run: who am I, on which device, and the few small things all ranks do together.

One process needs no process group and calls no collective; gloo on CPUs; nccl for device tensors (beside gloo for host tensors) on GPUs.
"""

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from moetrain.base.errors import TrainingError
from moetrain.base.log import logger
from moetrain.dist.board import Board, DictBoard, StoreBoard
from moetrain.dist.gloo import polite_loops
from moetrain.dist.heartbeat import Heartbeat
from moetrain.dist.meeting import OPERATION, meet_by_environment
from moetrain.dist.transport import Passed
from moetrain.dist.watch import Watch, Watchdog

T = TypeVar("T")
_NCCL_GRACE_SECONDS = 30.0  # nccl's own watchdog speaks after ours, which names the operation


class World:
    """A context manager: leaving it tears the process group down. Make one with `join`, `from_file` or `single`."""

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device, backend: str, timeout_seconds: float) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device = device
        self.backend = backend  # single | gloo | nccl
        self.played = backend  # whose calls are made: a rehearsal plays another world's
        self.watch = Watch(rank, timeout_seconds)
        self.group: dist.ProcessGroup | None = None  # of all ranks; None: the default group of torch
        self._store: Store | None = None
        self._num_notes = 0
        self._heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def timeout(self) -> timedelta:
        """Limit given to torch's process groups."""
        grace = _NCCL_GRACE_SECONDS if self.backend == "nccl" else 0.0
        return timedelta(seconds=self.watch.timeout_seconds + grace)

    @classmethod
    def single(cls, device: torch.device | None = None) -> "World":
        """One process, no group."""
        device = device or (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
        return cls(0, 1, 0, device, "single", float("inf"))

    @classmethod
    def join(cls, timeout_seconds: float = 120.0, heartbeat_seconds: float = 0.0) -> "World":
        """The world that torchrun's environment describes, or one process without it; GPUs when the machine has them.

        A rank that nobody has heard from for `heartbeat_seconds` (0: never) ends the job, as a frozen machine would not.
        Raises TrainingError when the other ranks do not come in time, or one of several machines has fewer GPUs than local ranks.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls.single()
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        device = local_device(local_rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
        return cls._start(rank, size, local_rank, device, timeout_seconds, None, heartbeat_seconds)

    @classmethod
    def from_file(cls, path: Path, rank: int, size: int, timeout_seconds: float = 120.0, heartbeat_seconds: float = 0.0) -> "World":
        """A gloo world on CPUs that meets in a file: no ports, no environment. `path` must be new for every world."""
        if size == 1:
            return cls.single(torch.device("cpu"))
        return cls._start(rank, size, rank, torch.device("cpu"), timeout_seconds, path, heartbeat_seconds)

    @classmethod
    def _start(
        cls, rank: int, size: int, local_rank: int, device: torch.device, timeout_seconds: float, file: Path | None,
        heartbeat_seconds: float,
    ) -> "World":  # fmt: skip
        backend = "nccl" if device.type == "cuda" else "gloo"
        world = cls(rank, size, local_rank, device, backend, timeout_seconds)
        if backend == "nccl":
            torch.cuda.set_device(device)
            world.watch.watchdog = Watchdog(rank, timeout_seconds)
            world.watch.watchdog.start()
        with world.watch.operation(OPERATION):
            kinds = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
            store = meet_by_environment(rank, size, world.timeout, world.watch) if file is None else FileStore(str(file), size)
            with polite_loops():
                dist.init_process_group(kinds, rank=rank, world_size=size, timeout=world.timeout, store=store)
        world._store = store
        if heartbeat_seconds:
            client = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
            world._heartbeat = Heartbeat(client, rank, size, heartbeat_seconds)
            world._heartbeat.start()
        return world

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close("" if error is None or isinstance(error, SystemExit) and not error.code else one_line(error))

    def close(self, error: str = "") -> None:
        """Leaves the process group; holds no collective, so a failing rank does not wait for the others. `error`: why, when it fails."""
        if self._heartbeat is not None:
            self._heartbeat.stop(error)
            self._heartbeat = None
        if self.watch.watchdog is not None:
            self.watch.watchdog.stop()
            self.watch.watchdog = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def board(self) -> Board:
        """A notice board of this start of all ranks, on a connection of its own."""
        if self._store is None:
            return DictBoard()
        return StoreBoard(self._store.clone())  # pyright: ignore[reportAttributeAccessIssue]

    def new_group(self, name: str, parts: Sequence[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """This rank's group of `parts`, which together are the world; None where the rank is alone in its part.

        Every rank makes the groups of every part, in the same order, with the world's time-out (torch would give them 30 minutes).
        """
        mine = next(number for number, part in enumerate(parts) if self.rank in part)
        if len(parts[mine]) == 1:
            return None
        with self.watch.operation(f"making the {name} groups"), polite_loops():
            group = [dist.new_group(list(part), timeout=self.timeout, group_desc=name) for part in parts][mine]
        assert isinstance(group, dist.ProcessGroup)
        return group

    def notes(self) -> Store:
        """An empty store in which ranks leave values for each other without a collective. Reading waits, with the world's time-out.

        For the main thread, and for more than one rank; the n-th call on every rank returns the same.
        """
        assert self._store is not None
        self._num_notes += 1
        return PrefixStore(f"notes/{self._num_notes}", self._store)

    def sum_(
        self, tensor: Tensor, group: dist.ProcessGroup | None = None, name: str = "sum over all ranks", limit: timedelta | None = None
    ) -> Tensor:
        """Adds `tensor` in place over the ranks of `group` (None: all) and returns it; a contiguous host or device tensor.

        limit: how long to wait for the others, instead of the world's time-out.
        """
        if self.size > 1:
            with self.watch.operation(name):
                if limit is None:
                    work = dist.all_reduce(tensor, group=group or self.group, async_op=True)
                else:
                    assert group is not None
                    options = dist.AllreduceOptions()
                    options.timeout = limit
                    work = group.allreduce([tensor], options)
                assert work is not None
                work.wait()
                if tensor.is_cuda and self.watch.watchdog:
                    self.watch.track(name, Passed(tensor.device))
        return tensor

    def barrier(self, name: str) -> None:
        """Waits on the host until every rank has come to the barrier of this name."""
        self.sum_(torch.zeros(1), name=f"barrier {name}")

    def agree(self, value: T, name: str = "agreeing on a value of rank 0") -> T:
        """Rank 0's value on every rank, through JSON: tuples come back as lists. Other ranks' argument is ignored."""
        text = json.dumps(value).encode() if self.is_main else b""
        length = self.sum_(torch.tensor([len(text)]), name=name)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        if self.size > 1:
            with self.watch.operation(name):
                dist.broadcast(buffer, src=0, group=self.group)
        return json.loads(buffer.numpy().tobytes())

    def gather(self, value: T, name: str = "gathering a value of every rank") -> list[T]:
        """Every rank's value on every rank, in order of rank, through JSON: tuples come back as lists. For small values."""
        text = json.dumps(value).encode()
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        buffer = torch.zeros(int(self.sum_(lengths, name=name).sum()), dtype=torch.uint8)
        slots = buffer.split(lengths.tolist())
        slots[self.rank].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.sum_(buffer, name=name)
        return [json.loads(slot.numpy().tobytes()) for slot in slots]


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for the others to read."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def local_device(local_rank: int, size: int, local_size: int) -> torch.device:
    """The rank's own GPU. CPUs for all ranks where there is none, or one machine has fewer GPUs than ranks.

    Raises TrainingError when one of several machines has too few: the others would train on theirs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count >= local_size:
        return torch.device("cuda", local_rank)
    if count and local_size < size:
        sentence = f"Local rank {local_rank} has no GPU: this machine shows {count} for {local_size} ranks."
        raise TrainingError(sentence, "Use a smaller --nproc-per-node, or CUDA_VISIBLE_DEVICES= to train on CPUs.")
    if count and local_rank == 0:
        sentence = "This machine shows fewer GPUs (%d) than ranks (%d): all ranks train on CPUs. On GPUs: moetrain train --nproc %d ..."
        logger("dist").warning(sentence, count, local_size, count)
    return torch.device("cpu")
