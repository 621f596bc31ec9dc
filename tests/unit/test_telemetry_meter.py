"""The meter: intervals, rates on a fake clock, balance."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moetrain.base.clock import SystemClock
from moetrain.telemetry.meter import Meter, peak_memory_bytes
from moetrain.telemetry.probe import known_gpu, matmul_flops, peak_flops
from tests.clock import FakeClock


@dataclass
class Step:
    loss: float = 2.0
    auxiliary_loss: float = 1.0
    z_loss: float = 0.5
    grad_norm: float = 3.0
    lr: float = 0.1
    num_tokens: int = 100
    load: Tensor = field(default_factory=lambda: torch.tensor([[2, 2], [4, 0]]))
    num_dropped: int = 1
    num_pairs: int = 10
    seconds: float = 0.75
    waited_seconds: float = 0.25


def meter(clock: FakeClock) -> Meter:
    return Meter(clock, flops_per_token=10.0, peak_flops=1000.0, peak_memory=lambda: 77)


def test_one_step_is_recorded_as_it_was() -> None:
    clock = FakeClock(50.0)
    under_test = meter(clock)
    clock.time += 4
    under_test.add(Step())
    record, load_LE = under_test.record(7, 700)
    assert record == {
        "train/step": 7,
        "train/tokens": 700,
        "train/loss": 2.0,
        "train/lr": 0.1,
        "train/grad_norm": 3.0,
        "perf/tokens_per_second": 25.0,
        "perf/mfu": 0.25,
        "perf/peak_memory_bytes": 77,
        "perf/step_seconds": 0.75,
        "perf/exchange_wait_seconds": 0.25,
        "moe/auxiliary_loss": 1.0,
        "moe/z_loss": 0.5,
        "moe/load_max_over_mean": 1.5,
        "moe/load_entropy": pytest.approx(0.5),
        "moe/dead_experts": 1,
        "moe/dropped_fraction": 0.1,
    }
    assert load_LE.tolist() == [[2, 2], [4, 0]]


def test_an_interval_is_averaged_by_tokens_and_its_load_is_summed() -> None:
    clock = FakeClock(50.0)
    under_test = meter(clock)
    under_test.add(Step(loss=1.0, num_tokens=300, lr=0.1, grad_norm=1.0))
    under_test.add(Step(loss=5.0, num_tokens=100, lr=0.2, grad_norm=9.0, num_dropped=5, seconds=0.25))
    clock.time += 8
    record, load_LE = under_test.record(2, 400)
    assert record["train/loss"] == 2.0
    assert (record["train/lr"], record["train/grad_norm"]) == (0.2, 9.0)
    assert (record["perf/tokens_per_second"], record["perf/step_seconds"]) == (50.0, 0.5)
    assert record["moe/dropped_fraction"] == pytest.approx(6 / 20)
    assert load_LE.tolist() == [[4, 4], [8, 0]]


def test_records_start_new_intervals() -> None:
    clock = FakeClock(50.0)
    under_test = meter(clock)
    for loss in (9.0, 1.0):
        clock.time += 2
        under_test.add(Step(loss=loss))
        record, load_LE = under_test.record(1, 1)
        assert (record["train/loss"], record["perf/tokens_per_second"]) == (loss, 50.0)
        assert load_LE.sum() == 8
        assert under_test.num_steps == 0


def test_paused_time_and_time_before_a_restart_do_not_count() -> None:
    clock = FakeClock(50.0)
    under_test = meter(clock)
    clock.time += 100
    under_test.restart()
    clock.time += 2
    with under_test.paused():
        clock.time += 50
    under_test.add(Step())
    assert under_test.record(1, 1)[0]["perf/tokens_per_second"] == 50.0


def test_a_step_without_valid_tokens_is_not_averaged_to_zero() -> None:
    clock = FakeClock(50.0)
    under_test = meter(clock)
    clock.time += 1
    under_test.add(Step(loss=0.0, num_tokens=0))
    under_test.add(Step(loss=3.0, num_tokens=10))
    assert under_test.record(1, 1)[0]["train/loss"] == 3.0


def test_a_dense_model_has_no_expert_metrics() -> None:
    clock = FakeClock(50.0)
    under_test = meter(clock)
    clock.time += 1
    under_test.add(Step(load=torch.zeros(0, 8, dtype=torch.int64)))
    record, load_LE = under_test.record(1, 1)
    assert not [key for key in record if key.startswith("moe/")]
    assert load_LE.size == 0


def test_adding_leaves_the_results_load_alone() -> None:
    under_test, first = meter(FakeClock(50.0)), Step()
    under_test.add(first)
    under_test.add(Step())
    assert first.load.tolist() == [[2, 2], [4, 0]]


def test_resident_memory_is_bytes_of_this_process() -> None:
    assert 10**7 < peak_memory_bytes(torch.device("cpu"))() < 10**12


def test_matmul_probe_takes_the_best_repeat_of_the_clock() -> None:
    class Ticks(FakeClock):
        seconds = iter([0.0, 4.0, 10.0, 11.0])  # two repeats: 4 s and 1 s

        def monotonic(self) -> float:
            return next(self.seconds)

    assert matmul_flops(torch.device("cpu"), torch.float32, Ticks(), size=10, repeats=2) == 2 * 10**3 / 1.0


def test_a_cpu_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32, SystemClock()) > 1e8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("Some Card", None),
    ],
)
def test_known_gpus_have_their_data_sheet_peak(name: str, peak: float | None) -> None:
    assert known_gpu(name) == peak
