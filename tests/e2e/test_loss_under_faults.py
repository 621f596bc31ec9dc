"""A tiny campaign of faults: what is lost costs, what is kept in full costs nothing, and a finished run is not made again."""

import json
from pathlib import Path

from tests.e2e.jobs import SMALL
from tools.loss_under_faults import main


def run(folder: Path, corpus: Path) -> dict[str, dict]:
    smaller = [*SMALL, f"data.corpora.0.path={corpus}", "train.global_batch_tokens=1024"]
    size = ["--modes", "full", "experts", "--seeds", "1", "2", "--steps", "12", "--every", "2", "--faults", "2", "--jobs", "1"]
    main([*size, "--folder", str(folder), "--json", str(folder / "all.json"), "--png", str(folder / "all.png"), "--", *smaller])
    return {row["mode"]: row for row in json.loads((folder / "all.json").read_text())["runs"] if row["seed"] == 1}


def test_full_checkpoints_lose_nothing_and_partial_ones_what_they_say(tmp_path, corpus):
    found = run(tmp_path, corpus)
    assert list(found) == ["none", "full", "experts"]
    assert found["full"]["loss"] == found["none"]["loss"], "bit for bit"
    assert found["experts"]["loss"] != found["none"]["loss"]
    assert found["experts"]["plt_weights"] > 0
    assert found["experts"]["faults"] == found["full"]["faults"] == 2
    assert (tmp_path / "all.png").stat().st_size > 10_000

    seconds = {mode: row["seconds"] for mode, row in found.items()}
    (tmp_path / "experts-1.json").unlink()
    again = run(tmp_path, corpus)
    assert [again[mode]["seconds"] == seconds[mode] for mode in ("none", "full")] == [True, True], "kept"
    assert again["experts"]["loss"] == found["experts"]["loss"]
