"""How long the weights take to a server on this machine, by each way of weight sync.

    python benchmarks/weight_sync.py --hf-model models/SmolLM2-135M-Instruct --sglang-python .venv-sglang/bin/python

One trainer process, one SGLang server, both on the CPU in fp32; `train`'s own Servers and WeightSync. The first push of
each way, which compares checksums and log-probs too, is shown apart; then the ways take turns, with all weights and
with those that the policy layer:L trains (--layer), which is what an internal phase sends.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.architectures.mapping import split_layer
from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync

METHODS = ("tensor", "distributed", "disk")
SERVER = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --disable-overlap-schedule "
    "--max-total-tokens 4096 --max-running-requests 8 --skip-server-warmup --sleep-on-idle"
)


class InOneProcess:
    """A model in training that is a HuggingFace model of this process."""

    def __init__(self, folder: str, layer: int) -> None:
        self.layer = layer
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def hf_tensors(self, since: str | None = None) -> list[tuple[str, Tensor]]:
        wanted = [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]
        return wanted if since is None else [pair for pair in wanted if self._is_trained(pair[0])]

    def _is_trained(self, name: str) -> bool:
        number = split_layer(name)[1]
        return name != "model.norm.weight" if number is None else number < self.layer

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> list[float]:
        rows = self.model(torch.tensor([tokens])).logits[0, :-1].log_softmax(dim=-1)
        return [float(rows[at, token]) for at, token in enumerate(tokens[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True)
    parser.add_argument("--sglang-python", required=True)
    parser.add_argument("--bucket-mb", type=int, default=512)
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = SGLangConfig(sglang_launch=True, sglang_python=args.sglang_python, sglang_args=SERVER)
    trainer = InOneProcess(args.hf_model, args.layer)
    megabytes, in_part = (sum(tensor.nbytes for _, tensor in trainer.hf_tensors(s)) / 2**20 for s in (None, ""))
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    in_phase: dict[str, list[float]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers.start(config, args.hf_model, "fp32", 0, Path(folder) / "logs", None)
        try:
            syncs = {
                method: WeightSync(
                    method,
                    bucket_bytes=args.bucket_mb * 2**20,
                    timeout_s=600,
                    folder=Path(folder) / "weights",
                    hf_model=args.hf_model,
                    vocab_size=trainer.model.config.vocab_size,
                    tied=trainer.model.config.tie_word_embeddings,
                )
                for method in METHODS
            }
            for method in METHODS:
                servers.workers[0].checked = False
                seconds[method].append(push(syncs[method], servers, trainer))
            for _ in range(args.rounds):
                for method in METHODS:
                    seconds[method].append(push(syncs[method], servers, trainer))
                    in_phase[method].append(push(syncs[method], servers, trainer, in_part=True))
            for sync in syncs.values():
                sync.close()
        finally:
            servers.close()
    print(f"{megabytes:.0f} MiB of weights in buckets of {args.bucket_mb} MiB, {torch.get_num_threads()} thread(s)")
    for method, (first, *later) in seconds.items():
        median = statistics.median(later)
        print(f"{method:12} first {first:5.1f} s, later {median:5.1f} s ({megabytes / median:4.0f} MiB/s)", end="; ")
        print(f"layer:{args.layer}, {in_part:.0f} MiB but by disk: {statistics.median(in_phase[method]):5.1f} s")


def push(sync: WeightSync, servers: Servers, trainer: InOneProcess, in_part: bool = False) -> float:
    started = time.perf_counter()
    since = servers.workers[0].version if in_part else None
    sync.push(servers.workers, trainer, version=f"{started:.6f}", since=since)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
