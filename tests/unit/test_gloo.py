"""Which threads are made polite, by a folder of made-up threads. What gloo's own threads become: tests/dist/test_world.py."""

import os
from pathlib import Path

import pytest

from moetrain.dist import gloo

OWN = {os.getpid(): "python", 2: "python", 3: "gloo_tcp_loop"}  # 3: of a group that was made before


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Of the threads that are not ordinary ones; thread 13 is another's, 14 somebody wanted as it is."""
    found = {14: os.SCHED_FIFO}

    def choose(thread: int, policy: int, parameters: os.sched_param) -> None:
        if thread == 13:
            raise PermissionError
        found[thread] = policy

    monkeypatch.setattr(os, "sched_getscheduler", lambda thread: found.get(thread, os.SCHED_OTHER))
    monkeypatch.setattr(os, "sched_setscheduler", choose)
    return found


@pytest.mark.parametrize(
    ("made", "polite"),
    [
        ({11: "gloo_tcp_loop", 12: "pt_gloo_runloop", 13: "gloo_tcp_loop", 14: "gloo_tcp_loop", 15: "python"}, {11}),
        ({11: "python", 12: "pt_gloo_runloop", 13: "python", 16: "pt_nccl_watchdg"}, {11}),  # of torch 2.11, perhaps
        ({}, set()),
    ],
)
def test_loops_of_new_groups_are_made_polite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: dict[int, int], made: dict[int, str], polite: set[int]
) -> None:
    monkeypatch.setattr(gloo, "_TASKS", tmp_path)

    def begin(threads: dict[int, str]) -> None:
        for thread, name in threads.items():
            (tmp_path / str(thread)).mkdir()
            (tmp_path / str(thread) / "comm").write_text(name + "\n")

    begin(OWN)
    with gloo.polite_loops():
        begin(made)
    assert policies == {14: os.SCHED_FIFO, **dict.fromkeys(polite, os.SCHED_BATCH)}


def test_where_threads_cannot_be_seen_groups_are_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: dict[int, int]
) -> None:
    monkeypatch.setattr(gloo, "_TASKS", tmp_path / "none")
    with gloo.polite_loops():
        pass
    assert policies == {14: os.SCHED_FIFO}
