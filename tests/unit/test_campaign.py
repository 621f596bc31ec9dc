"""Campaigns of runs: what is finished is kept, what failed or was stopped leaves neither a half result nor a process."""

import os
import signal
import sys
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


def stop_politely_or_fail(case: tuple[str, Path], folder: Path) -> dict:
    """One waits and ends at SIGTERM with an error, as training does: its worker lives on. The other fails once that one waits."""
    what, news = case
    if what == "fail":
        raise ValueError(news.read_text())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    news.write_text("it waits")
    signal.pause()
    return {}


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


def test_a_worker_whose_run_was_stopped_begins_no_other(tmp_path):
    os.mkfifo(tmp_path / "news")
    cases = {name: (name, tmp_path / "news") for name in ("wait", "fail", "wait again", "and again")}
    with pytest.raises(ValueError, match="it waits"):
        list(Campaign(tmp_path / "results", [], 2).run(stop_politely_or_fail, cases))
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["fail.run", "wait.run"]
