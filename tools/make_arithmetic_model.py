r"""Make the model that the demo trains: a small Qwen3 that adds two numbers right a third of the time, and prompts.

    python tools/make_arithmetic_model.py --output models/arithmetic

writes DIR, first under another name beside it:

    config.json, model.safetensors, generation_config.json    4 layers, hidden 64, tied, 0.25 M parameters, fp32
    tokenizer.json, tokenizer_config.json                     17 entries: digits, + and =, "\boxed{" and "}"
    train.jsonl, test.jsonl                                   {"prompt": "12+25=", "answer": "37"}, disjoint
    warm_start.json                                           the recipe, the seed and the accuracies

The warm start is supervised: first on right sums, then on answers of which most are wrong. So the model can add, but
samples the right answer only about a third of the time: almost every group has right and wrong answers, which
reinforcement learning needs.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_bupo.config.paths import check_new_folder
from megatron_bupo.config.program import run_program
from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_folder
from megatron_bupo.flags import Group, flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

BOX_OPEN, BOX_CLOSE = "\\boxed{", "}"
VOCABULARY = ("<pad>", "<eos>", "<unk>", *"0123456789+=", BOX_OPEN, BOX_CLOSE)
PAD_ID, EOS_ID = 0, 1
MARKER = "warm_start.json"
NEEDED_FILES = (
    MARKER,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.jsonl",
    "test.jsonl",
)

Sum = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """How the start is made; a folder made by another recipe is replaced.

    `wrong_share` of the answers in the noisy part have a wrong last digit. Learning rate: linear warm-up, then a
    cosine down to 2 %.
    """

    max_operand: int = 49
    num_test: int = 200
    exact_steps: int = 700
    noisy_steps: int = 150
    batch_size: int = 64
    lr: float = 3e-3
    wrong_share: float = 0.75


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token per digit and sign, and one for "\boxed{"; decoding puts no spaces between them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_model(seed: int) -> Qwen3ForCausalLM:
    """The untrained model: 4 layers, hidden 64, 4 heads and 2 key-value heads of 32, tied, fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    return Qwen3ForCausalLM(config)


def split_sums(recipe: Recipe, seed: int) -> tuple[list[Sum], list[Sum]]:
    """All pairs of operands from 1, shuffled and cut into (train, test)."""
    operands = range(1, recipe.max_operand + 1)
    sums = [(a, b) for a in operands for b in operands]
    random.Random(seed).shuffle(sums)
    return sums[recipe.num_test :], sums[: recipe.num_test]


def to_record(pair: Sum) -> dict[str, str]:
    return {"prompt": f"{pair[0]}+{pair[1]}=", "answer": str(pair[0] + pair[1])}


def wrong_answer(right: int, rng: random.Random) -> int:
    """`right` with another last digit."""
    return right - right % 10 + rng.choice([digit for digit in range(10) if digit != right % 10])


def batches(
    sums: list[Sum], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless `(tokens, labels)`, int64 [B, S] for each step; labels are -100 outside the response, not shifted."""
    rng = random.Random(seed)
    step = 0
    while True:
        rows = []
        for a, b in rng.choices(sums, k=recipe.batch_size):
            wrong = step >= recipe.exact_steps and rng.random() < recipe.wrong_share
            answer = wrong_answer(a + b, rng) if wrong else a + b
            prompt = tokenizer.encode(f"{a}+{b}=")
            rows.append((prompt, [*tokenizer.encode(f"{BOX_OPEN}{answer}{BOX_CLOSE}"), EOS_ID]))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        tokens = torch.full((len(rows), width), PAD_ID)
        labels = torch.full((len(rows), width), -100)
        for row, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            tokens[row, :end] = torch.tensor(prompt + response)
            labels[row, len(prompt) : end] = torch.tensor(response)
        yield tokens, labels
        step += 1


def supervised_loss(model: Qwen3ForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the response tokens, nats; `tokens` and `labels` int64 [B, S]."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over 50 steps, cosine to 2 % at the end."""
    progress = step / (recipe.exact_steps + recipe.noisy_steps)
    return recipe.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def warm_start(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], recipe: Recipe, seed: int
) -> None:
    """Train `model` in place by `recipe`; the same seed gives the same weights on the same machine."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    data = batches(sums, tokenizer, recipe, seed)
    model.train()
    with tqdm(range(recipe.exact_steps + recipe.noisy_steps), desc="warm start", unit="step", mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            loss = supervised_loss(model, *next(data))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], sample: bool) -> float:
    """Share of `sums` answered exactly by `\\boxed{sum}`: sampled at temperature 1, or greedy."""
    records = [to_record(pair) for pair in sums]
    inputs = tokenizer([r["prompt"] for r in records], return_tensors="pt", padding=True, padding_side="left")
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    prompt_and_response = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, **options
    )
    responses = tokenizer.batch_decode(prompt_and_response[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    hits = [text == f"{BOX_OPEN}{r['answer']}{BOX_CLOSE}" for text, r in zip(responses, records, strict=True)]
    return sum(hits) / len(hits)


def write_jsonl(file: Path, sums: list[Sum]) -> None:
    file.write_text("".join(json.dumps(to_record(pair)) + "\n" for pair in sums), encoding="utf-8")


def build(folder: Path, seed: int, recipe: Recipe) -> None:
    """Write model, tokenizer, prompts and, as the last file, the marker into the existing `folder`."""
    tokenizer, model = make_tokenizer(), make_model(seed)
    train, test = split_sums(recipe, seed)
    warm_start(model, tokenizer, train, recipe, seed)
    torch.manual_seed(seed)
    accuracies = {
        "test_accuracy_sampled": accuracy(model, tokenizer, test, sample=True),
        "test_accuracy_greedy": accuracy(model, tokenizer, test, sample=False),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    marker = {"schema": 1, "seed": seed, "recipe": asdict(recipe), **accuracies}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    print("accuracy on the test prompts: {:.3f} sampled, {:.3f} greedy".format(*accuracies.values()))


def is_current(folder: Path, seed: int, recipe: Recipe) -> bool:
    """True if `folder` is whole and was made with this seed and recipe."""
    if not all((folder / name).is_file() for name in NEEDED_FILES):
        return False
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return (marker.get("seed"), marker.get("recipe")) == (seed, asdict(recipe))


def make(output: Path, seed: int, force: bool, recipe: Recipe) -> None:
    """Make the start in `output`, unless it is there already and `force` is not given.

    Raises:
        UsageError: `output` exists and was not made by this tool.
    """
    if output.exists() and not force and is_current(output, seed, recipe):
        print(f"{output} is there and whole (seed {seed}): nothing to do")
        return
    if output.exists() and not (output / MARKER).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and was not made by this tool; remove it or name another --output")
    with new_folder(output) as folder:
        build(folder, seed, recipe)
    print(f"{output}: written")


@dataclass(frozen=True, kw_only=True)
class StartConfig(Group):
    """a small Qwen3 that adds right a third of the time"""

    output: str = flag("written: model, tokenizer, prompts", metavar="DIR")
    seed: int = flag("of the weights, the sums and their order", 0, low=0)
    force: bool = flag("replace an existing folder", False)

    def check(self) -> None:
        super().check()
        check_new_folder("output", self.output)


def run(config: StartConfig) -> None:
    torch.set_num_threads(1)  # more threads slow down so small a model, and one thread always adds in the same order
    make(Path(config.output), config.seed, config.force, Recipe())


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""
    return run_program("make_arithmetic_model", StartConfig, run, words)


if __name__ == "__main__":
    sys.exit(main())
