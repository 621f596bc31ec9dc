"""Where a start begins: at this run's own recovery point, at another's, or anew. A restart of the same job always goes on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.base.files import write_whole
from moetrain.base.log import logger
from moetrain.store.backend import absolute
from moetrain.store.io import Io
from moetrain.store.objects import PLACE, CheckpointFolder, place_of, resolve
from moetrain.telemetry.record import METRICS_FILE

JOB_FILE = "job.json"  # the job that started this run
RECORDS = (PLACE, METRICS_FILE, "experts", "tensorboard", "wandb_id")  # what a run that starts anew must not mix with


def origin(resume: str, folder: Path, environment: Mapping[str, str]) -> str:
    """What is restored: auto | must | never | a path. `resume` is checkpoint.resume.

    A path gives the first start only its values (a restart before the first checkpoint looks into the memory of the nodes first);
    `never` holds for a job, not for each of its restarts. Raises CheckpointError where the checkpoints of this run have gone.
    """
    if resume == "never" and not is_restart(folder, environment):
        return "never"
    if not has_saves(folder) and has_committed(folder):
        way_out = "checkpoint.resume=never starts" if resume in ("auto", "must") else "another run.name lets it start"
        hint = f"Mount or move them back and start again; {way_out} anew."
        raise CheckpointError(f"This run has committed checkpoints, and there is none left in {place_of(folder)}.", hint)
    if resume == "must":
        return "must"
    return "auto" if resume in ("auto", "never") or has_saves(folder) else resume


def origin_run(at: str, folder: Path) -> Path | None:
    """The run folder that `at` restores from; None when nothing is restored."""
    if at == "never" or (at == "auto" and not has_saves(folder)):
        return None
    if at in ("auto", "must"):
        return folder
    found = resolve(Path(at))
    return Path(at) if (Path(at) / "config.yaml").is_file() else found.parent


def has_saves(folder: Path) -> bool:
    return bool(CheckpointFolder(place_of(folder), Io()).saves())


def has_committed(folder: Path) -> bool:
    """Whether a run's records tell of a commit, wherever its checkpoints are now."""
    try:
        with (folder / METRICS_FILE).open(encoding="utf-8", errors="replace") as lines:
            return any('"checkpoint/bytes"' in line for line in lines)  # which the news of a commit have, and nothing else
    except FileNotFoundError:
        return False


def settled_place(run: Path, wanted: str) -> str:
    """Where the checkpoints of a run lie; written down when it is not its own folder. `wanted`: checkpoint.folder.

    A run that begins anew gets a place that no run had before it. Raises CheckpointError for a run whose checkpoints lie elsewhere.
    """
    known, pointer = place_of(run), run / PLACE
    if pointer.exists():
        if wanted and known.parent != absolute(Path(wanted)):
            hint = "Leave it out to go on there, or choose another run.name."
            raise CheckpointError(f"checkpoint.folder={wanted}: the checkpoints of this run lie in {known}.", hint)
    elif wanted:
        base, number = absolute(Path(wanted)), 1
        place = base / run.name
        while CheckpointFolder(place, Io()).newest_epoch():
            number += 1
            place = base / f"{run.name}-{number}"
        write_whole(pointer, f"{place}\n")
    return str(place_of(run))


def is_restart(folder: Path, environment: Mapping[str, str]) -> bool:
    """Whether torchrun or Slurm starts the same job once more, after a crash or a requeue."""
    file = folder / JOB_FILE
    count = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) + int(environment.get("SLURM_RESTART_COUNT", "0"))
    return count > 0 and file.is_file() and json.loads(file.read_text())["job"] == job_id(environment)


def job_id(environment: Mapping[str, str]) -> str:
    """The same through all restarts of a job. Slurm's comes first: a requeue has a rendezvous of its own."""
    return environment.get("SLURM_JOB_ID") or environment.get("TORCHELASTIC_RUN_ID", "")


def remember_job(folder: Path, environment: Mapping[str, str]) -> None:
    write_whole(folder / JOB_FILE, json.dumps({"job": job_id(environment)}) + "\n")


def set_aside(folder: Path) -> None:
    """Renames what an earlier run in `folder` left, to `NAME.before-N`, so that figures and recovery points of two runs do not mix."""
    used = [name for name in RECORDS if (folder / name).exists()]
    if not used:
        return
    number = 1
    while any((folder / f"{name}.before-{number}").exists() for name in RECORDS):
        number += 1
    for name in used:
        (folder / name).rename(folder / f"{name}.before-{number}")
    claims = folder / f"{PLACE}.before-{number}" / "claims"
    if claims.is_dir():  # an older job that still runs must find that a newer one has claimed the folder
        shutil.copytree(claims, folder / PLACE / "claims")
    logger().info("The run starts anew; what the earlier one left in %s is kept as *.before-%d.", folder, number)
