"""What the end-to-end tests share: two small corpora and one finished run."""

from pathlib import Path

import pytest

from tests.e2e.jobs import made_once, prepare_text, small_run, train_forked

# By the hash of their names copyreg and sched are held out for validation, graphlib and rlcompleter for test.
MODULES = ("copyreg", "graphlib", "bisect", "code", "codeop", "copy", "fnmatch", "getopt", "hmac", "linecache", "netrc", "reprlib")
MORE_MODULES = ("sched", "rlcompleter", "filecmp", "glob", "queue", "shelve", "stat")
STEPS = 24


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two prepared corpora with one tokenizer."""

    def make(folder: Path) -> None:
        first = prepare_text(folder / "first", MODULES)
        prepare_text(folder / "second", MORE_MODULES, str(first / "tokenizer.json"))

    folder = made_once(tmp_path_factory, "corpora", make)
    return folder / "first", folder / "second"


@pytest.fixture(scope="session")
def corpus(corpora: tuple[Path, Path]) -> Path:
    return corpora[0]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of STEPS steps on two ranks that nothing disturbed, with full checkpoints. Copy it before you change it."""

    def make(folder: Path) -> None:
        overrides = small_run(corpus, folder / "run", STEPS, "checkpoint.mode=full", "checkpoint.every_steps=8")
        train_forked(2, overrides, folder / "log")

    return made_once(tmp_path_factory, "finished", make) / "run"
