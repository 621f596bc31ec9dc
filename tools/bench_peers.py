"""A training step of gpt_moe_8e_top2 on one process, ours beside its peers: same shape, same weights, same batch, same CPU.

    python -m tools.bench_peers --json benchmarks/peers.json         (--profile: where ours spends its time, instead)

Before anything is timed, the first loss of every contender must be ours, and its gradient norm too. Contenders take turns; ratios are of
the rounds' own times. As in a run of ours, the process keeps the memory that steps free, so that nobody pays for taking it again.
Achieved: the model's operations a second over what this machine's matrix product of random numbers does at most.
The floor is a step of nothing but its own matrix products and attentions, forward and backward, one after the other: no step that
computes them can be faster, and what the best peer takes over it is the most that anybody could gain on that peer.
DeepSpeed and Megatron-Core are left out when they are not installed. OLMoE normalises queries and keys; ours beside it does so too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch._ops import OpOverload
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.base.memory import keep_freed_memory
from moetrain.data.batch import Batch
from moetrain.model.config import ModelConfig
from moetrain.model.count import training_flops_per_token
from moetrain.parallel.config import EngineConfig
from tools.bench_experts import peak_flops
from tools.bench_step import Case, model_config, random_batch, tiny
from tools.checkpoint_figures import with_interval
from tools.peers import DeepSpeedLayer, MegatronLayer, Ours, Trained, Trainer, hugging_face, megatron_on_cpu, one_rank, with_guests

EXPERIMENT = "gpt_moe_8e_top2"
OURS, AGAIN, OURS_OLMOE = "moetrain", "moetrain again", "moetrain as OLMoE"
FLOOR, MOST = "floor: products and attention alone", "the best peer over the floor"
CASE, SMALL = Case(12, 256, 1), Case(2, 16, 1)
INIT_STD = 0.1  # of the start: with the usual one experts are so small that a wrong one would not show in the first loss
LOSS, NORM = 1e-4, 2e-2  # relative; the balance losses of others are other sums, and count in the norm
MATMUL = ("mm", "addmm", "bmm", "baddbmm", "grouped_mm")  # and attentions


def measured_model(small: bool) -> ModelConfig:
    config = model_config(EXPERIMENT)
    return replace(tiny(config) if small else config, init_std=INIT_STD)


def contenders(config: ModelConfig) -> dict[str, Callable[[], Trainer]]:
    """By name; the first of a group is what the others are measured against."""
    float32 = EngineConfig(autocast="off")
    olmoe = replace(config, attention=replace(config.attention, qk_norm="full"), routing=replace(config.routing, renormalize=False))
    made: dict[str, Callable[[], Trainer]] = {OURS: lambda: Ours(config, float32), AGAIN: lambda: Ours(config, float32)}
    for experts in ("eager", "grouped_mm"):  # its batched_mm copies weights for every token: tens of gigabytes here
        made[f"transformers Mixtral, {experts}"] = lambda experts=experts: hugging_face(config, experts)
    made[OURS_OLMOE] = lambda: Ours(olmoe, float32)
    for experts in ("eager", "grouped_mm"):
        made[f"transformers OLMoE, {experts}"] = lambda experts=experts: hugging_face(olmoe, experts)
    if find_spec("deepspeed"):
        made["DeepSpeed's MoE layer"] = lambda: with_guests(config, lambda block: DeepSpeedLayer(block, config))
    if find_spec("megatron"):
        made["Megatron-Core's MoE layer"] = lambda: with_guests(config, lambda block: MegatronLayer(block, config))
    return made


def baseline(name: str) -> str:
    return OURS_OLMOE if "OLMoE" in name else OURS


class Products(TorchDispatchMode):
    """Keeps every matrix product and attention of the steps inside, with what it is given; `step` makes them again and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[object, ...], dict[str, object]]] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if is_product(func.__name__):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def step(self, batch: Batch) -> Trained:
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
        return Trained(float("nan"), float("nan"))


def is_product(operator: str) -> bool:
    """Of an operator's name, `aten::` before it or the overload behind it."""
    name = operator.split("::")[-1].split(".")[0]
    return name.strip("_") in {word.strip("_") for word in MATMUL} or "scaled_dot_product" in name


def products_of(trainer: Trainer, batch: Batch) -> Products:
    products = Products()
    with products:
        trainer.step(batch)
    return products


def check(first: dict[str, Trained]) -> None:
    """Raises RuntimeError when a contender does not compute what ours does."""
    for name, found in first.items():
        ours = first[baseline(name)]
        if abs(found.loss / ours.loss - 1) > LOSS or abs(found.grad_norm / ours.grad_norm - 1) > NORM:
            raise RuntimeError(f"{name} does not compute our model: {found} against {ours}")


def measure(
    trainers: dict[str, Trainer], config: ModelConfig, case: Case, rounds: int
) -> tuple[dict[str, Trained], dict[str, list[float]]]:
    """What the first step of each found, and the seconds of the others, interleaved."""
    batch = random_batch(config, case, 0)
    first = {name: trainer.step(batch) for name, trainer in trainers.items()}
    check(first)
    trainers = trainers | {FLOOR: products_of(trainers[OURS], batch)}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    names = list(trainers)
    for number in range(rounds + 1):
        batch = random_batch(config, case, 1 + number)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            trainers[name].step(batch)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return first, seconds


def figures(seconds: dict[str, list[float]], flops: float, peak: float, tokens: int) -> dict[str, dict[str, object]]:
    """Tokens a second, share of the peak, and how many times as fast ours is."""
    rows = {}
    for name, its in seconds.items():
        middle = statistics.median(its)
        ratios = [one / ours for one, ours in zip(its, seconds[baseline(name)], strict=True)]
        rows[name] = {"seconds": middle, "tokens_per_second": tokens / middle, "of_peak": flops / middle / peak,
                      "ours_is_faster": with_interval(ratios)}  # fmt: skip
    return rows


def most(seconds: dict[str, list[float]]) -> dict[str, float]:
    """What could be gained on the fastest of the peers by doing nothing but the products."""
    peers = [name for name in seconds if name not in (OURS, AGAIN, OURS_OLMOE, FLOOR) and baseline(name) == OURS]
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    return with_interval([peer / least for peer, least in zip(seconds[best], seconds[FLOOR], strict=True)])


def lines(rows: dict[str, dict], peak: float) -> Iterator[str]:
    yield f"matrix products of this machine, {torch.get_num_threads()} threads: {peak / 1e9:.0f} GFLOP/s at most"
    for name, row in rows.items():
        faster = row["ours_is_faster"]
        ratio = f"ours is {faster['median']:.2f} x as fast ({faster['low']:.2f} to {faster['high']:.2f})"
        yield f"{name:34} {1e3 * row['seconds']:8.1f} ms {row['tokens_per_second']:8,.0f} tokens/s {row['of_peak']:5.0%} of it, {ratio}"


def profiled(trainer: Trainer, config: ModelConfig, case: Case) -> dict[str, float]:
    """Seconds of a step by operator of torch, without those of its children."""
    batch, steps = random_batch(config, case, 0), 5
    for _ in range(2):
        trainer.step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            trainer.step(batch)
    times = {event.key: event.self_cpu_time_total / 1e6 / steps for event in found.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def profile_lines(times: dict[str, float]) -> Iterator[str]:
    total = sum(times.values())
    matmul = sum(seconds for name, seconds in times.items() if is_product(name))
    yield f"{1e3 * total:.1f} ms a step under the profiler, {matmul / total:.0%} of it matrix products and attention"
    for name, seconds in list(times.items())[:25]:
        yield f"  {name:60} {1e3 * seconds:8.2f} ms {seconds / total:6.1%}"


def versions() -> dict[str, str]:
    names = [name for name, module in (("torch", "torch"), ("transformers", "transformers"), ("deepspeed", "deepspeed"),
             ("megatron-core", "megatron")) if find_spec(module)]  # fmt: skip
    return {"python": platform.python_version(), "cores": str(os.cpu_count())} | {name: version(name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--small", action="store_true", help="a size for a test")
    parser.add_argument("--only", nargs="+", help="names of contenders, ours beside them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    config, case = measured_model(options.small), SMALL if options.small else CASE
    if options.profile:
        print("\n".join(profile_lines(profiled(Ours(config, EngineConfig(autocast="off")), config, case))))
        return 0
    device = torch.device("cpu")
    peak = peak_flops(device, torch.float32, 256 if options.small else 1024)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(one_rank(Path(folder)))
        if find_spec("megatron"):
            stack.enter_context(megatron_on_cpu())
        makers = contenders(config)
        names = [name for name in makers if not options.only or name in options.only or name in {baseline(one) for one in options.only}]
        first, seconds = measure({name: makers[name]() for name in names}, config, case, options.rounds)
    tokens = case.sequences * case.seq_len
    flops = training_flops_per_token(config, case.seq_len) * tokens
    rows = figures(seconds, flops, peak, tokens)
    could = most(seconds)
    print("\n".join(lines(rows, peak)))
    print(f"{MOST}: {could['median']:.2f} ({could['low']:.2f} to {could['high']:.2f})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": ["python", "-m", "tools.bench_peers", *sys.argv[1:]], "versions": versions(), "experiment": EXPERIMENT,
            "case": asdict(case), "threads": options.threads, "load_average": os.getloadavg(), "peak_flops": peak, "flops": flops,
            "first": {name: found._asdict() for name, found in first.items()}, "contenders": rows, "most": could, "seconds": seconds,
        }  # fmt: skip
        options.json.write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
