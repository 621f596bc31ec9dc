"""Runs a function on several real processes: gloo over a file store, one torch thread each, results and tracebacks brought home.

The processes are forked from a server that has imported what training imports, and does nothing else: an import takes seconds, and there
would be one in each rank of each test.
"""

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

PRELOADED = ["moetrain.launch", "moetrain.build", "torch._dynamo"]  # the last: FSDP2 and recomputation import it


def run_ranks(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, timeout: float = 100.0, limit: float = 30.0
) -> list[Any]:
    """`[fn(world, *args) on rank 0, on rank 1, ...]`. `fn` is a module-level function; results are pickled.

    `timeout` seconds for everything, `limit` seconds for one collective. A rank that fails shows its traceback in an AssertionError,
    and the other ranks are ended by process id.
    """
    return run_processes(_in_a_world, world_size, tmp_path, fn, world_size, limit, args, timeout=timeout)


def run_processes(fn: Callable[..., Any], number: int, tmp_path: Path, *args: Any, timeout: float = 100.0) -> list[Any]:
    """`[fn(folder, 0, *args), fn(folder, 1, *args), ...]`, each in a process of its own; `folder` is new and theirs together."""
    folder = tmp_path / f"ranks-{uuid4().hex}"
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    work = folder, dict(os.environ), fn, args
    ranks = [context.Process(target=_process, args=(rank, *work), name=f"rank {rank}", daemon=True) for rank in range(number)]
    for process in ranks:
        process.start()
    try:
        _join(ranks, folder, time.monotonic() + timeout, timeout)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(number)]


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


def _process(rank: int, folder: Path, environment: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # the server's is that of the first test
    os.environ.update(environment)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    import torch

    torch.set_num_threads(1)
    try:
        result = fn(folder, rank, *args)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"traceback-{rank}").write_text(traceback.format_exc())
        sys.exit(1)


def _in_a_world(folder: Path, rank: int, fn: Callable[..., Any], size: int, limit: float, args: tuple[Any, ...]) -> Any:
    from moetrain.dist.world import World

    with World.from_file(folder / "store", rank, size, limit) as world:
        world.barrier("start")  # a rank that ends early must not look like one that never came
        return fn(world, *args)
