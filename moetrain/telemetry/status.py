"""What a run looks like now, put together from its records, and the words for it. Pure: the clock's readings are arguments."""

import math
from collections import deque

import numpy as np

from moetrain.telemetry.format import duration, quantity, share, size
from moetrain.telemetry.record import Record

_WINDOW = 50  # records over which the time left is estimated
_HISTORY = 400  # losses kept for the sparkline


class RunStatus:
    """Latest value of every metric, recent losses and the pace. The texts are shared by the live panel and the plain lines."""

    def __init__(self, name: str, total_steps: int, started: float) -> None:
        self.name = name
        self.total_steps = total_steps
        self.started = started  # monotonic seconds
        self.latest: Record = {}
        self.losses: deque[float] = deque(maxlen=_HISTORY)
        self.load_LE: np.ndarray | None = None
        self._pace: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._evaluated_at = self._committed_at = -1

    def update(self, record: Record, now: float) -> None:
        """Takes one record in; `now` in monotonic seconds."""
        self.latest |= record
        step = self.step
        if "train/loss" in record:
            self.losses.append(self.number("train/loss"))
            self._pace.append((now, step))
        if "evaluation/loss" in record:
            self._evaluated_at = step
        if "checkpoint/seq" in record:
            self._committed_at = int(self.number("checkpoint/step")) if "checkpoint/step" in record else step
        if record.get("event") in ("start", "resume"):
            self._pace.append((now, step))

    def number(self, key: str) -> float:
        """Latest value of a metric, nan before the first."""
        value = self.latest.get(key, math.nan)
        return float(value) if isinstance(value, int | float) else math.nan

    @property
    def step(self) -> int:
        value = self.latest.get("train/step", 0)
        return value if isinstance(value, int) else 0

    @property
    def fraction(self) -> float:
        """Part of the run that is done, 0..1."""
        return min(self.step / self.total_steps, 1.0) if self.total_steps else 0.0

    def seconds_left(self, now: float) -> float:
        """By the pace of the last records, everything that happened between them included; nan before the second.

        Counts down between records.
        """
        if len(self._pace) < 2:
            return math.nan
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        if last <= first:
            return math.nan
        left = (self.total_steps - last) * (end - start) / (last - first)
        return max(left - (now - end), 0.0)

    def progress_text(self, now: float) -> str:
        left = self.seconds_left(now)
        text = f"step {self.step}/{self.total_steps} ({share(self.fraction)})"
        return text if math.isnan(left) else f"{text}, {duration(left)} left"

    def loss_text(self) -> str:
        return f"{self.number('train/loss'):.3f}, lr {self.number('train/lr'):.2e}, gradient norm {self.number('train/grad_norm'):.2f}"

    def speed_text(self) -> str:
        rate, memory = self.number("perf/tokens_per_second"), self.number("perf/peak_memory_bytes")
        seconds, mfu = self.number("perf/step_seconds"), self.number("perf/mfu")
        return f"{quantity(rate)} tokens/s, {duration(seconds)} per step, MFU {share(mfu)}, memory {size(memory)}"

    def experts_text(self) -> str:
        """Empty for a model without experts."""
        if "moe/load_max_over_mean" not in self.latest:
            return ""
        return (
            f"load max/mean {self.number('moe/load_max_over_mean'):.2f}, entropy {self.number('moe/load_entropy'):.3f}, "
            f"dead {self.number('moe/dead_experts'):.0f}, dropped {share(self.number('moe/dropped_fraction'))}"
        )

    def checkpoint_text(self) -> str:
        """Last commit, oldest expert, what is being written, failures."""
        parts = []
        if "checkpoint/seq" in self.latest:
            parts.append(f"#{self.number('checkpoint/seq'):.0f} at step {self._committed_at}")
            if "checkpoint/bytes" in self.latest:  # not yet after a resume
                parts.append(f"{size(self.number('checkpoint/bytes'))} in {duration(self.number('checkpoint/seconds'))}")
            oldest = self.number("checkpoint/oldest_expert_steps")
            if math.isfinite(oldest):
                parts.append(f"oldest expert {oldest:.0f} steps")
        else:
            parts.append("none yet")
        if self.number("checkpoint/pending") > 0:
            parts.append("writing")
        if self.number("checkpoint/failures") > 0:
            parts.append(f"{self.number('checkpoint/failures'):.0f} failed")
        return ", ".join(parts)

    def evaluation_text(self) -> str:
        if self._evaluated_at < 0:
            return "none yet"
        bits = self.number("evaluation/bits_per_byte")
        text = f"loss {self.number('evaluation/loss'):.3f}"
        return text + (f", {bits:.3f} bits per byte" if math.isfinite(bits) else "") + f" at step {self._evaluated_at}"

    def line(self, record: Record, now: float) -> str:
        """One plain line for `record`, which `update` has taken in."""
        if "train/loss" in record:
            parts = [self.progress_text(now), f"loss: {self.loss_text()}", f"speed: {self.speed_text()}"]
            if experts := self.experts_text():
                parts.append(f"experts: {experts}")
            return " | ".join([*parts, f"checkpoint: {self.checkpoint_text()}", f"evaluation: {self.evaluation_text()}"])
        at = f"step {self.step}"
        if "evaluation/loss" in record:
            return f"{at} | evaluation: {self.evaluation_text()}"
        if "sample/text" in record:
            return f"{at} | sample: {record.get('sample/prompt', '')!r} -> {record['sample/text']!r}"
        if any(key.startswith("checkpoint/") for key in record) and "event" not in record:
            return f"{at} | checkpoint: {self.checkpoint_text()}"
        rest = ", ".join(f"{key} {value}" for key, value in record.items() if "/" not in key)
        return f"{at} | {rest}"
