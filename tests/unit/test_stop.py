"""Signals and the STOP file, in one process; over ranks see tests/dist/test_world.py."""

import os
import signal
from pathlib import Path

import pytest
import torch

from moetrain.dist.stop import Stop
from moetrain.dist.world import World

WORLD = World.single(torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_sets_a_flag_that_stays(tmp_path: Path, number: signal.Signals) -> None:
    with Stop(WORLD, tmp_path / "STOP") as stop:
        assert stop.agreed() is None
        signal.raise_signal(number)
        assert stop.agreed() == number.name
        assert stop.agreed() == number.name


def test_the_stop_file_is_a_reason_once(tmp_path: Path) -> None:
    file = tmp_path / "STOP"
    with Stop(WORLD, file) as stop:
        file.touch()
        assert stop.agreed() == "the file STOP"
        assert not file.exists()
        assert stop.agreed() is None


def test_handlers_are_restored_on_close(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stop = Stop(WORLD, tmp_path / "STOP")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] != before
    stop.close()
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_forked_child_still_dies_of_a_signal(tmp_path: Path) -> None:
    with Stop(WORLD, tmp_path / "STOP") as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)  # reached only when the signal was swallowed
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert stop.agreed() is None


def test_the_first_interrupt_waits_for_the_step_boundary_and_the_second_does_not(tmp_path: Path) -> None:
    with Stop(World.single(torch.device("cpu")), tmp_path / "STOP") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
