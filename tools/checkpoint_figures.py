"""What the figures of tools/bench_checkpoint.py say: the table of contenders, and ours against plain reads and writes and against peers.

`found`: what every rank found, as the ranks write it down.
"""

import statistics
from collections.abc import Iterator

import numpy as np

SEED = 0
BASE, AGAIN = "no checkpoints", "no checkpoints, again"
OURS, PROCESS = "ours, full", "DCP async, process"
PERSIST, FROM_MEMORY, LIST, VERIFY = (f"{OURS}: {part}" for part in ("arena to commit", "from memory", "list", "read and verify"))
RAW_WRITE, RAW_READ, ZARR, DCP = "raw write+fsync", "raw read", "zarr-python", "DCP sync"
RAW_DIRECT = "floor: raw write past the page cache"
ALL_READ, ALL_COPIED = "floor: raw read of all that is loaded", "floor: copy of all that is loaded"


def summary(found: list[dict]) -> dict[str, dict]:
    """One row a contender. Shares are of the median iteration without checkpoints in the same round."""
    rows = {}
    base = [statistics.median(block) for block in found[0]["iterations"][BASE]["whole"]]
    for name, blocks in found[0]["iterations"].items():
        slower = with_interval([statistics.median(block) / plain for block, plain in zip(blocks["whole"], base, strict=True)])
        shares = [stall / plain for rank in found for stall, plain in stalls_of(rank["iterations"][name], base)]
        rows[name] = {
            "stall_p50": float(np.percentile(shares, 50)),
            "stall_p99": float(np.percentile(shares, 99)),
            "stall_max": max(shares),
            "slow_down": slower["median"] - 1,
            "slow_down_interval": [slower["low"] - 1, slower["high"] - 1],
            "bytes_per_rank": max(rank["bytes"].get(name, 0) for rank in found),
            "memory": found[0]["memory"][name],
        }
    return rows


def stalls_of(blocks: dict[str, list[list[float]]], base: list[float]) -> Iterator[tuple[float, float]]:
    """What every iteration stalled, and the median iteration without checkpoints of its round."""
    for starting, waiting, plain in zip(blocks["starting"], blocks["waiting"], base, strict=True):
        for start, wait in zip(starting, waiting, strict=True):
            yield start + wait, plain


def paired(ranks: list[dict[str, list[float]]], name: str, other: str) -> dict[str, float]:
    """Median and 95 % interval of seconds(`other`) / seconds(`name`), the slower rank of each, round by round."""
    one, two = ([max(times) for times in zip(*(rank[key] for rank in ranks), strict=True)] for key in (name, other))
    return with_interval([b / a for a, b in zip(one, two, strict=True)])


def with_interval(values: list[float]) -> dict[str, float]:
    """The median and its 95 % interval, by resampling."""
    generator = np.random.default_rng(SEED)
    medians = np.median(generator.choice(values, (2000, len(values))), axis=1)
    return {"median": statistics.median(values), "low": float(np.percentile(medians, 2.5)), "high": float(np.percentile(medians, 97.5))}


def rates(found: list[dict]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is: writing against raw and zarr-python, reading and recovery against raw read and DCP's load."""
    writes = [rank["writes"] for rank in found]
    result = {
        "write, arena to commit, against raw": paired(writes, PERSIST, RAW_WRITE),
        "write, arena to commit, against raw past the page cache": paired(writes, PERSIST, RAW_DIRECT),
        "write, call to commit, against raw": paired(writes, OURS, RAW_WRITE),
        "write, arena to commit, against zarr-python": paired(writes, PERSIST, ZARR),
        "raw write+fsync, against zarr-python": paired(writes, RAW_WRITE, ZARR),
    }
    for state in ("cold", "warm"):
        reads = [rank["reads"][state] for rank in found]
        result[f"read and verify, {state}, against raw read"] = paired(reads, VERIFY, RAW_READ)
        for title, name in (
            ("whole recovery", OURS),
            ("whole recovery from memory", FROM_MEMORY),
            (ALL_READ, ALL_READ),
            (ALL_COPIED, ALL_COPIED),
        ):
            result[f"{title}, {state}, against DCP full load"] = paired(reads, name, DCP)
    return result


def lines(found: list[dict]) -> Iterator[str]:
    """The table, of the parts that were measured."""
    state = [rank["state_bytes"] / 1e6 for rank in found]
    yield f"state {min(state):.0f} to {max(state):.0f} MB a rank"
    if "iterations" in found[0]:
        yield from training_lines(found)
    if "writes" in found[0]:
        yield from rate_lines(found, statistics.mean(state) / 1e3)
    for name, outcome in found[0]["outcomes"].items():
        yield f"{name}: {outcome}"


def training_lines(found: list[dict]) -> Iterator[str]:
    plain = statistics.median(second for block in found[0]["iterations"][BASE]["whole"] for second in block)
    yield f"iteration {plain:.3f} s, a save in every iteration"
    yield f"{'':26} {'stall p50':>9} {'p99':>8} {'max':>8} {'slow-down':>9} {'95 %':>15} {'MB/rank':>8} {'memory':>9}"
    for name, row in summary(found).items():
        low, high = row["slow_down_interval"]
        stall = f"{row['stall_p50']:9.2%} {row['stall_p99']:8.2%} {row['stall_max']:8.2%}"
        slow_down = f"{row['slow_down']:9.1%} {low:7.1%}..{high:6.1%}"
        yield f"{name:26} {stall} {slow_down} {row['bytes_per_rank'] / 1e6:8.1f} {row['memory'] / 1e6:6.0f} MB"
    if "DeepSpeed engine" not in found[0]["iterations"]:
        yield "DeepSpeed is not installed: it is left out."


def rate_lines(found: list[dict], size: float) -> Iterator[str]:
    """`size`: of the state of a rank, GB."""
    for title, groups in (("write", {"": found[0]["writes"]}), ("read", found[0]["reads"])):
        for state_of, group in groups.items():
            for name in group:
                seconds = statistics.median(group[name])
                yield f"{title:5} {state_of:5} {name:40} {seconds:8.3f} s" + ("" if name == LIST else f" {size / seconds:7.2f} GB/s")
    for name, ratio in rates(found).items():
        yield f"{name:72} {ratio['median']:6.2f}   ({ratio['low']:.2f} to {ratio['high']:.2f})"
