"""Tokens per second of the entropy flow, beside a plain HuggingFace loop and beside bare matrix products.

    python benchmarks/entropy_flow.py --hf-model models/SmolLM2-135M-Instruct --tokens 256
    python benchmarks/entropy_flow.py --shape qwen3-4b --bf16 --tokens 16384        random weights of a known shape

Everything runs in one process on the same weights and random tokens, one after the other in every round, so that
whatever else the machine does hits all of them. With L layers a token has 5 L + 2 distributions: embedding, full
policy, and in each layer the residual stream, both modules' outputs and both modules' normed inputs.

    megatron_bupo   `measure` of the command entropy-flow: all numbers of the file, with KL, cosines and norms
    huggingface     the entropies alone: states by hooks, then logits, log_softmax and entropy in chunks of rows
    published       (--published) the published script's way: response by response, all states kept on the host, each
                    layer's input unembedded once more, softmax and log_softmax of a whole response's logits
    products        the limit: FLOPs of the unembeddings and of the layers' own products at the best rate of bare
                    products found in the same round, over several shapes

Seconds are the minimum and the median over the rounds after a warm-up; tokens/s and the share of the limit go with the
medians, the other share with the minima. Tokens are response tokens. Peak is what a call adds at most to the memory
held before it: on a GPU allocated there by torch, else the growth of the resident set with the heap's holes, which the
blocks of 25 to 50 MB of dense logits leave (Linux only). Random weights make flat distributions, which spare the
HuggingFace loop exp()'s slow underflows on the CPU: --hf-model has real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.parallel.setup import parallel_state
from megatron_bupo.samples import Rollout
from megatron_bupo.weights.hf_files import HFWeights

_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
_QWEN3_06B = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936, "head_dim": 128}
_QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "vocab_size": 151936, "head_dim": 128}
# name -> (config class, its layers, heads and kv heads, the other sizes); all are tied
SHAPES: dict[str, tuple[Any, tuple[int, int, int], dict[str, int]]] = {
    "smollm2": (LlamaConfig, (30, 9, 3), _SMOLLM2),
    "qwen3-0.6b": (Qwen3Config, (28, 16, 8), _QWEN3_06B),
    "qwen3-4b": (Qwen3Config, (36, 32, 8), _QWEN3_4B),
}
PROMPT_LENGTH = 32
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CHUNK_ROWS = 4096 if ON_GPU else 256  # of the HuggingFace loop: 2.5 GB of fp32 logits at V = 152k, 50 MB at 49k


class Call(NamedTuple):
    """What one call took."""

    seconds: float
    peak_mb: float


def shape_config(name: str, num_layers: int | None) -> Any:
    """The HuggingFace config of a known shape, with other than its own number of layers where one is given."""
    config_class, (layers, heads, kv_heads), sizes = SHAPES[name]
    return config_class(
        **sizes,
        num_hidden_layers=num_layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def make_rollouts(args: argparse.Namespace, vocab_size: int) -> list[Rollout]:
    """Random tokens: responses of one length, with --tokens response tokens in all or a few less."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens // args.response_length, PROMPT_LENGTH + args.response_length)
    rows = torch.randint(vocab_size, shape, generator=generator).tolist()
    return [Rollout(i, row[:PROMPT_LENGTH], row[PROMPT_LENGTH:]) for i, row in enumerate(rows)]


def count_flops(arch: Architecture, rollouts: list[Rollout]) -> int:
    """FLOPs of the products alone: 5 L + 2 unembeddings of response rows, and the layers over all inputs."""
    lengths = [rollout.num_tokens - 1 for rollout in rollouts]  # the last token predicts nothing
    rows = sum(len(rollout.response_tokens) for rollout in rollouts)
    unembeddings = (5 * arch.num_layers + 2) * 2 * rows * arch.hidden_size * arch.vocab_size
    weights = arch.hidden_size * (2 * arch.query_size + 2 * arch.kv_size + 3 * arch.ffn_hidden_size)
    causal_pairs = sum(length * (length + 1) // 2 for length in lengths)
    return unembeddings + arch.num_layers * (2 * sum(lengths) * weights + 4 * arch.query_size * causal_pairs)


class Products:
    """Rates of bare products [rows, inner] x [inner, columns] laid out as in an unembedding: inner is contiguous."""

    def __init__(self, arch: Architecture, dtype: torch.dtype) -> None:
        rows, columns = ((4096, 16384), (16384, arch.vocab_size)) if ON_GPU else ((128, 512), (2048, 16384))
        square = 8192 if ON_GPU else 2048
        self.dtype = dtype
        self.shapes = [(m, arch.hidden_size, n) for m in rows for n in columns] + [(square, square, square)]
        self.best = dict.fromkeys(self.shapes, 0.0)  # FLOP/s of each shape in the best round

    def rate(self) -> float:
        """The best FLOP/s of all shapes now."""
        rates = {shape: self._rate_of(*shape) for shape in self.shapes}
        self.best = {shape: max(rate, self.best[shape]) for shape, rate in rates.items()}
        return max(rates.values())

    def _rate_of(self, rows: int, inner: int, columns: int) -> float:
        left = torch.randn(rows, inner, device=DEVICE, dtype=self.dtype)
        right = torch.randn(columns, inner, device=DEVICE, dtype=self.dtype).t()
        out = torch.mm(left, right)
        repeats = 1
        while True:
            started = now()
            for _ in range(repeats):
                torch.mm(left, right, out=out)
            seconds = now() - started
            if seconds > 0.2:
                return repeats * 2 * rows * inner * columns / seconds
            repeats *= 2


def entropies_of(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def huggingface(model: Any, rollouts: list[Rollout], max_tokens: int) -> Tensor:
    """Micro-batches of responses, every state's entropies in chunks of rows; mean entropies [5 L + 2]."""
    ids = torch.tensor([rollout.prompt_tokens + rollout.response_tokens for rollout in rollouts], device=DEVICE)
    weight = model.get_output_embeddings().weight
    totals: Tensor | int = 0
    for batch in ids.split(max(1, max_tokens // ids.shape[1])):
        sums = []
        for state in collect_states(model, batch, response_rows_only=True):
            chunks = state.flatten(0, 1).split(CHUNK_ROWS)
            sums.append(torch.stack([entropies_of(chunk @ weight.T).sum() for chunk in chunks]).sum())
        totals = totals + torch.stack(sums)
    assert isinstance(totals, Tensor)
    return totals.cpu() / (len(ids) * (ids.shape[1] - PROMPT_LENGTH))


@torch.no_grad()
def published(model: Any, rollouts: list[Rollout]) -> Tensor:
    """One response at a time and one dense distribution after the other; mean entropies [5 L + 2]."""
    totals = torch.zeros(5 * model.config.num_hidden_layers + 2)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_tokens + rollout.response_tokens], device=DEVICE)
        states = [state.cpu() for state in collect_states(model, ids, response_rows_only=False)]
        layer_inputs = states[5:-2:5]  # H_1 .. H_{L-1} once more
        for index, state in enumerate([*states, *layer_inputs]):
            logits = model.lm_head(state[0, PROMPT_LENGTH - 1 : -1].to(DEVICE))
            probs = torch.softmax(logits, dim=-1)
            entropies = -(probs * torch.log_softmax(logits, dim=-1)).sum(-1)
            if index < len(states):
                totals[index] += entropies.sum().cpu()
    return totals / sum(len(rollout.response_tokens) for rollout in rollouts)


def collect_states(model: Any, ids: Tensor, response_rows_only: bool) -> list[Tensor]:
    """States [B, rows, H] in the forward's order: embedding, (attn_in, attn, ffn_in, ffn, resid) x L, final norm."""
    rows = slice(PROMPT_LENGTH - 1, -1) if response_rows_only else slice(None)
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[:, rows])

    modules = [model.model.embed_tokens, model.model.norm]
    for layer in model.model.layers:
        modules += [layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp, layer]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        model.model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def now() -> float:
    """Seconds, after everything that was started has finished."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


def timed(run: Callable[[], Tensor]) -> tuple[Call, Tensor]:
    """Call once; what it took and what it returned."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = resident_mb("VmRSS")
    started = now()
    result = run()
    seconds = now() - started
    peak = torch.cuda.max_memory_allocated() / 1e6 if ON_GPU else resident_mb("VmHWM")
    return Call(seconds, peak - before), result


def mean_entropies(mean: Any, num_layers: int) -> Tensor:
    """Those of our measurement in the order of `collect_states`, [5 L + 2]."""
    names = ("attn_in", "attn", "ffn_in", "ffn", "resid")
    layers = [mean[name][layer] for layer in range(num_layers) for name in names]
    return torch.tensor([mean["embedding_resid"][0], *layers, mean["full"][0]])


def compare(args: argparse.Namespace, hf_model: Any, folder: str, name_of_model: str) -> None:
    """Let the implementations take turns, and print what they took; each one's first call warms up."""
    arch = read_architecture(folder)
    rollouts = make_rollouts(args, arch.vocab_size)
    num_tokens = sum(len(rollout.response_tokens) for rollout in rollouts)
    flops, products = count_flops(arch, rollouts), Products(arch, hf_model.dtype)
    with parallel_state(ParallelConfig(), seed=0) as state:
        from megatron_bupo.analysis.entropy_flow import measure
        from megatron_bupo.model.parallel_model import ParallelModel

        model = ParallelModel(arch, HFWeights(folder), ParallelConfig(), state, hf_model.dtype)
        runs: dict[str, Callable[[], Tensor]] = {
            "megatron_bupo": lambda: mean_entropies(measure(model, rollouts, args.max_tokens).mean, arch.num_layers)
        }
        if not args.skip_huggingface:
            runs["huggingface"] = lambda: huggingface(hf_model, rollouts, args.max_tokens)
        if args.published:
            runs["published"] = lambda: published(hf_model, rollouts)

        place = torch.cuda.get_device_name() if ON_GPU else f"CPU, {args.threads} thread(s)"
        print(f"{name_of_model}, {arch.num_layers} layers, H {arch.hidden_size}, V {arch.vocab_size}, {hf_model.dtype}")
        weights_mb = sum(param.nbytes for param in hf_model.parameters()) / 1e6
        print(f"{place}; weights of {weights_mb:.0f} MB")
        print(f"{num_tokens} response tokens in {len(rollouts)} response(s), {args.rounds} round(s)", flush=True)
        calls: dict[str, list[Call]] = {name: [] for name in (*runs, "products")}
        results: dict[str, Tensor] = {}
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                call, results[name] = timed(run)
                calls[name].append(call)
            calls["products"].append(Call(flops / products.rate(), 0.0))
    print_table(calls, num_tokens)
    print(f"{flops / num_tokens / 1e9:.2f} GFLOP a token; TFLOP/s of bare products, rows x inner x columns:")
    print(", ".join(f"{'x'.join(map(str, shape))}: {rate / 1e12:.3f}" for shape, rate in products.best.items()))
    for name in set(runs) - {"megatron_bupo"}:
        apart = float((results[name] - results["megatron_bupo"]).abs().max())
        print(f"mean entropies of megatron_bupo and {name}: at most {apart:.1e} nats apart")
    if args.json:
        seconds = {name: statistics.median(call.seconds for call in taken[1:]) for name, taken in calls.items()}
        apart = {name: float((result - results["megatron_bupo"]).abs().max()) for name, result in results.items()}
        args.json.write_text(json.dumps({"tokens": num_tokens, "seconds": seconds, "nats_apart": apart}, indent=2))


def print_table(calls: dict[str, list[Call]], num_tokens: int) -> None:
    limits = [call.seconds for call in calls["products"][1:]]
    headings = ("min s", "median s", "tokens/s", "of limit", "(of min)", "peak MB")
    print(f"{'':<16}" + "".join(f"{heading:>10}" for heading in headings))
    for name, taken in calls.items():
        seconds = [call.seconds for call in taken[1:]]
        least, median = min(seconds), statistics.median(seconds)
        shares = f"{statistics.median(limits) / median:>10.0%}{min(limits) / least:>10.0%}"
        peak = "" if name == "products" else f"{max(call.peak_mb for call in taken):>10.0f}"
        print(f"{name:<16}{least:>10.3f}{median:>10.3f}{num_tokens / median:>10.1f}{shares}{peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf-model")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="of a --shape, for a quick run")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens in all")
    parser.add_argument("--response-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-huggingface", action="store_true")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--published", action="store_true", help="the published script's way too")
    args = parser.parse_args()
    if args.layers is not None and args.shape is None:
        parser.error("--layers cuts a --shape; it does not go with --hf-model")
    if args.response_length > args.tokens:
        parser.error(f"--tokens {args.tokens} is less than one response of --response-length {args.response_length}")
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if args.hf_model:
        model = AutoModelForCausalLM.from_pretrained(args.hf_model, dtype=dtype, attn_implementation="sdpa").to(DEVICE)
        compare(args, model.eval(), args.hf_model, args.hf_model)
        return
    torch.manual_seed(0)
    with DEVICE:
        config = shape_config(args.shape, args.layers)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compare(args, model, folder, f"random {args.shape}")


if __name__ == "__main__":
    main()
