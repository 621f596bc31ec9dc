"""`moetrain generate` as a user calls it."""

import argparse
import io
from pathlib import Path

import pytest

from moetrain.base.errors import ConfigError
from moetrain.inference.command import add_parsers, show
from moetrain.inference.generate import Piece
from moetrain.inference.runtime import Runtime
from moetrain.text.tokenizer import Tokenizer
from tests.unit.inference_kit import greedy_without_cache, write_tiny_bundle
from tests.unit.test_inference_generate import BYTE_FACTS, BYTES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    write_tiny_bundle(path, BYTES, BYTE_FACTS)
    return path


def call(bundle: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(["generate", str(bundle), "--device", "cpu", "--dtype", "float64", *arguments])
    return args.run(args)


def greedy_text(bundle: Path, prompt: str, num_tokens: int) -> str:
    with Runtime.open(bundle, "cpu", "float64") as runtime:
        return Tokenizer.byte().decode(greedy_without_cache(runtime.model, list(prompt.encode()), num_tokens))


def test_the_completion_goes_to_standard_output_and_the_speed_to_standard_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bundle, "--prompt", "def f", "--max-tokens", "12", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    assert out == greedy_text(bundle, "def f", 12) + "\n"
    assert "The completion has 12 tokens: --max-tokens is reached." in err
    assert "12 tokens in" in err
    assert "tokens/s" in err


def test_a_dash_reads_the_prompt_from_standard_input(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x = \n"))
    call(bundle, "--prompt", "-", "--max-tokens", "5", "--temperature", "0", "--echo")
    assert capsys.readouterr().out == "x = \n" + greedy_text(bundle, "x = \n", 5) + "\n"


def test_several_completions_have_seeds_of_their_own_and_repeat(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def out(*arguments: str) -> str:
        call(bundle, "--prompt", "a", "--max-tokens", "9", "--temperature", "2", *arguments)
        return capsys.readouterr().out

    three = out("--num", "3", "--seed", "7")
    singles = [out("--seed", str(seed)) for seed in (7, 8, 9)]
    assert three == "".join(f"--- {i + 1} of 3\n{text}" for i, text in enumerate(singles))
    assert len(set(singles)) == 3
    assert out("--seed", "7", "--top-k", "1") == out("--seed", "7", "--top-p", "0.0001") == greedy_text(bundle, "a", 9) + "\n"


def test_a_full_context_is_said(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(bundle, "--prompt", "a" * 60, "--temperature", "0")
    assert "has 4 tokens: prompt and completion fill the model's context of 64 tokens (model.max_position)." in capsys.readouterr().err


def test_stop_text_ends_the_completion(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = greedy_text(bundle, "def f", 12)
    word = whole[5:7]
    call(bundle, "--prompt", "def f", "--max-tokens", "12", "--temperature", "0", "--stop", "unseen", "--stop", word)
    out, err = capsys.readouterr()
    assert out == whole[: whole.index(word)] + "\n"
    assert "the text ended" in err


@pytest.mark.parametrize(
    ("arguments", "key"), [(("--num", "0"), "num"), (("--temperature", "-1"), "temperature"), (("--max-tokens", "0"), "max_tokens")]
)
def test_an_impossible_argument_is_named_before_the_bundle_is_read(arguments: tuple[str, ...], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        call(tmp_path / "not read", "--prompt", "a", *arguments)


def test_the_first_unfinished_completion_streams_and_later_ones_wait() -> None:
    written: list[str] = []
    order = []
    pieces = [Piece(0, "a", 1, None), Piece(1, "X", 1, None), Piece(1, "Y", 2, "stop"), Piece(0, "b", 2, "length")]

    def feed():
        for piece in pieces:
            order.append("".join(written))
            yield piece

    ends = show(feed(), 2, "", written.append)
    assert order == ["--- 1 of 2\n", "--- 1 of 2\na", "--- 1 of 2\na", "--- 1 of 2\na"]
    assert "".join(written) == "--- 1 of 2\nab\n--- 2 of 2\nXY\n"
    assert [end.reason for end in ends] == ["length", "stop"]
