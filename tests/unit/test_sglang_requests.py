"""The body of POST /generate, and which answers are taken for a response."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams, make_requests
from megatron_bupo.rollout.sglang.requests import BadAnswer, generate_body, read_answer, sampling_seeds
from megatron_bupo.samples import Prompt
from tests.unit.fake_sglang import good_answer

REQUEST = GenerationRequest(Prompt(17, [5, 6, 7], ""), sample=2, step=4)
STOP = SamplingParams(0.7, 0.9, 5, (1, 2), 3)
NO_STOP = SamplingParams(0.7, 0.9, 5, (), 3)
SERVER = "http://server:1"


def _answer(params: SamplingParams) -> dict[str, Any]:
    return good_answer(generate_body(REQUEST, params, 99, "rid"), "8")


def _stopped(token: Any, length: int = 4) -> dict[str, Any]:
    """An answer of `length` tokens that ends at a token."""
    answer = _answer(STOP)
    info = answer["meta_info"]
    answer["output_ids"] = [9] * (length - 1) + [token]
    info["output_token_logprobs"] = [[-0.25, one, None] for one in answer["output_ids"]]
    info["completion_tokens"] = info["weight_versions"][0]["end"] = length
    info["finish_reason"] = {"type": "stop", "matched": token}
    return answer


def _read(answer: Any, params: SamplingParams = STOP) -> Generation:
    return read_answer(answer, REQUEST, params, "rid", "8", SERVER)


def test_nothing_that_shapes_the_distribution_is_left_to_the_server() -> None:
    body = generate_body(REQUEST, STOP, 99, "rid")
    assert body["input_ids"] == [5, 6, 7] and "text" not in body
    assert (body["return_logprob"], body["logprob_start_len"], body["stream"]) == (True, -1, False)
    assert body["sampling_params"] == {
        "max_new_tokens": 5, "min_new_tokens": 0, "n": 1, "sampling_seed": 99, "skip_special_tokens": False,
        "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
        "stop_token_ids": [1, 2], "ignore_eos": False,
    }  # fmt: skip
    # The server would stop at the end-of-text token of its own model.
    assert generate_body(REQUEST, NO_STOP, 99, "rid")["sampling_params"]["ignore_eos"] is True


def test_seeds_differ_and_belong_to_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests([Prompt(i, [5], "") for i in range(300)], step=1, num_samples=8)
    seeds = sampling_seeds(3, requests)
    assert len(set(seeds)) == len(requests) and all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seeds(3, requests[40:48]) == seeds[40:48]
    assert not set(seeds) & set(sampling_seeds(4, requests))
    # Those that meet in the bits that are left are told apart.
    monkeypatch.setattr("megatron_bupo.rollout.sglang.requests.NUM_SEEDS", 2400)
    assert sorted(sampling_seeds(3, requests)) == list(range(2400))


def test_good_answers() -> None:
    answer = _answer(STOP)
    assert _read(answer) == Generation(answer["output_ids"], [-0.5, -0.625, -0.75, -0.875, -1.0], "length", "8")
    assert _read(_answer(NO_STOP), NO_STOP).finish_reason == "length"
    stopped = _read(_stopped(2))
    assert (stopped.tokens[-1], len(stopped.tokens), stopped.finish_reason) == (2, 4, "stop")
    assert _read(_stopped(2, 5)).finish_reason == "stop"
    assert len(_read(_stopped(1, 1)).tokens) == 1
    last = _stopped(2, 5)  # older servers look at the limit first
    last["meta_info"]["finish_reason"] = {"type": "length", "length": 5}
    assert _read(last).finish_reason == "stop"
    certain = _answer(STOP)
    certain["meta_info"]["output_token_logprobs"][1][0] = 1e-7
    assert _read(certain).logprobs[1] == 0.0
    del certain["meta_info"]["weight_versions"]  # servers before 0.5.23
    _read(certain)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(answer: Any) -> None:
        for key in path[:-1]:
            answer = answer[key]
        answer[path[-1]] = to

    return change


INFO, LOGPROBS, SPANS = "meta_info", ("meta_info", "output_token_logprobs"), ("meta_info", "weight_versions")
BAD = {
    "no meta_info": _set(INFO, to=None),
    "another request": _set(INFO, "id", to="rid2"),
    "an abort": _set(INFO, "finish_reason", to={"type": "abort", "message": "Abort"}),
    "not finished": _set(INFO, "finish_reason", to=None),
    "an unknown end": _set(INFO, "finish_reason", to={"type": "error"}),
    "a stop by text": _set(INFO, "finish_reason", to={"type": "stop", "matched": "NaN happened"}),
    "a stop elsewhere": _set(INFO, "finish_reason", to={"type": "stop", "matched": 2}),
    "old weights": _set(INFO, "weight_version", to="7"),
    "no version": _set(INFO, "weight_version", to=None),
    "changing weights": _set(*SPANS, 0, "start", to=2),
    "old weights inside": _set(*SPANS, 0, "version", to="7"),
    "no log-probs": _set(*LOGPROBS, to=None),
    "a log-prob too few": lambda answer: answer["meta_info"]["output_token_logprobs"].pop(),
    "a log-prob of another token": _set(*LOGPROBS, 2, 1, to=4),
    "a log-prob of NaN": _set(*LOGPROBS, 2, 0, to=math.nan),
    "a log-prob of -inf": _set(*LOGPROBS, 2, 0, to=-math.inf),
    "a log-prob above 0": _set(*LOGPROBS, 2, 0, to=0.1),
    "a log-prob that is text": _set(*LOGPROBS, 2, 0, to="-1"),
    "no log-prob": _set(*LOGPROBS, 2, to=[]),
    "no tokens": lambda answer: answer.update(output_ids=[]),
    "text": _set("output_ids", to="abcde"),
    "a token that is none": _set("output_ids", 1, to=True),
    "a token below 0": _set("output_ids", 1, to=-1),
    "another count": _set(INFO, "completion_tokens", to=4),
    "a longer prompt": _set(INFO, "prompt_tokens", to=4),
    "a prompt of text": _set(INFO, "prompt_tokens", to="3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers_are_not_used(name: str) -> None:
    answer = _answer(STOP)
    BAD[name](answer)
    with pytest.raises(BadAnswer, match=f"^{SERVER}/generate: "):
        _read(answer)


@pytest.mark.parametrize("answer", [None, [], "x", 1])
def test_answers_of_another_shape(answer: Any) -> None:
    with pytest.raises(BadAnswer, match="its answer is no dict"):
        _read(answer)


def test_answers_beyond_the_end() -> None:
    with pytest.raises(BadAnswer, match="6 tokens came, 1 to 5 were asked for"):
        _read(_stopped(2, 6))
    early = _stopped(2)
    early["output_ids"][1] = early["meta_info"]["output_token_logprobs"][1][1] = 1
    with pytest.raises(BadAnswer, match="goes on after a stop token"):
        _read(early)


def test_servers_that_are_set_up_wrongly_end_the_run() -> None:
    with pytest.raises(UsageError, match=r"prompt 17 \(3 tokens\), sample 2 at token 9, which is none .* \[1, 2\]"):
        _read(_stopped(9))
    with pytest.raises(UsageError, match="at token 9"):
        _read(_stopped(9), NO_STOP)
    prompt = _answer(STOP)
    prompt["meta_info"]["prompt_tokens"] = 2
    with pytest.raises(UsageError, match="kept 2 tokens of the prompt"):
        _read(prompt)
    short = _stopped(9)
    short["meta_info"]["finish_reason"] = {"type": "length", "length": 4}
    with pytest.raises(UsageError, match=r"gave 4 of 5 tokens; .*--max-total-tokens.*--rollout-max-response-len"):
        _read(short)
    short["meta_info"]["finish_reason"]["length"] = 5
    with pytest.raises(BadAnswer, match="length in finish_reason"):
        _read(short)
