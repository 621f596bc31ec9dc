"""Adds up steps and turns them into one record: means over the interval, tokens/s, MFU, memory, expert balance."""

import math
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moetrain.base.clock import Clock
from moetrain.telemetry.experts import balance
from moetrain.telemetry.record import Record


class StepNumbers(Protocol):
    """What the meter reads of a step's result; all of it global (summed or averaged over ranks)."""

    loss: float
    auxiliary_loss: float
    z_loss: float
    grad_norm: float
    lr: float
    num_tokens: int  # valid tokens of the global batch
    load: Tensor  # int64 [layers, E]: selected pairs per MoE layer and expert
    num_dropped: int  # pairs
    num_pairs: int
    seconds: float  # of the step itself, without data loading and hooks
    waited_seconds: float  # of it, for exchanges with other ranks


class Meter:
    """Interval sums. Rates are by the wall clock between records, data loading and saving included, evaluation not (`paused`).

    flops_per_token  forward and backward
    peak_flops       FLOP/s of all ranks together; see telemetry/probe.py
    peak_memory      bytes, of this process or its device
    """

    def __init__(self, clock: Clock, flops_per_token: float, peak_flops: float, peak_memory: Callable[[], int]) -> None:
        self.clock = clock
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.peak_memory = peak_memory
        self.restart()

    @property
    def num_steps(self) -> int:
        """Steps since the last record."""
        return len(self._steps)

    def add(self, numbers: StepNumbers) -> None:
        """Counts one step."""
        self._steps.append(numbers)
        load_LE = numbers.load.cpu().numpy()
        self._load_LE = load_LE.copy() if self._load_LE is None else self._load_LE + load_LE

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here counts neither for tokens/s nor for MFU."""
        start = self.clock.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += self.clock.monotonic() - start

    def record(self, step: int, tokens: int) -> tuple[Record, np.ndarray]:
        """The record of the interval that ends with `step`, and its load int64 [layers, E]; then starts a new interval.

        Losses are means over the interval weighted by tokens, seconds are means, gradient norm and lr are the last.
        Needs at least one step.
        """
        steps, load_LE = self._steps, self._load_LE
        assert steps and load_LE is not None
        elapsed = self.clock.monotonic() - self._start - self._paused_seconds
        num_tokens = sum(numbers.num_tokens for numbers in steps)
        rate = num_tokens / elapsed if elapsed > 0 else math.nan

        def mean(values: list[float]) -> float:
            if len(values) == 1:
                return values[0]  # exactly what the step said
            weighted = sum(value * numbers.num_tokens for value, numbers in zip(values, steps, strict=True))
            return weighted / num_tokens if num_tokens else math.nan

        record: Record = {
            "train/step": step,
            "train/tokens": tokens,
            "train/loss": mean([numbers.loss for numbers in steps]),
            "train/lr": steps[-1].lr,
            "train/grad_norm": steps[-1].grad_norm,
            "perf/tokens_per_second": rate,
            "perf/mfu": self.flops_per_token * rate / self.peak_flops,
            "perf/peak_memory_bytes": self.peak_memory(),
            "perf/step_seconds": sum(numbers.seconds for numbers in steps) / len(steps),
            "perf/exchange_wait_seconds": sum(numbers.waited_seconds for numbers in steps) / len(steps),
        }
        if load_LE.size:
            even = balance(load_LE)
            num_pairs = sum(numbers.num_pairs for numbers in steps)
            record |= {
                "moe/auxiliary_loss": mean([numbers.auxiliary_loss for numbers in steps]),
                "moe/z_loss": mean([numbers.z_loss for numbers in steps]),
                "moe/load_max_over_mean": even.max_over_mean,
                "moe/load_entropy": even.entropy,
                "moe/dead_experts": even.dead,
                "moe/dropped_fraction": sum(numbers.num_dropped for numbers in steps) / num_pairs if num_pairs else 0.0,
            }
        self.restart()
        return record, load_LE

    def restart(self) -> None:
        """Starts a new interval now; what was added since the last record is forgotten."""
        self._steps: list[StepNumbers] = []
        self._load_LE: np.ndarray | None = None
        self._paused_seconds = 0.0
        self._start = self.clock.monotonic()


def peak_memory_bytes(device: torch.device) -> Callable[[], int]:
    """Reader of the greatest memory so far: allocated on a GPU, resident set of this process on a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
