"""Draws the results of tools/bench_overlap.py: for every point the milliseconds of each run, and what of them did not hide.

python -m tools.overlap_plot benchmarks/overlap.json docs/images/overlap.png
"""

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.overlap_cases import NULL, OVERLAPPED, SCMOE, SERIAL, SHARED, TOP_1, TOP_2, Run
from tools.overlap_figures import best, middle, runs_of

COMPUTE, EXPOSED = "#1f5fa8", "#d1602b"
GROUPS = ("opponents, ", "core, ")


def bars(found: list[dict]) -> dict[str, tuple[float, float]]:
    """By label, from the slowest: milliseconds of computation (the null arm's), and what comes on top."""
    nulls = {model: middle(found, runs_of(found, model, NULL)[0]) for model in (TOP_2, TOP_1, SHARED, SCMOE)}
    shown = {
        "top-2, serial": (TOP_2, Run(TOP_2, SERIAL).name),
        **({"top-2, chunks": (TOP_2, best(found, TOP_2))} if runs_of(found, TOP_2, OVERLAPPED) else {}),
        "top-1, serial": (TOP_1, Run(TOP_1, SERIAL).name),
        "shared expert, serial": (SHARED, runs_of(found, SHARED, SERIAL)[0]),
        "shared expert, overlapped": (SHARED, best(found, SHARED)),
        "ScMoE Pos-2, serial": (SCMOE, runs_of(found, SCMOE, SERIAL)[0]),
        f"ScMoE Pos-2, overlapped (slot {best(found, SCMOE).removeprefix(f'{SCMOE} {OVERLAPPED} ')})": (SCMOE, best(found, SCMOE)),
    }
    rows = {}
    for label, (model, run) in shown.items():
        whole = 1e3 * middle(found, run)
        computed = min(whole, 1e3 * nulls[model])
        rows[label] = computed, whole - computed
    return dict(sorted(rows.items(), key=lambda row: -sum(row[1])))


def draw(axes: Axes, title: str, result: dict) -> None:
    rows = bars(result["ranks"])
    labels = list(rows)
    computed, exposed = ([row[part] for row in rows.values()] for part in (0, 1))
    axes.barh(labels, computed, color=COMPUTE, label="computation (exchange replaced by a copy)")
    axes.barh(labels, exposed, left=computed, color=EXPOSED, label="exchange that did not hide")
    for number, (one, other) in enumerate(zip(computed, exposed, strict=True)):
        axes.text(one + other, number, f" {one + other:.0f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    share = f"exchange {result['figures']['share']['median']:.0%} of top-2's MoE time"
    axes.set_title(f"{title.partition(', ')[2]}: {result['rate'] or 'link not limited'}, {share}", fontsize=9)
    axes.set_xlabel("ms, forward and backward of the block pairs", fontsize=8)
    axes.tick_params(labelsize=8)


def figure(results: dict[str, dict]) -> Figure:
    """One panel for each point of the groups `opponents` and `core`."""
    points = {title: result for title, result in results.items() if title.startswith(GROUPS)}
    sheet = Figure(figsize=(8.0, 2.3 * len(points) + 0.5), layout="constrained")
    panels = sheet.subplots(len(points), squeeze=False)
    for axes, (title, result) in zip(panels.flat, points.items(), strict=True):
        draw(axes, title, result)
    handles, names = panels.flat[0].get_legend_handles_labels()
    sheet.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    return sheet


def main() -> int:
    source, image = (Path(argument) for argument in sys.argv[1:])
    image.parent.mkdir(parents=True, exist_ok=True)
    figure(json.loads(source.read_text())).savefig(image, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
