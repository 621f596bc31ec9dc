"""One step after the other, recorded or timed where the plan or a profile asks for it. Between steps the link is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moetrain.base.clock import Clock
from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Stall
from moetrain.model.context import Timer, untimed
from moetrain.parallel.planner import OverlapPlanner, Role
from moetrain.parallel.timing import Recorder, Stopwatch, stopwatch
from moetrain.telemetry.lanes import Lanes


class StepObserver:
    """Every rank makes the same calls: forward and backward of a step inside `step`, then `finish`."""

    def __init__(self, planner: OverlapPlanner, axis: Axis, clock: Clock | None = None) -> None:
        self.planner, self.axis, self._clock = planner, axis, clock
        self._asked: bool | None = None  # serial?
        self._recorder: Recorder | None = None
        self._stopwatch: Stopwatch | None = None  # of a step that is tried
        self._stalls: list[Stall] | None = None  # of the last step, on a GPU

    def ask(self, serial: bool) -> None:
        """The lanes of the next step are wanted. A measurement or a trial for the plan waits until nobody asks."""
        self._asked = serial

    @property
    def needs_the_link(self) -> bool:
        """Whether the step under way is recorded: nothing but exchanges may travel until its last backward pass has ended."""
        return self._recorder is not None

    @contextmanager
    def step(self) -> Iterator[Timer]:
        """The timer of the step's forward passes."""
        link = self.axis.link
        link.take()  # of evaluation and samples
        link.stalls = [] if self.axis.world.device.type == "cuda" else None
        try:
            with self._in_role() as timer:
                yield timer
        finally:
            self._stalls, link.stalls = link.stalls, None

    @contextmanager
    def _in_role(self) -> Iterator[Timer]:
        is_asked = self._asked is not None
        role = Role.WATCHED if is_asked or self.axis.size == 1 else self.planner.begin()
        if is_asked or role is Role.MEASURED:
            with self._recorded(serial=self._asked is not False) as recorder:
                yield recorder
        elif role is Role.TRIED:
            self._stopwatch = stopwatch(self.axis.world.device, self._clock)
            self._stopwatch.take()
            yield untimed
            self._stopwatch.take()
        else:
            yield untimed

    @contextmanager
    def _recorded(self, serial: bool) -> Iterator[Recorder]:
        link = self.axis.link
        transport = link.transport
        link.transport = self._recorder = Recorder(transport, self.axis.world.device, serial, self._clock)
        try:
            yield self._recorder
        finally:
            link.transport = transport

    def waited_seconds(self) -> float:
        """How long this rank waited for exchanges since the step began; the passes have ended when it returns, on a GPU too.

        On a GPU, where the host goes on, what counts is how long the device's stream stood still.
        """
        of_host = sum(traffic.waited_seconds for traffic in self.axis.link.take().values())
        if self._stalls is None:
            return of_host
        torch.cuda.current_stream(self.axis.world.device).synchronize()
        return sum(stall.seconds() for stall in self._stalls)

    def finish(self, waited_share: float) -> Lanes | None:
        """Lets the planner learn; a collective after a step that it measured or tried. Returns the lanes if they were asked for.

        waited_share: of the time of all ranks, what they waited for exchanges; the same number on every rank.
        """
        recorder, self._recorder, asked, self._asked = self._recorder, None, self._asked, None
        tried, self._stopwatch = self._stopwatch, None
        if recorder is not None and asked is not None:
            return recorder.lanes()
        if recorder is not None:
            self.planner.learn(recorder.lanes())
        elif tried is not None:
            self.planner.compare(tried.seconds()[-1])
        else:
            self.planner.watch(waited_share)
        return None
