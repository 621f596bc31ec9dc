"""The loop. Saving, logging, evaluating and sampling are hooks; this file only steps and stops."""

from moetrain.data.batch import Batch
from moetrain.dist.stop import SIGNAL_NAMES
from moetrain.optim.schedule import lr_at
from moetrain.parallel.engine import NonFiniteError, StepResult
from moetrain.train.run import Run

DONE = "done"


def train(run: Run) -> str:
    """Trains until the last step or a reason to stop; returns the reason ("done" at the end).

    Leaves a committed full checkpoint behind. A run that is told to stop saves before anything else: torchrun and Slurm grant half a
    minute, and an evaluation may take longer. Raises NonFiniteError naming step, rank and last good checkpoint.
    """
    for hook in (run.records, *run.hooks):
        hook.on_start(run)
    reason = _reason_to_stop(run)
    while not reason:
        result = _step(run, next(run.loader))
        run.progress.advance(result, run.samples_per_step)
        run.checkpoint.count(result.load.tolist())
        run.records.on_step(run, result)
        reason = _reason_to_stop(run)
        if reason:
            run.checkpoint.save(run.engine.state(), run.progress.as_dict(), full=True, hurried=reason in SIGNAL_NAMES)
            run.checkpoint.finish()
        if reason in ("", DONE):
            for hook in run.hooks:
                hook.on_step(run, result)
    for hook in (run.records, *run.hooks):
        hook.on_finish(run, reason)
    return reason


def _step(run: Run, batches: list[Batch]) -> StepResult:
    lr = lr_at(run.progress.step, run.progress.total_steps, run.config.optim)
    try:
        return run.engine.step(batches, lr, run.checkpoint.wait_copied)
    except NonFiniteError as error:
        good = run.checkpoint.status().committed_step
        kept = "no checkpoint was committed yet" if good is None else f"the last good checkpoint is of step {good}"
        sentence = f"Step {run.progress.step + 1}: {error.message} Nothing was updated; {kept}."
        hint = "Resume with a lower optim.lr, or with another data.seed to pass other samples, and checkpoint.allow_changes=true."
        raise NonFiniteError(sentence, hint) from error


def _reason_to_stop(run: Run) -> str:
    """Empty to go on. Agreed over the ranks, so that all leave at the same step."""
    if run.progress.finished:
        return DONE
    stop_after = run.config.run.stop_after
    if stop_after and run.progress.step >= stop_after:
        return f"run.stop_after={stop_after}"
    return run.stop.agreed() or ""
