"""Ranks with different settings are told before anything waits."""

from pathlib import Path

import pytest

from moetrain.base.errors import TrainingError
from moetrain.dist.same import flat, require_same
from moetrain.dist.world import World
from tests.kit import run_ranks

pytestmark = pytest.mark.dist


def compared(world: World) -> str:
    require_same(world, {"a": 1, "b": [1, 2]})
    try:
        require_same(world, flat({"engine": {"dtype": "float32", "autocast": "off" if world.rank == 2 else "auto"}, "ep": world.rank}))
    except TrainingError as error:
        return error.message
    return ""


def test_every_rank_hears_which_setting_differs(tmp_path: Path) -> None:
    assert run_ranks(compared, 3, tmp_path) == ["Ranks 0 and 1 were given different settings: ep is 0 on rank 0 and 1 on rank 1."] * 3


def test_nested_settings_have_dotted_keys() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
    require_same(World.single(), {"alone": True})
