"""The live display as rich renderables: a run's status in, a panel that fits the terminal out. Holds no state.

L MoE layers, E experts.
"""

import math
from itertools import groupby, pairwise

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moetrain.telemetry.experts import relative_load
from moetrain.telemetry.format import duration, level, share, sparkline
from moetrain.telemetry.status import RunStatus

_LABEL = 12  # width of the left column
_FRAME = 4  # border and padding on both sides
_WIDEST = 120  # columns; beyond that a line is hard to follow
_LOAD_ROWS = 8  # layers beyond share a row
_OTHER_LINES = 12  # all that is not load rows: frame, progress, five sections, blank line, and some of what scrolls above


def panel(status: RunStatus, now: float, width: int, height: int, hint: str = "") -> Panel:
    """The whole display, at most `width` (and never over 120) x `height`."""
    width = min(width, _WIDEST)
    inner = max(width - _FRAME, 20)
    table = Table.grid(padding=(0, 1))
    table.add_column(width=_LABEL - 1, style="bold", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row("loss", loss_row(status, inner - _LABEL))
    table.add_row("evaluation", status.evaluation_text())
    table.add_row("speed", status.speed_text())
    table.add_row("checkpoint", checkpoint_row(status))
    experts = status.experts_text()
    if experts:
        table.add_row("experts", experts)
    body: list[RenderableType] = [progress_row(status, now, inner), Text(), table]
    if status.load_LE is not None and status.load_LE.size:
        body += load_rows(status.load_LE, inner, min(max(height - _OTHER_LINES, 1), _LOAD_ROWS))
    return Panel(Group(*body), title=f"[bold]{status.name}[/]", subtitle=f"[dim]{hint}[/]" if hint else None, width=width, padding=(0, 1))


def progress_row(status: RunStatus, now: float, width: int) -> Table:
    """Step, bar, share done, time gone, time left."""
    left = status.seconds_left(now)
    gone = f"{duration(now - status.started)} gone"
    remaining = "done" if status.fraction == 1 else f"{duration(left)} left" if math.isfinite(left) else "measuring"
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True, style="bold")
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True, style="dim")
    row.add_column(no_wrap=True, style="bold green")
    bar = ProgressBar(total=max(status.total_steps, 1), completed=status.step, complete_style="green", finished_style="green")
    row.add_row(f"step {status.step}/{status.total_steps}", bar, share(status.fraction), gone, remaining)
    row.width = width
    return row


def loss_row(status: RunStatus, width: int) -> Text:
    """The numbers, then the loss so far as a sparkline in what room is left."""
    text = Text(status.loss_text())
    room = width - len(text) - 2
    if room >= 8:
        text.append("  " + sparkline(compress(list(status.losses), room), room), style="cyan")
    return text


def checkpoint_row(status: RunStatus) -> Text:
    return Text(status.checkpoint_text(), style="red" if status.number("checkpoint/failures") > 0 else "")


def compress(values: list[float], width: int) -> list[float]:
    """At most `width` means of neighbouring values."""
    if len(values) <= width:
        return values
    return [float(np.mean(part)) for part in np.array_split(np.array(values), width)]


def load_rows(load_LE: np.ndarray, width: int, height: int) -> list[Text]:
    """Layer x expert load, one bar per expert: half height and green at its share, higher and red above, low and blue below."""
    shown = condense(relative_load(load_LE), height, width - _LABEL)
    num_layers, num_rows = load_LE.shape[0], shown.shape[0]
    cell_width = min(max((width - _LABEL) // shown.shape[1], 1), 4)
    bar_width = max(cell_width - 1, 1)
    gap = " " * (cell_width - bar_width)
    rows = []
    for row, (start, stop) in zip(shown, splits(num_layers, num_rows), strict=True):
        label = f"layer {start}" if stop == start + 1 else f"{start}-{stop - 1}"
        text = Text(no_wrap=True)
        text.append(f"{label:>{_LABEL - 1}} ", style="dim")
        for style, cells in groupby(row, color):  # one span per color: spans are what drawing costs
            text.append("".join(level(value / 2) * bar_width + gap for value in cells), style)
        rows.append(text)
    return rows


def condense(relative_LE: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """At most rows x columns cells; a cell that stands for several shows the one farthest from an even share (1)."""
    for axis, limit in ((0, rows), (1, columns)):
        if relative_LE.shape[axis] > limit:
            parts = [relative_LE.take(range(start, stop), axis) for start, stop in splits(relative_LE.shape[axis], limit)]
            farthest = [np.abs(part - 1).argmax(axis=axis, keepdims=True) for part in parts]
            relative_LE = np.concatenate([np.take_along_axis(part, at, axis) for part, at in zip(parts, farthest, strict=True)], axis)
    return relative_LE


def splits(total: int, parts: int) -> list[tuple[int, int]]:
    """Even ranges [start, stop) that cover `total`."""
    return list(pairwise(part * total // parts for part in range(parts + 1)))


def color(relative: float) -> str:
    """Of a load relative to the even share."""
    if relative > 2:
        return "bright_red"
    if relative > 1.3:
        return "yellow"
    if relative < 0.1:
        return "bright_magenta"
    return "bright_blue" if relative < 0.7 else "green"
