"""What saving costs a training job, ours beside its peers: one state, one interval (every iteration), one run of two ranks.

    python -m tools.bench_checkpoint --json benchmarks/checkpoint.json        (--small: a minute, at a size that says nothing)

Before anything is timed, every contender saves, the state is overwritten, and what it loads must be equal to what was saved.
Stall: time in the calls that start a save and wait for it, of every iteration. Slow-down: the whole iteration over one without checkpoints
(copying, checksums and writers take their share of two cores); training without checkpoints stands there twice, as A/A.
Rates: no training; from the call until everything is durable, beside a plain write+fsync and a plain read of as many bytes.
DeepSpeed is left out when it is not installed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import secrets
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.codecs import Crc32cCodec

from moetrain.checkpoint.choose import check, check_object, choose, glance
from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.routing.config import RoutingConfig
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tools.bench_step import Case, random_batch
from tools.contenders import Contender, Dcp, DcpAsync, DeepSpeed, Live, Nothing, Ours, PerRank, Safetensors, sync

SEED = 0
WORLD = 2
BASE, AGAIN = "no checkpoints", "no checkpoints, again"
OURS, PROCESS = "ours, full", "DCP async, process"


@dataclass(frozen=True)
class Size:
    """How large and how long. `rounds` times every contender trains `iterations` in a row, after one that is not counted."""

    hidden: int = 384
    layers: int = 4
    experts: int = 8
    vocabulary: int = 8192
    sequences: int = 4  # of a rank and iteration
    seq_len: int = 256
    rounds: int = 4
    iterations: int = 8
    pairs: int = 15  # of rates


SMALL = Size(hidden=16, layers=2, experts=4, vocabulary=61, sequences=1, seq_len=16, rounds=1, iterations=2, pairs=2)


def model_of(size: Size) -> ModelConfig:
    heads = max(2, size.hidden // 64)
    return ModelConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_layers=size.layers, pattern=["moe"], ffn_size=size.hidden,
        expert_ffn_size=size.hidden * 11 // 4, max_position=size.seq_len,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=size.hidden // heads),
        routing=RoutingConfig(num_experts=size.experts, top_k=2),
    )  # fmt: skip


class Trainer:
    """One rank's engine: real steps on random tokens."""

    def __init__(self, world: World, size: Size) -> None:
        model = model_of(size)
        self.engine = TorchEngine(model, ParallelConfig(ep=world.size), EngineConfig(), OptimConfig(), world, Mesh(world, world.size))
        self.engine.initialize(SEED)
        self._batches = [random_batch(model, Case(size.sequences, size.seq_len, 1), world.rank)]
        self.live = live_state(self.engine, world)

    def step(self, before_update: Callable[[], None]) -> None:
        self.engine.step(self._batches, 1e-4, before_update)


def live_state(engine: TorchEngine, world: World) -> Live:
    """Dense parameters are on all ranks: where every rank writes a file, each goes to the one that has least so far."""
    whole: dict[str, torch.Tensor] = {}
    dense: dict[str, int] = {}
    mine: list[str] = []
    for name, parameter in engine.model.named_parameters():
        m, v, step = engine.optimizer.moments(name)
        is_expert = ".experts." in name
        key = f"rank{world.rank}.{name}" if is_expert else name
        whole |= {key: parameter.detach(), f"{key}.exp_avg": m, f"{key}.exp_avg_sq": v, f"{key}.step": step}
        if is_expert:
            mine += [key, f"{key}.exp_avg", f"{key}.exp_avg_sq", f"{key}.step"]
        else:
            dense[key] = parameter.numel()
    loads = [0] * world.size
    for key in sorted(dense, key=lambda key: -dense[key]):
        owner = loads.index(min(loads))
        loads[owner] += dense[key]
        if owner == world.rank:
            mine += [key, f"{key}.exp_avg", f"{key}.exp_avg_sq", f"{key}.step"]
    return Live(world, engine.state(), whole, mine)


def makers(folder: Path, live: Live) -> dict[str, Callable[[], Contender]]:
    """By name, in the order of the table. Every rank makes the same ones in the same order."""
    makers: dict[str, Callable[[], Contender]] = {
        BASE: lambda: Nothing(BASE, folder),
        OURS: lambda: Ours(OURS, folder / "ours-full", live, "full"),
        "ours, experts": lambda: Ours("ours, experts", folder / "ours-experts", live, "experts"),
        "torch.save": lambda: PerRank("torch.save", folder / "torch", live),
        "safetensors": lambda: Safetensors("safetensors", folder / "safetensors", live),
        "DCP sync": lambda: Dcp("DCP sync", folder / "dcp", live),
        "DCP async, thread": lambda: DcpAsync("DCP async, thread", folder / "dcp-thread", live, False),
        PROCESS: lambda: DcpAsync(PROCESS, folder / "dcp-process", live, True),
        AGAIN: lambda: Nothing(AGAIN, folder),
    }
    if find_spec("deepspeed"):
        makers["DeepSpeed engine"] = lambda: DeepSpeed("DeepSpeed engine", folder / "deepspeed", live)
    return makers


# correctness


def check_round_trip(contender: Contender, live: Live) -> None:
    """Saves, overwrites the live state, loads. Raises RuntimeError when a value is not the one that was saved."""
    if isinstance(contender, Nothing):
        return
    saved = {name: tensor.clone() for name, tensor in live.whole.items()}
    contender.save(1)
    contender.before_update()
    contender.drain()
    live.world.barrier("all have saved")
    for tensor in live.whole.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    names = contender.load()
    wrong = [name for name in names if not torch.equal(live.whole[name], saved[name])]
    if wrong or not set(live.share) <= set(names):
        raise RuntimeError(f"{contender.name} did not bring back {wrong or 'everything'}")
    for name, tensor in live.whole.items():
        tensor.copy_(saved[name])
    live.world.barrier("all are back")


# stall and slow-down


@dataclass
class Iterations:
    """Seconds of every counted iteration of one contender; what of them the calls took that start a save, and those that wait for one.
    One list a round."""

    whole: list[list[float]]
    starting: list[list[float]]
    waiting: list[list[float]]


def train_block(trainer: Trainer, contender: Contender, iterations: int, first_step: int) -> tuple[list[float], list[float], list[float]]:
    """`iterations` in a row with a save at the start of each; one more before them fills the pipe and is not counted."""
    whole, starting, waiting = list[float](), list[float](), list[float]()

    def before_update() -> None:
        started = time.perf_counter()
        contender.before_update()
        waiting.append(time.perf_counter() - started)

    for number in range(iterations + 1):
        started = time.perf_counter()
        contender.save(first_step + number)
        starting.append(time.perf_counter() - started)
        trainer.step(before_update)
        whole.append(time.perf_counter() - started)
        contender.tidy()
        trainer.live.world.barrier("all have tidied up")  # rank 0 does it for peers: no other rank's next save must wait for that
    contender.drain()
    trainer.live.world.barrier("the block is over")
    return whole[1:], starting[1:], waiting[1:]


def stalls(trainer: Trainer, contenders: list[Contender], size: Size) -> dict[str, Iterations]:
    """Interleaved: every round all contenders, each time beginning with the next one."""
    found = {contender.name: Iterations([], [], []) for contender in contenders}
    step = 100
    for round in range(size.rounds):
        for contender in contenders[round % len(contenders) :] + contenders[: round % len(contenders)]:
            whole, starting, waiting = train_block(trainer, contender, size.iterations, step)
            found[contender.name].whole.append(whole)
            found[contender.name].starting.append(starting)
            found[contender.name].waiting.append(waiting)
            step += size.iterations + 1
    return found


# rates


def write_rates(trainer: Trainer, contenders: list[Contender], size: Size, folder: Path) -> dict[str, list[float]]:
    """Seconds of a save from the call until it is durable, all ranks at once, once a round; raw write+fsync and zarr-python beside it."""
    live = trainer.live
    payload = torch.cat([tensor.flatten().view(torch.uint8) for tensor in live.mine.values() if tensor.numel()]).numpy()
    writers: dict[str, Callable[[int], None]] = {contender.name: partial(save_whole, contender) for contender in contenders}
    writers["raw write+fsync"] = lambda step: write_raw(folder / f"copy-{live.world.rank}" / "raw", payload)
    writers["zarr-python"] = lambda step: write_zarr(folder / f"copy-{live.world.rank}" / "zarr", payload)
    found: dict[str, list[float]] = {name: [] for name in writers}
    persisted: list[float] = []
    for number in range(size.pairs):
        for name, write in writers.items():
            remove_copies(folder, live.world.rank)  # what an earlier one wrote is not a part of the next write
            live.world.barrier(f"before {name}")
            started = time.perf_counter()
            write(10_000 + number)
            found[name].append(time.perf_counter() - started)
        persisted += [contender.committed_seconds for contender in contenders if contender.name == OURS and isinstance(contender, Ours)]
        for contender in contenders:
            contender.tidy()
    return found | {f"{OURS}: arena to commit": persisted}


def save_whole(contender: Contender, step: int) -> None:
    contender.save(step)
    contender.before_update()
    contender.drain()


def remove_copies(folder: Path, rank: int) -> None:
    copies = folder / f"copy-{rank}"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()


def write_raw(path: Path, payload: np.ndarray) -> None:
    """`path` does not exist: removing a file of this size takes a quarter as long as writing it."""
    with path.open("xb", buffering=0) as file:
        view, written = payload.data, 0
        while written < len(view):
            written += file.write(view[written:])
        os.fsync(file.fileno())


def write_zarr(folder: Path, payload: np.ndarray) -> None:
    """zarr-python with the codecs of our objects: inner chunks of 4 MiB with crc32c; then what it leaves out, the syncs."""
    values = payload[: payload.size // 4 * 4].view(np.float32)
    chunk = min(1 << 20, values.size)
    shard = -(-values.size // chunk) * chunk
    array = zarr.create_array(
        store=str(folder), shape=values.shape, dtype="float32", chunks=(chunk,), shards=(shard,), compressors=Crc32cCodec(),
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = values
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


# recovery


def forget(paths: list[Path]) -> None:
    """Asks the system to drop clean pages of these files, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(paths: list[Path]) -> None:
    buffer = bytearray(16 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def recoveries(trainer: Trainer, contenders: list[Contender], size: Size, cold: bool) -> dict[str, list[float]]:
    """Seconds of a whole load of every contender, all ranks at once; of ours also the parts, and a plain read of what it reads."""
    live = trainer.live
    ours = next(contender for contender in contenders if isinstance(contender, Ours))
    folder, point = CheckpointFolder(ours.folder, Io()), ours.point()
    mine = {name for name in point.objects if f"/{live.world.rank:05d}-" in name}
    share = replace(
        point,
        objects={name: record for name, record in point.objects.items() if name in mine},
        tensors={key: tensor for key, tensor in point.tensors.items() if {piece.object for piece in tensor.pieces} <= mine},
    )
    files = [ours.folder / "objects" / name / "c.0" for name in sorted(mine)]
    files = [path for path in files if path.exists()]
    readers: dict[str, Callable[[], object]] = {contender.name: contender.load for contender in contenders}
    readers[f"{OURS}: from memory"] = ours.load_from_memory
    readers[f"{OURS}: list"] = lambda: choose(ours.folder, Io(), glance)
    readers[f"{OURS}: read and verify"] = lambda: check(folder, share, check_object)
    readers["raw read"] = lambda: read_raw(files)
    found: dict[str, list[float]] = {name: [] for name in readers}
    everything = [path for contender in contenders if contender.folder.exists() for path in contender.folder.rglob("*") if path.is_file()]
    for number in range(max(1, size.pairs // 2) + 1):
        for name, read in readers.items():
            if cold and live.world.is_main:
                forget(everything)
            live.world.barrier(f"before {name}")
            started = time.perf_counter()
            read()
            if number:  # the first one warms up
                found[name].append(time.perf_counter() - started)
    return found


# memory


def memory_of(trainer: Trainer, make: Callable[[], Contender], size: Size) -> int:
    """Bytes by which the memory available on the machine falls, at most, while a contender is made and saves twice: shared memory and
    helper processes included, page cache not."""
    world = trainer.live.world
    world.barrier("memory")
    start, lowest, over = available_bytes(), [available_bytes()], threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            lowest[0] = min(lowest[0], available_bytes())

    sampler = threading.Thread(target=sample)
    if world.is_main:
        sampler.start()
    contender = make()
    train_block(trainer, contender, 1, 50)
    over.set()
    if world.is_main:
        sampler.join()
    contender.close()
    return start - lowest[0]


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


# one rank, all ranks


def run_rank(rank: int, meeting: Path, folder: Path, size: Size) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_num_threads(1)
    with World.from_file(meeting, rank, WORLD, 300.0) as world:
        trainer = Trainer(world, size)
        for _ in range(2):
            trainer.step(lambda: None)
        make = makers(folder / "a", trainer.live)
        contenders = [maker() for maker in make.values()]
        for contender in contenders:
            check_round_trip(contender, trainer.live)
        iterations = stalls(trainer, contenders, size)
        files = {contender.name: sum(path.stat().st_size for path in contender.files()) for contender in contenders}
        timed = [contender for contender in contenders if not isinstance(contender, DcpAsync | Nothing)]
        writes = write_rates(trainer, timed, size, folder)
        reads = {"cold": recoveries(trainer, timed, size, True), "warm": recoveries(trainer, timed, size, False)}
        outcomes = {contender.name: contender.outcome() for contender in contenders if isinstance(contender, Ours)}
        for contender in contenders:
            contender.close()
        again = makers(folder / "memory", trainer.live)
        memory = {name: memory_of(trainer, maker, size) for name, maker in again.items()}
        found = {
            "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in trainer.live.mine.values()),
            "iterations": {name: asdict(one) for name, one in iterations.items()},
            "bytes": files, "writes": writes, "reads": reads, "outcomes": outcomes, "memory": memory,
        }  # fmt: skip
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
        world.barrier("the end")


def run_ranks(folder: Path, size: Size) -> list[dict]:
    """What every rank found. Raises RuntimeError when one of them failed."""
    context = multiprocessing.get_context("spawn")
    meeting = folder / f"meeting-{secrets.token_hex(4)}"
    ranks = [context.Process(target=run_rank, args=(rank, meeting, folder, size)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    waiting = {process.sentinel: process for process in ranks}
    while waiting:
        ended = [waiting.pop(sentinel) for sentinel in connection.wait(list(waiting)) if isinstance(sentinel, int)]
        for process in ended:
            process.join()
        if any(process.exitcode for process in ended):
            for process in waiting.values():
                process.kill()  # it would wait for the one that failed
            raise RuntimeError("a rank failed; the first error above says why")
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(WORLD)]


# figures


def summary(found: list[dict]) -> dict[str, dict[str, float]]:
    """One row a contender. Shares are of the median iteration without checkpoints in the same round."""
    rows = {}
    base = [statistics.median(block) for block in found[0]["iterations"][BASE]["whole"]]
    for name, blocks in found[0]["iterations"].items():
        ratios = [statistics.median(block) / plain for block, plain in zip(blocks["whole"], base, strict=True)]
        shares = [stall / plain for rank in found for stall, plain in stalls_of(rank["iterations"][name], base)]
        rows[name] = {
            "stall_p50": float(np.percentile(shares, 50)),
            "stall_p99": float(np.percentile(shares, 99)),
            "stall_max": max(shares),
            "slow_down": statistics.median(ratios) - 1,
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
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    generator = np.random.default_rng(SEED)
    medians = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    return {"median": statistics.median(ratios), "low": float(np.percentile(medians, 2.5)), "high": float(np.percentile(medians, 97.5))}


def rates(found: list[dict]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is: writing against raw and zarr-python, reading and recovery against raw read and DCP's load."""
    writes, persist = [rank["writes"] for rank in found], f"{OURS}: arena to commit"
    result = {
        "write, arena to commit, against raw": paired(writes, persist, "raw write+fsync"),
        "write, call to commit, against raw": paired(writes, OURS, "raw write+fsync"),
        "write, arena to commit, against zarr-python": paired(writes, persist, "zarr-python"),
    }
    for state in ("cold", "warm"):
        reads = [rank["reads"][state] for rank in found]
        result[f"read and verify, {state}, against raw read"] = paired(reads, f"{OURS}: read and verify", "raw read")
        result[f"whole recovery, {state}, against DCP full load"] = paired(reads, OURS, "DCP sync")
        result[f"whole recovery from memory, {state}, against DCP full load"] = paired(reads, f"{OURS}: from memory", "DCP sync")
    return result


def lines(found: list[dict]) -> Iterator[str]:
    state = [rank["state_bytes"] / 1e6 for rank in found]
    plain = statistics.median(second for block in found[0]["iterations"][BASE]["whole"] for second in block)
    yield f"state {min(state):.0f} to {max(state):.0f} MB a rank, iteration {plain:.3f} s, a save in every iteration"
    yield f"{'':26} {'stall p50':>9} {'p99':>8} {'max':>8} {'slow-down':>9} {'MB/rank':>8} {'memory':>9}"
    for name, row in summary(found).items():
        yield (
            f"{name:26} {row['stall_p50']:9.2%} {row['stall_p99']:8.2%} {row['stall_max']:8.2%} {row['slow_down']:9.1%}"
            f" {row['bytes_per_rank'] / 1e6:8.1f} {row['memory'] / 1e6:6.0f} MB"
        )
    if "DeepSpeed engine" not in found[0]["iterations"]:
        yield "DeepSpeed is not installed: it is left out."
    size = statistics.mean(state) / 1e3
    for title, groups in (("write", {"": found[0]["writes"]}), ("read", found[0]["reads"])):
        for state_of, group in groups.items():
            for name in group:
                seconds = statistics.median(group[name])
                yield f"{title:5} {state_of:5} {name:30} {seconds:8.3f} s" + ("" if "list" in name else f" {size / seconds:7.2f} GB/s")
    for name, ratio in rates(found).items():
        yield f"{name:58} {ratio['median']:6.2f}   ({ratio['low']:.2f} to {ratio['high']:.2f})"
    for name, outcome in found[0]["outcomes"].items():
        yield f"{name}: {outcome}"


def versions() -> dict[str, str]:
    names = ["torch", "numpy", "zarr", "safetensors", *(["deepspeed"] if find_spec("deepspeed") else [])]
    return {"python": platform.python_version(), "cores": str(os.cpu_count())} | {name: version(name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a size for a test")
    parser.add_argument("--rounds", type=int, help=f"default {Size.rounds}")
    parser.add_argument("--iterations", type=int, help=f"default {Size.iterations}")
    parser.add_argument("--pairs", type=int, help=f"default {Size.pairs}")
    parser.add_argument("--folder", type=Path, help="a disk to write to (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = SMALL if options.small else Size()
    given = {name: value for name in ("rounds", "iterations", "pairs") if (value := vars(options)[name]) is not None}
    size = replace(size, **given)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = run_ranks(Path(folder), size)
    print("\n".join(lines(found)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": ["python", "-m", "tools.bench_checkpoint", *sys.argv[1:]], "versions": versions(), "seed": SEED,
            "size": asdict(size), "load_average": os.getloadavg(), "contenders": summary(found), "ratios": rates(found), "ranks": found,
        }  # fmt: skip
        options.json.write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
