"""Does the shortcut cost quality? The positions and combine gates of ScMoE, DGMoE, and their opponents, over several seeds on real text.

    python -m tools.ablate_scmoe --folder runs/ablate --json benchmarks/ablate_scmoe.json --png docs/images/ablate_scmoe.png [-- OVERRIDES]

Every variant sees the same tokens in the same order from the same initial values (by name, of one seed) and, top-1 apart, multiplies each
token by as many matrix values: two routed experts, or one and a shared one. Every run is evaluated on the whole held-out text and keeps its
figures in a file of its own, so that the same command goes on after a stop; with fewer --seeds it sums up what is there.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from moetrain.base.errors import MoetrainError
from moetrain.build import build
from moetrain.config import TrainConfig, check, compose, to_config
from moetrain.data.config import DataConfig
from moetrain.data.prepare import ensure_prepared
from moetrain.data.windows import evaluation_windows
from moetrain.dist.stop import Stop
from moetrain.dist.world import World
from moetrain.model.count import count_parameters, training_flops_per_token
from moetrain.model.moe import MoE
from moetrain.parallel.native import TorchEngine
from moetrain.routing.scores import GateScores
from moetrain.routing.select import TopK
from moetrain.routing.types import Routing, RoutingContext
from moetrain.telemetry.record import read_records
from moetrain.train.loop import DONE, train
from tools.campaign import Campaign, leave_on_sigterm
from tools.seeds import check_seeds, interval
from tools.small_job import small_job

TOP_2, SHARED, SCMOE = "top-2", "shared expert, cg1", "ScMoE Pos-2, cg1"
AGAINST = (TOP_2, SHARED)
_EVERY_SECOND = "model.pattern=[dense,moe]"
VARIANTS: dict[str, tuple[str, ...]] = {
    TOP_2: (_EVERY_SECOND, "model.routing.top_k=2", "model.routing.renormalize=true"),
    "top-2, sigmoid scores": (_EVERY_SECOND, "model.routing.top_k=2", "model.routing.renormalize=true", "model.routing.score=sigmoid"),
    "top-1": (_EVERY_SECOND,),
    **{f"shared expert, {gate}": ("model.pattern=[dense,shared]", f"model.shared_gate={gate}") for gate in ("add", "cg1", "cg2")},
    "shared expert, cg1, sigmoid scores": ("model.pattern=[dense,shared]", "model.routing.score=sigmoid"),
    **{f"ScMoE Pos-2, {gate}": ("model.pattern=[scmoe]", f"model.shared_gate={gate}") for gate in ("add", "cg1", "cg2")},
    "ScMoE Pos-2, cg1, sigmoid scores": ("model.pattern=[scmoe]", "model.routing.score=sigmoid"),
    "ScMoE Pos-1, cg1": ("model.pattern=[scmoe]", "model.shortcut.positions=[1]"),
    "ScMoE Pos-3, cg1": ("model.pattern=[scmoe]", "model.shortcut.positions=[3]"),
    "ScMoE Pos-1 first, then Pos-2, cg1": ("model.pattern=[scmoe]", "model.shortcut.positions=[1,2]"),
    "DGMoE": ("model.pattern=[dgmoe]",),
    "DGMoE, not distinct": ("model.pattern=[dgmoe]", "model.shortcut.distinct=false"),
    "DGMoE-Share": ("model.pattern=[dgmoe]", "model.shortcut.pairs_per_bank=2"),
}
PATIENT = ("checkpoint.timeout_seconds=3600", "checkpoint.agent.deadline_seconds=3600")  # a campaign may be paused while others measure
SIZE = (
    *small_job(width=128, seq_len=256),
    *("model.num_layers=4", "model.ffn_size=352", "model.expert_ffn_size=352", "model.shared_ffn_size=352"),
    *("train.global_batch_tokens=3072", "optim.lr=1.5e-3", "optim.warmup_fraction=0.1", "engine.autocast=off"),
    *("train.evaluate_every=0", "telemetry.console=off", "telemetry.experts_every=0", "checkpoint.every_steps=0", *PATIENT),
)
CLASH_BATCHES = 16


@dataclass
class Result:
    """One run. `clash`: see clash_rate; None where tokens are gated once."""

    variant: str
    seed: int
    loss: float  # nats per held-out token
    bits_per_byte: float
    clash: float | None


@dataclass
class Memory:
    """A selection policy that remembers which experts it chose, a tensor [N] per gating."""

    policy: TopK
    chosen: list[torch.Tensor]

    def plan(self, scores: GateScores, context: RoutingContext) -> Routing:
        routing = self.policy.plan(scores, context)
        self.chosen.append(routing.expert_P)
        return routing


def clash_rate(engine: TorchEngine, data: DataConfig) -> float:
    """Share of tokens whose second gating chose the expert of the first: mean over DGMoE pairs and the first held-out windows.

    Training is over: the gates keep their memories."""
    memories = []
    for moe in engine.model.modules():
        if isinstance(moe, MoE):
            memories.append(Memory(moe.policy, []))
            moe.policy = memories[-1]
    windows = evaluation_windows(Path(data.corpora[0].path), "validation", data.seq_len, data.seq_len, 8)
    for batch in islice(windows, CLASH_BATCHES):
        engine.evaluate(batch)
    pairs = [(memory.chosen[i], memory.chosen[i + 1]) for memory in memories for i in range(0, len(memory.chosen), 2)]
    return statistics.mean((first == second).double().mean().item() for first, second in pairs)


def config_of(variant: str, shared: list[str], *own: str) -> TrainConfig:
    """Raises ConfigError for a rule that the overrides break."""
    config = to_config(compose([*VARIANTS[variant], *shared, *own]))
    check(config, 1)
    return config


def run_to_the_end(case: tuple[str, int, list[str], str], folder: Path) -> dict:
    """Trains and evaluates one variant with one seed in this process, in an empty folder."""
    variant, seed, shared, device = case
    place = (f"run.folder={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", f"data.seed={seed}")
    config = config_of(variant, shared, *place)
    with ExitStack() as stack:
        world = World.single(torch.device(device))
        stop = stack.enter_context(Stop(world, folder / "STOP"))
        run = build(config, folder, world, stop)
        stack.callback(run.sinks.close)
        if (reason := train(run)) != DONE:
            raise MoetrainError(f"{variant}, seed {seed}, was stopped: {reason}.", "Run the same command again to go on.")
        assert isinstance(run.engine, TorchEngine)
        clash = clash_rate(run.engine, config.data) if "dgmoe" in config.model.pattern else None
    measured = [record for record in read_records(folder) if "evaluation/bits_per_byte" in record][-1]
    return asdict(Result(variant, seed, float(measured["evaluation/loss"]), float(measured["evaluation/bits_per_byte"]), clash))


def campaign(variants: list[str], seeds: list[int], shared: list[str], folder: Path, jobs: int, device: str) -> Iterator[Result]:
    """Results as they come, kept ones first. All variants of a seed are begun before the next: an early stop leaves whole seeds."""
    cases = {f"{variant}-{seed}": (variant, seed, shared, device) for seed in seeds for variant in variants}
    settings = shared if device == "cpu" else [*shared, f"device={device}"]
    yield from (Result(**found) for found in Campaign(folder, settings, jobs).run(run_to_the_end, cases))


def paired(of: list[Result], other: list[Result]) -> dict[str, float]:
    """Interval of the differences in loss between runs of the same seed."""
    losses = {result.seed: result.loss for result in other}
    return interval([result.loss - losses[result.seed] for result in of])


def summary(results: list[Result], configs: dict[str, TrainConfig]) -> dict[str, dict]:
    """Per variant: figures over seeds, differences to AGAINST seed by seed (as far as they were run), and what it costs."""
    by_variant: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda one: (list(VARIANTS).index(one.variant), one.seed)):
        by_variant.setdefault(result.variant, []).append(result)
    rows = {}
    for variant, found in by_variant.items():
        config = configs[variant]
        count = count_parameters(config.model)
        rows[variant] = {
            "loss": interval([one.loss for one in found]),
            "bits_per_byte": interval([one.bits_per_byte for one in found]),
            "against": {other: paired(found, by_variant[other]) for other in AGAINST if other in by_variant and other != variant},
            "parameters": {"total": count.total, "active": count.active},
            "flops_per_token": training_flops_per_token(config.model, config.data.seq_len),
        }
        clashes = [one.clash for one in found if one.clash is not None]
        rows[variant] |= {"clash": interval(clashes)} if clashes else {}
    return rows


def table(rows: dict[str, dict]) -> str:
    """Markdown, as docs/scmoe.md shows it."""
    columns = ["variant", "nats per token", "bits per byte", *(f"loss against {other}" for other in AGAINST), "MFLOP a token", "parameters"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for variant, row in rows.items():
        cells = [variant, f"{row['loss']['mean']:.3f} ± {_half(row['loss']):.3f}", f"{row['bits_per_byte']['mean']:.3f}"]
        for other in AGAINST:
            against = row["against"].get(other)
            cells.append(f"{against['mean']:+.4f} ± {_half(against):.4f}" if against else "")
        cells += [f"{row['flops_per_token'] / 1e6:.2f}", f"{row['parameters']['total'] / 1e6:.2f} M"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _half(row: dict[str, float]) -> float:
    return row["high"] - row["mean"]


def draw(results: list[Result], rows: dict[str, dict], path: Path) -> None:
    """Every run as a point, every variant's mean with its interval: loss, and loss beyond that of top-2 with the same seed."""
    from matplotlib.figure import Figure

    top_2 = {one.seed: one.loss for one in results if one.variant == TOP_2}
    figure = Figure(figsize=(11, 0.4 * len(rows) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (variant, row) in enumerate(rows.items()):
        color = {TOP_2: "tab:orange", SHARED: "tab:green", SCMOE: "tab:blue"}.get(variant, "0.35")
        found = [one for one in results if one.variant == variant]
        _points(left, number, [one.loss for one in found], row["loss"], color)
        if against := row["against"].get(TOP_2):
            _points(right, number, [one.loss - top_2[one.seed] for one in found], against, color)
    right.axvline(0, color="tab:orange", linewidth=1, zorder=0)
    left.set_yticks(range(len(rows)), list(rows))
    left.invert_yaxis()
    left.set_xlabel("loss on held-out text, nats per token")
    right.set_xlabel("difference to top-2 with the same seed, nats per token")
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    figure.suptitle(f"{len(top_2)} seeds; a point is a run, a bar the mean with its 95 % interval", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _points(axes, number: int, values: list[float], row: dict[str, float], color: str) -> None:
    axes.plot(values, [number + 0.18] * len(values), "o", color=color, markersize=3.5, alpha=0.6)
    axes.errorbar(row["mean"], number - 0.12, xerr=_half(row), color=color, marker="|", markersize=9, capsize=3, linewidth=1.5)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=1_200_000, help="trained on by every run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="on a GPU all runs share it")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablate"), help="where results are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("overrides", nargs="*", help="of launch/train.py, after --")
    options = parser.parse_args(arguments)
    try:
        check_seeds(options.seeds)
    except ValueError as error:
        parser.error(str(error))
    shared = [*SIZE, f"train.tokens={options.tokens}", *options.overrides]
    configs = {variant: config_of(variant, shared) for variant in options.variants}
    ensure_prepared(configs[options.variants[0]].data, show_progress=True)
    results = []
    for result in campaign(options.variants, options.seeds, shared, options.folder, options.jobs, options.device):
        results.append(result)
        print(f"{result.variant}, seed {result.seed}: {result.loss:.4f} nats, {result.bits_per_byte:.4f} bits per byte", flush=True)
    rows = summary(results, configs)
    print(table(rows))
    if options.json:
        facts = {
            "command": shlex.join(["python", "-m", "tools.ablate_scmoe", *arguments]),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "cores": os.cpu_count(),
            "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
            "seeds": options.seeds,
            "overrides": shared,
            "tokens": configs[options.variants[0]].train.tokens,
        }
        runs = [asdict(one) for one in results]
        options.json.write_text(json.dumps(facts | {"variants": rows, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    if options.png:
        draw(results, rows, options.png)
    return 0


if __name__ == "__main__":
    leave_on_sigterm()
    sys.exit(main(sys.argv[1:]))
