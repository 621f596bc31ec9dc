"""How much training the recoveries of a run really took out of its experts, against what the run said beforehand.

python -m tools.realised_plt RUN

Counted from three things only: the load of every step (`experts/step-*.npz`, written with telemetry.experts_every=1), the ages of what
every start restored (its `resume` record), and the length of the run as that start planned it (in records that do not say so,
`config.yaml`). The ledger of the checkpoints is not read. An expert that a recovery to step S restored as it was at step s has lost its
tokens of the steps s + 1 to S: those that no later recovery goes back behind. What the run said of one recovery is in the record of the
commit it went back to, if that was written before the fault and the commit is what was restored: of a newer copy in memory, or with
experts in place of damaged ones, nothing was said (nan).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path

import numpy as np

from moetrain.base.errors import MoetrainError
from moetrain.config.saved import CONFIG_FILE, saved_config
from moetrain.config.schema import TrainConfig
from moetrain.telemetry.experts import load_snapshots
from moetrain.telemetry.record import Record, read_records

AGREEMENT = 0.05


@dataclass(frozen=True)
class Recovery:
    """One start that went on from a checkpoint. Ages int [layers, E] in steps; PLTs as the run said them, nan where it did not."""

    step: int
    age_LE: np.ndarray
    weight_age_LE: np.ndarray
    predicted: float  # of this recovery alone: the moments, said with the commit it went back to
    moments: float  # of all recoveries so far
    weights: float
    num_steps: int = 0  # of the whole run, as it was planned then; 0: not known


@dataclass(frozen=True)
class Row:
    """One recovery as it was counted here beside what the run said. `alone`: what it added."""

    step: int
    alone: float
    predicted: float
    moments: float
    said_moments: float
    weights: float
    said_weights: float

    @property
    def agrees(self) -> bool:
        pairs = [(self.moments, self.said_moments), (self.weights, self.said_weights)]
        if not isnan(self.predicted):
            pairs.append((self.alone, self.predicted))
        return all(abs(counted - said) <= AGREEMENT * max(counted, said) for counted, said in pairs)


def recoveries(records: list[Record]) -> list[Recovery]:
    """The `resume` records that say what was restored, in the order of the starts."""
    found, said, num_steps = [], dict[object, tuple[float, int]](), 0
    for record in records:
        if record.get("event") in ("start", "resume"):
            num_steps = int(record.get("train/total_steps", 0))
        if "checkpoint/plt_if_fault" in record:
            said[record["checkpoint/seq"]] = number(record, "checkpoint/plt_if_fault"), num_steps
        if record.get("event") == "resume" and "checkpoint/expert_ages" in record:
            ages = [np.array(json.loads(str(record[f"checkpoint/{kind}_ages"]))) for kind in ("expert", "weight")]
            predicted, planned = said.get(record["checkpoint/restored_seq"], (nan, 0)) if is_as_committed(record) else (nan, 0)
            if planned and num_steps:
                predicted *= planned / num_steps  # a share of the run as long as it is now
            plts = (number(record, f"checkpoint/plt_{kind}") for kind in ("moments", "weights"))
            found.append(Recovery(int(record["train/step"]), ages[0], ages[1], predicted, *plts, num_steps=num_steps))
    return found


def is_as_committed(resume: Record) -> bool:
    """A copy in memory has the number of its save, but more experts of that step than the commit."""
    return resume.get("checkpoint/restored_from") == "folder" and not resume.get("checkpoint/damage")


def number(record: Record, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else float("nan")


def lost(load_SLE: np.ndarray, surviving: list[tuple[int, np.ndarray]]) -> int:
    """Assignments that recoveries to these steps with these ages have lost together; every step of an expert counts once.

    `load_SLE[s]`: of step s + 1.
    """
    step_S11 = np.arange(1, len(load_SLE) + 1)[:, None, None]
    gone = np.zeros(load_SLE.shape, bool)
    for step, age_LE in surviving:
        gone |= (step_S11 <= step) & (step_S11 > step - age_LE)
    return int(load_SLE[gone].sum())


def count(load_SLE: np.ndarray, starts: list[Recovery], per_step: int, num_steps: int) -> list[Row]:
    """One row per recovery. A recovery to step S undoes those to later steps, and those to S itself: they gave up the same.

    `per_step`: assignments of all layers; `num_steps`: of the whole run, where a start does not say.
    """
    rows, surviving = list[Row](), list[Recovery]()
    for start in starts:
        before = [one for one in surviving if one.step < start.step]
        surviving = [*before, start]
        earlier = lost(load_SLE, [(one.step, one.age_LE) for one in before])
        moments = lost(load_SLE, [(one.step, one.age_LE) for one in surviving])
        weights = lost(load_SLE, [(one.step, one.weight_age_LE) for one in surviving])
        total = per_step * (start.num_steps or num_steps)
        alone = (moments - earlier) / total
        rows.append(Row(start.step, alone, start.predicted, moments / total, start.moments, weights / total, start.weights))
    return rows


def read(run: Path) -> tuple[np.ndarray, list[Recovery], int, int]:
    """Load of every step up to the last recovery, the recoveries, the assignments of all layers in a step, and the planned steps.

    Raises MoetrainError when a step was not logged by itself, or this is no run.
    """
    config = config_of(run)
    starts = recoveries(read_records(run))
    last = max((start.step for start in starts), default=0)
    snapshots = {snapshot.step: snapshot.load_LE for snapshot in load_snapshots(run)}
    missing = [step for step in range(1, last + 1) if step not in snapshots]
    if missing or config.telemetry.experts_every != 1:
        raise MoetrainError(f"{run} does not hold the expert load of every step.", "Train with telemetry.experts_every=1.")
    steps = -(-config.train.tokens // config.train.global_batch_tokens)
    per_step = config.train.global_batch_tokens * config.model.num_gatings() * config.model.routing.top_k
    shape = starts[0].age_LE.shape if starts else (1, 1)
    load_SLE = np.array([snapshots[step] for step in range(1, last + 1)]) if last else np.zeros((0, *shape), int)
    return load_SLE, starts, per_step, steps


def config_of(run: Path) -> TrainConfig:
    """Raises MoetrainError when this is no run."""
    config = saved_config(run)
    if config is None:
        raise MoetrainError(f"{run} is no run: it has no {CONFIG_FILE}.", "Give the folder of a run: runs/<name>.")
    return config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Counts what recoveries took out of experts; exit status 1: not what the run said, 2: it cannot be counted."
    )
    parser.add_argument("run", type=Path, help="run folder")
    options = parser.parse_args(arguments)
    try:
        if not config_of(options.run).model.num_gatings():
            print(f"{options.run} has no experts: a recovery loses nothing.")
            return 0
        rows = count(*read(options.run))
    except MoetrainError as error:
        print(error, file=sys.stderr)
        return 2
    print("step  this recovery: realised predicted   moments so far: realised said   weights so far: realised said")
    for row in rows:
        figures = (row.alone, row.predicted, row.moments, row.said_moments, row.weights, row.said_weights)
        print(f"{row.step:4d}  " + "  ".join(f"{figure:9.4%}" for figure in figures) + ("" if row.agrees else "  NOT WITHIN 5 %"))
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
