"""torch.profiler over a few steps of this rank, as a Chrome trace in `trace/` of the run folder."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moetrain.base.log import logger
from moetrain.telemetry.config import ProfileConfig


class Profiler:
    """Records steps start_step .. start_step + num_steps - 1 (the first step is 1). Each rank writes `trace/rank{r}.json`."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self.first, self.last = config.start_step, config.start_step + config.num_steps - 1
        self.memory = config.memory
        self.file = folder / "trace" / f"rank{rank}.json"
        self._profile: profile | None = None

    def after(self, step: int) -> None:
        """Call when `step` has ended (before the first: with the step resumed from). Starts or ends the recording."""
        if self._profile is not None and step >= self.last:
            self.stop()
        elif self._profile is None and self.first > 0 and step == self.first - 1:
            self._start()

    def stop(self) -> None:
        """Writes what was recorded, if anything is being recorded."""
        if self._profile is None:
            return
        recording, self._profile = self._profile, None
        recording.stop()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(self.file))
        except (OSError, RuntimeError) as error:  # a full disk costs the profile, not the run
            logger("telemetry").warning("The profile %s cannot be written: %s", self.file, error)
            return
        logger("telemetry").info("Wrote the profile of steps %d to %d to %s; open it in ui.perfetto.dev.", self.first, self.last, self.file)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities, profile_memory=self.memory, record_shapes=True)
        self._profile.start()
