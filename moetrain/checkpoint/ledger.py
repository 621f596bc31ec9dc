"""Who was trained on how much, and how much of that a recovery would give up: counts of token-assignments per expert. Pure, no torch.

An assignment is one token routed to one expert. Of every expert `total` splits exactly into what its saved state holds
(`saved - lost`), what recoveries gave up (`lost`) and what is still unsaved (`total - saved`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from moetrain.checkpoint.modes import Selection, keeps_weights_fresh
from moetrain.store.manifest import Group

Counts = dict[str, list[int]]
"""Bank -> one number per expert."""


@dataclass(frozen=True)
class Ledger:
    """A value: every method returns a new one.

    total             assignments since the start of the run; goes back at a rollback
    saved             `total` when the state that rotates (moments; with mode `experts` weights too) was last written
    lost              assignments whose updates recoveries took out of that state
    saved_weights, lost_weights   the same of the newest weights: they are in every checkpoint of modes `moments` and `weights16`
    age               checkpoints since the one that wrote the state that rotates
    """

    total: Counts
    saved: Counts
    lost: Counts
    saved_weights: Counts
    lost_weights: Counts
    age: Counts

    @classmethod
    def of_banks(cls, banks: dict[str, int]) -> "Ledger":
        """Of a run that begins. `banks`: number of experts of every bank, in the order of the model."""
        return cls(*({bank: [0] * num_experts for bank, num_experts in banks.items()} for _ in range(6)))

    @classmethod
    def of_json(cls, found: dict, banks: dict[str, int]) -> "Ledger":
        """As a manifest holds it; of a checkpoint whose assignments nobody counted, all zeros."""
        return cls(**found) if found else cls.of_banks(banks)

    def to_json(self) -> dict[str, Counts]:
        return asdict(self)

    @property
    def banks(self) -> dict[str, int]:
        return {bank: len(row) for bank, row in self.total.items()}

    def count(self, load: Sequence[Sequence[int]]) -> "Ledger":
        """After one more step. `load`: layers x experts, layers in the order of the banks."""
        rows = zip(self.total.items(), load, strict=True)
        return replace(self, total={bank: [a + b for a, b in zip(row, more, strict=True)] for (bank, row), more in rows})

    def since(self, committed: "Ledger") -> "Ledger":
        """The same training, seen from what a commit holds: `saved` such that `saved - lost` is what its state knows of, though recoveries
        from memory took something out of the live state since."""
        live = self if self.total else Ledger.of_banks(committed.banks)  # nobody counts
        return replace(
            live,
            saved=_plus(committed.saved, _minus(live.lost, committed.lost)),
            saved_weights=_plus(committed.saved_weights, _minus(live.lost_weights, committed.lost_weights)),
            age=committed.age,
        )

    def unsaved(self) -> Counts:
        """What a recovery to this point takes out of the state that rotates."""
        return _minus(self.total, self.saved)

    def unsaved_weights(self) -> Counts:
        """What it takes out of the weights."""
        return _minus(self.total, self.saved_weights)

    def after(self, selection: Selection | None, mode: str) -> "Ledger":
        """As the manifest of a save of these experts (None: all) holds it."""
        if selection is None or mode == "full":
            selection = {bank: list(range(num_experts)) for bank, num_experts in self.banks.items()}
        chosen = {bank: set(experts) for bank, experts in selection.items()}
        weights = self.total if keeps_weights_fresh(mode) else _where(chosen, self.total, self.saved_weights)
        zeros = {bank: [0] * len(row) for bank, row in self.age.items()}
        older = {bank: [age + 1 for age in row] for bank, row in self.age.items()}
        return replace(
            self, saved=_where(chosen, self.total, self.saved), saved_weights=weights, age=_where(chosen, zeros, older)
        )  # fmt: skip

    def restored(self) -> "Ledger":
        """After a recovery to the manifest that holds this ledger: what was unsaved is lost."""
        return replace(
            self,
            lost=_plus(self.lost, self.unsaved()),
            saved=self.total,
            lost_weights=_plus(self.lost_weights, self.unsaved_weights()),
            saved_weights=self.total,
        )

    def with_expert(self, group: Group, source: "Ledger", *, weights: bool = True) -> "Ledger":
        """With one expert's state, and its `weights` too, taken from the recovery point of `source`."""
        bank, expert = group
        held = source.saved[bank][expert] - source.lost[bank][expert] + self.lost[bank][expert]
        held_weights = source.saved_weights[bank][expert] - source.lost_weights[bank][expert] + self.lost_weights[bank][expert]
        return replace(
            self,
            saved=_put(self.saved, group, held),
            saved_weights=_put(self.saved_weights, group, held_weights) if weights else self.saved_weights,
            age=_put(self.age, group, max(self.age[bank][expert], source.age[bank][expert] + 1)),
        )


def _plus(a: Counts, b: Counts) -> Counts:
    return {bank: [x + y for x, y in zip(row, b[bank], strict=True)] for bank, row in a.items()}


def _minus(a: Counts, b: Counts) -> Counts:
    return {bank: [x - y for x, y in zip(row, b[bank], strict=True)] for bank, row in a.items()}


def _where(chosen: dict[str, set[int]], a: Counts, b: Counts) -> Counts:
    """`a` for the chosen experts, `b` for the others."""
    return {bank: [a[bank][i] if i in chosen.get(bank, ()) else x for i, x in enumerate(row)] for bank, row in b.items()}


def _put(counts: Counts, group: Group, value: int) -> Counts:
    bank, expert = group
    return counts | {bank: [value if i == expert else x for i, x in enumerate(counts[bank])]}
