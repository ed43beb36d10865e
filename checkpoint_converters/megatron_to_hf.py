"""Turn a distributed checkpoint, converted or trained, into a HuggingFace folder.

    python checkpoint_converters/megatron_to_hf.py --checkpoint CKPT --output DIR
    python checkpoint_converters/megatron_to_hf.py --checkpoint CKPT --output DIR --policy layer:6

What was converted goes back exactly: names, dtypes, shards, index. What was trained is written in the dtype of its
training. `--policy` writes an internal policy as a model of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from megatron_bupo.conversion.program import DTYPES, Parser, layout_of, report, report_tokenizer, run_program

PROG = "megatron_to_hf.py"


def main(words: Sequence[str]) -> int:
    parser = Parser(PROG, "distributed checkpoint of megatron-core -> HuggingFace folder")
    parser.add_folder("--checkpoint", "a converted checkpoint, or a training run's --save folder")
    parser.add_folder("--output", "written: a HuggingFace folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: the source's, or the training's)")
    parser.add_argument("--policy", metavar="SPEC", help="layer:L, attn:L or ffn:L (also with @norm) as its own model")
    parser.add_layout("the processes share the work in any layout; only their number must fit")
    parser.add_force()
    arguments = parser.parse_args(words)
    parallel = layout_of(arguments)

    import torch

    from megatron_bupo.config.train import check_world
    from megatron_bupo.conversion.convert import megatron_to_hf
    from megatron_bupo.conversion.policy_export import export_policy
    from megatron_bupo.conversion.workers import launched

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    source, output, force = arguments.checkpoint, arguments.output, arguments.force
    with launched() as ranks:
        check_world(parallel, ranks.world_size)
        started = time.monotonic()
        if arguments.policy is None:
            num_bytes = megatron_to_hf(source, output, ranks, dtype, force)
        else:
            num_bytes = export_policy(source, output, arguments.policy, ranks, dtype, force)
        report(ranks.rank, output, num_bytes, started)
        report_tokenizer(ranks.rank, output)
        if arguments.policy is not None and ranks.rank == 0:
            print(f"{output} has a modeling file of its own: load it with trust_remote_code=True")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(PROG, main))
