"""The runtime draws the tokens that decoding without a cache draws, whatever shares the batch; it says why each request ends.

Greedy comparisons run in float64: a matmul over one row and over many rows adds in another order, and a difference of 1e-7 between
float32 sums may turn a near tie into another token. At 1e-16 the random models here have no tie that close; logits of the cache are
compared in float32 as well (test_inference_kv.py).
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from moetrain.base.errors import ConfigError, MoetrainError
from moetrain.inference.config import SamplingParams
from moetrain.inference.language import Language
from moetrain.inference.runtime import Event, Handle, Runtime
from moetrain.model.config import ModelConfig
from tests.unit.inference_kit import CONFIGS, SMALL, filled, greedy_without_cache, tokens

GREEDY = SamplingParams(max_tokens=24, temperature=0)


def runtime_of(config: ModelConfig = SMALL, max_batch: int = 16, prefill_tokens: int = 512) -> Runtime:
    return Runtime(filled(config), Language(None, ()), max_batch, prefill_tokens)


def run(runtime: Runtime) -> dict[Handle, list[Event]]:
    """Steps until idle; events by request."""
    events: dict[Handle, list[Event]] = {}
    while not runtime.idle:
        for event in runtime.step():
            events.setdefault(event.handle, []).append(event)
    return events


def drawn(runtime: Runtime, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    handle = runtime.submit(prompt, params)
    return [event.token for event in run(runtime)[handle]]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_decoding_without_a_cache(name: str) -> None:
    prompt = tokens(1, 9).tolist()
    runtime = runtime_of(CONFIGS[name], prefill_tokens=4)
    assert drawn(runtime, prompt, GREEDY) == greedy_without_cache(runtime.model, prompt, 24)


@pytest.mark.parametrize("name", ["moe", "scmoe 2", "window 6", "all blocks"])
def test_requests_that_come_and_go_do_not_change_each_other(name: str) -> None:
    runtime = runtime_of(CONFIGS[name], max_batch=3)
    prompts = [tokens(10 + i, size).tolist() for i, size in enumerate((3, 17, 1, 8, 5, 2))]
    params = [replace(GREEDY, max_tokens=size) for size in (20, 4, 9, 1, 30, 12)]
    handles = [runtime.submit(*job) for job in zip(prompts, params, strict=True)]
    events = run(runtime)
    for handle, prompt, asked in zip(handles, prompts, params, strict=True):
        assert [event.token for event in events[handle]] == greedy_without_cache(runtime.model, prompt, asked.max_tokens)
        assert [event.reason for event in events[handle]] == [None] * (asked.max_tokens - 1) + ["length"]


def test_a_seed_gives_the_same_tokens_alone_and_in_company() -> None:
    params = SamplingParams(max_tokens=20, temperature=1.3, top_k=30, top_p=0.9, seed=5)
    alone = drawn(runtime_of(), [1, 2, 3], params)
    runtime = runtime_of(max_batch=4)
    others = [runtime.submit(tokens(i, 4 + i).tolist(), replace(params, seed=i)) for i in range(2)]
    handle = runtime.submit([1, 2, 3], params)
    twin = runtime.submit([1, 2, 3], replace(params, seed=6))
    events = run(runtime)
    assert [event.token for event in events[handle]] == alone
    assert [event.token for event in events[twin]] != alone
    assert len(events) == len(others) + 2


def test_every_step_decodes_all_active_requests_and_admits_one() -> None:
    runtime = runtime_of(max_batch=2)
    first, second, third = (runtime.submit([i], replace(GREEDY, max_tokens=3)) for i in range(3))
    order = []
    while not runtime.idle:
        order.append([event.handle for event in runtime.step()])
    assert order == [[first], [first, second], [first, second, third], [second, third], [third]]


def test_a_stop_token_ends_the_request_and_is_its_last_event() -> None:
    runtime = runtime_of()
    whole = drawn(runtime, [4, 5], GREEDY)
    stop = next(token for token in whole if token != whole[0])
    handle = runtime.submit([4, 5], replace(GREEDY, stop=(stop,)))
    events = run(runtime)[handle]
    assert [event.token for event in events] == whole[: whole.index(stop) + 1]
    assert [event.reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_a_full_context_ends_the_request_with_that_reason() -> None:
    runtime = runtime_of()
    prompt = tokens(2, SMALL.max_position - 5).tolist()
    handle = runtime.submit(prompt, replace(GREEDY, max_tokens=50))
    reasons = [event.reason for event in run(runtime)[handle]]
    assert reasons == [None] * 4 + ["context"]
    last = runtime.submit([*prompt, 1, 2, 3, 4], replace(GREEDY, max_tokens=50))
    assert [event.reason for event in run(runtime)[last]] == ["context"]


def test_the_last_asked_token_is_a_length_end_even_where_the_context_ends() -> None:
    runtime = runtime_of()
    handle = runtime.submit(tokens(2, SMALL.max_position - 5).tolist(), replace(GREEDY, max_tokens=5))
    assert run(runtime)[handle][-1].reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "The prompt has no token."),
        ([1] * 64, "The prompt has 64 tokens, but with model.max_position=64 at most 63 leave room for one more."),
        ([1, 61], "The prompt holds token 61, but the vocabulary is 0 to 60."),
        ([-1], "The prompt holds token -1, but the vocabulary is 0 to 60."),
    ],
)
def test_an_impossible_prompt_is_refused_in_a_sentence(prompt: list[int], sentence: str) -> None:
    runtime = runtime_of()
    with pytest.raises(ConfigError) as error:
        runtime.submit(prompt, GREEDY)
    assert error.value.message == sentence
    assert runtime.idle


def test_impossible_parameters_are_refused_when_submitted() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        runtime_of().submit([1], SamplingParams(temperature=-1))


def test_cancelled_requests_give_no_more_events_and_leave_the_others_alone() -> None:
    runtime = runtime_of(max_batch=2)
    active, stays, waiting = (runtime.submit([i + 1, 3], GREEDY) for i in range(3))
    seen = runtime.step() + runtime.step()
    assert {event.handle for event in seen} == {active, stays}
    runtime.cancel(active)
    runtime.cancel(waiting)
    events = run(runtime)
    assert set(events) == {stays}
    already = [event.token for event in seen if event.handle == stays]
    assert already + [event.token for event in events[stays]] == greedy_without_cache(runtime.model, [2, 3], 24)
    runtime.cancel(stays)  # ended: nothing happens
    assert runtime.step() == []


def test_a_closed_runtime_holds_no_cache_and_takes_nothing() -> None:
    with runtime_of() as runtime:
        runtime.submit([1], GREEDY)
        runtime.submit([2], GREEDY)
        runtime.step()
    assert runtime.idle
    assert runtime._kv.num_bytes == 0
    with pytest.raises(MoetrainError, match="closed"):
        runtime.submit([1], GREEDY)


def test_logits_that_are_not_finite_are_reported() -> None:
    runtime = runtime_of()
    runtime.model.final_norm.weight.fill_(float("nan"))
    runtime.submit([1], GREEDY)
    with pytest.raises(MoetrainError, match="not finite"):
        runtime.step()


def test_prompt_pieces_do_not_change_the_text() -> None:
    prompt = tokens(3, 30).tolist()
    params = SamplingParams(max_tokens=10, seed=3)
    texts = {size: drawn(runtime_of(prefill_tokens=size), prompt, params) for size in (1, 7, 30, 512)}
    assert len({tuple(text) for text in texts.values()}) == 1


def test_float32_greedy_differs_only_where_two_logits_nearly_tie() -> None:
    """Margin-aware: the cached choice must be within 1e-4 of the best logit of the whole-sequence forward."""
    model = filled(CONFIGS["all blocks"], torch.float32)
    runtime = Runtime(model, Language(None, ()))
    prompt = tokens(4, 6).tolist()
    text = prompt + drawn(runtime, prompt, replace(GREEDY, max_tokens=40))
    logits_SV = model(torch.tensor([text])).logits_BSV[0, len(prompt) - 1 : -1]
    chosen_S = logits_SV.gather(1, torch.tensor(text[len(prompt) :])[:, None])[:, 0]
    assert float((logits_SV.max(1).values - chosen_S).max()) < 1e-4
