"""Gates: logits to scores. N tokens, E experts."""

import torch
from torch import Tensor

from moetrain.routing.config import RoutingConfig
from moetrain.routing.types import GateScores


def gate_scores(logits_NE: Tensor, config: RoutingConfig, bias_E: Tensor | None = None) -> GateScores:
    """Scores of a softmax or sigmoid gate. `bias_E` enters the selection only (arXiv 2408.15664 section 3).

    With softmax_order="after" the combine scores are logits: the softmax over the selected ones follows in `select`.
    """
    if config.score == "sigmoid":
        score_NE = torch.sigmoid(logits_NE)
        value_NE = score_NE / score_NE.sum(1, keepdim=True)
        select_NE, combine_NE = score_NE, score_NE
    else:
        value_NE = torch.softmax(logits_NE, dim=1)
        select_NE, combine_NE = (value_NE, value_NE) if config.softmax_order == "before" else (logits_NE, logits_NE)
    select_NE = select_NE.detach() if bias_E is None else select_NE.detach() + bias_E
    return GateScores(select_NE, value_NE, combine_NE, logits_NE)
