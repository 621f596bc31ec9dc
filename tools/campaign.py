"""Many runs, some at a time, one core each. A finished run keeps its result in a file: the same command goes on after a stop."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TypeVar

import torch

from moetrain.base.errors import MoetrainError

Case = TypeVar("Case")


@dataclass(frozen=True)
class Campaign:
    folder: Path  # of the results, NAME.json, and of unfinished runs, NAME.run
    settings: list[str]  # what all runs have in common: results found in the folder must have been made with the same
    jobs: int  # runs at a time

    def run(self, make: Callable[[Case, Path], dict], cases: Mapping[str, Case]) -> Iterator[dict]:
        """Results as they come, kept ones first; new ones are begun in the order of `cases`, which names them.

        `make` of a module's top level trains into an empty folder, which is removed behind it, and returns what json can hold.
        Raises MoetrainError when the folder is of a campaign with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = []
        for name in cases:
            if (result := self.kept(name)) is None:
                missing.append(name)
            else:
                yield result
        if self.jobs == 1:
            yield from (self._one(make, name, cases[name]) for name in missing)
            return
        spawn, waiting = get_context("spawn"), iter(missing)
        running = dict[Future[dict], ProcessPoolExecutor]()
        try:
            while True:
                for name in islice(waiting, self.jobs - len(running)):
                    # A pool for every run: a worker ended in the middle of an answer takes the locks of its pool along.
                    pool = ProcessPoolExecutor(1, mp_context=spawn)
                    running[pool.submit(self._one, make, name, cases[name])] = pool
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future).shutdown()
                    yield future.result()
        except BaseException:  # a stop, or a run that failed
            for worker in active_children():
                worker.terminate()
            raise
        finally:
            for pool in running.values():
                pool.shutdown()

    def file(self, name: str) -> Path:
        return self.folder / f"{name.lower().replace(',', '').replace(' ', '-')}.json"

    def kept(self, name: str) -> dict | None:
        """What an earlier start found."""
        file = self.file(name)
        if not file.is_file():
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["settings"] != self.settings:
            raise MoetrainError(f"{file} is of a campaign with other settings.", "Give another --folder, or the settings of this one.")
        return content["result"]

    def _one(self, make: Callable[[Case, Path], dict], name: str, case: Case) -> dict:
        """The file appears whole or not at all; what lies in the folder from a run that was killed is thrown away."""
        torch.set_num_threads(1)
        file = self.file(name)
        folder = file.with_suffix(".run")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        result = make(case, folder)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": self.settings, "result": result}) + "\n", encoding="utf-8")
        partial.rename(file)
        shutil.rmtree(folder)
        return result


def leave_on_sigterm() -> None:
    """SIGTERM ends the program as an exception would: no worker is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
