"""`moetrain checkpoint list|show|verify RUN`: looks into a checkpoint folder. Runs without torch."""

import argparse
import time
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.choose import check, check_object, remembered
from moetrain.checkpoint.table import columns, duration, expert_table, size
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder, resolve


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers `checkpoint` with its verbs; each sets `run`, a function of the parsed arguments that returns the exit status."""
    parser = subparsers.add_parser("checkpoint", help="list, show or verify the checkpoints of a run")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, function, help in (
        ("list", list_points, "one line for each recovery point, newest first"),
        ("show", show, "one recovery point: progress, age and Adam step of every expert"),
        ("verify", verify, "read every object of every recovery point; exit status 1 when one is damaged"),
    ):
        sub = verbs.add_parser(verb, help=help, description=f"moetrain checkpoint {verb}: {help}.")
        sub.add_argument("folder", metavar="RUN", type=Path, help="run folder, or the checkpoint folder in it")
        if function is show:
            sub.add_argument("--seq", type=int, help="which recovery point (default: the newest)")
        sub.set_defaults(run=function)


def list_points(arguments: argparse.Namespace) -> int:
    folder = CheckpointFolder(resolve(arguments.folder), Io())
    rows = [["seq", "step", "kind", "new", "total", "oldest expert", "saved"]]
    damaged = []
    for point in folder.history():
        if isinstance(point, CheckpointError):
            damaged.append(point.message)
            continue
        oldest = max(point.ages().values(), default=0)
        age = f"{duration(time.time() - point.time)} ago"
        kind = "full" if point.full else "partial"
        rows.append([str(point.seq), str(point.step), kind, size(point.new_bytes), size(point.total_bytes), f"{oldest} steps", age])
    print("\n".join([*columns(rows), *damaged]))
    return 1 if damaged else 0


def show(arguments: argparse.Namespace) -> int:
    folder = CheckpointFolder(resolve(arguments.folder), Io())
    point = _find(folder, arguments.seq)
    parent = f", parent {point.parent.seq}" if point.parent and not point.full else ""
    kind = "full" if point.full else "partial"
    print(f"seq {point.seq} (epoch {point.save.epoch}{parent}), step {point.step}, {kind}, mode {point.mode}")
    print(f"saved {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(point.time))} by {point.world} ranks, ep {point.ep}")
    print(f"{size(point.new_bytes)} new, {size(point.total_bytes)} in {len(point.objects)} objects, {len(point.tensors)} tensors")
    masters = [tensor for tensor in point.tensors.values() if tensor.component == "master"]
    print(f"{sum(tensor.num_values for tensor in masters):,} parameters and buffers")
    print("progress: " + ", ".join(f"{name} {value}" for name, value in point.progress.items()))
    for title, values in (("age of every expert in steps", point.ages()), ("Adam step of every expert", point.adam_steps())):
        if values:
            print("\n".join([f"\n{title}", *expert_table(values)]))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    folder = CheckpointFolder(resolve(arguments.folder), Io())
    look = remembered(check_object)
    failed = False
    for save in folder.saves():
        try:
            point = folder.manifest(save)
            bad = list(check(folder, point, look).values())
        except CheckpointError as error:
            point, bad = None, [error.message]
        if save not in folder.saves():  # swept by a running job while it was read
            continue
        failed = failed or bool(bad)
        name = f"seq {save.seq}" + (f", step {point.step}" if point else "")
        good = f"good, {len(point.objects)} objects, {size(point.total_bytes)}" if point else ""
        print("\n".join([f"{name}: {'DAMAGED' if bad else good}", *(f"  {sentence}" for sentence in bad)]))
    return 1 if failed else 0


def _find(folder: CheckpointFolder, seq: int | None) -> Manifest:
    points = [point for point in folder.history() if isinstance(point, Manifest) and seq in (None, point.seq)]
    if not points:
        raise CheckpointError(f"There is no good recovery point{f' {seq}' if seq is not None else ''} in {folder.path}.")
    return points[0]
