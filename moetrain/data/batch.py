"""What a model is fed. B rows, S positions."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One forward pass.

    tokens_BS    int64 input ids
    labels_BS    int64, the id that follows each token
    valid_BS     bool, whether the label counts in the loss
    position_BS  int64, counted from the start of the row, or of the document with document boundaries
    document_BS  int64 number of the document within the row, from 0; None when attention may cross documents
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    valid_BS: Tensor
    position_BS: Tensor
    document_BS: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        tokens_BS, labels_BS, valid_BS, position_BS = (part.to(device, non_blocking=True) for part in self[:4])
        document_BS = None if self.document_BS is None else self.document_BS.to(device, non_blocking=True)
        return Batch(tokens_BS, labels_BS, valid_BS, position_BS, document_BS)


def make_batch(tokens_BS: Tensor, labels_BS: Tensor, valid_BS: Tensor, end_id: int, document_boundaries: bool) -> Batch:
    """Adds positions and document numbers.

    With boundaries the end token *opens* the document behind it, at position 0: its first token is predicted from the end token alone, in
    training as in evaluation and generation, and nothing of another document is seen. The end of a document is predicted inside it.
    """
    index_S = torch.arange(tokens_BS.shape[1])
    if not document_boundaries:
        return Batch(tokens_BS, labels_BS, valid_BS, index_S.expand_as(tokens_BS).contiguous(), None)
    opens_BS = tokens_BS == end_id
    start_BS = torch.where(opens_BS, index_S, 0).cummax(dim=1).values
    document_BS = opens_BS.cumsum(dim=1) - opens_BS[:, :1].long()
    return Batch(tokens_BS, labels_BS, valid_BS, index_S - start_BS, document_BS)
