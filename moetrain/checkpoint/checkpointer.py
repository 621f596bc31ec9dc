"""Saving a run while it trains, and resuming it. Every rank calls the same methods; saving needs no collective.

A save passes through two lanes. The memory lane copies live state into slots of the node's agent, from where it outlives this process;
the training thread waits for the copy only, and only before it changes the state. The persist lane writes the experts whose turn it is
from those slots to the store, while the next copies are made.
"""

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.checkpoint.accord import Accord, Decision
from moetrain.checkpoint.arena import NoRoom
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import Ready, copy_fragments, parts_of, shown
from moetrain.checkpoint.course import Attempt, Course, Hurried, Line, banks_of, copied_experts
from moetrain.checkpoint.fit import Share, fitting_experts
from moetrain.checkpoint.hurry import most_valuable
from moetrain.checkpoint.job import Receipt, Reply, SaveJob
from moetrain.checkpoint.lane import Lane
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection, is_derived, is_written
from moetrain.checkpoint.plan import Holding, Part, holdings_of, lay_out, merged, my_parts
from moetrain.checkpoint.process import AgentDied, Connect, Launcher, NodeMemory
from moetrain.checkpoint.recover import Agree, Gather, LoadReport, from_rank_zero, restore_together, together
from moetrain.checkpoint.source import Memory
from moetrain.checkpoint.turns import Figures, Homes, Horizon, Turns, homes_of
from moetrain.dist.board import Board, DictBoard
from moetrain.model.state import ModelState
from moetrain.store.backend import absolute
from moetrain.store.encode import stored_dtype
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.02, 1.0
PATIENCE_SECONDS = 5.0  # a save that hears nothing of rank 0 holds up training no longer than this
READY_SECONDS = 0.5  # what a save that goes to the store grants the copy before it to be known everywhere
GRACE_SHARE = 0.7  # of the grace is spent on writing; the rest is for the step under way, and for a disk that is slower now
REPLICA_SECONDS = 120.0  # a partner that takes longer for one generation is given up for it


@dataclass(frozen=True)
class Status:
    """What a console shows. Sizes and times are those of the last committed save (rank 0: of all ranks)."""

    committed_seq: int | None = None
    committed_step: int | None = None
    pending_seq: int | None = None
    committed_bytes: int = 0
    committed_seconds: float = 0.0  # from the copy in memory to the commit
    copied_step: int | None = None  # newest copy in the memory of this node
    oldest_expert_steps: int = 0
    figures: Figures = field(default_factory=Figures)
    failures: int = 0
    last_failure: str = ""

    @property
    def pending(self) -> bool:
        return self.pending_seq is not None


@dataclass(frozen=True)
class Copied:
    """A copy in memory: the ledger as a recovery to it would find it."""

    save: SaveId
    ledger: Ledger


@dataclass(frozen=True)
class Order:
    """What a caller of `save` asked for."""

    full: bool
    persists: bool
    hurried: bool
    expected_faults: float


class Pending:
    """One save under way."""

    def __init__(self, save: SaveId, step: int, ledger: Ledger, order: Order) -> None:
        self.save = save
        self.step = step
        self.ledger = ledger  # counted up to this step
        self.order = order
        self.is_in_memory_only = False
        self.is_cut_short = False  # what it left out is in memory only
        self.is_queued = False  # rank 0: it has one of the places in the persist lane
        self.committed = False
        self.reason = ""  # why it was given up
        self.error: Exception | None = None  # what the training thread must hear about
        self.copied = threading.Event()
        self.safe = threading.Event()  # the copy outlives this process, and with a partner this node
        self.done = threading.Event()

    @property
    def seq(self) -> int:
        return self.save.seq

    def wait_copied(self) -> None:
        """Returns when the live state may change again. Raises CheckpointError when there is no room for the copy."""
        self.copied.wait()
        if self.error is not None:
            raise self.error


class Checkpointer:
    """The one writer of a checkpoint folder. Constructing it claims the folder: an older job that still runs cannot commit there
    any more. To only read a checkpoint, use `recover.agreed_choice` and `recover.restore`.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, rank: int, world: int, agree: Agree, clock: Clock, connect: Connect | None = None,
        gather: Gather | None = None, turns: Turns | None = None, board: Board | None = None,
    ) -> None:  # fmt: skip
        """Every rank constructs it; `agree` is called once. `connect`: None for the agent of this node; `gather`, `board`: None in one
        process.

        `turns` knows the banks whose tokens are counted; None: nobody counts.

        Raises CheckpointError when the folder cannot be written.
        """
        assert board is not None or world == 1, "ranks agree over a board"
        self._config, self._rank, self._world, self._clock = config, rank, world, clock
        self._gather = gather or (lambda value: [agree(value)])
        self._folder = CheckpointFolder(absolute(folder), Io())
        first = from_rank_zero(rank, agree, lambda: f"{self._folder.claim(clock.now())} {secrets.token_hex(4)}") or ""
        save = SaveId.parse(first)
        assert save is not None
        self._next = save
        self._memory = NodeMemory(connect or Launcher(self._folder.path, config.agent), rank, save.epoch)
        self._accord = Accord(board or DictBoard(), f"checkpoint/{first}", rank, world, clock)
        self._turns = turns or Turns(config, Horizon())
        self._course = Course(self._folder, config, self._turns)
        self._copied_experts: int | None = None  # of every bank in one copy in memory; None: all
        self._keep: Copied | None = None  # rank 0: the newest save that all ranks have in memory,
        self._open: Copied | None = None  # and a newer one of which that is not known yet
        self._copying, self._persisting = Lane("checkpoint-copy"), Lane("checkpoint-persist")
        self._places = threading.BoundedSemaphore(2)  # rank 0: of a save that is being persisted, and of one that waits for it
        self._pending: Pending | None = None
        self._newest: Pending | None = None  # that goes to the store
        self._status = Status()
        self._ledger = Ledger.of_banks(self._turns.banks)
        self._holdings: list[Holding] | None = None
        self._homes: Homes | None = None

    def count(self, load: Sequence[Sequence[int]]) -> None:
        """One more step was trained. `load`: token-assignments of all ranks, layers x experts; the same on every rank."""
        if self._turns.banks:
            self._ledger = self._ledger.count(load)

    def save(
        self, state: ModelState, progress: dict, *, full: bool = False, persists: bool = True, hurried: bool = False,
        expected_faults: float = 1.0,
    ) -> Pending:  # fmt: skip
        """Starts a save and returns at once. `state` may change only after `wait_copied`; `progress` is JSON-able and has `step`.

        `persists`: False for a copy in memory only. `hurried`: a `full` save that has `grace_seconds` only, by what saves took so far; what
        does not fit is left out, the least valuable experts first. `expected_faults`: until the end of the run, the same on every rank;
        what is left of the PLT budget is divided by it.

        A save that cannot be committed (a full disk, a dead agent, a late rank) is given up with a warning; the next one
        takes the same experts. One that finds two others on their way to the store stays in memory, except a `full` one.
        Raises CheckpointError when another job has taken over the folder.
        """
        previous, order = self._pending, Order(full, persists, hurried, expected_faults)
        if previous is not None and previous.error is not None:
            raise previous.error
        pending = Pending(self._next, int(progress["step"]), self._ledger, order)
        self._next = SaveId(self._next.epoch, self._next.seq + 1)
        self._pending = pending
        if persists:
            self._newest = pending
            self._status = replace(self._status, pending_seq=pending.seq)
        self._copying.do(partial(self._run, pending, state, dict(progress), Ready(state)))
        return pending

    def wait_copied(self) -> None:
        """Returns when the live state may change; at once when no save is under way. Raises as `Pending.wait_copied` does."""
        if self._pending is not None:
            self._pending.wait_copied()

    def status(self) -> Status:
        """Never waits."""
        return self._status

    def finish(self, limit_seconds: float | None = None) -> None:
        """Waits until the last save is committed and takes leave of the agent, which ends with the last rank. A later save starts it again.

        Raises CheckpointError when that save was given up or takes longer than the limit (it may still come to a good end:
        the agent outlives the trainer).
        """
        for pending in (self._newest, self._pending):
            if pending is not None and not pending.done.wait(limit_seconds):
                raise CheckpointError(f"The checkpoint of step {pending.step} is not committed after {limit_seconds:g} s.")
        pending = self._newest
        self._memory.leave(done=pending is None or (pending.committed and not pending.is_cut_short))
        if pending is None:
            return
        if pending.error is not None:
            raise pending.error
        if not pending.committed and not pending.is_in_memory_only:
            kept = f"The last good one is of step {self._status.committed_step}." if self._status.committed_step is not None else ""
            raise CheckpointError(f"The checkpoint of step {pending.step} was not committed: {pending.reason}", kept)

    def load(self, state: ModelState, at: str) -> LoadReport | None:
        """Restores the newest good recovery point into `state`, in place, on every rank the same one; None when there is none to restore.

        `at`: auto (this folder, if it has one) | must | never | path of a run or checkpoint folder. `gather` is called now and then.
        Raises CheckpointError on every rank when a checkpoint was asked for and there is none, or none is good.
        """
        memory = self._look_around(at)
        restored = restore_together(self._folder.path, at, state, self._rank, self._world, self._gather, memory=memory)
        self._memory.restored()
        if at == "never":
            self._memory.forget()
        self._meet(state)
        self._check_room(state)
        self._find_partner()
        if restored is None:
            return None
        choice, report = restored
        manifest = choice.manifest
        own = choice.folder.resolve() == self._folder.path.resolve()
        # A repaired recovery point, or one elsewhere, is nothing a manifest of this folder can refer to: the next save is full.
        builds_on = own and not choice.damage and not report.is_converted
        ledger = Ledger.of_json(manifest.ledger, manifest.banks()).restored()
        line = Line(manifest.save, manifest.index + 1, manifest.banks(), ledger)
        self._course.continues(Line(None, manifest.index + 1) if not builds_on else self._newest_commit() if choice.is_in_memory else line)
        if ledger.banks == self._turns.banks:
            self._ledger = ledger
        if own:
            figures = self._turns.figures(ledger, 0)
            self._status = replace(self._status, committed_seq=manifest.seq, committed_step=manifest.step, figures=figures)
        return report

    def _newest_commit(self) -> Line:
        """What the next save refers to when the state came from memory: the store is as it was before."""
        points = (point for point in self._folder.history() if isinstance(point, Manifest))
        newest = next(points, None)
        if newest is None:
            return Line()
        return Line(newest.save, newest.index + 1, newest.banks(), Ledger.of_json(newest.ledger, newest.banks()))

    def _look_around(self, at: str) -> Memory:
        """What lies in the memory of all nodes of this job. Agents that an earlier start left are asked; none is started for it."""
        if at not in ("auto", "must"):
            return Memory([], None)
        own = self._memory.list()
        answers = together(lambda: own, self._gather)
        if len(answers) != self._world:  # a `gather` that brings rank 0's answer only
            answers = [own]
        lists = {found["folder"] + str(found["address"]): found for found in answers if isinstance(found, dict)}
        return Memory(list(lists.values()), own)

    def _check_room(self, state: ModelState) -> None:
        """Decides before training what a copy holds. Raises CheckpointError on every rank when there is no room on one node."""
        parts = my_parts(parts_of(state), self._rank, holdings=self._holdings)
        experts = sum(part.num_bytes for part in parts if part.tensor.group)
        share = [self._memory.place, sum(part.num_bytes for part in parts) - experts, experts, self._memory.possible_bytes()]
        shares = [Share(*found) for found in self._gather(share) if isinstance(found, list)]
        num_experts = max(self._course.known_banks.values(), default=0)
        count = fitting_experts(shares, num_experts, self._config.snapshot_experts)
        self._copied_experts = count if count < num_experts else None
        if self._copied_experts and self._rank == 0:
            sentence = "A copy in memory holds %d of the %d experts of a layer; a fault takes the others back to older copies."
            logger("checkpoint").info(sentence, count, num_experts)

    def _find_partner(self) -> None:
        """With several nodes every agent gets the next one as its partner, in a ring."""
        places = self._gather(self._memory.place) if self._config.agent.partner else []
        if len(set(map(str, places))) < 2:
            return
        addresses = together(self._memory.address, self._gather)
        nodes = [address for number, address in enumerate(addresses) if address not in addresses[:number]]
        if None in nodes or len(nodes) < 2:
            return
        partner = nodes[(nodes.index(addresses[self._rank]) + 1) % len(nodes)]
        assert isinstance(partner, dict)
        try:
            self._memory.set_partner(partner)
        except AgentDied as died:
            logger("checkpoint").warning(f"No copies go to another node: {died}.")

    def _meet(self, state: ModelState) -> None:
        """Every rank learns who holds what, so that from now on all divide a save alike without asking."""
        answers = self._gather([holding.to_json() for holding in holdings_of(parts_of(shown(state, self._config.mode)))])
        if len(answers) == self._world:  # a `gather` that brings rank 0's answer only tells nothing
            said = [[Holding.of_json(found) for found in answer] for answer in answers if isinstance(answer, list)]
            self._holdings = merged(said)
            self._homes = homes_of(self._holdings)
            self._course.knows(banks_of(holding.group for holding in self._holdings if holding.group))

    # the memory lane

    def _run(self, pending: Pending, state: ModelState, progress: dict, ready: Ready) -> None:
        job = None
        try:
            job = self._remember(pending, state, progress, ready)
        except Exception as error:
            pending.error = error
        pending.copied.set()
        if job is None:
            self._end(pending)
        else:
            self._persisting.do(partial(self._persist, pending, job))

    def _remember(self, pending: Pending, state: ModelState, progress: dict, ready: Ready) -> SaveJob | None:
        """Brings this rank's part into memory. Returns what is to be written to the store."""
        try:
            decision = self._decision(pending, state)
            if decision.skip:
                self._skip(pending, decision.skip, is_news=self._rank == 0 or not decision.is_heard)
                return None
            job = self._copy(pending, decision, state, progress, ready)
            self._announce(pending)
            pending.is_cut_short = pending.order.hurried and decision.selection is not None
            if decision.persists:
                return job
            pending.reason = "it is in memory only: the store was still busy." if pending.order.persists else "it is in memory only."
            pending.is_in_memory_only = True
        except NoRoom as error:
            if self._status.copied_step is None:
                raise  # nothing was ever copied: say so now, not after the first fault
            self._skip(pending, error.message)
        except AgentDied as died:
            self._skip(pending, f"{died}.")
        except OSError as error:
            self._skip(pending, f"{error.filename or self._folder.path} cannot be used: {error.strerror}.")
        return None

    def _end(self, pending: Pending) -> None:
        if self._rank == 0 and pending.order.persists:
            try:
                self._course.ended(pending.save)
            except OSError as error:
                logger("checkpoint").warning(f"The checkpoint folder {self._folder.path} cannot be read: {error.strerror}.")
        if pending.is_queued:
            self._places.release()
        if self._status.pending_seq == pending.seq:
            self._status = replace(self._status, pending_seq=None)
        pending.done.set()

    def _skip(self, pending: Pending, reason: str, is_news: bool = True) -> None:
        """This rank takes no part in a save, so there will be none; the others hear of it from the board and through the folder."""
        pending.copied.set()
        self._accord.leave_out(pending.save)
        if self._rank == 0:
            self._accord.decide(Decision(pending.save, reason))
        if pending.order.persists:
            self._fail(pending, reason, warn=is_news)
            self._refuse(pending.save, reason)
        else:
            pending.reason = reason

    def _decision(self, pending: Pending, state: ModelState) -> Decision:
        if self._rank:
            heard = self._accord.hear(pending.save, PATIENCE_SECONDS)
            return heard or Decision(pending.save, "nothing was heard of rank 0.", is_heard=False)
        decision = self._decide(pending, state)
        self._accord.decide(decision)
        return decision

    def _decide(self, pending: Pending, state: ModelState) -> Decision:
        """Rank 0: what this save is."""
        save, order = pending.save, pending.order
        if self._open is not None:
            complete = self._accord.is_complete(self._open.save, READY_SECONDS if order.persists else 0.0)
            if complete is None and not order.persists:
                return Decision(save, "the copy before it is not in the memory of every rank yet.")
            self._keep, self._open = self._open if complete else self._keep, None  # what is not known to be complete is given up by all
        if self._holdings is None and self._world == 1:
            self._meet(state)
        pending.is_queued = order.persists and self._places.acquire(blocking=False)
        persists = pending.is_queued or (order.persists and order.full)
        hurried = self._hurried() if order.hurried else None
        attempt = self._course.next(save, pending.ledger, order.full, order.expected_faults, self._homes, hurried) if persists else None
        in_memory = self._copies(save, attempt)
        ledger = pending.ledger.since(self._keep.ledger) if self._keep else self._course.seen(pending.ledger)
        ledger = ledger.after(in_memory, self._config.mode)
        self._open = Copied(save, ledger)
        return Decision(
            save,
            keep=self._keep and self._keep.save,
            persists=persists,
            index=attempt.line.index if attempt else 0,
            selection=attempt.selection if attempt else None,
            in_memory=in_memory,
            ledger=ledger.to_json() if ledger.total else {},
        )

    def _hurried(self) -> Hurried | None:
        """Chooses what can be written within the grace; None when there is time enough, or nothing was measured yet."""
        status, grace = self._status, self._config.grace_seconds
        if not grace or not status.committed_seconds or self._holdings is None:
            return None
        num_bytes = GRACE_SHARE * grace * status.committed_bytes / status.committed_seconds
        return partial(most_valuable, self._holdings, self._config.mode, num_bytes=num_bytes)

    def _copies(self, save: SaveId, attempt: Attempt | None) -> Selection | None:
        """The experts that are copied; None: all of them."""
        if self._copied_experts is None or (attempt is not None and attempt.selection is None):
            return None
        return copied_experts(save.seq, self._course.known_banks, self._copied_experts, attempt.selection if attempt else None)

    def _copy(self, pending: Pending, decision: Decision, state: ModelState, progress: dict, ready: Ready) -> SaveJob:
        """Copies this rank's part into slots; when it returns the agent has it."""
        mode = self._config.mode
        state = shown(state, mode)
        parts = parts_of(state)
        mine, extra = self._shares(parts, decision)
        objects, _ = lay_out(mine)
        extras, _ = lay_out(extra)
        plans = [*objects, *extras]
        slots = self._memory.reserve(pending.save, decision.keep, [plan.size * stored_dtype(plan.dtype).itemsize for plan in plans])
        plans = copy_fragments(state, plans, list(slots.values()), ready)
        pending.copied.set()
        copied = {part.number for part in [*mine, *extra]}
        job = SaveJob(
            folder=str(self._folder.path),
            save=pending.save,
            parent=None if self._rank else self._course.parent,
            rank=self._rank,
            world=self._world,
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
        )
        self._memory.filled(job, list(slots))
        self._status = replace(self._status, copied_step=pending.step)
        return job

    def _shares(self, parts: list[Part], decision: Decision) -> tuple[list[Part], list[Part]]:
        """What this rank copies for the store, and what for memory only."""
        mode = self._config.mode
        if not decision.persists:
            return [], my_parts(parts, self._rank, mode, decision.in_memory, self._holdings)
        mine = my_parts(parts, self._rank, mode, decision.selection, self._holdings)
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
            threading.Thread(target=self._wait_for_partner, args=(pending,), name=f"partner-{pending.seq}", daemon=True).start()

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
            logger("checkpoint").warning(f"The copy of step {pending.step} is lost: {died}.")
            return
        self._is_ready(pending, trouble)

    def _is_ready(self, pending: Pending, trouble: str) -> None:
        if trouble:
            logger("checkpoint").warning(f"The copy of step {pending.step} is in the memory of this node only: {trouble}")
        self._accord.ready(pending.save)
        pending.safe.set()

    # the persist lane

    def _persist(self, pending: Pending, job: SaveJob) -> None:
        try:
            parent, ledger = (None, {}) if self._rank else (self._course.parent, self._course.ledger(job.save))
            self._settle(pending, job, self._answer(job, parent, ledger), ledger)
        except OSError as error:
            self._fail(pending, f"{error.filename or self._folder.path} cannot be used: {error.strerror}.", warn=True)
        except Exception as error:
            pending.error = error
        self._end(pending)

    def _answer(self, job: SaveJob, parent: SaveId | None, ledger: dict) -> Reply:
        try:
            return self._memory.persist(job.save, parent, ledger, 3 * job.timeout_seconds)
        except AgentDied as died:
            self._refuse(job.save, str(died))
            return Reply("abandoned", f"rank {self._rank}: {died}")

    def _refuse(self, save: SaveId, reason: str) -> None:
        """In the agent's place: rank 0 decides, other ranks hand in an error, so that rank 0 need not wait for the time limit."""
        try:
            if self._rank == 0:
                self._folder.abandon(save, reason)
            else:
                self._folder.put_receipt(save, self._rank, Receipt(self._rank, 0, None, [], [], reason).to_json())
        except OSError as error:
            logger("checkpoint").warning(f"The checkpoint folder {self._folder.path} cannot be written: {error.strerror}.")

    def _settle(self, pending: Pending, job: SaveJob, reply: Reply, ledger: dict) -> None:
        """Learns from the folder what became of the save."""
        if reply.outcome == "superseded":
            raise CheckpointError(reply.reason, "Stop one of the two jobs, or give them different run names.")
        deadline = self._clock.monotonic() + 3 * job.timeout_seconds
        pause = FIRST_POLL_SECONDS
        while (outcome := self._folder.outcome(job.save)) is None and self._clock.monotonic() < deadline:
            self._clock.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)  # many ranks ask one folder
        pending.committed = bool(outcome)
        if pending.committed:
            self._status = replace(
                self._status,
                committed_seq=job.save.seq,
                committed_step=job.step,
                committed_bytes=reply.num_bytes,
                committed_seconds=reply.seconds,
                oldest_expert_steps=reply.oldest_expert_steps,
                figures=self._figures(job, ledger),
            )
            return
        reason = reply.reason or self._folder.reason(job.save) or "rank 0 did not decide in time."
        self._fail(pending, reason, warn=self._rank == 0 or reply.outcome == "abandoned")

    def _figures(self, job: SaveJob, saved: dict) -> Figures:
        ledger = Ledger.of_json(saved, {})
        chosen = list((job.selection or {}).values()) or list(ledger.banks.values())
        counts = [experts if isinstance(experts, int) else len(experts) for experts in chosen]
        return self._turns.figures(ledger, max(counts, default=0))

    def _fail(self, pending: Pending, reason: str, warn: bool) -> None:
        pending.reason = reason
        self._status = replace(self._status, failures=self._status.failures + 1, last_failure=reason)
        if warn:
            logger("checkpoint").warning(f"The checkpoint of step {pending.step} (seq {pending.seq}) was given up: {reason}")
