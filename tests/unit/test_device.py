"""Which device a rank gets, by what torch says of the machine."""

import logging

import pytest
import torch

from moetrain.base.errors import TrainingError
from moetrain.base.log import logger
from moetrain.dist.world import local_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(logger(), "propagate", True)


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, ["cpu", "cpu"]), (2, ["cuda:0", "cuda:1"]), (8, ["cuda:0", "cuda:1"])], indirect=["gpus"]
)
@pytest.mark.usefixtures("gpus")
def test_every_rank_has_a_gpu_of_its_own_or_none_has(expected: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert [str(local_device(rank, 2, 2)) for rank in range(2)] == expected
    assert not caplog.records


@pytest.mark.parametrize("gpus", [1], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_too_few_gpus_for_the_ranks_of_one_machine_leave_them_all_on_cpus(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [local_device(rank, 2, 2).type for rank in range(2)] == ["cpu", "cpu"]
    assert [record.getMessage() for record in caplog.records] == [
        "This machine shows fewer GPUs (1) than ranks (2): all ranks train on CPUs. On GPUs: moetrain train --nproc 1 ..."
    ]
    with pytest.raises(TrainingError, match="has no GPU"):
        local_device(1, 4, 2)
