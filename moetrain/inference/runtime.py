"""The runtime: requests in, tokens out. Continuous batching in its simple form: every step decodes all active requests together
and admits one waiting request. It speaks token ids; text is `generate`'s business. B active requests, S tokens of a call, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NewType

import torch
from torch import Tensor

from moetrain.base.errors import ConfigError, MoetrainError
from moetrain.inference.config import SamplingParams
from moetrain.inference.kv import KeyValues
from moetrain.inference.language import Language
from moetrain.inference.load import load
from moetrain.inference.sample import choose
from moetrain.model.context import ForwardContext
from moetrain.model.gpt import GPT

Handle = NewType("Handle", int)


class Event(NamedTuple):
    """One new token. `reason` ends the request: stop (a stop token, which is `token`) | length (max_tokens) | context (the model's
    longest context is full); None: it goes on.
    """

    handle: Handle
    token: int
    reason: str | None


@dataclass
class Request:
    """A submitted prompt and what has been drawn for it. Its generator is its own: its draws do not depend on other requests."""

    handle: Handle
    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator
    drawn: list[int] = field(default_factory=list)


class Runtime:
    """One model in one process. `submit`, then `step` until it is idle; not thread-safe."""

    def __init__(self, model: GPT, language: Language, max_batch: int = 16, prefill_tokens: int = 512) -> None:
        """max_batch: requests decoded together, others wait; prefill_tokens: a longer prompt is read in pieces of this size, which bounds
        memory. The model is used as it is: `load` gives one without expert capacity, so that no request depends on another.
        """
        self.model, self.language, self.config = model, language, model.config
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        weight = model.embedding.weight
        self.device = weight.device
        self._kv = KeyValues(model.config, weight.dtype, weight.device)
        self._active: list[Request] = []  # request i stands in row i of the cache
        self._waiting: deque[Request] = deque()
        self._num_submitted = 0
        self._closed = False

    @classmethod
    def open(cls, bundle: Path | str, device: str = "auto", dtype: str = "float32", max_batch: int = 16) -> "Runtime":
        """The runtime of a bundle. device: auto (CUDA where there is one) | cpu | cuda | cuda:1; dtype: float32 | bfloat16 | float64.

        Raises BundleError for a bundle that cannot be read, ConfigError for a device or dtype that is not there.
        """
        model, language = load(bundle, device, dtype)
        return cls(model, language, max_batch)

    @property
    def idle(self) -> bool:
        return not self._active and not self._waiting

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Handle:
        """Queues a prompt (token ids). ConfigError when a parameter or the prompt is not possible."""
        if self._closed:
            raise MoetrainError("This runtime is closed.", "Open the bundle again.")
        params.check()
        longest, vocab_size = self.config.max_position - 1, self.config.vocab_size
        if not prompt:
            raise ConfigError("The prompt has no token.", "Begin with the end-of-document token for free text.")
        if len(prompt) > longest:
            rule = f"with model.max_position={longest + 1} at most {longest} leave room for one more"
            raise ConfigError(f"The prompt has {len(prompt)} tokens, but {rule}.", "Shorten the prompt.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            hint = "Use the bundle's own tokenizer."
            raise ConfigError(f"The prompt holds token {wrong}, but the vocabulary is 0 to {vocab_size - 1}.", hint)
        handle = Handle(self._num_submitted)
        self._num_submitted += 1
        self._waiting.append(Request(handle, list(prompt), params, torch.Generator().manual_seed(params.seed)))
        return handle

    def cancel(self, handle: Handle) -> None:
        """Ends a request: no further event of it comes. A handle that has already ended is left alone."""
        for request in self._waiting:
            if request.handle == handle:
                self._waiting.remove(request)
                return
        for row, request in enumerate(self._active):
            if request.handle == handle:
                self._remove(row)
                return

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One token of every active request, then the first token of one waiting request if there is room."""
        events = self._decode() if self._active else []
        if self._waiting and len(self._active) < self.max_batch:
            events.append(self._admit(self._waiting.popleft()))
        return events

    def close(self) -> None:
        """Ends all requests and gives cache memory back; the runtime takes no more."""
        self._waiting.clear()
        for row in reversed(range(len(self._active))):
            self._remove(row)
        self._closed = True

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _admit(self, request: Request) -> Event:
        """Reads the prompt into a new row and draws the first token."""
        row = self._kv.add()
        self._active.append(request)
        for piece in torch.tensor([request.prompt], device=self.device).split(self.prefill_tokens, dim=1):
            logits_BV = self._forward(piece, range(row, row + 1))
        event = self._draw(request, logits_BV[0])
        if event.reason is not None:
            self._remove(row)
        return event

    def _decode(self) -> list[Event]:
        newest_BS = torch.tensor([[request.drawn[-1]] for request in self._active], device=self.device)
        logits_BV = self._forward(newest_BS, range(len(self._active)))
        events = [self._draw(request, logits_V) for request, logits_V in zip(self._active, logits_BV, strict=True)]
        for row in reversed(range(len(events))):
            if events[row].reason is not None:
                self._remove(row)
        return events

    def _forward(self, tokens_BS: Tensor, rows: range) -> Tensor:
        """Logits [B, V] after the last token of each row."""
        appending = self._kv.append(rows, tokens_BS.shape[1])
        context = ForwardContext(position_BS=appending.position_BS, cache=appending)
        logits_BV = self.model(tokens_BS, context).logits_BSV[:, -1]
        if not bool(torch.isfinite(logits_BV).all()):
            hint = "Try dtype=float32; if it is, the bundle's weights are damaged."
            raise MoetrainError("The model computed logits that are not finite.", hint)
        return logits_BV

    def _draw(self, request: Request, logits_V: Tensor) -> Event:
        params = request.params
        token = choose(logits_V, params, request.generator)
        request.drawn.append(token)
        reason = None
        if token in params.stop:
            reason = "stop"
        elif len(request.drawn) >= params.max_tokens:
            reason = "length"
        elif len(request.prompt) + len(request.drawn) >= self.config.max_position:
            reason = "context"
        return Event(request.handle, token, reason)

    def _remove(self, row: int) -> None:
        """The last request takes the freed row, as in the cache."""
        self._kv.remove(row)
        last = self._active.pop()
        if row < len(self._active):
            self._active[row] = last
