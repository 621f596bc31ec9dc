"""docs/coverage.md names only tests that exist, and a whole session fails when one of them did not run."""

from pathlib import Path

import pytest

from tests.coverage_map import existing_tests, named_tests, nodes_in, not_run

ROOT = Path(__file__).parents[2]
pytest_plugins = ["pytester"]


def test_coverage_page_names_only_existing_tests():
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    named, existing = named_tests(page), existing_tests(ROOT)
    assert named, "the page names no test"
    assert [name for name in named if name not in existing] == []


def test_code_spans_with_spaces_are_commands_and_parameters_are_cut():
    page = "`tests/a.py::test_x[3-True]` `pytest tests/b.py` tests/c.py `tests/unit/d.py` `tests/a.py::test_x`"
    assert named_tests(page) == ["tests/a.py::test_x", "tests/unit/d.py"]


def test_functions_and_methods_are_found_and_helpers_are_not():
    source = "def helper(): ...\ndef test_a(): ...\nclass TestB:\n  def test_c(self): ...\n  def d(self): ...\nclass Other:\n  test_e = 1\n"
    assert nodes_in(source, "t.py") == {"t.py", "t.py::test_a", "t.py::TestB", "t.py::TestB::test_c"}


def test_a_name_is_covered_by_its_parameters_and_a_file_by_its_tests():
    ran = ["t.py::test_a[1]", "t.py::TestB::test_c"]
    assert not_run(["t.py", "t.py::test_a", "t.py::TestB"], ran) == []
    assert not_run(["t.py::test_d", "u.py", "t.py::test"], ran) == ["t.py::test_d", "u.py", "t.py::test"]


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A small project with our conftest, a test that runs and one that is skipped."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    tests = pytester.mkpydir("tests")
    for name in ("conftest.py", "coverage_map.py"):
        (tests / name).write_text((ROOT / "tests" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tests / "test_a.py").write_text("import pytest\ndef test_runs(): ...\n@pytest.mark.skip\ndef test_skipped(): ...\n", encoding="utf-8")
    return pytester


def test_whole_session_fails_when_a_named_test_was_skipped(session: pytest.Pytester):
    session.maketxtfile(page="`tests/test_a.py::test_runs` `tests/test_a.py::test_skipped`")
    result = session.runpytest_subprocess("-p", "xdist", "-n", "1", "--coverage-map", "page.txt", "tests")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["The coverage page names tests/test_a.py::test_skipped, which did not run in this session."])
    assert "names tests/test_a.py::test_runs" not in result.stdout.str()


def test_whole_session_passes_when_every_named_test_ran(session: pytest.Pytester):
    session.maketxtfile(page="`tests/test_a.py::test_runs`")
    assert session.runpytest_subprocess("--coverage-map", "page.txt", "tests").ret == pytest.ExitCode.OK


def test_partial_session_is_not_checked(session: pytest.Pytester):
    session.maketxtfile(page="`tests/test_a.py::test_skipped`")
    assert session.runpytest_subprocess("-k", "runs", "tests").ret == pytest.ExitCode.OK
