"""What saving costs a training job, ours beside its peers: one state, one interval (every iteration), one run of two ranks.

    python -m tools.bench_checkpoint --json benchmarks/checkpoint.json        (--small: a minute, at a size that says nothing)

Before anything is timed, every contender saves, the state is overwritten, and what it loads must be equal to what was saved.
Stall (`--parts training`): time in the calls that start a save and wait for it, of every iteration. Slow-down: the whole iteration over one
without checkpoints (copying, checksums and writers take their share of two cores); training without checkpoints stands there twice, as A/A.
Rates (`--parts rates`): no training; from the call until everything is durable, beside plain writes and reads of as many bytes.
DeepSpeed is left out when it is not installed.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path

import torch

from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.routing.config import RoutingConfig
from tools.bench_step import Case, random_batch
from tools.checkpoint_figures import (
    AGAIN,
    BASE,
    DCP,
    OURS,
    PROCESS,
    SEED,
    lines,
    rates,
    summary,
)  # fmt: skip
from tools.checkpoint_rates import recoveries, write_rates
from tools.contenders import Contender, Dcp, DcpAsync, DeepSpeed, Live, Nothing, Ours, PerRank, Safetensors

WORLD = 2
PARTS = ("training", "rates")
SETTLE_SECONDS = 15.0


@dataclass(frozen=True)
class Size:
    """How large and how long. `rounds` times every contender trains `iterations` in a row, after one that is not counted."""

    hidden: int = 384
    layers: int = 4
    experts: int = 8
    vocabulary: int = 8192
    sequences: int = 4  # of a rank and iteration
    seq_len: int = 256
    rounds: int = 10
    iterations: int = 4
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
        DCP: lambda: Dcp(DCP, folder / "dcp", live),
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


# memory


def memory_of(trainer: Trainer, make: Callable[[], Contender], size: Size) -> int:
    """Bytes by which the memory available on the machine falls, at most, while a contender is made and saves twice: shared memory and
    helper processes included, page cache not."""
    world = trainer.live.world
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the contender before freed
    for _ in range(2):
        trainer.step(lambda: None)  # what training itself needs is there again
    world.barrier("memory is given back")
    start, over = settled_bytes(), threading.Event()
    lowest = [start]
    world.barrier("memory")

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


def settled_bytes() -> int:
    """What is available once the contender before has given everything back: its agent or helpers may still be ending."""
    before, deadline = 0, time.monotonic() + SETTLE_SECONDS
    while (now := available_bytes()) > before + (1 << 20) and time.monotonic() < deadline:
        before = now
        time.sleep(1.0)
    return now


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


# one rank, all ranks


def run_rank(rank: int, meeting: Path, folder: Path, size: Size, parts: Sequence[str]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(WORLD))  # as launchers say
    torch.set_num_threads(1)
    with World.from_file(meeting, rank, WORLD, 300.0) as world:
        trainer = Trainer(world, size)
        for _ in range(2):
            trainer.step(lambda: None)
        make = makers(folder / "a", trainer.live)
        contenders = [maker() for maker in make.values()]
        for contender in contenders:
            check_round_trip(contender, trainer.live)
        found: dict[str, object] = {"state_bytes": sum(tensor.nbytes for tensor in trainer.live.mine.values())}
        if "training" in parts:
            found["iterations"] = {name: asdict(one) for name, one in stalls(trainer, contenders, size).items()}
            found["bytes"] = {contender.name: sum(path.stat().st_size for path in contender.files()) for contender in contenders}
        if "rates" in parts:
            timed = [contender for contender in contenders if not isinstance(contender, DcpAsync | Nothing)]
            found["writes"] = write_rates(trainer.live, timed, size.pairs, folder)
            found["reads"] = {state: recoveries(trainer.live, timed, size.pairs, state == "cold") for state in ("cold", "warm")}
        found["outcomes"] = {contender.name: contender.outcome() for contender in contenders if isinstance(contender, Ours)}
        for contender in contenders:
            contender.close()
        if "training" in parts:
            again = makers(folder / "memory", trainer.live)
            found["memory"] = {name: memory_of(trainer, maker, size) for name, maker in again.items()}
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
        world.barrier("the end")


def run_ranks(folder: Path, size: Size, parts: Sequence[str]) -> list[dict]:
    """What every rank found. Raises RuntimeError when one of them failed."""
    context = multiprocessing.get_context("spawn")
    meeting = folder / f"meeting-{secrets.token_hex(4)}"
    ranks = [context.Process(target=run_rank, args=(rank, meeting, folder, size, parts)) for rank in range(WORLD)]
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


def only(found: dict, *names: str) -> dict:
    return {name: found[name] for name in ("state_bytes", "outcomes", *names)}


def versions() -> dict[str, str]:
    names = ["torch", "numpy", "zarr", "safetensors", *(["deepspeed"] if find_spec("deepspeed") else [])]
    return {"python": platform.python_version(), "cores": str(os.cpu_count())} | {name: version(name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a size for a test")
    parser.add_argument("--hidden", type=int, help=f"width (default {Size.hidden}): bytes grow with its square, objects do not")
    parser.add_argument("--rounds", type=int, help=f"default {Size.rounds}")
    parser.add_argument("--iterations", type=int, help=f"default {Size.iterations}")
    parser.add_argument("--pairs", type=int, help=f"default {Size.pairs}")
    parser.add_argument("--folder", type=Path, help="a disk to write to (default: the temporary folder)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--json", type=Path, help="the figures; parts that are not measured keep theirs")
    options = parser.parse_args()
    size = SMALL if options.small else Size()
    given = {name: value for name in ("hidden", "rounds", "iterations", "pairs") if (value := vars(options)[name]) is not None}
    size = replace(size, **given)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = run_ranks(Path(folder), size, options.parts)
    print("\n".join(lines(found)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = json.loads(options.json.read_text()) if options.json.exists() else {}
        command = ["python", "-m", "tools.bench_checkpoint", *sys.argv[1:]]
        about = {"command": command, "versions": versions(), "seed": SEED, "size": asdict(size)}
        if "training" in options.parts:
            ranks = [only(rank, "iterations", "bytes", "memory") for rank in found]
            report["training"] = about | {"contenders": summary(found), "ranks": ranks}
        if "rates" in options.parts:
            report["rates"] = about | {"ratios": rates(found), "ranks": [only(rank, "writes", "reads") for rank in found]}
        options.json.write_text(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
