"""The body of POST /generate of an SGLang server, and a strict reader of its answer.

Every parameter of sampling is in the request, since a server uses its defaults (--preferred-sampling-params) for those
that a request leaves out. The sampling parameters in its generation_config.json are used for chat requests only; its
stop tokens are always used, in addition to those of the request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams
from megatron_bupo.rollout.sampling import sample_key

NUM_SEEDS = 2**31
LOGPROB_ROUNDING = 1e-4
"""The log-prob of a token with a probability near 1 may be above 0 by this much."""


class BadAnswer(RuntimeError):
    """An answer that is not used: aborted, generated with other weights, or malformed."""


def sampling_seeds(run_seed: int, requests: Sequence[GenerationRequest]) -> list[int]:
    """A seed of 31 bits for each request, all different: a function of the run's seed, step, prompt and sample.

    If two requests would have the same seed, the later one gets the next free one.
    """
    seeds: dict[int, None] = {}
    for request in requests:
        seed = sample_key(run_seed, *request.identity) % NUM_SEEDS
        while seed in seeds:
            seed = (seed + 1) % NUM_SEEDS
        seeds[seed] = None
    return list(seeds)


def name_of(request: GenerationRequest) -> str:
    """A request as messages name it."""
    return f"prompt {request.prompt.index} ({len(request.prompt.tokens)} tokens), sample {request.sample}"


def generate_body(request: GenerationRequest, params: SamplingParams, seed: int, rid: str) -> dict[str, Any]:
    """The body of POST /generate for one response. The seed is used with --enable-deterministic-inference only."""
    return {
        "rid": rid,
        "input_ids": request.prompt.tokens,
        "sampling_params": {
            "max_new_tokens": params.max_new_tokens,
            "min_new_tokens": 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(params.stop_token_ids),
            # Without stop tokens in the request the server's own are turned off; with them that is not possible.
            "ignore_eos": not params.stop_token_ids,
            "sampling_seed": seed,
            "n": 1,
            "skip_special_tokens": False,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
    }


def read_answer(
    answer: Any, request: GenerationRequest, params: SamplingParams, rid: str, version: str, server: str
) -> Generation:
    """The response in an answer of /generate.

    Raises:
        BadAnswer: aborted, generated with other weights than `version`, or malformed; the request may be sent again.
        UsageError: the configuration of the server is wrong for this run: it cuts prompts or responses short, or ends
            them at a token that is no stop token of the run.
    """
    try:
        return _read(answer, request, params, rid, version, server)
    except BadAnswer as error:
        raise BadAnswer(f"{server}/generate: {error}") from None


def _read(
    answer: Any, request: GenerationRequest, params: SamplingParams, rid: str, version: str, server: str
) -> Generation:
    answer = _typed(answer, dict, "its answer")
    info = _typed(answer.get("meta_info"), dict, "meta_info")
    finish = _typed(info.get("finish_reason"), dict, "finish_reason")
    if finish.get("type") == "abort":
        raise BadAnswer(f"the response was aborted ({finish.get('message')})")
    if info.get("id") != rid:
        raise BadAnswer(f"this answers request {info.get('id')!r}, not {rid!r}")
    tokens = [_token(value) for value in _typed(answer.get("output_ids"), list, "output_ids")]
    logprobs = _logprobs(info.get("output_token_logprobs"), tokens)
    _check_version(info, version, len(tokens))
    _check_count(info.get("completion_tokens"), len(tokens), "completion_tokens")
    if not 1 <= len(tokens) <= params.max_new_tokens:
        raise BadAnswer(f"{len(tokens)} tokens came, 1 to {params.max_new_tokens} were asked for")
    if any(token in params.stop_token_ids for token in tokens[:-1]):
        raise BadAnswer("the response goes on after a stop token")
    _check_prompt(info.get("prompt_tokens"), request, server)
    stopped = _stopped(finish, tokens, request, params, server)
    return Generation(tokens, logprobs, "stop" if stopped else "length", version)


def _stopped(
    finish: dict[str, Any], tokens: list[int], request: GenerationRequest, params: SamplingParams, server: str
) -> bool:
    """Whether a stop token ended the response, and not the limit."""
    ends_in_stop = tokens[-1] in params.stop_token_ids
    if finish.get("type") == "stop":
        matched = finish.get("matched")
        if matched != tokens[-1] or isinstance(matched, bool):  # "NaN happened", for one
            raise BadAnswer(f"it stopped at {matched!r}, but the last token is {tokens[-1]}")
        if not ends_in_stop:
            raise UsageError(
                f"{server}: it ended {name_of(request)} at token {matched}, which is none of the run's stop tokens "
                f"{list(params.stop_token_ids)}; the eos_token_id of its config.json, its generation_config.json and "
                "its tokenizer must be among those of --hf-model: serve the same folder"
            )
        return True
    if finish.get("type") != "length":
        raise BadAnswer(f"finish_reason is {finish!r}")
    if not ends_in_stop and len(tokens) < params.max_new_tokens:
        _check_count(finish.get("length"), len(tokens), "the length in finish_reason")
        raise _cut(server, request, f"it gave {len(tokens)} of {params.max_new_tokens} tokens")
    return ends_in_stop


def _check_prompt(found: Any, request: GenerationRequest, server: str) -> None:
    asked = len(request.prompt.tokens)
    if type(found) is int and 0 < found < asked:
        raise _cut(server, request, f"it kept {found} tokens of the prompt")
    _check_count(found, asked, "prompt_tokens")


def _cut(server: str, request: GenerationRequest, what: str) -> UsageError:
    return UsageError(
        f"{server}: it cut {name_of(request)} short: {what}; give the server more room (its --context-length, "
        "--mem-fraction-static, --max-total-tokens), or ask for shorter responses (--rollout-max-response-len)"
    )


def _check_version(info: dict[str, Any], version: str, num_tokens: int) -> None:
    found = info.get("weight_version")
    if found != version:
        raise BadAnswer(f"it was generated with weights {found!r}, not {version!r}")
    spans = info.get("weight_versions")
    if spans is None:  # servers before 0.5.23 have no spans
        return
    whole = [{"version": version, "start": 0, "end": num_tokens}]
    if spans != whole:
        raise BadAnswer(f"it was generated with changing weights: {spans!r}")


def _check_count(found: Any, expected: int, name: str) -> None:
    if found != expected:
        raise BadAnswer(f"{name} is {found!r}, not {expected}")


def _logprobs(entries: Any, tokens: list[int]) -> list[float]:
    """The log-probs of [[logprob, token, text or null], ...], which must be of `tokens`."""
    entries = _typed(entries, list, "output_token_logprobs")
    _check_count(len(entries), len(tokens), "the number of log-probs")
    values = []
    for entry, token in zip(entries, tokens, strict=True):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            raise BadAnswer(f"the log-prob of token {token} is {entry!r}")
        value = entry[0]
        if type(value) not in (int, float) or not math.isfinite(value) or value > LOGPROB_ROUNDING:
            raise BadAnswer(f"the log-prob of token {token} is {value!r}")
        values.append(min(float(value), 0.0))
    return values


def _token(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadAnswer(f"output_ids has {value!r}")
    return value


def _typed(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise BadAnswer(f"{name} is no {kind.__name__}, but {str(value)[:100]!r}")
    return value
