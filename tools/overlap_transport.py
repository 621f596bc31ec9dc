"""All-to-alls alone on the link: how even their times are, and how much of the line both directions together use.

The line: one stream in one direction, torch's send on one rank and receive on the other.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from moetrain.dist.transport import Collective, PointToPoint, Transport
from tools.overlap_arms import Arms

STREAM = 8 << 20
MESSAGES = (1 << 20, 2 << 20, STREAM)  # bytes to the other rank; the last as much as the stream, so that the link's burst counts alike
PAUSE_SECONDS = 0.06  # before every call: the link's burst is saved up again, so that all calls find as much of it
RESTED = "after a rest, 1 MiB"  # point to point; one direction has idled while the stream went the other way, and TCP starts slowly again
CONTENDERS: dict[str, Callable[[], Transport]] = {"point to point": PointToPoint, "stock": Collective}


def transport(arms: Arms, rounds: int) -> dict[str, object]:
    """Seconds of every call, by contender and message size, interleaved; and of the one-way stream."""
    axis, ways = arms.axis, {name: make() for name, make in CONTENDERS.items()}
    found: dict[str, list[float]] = {f"{name}, {size >> 20} MiB": [] for size in MESSAGES for name in ways} | {"one way": [], RESTED: []}
    for number in range(rounds + 1):
        for size in MESSAGES:
            for name, way in ways.items():
                found[f"{name}, {size >> 20} MiB"].append(exchange(arms, way, size))
        found["one way"].append(one_way(arms))
        found[RESTED].append(exchange(arms, ways["point to point"], MESSAGES[0]))
        if not number:  # connections are made in the first round
            found = {name: [] for name in found}
    return {"seconds": found, "stream_bytes": STREAM, "index": axis.index}


def exchange(arms: Arms, way: Transport, size: int) -> float:
    """Seconds of one all-to-all of `size` bytes to every rank. Raises RuntimeError when something else came than was sent."""
    axis, rows = arms.axis, size // 4096
    sent = rows_of(axis.index, axis.size * rows)
    received = torch.empty_like(sent)
    time.sleep(PAUSE_SECONDS)
    arms.barrier()
    started = time.perf_counter()
    way.launch("bench", sent, received, [rows] * axis.size, [rows] * axis.size, axis).wait()
    seconds = time.perf_counter() - started
    mine = slice(axis.index * rows, (axis.index + 1) * rows)
    if not torch.equal(received, torch.cat([rows_of(rank, axis.size * rows)[mine] for rank in range(axis.size)])):
        raise RuntimeError("what came is not what was sent")
    return seconds


def rows_of(rank: int, rows: int) -> torch.Tensor:
    """What a rank sends, random."""
    return torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rank))


def one_way(arms: Arms) -> float:
    """Seconds of STREAM bytes from the first rank to the second; the receiver's clock counts."""
    axis = arms.axis
    buffer = torch.rand(STREAM // 4)
    time.sleep(PAUSE_SECONDS)
    arms.barrier()
    started = time.perf_counter()
    if axis.index == 0:
        dist.send(buffer, axis.ranks[1], group=axis.group)
    elif axis.index == 1:
        dist.recv(buffer, axis.ranks[0], group=axis.group)
    return time.perf_counter() - started


def summary(found: list[dict]) -> dict[str, object]:
    """Of each contender and size: median milliseconds, how much longer the 95th percentile is, and the use of the line."""
    line = found[1]["stream_bytes"] / statistics.median(found[1]["seconds"]["one way"])  # bytes per second, one direction alone
    ways = {"one way": {"MB/s": line / 1e6}}
    for name in (name for name in found[0]["seconds"] if name != "one way"):
        times = np.max([rank["seconds"][name] for rank in found], axis=0)
        middle, late = np.percentile(times, [50, 95])
        rate = (int(name.split()[-2]) << 20) / middle
        ways[name] = {"ms": 1e3 * float(middle), "p95 / p50": float(late / middle), "of the line": float(rate / line)}
    return {"ways": ways}
