"""Judges what a bundle trained on Python source writes: do its lines look like Python, and does it repeat itself?

    python tools/judge_completions.py BUNDLE [--prompts FILE] [--num 20] [--tokens 200] [--seed 0] [--out judgement.json]

A bundle passes when, over all completions, at least half of the non-blank lines pass Python's `tokenize`, and no completion holds
one line more than 5 times.

Lines. Every non-blank line of the completion (without the prompt) is tokenized on its own, leading white space removed, by
`tokenize.generate_tokens`. It passes if that ends without an error, or with an error that means only that the line goes on below: an
open bracket, a backslash at its end, an open triple-quoted string (a line that closes brackets opened above passes too). It fails with
any other error, with an ERRORTOKEN (Python 3.11), or with a token that is no operator or identifier of Python (which Python 3.12 gives
instead). So a line of prose with a lone apostrophe fails, although a docstring may hold it: the measure is strict there.

Repeats. Lines are compared without the white space around them; blank lines are not counted.
"""

import argparse
import io
import json
import sys
import token
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

GOES_ON = ("EOF in multi-line statement", "unterminated triple-quoted")  # messages of Python 3.11 and 3.12
MAX_REPEATS = 5
MIN_SHARE = 0.5
TEMPERATURE, TOP_P = 0.8, 0.95

PROMPTS = (
    "import os\nimport sys\n",
    '"""Utilities for reading and writing files."""\n\nimport ',
    "def main():\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "    def __repr__(self):\n",
    "    def close(self):\n",
    "    try:\n        value = int(text)\n    except ValueError:\n",
    "if __name__ == '__main__':\n",
    "def read(self, size=-1):\n",
    "    for name in names:\n",
    "from collections import ",
    "class Error(Exception):\n",
    "    def __getitem__(self, key):\n",
    "    while True:\n        line = fp.readline()\n",
    "def parse(string, flags=0):\n",
    "    with open(filename) as f:\n",
    "        self.assertEqual(",
    "__all__ = [",
    "    @property\n    def name(self):\n",
    "    if not isinstance(other, type(self)):\n",
)


@dataclass
class Judgement:
    """One completion and what is found in it."""

    prompt: str
    seed: int
    text: str
    num_lines: int  # not blank
    num_passed: int  # of these, lines that pass tokenize
    most_repeated: str
    num_repeats: int  # how often that line stands in the completion

    @property
    def share(self) -> float:
        """Of non-blank lines that pass; a completion without any shows nothing and counts as 0."""
        return self.num_passed / self.num_lines if self.num_lines else 0.0


def passes(line: str) -> bool:
    """Whether one non-blank line tokenizes on its own (see the top of this file)."""
    line = line.strip()
    strings = 0  # open f-strings: within one, `!` is an operator
    try:
        for found in tokenize.generate_tokens(io.StringIO(line + "\n").readline):
            name = token.tok_name[found.type]
            strings += (name == "FSTRING_START") - (name == "FSTRING_END")
            if name == "ERRORTOKEN" or (name == "NAME" and not found.string.isidentifier()):
                return False
            if name == "OP" and (found.string not in token.EXACT_TOKEN_TYPES or (found.string == "!" and not strings)):
                return False
    except tokenize.TokenError as error:
        message = str(error.args[0])
        open_string = "EOF in multi-line string" in message and ('"""' in line or "'''" in line)
        return open_string or any(reason in message for reason in GOES_ON)
    except SyntaxError:
        return False
    return True


def judge(prompt: str, seed: int, text: str) -> Judgement:
    """Counts the lines of one completion that pass, and its most repeated line."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeated, num_repeats = max(Counter(lines).items(), key=lambda item: item[1], default=("", 0))
    return Judgement(prompt, seed, text, len(lines), sum(passes(line) for line in lines), repeated, num_repeats)


def report(judgements: Sequence[Judgement]) -> dict[str, object]:
    """The verdict over all completions and every one of them, ready for JSON."""
    num_lines, num_passed = sum(x.num_lines for x in judgements), sum(x.num_passed for x in judgements)
    share = num_passed / num_lines if num_lines else 0.0
    most = max((x.num_repeats for x in judgements), default=0)
    return {
        "passed": share >= MIN_SHARE and most <= MAX_REPEATS,
        "num_completions": len(judgements),
        "num_lines": num_lines,
        "share_of_lines_that_tokenize": share,
        "completions_with_at_least_half": sum(x.share >= MIN_SHARE for x in judgements),
        "lowest_share": min((x.share for x in judgements), default=0.0),
        "most_repeats_of_one_line": most,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "completions": [asdict(x) | {"share": x.share} for x in judgements],
    }


def complete(bundle: Path, prompts: Sequence[str], num_tokens: int, seed: int) -> list[Judgement]:
    """Completion i continues prompt i with seed + i. The end of a document does not end it, so each has `num_tokens` tokens
    unless the model's context is full before.
    """
    from moetrain.inference.config import SamplingParams
    from moetrain.inference.generate import generate, several
    from moetrain.inference.runtime import Runtime

    params = several(SamplingParams(num_tokens, TEMPERATURE, top_p=TOP_P, seed=seed), len(prompts))
    texts = [""] * len(prompts)
    with Runtime.open(bundle, device="cpu") as runtime:
        for piece in generate(runtime, prompts, params):
            texts[piece.index] += piece.text
            if piece.reason == "context":
                print(f"Completion {piece.index} stopped after {piece.num_tokens} tokens: the context is full.", file=sys.stderr)
    return [judge(prompt, seed + i, text) for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a JSON file. Raises DataError unless it is a list of strings."""
    from moetrain.base.errors import DataError

    try:
        prompts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"The prompts {file} cannot be read: {error}.", "Give a JSON list of strings.") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"The prompts {file} are no list of strings.", 'Give a JSON list such as ["import os\\n", "def main():\\n"].')
    return prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the bundle passes, 1 when it does not, 2 for an error."""
    from moetrain.base.errors import ConfigError, MoetrainError

    parser = argparse.ArgumentParser(description="Judge the Python that a bundle writes.", epilog="Exit code 0: it passes.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, help="JSON list of strings; default: 20 beginnings of Python source")
    parser.add_argument("--num", type=int, default=20, help="completions; prompts are used again from the first when there are fewer")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of one completion")
    parser.add_argument("--seed", type=int, default=0, help="of the first completion; the next ones count up")
    parser.add_argument("--out", type=Path, default=Path("judgement.json"), help="where the JSON report goes")
    args = parser.parse_args(arguments)
    try:
        prompts = PROMPTS if args.prompts is None else read_prompts(args.prompts)
        if args.num < 1:
            raise ConfigError.of("num", args.num, "at least one completion is judged")
        judgements = complete(args.bundle, [prompts[i % len(prompts)] for i in range(args.num)], args.tokens, args.seed)
    except MoetrainError as error:
        print(error, file=sys.stderr)
        return 2
    verdict = report(judgements)
    args.out.write_text(json.dumps(verdict, indent=2) + "\n")
    print(
        f"{'Passed' if verdict['passed'] else 'Failed'}: {verdict['share_of_lines_that_tokenize']:.1%} of {verdict['num_lines']} lines "
        f"tokenize (at least {MIN_SHARE:.0%} asked), one line stands {verdict['most_repeats_of_one_line']} times in a completion "
        f"(at most {MAX_REPEATS} asked). Report: {args.out}"
    )
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
