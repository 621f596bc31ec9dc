"""How saving stands, for people: the newest figures of one rank. No torch."""

from dataclasses import dataclass, field, replace
from threading import Lock

from moetrain.checkpoint.job import Reply
from moetrain.checkpoint.turns import Figures
from moetrain.store.manifest import Manifest


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


class Standing:
    """The status of now. Replaced as a whole, by the training thread (`started`, `restored`), the memory lane (`copied`) and both lanes
    (`failed`, `ended`; `committed` by the persist lane only): whoever reads it never waits.
    """

    def __init__(self) -> None:
        self.now = Status()
        self._changing = Lock()

    def started(self, seq: int) -> None:
        """A save that goes to the store."""
        with self._changing:
            self.now = replace(self.now, pending_seq=seq)

    def ended(self, seq: int) -> None:
        """Whatever became of it; a newer one may be pending."""
        with self._changing:
            if self.now.pending_seq == seq:
                self.now = replace(self.now, pending_seq=None)

    def copied(self, step: int) -> None:
        with self._changing:
            self.now = replace(self.now, copied_step=step)

    def committed(self, seq: int, step: int, reply: Reply, figures: Figures) -> None:
        with self._changing:
            self.now = replace(
                self.now,
                committed_seq=seq,
                committed_step=step,
                committed_bytes=reply.num_bytes,
                committed_seconds=reply.seconds,
                oldest_expert_steps=reply.oldest_expert_steps,
                figures=figures,
            )

    def failed(self, reason: str) -> None:
        with self._changing:
            self.now = replace(self.now, failures=self.now.failures + 1, last_failure=reason)

    def restored(self, committed: Manifest | None, figures: Figures) -> None:
        """Training goes on from a recovery point. `committed`: what this folder holds of it; what lay in memory may be newer."""
        seq, step = (None, None) if committed is None else (committed.seq, committed.step)
        with self._changing:
            self.now = replace(self.now, committed_seq=seq, committed_step=step, figures=figures)
