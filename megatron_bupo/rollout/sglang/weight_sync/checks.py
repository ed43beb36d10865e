"""Checks that a server holds the pushed weights: names, checksums, and the log-probs of a fixed prompt.

The expected checksums are computed from the trainer's tensors, never from an answer of the server.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_bupo.architectures.family import HF_UNEMBEDDING
from megatron_bupo.rollout.sglang.weight_sync.calls import Attempt, ask

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang.worker import Worker

# The server stacks these along the first dimension, in this order.
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_STACKED = {part: (whole, at) for whole, parts in _PARTS.items() for at, part in enumerate(parts)}
_PART = re.compile(rf"\.({'|'.join(_STACKED)})\.")
# A server on the CPU pads with zeros: name, dimension, to a multiple of.
_PADDED = (
    (re.compile(r"(model\.embed_tokens|lm_head)\.weight"), 0, 64),
    (re.compile(r".*\.(gate_proj|up_proj)\.weight"), 0, 32),
    (re.compile(r".*\.down_proj\.weight"), 1, 32),
)
_PROBE_LENGTH = 24
# Nats between trainer and server: the largest in fp32; the mean in bf16, where single tokens are off by whole nats
# (SmolLM2-135M: by 2.7 against fp32 and 0.3 between two kinds of attention; 0.2 and 0.1 on average).
_MAX_DIFFERENCE_FP32, _MAX_MEAN_DIFFERENCE = 1e-3, 0.3


class ExpectedWeights:
    """Names and checksums of a one-rank CPU server that holds the tensors passed to `add`, in the stream's order.

    Args:
        by_value: whether there is such a server. Of any other only the names are expected, and nothing is hashed.
        kept: `checksums` of what the server holds already, for a stream that has only some tensors.
    """

    def __init__(self, tied: bool, by_value: bool = True, kept: dict[str, str] | None = None) -> None:
        self._tied, self._by_value, self._kept = tied, by_value, kept or {}
        self._hashes: dict[str, Any] = {}
        self._parts: dict[str, int] = {}
        self.dtype = torch.float32

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tied and name == HF_UNEMBEDDING:
            return
        self.dtype = tensor.dtype
        match = _PART.search(name)
        held, part = name, 0
        if match:
            whole, part = _STACKED[match[1]]
            held = f"{name[: match.start(1)]}{whole}{name[match.end(1) :]}"
        assert self._parts.get(held, 0) == part, f"{name} came out of order: {held} is stacked as {_PARTS}"
        self._parts[held] = part + 1
        running = self._hashes.setdefault(held, hashlib.sha256())
        if not self._by_value:
            return
        running.update(raw_bytes(padded(name, tensor)))

    def checksums(self) -> dict[str, str]:
        """By the server's names: the first 8 bytes of the sha256 of the raw bytes, in hex."""
        return self._kept | {name: running.hexdigest()[:16] for name, running in self._hashes.items()}


def padded(name: str, tensor: Tensor) -> Tensor:
    """The tensor as a server on the CPU holds it: vocabulary and width of the FFN are padded with zeros."""
    for pattern, dim, multiple in _PADDED:
        missing = -tensor.shape[dim] % multiple if pattern.fullmatch(name) else 0
        if missing:
            shape = [*tensor.shape]
            shape[dim] = missing
            return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
    return tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_weights(attempt: Attempt, expected: ExpectedWeights) -> None:
    """Compare names and checksums of every server with what was sent. Raises SyncError.

    Checksums of GPUs, and of one rank of several, are not computed here: they must be equal on all such servers.
    """
    doing = "comparing the weights that arrived"
    answers = attempt.post(doing, "/weights_checker", {"action": "checksum"})
    wanted = expected.checksums()
    seen: dict[tuple[str, int], tuple[Worker, list[dict[str, str]]]] = {}
    for worker, answer in zip(attempt.workers, answers, strict=True):
        try:
            ranks: list[dict[str, str]] = [dict(rank["checksums"]) for rank in answer["ranks"]]
        except (TypeError, KeyError, ValueError) as error:
            raise attempt.error(worker, doing, "its answer holds no checksums") from error
        for held in ranks:
            if problem := _difference(wanted, held, by_value=has_known_checksums(worker)):
                raise attempt.error(worker, doing, problem)
        first, found = seen.setdefault((worker.info.device, worker.info.tp_size), (worker, ranks))
        if found != ranks:
            raise attempt.error(worker, doing, f"its checksums differ from those of {first.name}")


def has_known_checksums(worker: Worker) -> bool:
    """Whether the checksums of a server can be computed here."""
    return worker.info.device == "cpu" and worker.info.tp_size == 1


def _difference(wanted: dict[str, str], held: dict[str, str], by_value: bool) -> str | None:
    """What is wrong with a server's tensors; None if nothing is."""
    if missing := [name for name in wanted if name not in held]:
        return f"it has no {_listed(missing)}, which the trainer sent"
    if unknown := [name for name in held if name not in wanted]:
        return f"it has {_listed(unknown)}, which the trainer never sends"
    if by_value and (other := [name for name in wanted if held[name] != wanted[name]]):
        return f"its {_listed(other)} of {len(wanted)} tensors is not what the trainer sent (the checksum differs)"
    return None


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def probe_tokens(vocab_size: int) -> list[int]:
    """The fixed prompt: token ids spread over the vocabulary."""
    return [(1 + 7919 * at) % vocab_size for at in range(_PROBE_LENGTH)]


def check_probe(attempt: Attempt, tokens: list[int], trainer: Sequence[float], dtype: torch.dtype) -> None:
    """Compare the servers' log-probs of `tokens` with the trainer's, one for each of tokens[1:]. Raises SyncError."""
    doing = "comparing the log-probs of a fixed prompt"
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = attempt.on_all(doing, lambda worker: ask(worker, "/generate", body, attempt.timeout_s))
    for worker, answer in zip(attempt.workers, answers, strict=True):
        try:
            entries = answer["meta_info"]["input_token_logprobs"][1:]
            # JSON has no NaN: the server writes null.
            found = [math.nan if entry[0] is None else float(entry[0]) for entry in entries]
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise attempt.error(worker, doing, "its answer holds no log-probs of the prompt") from error
        if len(found) != len(trainer):
            raise attempt.error(worker, doing, f"{len(found)} log-probs came, for {len(trainer)} tokens")
        if problem := _probe_problem(torch.tensor(trainer), torch.tensor(found), exact=dtype == torch.float32):
            raise attempt.error(worker, doing, problem)


def _probe_problem(trainer: Tensor, server: Tensor, exact: bool) -> str | None:
    """What is wrong with the server's log-probs, both [tokens]; None if nothing is. NaN on either side is wrong."""
    differences = (trainer - server).abs()
    off, allowed = (differences.max(), _MAX_DIFFERENCE_FP32) if exact else (differences.mean(), _MAX_MEAN_DIFFERENCE)
    if off <= allowed:
        return None
    at = int(differences.nan_to_num(torch.inf).argmax())
    return (
        f"they are {float(off):.3g} nats off{'' if exact else ' on average'}, and {allowed} are allowed; most so "
        f"token {at + 1}: {float(server[at]):.6g} there, {float(trainer[at]):.6g} in the trainer"
    )


def check_version(attempt: Attempt, version: str) -> None:
    """Every server must say that it serves this version. Raises SyncError."""
    doing = "asking for the version"
    answers = attempt.on_all(doing, lambda worker: worker.client.get("/model_info", timeout_s=attempt.timeout_s))
    for worker, answer in zip(attempt.workers, answers, strict=True):
        found = answer.get("weight_version") if isinstance(answer, dict) else None
        if found != version:
            raise attempt.error(worker, doing, f"it serves version {found} instead of {version}")
