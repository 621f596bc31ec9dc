"""The lanes of one step as a figure: computation above, exchanges below, and hatched where the one waited for the other."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moetrain.telemetry.lanes import GRADIENT, Lanes

_EXPERTS, _EXCHANGE, _WAIT = "#d1602b", "#2f8f5b", "#a8324a"
_MAIN = ("#1f5fa8", "#4fa3a3", "#8a4fa3", "#b8912b", "#6b6b6b")  # operators of the main stream in the order in which they appear
_PALE = 0.55  # opacity of the forward pass
_COMPUTE_ROW, _EXCHANGE_ROW = (10, 8), (0, 8)  # lower edge and height


def lanes_figure(name: str, steps: list[tuple[int, Lanes]]) -> Figure:
    """One picture per step below each other, over the same axis of milliseconds."""
    figure = Figure(figsize=(13, 0.9 + 2.3 * len(steps)), layout="constrained")
    figure.suptitle(f"{name}: one step of one rank", fontsize=13, fontweight="bold")
    rows = figure.subplots(len(steps), 1, squeeze=False, sharex=True)[:, 0].tolist()
    colors = operator_colors(steps)
    for axes, (step, lanes) in zip(rows, steps, strict=True):
        _draw(axes, lanes, colors)
        kind = "every exchange waited for at once" if lanes.serial else "overlapped"
        waited = sum(journey.waited for journey in lanes.journeys)
        axes.set_title(f"step {step}, {kind}" + ("" if lanes.serial else f": {1e3 * waited:.1f} ms waited"), fontsize=10, loc="left")
    rows[-1].set_xlabel("milliseconds")
    handles = [Patch(color=color, label=operator) for operator, color in colors.items()]
    handles += [Patch(color=_EXCHANGE, label="exchange"), Patch(facecolor="white", edgecolor=_WAIT, hatch="////", label="waiting")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def operator_colors(steps: list[tuple[int, Lanes]]) -> dict[str, str]:
    """A color for every operator, whatever its block and pass."""
    operators = dict.fromkeys(operator_of(computation.name) for _, lanes in steps for computation in lanes.computations)
    main = [operator for operator in operators if operator != "experts"]
    colors = {operator: _MAIN[number % len(_MAIN)] for number, operator in enumerate(main)}
    return colors | ({"experts": _EXPERTS} if "experts" in operators else {})


def operator_of(name: str) -> str:
    """`gradient of blocks.1.moe.experts/mlp` is `mlp`."""
    return name.rsplit("/", 1)[-1]


def _draw(axes: Axes, lanes: Lanes, colors: dict[str, str]) -> None:
    """Bars without edges: a step has many and most are thin. The forward pass is pale."""
    for computation in lanes.computations:
        span = [(1e3 * computation.start, 1e3 * (computation.end - computation.start))]
        axes.broken_barh(span, _COMPUTE_ROW, facecolors=colors[operator_of(computation.name)], alpha=_opacity(computation.name))
    for journey in lanes.journeys:
        span = [(1e3 * journey.start, 1e3 * (journey.end - journey.start))]
        axes.broken_barh(span, _EXCHANGE_ROW, facecolors=_EXCHANGE, alpha=_opacity(journey.name))
    waits = [(1e3 * journey.land, 1e3 * journey.waited) for journey in lanes.journeys]
    if lanes.serial:
        waits = [(1e3 * journey.ready, 1e3 * (journey.end - journey.ready)) for journey in lanes.journeys]
    if waits:
        axes.broken_barh(waits, _COMPUTE_ROW, facecolors="none", edgecolors=_WAIT, hatch="////", linewidth=0)
    axes.set_yticks([14, 4], ["computation", "exchange"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def _opacity(name: str) -> float:
    return 1.0 if name.startswith(GRADIENT) else _PALE
