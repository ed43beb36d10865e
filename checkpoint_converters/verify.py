"""Compare a HuggingFace folder with a distributed checkpoint: every tensor bit for bit, and the logits of both models.

    python checkpoint_converters/verify.py --hf-model DIR --checkpoint CKPT

Ends with 0 where all agree and with 1 where something differs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_bupo.conversion.program import Parser, check_hf_model, layout_of, run_program

PROG = "verify.py"


def main(words: Sequence[str]) -> int:
    parser = Parser(PROG, "HuggingFace folder and distributed checkpoint: weights bit for bit, and logits")
    parser.add_folder("--hf-model", "HuggingFace folder: config, safetensors")
    parser.add_folder("--checkpoint", "a converted checkpoint, or a training run's --save folder")
    parser.add_argument("--weights-only", action="store_true", help="no logits: they need both models in memory")
    parser.add_layout("of the model that the logits are computed with")
    arguments = parser.parse_args(words)
    parallel = layout_of(arguments)
    check_hf_model(arguments.hf_model)

    from megatron_bupo.conversion.verify import run

    return run(arguments.hf_model, arguments.checkpoint, parallel, not arguments.weights_only)


if __name__ == "__main__":
    sys.exit(run_program(PROG, main))
