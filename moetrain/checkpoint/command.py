"""`moetrain checkpoint VERB RUN`: looks into a checkpoint folder and keeps it in order. Only `convert` needs torch."""

import argparse
import time
from pathlib import Path

from moetrain.base.clock import SystemClock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.agent_command import add_agent
from moetrain.checkpoint.choose import check, check_object, remembered
from moetrain.checkpoint.complaint import Run, in_a_sentence
from moetrain.checkpoint.diff import Difference
from moetrain.checkpoint.points import dangling, find
from moetrain.checkpoint.prune import check_rest
from moetrain.checkpoint.removed import missing
from moetrain.checkpoint.table import columns, duration, expert_table, size
from moetrain.store.io import Io
from moetrain.store.manifest import Group, Manifest
from moetrain.store.objects import CheckpointFolder, place_of, resolve

POINT = "a number as `list` shows them under seq, or the name of a pin"
TAKE_OVER = "do it although a job may be writing there, on another machine or in another container too: it cannot commit any more and stops"


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers `checkpoint` with its verbs; each sets `run`, a function of the parsed arguments that returns the exit status."""
    parser = subparsers.add_parser(
        "checkpoint", help="look at the checkpoints of a run, keep, remove and convert them",
        description="A run's checkpoint folder holds recovery points: states that training can resume from. Each was written only in part, "
        "some experts of every layer in turn; what it did not write it takes over from older ones.",
    )  # fmt: skip
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add(verbs, "list", list_points, "one line for each recovery point, newest first")
    sub = _add(verbs, "show", show, "one recovery point: progress, age and Adam step of every expert")
    sub.add_argument("--seq", metavar="POINT", help=f"which recovery point (default: the newest): {POINT}")
    sub.add_argument("--png", metavar="FILE", type=Path, help="also draw the ages, layers by experts, into this file")
    _add(verbs, "verify", verify, "read every object of every recovery point; exit status 1 when one is damaged or missing")
    sub = _add(verbs, "diff", diff, "what changed from one recovery point to another: objects, experts, ages, tokens")
    sub.add_argument("a", metavar="A", help=f"the older one: {POINT}")
    sub.add_argument("b", metavar="B", help=f"the newer one: {POINT}")
    sub = _add(verbs, "pin", pin, "keep a recovery point, whatever checkpoint.keep says, until it is unpinned")
    sub.add_argument("name", metavar="NAME", help="a name for it: letters, digits, dots, hyphens, underscores")
    sub.add_argument("--seq", metavar="POINT", help=f"which recovery point (default: the newest): {POINT}")
    sub = _add(verbs, "unpin", unpin, "take a pin away; the next sweep may remove the recovery point")
    sub.add_argument("name", metavar="NAME", help="the name of the pin")
    sub = _add(verbs, "prune", prune, "remove all but the newest recovery points and the pinned ones, and what only those needed")
    sub.add_argument("--keep", metavar="N", type=int, required=True, help="how many of the newest stay, 1 or more")
    sub.add_argument("--take-over", action="store_true", help=TAKE_OVER)
    _add_convert(verbs)
    add_agent(verbs)


def _add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", verb: str, run: Run, help: str) -> argparse.ArgumentParser:
    sub = verbs.add_parser(verb, help=help, description=f"moetrain checkpoint {verb}: {help}.")
    sub.add_argument("folder", metavar="RUN", type=Path, help="run folder, or the checkpoint folder in it")
    sub.set_defaults(run=in_a_sentence(run))
    return sub


def _add_convert(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sub = verbs.add_parser(
        "convert", help="write recovery points for torch.distributed.checkpoint (DCP), or read one of its checkpoints",
        description="moetrain checkpoint convert RUN --to dcp --out TREE publishes every recovery point as a folder TREE/step-N that the "
        "stock DCP reader loads and reshards. Each holds what its save wrote and refers to older ones for the rest; the same command again "
        "adds what is new. With --seq it is one recovery point, complete in itself. moetrain checkpoint convert DCP --from dcp --out RUN "
        "makes a recovery point of a DCP checkpoint with the same names. DCP's metadata is a pickle: read only what you trust.",
    )  # fmt: skip
    sub.add_argument("source", metavar="RUN|DCP", type=Path, help="run folder (--to) or folder of one DCP checkpoint (--from)")
    way = sub.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=["dcp"], help="from our format to this one")
    way.add_argument("--from", dest="source_format", choices=["dcp"], help="from this format to ours")
    sub.add_argument("--out", metavar="DIR", type=Path, required=True, help="tree, or new folder with --seq (--to); run folder (--from)")
    sub.add_argument("--seq", metavar="POINT", help=f"with --to, only this recovery point: {POINT}")
    sub.add_argument("--take-over", action="store_true", help=f"with --from, {TAKE_OVER}")
    sub.set_defaults(run=in_a_sentence(convert))


def list_points(arguments: argparse.Namespace) -> int:
    folder = _open(arguments.folder)
    pinned: dict[int, list[str]] = {}
    for name, save in folder.pins().items():
        pinned.setdefault(save.seq, []).append(name)
    rows = [["seq", "step", "kind", "new", "total", "oldest expert", "saved", "pins"]]
    damaged = []
    for point in folder.history():
        if isinstance(point, CheckpointError):
            damaged.append(point.message)
            continue
        oldest = max(point.ages().values(), default=0)
        age, pins = f"{duration(time.time() - point.time)} ago", " ".join(pinned.get(point.seq, []))
        rows.append(
            [str(point.seq), str(point.step), _kind(point), size(point.new_bytes), size(point.total_bytes), f"{oldest} steps", age, pins]
        )
    if not pinned:
        rows = [row[:-1] for row in rows]
    print("\n".join([*columns(rows), *damaged, *missing(folder).values(), *dangling(folder)]))
    return 1 if damaged else 0


def show(arguments: argparse.Namespace) -> int:
    point = find(_open(arguments.folder), arguments.seq)
    if arguments.png is not None:  # first: a report hides what is wrong with the name
        draw(point, arguments.png)
    parent = f", parent {point.parent.seq}" if point.parent and not point.full else ""
    print(f"seq {point.seq} (epoch {point.save.epoch}{parent}), step {point.step}, {_kind(point)}, mode {point.mode}")
    print(f"saved {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(point.time))} by {point.world} ranks, ep {point.ep}")
    print(f"{size(point.new_bytes)} new, {size(point.total_bytes)} in {len(point.objects)} objects, {len(point.tensors)} tensors")
    masters = [tensor for tensor in point.tensors.values() if tensor.component == "master"]
    print(f"{sum(tensor.num_values for tensor in masters):,} parameters and buffers")
    print("progress: " + ", ".join(f"{name} {value}" for name, value in point.progress.items()))
    for title, values in (*_ages(point).items(), ("Adam step of every expert", point.adam_steps())):
        if values:
            print("\n".join([f"\n{title}", *expert_table(values)]))
    if arguments.png is not None:
        print(f"\n{arguments.png}")
    return 0


def _ages(point: Manifest) -> dict[str, dict[Group, int]]:
    """Ages by what they are of: weights apart where they are fresher than the rest."""
    ages, weights = point.ages(), point.weight_ages()
    if ages == weights:
        return {"age of every expert in steps": ages}
    return {"age of every expert's weights in steps": weights, "age of every expert's moments in steps": ages}


def draw(point: Manifest, file: Path) -> None:
    """The ages of every expert as a map, layers by experts. Raises CheckpointError when there are no experts or the file cannot be."""
    import numpy as np

    from moetrain.telemetry.plots import expert_ages

    banks = point.banks()
    if not banks:
        raise CheckpointError(f"seq {point.seq} has no experts to draw.")
    maps = {}
    for title, values in _ages(point).items():
        ages_LE = np.full((len(banks), max(banks.values())), np.nan)
        for (bank, expert), age in values.items():
            ages_LE[list(banks).index(bank), expert] = age
        maps[title] = ages_LE
    try:
        expert_ages(f"seq {point.seq}, step {point.step}, {_kind(point)}, mode {point.mode}", tuple(banks), maps).savefig(
            file, dpi=130, format=file.suffix[1:] or "png"
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be drawn: {error}.", "Give --png a file name such as ages.png in a folder that exists."
        ) from error


def verify(arguments: argparse.Namespace) -> int:
    folder = _open(arguments.folder)
    look = remembered(check_object)
    failed, absent = False, missing(folder)
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
    still = [sentence for save, sentence in absent.items() if folder.outcome(save) is None]  # else committed while the others were read
    still += dangling(folder)
    print("\n".join(still), end="\n" if still else "")
    return 1 if failed or still else 0


def diff(arguments: argparse.Namespace) -> int:
    folder = _open(arguments.folder)
    print("\n".join(Difference.between(find(folder, arguments.a), find(folder, arguments.b)).lines()))
    return 0


def pin(arguments: argparse.Namespace) -> int:
    folder = _open(arguments.folder)
    point = find(folder, arguments.seq)
    folder.pin(arguments.name, point.save)
    print(f"{arguments.name} keeps seq {point.seq} (step {point.step}), {size(point.total_bytes)}.")
    return 0


def unpin(arguments: argparse.Namespace) -> int:
    _open(arguments.folder).unpin(arguments.name)
    print(f"{arguments.name} is unpinned; a sweep removes what nothing else keeps.")
    return 0


def prune(arguments: argparse.Namespace) -> int:
    if arguments.keep < 1:
        raise CheckpointError(
            f"--keep {arguments.keep} is not possible: at least 1 recovery point stays.", "Remove the folder to be rid of all."
        )
    folder = _open(arguments.folder)
    take_over = arguments.take_over or _is_done(arguments.folder)
    if not take_over:
        folder.check_free()
    newer = check_rest(folder, arguments.keep)
    before = folder.saves()
    blocking = folder.prune(arguments.keep, take_over)
    gone = [save for save in before if save not in folder.saves()]
    print(f"{len(gone)} recovery point{'s' if len(gone) != 1 else ''} removed, {len(folder.saves())} kept.")
    if blocking:
        blocked = "No object was removed: what these recovery points need is not known. Unpin them, or remove the files."
        print("\n".join([blocked, *blocking]))
    if newer:
        print("\n".join(["These are kept and damaged; an older one is good.", *newer]))
    return 1 if blocking or newer else 0


def convert(arguments: argparse.Namespace) -> int:
    if arguments.to:
        return to_dcp(arguments.source, arguments.out, arguments.seq)
    if arguments.seq is not None:
        raise CheckpointError("--seq goes with --to.", "A DCP folder holds one checkpoint; name that folder.")
    return from_dcp(arguments.source, arguments.out, arguments.take_over)


def to_dcp(run: Path, out: Path, seq: str | None) -> int:
    """Publishes what is not in the tree yet, oldest first; with `seq` one recovery point. Exit status 1 when one cannot be read."""
    from moetrain.checkpoint.dcp import Tree, write_whole

    folder = _open(run)
    _check_apart(out)
    if seq is not None:
        point = find(folder, seq)
        write_whole(folder, point, out)
        print(f"{out}: step {point.step}, {size(point.total_bytes)}")
        return 0
    tree, failed, steps = Tree(out), False, set[int]()
    newest_first = [point for point in folder.history() if isinstance(point, Manifest)]
    newest_of_step = [point for point in newest_first if not (point.step in steps or steps.add(point.step))]
    missing_there = [point for point in reversed(newest_of_step) if not tree.has(point)]
    if not missing_there:
        print(f"{out} has every recovery point already.")
    for point in missing_there:
        try:
            print(f"{tree.add(folder, point)}: seq {point.seq}, {size(point.new_bytes)} of {size(point.total_bytes)} were new")
        except CheckpointError as error:
            if point.save in folder.saves():  # else a running job swept it while it was read
                print(f"seq {point.seq} is not published: {error}")
                failed = True
    return 1 if failed else 0


def _check_apart(out: Path) -> None:
    """Raises CheckpointError for a place in a checkpoint folder, where nothing but checkpoints of ours may lie."""
    for folder in (out.resolve(), *out.resolve().parents):
        if (folder / "manifests").is_dir() and (folder / "objects").is_dir():
            raise CheckpointError(f"--out {out} lies in the checkpoint folder {folder}.", "Give a folder of its own.")


def from_dcp(source: Path, run: Path, take_over: bool) -> int:
    """Commits a DCP checkpoint as the newest recovery point of a run folder, made if need be."""
    from moetrain.checkpoint.dcp_import import DcpFolder, read_into

    try:
        folder = _open(run)
    except CheckpointError:
        folder = CheckpointFolder(place_of(run), Io())
    checkpoint = DcpFolder(source)
    if not (take_over or _is_done(run)):
        folder.check_free()
    point = read_into(folder, checkpoint, SystemClock())
    print(f"{folder.path}: seq {point.seq}, step {point.step}, {size(point.total_bytes)}")
    return 0


def _open(path: Path) -> CheckpointFolder:
    return CheckpointFolder(resolve(path), Io())


def _is_done(run: Path) -> bool:
    """The run reached its last step: nobody writes. A checkpoint folder by itself does not tell whose it is, or where that run is."""
    return (run / "DONE").exists()


def _kind(point: Manifest) -> str:
    return "full" if point.full else "partial"
