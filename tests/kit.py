"""Runs a function on several real processes: gloo over a file store, one torch thread each, results and tracebacks brought home."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import uuid4


def run_ranks(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, timeout: float = 100.0, limit: float = 30.0
) -> list[Any]:
    """`[fn(world, *args) on rank 0, on rank 1, ...]`. `fn` is a module-level function; results are pickled.

    `timeout` seconds for everything, `limit` seconds for one collective. A rank that fails shows its traceback in an AssertionError,
    and the other ranks are ended by process id.
    """
    folder = tmp_path / f"ranks-{uuid4().hex}"
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(fn, rank, world_size, folder, limit, args), name=f"rank {rank}", daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        _join(ranks, folder, time.monotonic() + timeout, timeout)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _join(ranks: Sequence[BaseProcess], folder: Path, deadline: float, timeout: float) -> None:
    waiting = {process.sentinel: process for process in ranks}
    while waiting:
        ended = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ended:
            names = ", ".join(process.name for process in waiting.values())
            raise AssertionError(f"{names} did not end within {timeout:g} s")
        for process in [waiting.pop(sentinel) for sentinel in ended if isinstance(sentinel, int)]:
            process.join()
            if process.exitcode != 0:
                raise AssertionError(_report(process, ranks, folder))


def _report(process: BaseProcess, ranks: Sequence[BaseProcess], folder: Path) -> str:
    lines = [f"{process.name} ended with exit code {process.exitcode}"]
    for rank, _ in enumerate(ranks):
        path = folder / f"traceback-{rank}"
        if path.exists():
            lines.append(f"--- rank {rank}\n{path.read_text()}")
    return "\n".join(lines)


def _rank(fn: Callable[..., Any], rank: int, size: int, folder: Path, limit: float, args: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    import torch

    from moetrain.dist.world import World

    torch.set_num_threads(1)
    try:
        with World.from_file(folder / "store", rank, size, limit) as world:
            world.barrier("start")  # a rank that ends early must not look like one that never came
            result = fn(world, *args)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"traceback-{rank}").write_text(traceback.format_exc())
        sys.exit(1)
