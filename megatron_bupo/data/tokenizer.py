"""The tokenizer of a HuggingFace folder: tokenizer.json as it stands.

For some models transformers 5 puts a pre-tokenizer of its own in place of the file's (Qwen2Tokenizer splits every
number into digits, whatever the file says), and prompts become other tokens than the model was trained on.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from megatron_bupo.errors import UsageError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Texts that tokenizers are known to split in different ways: numbers, spaces, contractions, signs, other scripts.
PROBES = (
    "The quick brown fox", "don't we'LL I'm", "snake_case camelCase HTTP2", " leading", "trailing ", "two  three   x",
    "\n", "a\n\n\nb", " \n \t c", "\t\tx", "a\r\nb", "7", "12", "123", "1234567", "3.14159", "1,000", "x1y22z333",
    "x=1+2", "(a-b)/c", "...!?", "$\\frac{1}{2}$", "\\boxed{-5}", "https://a.bc/d?e=f#g", "`code`", "#### 8",
    "caf\u00e9", "cafe\u0301", "\ufb01ne", "\u00bd\u00b2\u2460", "\uff11\uff12\uff13", "a\u00a0b\u200bc\u3000d",
    "\u041f\u0440\u0438\u0432\u0435\u0442", "\u65e5\u672c\u8a9e\u3092\u4e09\u3064", "\ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0967\u0968\u0969",
    "\u03b1\u03b2 \u2211\u222b\u2264\u221e", "\U0001f44d\U0001f3fd\U0001f1eb\U0001f1f7", "<s> </s> [INST] <think>",
)  # fmt: skip

_VOCABULARIES = ((FILE,), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # what a chat template sets around a message


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer is in a HuggingFace folder: a vocabulary, which tokenizer_config.json has none of."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in _VOCABULARIES)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a HuggingFace folder: its tokenizer.json with the special tokens and the chat template of the
    configuration; what transformers makes of the older files where there is no tokenizer.json.

    Raises:
        UsageError: no tokenizer, a broken one, one that does not do as its tokenizer.json does, or one with ids beyond
            the model's vocabulary.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise UsageError(f"{folder}: no tokenizer in it; give a folder with {FILE}")
    kind = PreTrainedTokenizerFast if (folder / FILE).is_file() else AutoTokenizer
    try:
        vocab_size = AutoConfig.from_pretrained(str(folder), local_files_only=True).vocab_size
        tokenizer = _load(kind, folder)
        largest = max(tokenizer.get_vocab().values())
        odd = _difference(tokenizer, folder)
    except Exception as error:  # the Rust side of tokenizers raises bare Exception
        hint = "" if (folder / FILE).is_file() else f"; give a folder with {FILE}"
        raise UsageError(f"{folder}: its config or tokenizer cannot be loaded ({_reason(error)}){hint}") from error
    if odd is not None:
        raise UsageError(
            f"{folder}: {CONFIG} makes other tokens of {odd!r} than {FILE} does; remove the setting that does it, such "
            "as split_special_tokens"
        )
    if largest >= vocab_size:
        raise UsageError(
            f"{folder}: the tokenizer has ids up to {largest}, the model's vocab_size is {vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def transformers_note(folder: str | Path) -> str | None:
    """One line where AutoTokenizer does not do as the folder's tokenizer.json, or cannot load it; else None."""
    if not (Path(folder) / FILE).is_file():
        return None
    try:
        tokenizer = _load(AutoTokenizer, Path(folder))
        odd = _difference(tokenizer, Path(folder))
    except Exception as error:  # the Rust side of tokenizers raises bare Exception
        return f"{folder}: transformers cannot load its tokenizer ({_reason(error)})"
    if odd is None:
        return None
    return (
        f"{folder}: AutoTokenizer ({type(tokenizer).__name__}) makes other tokens of {odd!r} than {FILE} does; "
        "PreTrainedTokenizerFast.from_pretrained goes by the file"
    )


def _load(kind: type[PreTrainedTokenizerFast | AutoTokenizer], folder: Path) -> PreTrainedTokenizerBase:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings would come on top of the one line
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _difference(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """The first probe that `tokenizer` encodes or decodes otherwise than the folder's tokenizer.json."""
    if not (folder / FILE).is_file():
        return None
    file = Tokenizer.from_file(str(folder / FILE))
    file.no_truncation()
    file.no_padding()
    own = [token.content for token in file.get_added_tokens_decoder().values()]
    # Tokens that the configuration alone adds are the folder's too: a text with one of them cannot be compared.
    added = [token for token in tokenizer.added_tokens_encoder if file.token_to_id(token) is None]
    markers = _MARKER.findall(str(tokenizer.chat_template))
    for probe in (*PROBES, *own, *(f"a {token} 12{token}b" for token in own), *markers):
        if any(token in probe for token in added):
            continue
        encoded = file.encode(probe, add_special_tokens=False).ids
        if tokenizer.encode(probe, add_special_tokens=False) != encoded:
            return probe
        decoded = file.decode(encoded, skip_special_tokens=False)
        if tokenizer.decode(encoded, skip_special_tokens=False, clean_up_tokenization_spaces=False) != decoded:
            return probe
    return None
