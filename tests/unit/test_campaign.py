"""Campaigns of runs: what is finished is kept, what failed or was stopped leaves neither a half result nor a process."""

import os
from pathlib import Path

import pytest

from moetrain.base.errors import MoetrainError
from tools.campaign import Campaign


def doubled(case: int, folder: Path) -> dict:
    assert not list(folder.iterdir()), "an empty folder of its own"
    (folder / "something").write_text("made on the way")
    return {"value": 2 * case}


def wait_for_ever_or_fail(case: tuple[str, Path, Path], folder: Path) -> dict:
    """One says who it is and waits; the other fails once it has heard that."""
    what, news, never = case
    if what == "wait":
        news.write_text(str(os.getpid()))
        never.read_text()
    raise ValueError(news.read_text())


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_finished_is_kept_and_the_rest_made(tmp_path, jobs):
    cases = {"one": 1, "Two, three": 2}
    campaign = Campaign(tmp_path, ["size=3"], jobs)
    torn = campaign.file("one").with_suffix(".run")
    torn.mkdir()
    (torn / "of a run that was killed").touch()
    assert sorted(found["value"] for found in campaign.run(doubled, cases)) == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two-three.json"]
    assert list(campaign.run(doubled, {"one": 50})) == [{"value": 2}], "not made again"
    with pytest.raises(MoetrainError, match="other settings"):
        list(Campaign(tmp_path, ["size=4"], jobs).run(doubled, cases))


def test_a_run_that_fails_ends_the_others_and_leaves_no_process(tmp_path):
    news, never = tmp_path / "news", tmp_path / "never"
    os.mkfifo(news)
    os.mkfifo(never)
    cases = {what: (what, news, never) for what in ("wait", "fail")}
    with pytest.raises(ValueError, match=r"\d+") as failure:
        list(Campaign(tmp_path / "results", [], 2).run(wait_for_ever_or_fail, cases))
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(failure.value)), 0)
    assert not list((tmp_path / "results").glob("*.json"))
