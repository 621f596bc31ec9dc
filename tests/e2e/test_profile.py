"""Profiles of a real job of two ranks: what exchanges cost, and the lanes of a step as a picture and in a trace."""

import json
from pathlib import Path

import pytest

from moetrain import cli
from tests.e2e.jobs import records, small_run, train_forked


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_exchanges_are_accounted_for_and_drawn(corpora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    comm = ["profile=comm", "profile.start_step=2", "profile.num_steps=2"]
    said = train_forked(2, small_run(corpora[0], run, 10, *comm), tmp_path / "log")
    assert "of exchanges are hidden" in said and "Measured 2 blocks (mlp, attention, shared)" in said
    waited = [record["perf/exchange_wait_seconds"] for record in records(run) if "train/loss" in record]
    assert len(waited) == 10 and all(isinstance(its, float) and its >= 0 for its in waited)
    for rank in (0, 1):
        facts = json.loads((run / "trace" / f"comm-rank{rank}.json").read_text())
        rows = {one["name"]: one for one in facts["exchanges"]}
        to, back = rows["rows to experts"], rows["gradient of rows to experts"]
        assert to["times"] == back["times"] == 2  # two pairs, one micro-batch
        assert to["bytes"] > 0 and to["alone_seconds"] > 0
    assert cli.main(["plot", str(run)]) == 0
    assert (run / "plots" / "lanes.png").is_file() and "lanes.png" in capsys.readouterr().out


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_a_trace_holds_the_lanes_of_its_steps(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    trace = ["profile=trace", "profile.start_step=2", "profile.num_steps=2"]
    train_forked(2, small_run(corpora[0], run, 4, *trace), tmp_path / "log")
    events = json.loads((run / "trace" / "rank1.json").read_text())["traceEvents"]
    (pid,) = {event["pid"] for event in events if event.get("args", {}).get("name") == "moetrain lanes"}
    lanes = [event for event in events if event.get("pid") == pid and event["ph"] == "X"]
    marks = {event["name"]: event for event in events if event.get("cat") == "user_annotation" and "/mlp" in event["name"]}
    assert sum(event["name"] == "rows to experts" and event["tid"] == 2 for event in lanes) == 4  # two pairs, two steps
    for name, mark in marks.items():  # the same step on the same clock; a second is generous to a busy machine
        span = [event for event in lanes if event["name"] == name][-1]
        assert abs(span["ts"] - mark["ts"]) < 1e6
