"""Under torchrun: in one layout, push changed weights to running servers in every way, and compare with HuggingFace.

The second push of each way follows an internal phase: what that does not train is not sent, but by disk.

Arguments: MODEL, a scratch folder, the servers' urls (with commas between), then the layout's flags. Prints one line a
sync; exits 1 if any is off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.commands import ScoreConfig
from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.parallel.shared_work import on_first_rank
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.led_model import LedModel
from megatron_bupo.rollout.sglang.client import SGLangClient
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from megatron_bupo.rollout.sglang.worker import Worker
from megatron_bupo.weights.hf_files import HFWeights
from megatron_bupo.weights.sharding import hf_tensors
from tests.unit.weight_sync_fakes import server_checksums

INTERNAL = PolicySpec.parse("attn:2")
METHODS = ("tensor", "distributed", "disk")
SEQUENCE = [(5 + 17 * at + at * at) % 299 for at in range(40)]


@torch.no_grad()
def change(parameter: Tensor) -> None:
    """As if it had been trained; the same for an element on whatever rank it lies."""
    parameter.add_(0.02 * torch.sin(37 * parameter))


def train_and_push(
    sync: WeightSync, workers: list[Worker], model: Any, state: ParallelState, version: str, since: str | None
) -> list[str]:
    """On all ranks; `workers` on the first one. What is wrong after it, and the figures printed."""
    from megatron_bupo.training.optimizer import trains

    for name, parameter in model.named_parameters():
        if since is None or trains(INTERNAL, name):
            change(parameter)
    from megatron_bupo.model.scoring import ModelForEngine

    led = LedModel(ModelForEngine(model, max_tokens=64), state)
    for worker in workers:
        worker.checked = since is not None
    started = time.perf_counter()
    led.run(lambda: sync.push(workers, led, version, since))
    seconds, asked = time.perf_counter() - started, model.asked[-1]
    tensors = {name: tensor.clone() for name, tensor in model.hf_tensors()}

    def compare() -> list[str]:
        print(f"{version}: pushed in {seconds:.2f} s", flush=True)
        problems = problems_of(workers, str(sys.argv[1]), tensors, version)
        if asked != (None if "disk" in version else since):
            problems.append(f"{version}: sent something else than what changed since {since}")
        return problems

    return on_first_rank(state, compare)


def hf_logprobs(folder: str, tensors: dict[str, Tensor]) -> Tensor:
    """What HuggingFace computes in fp32 for SEQUENCE[1:] with these tensors."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").float()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    outcome = model.load_state_dict(tensors, strict=False)
    assert set(outcome.missing_keys) <= tied and not outcome.unexpected_keys
    with torch.no_grad():
        logprobs = model(torch.tensor([SEQUENCE])).logits[0].log_softmax(-1)
    return logprobs[torch.arange(len(SEQUENCE) - 1), SEQUENCE[1:]]


def server_logprobs(client: SGLangClient) -> tuple[Tensor, str]:
    """What the server gives for SEQUENCE[1:], and the version that it names."""
    body = {
        "input_ids": SEQUENCE,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    meta = client.post("/generate", body, timeout_s=120)["meta_info"]
    return torch.tensor([entry[0] for entry in meta["input_token_logprobs"][1:]]), meta["weight_version"]


def problems_of(workers: list[Worker], folder: str, tensors: dict[str, Tensor], version: str) -> list[str]:
    """Compare every server with HuggingFace, and tell the figures."""
    wanted, checksums = hf_logprobs(folder, tensors), server_checksums(tensors)
    problems = []
    for worker in workers:
        found, named = server_logprobs(worker.client)
        difference = float((found - wanted).abs().max())
        print(f"{version} {worker.name}: {difference:.1e} nats", flush=True)
        if not difference < 1e-4 or named != version or worker.version != version:
            problems.append(f"{version} {worker.name}: {difference:.1e} nats off, it says {named}")
        answer = worker.client.post("/weights_checker", {"action": "checksum"}, timeout_s=120)
        if answer["ranks"][0]["checksums"] != checksums:
            problems.append(f"{version} {worker.name}: other checksums")
    return problems


def main() -> None:
    folder, scratch, urls, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:]
    config = parse("score", ["--hf-model", folder, "--rollouts", __file__, "--output", "unused", *flags])
    assert isinstance(config, ScoreConfig)
    with parallel_state(config.parallel, seed=1) as state:
        from megatron_bupo.model.parallel_model import ParallelModel
        from megatron_bupo.training.optimizer import trains

        class InInternalPhase(ParallelModel):
            """Trains INTERNAL since any version."""

            asked: list[str | None] = []  # noqa: RUF012

            def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
                self.asked.append(since)
                wanted = None if since is None else lambda name: trains(INTERNAL, name)
                return hf_tensors(self.named_parameters(), arch, state.tp_group, state.pp_group, wanted)

        arch = read_architecture(folder)
        model = InInternalPhase(arch, HFWeights(folder), config.parallel, state, torch.float32)
        # Of its own: versions of another layout's syncs must not pass for this one's.
        layout = "".join(flags).replace("-", "") + f"x{state.world_size}"
        workers: list[Worker] = []
        if state.rank == 0:
            workers = Servers.start(SGLangConfig(sglang_url=urls), folder, "fp32", 1, scratch, None).workers
        problems: list[str] = []
        for method in METHODS:
            sync = WeightSync(
                method,
                bucket_bytes=100_000,
                timeout_s=60,
                folder=scratch / "weights",
                hf_model=folder,
                vocab_size=arch.vocab_size,
                tied=arch.tied,
            )
            since = None
            for turn in range(2):  # a process group is used again
                version = f"{layout}-{method}-{turn}"
                problems += train_and_push(sync, workers, model, state, version, since)
                since = version
            sync.close()
    if problems:
        sys.exit("\n".join(f"off: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
