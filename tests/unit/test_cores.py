"""What a rank may use beside training."""

import pytest

from moetrain.base import cores


@pytest.mark.parametrize(
    ("usable", "ranks", "expected"), [(8, "2", 4), (8, "3", 2), (2, "8", 1), (6, None, 6), (6, "0", 6), (6, "many", 6)]
)
def test_the_ranks_of_a_node_divide_its_cores(monkeypatch, usable, ranks, expected):
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert cores.cores_of_rank() == expected
