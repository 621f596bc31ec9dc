"""From the receipts of all ranks to one complete manifest. Pure, no torch."""

from collections import defaultdict
from collections.abc import Iterable

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.job import Receipt, SaveJob
from moetrain.checkpoint.modes import is_derived, is_written
from moetrain.store.boxes import tiles
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, Tensor


def merge(job: SaveJob, receipts: list[Receipt], parent: Manifest | None, now: float) -> Manifest:
    """The recovery point of this save: what was written now, and from `parent` the experts whose turn it was not.

    Raises CheckpointError when ranks disagree or a tensor is not covered exactly once.
    """
    for receipt in receipts:
        if (receipt.index, receipt.selection) != (job.index, job.selection):
            raise CheckpointError(f"rank {receipt.rank} chose other experts than rank 0.")
    objects = {record.name: record for receipt in receipts for record in receipt.objects}
    new_bytes = sum(record.num_bytes for record in objects.values())
    found = collect(receipts)
    now_written = {key for key, (tensor, _) in found.items() if is_written(tensor, job.mode, job.selection)}
    tensors = {key: _written(*found[key]) for key in found if key in now_written}
    for key, (tensor, _) in found.items():
        if key not in now_written and not is_derived(tensor):  # of what is there in full nothing derived is needed
            _inherit(tensor, parent, tensors, objects)
    return Manifest(
        save=job.save,
        parent=job.parent,
        index=job.index,
        step=job.step,
        time=now,
        mode=job.mode,
        full=job.selection is None,
        new_bytes=new_bytes,
        world=job.world,
        ep=count_layouts(receipts),
        progress=job.progress,
        objects=objects,
        tensors=tensors,
        ledger=job.ledger,
        ancestors=job.ancestors,
    )


def collect(receipts: Iterable[Receipt]) -> dict[str, tuple[Tensor, list[Piece]]]:
    """Every logical tensor that the receipts speak of, and its pieces. Raises CheckpointError when they disagree."""
    found: dict[str, tuple[Tensor, list[Piece]]] = {}
    for receipt in receipts:
        for tensor in receipt.tensors:
            known, pieces = found.setdefault(tensor.key, (tensor, []))
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(f"ranks disagree about the shape or type of {tensor.key}.")
            pieces += tensor.pieces
    return found


def _written(tensor: Tensor, pieces: list[Piece]) -> Tensor:
    if not tiles([(piece.offset, piece.shape) for piece in pieces], tensor.shape):
        raise CheckpointError(f"the ranks did not write every value of {tensor.key} exactly once.")
    fields = (tensor.name, tensor.component, tensor.bank, tensor.expert, tensor.dtype, tensor.shape)
    return Tensor(*fields, pieces=tuple(pieces))


def _inherit(tensor: Tensor, parent: Manifest | None, tensors: dict[str, Tensor], objects: dict[str, ObjectRecord]) -> None:
    """The parent's version of a tensor, and of a master its newer bfloat16 copy unless one was written now; their objects with them."""
    old = parent.tensors.get(tensor.key) if parent else None
    if parent is None or old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
        raise CheckpointError(f"{tensor.key} is in no earlier checkpoint of this shape and type.")
    for version in (old, parent.newest_weights(old)):
        if version.key not in tensors:
            tensors[version.key] = version
            objects |= {piece.object: parent.objects[piece.object] for piece in version.pieces}


def count_layouts(receipts: Iterable[Receipt]) -> int:
    """How many different sets of experts ranks hold: the expert-parallel degree when experts are not split further."""
    held: dict[int, set] = defaultdict(set)
    for receipt in receipts:
        held[receipt.rank] |= {tensor.group for tensor in receipt.tensors if tensor.group}
    return len({frozenset(groups) for groups in held.values()})
