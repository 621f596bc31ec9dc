"""The way of a save from live state to the memory of this node, from where it outlives this process.

Thread `checkpoint-copy` runs one save after the other: hears or makes the decision, copies, tells rank 0, hands over to the persist lane.
Where a partner gets the copy too, a thread `partner-N` of that save waits for it and tells rank 0. The training thread calls `do` only.
"""

import mmap
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

from moetrain.base.clock import Clock
from moetrain.base.log import logger
from moetrain.checkpoint.accord import Accord, Decision
from moetrain.checkpoint.arena import NoRoom
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import Ready, copy_fragments, parts_of, shown
from moetrain.checkpoint.course import Course
from moetrain.checkpoint.decider import Decider
from moetrain.checkpoint.job import SaveJob
from moetrain.checkpoint.lane import Lane
from moetrain.checkpoint.modes import is_derived, is_written
from moetrain.checkpoint.node_memory import HungUp, Needs, NodeMemory
from moetrain.checkpoint.pending import Pending
from moetrain.checkpoint.persist_lane import FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS, PersistLane
from moetrain.checkpoint.plan import Part, lay_out, my_parts
from moetrain.checkpoint.process import AgentDied
from moetrain.checkpoint.roster import Roster
from moetrain.checkpoint.status import Standing
from moetrain.model.state import ModelState
from moetrain.store.encode import stored_dtype

PATIENCE_SECONDS = 5.0  # a save that hears nothing of rank 0 holds up training no longer than this
REPLICA_SECONDS = 120.0  # a partner that takes longer for one generation is given up for it


class MemoryLane:
    """Its own state is the queue of saves; what lies in memory the decider remembers, and the agent."""

    def __init__(
        self, path: Path, config: CheckpointConfig, clock: Clock, memory: NodeMemory, accord: Accord, course: Course, roster: Roster,
        standing: Standing, persisting: PersistLane,
    ) -> None:  # fmt: skip
        """`path`: of the checkpoint folder."""
        self._path, self._config, self._clock, self._memory, self._accord = path, config, clock, memory, accord
        self._course, self._roster, self._standing, self._persisting = course, roster, standing, persisting
        self._rank = roster.rank
        self._decider = Decider(config, accord, course, roster, standing, persisting)
        self._lane = Lane("checkpoint-copy")

    def do(self, pending: Pending, state: ModelState, progress: dict, ready: Ready) -> None:
        """After the saves before it; returns at once. `state` may change when `pending.copied` is set."""
        self._lane.do(partial(self._run, pending, state, progress, ready))

    def _run(self, pending: Pending, state: ModelState, progress: dict, ready: Ready) -> None:
        job = None
        try:
            job = self._remember(pending, state, progress, ready)
        except Exception as error:
            pending.error = error
        pending.copied.set()
        if job is None:
            self._persisting.end(pending)
        else:
            self._persisting.do(pending, job)

    def _remember(self, pending: Pending, state: ModelState, progress: dict, ready: Ready) -> SaveJob | None:
        """Brings this rank's part into memory. Returns what is to be written to the store."""
        decision = None
        try:
            decision = self._decision(pending, state)
            if decision.skip:
                self._skip(pending, decision.skip, is_news=self._rank == 0 or not decision.is_heard, is_own=not decision.is_heard)
                return None
            job = self._copy(pending, decision, state, progress, ready)
            self._announce(pending)
            pending.is_cut_short = pending.order.hurried and decision.selection is not None
            if decision.persists:
                return job
            pending.reason = "it is in memory only: the store was still busy." if pending.order.persists else "it is in memory only."
            pending.is_in_memory_only = True
        except NoRoom as error:
            is_hopeless = error.is_empty or (decision is not None and decision.alone)
            if self._standing.now.copied_step is None and is_hopeless and not error.is_passing:
                raise  # nothing was ever copied: say so now, not after the first fault
            self._skip(pending, error.message, no_room=not error.is_passing)
        except AgentDied as died:
            self._skip(pending, f"{died}.")
        except OSError as error:
            self._skip(pending, f"{error.filename or self._path} cannot be used: {error.strerror}.")
        return None

    def _skip(self, pending: Pending, reason: str, is_news: bool = True, is_own: bool = True, no_room: bool = False) -> None:
        """This rank takes no part in a save, so there will be none; the others hear of it from the board and through the folder, unless
        rank 0 said so itself (not `is_own`)."""
        pending.copied.set()
        if is_own:
            self._accord.leave_out(pending.save, no_room)
        if self._rank == 0:
            self._accord.decide(Decision(pending.save, reason))
        if pending.order.persists:
            self._persisting.give_up(pending, reason, is_news)
        else:
            pending.reason = reason

    def _decision(self, pending: Pending, state: ModelState) -> Decision:
        if self._rank:
            heard = self._accord.hear(pending.save, PATIENCE_SECONDS)
            return heard or Decision(pending.save, "nothing was heard of rank 0.", is_heard=False)
        self._roster.draw_up_alone(state)
        decision = self._decider.decide(pending)
        self._accord.decide(decision)
        return decision

    def _copy(self, pending: Pending, decision: Decision, state: ModelState, progress: dict, ready: Ready) -> SaveJob:
        """Copies this rank's part into slots; when it returns the agent has it."""
        mode = self._config.mode
        state = shown(state, mode)
        parts = parts_of(state)
        mine, extra = self._shares(parts, decision)
        objects = lay_out(mine)
        plans = [*objects, *lay_out(extra)]
        slots = self._reserved(pending, decision, [plan.size * stored_dtype(plan.dtype).itemsize for plan in plans])
        plans = copy_fragments(state, plans, list(slots.values()), ready)
        pending.copied.set()
        copied = {part.number for part in [*mine, *extra]}
        job = SaveJob(
            folder=str(self._path),
            save=pending.save,
            parent=None if self._rank else self._course.parent,
            rank=self._rank,
            world=self._roster.world,
            index=decision.index,
            step=pending.step,
            mode=mode,
            selection=decision.selection,
            objects=plans[: len(objects)],
            extras=plans[len(objects) :],
            in_memory=decision.in_memory,
            tensors=[replace(part.tensor, pieces=()) for part in parts if part.number not in copied and not is_derived(part.tensor)],
            progress=progress,
            keep=self._config.keep,
            timeout_seconds=self._config.timeout_seconds,
            ledger=decision.ledger,
            ancestors=self._course.ancestors,
            run=self._memory.run,
        )
        self._memory.filled(job, list(slots))
        self._standing.copied(pending.step)
        return job

    def _reserved(self, pending: Pending, decision: Decision, sizes: list[int]) -> dict[str, mmap.mmap]:
        """Slots, by path. The last save of a run waits for room that older ones still take on their way to the store, and asks an agent
        that did not answer once more. Raises AgentDied, NoRoom."""
        patience = self._config.timeout_seconds
        if pending.order.hurried and self._config.grace_seconds:
            patience = min(patience, self._config.grace_seconds / 4)
        deadline, pause = self._clock.monotonic() + patience, FIRST_POLL_SECONDS
        if pending.order.full:
            self._memory.ask_again()
        while True:
            try:
                return self._memory.reserve(pending.save, Needs(decision.keep, decision.alone, self._persisting.open_saves()), sizes)
            except NoRoom as error:
                if not (pending.order.full and error.is_passing and self._clock.monotonic() < deadline):
                    raise
            self._clock.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)

    def _shares(self, parts: list[Part], decision: Decision) -> tuple[list[Part], list[Part]]:
        """What this rank copies for the store, and what for memory only."""
        mode, holdings = self._config.mode, self._roster.holdings
        if not decision.persists:
            return [], my_parts(parts, self._rank, mode, decision.in_memory, holdings)
        mine = my_parts(parts, self._rank, mode, decision.selection, holdings)
        extra = [
            part
            for part in parts
            if is_written(part.tensor, mode, decision.in_memory) and not is_written(part.tensor, mode, decision.selection)
        ]
        return mine, my_parts(extra, self._rank)

    def _announce(self, pending: Pending) -> None:
        """Tells rank 0 that this rank's part is safe: at once, or when the partner has it."""
        done, trouble = self._memory.replicated(pending.save)
        if done:
            self._is_ready(pending, trouble)
        else:
            Thread(target=self._wait_for_partner, args=(pending,), name=f"partner-{pending.seq}", daemon=True).start()

    def _wait_for_partner(self, pending: Pending) -> None:
        deadline, pause = self._clock.monotonic() + REPLICA_SECONDS, FIRST_POLL_SECONDS
        done, trouble = False, "it took too long."
        try:
            while not done and self._clock.monotonic() < deadline:
                self._clock.sleep(pause)
                pause = min(1.5 * pause, LONGEST_POLL_SECONDS)
                done, found = self._memory.replicated(pending.save)
                trouble = found if done else trouble
        except AgentDied as died:
            self._accord.leave_out(pending.save)
            if not isinstance(died, HungUp):
                logger("checkpoint").warning(f"The copy of step {pending.step} is lost: {died}.")
            return
        self._is_ready(pending, trouble)

    def _is_ready(self, pending: Pending, trouble: str) -> None:
        if trouble:
            logger("checkpoint").warning(f"The copy of step {pending.step} is in the memory of this node only: {trouble}")
        self._accord.ready(pending.save)
        pending.safe.set()
