"""The rotation of the paper (arXiv 2408.04307) in closed form: what the rule `sequential` must come to."""

from moetrain.checkpoint.modes import Selection
from moetrain.checkpoint.select import first_expert


def rotation(index: int, banks: dict[str, int], experts_per_save: int) -> Selection:
    """What `sequential` comes to with a constant K after a full checkpoint; `index`: number of checkpoints before this one.

    `banks` gives the number of experts of every bank in the order of the model. Any ceil(E / K) checkpoints in a row contain every expert.
    """
    selection = {}
    for layer, (bank, num_experts) in enumerate(banks.items()):
        first = first_expert(index, layer, len(banks), num_experts, experts_per_save)
        count = min(experts_per_save, num_experts)
        selection[bank] = sorted((first + i) % num_experts for i in range(count))
    return selection
