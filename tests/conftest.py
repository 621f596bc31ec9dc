"""Every test process: one thread, no network, no display, the same hypothesis examples each time; and the check of docs/coverage.md.

Hashing cannot be fixed from inside a running interpreter: the Makefile sets PYTHONHASHSEED.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.coverage_map import named_tests, not_run

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
hypothesis.settings.register_profile("moetrain", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("moetrain")


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """Commands configure the process-wide logger, fixtures of modules and sessions too: every test starts with an unconfigured one."""
    _reset_logger()
    yield
    _reset_logger()


def _reset_logger() -> None:
    log = logging.getLogger("moetrain")
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate = [], True
    log.setLevel(logging.DEBUG)  # not inherited: what hydra and others do to the root logger must not hide a warning from a test
    for name, room in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "moetrain" and isinstance(room, logging.Logger):
            room.disabled = False


class CoverageMap:
    """Fails a whole session in which a test that `page` names did not run, or was skipped."""

    def __init__(self, page: Path) -> None:
        self.named = named_tests(page.read_text(encoding="utf-8"))
        self.ran: set[str] = set()
        self.absent: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.ran.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.absent = not_run(self.named, self.ran)
        if self.absent and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in self.absent:
            terminalreporter.write_line(f"The coverage page names {name}, which did not run in this session.", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--coverage-map", type=Path, metavar="PAGE", help="fail unless every test that PAGE names ran (for whole sessions)")


def pytest_configure(config: pytest.Config) -> None:
    page: Path | None = config.getoption("--coverage-map")
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # workers hear of their own tests only; the controller hears of all
    if page is not None and not is_worker:
        if not page.is_file():
            raise pytest.UsageError(f"--coverage-map={page}: no such file.")
        config.pluginmanager.register(CoverageMap(page))
