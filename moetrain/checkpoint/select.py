"""Whose turn it is: the experts of one partial checkpoint. Pure, no torch."""

from moetrain.checkpoint.modes import Selection


def rotation(index: int, banks: dict[str, int], experts_per_save: int) -> Selection:
    """Sequential selection interleaved over layers (arXiv 2408.04307, sequential selection).

    `banks` gives the number of experts of every bank in the order of the model, `index` the number of checkpoints before this one.
    The layers start at points spread evenly over the experts, so that the experts of one checkpoint live on different ranks
    (for contiguous placements; the paper's offset of one per layer does that only when a rank holds one expert).
    Any ceil(E / K) checkpoints in a row contain every expert.
    """
    selection = {}
    for layer, (bank, num_experts) in enumerate(banks.items()):
        first = index * experts_per_save + layer * num_experts // len(banks)
        count = min(experts_per_save, num_experts)
        selection[bank] = sorted((first + i) % num_experts for i in range(count))
    return selection
