"""Proportion of lost tokens (arXiv 2408.04307): the mean over MoE layers of lost assignments over all assignments of the whole run.

Pure, no torch. The denominator is what the run is planned to route (tokens x top_k in every layer); capacity may drop a little of it.
"""

from moetrain.checkpoint.ledger import Counts, Ledger


def plt(lost: Counts, assignments: int) -> float:
    """0 when nothing is planned or there is no MoE layer. `assignments`: of one layer over the whole run."""
    if not lost or assignments <= 0:
        return 0.0
    return sum(map(sum, lost.values())) / (len(lost) * assignments)


def plt_of_moments(ledger: Ledger, assignments: int) -> float:
    """Given up so far in the state that rotates."""
    return plt(ledger.lost, assignments)


def plt_of_weights(ledger: Ledger, assignments: int) -> float:
    return plt(ledger.lost_weights, assignments)


def plt_if_fault(committed: Ledger, assignments: int) -> float:
    """What a fault before the next commit would add: the unsaved part of the newest recovery point. Later steps are trained again."""
    return plt(committed.unsaved(), assignments)


def share(spent: float, budget: float, expected_faults: float) -> float:
    """What one fault may cost now, so that as many more as are expected fit into what is left of the budget."""
    return max(0.0, budget - spent) / max(1.0, expected_faults)
