"""Saving a run while it trains, and resuming it. Every rank calls the same methods; saving needs no collective.

A save passes through three hands: a thread copies live state into the arena, the rank's writer process makes objects of it,
rank 0's writer commits. The training thread waits for the first only, and only before it changes the state: no disk is touched before.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.checkpoint.arena import Arena, usual_folders
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import Ready, copy_fragments, parts_of, shown
from moetrain.checkpoint.job import Receipt, Reply, SaveJob
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection, is_derived
from moetrain.checkpoint.plan import Holding, holdings_of, lay_out, merged, my_parts
from moetrain.checkpoint.process import Writer, WriterDied, WriterProcess
from moetrain.checkpoint.recover import Agree, Gather, LoadReport, from_rank_zero, restore_together
from moetrain.checkpoint.turns import Figures, Homes, Horizon, Turns, homes_of
from moetrain.model.state import ModelState
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.02, 1.0
PATIENCE_SECONDS = 5.0  # a save that comes while the one before it still runs holds up training no longer than this


@dataclass(frozen=True)
class Status:
    """What a console shows. Sizes and times are those of the last committed save (rank 0: of all ranks)."""

    committed_seq: int | None = None
    committed_step: int | None = None
    pending_seq: int | None = None
    committed_bytes: int = 0
    committed_seconds: float = 0.0  # from the filled arena to the commit
    oldest_expert_steps: int = 0
    figures: Figures = field(default_factory=Figures)
    failures: int = 0
    last_failure: str = ""

    @property
    def pending(self) -> bool:
        return self.pending_seq is not None


@dataclass(frozen=True)
class Line:
    """Where the line of recovery points stands that the next save continues. `banks` None: nothing to build on, save in full.

    `ledger`: as its newest recovery point holds it; after a recovery with what that lost.
    """

    parent: SaveId | None = None
    index: int = 0
    banks: dict[str, int] | None = None
    ledger: Ledger | None = None


class Pending:
    """One save under way."""

    def __init__(self, save: SaveId, step: int, ledger: Ledger, expected_faults: float) -> None:
        self.save = save
        self.step = step
        self.ledger = ledger  # counted up to this step
        self.expected_faults = expected_faults
        self.committed = False
        self.reason = ""  # why it was given up
        self.error: Exception | None = None  # what the training thread must hear about
        self.copied = threading.Event()
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
        self, folder: Path, config: CheckpointConfig, rank: int, world: int, agree: Agree, clock: Clock, writer: Writer | None = None,
        gather: Gather | None = None, turns: Turns | None = None,
    ) -> None:  # fmt: skip
        """Every rank constructs it; `agree` is called once. `writer`: None for the rank's own process; `gather`: None in one process.

        `turns` knows the banks whose tokens are counted; None: nobody counts.

        Raises CheckpointError when the folder cannot be written.
        """
        self._config, self._rank, self._world, self._clock = config, rank, world, clock
        self._gather = gather or (lambda value: [agree(value)])
        self._folder = CheckpointFolder(folder.absolute(), Io())
        first = from_rank_zero(rank, agree, lambda: str(self._folder.claim(clock.now())))
        save = SaveId.parse(first or "")
        assert save is not None
        self._next = save
        self._line = Line()
        self._attempts: dict[SaveId, Line] = {}
        self._busy = threading.Lock()  # held by the save that owns the arena and the writer
        self._writer = writer or WriterProcess()
        self._arena: Arena | None = None
        self._pending: Pending | None = None
        self._status = Status()
        self._turns = turns or Turns(config, Horizon())
        self._ledger = Ledger.of_banks(self._turns.banks)
        self._holdings: list[Holding] | None = None
        self._homes: Homes | None = None

    def count(self, load: Sequence[Sequence[int]]) -> None:
        """One more step was trained. `load`: token-assignments of all ranks, layers x experts; the same on every rank."""
        if self._turns.banks:
            self._ledger = self._ledger.count(load)

    def save(self, state: ModelState, progress: dict, *, full: bool = False, expected_faults: float = 1.0) -> Pending:
        """Starts a save and returns at once. `state` may change only after `wait_copied`; `progress` is JSON-able and has `step`.

        `expected_faults`: until the end of the run, the same on every rank; what is left of the PLT budget is divided by it.

        A save that cannot be committed (a full disk, a dead writer, a late rank) is given up with a warning; the next one
        takes the same experts. So is one that finds the save before it still running, except a `full` one, which waits for it.
        Raises CheckpointError when another job has taken over the folder.
        """
        previous, pending = self._pending, Pending(self._next, int(progress["step"]), self._ledger, expected_faults)
        if previous is not None and previous.error is not None:
            raise previous.error
        self._next = SaveId(self._next.epoch, self._next.seq + 1)
        self._pending = pending
        ready = Ready(state)
        work = threading.Thread(
            target=self._run, args=(pending, previous, state, dict(progress), full, ready), name=f"checkpoint-{pending.seq}", daemon=True
        )
        self._status = replace(self._status, pending_seq=pending.seq)
        work.start()
        return pending

    def wait_copied(self) -> None:
        """Returns when the live state may change; at once when no save is under way. Raises as `Pending.wait_copied` does."""
        if self._pending is not None:
            self._pending.wait_copied()

    def status(self) -> Status:
        """Never waits."""
        return self._status

    def finish(self, limit_seconds: float | None = None) -> None:
        """Waits until the last save is committed and ends the writer process. A later save starts it again.

        Raises CheckpointError when that save was given up or takes longer than the limit (it may still come to a good end:
        its writer outlives the trainer).
        """
        pending = self._pending
        if pending is None:
            return
        if not pending.done.wait(limit_seconds) or not self._busy.acquire(timeout=-1 if limit_seconds is None else limit_seconds):
            raise CheckpointError(f"The checkpoint of step {pending.step} is not committed after {limit_seconds:g} s.")
        self._writer.stop()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        self._busy.release()
        if pending.error is not None:
            raise pending.error
        if not pending.committed:
            kept = f"The last good one is of step {self._status.committed_step}." if self._status.committed_step is not None else ""
            raise CheckpointError(f"The checkpoint of step {pending.step} was not committed: {pending.reason}", kept)

    def load(self, state: ModelState, at: str) -> LoadReport | None:
        """Restores the newest good recovery point into `state`, in place, on every rank the same one; None when there is none to restore.

        `at`: auto (this folder, if it has one) | must | never | path of a run or checkpoint folder. `gather` is called now and then.
        Raises CheckpointError on every rank when a checkpoint was asked for and there is none, or none is good.
        """
        restored = restore_together(self._folder.path, at, state, self._rank, self._world, self._gather)
        self._meet(state)
        if restored is None:
            return None
        choice, report = restored
        manifest = choice.manifest
        own = choice.folder.resolve() == self._folder.path.resolve()
        # A repaired recovery point, or one elsewhere, is nothing a manifest of this folder can refer to: the next save is full.
        builds_on = own and not choice.damage and not report.is_converted
        ledger = Ledger.of_json(manifest.ledger, manifest.banks()).restored()
        self._line = Line(manifest.save, manifest.index + 1, manifest.banks(), ledger) if builds_on else Line(None, manifest.index + 1)
        if ledger.banks == self._turns.banks:
            self._ledger = ledger
        if own:
            figures = self._turns.figures(ledger, 0)
            self._status = replace(self._status, committed_seq=manifest.seq, committed_step=manifest.step, figures=figures)
        return report

    def _meet(self, state: ModelState) -> None:
        """Every rank learns who holds what, so that from now on all divide a save alike without asking."""
        answers = self._gather([holding.to_json() for holding in holdings_of(parts_of(shown(state, self._config.mode)))])
        if len(answers) == self._world:  # a `gather` that brings rank 0's answer only tells nothing
            said = [[Holding.of_json(found) for found in answer] for answer in answers if isinstance(answer, list)]
            self._holdings = merged(said)
            self._homes = homes_of(self._holdings)

    # one save, in its own thread

    def _run(self, pending: Pending, previous: Pending | None, state: ModelState, progress: dict, full: bool, ready: Ready) -> None:
        try:
            if previous is not None:
                previous.copied.wait()  # one after the other
            if not self._busy.acquire(timeout=-1 if full else PATIENCE_SECONDS):
                pending.copied.set()
                self._skip(pending, "the save before it was still running.")
                return
            try:
                self._carry_out(pending, state, progress, full, ready)
            finally:
                self._busy.release()
        except Exception as error:
            pending.error = error
        finally:
            pending.copied.set()
            pending.done.set()

    def _carry_out(self, pending: Pending, state: ModelState, progress: dict, full: bool, ready: Ready) -> None:
        self._status = replace(self._status, pending_seq=pending.seq)
        try:
            job, arena = self._copy(pending, state, progress, full, ready)
            pending.copied.set()
            self._settle(pending, job, self._answer(job, arena))
            self._line = self._current_line()  # now, so that the next save need not ask a disk before it copies
        except OSError as error:
            self._fail(pending, f"{error.filename or self._folder.path} cannot be used: {error.strerror}.", warn=True)
        finally:
            self._status = replace(self._status, pending_seq=None)

    def _skip(self, pending: Pending, reason: str) -> None:
        """This rank takes no part in a save, so there will be none; the others hear of it through the folder."""
        self._fail(pending, reason, warn=True)
        self._refuse(pending.save, reason)

    def _copy(self, pending: Pending, state: ModelState, progress: dict, full: bool, ready: Ready) -> tuple[SaveJob, Arena]:
        """Chooses what this rank writes and copies it into the arena."""
        line = self._line
        ledger = self._seen_from(line, pending.ledger)
        selection = self._selection(line, ledger, full, pending.expected_faults)
        ledger = ledger.after(selection, self._config.mode)
        self._attempts[pending.save] = replace(line, ledger=ledger if ledger.total else None)
        state = shown(state, self._config.mode)
        parts = parts_of(state)
        mine = my_parts(parts, self._rank, self._config.mode, selection, self._holdings)
        plans, num_bytes = lay_out(mine)
        arena = self._room(num_bytes)
        objects = copy_fragments(state, plans, arena, ready)
        written = {part.number for part in mine}
        job = SaveJob(
            folder=str(self._folder.path),
            save=pending.save,
            parent=line.parent,
            rank=self._rank,
            world=self._world,
            index=line.index,
            step=pending.step,
            mode=self._config.mode,
            selection=selection,
            objects=objects,
            tensors=[replace(part.tensor, pieces=()) for part in parts if part.number not in written and not is_derived(part.tensor)],
            progress=progress,
            keep=self._config.keep,
            timeout_seconds=self._config.timeout_seconds,
            ledger=ledger.to_json() if ledger.total else {},
        )
        return job, arena

    def _seen_from(self, line: Line, counted: Ledger) -> Ledger:
        """The live ledger: what was counted, and what the newest commit holds of it."""
        ledger = counted if counted.total else Ledger.of_banks(line.banks or {})
        return ledger.since(line.ledger) if line.ledger else ledger

    def _selection(self, line: Line, ledger: Ledger, full: bool, expected_faults: float) -> Selection | None:
        return None if self._is_full(line, full) else self._turns.selection(line.index, ledger, expected_faults, self._homes)

    def _current_line(self) -> Line:
        """Read from the folder, not remembered: every rank sees the same."""
        line = self._line
        committed = [save for save in sorted(self._attempts, reverse=True) if self._folder.outcome(save)]
        if committed:
            tried = self._attempts[committed[0]]
            banks = tried.banks or self._banks(committed[0])
            line = Line(committed[0], tried.index + 1, banks, tried.ledger)
            later = {save: attempt for save, attempt in self._attempts.items() if save > committed[0]}
            self._attempts = {committed[0]: replace(tried, banks=banks)} | later
        if any(self._folder.needs_full(save) for save in self._attempts):
            return Line(None, line.index)
        return line

    def _banks(self, save: SaveId) -> dict[str, int] | None:
        try:
            return self._folder.manifest(save).banks()
        except CheckpointError as error:
            logger("checkpoint").warning(f"{error.message} The next checkpoint is a full one.")
            return None

    def _is_full(self, line: Line, full: bool) -> bool:
        every = self._config.full_every
        return full or line.banks is None or self._config.mode == "full" or (every > 0 and line.index % every == 0)

    def _room(self, num_bytes: int) -> Arena:
        if self._arena is None or self._arena.num_bytes < num_bytes:
            if self._arena is not None:
                self._arena.close()
                self._arena = None
            self._arena = Arena(num_bytes, usual_folders())
        return self._arena

    def _answer(self, job: SaveJob, arena: Arena) -> Reply:
        try:
            return self._writer.run(job, arena.descriptor, 3 * job.timeout_seconds)
        except WriterDied as died:
            self._refuse(job.save, str(died))
            return Reply("abandoned", f"rank {self._rank}: {died}")

    def _refuse(self, save: SaveId, reason: str) -> None:
        """In the writer's place: rank 0 decides, other ranks hand in an error, so that rank 0 need not wait for the time limit."""
        try:
            if self._rank == 0:
                self._folder.abandon(save, reason)
            else:
                self._folder.put_receipt(save, self._rank, Receipt(self._rank, 0, None, [], [], reason).to_json())
        except OSError as error:
            logger("checkpoint").warning(f"The checkpoint folder {self._folder.path} cannot be written: {error.strerror}.")

    def _settle(self, pending: Pending, job: SaveJob, reply: Reply) -> None:
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
                figures=self._figures(job),
            )
            return
        reason = reply.reason or self._folder.reason(job.save) or "rank 0 did not decide in time."
        self._fail(pending, reason, warn=self._rank == 0 or reply.outcome == "abandoned")

    def _figures(self, job: SaveJob) -> Figures:
        ledger = Ledger.of_json(job.ledger, {})
        chosen = list((job.selection or {}).values()) or list(ledger.banks.values())
        counts = [experts if isinstance(experts, int) else len(experts) for experts in chosen]
        return self._turns.figures(ledger, max(counts, default=0))

    def _fail(self, pending: Pending, reason: str, warn: bool) -> None:
        pending.reason = reason
        self._status = replace(self._status, failures=self._status.failures + 1, last_failure=reason)
        if warn:
            logger("checkpoint").warning(f"The checkpoint of step {pending.step} (seq {pending.seq}) was given up: {reason}")
