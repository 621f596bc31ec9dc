"""What exchanges cost, from lanes of serial and overlapped steps; files that are read back; traces that carry the lanes."""

import json
from pathlib import Path

import pytest

from moetrain.base.errors import MoetrainError
from moetrain.base.log import logger
from moetrain.telemetry.comm import CommProfiler, comm_profile
from moetrain.telemetry.config import ProfileConfig
from moetrain.telemetry.lane_plot import lanes_figure, operator_colors
from moetrain.telemetry.lanes import Computation, Journey, Lanes, lanes_file, load_lanes, read_lanes, write_lanes
from moetrain.telemetry.profile import add_lanes


def lanes(serial: bool, waited: float = 0.0, num_bytes: int = 1000) -> Lanes:
    """An exchange of two seconds each way beside one operator of three."""
    computations = [Computation("b/mlp", 2.0, 5.0), Computation("gradient of b/mlp", 7.0, 13.0)]
    journeys = [
        Journey("rows to experts", num_bytes, 0.0, 0.0, 2.0, 5.0, 5.0 + waited),
        Journey("gradient of rows to experts", num_bytes, 7.0, 7.5, 9.5, 13.0, 13.0 + waited),
    ]
    return Lanes(serial, computations, journeys)


def test_hidden_share_is_what_overlapped_steps_do_not_take() -> None:
    """Three of four seconds by the steps, although the exchanges were waited for only half a second: computation got slower. The half
    second in which ranks came together before an exchange of the serial step was never to be hidden.
    """
    found = comm_profile([(20.5, lanes(True)), (17.0, lanes(False, 0.25)), (20.5, lanes(True)), (17.0, lanes(False, 0.25))])
    assert (found.serial_seconds, found.overlapped_seconds, found.alone_seconds) == (20.0, 17.0, 4.0)
    assert found.hidden == 0.75
    forward, backward = found.costs
    assert (forward.name, forward.times, forward.num_bytes, forward.alone_seconds, forward.waited_seconds) == (
        "rows to experts", 1, 1000, 2.0, 0.25,
    )  # fmt: skip
    assert backward.unwaited == 0.875
    assert "75.0 %" in found.lines()[-1] and "87.5 %" in found.lines()[1]


def test_one_slow_step_does_not_move_the_medians() -> None:
    seconds = (20.5, 17.0, 90.0, 80.0, 20.5, 17.0)
    steps = [(its, lanes(serial=number % 2 == 0)) for number, its in enumerate(seconds)]
    assert comm_profile(steps).hidden == 0.75


def test_steps_are_asked_for_in_pairs_and_written(tmp_path: Path) -> None:
    profiler = CommProfiler(ProfileConfig(what="comm", start_step=3, num_steps=2), tmp_path, rank=1)
    asked = [profiler.asks(step) for step in range(1, 9)]
    assert asked == [None, None, True, False, True, False, None, None]
    for step in range(1, 9):
        serial = profiler.asks(step)
        profiler.after(step, 20.5 if serial else 17.0, None if serial is None else lanes(serial))
    profiler.stop()
    facts = json.loads((tmp_path / "trace" / "comm-rank1.json").read_text())
    assert facts["hidden"] == 0.75 and [one["bytes"] for one in facts["exchanges"]] == [1000, 1000]
    assert [(step, its.serial) for step, its in load_lanes(tmp_path)] == [(5, True), (6, False)]


def test_half_a_pair_or_no_exchange_writes_nothing_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger(), "propagate", True)
    config = ProfileConfig(what="comm", start_step=1, num_steps=1)
    half, alone = CommProfiler(config, tmp_path, 0), CommProfiler(config, tmp_path, 0)
    half.after(1, 20.0, lanes(True))
    half.stop()
    half.stop()
    for step, serial in ((1, True), (2, False)):
        alone.after(step, 1.0, Lanes(serial, lanes(True).computations, []))
    assert not list(tmp_path.iterdir())
    first, second = [record.message for record in caplog.records]
    assert "ended between" in first and "all on this rank" in second


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "trace").touch()
    profiler = CommProfiler(ProfileConfig(what="comm", start_step=1, num_steps=1), tmp_path, 0)
    profiler.after(1, 20.0, lanes(True))
    profiler.after(2, 17.0, lanes(False))
    assert (tmp_path / "trace").is_file()


def test_lanes_are_read_back_as_they_were(tmp_path: Path) -> None:
    file = lanes_file(tmp_path, 0, serial=False)
    write_lanes(file, lanes(False, 0.5), 12)
    step, found = read_lanes(file)
    assert step == 12 and not found.serial
    for one, other in ((found.computations, lanes(False, 0.5).computations), (found.journeys, lanes(False, 0.5).journeys)):
        for its, expected in zip(one, other, strict=True):
            assert vars(its) == pytest.approx(vars(expected))


@pytest.mark.parametrize("text", ["", "{}", '{"traceEvents": [{"ph": "X"}]}', "[]"])
def test_a_file_that_holds_no_lanes_is_said(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lanes.json"
    file.write_text(text)
    with pytest.raises(MoetrainError, match="no lanes"):
        read_lanes(file)


def test_the_lowest_rank_is_shown(tmp_path: Path) -> None:
    for rank in (10, 2):
        write_lanes(lanes_file(tmp_path, rank, serial=False), lanes(False), rank)
    assert [step for step, _ in load_lanes(tmp_path)] == [2]
    assert load_lanes(tmp_path / "elsewhere") == []


def test_lanes_stand_in_the_trace_where_their_step_ran() -> None:
    """Two steps of one forward computation each, named in the trace at 1 s and 100 s; lanes begin two seconds before it."""
    marks = [{"cat": "user_annotation", "name": "b/mlp", "ts": at * 1e6} for at in (100.0, 10.0)]
    events = [*marks, {"cat": "cpu_op", "name": "b/mlp", "ts": 0.0}, {"name": "no category"}]
    add_lanes(events, [lanes(False), lanes(False)])
    exchanges = [event["ts"] / 1e6 for event in events if event.get("name") == "rows to experts" and event.get("tid") == 2]
    assert exchanges == pytest.approx([8.0, 98.0])


def test_the_picture_has_a_row_per_step_and_a_color_per_operator() -> None:
    steps = [(5, lanes(True)), (6, lanes(False, 0.5))]
    figure = lanes_figure("run", steps)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "step 5, every exchange waited for at once", "step 6, overlapped: 1000.0 ms waited",
    ]  # fmt: skip
    assert list(operator_colors(steps)) == ["mlp"]
    assert [len(axes.collections) for axes in figure.axes] == [5, 5]  # two computations, two exchanges, the waits
