"""Figures from run folders: what is drawn, not how it looks."""

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moetrain.telemetry import plots
from moetrain.telemetry.command import add_parsers
from moetrain.telemetry.experts import Snapshot, save_snapshot
from moetrain.telemetry.sinks import JsonlSink

BANKS = ("blocks.0.moe.experts", "blocks.1.moe.experts")


def write_run(folder: Path, loss: float = 4.0, resumed: bool = False) -> Path:
    """Twelve steps; `resumed` trains steps 7 to 12 a second time with a loss 1 lower."""
    sink = JsonlSink(folder)
    for again in range(1 + resumed):
        first = 7 if again else 1
        event: plots.Record = {"train/step": first - 1, "event": "resume" if again else "start"}
        if again:
            event["checkpoint/expert_ages"] = json.dumps([[0, 2, 4], [6, 4, 2]])
        sink.log(event)
        for step in range(first, 13):
            sink.log({"train/step": step, "train/loss": loss - again, "perf/tokens_per_second": 900.0, "perf/mfu": 0.3})
            sink.log({"train/step": step, "moe/load_max_over_mean": 1.5, "moe/load_entropy": 0.9, "moe/dead_experts": 1})
            save_snapshot(folder, Snapshot(step, np.array([[1, 2, 3], [2, 2, 2]]), BANKS))
        sink.log({"train/step": 12, "evaluation/loss": loss + 0.5, "evaluation/bits_per_byte": 2.25})
        sink.log({"train/step": 12, "checkpoint/seq": 1, "checkpoint/bytes": 5e6, "checkpoint/oldest_expert_steps": 4})
    sink.close()
    return folder


def legend(axes: Axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in [axes.title, *axes.texts]]


def test_the_command_writes_a_png_of_each_figure_and_prints_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "gpt")
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(["plot", str(run)])
    assert args.run(args) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.relative_to(run).as_posix() for file in files] == [
        f"plots/{name}.png" for name in ("loss", "throughput", "experts", "checkpoints")
    ]
    for file in files:
        header = file.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", header[16:24])) > 400


def test_runs_lie_over_each_other_with_a_legend(tmp_path: Path) -> None:
    runs = [plots.read_run(write_run(tmp_path / name)) for name in ("first", "second")]
    for draw in (plots.loss, plots.throughput, plots.experts, plots.checkpoints):
        labels = legend(draw(runs).axes[0])
        assert [name for name in ("first", "second") if any(name in label for label in labels)] == ["first", "second"]
    assert "first, validation (last 2.250 bits per byte)" in legend(plots.loss(runs).axes[0])


def test_steps_trained_again_are_drawn_once_with_their_last_value(tmp_path: Path) -> None:
    run = plots.read_run(write_run(tmp_path / "gpt", loss=4.0, resumed=True))
    raw = plots.loss([run]).axes[0].lines[0]
    assert np.asarray(raw.get_xdata()).tolist() == list(range(1, 13))
    assert np.asarray(raw.get_ydata()).tolist() == [4.0] * 6 + [3.0] * 6


def test_a_resume_is_marked_and_its_expert_ages_are_drawn(tmp_path: Path) -> None:
    run = plots.read_run(write_run(tmp_path / "gpt", resumed=True))
    figure = plots.checkpoints([run])
    assert "gpt: age of every expert restored at step 6" in texts(figure)
    matrix = next(axes.images[0].get_array() for axes in figure.axes if axes.images)
    assert np.asarray(matrix).tolist() == [[0, 2, 4], [6, 4, 2]]
    assert " resumed" in texts(plots.loss([run]))


def test_expert_maps_show_every_layer_and_expert(tmp_path: Path) -> None:
    run = plots.read_run(write_run(tmp_path / "gpt"))
    images = [np.asarray(axes.images[0].get_array()) for axes in plots.experts([run]).axes if axes.images]
    over_time, last = images
    assert over_time.shape == (2, 12)
    np.testing.assert_allclose(last, [[0.5, 1.0, 1.5], [1, 1, 1]])
    np.testing.assert_allclose(over_time[:, -1], [1.5, 1.0])


def test_a_run_without_experts_or_checkpoints_says_so(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log({"train/step": 1, "train/loss": 2.0})
    sink.close()
    run = plots.read_run(tmp_path)
    for draw in (plots.throughput, plots.experts, plots.checkpoints):
        assert texts(draw([run])).count("nothing recorded") == 2
    assert "nothing recorded" not in texts(plots.loss([run]))
    assert len(plots.write_plots([run], tmp_path / "out")) == 4


def test_the_heat_map_of_a_snapshot_names_its_layers() -> None:
    axes = plots.heat_map(Snapshot(30, np.array([[0, 8], [4, 4]]), BANKS)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block 0", "block 1"]
    assert [text.get_text() for text in axes.texts] == ["0.00", "2.00", "1.00", "1.00"]
    assert "30" in axes.get_title()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(1, 8))
def test_smoothing_stays_within_what_it_smooths_and_keeps_both_ends(values: list[float], radius: int) -> None:
    smoothed = plots.smooth(values, radius)
    assert len(smoothed) == len(values)
    assert (smoothed[0], smoothed[-1]) == (values[0], values[-1])
    assert min(values) - 1e-6 <= min(smoothed) and max(smoothed) <= max(values) + 1e-6


def test_smoothing_does_not_lag_behind_a_straight_line_and_skips_nan() -> None:
    line = [float(value) for value in range(100)]
    assert plots.smooth(line, 5) == pytest.approx(line)
    assert plots.smooth([1.0, float("nan"), 3.0], 1) == [1.0, 2.0, 3.0]
