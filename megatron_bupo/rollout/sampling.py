"""Sampling whose noise depends on the sample alone, not on the batch, the process or the device.

A token is drawn by the Gumbel-max trick: argmax(logits / T + g) with g_v independent Gumbel(0, 1) follows
softmax(logits / T). The noise of each token is a pure function of (run seed, step, prompt, sample, position, v):

    key      blake2b(run seed, step, prompt, sample), 128 bits, of a Philox counter generator
    counter  the position in its topmost word: 2^192 draws apart, and no state to carry from token to token

It is drawn on the CPU also where the model runs elsewhere; 152k entries take 1 to 2 ms.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def sample_key(run_seed: int, step: int, prompt_index: int, sample: int) -> int:
    """The 128-bit Philox key of one response. Close seeds give unrelated keys, which adding them up would not."""
    text = f"{run_seed}/{step}/{prompt_index}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def gumbel_noise(key: int, position: int, vocab_size: int) -> np.ndarray:
    """Gumbel(0, 1) noise of one token: fp32 [V], always finite.

    Drawn as -log(E) with E ~ Exp(1) in float64. From a fp32 uniform, -log(-log(u)) is infinite at u = 1, and since u
    is a multiple of 2^-24 no draw lies above 16.6: with 152k entries, one token in a hundred needs that tail.
    """
    generator = np.random.Generator(np.random.Philox(key=key, counter=position << 192))
    exponential = np.maximum(generator.standard_exponential(vocab_size), np.finfo(np.float32).tiny)
    return -np.log(exponential.astype(np.float32))


def batch_noise(keys: list[int], position: int, vocab_size: int) -> Tensor:
    """The noise of one position of several responses: fp32 [B, V] on the CPU."""
    noise: np.ndarray = np.empty((len(keys), vocab_size), dtype=np.float32)
    for row, key in enumerate(keys):
        noise[row] = gumbel_noise(key, position, vocab_size)
    return torch.from_numpy(noise)


def choose_tokens(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [B, V], any float dtype, of the policy sampled from, not divided by the temperature.
        noise: fp32 [B, V] from `batch_noise`, on the device of the logits.

    Returns:
        Tokens int64 [B] and their log-probs fp32 [B] in nats: at the temperature, before top-p.
    """
    scaled = logits.float() / temperature
    candidates = scaled if top_p >= 1.0 else keep_nucleus(scaled, top_p)
    tokens = (candidates + noise).argmax(dim=-1)
    # log_softmax takes the maximum off first; chosen - logsumexp would round log-probs near 0 to a logit's last digit.
    return tokens, scaled.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf everywhere but in the nucleus: the fewest most likely tokens whose probability reaches `top_p` [B, V]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, mass_before >= top_p)
    return logits.masked_fill(outside, float("-inf"))
