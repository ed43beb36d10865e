"""The engine of a training run with its servers, from the flags."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.prompts import PromptSet
from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.engine import SGLangEngine
from megatron_bupo.rollout.sglang.process import API_KEY_VARIABLE
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from megatron_bupo.rollout.sglang.worker import Worker


def start_engine(config: TrainConfig, arch: Architecture, prompts: PromptSet, device: torch.device) -> SGLangEngine:
    """Start or find the servers, and wait until they are ready. Raises UsageError: they cannot serve this run."""
    flags, model, run = config.sglang, config.model, config.run
    what = " ".join(flags.sglang_url) if flags.sglang_url else f"{flags.sglang_num_servers} server(s) to start"
    print(f"SGLang: waiting for {what}, at most {flags.sglang_start_timeout:g} s", flush=True)
    servers = Servers.start(
        flags,
        model.hf_model,
        model.dtype_name,
        run.seed,
        Path(run.save) / "sglang" if run.save else None,
        # Taken out of the environment, which processes that judge responses inherit.
        os.environ.pop(API_KEY_VARIABLE, None),
    )
    try:
        longest = max(len(prompt.tokens) for prompt in prompts.prompts)
        check_room(servers.workers, longest, config.rollout.rollout_max_response_len)
        sync = _weight_sync(config, arch, servers.workers, device)
    except UsageError:
        servers.close()
        raise
    return SGLangEngine(
        servers,
        sync,
        concurrency=flags.sglang_concurrency,
        request_timeout_s=flags.sglang_request_timeout,
        health_timeout_s=flags.sglang_health_timeout,
        attempts=flags.sglang_attempts,
    )


def check_room(workers: Sequence[Worker], longest_prompt: int, response_len: int) -> None:
    """Raise UsageError where a server would cut a response to the longest prompt short, hours later."""
    for worker in workers:
        # sglang takes prompts 5 tokens shorter than a whole sequence may be, and ends a response one token before that.
        room = worker.info.max_input_tokens
        if room is not None and longest_prompt + response_len > room + 4:
            raise UsageError(
                f"{worker.name}: has room for {room + 4} tokens, but the longest prompt has {longest_prompt} and a "
                f"response up to {response_len} (--rollout-max-response-len); ask for shorter ones, or give the server "
                "more (--context-length, --max-total-tokens, --mem-fraction-static)"
            )


def sync_method(flag: str, server_devices: set[str], trainer_device: str) -> str:
    """What --weight-sync stands for, as cpu and cuda meet."""
    if flag != "auto":
        return flag
    # Gloo or NCCL joins processes on one kind of device; messages go everywhere, but take much longer.
    return "distributed" if server_devices == {trainer_device} else "tensor"


def _weight_sync(
    config: TrainConfig, arch: Architecture, workers: Sequence[Worker], device: torch.device
) -> WeightSync:
    flags, save = config.sglang, config.run.save
    method = sync_method(flags.weight_sync, {worker.info.device for worker in workers}, device.type)
    shown = ", ".join(f"{worker.name} (sglang {worker.info.version}, {worker.info.device})" for worker in workers)
    draws = "from seeds" if all(worker.info.is_deterministic for worker in workers) else "at random"
    print(f"SGLang: {shown} ready; weights by {method}, draws {draws}", flush=True)
    folder = Path(save) / "sglang" / "weights" if save else None
    if flags.weight_sync_dir is not None:
        # Other runs may use it too. The same run finds, and removes, what it left there when it was killed.
        name = (
            hashlib.blake2b(os.path.realpath(save).encode(), digest_size=6).hexdigest() if save else str(uuid.uuid4())
        )
        folder = Path(flags.weight_sync_dir) / f"weights-{name}"
    return WeightSync(
        method,
        bucket_bytes=flags.weight_sync_bucket_mb * 2**20,
        timeout_s=flags.weight_sync_timeout,
        folder=folder,
        hf_model=config.model.hf_model,
        vocab_size=arch.vocab_size,
        tied=arch.tied,
    )
