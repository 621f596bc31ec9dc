"""The judge of completions: which lines pass, how repeats are counted, what the verdict says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.inference_kit import write_tiny_bundle
from tests.unit.test_inference_generate import BYTE_FACTS, BYTES
from tools.judge_completions import PROMPTS, judge, main, passes, report

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


def test_a_bundle_is_judged_on_the_same_completions_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle", replace(BYTES, max_position=128), BYTE_FACTS)
    (tmp_path / "prompts.json").write_text(json.dumps(["import os\n", "x = 1\n"]))
    found = []
    for name in ("one.json", "two.json"):
        options = [
            "--prompts",
            str(tmp_path / "prompts.json"),
            "--num",
            "3",
            "--tokens",
            "40",
            "--seed",
            "9",
            "--out",
            str(tmp_path / name),
        ]
        code = main([str(tmp_path / "bundle"), *options])
        found.append(json.loads((tmp_path / name).read_text()))
        assert code == (0 if found[-1]["passed"] else 1)
    assert found[0] == found[1]
    judged = found[0]["completions"]
    assert [(x["prompt"], x["seed"]) for x in judged] == [("import os\n", 9), ("x = 1\n", 10), ("import os\n", 11)]
    assert len({x["text"] for x in judged}) == 3
    assert found[0]["num_lines"] == sum(x["num_lines"] for x in judged) > 0
    assert "of lines tokenize" in capsys.readouterr().out.replace(f"{found[0]['num_lines']} ", "")


def test_mistakes_are_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.json").write_text("{}")
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path), "--prompts", str(tmp_path / "prompts.json")]) == 2
    assert main([str(tmp_path), "--num", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "does not exist" in lines[0]
    assert "no list of strings" in lines[1]
    assert lines[2].startswith("num=0")
