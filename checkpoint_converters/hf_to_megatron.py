"""Turn a HuggingFace folder into a distributed checkpoint of megatron-core.

    python checkpoint_converters/hf_to_megatron.py --hf-model DIR --output CKPT
    torchrun --nproc-per-node 4 checkpoint_converters/hf_to_megatron.py --hf-model DIR --output CKPT \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Every layout loads the checkpoint, whatever the one it was written in.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from megatron_bupo.conversion.program import Parser, check_hf_model, layout_of, report, run_program

PROG = "hf_to_megatron.py"


def main(words: Sequence[str]) -> int:
    parser = Parser(PROG, "HuggingFace folder -> distributed checkpoint of megatron-core")
    parser.add_folder("--hf-model", "HuggingFace folder: config, tokenizer, safetensors")
    parser.add_folder("--output", "written: CKPT/release/, CKPT/hf/")
    parser.add_layout("which rank writes what; any layout loads the checkpoint")
    parser.add_force()
    arguments = parser.parse_args(words)
    parallel = layout_of(arguments)
    check_hf_model(arguments.hf_model)

    from megatron_bupo.conversion.convert import hf_to_megatron
    from megatron_bupo.conversion.workers import launched

    with launched() as ranks:
        started = time.monotonic()
        num_bytes = hf_to_megatron(arguments.hf_model, arguments.output, parallel, ranks, arguments.force)
        report(ranks.rank, arguments.output, num_bytes, started)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(PROG, main))
