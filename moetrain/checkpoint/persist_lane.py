"""The way of a save from the memory of the node to the store, which the agent goes; here one waits for it and learns what became of it.

Thread `checkpoint-persist` runs one save after the other. The memory lane's thread hands them over with `do`; before that it may call
`take_place`, and for a save that never gets here `give_up` and `end`.
"""

from functools import partial
from threading import BoundedSemaphore

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.checkpoint.course import Course, Start
from moetrain.checkpoint.job import Receipt, Reply, SaveJob
from moetrain.checkpoint.lane import Lane
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.node_memory import NodeMemory
from moetrain.checkpoint.pending import Pending
from moetrain.checkpoint.process import AgentDied, AgentLate
from moetrain.checkpoint.status import Standing
from moetrain.checkpoint.turns import Figures, Turns
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.02, 1.0


class PersistLane:
    """Its own state is the places; what is known of the store is the course's."""

    def __init__(
        self, folder: CheckpointFolder, rank: int, clock: Clock, memory: NodeMemory, course: Course, turns: Turns, standing: Standing
    ) -> None:
        self._folder, self._rank, self._clock, self._memory = folder, rank, clock, memory
        self._course, self._turns, self._standing = course, turns, standing
        self._places = BoundedSemaphore(2)  # rank 0: of a save that is being persisted, and of one that waits for it
        self._lane = Lane("checkpoint-persist")
        self._open: dict[SaveId, None] = {}  # handed over, and not at their end
        self._hindrance = ""  # of the last sweep

    def take_place(self) -> bool:
        """Rank 0: whether there was one; it is free again when the save has ended. Never waits."""
        return self._places.acquire(blocking=False)

    def do(self, pending: Pending, job: SaveJob) -> None:
        """After the saves before it; returns at once."""
        self._open[pending.save] = None
        self._lane.do(partial(self._persist, pending, job))

    def open_saves(self) -> list[SaveId]:
        """Those for which the agent holds what is to be written."""
        return list(self._open)

    def give_up(self, pending: Pending, reason: str, is_news: bool) -> None:
        """A save of which this rank brings nothing; the other ranks hear of it through the folder. `is_news`: warns."""
        self._fail(pending, reason, warn=is_news)
        self._refuse(pending.save, reason)

    def end(self, pending: Pending) -> None:
        """The last that happens to a save, in whichever lane."""
        self._open.pop(pending.save, None)
        if self._rank == 0 and pending.order.persists:
            self._course.ended(pending.save)
        if pending.is_queued:
            self._places.release()
        self._standing.ended(pending.seq)
        pending.done.set()

    def _persist(self, pending: Pending, job: SaveJob) -> None:
        try:
            start = Start() if self._rank else self._course.begin(job.save)
            if start.refusal:  # its agent then writes nothing, and without a parent could commit nothing
                self._refuse(job.save, start.refusal)
            self._settle(pending, job, self._answer(job, start), start.ledger)
        except Exception as error:
            pending.error = error
        self.end(pending)

    def _answer(self, job: SaveJob, start: Start) -> Reply:
        try:
            return self._memory.persist(job.save, start.parent, start.ledger, 3 * job.timeout_seconds)
        except AgentDied as died:
            if self._rank or not isinstance(died, AgentLate):  # a late one may be about to commit: then its outcome is the folder's to say
                self._refuse(job.save, str(died))
            return Reply("unknown", f"rank {self._rank}: {died}")

    def _settle(self, pending: Pending, job: SaveJob, reply: Reply, ledger: dict) -> None:
        """Learns from the folder what became of the save."""
        if reply.outcome == "superseded":
            raise CheckpointError(reply.reason, "Stop one of the two jobs, or give them different run names.")
        waits = self._rank > 0 and reply.outcome != "abandoned"  # rank 0 has waited for its agent, which decides
        deadline = self._clock.monotonic() + (3 * job.timeout_seconds if waits else 0.0)
        pause = FIRST_POLL_SECONDS
        while (outcome := self._outcome(job.save)) is None and self._clock.monotonic() < deadline:
            self._clock.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)  # many ranks ask one folder
        pending.committed = reply.outcome == "committed" if outcome is None else outcome
        if pending.committed:
            self._standing.committed(job.save.seq, job.step, reply, self._figures(job, ledger))
            self._tell_of_sweep(reply.swept)
            return
        reason = reply.reason or self._folder.reason(job.save) or "rank 0 did not decide in time."
        self._fail(pending, reason, warn=self._rank == 0 or bool(reply.reason))

    def _outcome(self, save: SaveId) -> bool | None:
        """None also while the folder cannot be read."""
        try:
            return self._folder.outcome(save)
        except OSError:
            return None

    def _tell_of_sweep(self, hindrance: str) -> None:
        """Once, as long as it stays the same: the folder grows meanwhile."""
        if hindrance and hindrance != self._hindrance:
            logger("checkpoint").warning(hindrance)
        self._hindrance = hindrance

    def _figures(self, job: SaveJob, saved: dict) -> Figures:
        ledger = Ledger.of_json(saved, {})
        chosen = list((job.selection or {}).values()) or list(ledger.banks.values())
        counts = [experts if isinstance(experts, int) else len(experts) for experts in chosen]
        return self._turns.figures(ledger, max(counts, default=0))

    def _refuse(self, save: SaveId, reason: str) -> None:
        """Where no agent does: rank 0 says that there is no commit, other ranks hand in an error, so that nobody waits for a limit."""
        try:
            if self._rank == 0:
                self._folder.give_up(save, reason)
            else:
                self._folder.put_receipt(save, self._rank, Receipt(self._rank, 0, None, [], [], reason).to_json())
        except FileExistsError:  # its agent had handed one in
            pass
        except OSError as error:
            logger("checkpoint").warning(f"The checkpoint folder {self._folder.path} cannot be written: {error.strerror}.")

    def _fail(self, pending: Pending, reason: str, warn: bool) -> None:
        pending.reason = reason
        self._standing.failed(reason)
        if warn:
            logger("checkpoint").warning(f"The checkpoint of step {pending.step} (seq {pending.seq}) was given up: {reason}")
