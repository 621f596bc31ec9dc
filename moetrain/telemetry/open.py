"""The sinks a run asks for, opened on rank 0."""

from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.telemetry.config import TelemetryConfig
from moetrain.telemetry.console import open_console
from moetrain.telemetry.sinks import JsonlSink, Sink, Sinks
from moetrain.telemetry.tensorboard import TensorboardSink
from moetrain.telemetry.wandb import open_wandb


def open_sinks(
    config: TelemetryConfig, folder: Path, name: str, total_steps: int, clock: Clock, resolved: dict[str, object], is_main: bool
) -> Sinks:
    """metrics.jsonl in `folder` always, the rest by choice; no sink at all unless `is_main`.

    `resolved` is the whole configuration as plain values, for the dashboard.
    The console comes last: on a terminal it draws from here until `close`.
    """
    if not is_main:
        return Sinks([])
    sinks: list[Sink] = [JsonlSink(folder)]
    if config.tensorboard:
        sinks.append(TensorboardSink(folder))
    sinks += open_wandb(config.wandb, config.wandb_project, name, folder, resolved)
    if config.experts_every and len(sinks) > 1:  # they keep images
        from moetrain.telemetry.pixels import get_ready

        get_ready()
    sinks += open_console(config.console, name, total_steps, clock, str(folder / "STOP"))
    return Sinks(sinks)
