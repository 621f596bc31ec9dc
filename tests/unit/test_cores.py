"""What a rank may use beside training."""

import os

import pytest

from moetrain.base import cores


@pytest.mark.parametrize(
    ("usable", "ranks", "expected"),
    [(8, "2", 4), (8, "3", 2), (8, "16", 1), (8, None, 8), (8, "0", 8), (8, "many", 8), (3, "2", 3), (2, "1", 2)],
)
def test_ranks_divide_a_machine_unless_they_are_bound(monkeypatch, usable, ranks, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert cores.cores_of_rank() == expected
