"""One step after the other, recorded where the plan or a profile asks for it. Between steps the link is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from moetrain.dist.mesh import Axis
from moetrain.model.context import Timer, untimed
from moetrain.parallel.planner import OverlapPlanner
from moetrain.parallel.timing import Recorder
from moetrain.telemetry.lanes import Lanes


class StepObserver:
    """Every rank makes the same calls: forward and backward of a step inside `step`, then `finish`."""

    def __init__(self, planner: OverlapPlanner, axis: Axis) -> None:
        self.planner, self.axis = planner, axis
        self._asked: bool | None = None  # serial?
        self._recorder: Recorder | None = None

    def ask(self, serial: bool) -> None:
        """The lanes of the next step are wanted. A measurement for the plan waits until nobody asks."""
        self._asked = serial

    @contextmanager
    def step(self) -> Iterator[Timer]:
        """The timer of the step's forward passes."""
        link = self.axis.link
        link.take()  # of evaluation and samples
        measures = self._asked is None and self.axis.size > 1 and self.planner.begin()
        if self._asked is None and not measures:
            yield untimed
            return
        transport = link.transport
        link.transport = self._recorder = Recorder(transport, self.axis.world.device, self._asked is not False)
        try:
            yield self._recorder
        finally:
            link.transport = transport

    def waited_seconds(self) -> float:
        """How long this rank waited for exchanges since the step began. On a GPU the device waits, which is not seen here."""
        return sum(traffic.waited_seconds for traffic in self.axis.link.take().values())

    def finish(self, waited_share: float) -> Lanes | None:
        """Lets the planner learn; a collective after a step that it measured. Returns the lanes if they were asked for.

        waited_share: of the time of all ranks, what they waited for exchanges; the same number on every rank.
        """
        recorder, self._recorder, asked, self._asked = self._recorder, None, self._asked, None
        if recorder is None:
            self.planner.watch(waited_share)
            return None
        if asked is not None:
            return recorder.lanes()
        self.planner.learn(recorder.lanes())
        return None
