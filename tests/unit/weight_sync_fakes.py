"""A server that keeps what it gets, and stacks, pads and hashes as SGLang does on a CPU; and a trainer for it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.rollout.sglang.client import SGLangClient
from tests.unit.tiny_hf import hf_state

VOCAB = 101
LOGPROBS = [-1.5 - 0.01 * at for at in range(23)]


class FakeServer:
    """Has the parameters of `state` (names of HuggingFace) and takes those that it is sent, as SGLang does.

    `fails` maps a path to what it answers the next times: a status, or an exception to be raised.
    """

    def __init__(self, state: dict[str, Tensor], *, has_sessions: bool = True, tp_size: int = 1) -> None:
        self.held = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.has_sessions, self.is_open, self.is_paused, self.version = has_sessions, False, False, "default"
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.fails: dict[str, list[Any]] = {}
        self.logprobs: list[float] = list(LOGPROBS)

    def worker(self, name: str = "http://one:1", tp_size: int = 1) -> Any:
        client = SGLangClient(name, transport=httpx2.MockTransport(self._answer))
        info = SimpleNamespace(tp_size=tp_size, device="cpu")
        return FakeWorker(client=client, info=info, name=name, version="old", checked=False)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        call = request.url.path.strip("/")
        body = json.loads(request.content) if request.content else {}
        self.calls.append(call)
        self.bodies.append(body)
        planned = self.fails.get(call)
        if planned and (answer := planned.pop(0)) is not None:
            if isinstance(answer, Exception):
                raise answer
            return httpx2.Response(answer, json={"success": False, "message": f"planned {answer}"})
        status, answer = self._act(call, body)
        return httpx2.Response(status, json=answer)

    def _act(self, call: str, body: dict[str, Any]) -> tuple[int, Any]:
        if call in ("pause_generation", "continue_generation"):
            self.is_paused = call == "pause_generation"
        elif call in ("begin_weight_update", "end_weight_update"):
            begin = call == "begin_weight_update"
            if not self.has_sessions:
                return 404, {"detail": "Not Found"}
            if self.is_open == begin:
                return 400, {"success": False, "message": "a weight-update session is already open"}
            self.is_open = begin
        elif call == "update_weights_from_tensor":
            if not self.is_paused or (self.has_sessions and not self.is_open):
                return 400, {"success": False, "message": "must run between begin and end"}
            for name, tensor in pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])):
                if name in self.held:  # an unknown one is accepted
                    self.held[name] = tensor
            self.version = body["weight_version"]
        elif call == "update_weights_from_disk":
            model = AutoModelForCausalLM.from_pretrained(body["model_path"])
            self.held.update(hf_state(model))
            self.version = body["weight_version"]
        elif call == "model_info":
            return 200, {"weight_version": self.version}
        elif call == "weights_checker":
            return 200, {"success": True, "ranks": [{"checksums": self.checksums()}]}
        elif call == "generate":
            numbers = [None if math.isnan(number) else number for number in self.logprobs]
            pairs = zip([None, *numbers], body["input_ids"], strict=True)
            return 200, {"meta_info": {"input_token_logprobs": [[number, token, None] for number, token in pairs]}}
        return 200, {"success": True, "message": ""}

    def checksums(self) -> dict[str, str]:
        return server_checksums(self.held)


def server_checksums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """As a CPU server hashes the tensors (names of HuggingFace) that it holds: whole stacked and padded ones."""
    held, found = dict(tensors), {}
    for whole, parts in {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.items():
        for first in [name for name in held if f".{parts[0]}." in name]:
            stacked = [held.pop(first.replace(parts[0], part)) for part in parts]
            if whole == "gate_up_proj":
                stacked = [torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 32)) for tensor in stacked]
            held[first.replace(parts[0], whole)] = torch.cat(stacked)
    for name, tensor in held.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
        if ".down_proj." in name:
            tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 32))
        found[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()[:8].hex()
    return found


class FakeWorker(SimpleNamespace):
    __hash__ = object.__hash__  # as a Worker has it


class FakeModel:
    """A trainer; `changed` names the tensors that it trained since a version."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, 0
        self.changed: dict[str, set[str]] = {}

    def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = self.changed[since] if since is not None else self.tensors.keys()
        yield from ((name, tensor) for name, tensor in self.tensors.items() if name in wanted)

    def logprobs(self, tokens: list[int]) -> list[float]:
        self.asked += 1
        assert len(tokens) == len(LOGPROBS) + 1 and all(0 <= token < VOCAB for token in tokens)
        return list(LOGPROBS)
