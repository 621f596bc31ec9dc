"""Saving a run while it trains, and resuming it. Every rank calls the same methods; saving needs no collective.

A save passes through three hands: a thread copies live state into the arena, the rank's writer process makes objects of it,
rank 0's writer commits. The training thread waits for the first only, and only before it changes the state: no disk is touched before.
"""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.checkpoint.arena import Arena, usual_folders
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import Ready, copy_fragments, parts_of
from moetrain.checkpoint.job import Receipt, Reply, SaveJob
from moetrain.checkpoint.modes import is_written
from moetrain.checkpoint.plan import lay_out, my_parts
from moetrain.checkpoint.process import Writer, WriterDied, WriterProcess
from moetrain.checkpoint.recover import Agree, Gather, LoadReport, from_rank_zero, restore_together
from moetrain.checkpoint.select import rotation
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
    failures: int = 0
    last_failure: str = ""

    @property
    def pending(self) -> bool:
        return self.pending_seq is not None


@dataclass(frozen=True)
class Line:
    """Where the line of recovery points stands that the next save continues. `banks` None: nothing to build on, save in full."""

    parent: SaveId | None = None
    index: int = 0
    banks: dict[str, int] | None = None


class Pending:
    """One save under way."""

    def __init__(self, save: SaveId, step: int) -> None:
        self.save = save
        self.step = step
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
        gather: Gather | None = None,
    ) -> None:  # fmt: skip
        """Every rank constructs it; `agree` is called once. `writer`: None for the rank's own process; `gather`: None in one process.

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

    def save(self, state: ModelState, progress: dict, *, full: bool = False) -> Pending:
        """Starts a save and returns at once. `state` may change only after `wait_copied`; `progress` is JSON-able and has `step`.

        A save that cannot be committed (a full disk, a dead writer, a late rank) is given up with a warning; the next one
        takes the same experts. So is one that finds the save before it still running, except a `full` one, which waits for it.
        Raises CheckpointError when another job has taken over the folder.
        """
        previous, pending = self._pending, Pending(self._next, int(progress["step"]))
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
        if restored is None:
            return None
        choice, report = restored
        manifest = choice.manifest
        own = choice.folder.resolve() == self._folder.path.resolve()
        # A repaired recovery point, or one elsewhere, is nothing a manifest of this folder can refer to: the next save is full.
        builds_on = own and not choice.damage and not report.is_converted
        self._line = Line(manifest.save, manifest.index + 1, manifest.banks()) if builds_on else Line(None, manifest.index + 1)
        if own:
            self._status = replace(self._status, committed_seq=manifest.seq, committed_step=manifest.step)
        return report

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
        line = self._attempts[pending.save] = self._line
        selection = None if self._is_full(line, full) else rotation(line.index, line.banks or {}, self._config.experts_per_save)
        parts = parts_of(state)
        wanted = [number for number, part in enumerate(parts) if is_written(part.tensor, self._config.mode, selection)]
        mine = [wanted[number] for number in my_parts([parts[number] for number in wanted], self._rank)]
        plans, num_bytes = lay_out(parts, mine)
        arena = self._room(num_bytes)
        objects = copy_fragments(state, plans, arena, ready)
        written = set(mine)
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
            tensors=[replace(part.tensor, pieces=()) for number, part in enumerate(parts) if number not in written],
            progress=progress,
            keep=self._config.keep,
            timeout_seconds=self._config.timeout_seconds,
        )
        return job, arena

    def _current_line(self) -> Line:
        """Read from the folder, not remembered: every rank sees the same."""
        line = self._line
        committed = [save for save in sorted(self._attempts, reverse=True) if self._folder.outcome(save)]
        if committed:
            tried = self._attempts[committed[0]]
            banks = tried.banks or self._banks(committed[0])
            line = Line(committed[0], tried.index + 1, banks)
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
            )
            return
        reason = reply.reason or self._folder.reason(job.save) or "rank 0 did not decide in time."
        self._fail(pending, reason, warn=self._rank == 0 or reply.outcome == "abandoned")

    def _fail(self, pending: Pending, reason: str, warn: bool) -> None:
        pending.reason = reason
        self._status = replace(self._status, failures=self._status.failures + 1, last_failure=reason)
        if warn:
            logger("checkpoint").warning(f"The checkpoint of step {pending.step} (seq {pending.seq}) was given up: {reason}")
