"""Log-prob and entropy of one rank against dense float64."""

import pytest
import torch
from torch import Tensor

from megatron_bupo.ops import tiles, torch_passes
from megatron_bupo.ops.unembedding import expectation, logprob_and_entropy, row_statistics
from tests.unit.interpreted import interpreted_triton_passes

ROWS, HIDDEN, VOCAB, PADDED_VOCAB = 13, 8, 101, 128


@pytest.fixture(autouse=True, params=["torch", "triton"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that divide neither the rows nor the vocabulary, so that every test crosses many of them.

    Every test runs with both kinds of passes over a tile: Triton's kernels are interpreted on the CPU.
    """
    monkeypatch.setattr(tiles, "_CPU_TILE", (5, 17))
    if request.param == "triton":
        triton_passes = interpreted_triton_passes()

        def passes_for(device: torch.device, dtype: torch.dtype) -> tiles.Passes:
            return triton_passes if dtype == torch.float32 else torch_passes

        monkeypatch.setattr(tiles, "passes_for", passes_for)


def make_case(scale: float = 1.0, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, ...]:
    """hidden, weight, targets, and the gradients that come back for log-probs and entropy. Padding rows are NaN."""
    generator = torch.Generator().manual_seed(7)
    hidden = (torch.randn(rows, HIDDEN, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(PADDED_VOCAB, HIDDEN, generator=generator)
    weight[VOCAB:] = float("nan")
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    if rows > 1:
        targets[0], targets[1] = 0, VOCAB - 1
    upstream = torch.randn(2, rows, generator=generator)
    return hidden, weight.to(dtype).requires_grad_(), targets, upstream[0], upstream[1]


def dense(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Log-probs, entropy and the leaves they were computed from, by torch.distributions."""
    hidden = hidden.detach().to(dtype).requires_grad_()
    weight = weight.detach().to(dtype)[:VOCAB].requires_grad_()
    categorical = torch.distributions.Categorical(logits=hidden @ weight.T / temperature)
    return categorical.log_prob(targets), categorical.entropy(), hidden, weight


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest expected magnitude (and of 1 where everything is small)."""
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


def grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])  # almost uniform, ordinary, very peaked
@pytest.mark.parametrize("use", ["both", "logprobs", "entropy"])
def test_equals_dense_float64(scale: float, temperature: float, use: str) -> None:
    hidden, weight, targets, d_logprobs, d_entropy = make_case(scale)
    logprobs, entropy = logprob_and_entropy(hidden, weight, targets, temperature=temperature, vocab_size=VOCAB)
    assert logprobs.dtype == entropy.dtype == torch.float32

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        terms = {"logprobs": (logprobs * d_logprobs).sum(), "entropy": (entropy * d_entropy).sum()}
        return terms["logprobs"] + terms["entropy"] if use == "both" else terms[use]

    def all_of(logprobs: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        loss(logprobs, entropy).backward()
        return logprobs, entropy, grad(hidden), grad(weight)[:VOCAB]

    found = all_of(logprobs, entropy, hidden, weight)
    expected = all_of(*dense(hidden, weight, targets, temperature))
    in_fp32 = all_of(*dense(hidden, weight, targets, temperature, torch.float32))
    for ours, true, fp32 in zip(found, expected, in_fp32, strict=True):
        # Logits of 1,000 carry errors of 1e-4 in fp32, and some CPUs sum more exactly than others.
        assert_near(ours, true, 5e-6 + 10 * float((fp32 - true).abs().max()) / max(1.0, float(true.abs().max())))
    assert torch.equal(grad(weight)[VOCAB:], torch.zeros(PADDED_VOCAB - VOCAB, HIDDEN))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_statistics_and_expectation_equal_dense_float64(scale: float) -> None:
    hidden, weight, targets, *_ = (tensor.detach() for tensor in make_case(scale))
    statistics = row_statistics(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB, group=None)
    expected = expectation(hidden, weight, statistics.lse_bits, vocab_size=VOCAB, group=None)
    logits = hidden.double() @ weight[:VOCAB].double().T
    bits = logits / torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert_near(statistics.top_bits, bits.amax(1), 5e-6)
    assert_near(statistics.target_bits, bits.gather(1, targets[:, None])[:, 0], 5e-6)
    assert_near(statistics.lse_bits, torch.logsumexp(logits, 1) / torch.log(torch.tensor(2.0)), 5e-6)
    assert_near(expected.embedding, logits.softmax(1) @ weight[:VOCAB].double(), 5e-6 if scale <= 1 else 1e-3)
    assert torch.equal(expected.top_token, logits.argmax(1))


def test_the_most_likely_of_equal_tokens_is_the_first() -> None:
    weight = torch.zeros(PADDED_VOCAB, HIDDEN)
    weight[[20, 60, 100]] = 1.0
    hidden = torch.ones(ROWS, HIDDEN)
    statistics = row_statistics(hidden, weight, torch.full((ROWS,), 60), temperature=1.0, vocab_size=VOCAB, group=None)
    expected = expectation(hidden, weight, statistics.lse_bits, vocab_size=VOCAB, group=None)
    assert expected.top_token.tolist() == [20] * ROWS
    assert torch.equal(statistics.target_bits, statistics.top_bits)  # 60 is as likely


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradcheck_in_float64(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(23, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(20, (6,), generator=generator)  # rows 20 to 22 are padding
    assert torch.autograd.gradcheck(
        lambda hidden, weight: logprob_and_entropy(hidden, weight, targets, temperature=temperature, vocab_size=20),
        (hidden, weight),
    )


def test_known_numbers() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8 by hand: entropy 1.75 bits; the padding would make it five entries."""
    weight = torch.tensor([[0.5], [0.25], [0.125], [0.125], [8.0]]).log()
    targets = torch.tensor([0, 3])
    logprobs, entropy = logprob_and_entropy(torch.ones(2, 1), weight, targets, temperature=1.0, vocab_size=4)
    ln2 = 0.6931471805599453
    torch.testing.assert_close(logprobs, torch.tensor([-ln2, -3 * ln2]), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.full((2,), 1.75 * ln2), rtol=1e-6, atol=0)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    """Outputs differ from float64 on the same bf16 numbers by fp32 rounding, gradients by one rounding to bf16."""
    hidden, weight, targets, d_logprobs, d_entropy = make_case(dtype=torch.bfloat16)
    logprobs, entropy = logprob_and_entropy(hidden, weight, targets, temperature=0.7, vocab_size=VOCAB)
    expected_logprobs, expected_entropy, hidden64, weight64 = dense(hidden, weight, targets, 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_near(logprobs, expected_logprobs, 5e-6)
    assert_near(entropy, expected_entropy, 5e-6)
    torch.autograd.backward((logprobs, entropy), (d_logprobs, d_entropy))
    torch.autograd.backward((expected_logprobs, expected_entropy), (d_logprobs, d_entropy))
    assert grad(hidden).dtype == grad(weight).dtype == torch.bfloat16
    torch.testing.assert_close(grad(hidden).double(), grad(hidden64), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(grad(weight)[:VOCAB].double(), grad(weight64), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    hidden, weight, targets, d_logprobs, d_entropy = make_case()
    outputs = logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB)
    expected = dict(
        zip(("hidden", "weight"), torch.autograd.grad(outputs, (hidden, weight), (d_logprobs, d_entropy)), strict=True)
    )
    inputs = {"hidden": hidden, "weight": weight}
    inputs[frozen].requires_grad_(False)
    outputs = logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB)
    torch.autograd.backward(outputs, (d_logprobs, d_entropy))
    assert inputs.pop(frozen).grad is None
    ((name, moving),) = inputs.items()
    assert torch.equal(grad(moving), expected[name])


def test_two_uses_of_one_weight_add_up() -> None:
    """As for a shared unembedding that serves two policies in one loss; hidden is a strided view here."""
    hidden, weight, targets, d_logprobs, d_entropy = make_case()
    stacked = torch.stack([hidden.detach(), 2 * hidden.detach()], dim=2).requires_grad_()  # [R, H, 2]
    loss = torch.zeros(())
    for i, temperature in enumerate((1.0, 0.7)):
        assert not stacked[:, :, i].is_contiguous()
        logprobs, entropy = logprob_and_entropy(
            stacked[:, :, i], weight, targets, temperature=temperature, vocab_size=VOCAB
        )
        loss = loss + (logprobs * d_logprobs + entropy * d_entropy).sum()
    loss.backward()
    expected_weight_grad = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64)
    for i, temperature in enumerate((1.0, 0.7)):
        logprobs, entropy, hidden64, weight64 = dense(stacked[:, :, i], weight, targets, temperature)
        torch.autograd.backward((logprobs, entropy), (d_logprobs, d_entropy))
        assert_near(grad(stacked)[:, :, i], grad(hidden64), 1e-5)
        expected_weight_grad += grad(weight64)
    assert_near(grad(weight)[:VOCAB], expected_weight_grad, 1e-5)


def test_no_rows() -> None:
    hidden, weight, targets, _, _ = make_case(rows=0)
    logprobs, entropy = logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert grad(hidden).shape == (0, HIDDEN)
    assert torch.equal(grad(weight), torch.zeros(PADDED_VOCAB, HIDDEN))


def test_saves_nothing_without_gradient() -> None:
    hidden, weight, targets, _, _ = make_case()
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            logprobs, entropy = logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB)
        assert logprobs.grad_fn is None and entropy.grad_fn is None
        assert saved == []
        logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB)
    assert (ROWS, HIDDEN) in saved and (ROWS, VOCAB) not in saved


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_asserts_that_the_temperature_is_one(temperature: float) -> None:
    hidden, weight, targets, _, _ = make_case()
    with pytest.raises(AssertionError):
        logprob_and_entropy(hidden, weight, targets, temperature=temperature, vocab_size=VOCAB)


@pytest.mark.parametrize("target", [-1, VOCAB])  # VOCAB is a row of the matrix, but padding
def test_asserts_that_targets_are_tokens(target: int) -> None:
    hidden, weight, targets, _, _ = make_case()
    targets[3] = target
    with pytest.raises(AssertionError, match="targets"):
        logprob_and_entropy(hidden, weight, targets, temperature=1.0, vocab_size=VOCAB)
