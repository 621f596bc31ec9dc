"""Figures of one or more runs, drawn from their folders alone: loss, throughput, expert load, checkpoint ages.

Pure functions from records to matplotlib figures; several runs lie over each other with a legend. L MoE layers, E experts.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from moetrain.telemetry.experts import Snapshot, layer_labels, load_snapshots, relative_load
from moetrain.telemetry.lane_plot import lanes_figure
from moetrain.telemetry.lanes import Lanes, load_lanes
from moetrain.telemetry.record import Record, read_records, series

_COLORS = ("#1f5fa8", "#d1602b", "#2f8f5b", "#8a4fa3", "#b8912b", "#4fa3a3", "#a8324a", "#6b6b6b")
_WIDTH = 9.0  # inches


@dataclass(frozen=True)
class RunData:
    """What a run folder says, read once."""

    name: str
    records: list[Record]
    snapshots: list[Snapshot]
    lanes: list[tuple[int, Lanes]] = field(default_factory=list)  # profiled steps of one rank


def read_run(folder: Path) -> RunData:
    """Raises MoetrainError when the folder holds no metrics, or lanes that are none."""
    return RunData(folder.resolve().name, read_records(folder), load_snapshots(folder), load_lanes(folder))


def write_plots(runs: list[RunData], out: Path) -> list[Path]:
    """Draws every figure as PNG into `out`, and the lanes of each run that has a profile; the files, in reading order."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {"loss": loss(runs), "throughput": throughput(runs), "experts": experts(runs), "checkpoints": checkpoints(runs)}
    profiled = [run for run in runs if run.lanes]
    for number, run in enumerate(profiled):
        figures["lanes" if number == 0 else f"lanes-{number + 1}"] = lanes_figure(run.name, run.lanes)
    files = []
    for name, figure in figures.items():
        file = out / f"{name}.png"
        figure.savefig(file, dpi=130)
        files.append(file)
    return files


def loss(runs: list[RunData]) -> Figure:
    """Training loss, raw and smoothed, and the evaluations."""
    figure, (axes,) = _figure("Loss", ["cross-entropy, nats per token"])
    for run, color in zip(runs, _colors(runs), strict=True):
        _curve(axes, run, "train/loss", color)
        steps, values = series(run.records, "evaluation/loss")
        if steps:
            label = f"{run.name}, validation ({_last_evaluation(run)})"
            axes.plot(steps, values, color=color, marker="o", markeredgecolor="white", linewidth=1, linestyle=":", label=label)
    _limit_to_most(axes)
    _finish([axes], runs)
    return figure


def throughput(runs: list[RunData]) -> Figure:
    """Tokens per second and the share of the machine's peak that they use."""
    figure, (rate, use) = _figure("Throughput", ["tokens per second", "model FLOP utilisation"])
    for run, color in zip(runs, _colors(runs), strict=True):
        for axes, key in ((rate, "perf/tokens_per_second"), (use, "perf/mfu")):
            _curve(axes, run, key, color)
    rate.yaxis.set_major_formatter(EngFormatter(sep=""))
    use.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (rate, use):
        axes.set_ylim(bottom=0)
    _finish([rate, use], runs)
    return figure


def experts(runs: list[RunData]) -> Figure:
    """How even the experts' load is over time; per run the busiest expert of each layer over time, and the last layer x expert load."""
    shown = [run for run in runs if run.snapshots]
    layers = max((run.snapshots[-1].load_LE.shape[0] for run in shown), default=0)
    map_height = min(1.0 + 0.22 * layers, 5.0)
    figure = Figure(figsize=(_WIDTH, 4.6 + 2 * map_height * bool(shown)), layout="constrained")
    figure.suptitle("Expert load", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(4 if shown else 2, max(len(shown), 1), height_ratios=[2, 1.4, *([map_height] * 2 if shown else [])])
    ratio, entropy = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])
    for run, color in zip(runs, _colors(runs), strict=True):
        for axes, key in ((ratio, "moe/load_max_over_mean"), (entropy, "moe/load_entropy")):
            _curve(axes, run, key, color, f", {_dead(run)} dead at the end")
    ratio.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    ratio.set_ylabel("busiest expert\n/ even share")
    entropy.set_ylabel("entropy\n(1 = even)")
    _finish([ratio, entropy], runs)
    for column, run in enumerate(shown):
        over_time, last = figure.add_subplot(grid[2, column]), figure.add_subplot(grid[3, column])
        _draw_over_time(over_time, run.snapshots)
        over_time.set_title(f"{run.name}: busiest expert of each layer", fontsize=10)
        draw_heat_map(last, run.snapshots[-1])
        last.set_title(f"{run.name}: every expert at step {run.snapshots[-1].step}", fontsize=10)
    return figure


def checkpoints(runs: list[RunData]) -> Figure:
    """Age of the oldest expert and bytes of each checkpoint; for a resumed run also the age of every expert it restored."""
    restored = [(run, ages) for run in runs if (ages := restored_ages(run.records)) is not None]
    figure = Figure(figsize=(_WIDTH, 5.4 + 2.4 * bool(restored)), layout="constrained")
    figure.suptitle("Checkpoints", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(3 if restored else 2, max(len(restored), 1))
    age, written = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])
    for run, color in zip(runs, _colors(runs), strict=True):
        for axes, key in ((age, "checkpoint/oldest_expert_steps"), (written, "checkpoint/bytes")):
            steps, values = series(run.records, key)
            if steps:
                axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1, linestyle=":", label=run.name)
    age.set_ylabel("oldest expert, steps")
    written.set_ylabel("bytes written")
    written.yaxis.set_major_formatter(EngFormatter(unit="B"))
    for axes in (age, written):
        axes.set_ylim(bottom=0)
    _finish([age, written], runs)
    for column, (run, (step, ages_LE)) in enumerate(restored):
        axes = figure.add_subplot(grid[2, column])
        _draw_ages(axes, ages_LE, [f"layer {layer}" for layer in range(len(ages_LE))])
        axes.set_title(f"{run.name}: age of every expert restored at step {step}", fontsize=10)
    return figure


def expert_ages(title: str, banks: tuple[str, ...], ages: dict[str, np.ndarray]) -> Figure:
    """Layer x expert maps of one recovery point below each other: what the ages are of, and the ages [L, E] in steps (nan: none)."""
    num_layers, num_experts = next(iter(ages.values())).shape
    height = min(1.3 + 0.26 * num_layers, 12)
    figure = Figure(figsize=(min(5 + 0.16 * num_experts, 15), 0.6 + height * len(ages)), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    top = max(float(np.nanmax(ages_LE)) for ages_LE in ages.values())
    for axes, (what, ages_LE) in zip(figure.subplots(len(ages), 1, squeeze=False)[:, 0], ages.items(), strict=True):
        _draw_ages(axes, ages_LE, layer_labels(banks), top)
        axes.set_title(what, fontsize=10)
    return figure


def _draw_ages(axes: Axes, ages_LE: np.ndarray, rows: list[str], top: float = 0.0) -> None:
    """Pale is new, red is old; `top`: the age at the end of the scale. Small maps carry their numbers."""
    top = max(top, float(np.nanmax(ages_LE)), 1.0)
    image = axes.imshow(ages_LE, aspect="auto", cmap="YlOrRd", vmin=0, vmax=top, interpolation="nearest")
    _label_matrix(axes, rows)
    axes.figure.colorbar(image, ax=axes, label="steps")
    if ages_LE.size <= 256:
        for (layer, expert), age in np.ndenumerate(ages_LE):
            if math.isfinite(age):
                color = "white" if age > 0.6 * top else "black"
                axes.text(expert, layer, f"{age:.0f}", ha="center", va="center", fontsize=7, color=color)


def heat_map(snapshot: Snapshot) -> Figure:
    """Layer x expert load of one snapshot, for a dashboard."""
    num_layers, num_experts = snapshot.load_LE.shape
    figure = Figure(figsize=(min(5 + 0.12 * num_experts, 14), min(2 + 0.24 * num_layers, 12)), layout="constrained")
    axes = figure.add_subplot()
    draw_heat_map(axes, snapshot)
    axes.set_title(f"Expert load up to step {snapshot.step}")
    return figure


def draw_heat_map(axes: Axes, snapshot: Snapshot) -> None:
    """Load relative to the even share: white is even, red too much, blue too little. Small maps carry their numbers."""
    relative_LE = relative_load(snapshot.load_LE)
    _draw_relative(axes, relative_LE, "load / even share")
    _label_matrix(axes, layer_labels(snapshot.banks))
    if relative_LE.size <= 128:
        for (layer, expert), value in np.ndenumerate(relative_LE):
            color = "white" if value > 1.75 or value < 0.25 else "black"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def restored_ages(records: list[Record]) -> tuple[int, np.ndarray] | None:
    """Step and ages [L, E] in steps of the last `resume` event that says them (`checkpoint/expert_ages`, a JSON list of lists)."""
    for record in reversed(records):
        ages = record.get("checkpoint/expert_ages")
        if isinstance(ages, str) and (rows := json.loads(ages)):
            return int(record["train/step"]), np.array(rows, dtype=float)
    return None


def smooth(values: list[float], radius: int = 0) -> list[float]:
    """Mean of up to `radius` neighbours on either side (0 chooses by length), fewer towards both ends, so that nothing lags.

    nan stays out of it.
    """
    radius = radius or max(len(values) // 60, 1)
    out = []
    for at in range(len(values)):
        reach = min(radius, at, len(values) - 1 - at)
        near = [value for value in values[at - reach : at + reach + 1] if math.isfinite(value)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def _figure(title: str, labels: list[str]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, 2.2 + 2.6 * len(labels)), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    rows = figure.subplots(len(labels), 1, squeeze=False, sharex=True)[:, 0].tolist()
    for axes, label in zip(rows, labels, strict=True):
        axes.set_ylabel(label)
    return figure, rows


def _curve(axes: Axes, run: RunData, key: str, color: str, note: str = "") -> None:
    """One metric: every record thin, the smoothed course on top of it."""
    steps, values = series(run.records, key)
    if steps:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=color, linewidth=1.8, label=run.name + note)


def _colors(runs: list[RunData]) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(len(runs))]


def _finish(rows: list[Axes], runs: list[RunData]) -> None:
    """Grid, step axis, legend, a dotted line at every resume, and a word where there is nothing to show."""
    for axes in rows:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for run, color in zip(runs, _colors(runs), strict=True):
            for step in (float(record["train/step"]) for record in run.records if record.get("event") == "resume"):
                axes.axvline(step, color=color, linestyle=(0, (1, 2)), linewidth=1)
                place = ("data", "axes fraction")
                axes.annotate(" resumed", (step, 0), xycoords=place, rotation=90, fontsize=7, color=color, ha="right", va="bottom")
        if not axes.get_legend_handles_labels()[0]:
            axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color="grey")
    rows[-1].set_xlabel("step")
    if rows[0].get_legend_handles_labels()[0]:
        rows[0].legend(frameon=False, fontsize=9)


def _limit_to_most(axes: Axes) -> None:
    """Keeps a few early spikes from flattening the curve: the top of the axis is the 99.5th percentile of what is drawn."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]) if axes.lines else np.empty(0)
    values = values[np.isfinite(values)]
    if values.size > 20:
        low, high = float(values.min()), float(np.percentile(values, 99.5))
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _last_evaluation(run: RunData) -> str:
    bits, losses = series(run.records, "evaluation/bits_per_byte")[1], series(run.records, "evaluation/loss")[1]
    return f"last {bits[-1]:.3f} bits per byte" if bits else f"last {losses[-1]:.3f}"


def _dead(run: RunData) -> int:
    values = series(run.records, "moe/dead_experts")[1]
    return int(values[-1]) if values else 0


def _draw_over_time(axes: Axes, snapshots: list[Snapshot]) -> None:
    """One column per snapshot, one row per layer; snapshots of another shape than the last are left out."""
    kept = [snapshot for snapshot in snapshots if snapshot.load_LE.shape == snapshots[-1].load_LE.shape]
    busiest_LS = np.stack([relative_load(snapshot.load_LE).max(axis=1) for snapshot in kept], axis=1)
    _draw_relative(axes, busiest_LS, "busiest / even share")
    _label_matrix(axes, layer_labels(kept[-1].banks), "step")
    shown = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), 8)).astype(int))
    axes.set_xticks(shown, [str(kept[number].step) for number in shown])


def _draw_relative(axes: Axes, relative: np.ndarray, label: str) -> None:
    top = float(np.clip(relative.max(), 2.0, 4.0))
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, top), interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, label=label, extend="max" if relative.max() > top else "neither")
    bar.set_ticks([0, 0.5, 1, (1 + top) / 2, top], labels=["0", "0.5", "1", f"{(1 + top) / 2:.1f}", f"{top:.1f}"])


def _label_matrix(axes: Axes, rows: list[str], xlabel: str = "expert") -> None:
    shown = range(0, len(rows), math.ceil(len(rows) / 16))
    axes.set_yticks(list(shown), [rows[number] for number in shown], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlabel(xlabel)
