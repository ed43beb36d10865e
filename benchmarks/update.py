"""The updates on one rollout batch in phase 1 and 2, beside a plain HuggingFace implementation of the published method.

    python benchmarks/update.py --hf-model models/SmolLM2-135M-Instruct

A rollout batch takes one optimizer step or several (--updates), each on its share of the responses: old log-probs,
forward, backward, AdamW step, in fp32. The published method runs the whole model in both phases, unembeds the internal
and the final hidden state at every position and takes log-softmax of both. Each implementation lives in a process of
its own, which gives each its own peak memory; they take turns, one rollout batch at a time, so that whatever else the
machine does hits both. Medians over the rounds; peaks are of the resident set, on a GPU
of the memory that torch allocated there. Another dtype with --bf16; without a folder, random weights of a known shape:

    python benchmarks/update.py --shape qwen3-0.6b --bf16 --responses 8 --length 2048 --response-length 1792
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import Rollout

# Takes a policy and the number of optimizer steps; returns the gradient norm of the first one and, of ours, norms_s:
# what measuring update_norm and master_drift took.
Update = Callable[[PolicySpec, int], dict[str, float]]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
OPEN = ExitStack()  # what a child holds until it ends


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float32


def write_random_model(shape: str, folder: str) -> None:
    """A HuggingFace folder of a known shape with random weights in bf16: nothing has to be fetched."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape])).bfloat16().save_pretrained(folder)


def make_rollouts(args: argparse.Namespace, vocab_size: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (args.responses, args.length), generator=generator).tolist()
    split = args.length - args.response_length
    return [Rollout(i // 2, row[:split], row[split:], reward=float(i % 2)) for i, row in enumerate(tokens)]


def ours(args: argparse.Namespace) -> Update:
    """One process of megatron_bupo, its defaults."""
    from megatron_bupo.architectures.families import read_architecture
    from megatron_bupo.config.train import AlgorithmConfig, OptimizerConfig, ParallelConfig
    from megatron_bupo.data.packing import pack_for, split_mini_batches
    from megatron_bupo.parallel.setup import parallel_state
    from megatron_bupo.rl.advantage import compute_advantages
    from megatron_bupo.rl.builtin import load_estimator
    from megatron_bupo.weights.hf_files import HFWeights

    state = OPEN.enter_context(parallel_state(ParallelConfig(), seed=0))
    from megatron_bupo.training.actor import Actor, make_objective

    arch = read_architecture(args.hf_model)
    specs = (PolicySpec("layer", args.layer, False), PolicySpec())
    weights = HFWeights(args.hf_model)
    actor = Actor(arch, weights, ParallelConfig(), OptimizerConfig(), state, dtype_of(args), specs)
    rollouts = make_rollouts(args, arch.vocab_size)
    values = compute_advantages(load_estimator("grpo"), "grpo", rollouts)
    objective = make_objective(AlgorithmConfig(), args.response_length)

    def update(spec: PolicySpec, count: int) -> dict[str, float]:
        actor.norms.begin(1)
        mini_batches = [
            pack_for(state, part, max_tokens=args.max_tokens or args.responses * args.length, offset=offset)
            for offset, part in split_mini_batches(rollouts, args.responses // count)
        ]
        for batch in (batch for batches in mini_batches for batch in batches):
            batch.columns.advantages = values[batch.responses].to(state.device)[batch.segments]
        for batches in mini_batches[1:]:  # as Trainer does; the first update has its own
            for batch, output in zip(batches, actor.score(batches, [spec], 1.0)[spec], strict=True):
                batch.columns.keep_old(output.logprobs, output.entropy)
        updates = [actor.update(batches, spec, objective, lr=1e-6, temperature=1.0) for batches in mini_batches]
        started = now()
        actor.norms.movement()
        return {"grad_norm": updates[0].grad_norm, "norms_s": now() - started}

    return update


def plain_huggingface(args: argparse.Namespace) -> Update:
    """The published method: whole model, both unembeddings, log-softmax of all positions."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.hf_model, dtype=dtype_of(args), attn_implementation="sdpa")
    model.to(device)
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-6)
    rollouts = make_rollouts(args, model.config.vocab_size)
    ids = torch.tensor([rollout.prompt_tokens + rollout.response_tokens for rollout in rollouts], device=device)
    advantages = torch.tensor([0.7071 if rollout.reward else -0.7071 for rollout in rollouts], device=device)[:, None]

    def logprobs(spec: PolicySpec, part: slice) -> torch.Tensor:
        output = model(ids[part], output_hidden_states=True, use_cache=False)
        internal = model.lm_head(output.hidden_states[args.layer])
        both = {}
        for name, logits in (("full", output.logits), ("internal", internal)):
            logs = torch.log_softmax(logits.float(), dim=-1)
            both[name] = logs[:, :-1].gather(2, ids[part, 1:, None])[..., 0][:, -args.response_length :]
        return both["full" if spec.is_full else "internal"]

    def update(spec: PolicySpec, count: int) -> dict[str, float]:
        size = args.responses // count
        parts = [slice(start, start + size) for start in range(0, args.responses, size)]
        with torch.no_grad():
            old = [logprobs(spec, part) for part in parts]
        norms = []
        for part, old_logprobs in zip(parts, old, strict=True):
            ratio = (logprobs(spec, part) - old_logprobs).exp()
            gain = torch.minimum(ratio * advantages[part], ratio.clamp(0.8, 1.2) * advantages[part])
            optimizer.zero_grad()
            (-gain.mean()).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
        return {"grad_norm": float(norms[0])}

    return update


IMPLEMENTATIONS = {"megatron_bupo": ours, "huggingface": plain_huggingface}


def serve(args: argparse.Namespace) -> None:
    """In a child: one rollout batch per line of stdin, its seconds and peak on stdout."""
    torch.set_num_threads(args.threads)
    update = IMPLEMENTATIONS[args.serve](args)
    for line in sys.stdin:
        policy, count = line.split()
        restart_peak()
        started = now()
        answer = update(PolicySpec.parse(policy), int(count))
        seconds = now() - started - answer.get("norms_s", 0.0)
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), **answer}), flush=True)


def now() -> float:
    """Seconds, after everything that was started has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(peak.split()[1]) / 1e3


def start(name: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    numbers = ("hf_model", "layer", "responses", "length", "response_length", "threads")
    words = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in numbers] + ["--bf16"] * args.bf16
    words += [f"--max-tokens={args.max_tokens}"] if args.max_tokens else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, __file__, f"--serve={name}", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ask(child: subprocess.Popen[str], spec: str, updates: int) -> dict[str, Any]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(f"{spec} {updates}\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        sys.exit(f"a child ended without an answer for {spec}: its error is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf-model")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--response-length", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phases", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 4], help="optimizer steps on a rollout batch")
    parser.add_argument("--max-tokens", type=int, help="of a micro-batch of ours (default: all responses are one)")
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="measure one of the two")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--serve", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    if any(args.responses % (2 * count) for count in args.updates):
        parser.error(f"--updates {args.updates}: each must divide the {args.responses // 2} groups of two responses")
    name_of_model = args.hf_model or f"random {args.shape}"
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            write_random_model(args.shape, folder)
            args.hf_model = folder
        compare(args, name_of_model)


def compare(args: argparse.Namespace, name_of_model: str) -> None:
    """Let the implementations take turns, and print what they took."""
    children = {name: start(name, args) for name in IMPLEMENTATIONS if args.only in (None, name)}
    taken: list[dict[str, Any]] = []
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} thread(s)"
    print(f"{name_of_model}, {'bf16' if args.bf16 else 'fp32'}, {place}")
    print(f"{args.responses} x {args.length} tokens ({args.response_length} response), {args.rounds} rounds")
    print(f"{'policy':<10}{'updates':<9}{'implementation':<16}{'seconds':>9}{'peak MB':>10}{'grad norm':>12}")
    for phase, count in itertools.product(args.phases, args.updates):
        spec = f"layer:{args.layer}" if phase == 1 else "full"
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
        for _ in range(args.rounds + 1):  # the first one warms up
            for name, child in children.items():
                seen[name].append(ask(child, spec, count))
        case = f"{spec:<10}{count:<9}"
        medians = {}
        for name, answers in seen.items():
            seconds = statistics.median(answer["seconds"] for answer in answers[1:])
            peak = max(answer["peak_mb"] for answer in answers)
            medians[name] = (seconds, peak)
            norms = {"norms_s": statistics.median(a["norms_s"] for a in answers[1:])} if "norms_s" in answers[0] else {}
            found = {"seconds": seconds, "peak_mb": peak, "grad_norm": answers[0]["grad_norm"], **norms}
            taken.append({"policy": spec, "updates": count, "implementation": name, **found})
            print(f"{case}{name:<16}{seconds:>9.2f}{peak:>10.0f}{answers[0]['grad_norm']:>12.5f}", flush=True)
        if args.only:
            continue
        (our_seconds, our_peak), (their_seconds, their_peak) = (medians[name] for name in IMPLEMENTATIONS)
        ratio, share = their_seconds / our_seconds, our_peak / their_peak
        tokens_per_s = args.responses * args.length / our_seconds
        print(f"{case}{ratio:.2f}x as fast, {share:.0%} of the peak, {tokens_per_s:.0f} tokens/s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(taken, indent=2))
    for child in children.values():
        assert child.stdin is not None
        child.stdin.close()
        child.wait()


if __name__ == "__main__":
    main()
