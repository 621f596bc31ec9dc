"""Text in, text out, on top of a Runtime: prompts are submitted together and their completions stream as pieces of text."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

from moetrain.inference.config import SamplingParams
from moetrain.inference.runtime import Event, Runtime


class Piece(NamedTuple):
    """The next text of completion `index` (may be empty), how many tokens it has drawn so far, and, with its last piece, why it ended
    (see Event).
    """

    index: int
    text: str
    num_tokens: int
    reason: str | None


class Stopper:
    """Ends a text before the first stop string. Text that may be the beginning of one is held back until that is decided."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [word for word in stop if word]
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Takes more text and returns what is certain to be shown; sets `hit` at a stop string, after which nothing is shown."""
        if self.hit:
            return ""
        self._held += text
        found = [place for place in (self._held.find(word) for word in self._stop) if place >= 0]
        if found:
            self.hit = True
            return self._release(min(found))
        return self._release(len(self._held) - self._pending())

    def flush(self) -> str:
        """What is still held back when the text ends."""
        return "" if self.hit else self._release(len(self._held))

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(word) - 1 for word in self._stop), default=0))
        return next((n for n in range(longest, 0, -1) if any(word.startswith(self._held[-n:]) for word in self._stop)), 0)

    def _release(self, size: int) -> str:
        shown, self._held = self._held[:size], self._held[size:]
        return shown


class Completion:
    """One completion on its way from tokens to text."""

    def __init__(self, runtime: Runtime, index: int, prompt: str, params: SamplingParams, stop: Sequence[str]) -> None:
        self.index, self.num_tokens = index, 0
        self._decoder, self._stopper = runtime.language.stream(), Stopper(stop)
        self.handle = runtime.submit(runtime.language.encode(prompt), params)
        self._stop = params.stop

    def take(self, event: Event) -> Piece:
        """The text that one event brings. A stop token is not shown."""
        self.num_tokens += 1
        reason = event.reason
        text = "" if event.token in self._stop else self._decoder.push(event.token)
        if reason is not None:
            text += self._decoder.finish()
        text = self._stopper.push(text)
        if self._stopper.hit:
            reason = "stop"
        elif reason is not None:
            text += self._stopper.flush()
        return Piece(self.index, text, self.num_tokens, reason)


def generate(
    runtime: Runtime, prompts: Sequence[str], params: Sequence[SamplingParams], stop: Sequence[str] = ()
) -> Generator[Piece, None, None]:
    """Completes every prompt with its parameters, all in one batch, and yields text as it comes; pieces of one index are in order.

    `stop`: strings that end a completion and are not shown. An idle runtime is expected: events of other requests are dropped.
    """
    jobs = [Completion(runtime, index, *job, stop) for index, job in enumerate(zip(prompts, params, strict=True))]
    going = {job.handle: job for job in jobs}
    try:
        while going:
            for event in runtime.step():
                if event.handle not in going:
                    continue
                piece = going[event.handle].take(event)
                if piece.reason is not None:
                    del going[event.handle]
                    runtime.cancel(event.handle)
                yield piece
    finally:
        for handle in going:
            runtime.cancel(handle)


def several(params: SamplingParams, num: int, stop: tuple[int, ...] = ()) -> list[SamplingParams]:
    """`num` copies with these stop tokens, whose seeds count up from the given one."""
    return [replace(params, seed=params.seed + i, stop=stop) for i in range(num)]
