"""The judge of completions: which lines pass, how repeats are counted, what the verdict says."""

import pytest

from tools.judge_completions import PROMPTS, judge, passes, report

GOOD = [
    "x = 1",
    "def f(a, *, b: int = 0) -> None:",
    "    return self._value[key]",
    "else:",
    "print('a', \"b\", f'{x!r:>{width}}')",
    "f(a,",
    "items = [{",
    "    })",
    ")",
    '"""A docstring that goes on',
    "x = r'''raw",
    "y = a + \\",
    "# a comment: it's free text?",
    "café = 'ä'",
    "x != y",
    "word word word",
    "1abc",
]
BAD = [
    "don't",
    "x = 'open",
    'x = "open',
    'f("',
    "a ? b",
    "$HOME",
    "!ls",
    "“hi”",
    "x = `1`",
    "x = 'open \\",
]


@pytest.mark.parametrize("line", GOOD)
def test_a_line_that_is_python_or_goes_on_below_passes(line: str) -> None:
    assert passes(line)


@pytest.mark.parametrize("line", BAD)
def test_a_line_with_an_unknown_sign_or_an_unclosed_string_fails(line: str) -> None:
    assert not passes(line)


def test_blank_lines_are_not_counted_and_repeats_ignore_indentation() -> None:
    found = judge("p", 3, "\n\n   \nx = 1\n  x = 1\ndon't\n\n")
    assert (found.num_lines, found.num_passed, found.most_repeated, found.num_repeats) == (3, 2, "x = 1", 2)
    assert found.share == pytest.approx(2 / 3)


def test_an_empty_completion_shows_nothing() -> None:
    found = judge("p", 0, " \n")
    assert (found.num_lines, found.share, found.num_repeats) == (0, 0.0, 0)
    assert report([found])["passed"] is False


@pytest.mark.parametrize(
    ("texts", "passed"),
    [
        (["x = 1\ndon't\n"], True),  # exactly half
        (["x = 1\ndon't\ncan't\n"], False),
        (["x = 1\ndon't\ncan't\n", "a\nb\n"], True),  # the share is over all lines: 3 of 5
        (["pass\n" * 5], True),
        (["pass\n" * 6], False),
        (["pass\n" * 3, "pass\n" * 3], True),  # repeats are counted within one completion
    ],
)
def test_verdict(texts: list[str], passed: bool) -> None:
    assert report([judge("", 0, text) for text in texts])["passed"] is passed


def test_there_are_twenty_prompts() -> None:
    assert len(set(PROMPTS)) == 20
