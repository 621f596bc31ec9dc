"""The policy of a run: which experts a checkpoint writes, and how many. Every rank decides alike: it sees the same ledger. No torch."""

from dataclasses import dataclass, field
from math import floor

from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection
from moetrain.checkpoint.plan import Holding
from moetrain.checkpoint.plt import plt_if_fault, plt_of_moments, plt_of_weights, share
from moetrain.checkpoint.select import RULES, Waiting, balanced, first_expert, first_of
from moetrain.store.manifest import WEIGHT16, Group


@dataclass(frozen=True)
class Horizon:
    """The whole run as the policy sees it. `assignments`: tokens x top_k, what every MoE layer routes until the end."""

    banks: dict[str, int] = field(default_factory=dict)
    assignments: int = 0


@dataclass(frozen=True)
class Homes:
    """Where experts live: the ranks that hold each alike. `spread`: bytes that all ranks share out among themselves, in experts."""

    of: dict[Group, tuple[int, ...]]
    spread: float = 0.0


def homes_of(holdings: list[Holding]) -> Homes:
    """From what all ranks hold."""
    everyone = {rank for holding in holdings for rank in holding.holders}
    experts = [holding for holding in holdings if holding.group is not None and holding.component != WEIGHT16]
    spread = sum(holding.num_bytes for holding in holdings if holding.group is None and set(holding.holders) == everyone)
    homes = {holding.group: holding.holders for holding in experts if holding.group is not None}
    each = sum(holding.num_bytes for holding in experts) / (len(homes) or 1)
    return Homes(homes, spread / each if each else 0.0)


@dataclass(frozen=True)
class Figures:
    """PLT (arXiv 2408.04307) given up so far, and what a fault now would add; experts per layer in the newest checkpoint."""

    weights: float = 0.0
    moments: float = 0.0
    if_fault: float = 0.0
    experts_per_save: int = 0


class Turns:
    """Chooses; keeps no state. The ledger says who waits, and since when."""

    def __init__(self, config: CheckpointConfig, horizon: Horizon) -> None:
        self._config, self._horizon = config, horizon

    @property
    def banks(self) -> dict[str, int]:
        return self._horizon.banks

    def selection(self, index: int, ledger: Ledger, expected_faults: float = 1.0, homes: Homes | None = None) -> Selection:
        """The experts of a partial checkpoint. `ledger`: live, with `saved` and `age` of the newest commit; `index`: commits before.

        With `plt_budget` the fewest experts (at least `experts_per_save`) with which any fault before the next commit costs at most
        its share of the budget that is left; all of them when the budget is spent.
        """
        largest = max(ledger.banks.values(), default=1)
        count = min(self._config.experts_per_save, largest)
        enough = largest if self._config.plt_budget else count
        while count < enough:  # by bisection: more experts leave less unsaved
            middle = (count + enough) // 2
            after = ledger.after(self._of(index, ledger, middle, homes), self._config.mode)
            count, enough = (count, middle) if self._fits(after, expected_faults) else (middle + 1, enough)
        return self._of(index, ledger, enough, homes)

    def keeps_budget(self, after: Ledger) -> bool:
        """Whether a fault costs no more than is left of the budget when the newest manifest holds this ledger."""
        return not self._config.plt_budget or self._fits(after, expected_faults=1.0)

    def figures(self, committed: Ledger, experts_per_save: int) -> Figures:
        """For people: `committed` is the ledger of the newest manifest."""
        assignments = self._horizon.assignments
        return Figures(
            plt_of_weights(committed, assignments),
            plt_of_moments(committed, assignments),
            plt_if_fault(committed, assignments),
            experts_per_save,
        )

    def _fits(self, after: Ledger, expected_faults: float) -> bool:
        assignments = self._horizon.assignments
        allowed = share(plt_of_moments(after, assignments), self._config.plt_budget, expected_faults)
        return plt_if_fault(after, assignments) <= allowed

    def _of(self, index: int, ledger: Ledger, count: int, homes: Homes | None) -> Selection:
        """`count` experts of every bank by the rule of the configuration."""
        rule = RULES[self._config.selection]
        unsaved = ledger.unsaved()
        selection, forced, rankings = {}, {}, {}
        for layer, (bank, num_experts) in enumerate(ledger.banks.items()):
            first = first_expert(index, layer, len(ledger.banks), num_experts, count)
            rankings[bank] = rule(Waiting(ledger.age[bank], unsaved[bank], first))
            selection[bank], forced[bank] = self._first_of(rankings[bank], ledger.age[bank], min(count, num_experts))
        if homes is None:
            return selection
        return balanced(selection, forced, rankings, homes.of, homes.spread)

    def _first_of(self, ranking: list[int], ages: list[int], count: int) -> tuple[list[int], set[int]]:
        if self._config.selection == "greedy":  # cold experts may wait for ever
            return sorted(ranking[:count]), set()
        return first_of(ranking, ages, count, max_age(len(ages), count, self._config.max_age_rounds))


def max_age(num_experts: int, count: int, rounds: float) -> int:
    """The greatest age an expert may reach, in checkpoints, when each writes `count`."""
    return floor(rounds * num_experts / count)
