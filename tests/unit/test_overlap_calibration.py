"""How tools/bench_overlap.py finds the width that a point needs, on a machine whose times are known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools import bench_overlap, overlap_figures
from tools.bench_overlap import AIMS, calibrated, figures_of
from tools.overlap_cases import EXCHANGE, NULL, POINTS, REST, SCMOE, SERIAL, TOP_2, Run
from tools.overlap_rank import Job

ATTENTION = 0.05  # seconds of a lap that do not grow with the FFN


def both(seconds: float) -> dict[str, list[float]]:
    """One round, half of it forward."""
    return {"forward": [seconds / 2], "backward": [seconds / 2]}


def machine(job: Job, second_per_width: float, exchange: float) -> list[dict]:
    """What its ranks find: top-2 exchanges for twice as long as ScMoE, and its experts take `second_per_width` a unit of width."""
    ffn = job.size.ffn * second_per_width
    laps = {
        Run(TOP_2, SERIAL).name: ATTENTION + ffn + 0.02 + 2 * exchange,
        Run(TOP_2, REST).name: ATTENTION,
        Run(TOP_2, EXCHANGE).name: 2 * exchange,
        Run(SCMOE, SERIAL, (3,)).name: ATTENTION + ffn + exchange,
        Run(SCMOE, NULL, (3,)).name: ATTENTION + ffn,
        Run(SCMOE, EXCHANGE).name: exchange,
    }
    parts = {part: {"main": (ATTENTION + ffn) / 2, "experts": ffn / 4} for part in ("forward", "backward")}
    return [{"laps": {name: both(seconds) for name, seconds in laps.items()}, "window": {SCMOE: parts}}] * 2


@pytest.mark.parametrize("second_per_width", [2e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("point", ["60", "75", "15", "window"])
def test_the_width_is_the_one_that_the_point_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, second_per_width: float
) -> None:
    trials = []

    def run(hosts: object, job: Job, folder: Path) -> list[dict]:
        assert folder.is_dir() and job.folder == str(folder) and job.evenly
        trials.append(job.part)
        return machine(job, second_per_width, 0.4)

    monkeypatch.setattr(bench_overlap, "run_job", run)
    its = POINTS[point]
    job = Job("opponents", str(tmp_path), 5, evenly=False, size=its.size, small=False)
    hosts: Any = None
    found = machine(replace(job, size=calibrated(hosts, job, its, tmp_path)), second_per_width, 0.4)
    part, wanted = ("share", its.share) if its.share else ("window", 2.0)
    got = AIMS[part].measured(found)
    assert set(trials) == {part} and len(trials) <= 3
    assert got == pytest.approx(wanted, abs=AIMS[part].error)
    table = "\n".join(overlap_figures.lines(found, figures_of(part, found)))
    assert f"{got:.0%}" in table if part == "share" else f"{got:.2f} times the window" in table
