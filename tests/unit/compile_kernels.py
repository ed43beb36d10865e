"""Compile every Triton kernel for NVIDIA GPUs, which needs none: run as a program, prints a line for each.

Types as triton_passes passes them for a bf16 model.
"""

from __future__ import annotations

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_bupo.ops import triton_passes

CAPABILITIES = (80, 90)  # A100; H100 and H200
TYPES = {
    "tile": "*fp32", "scale": "fp32", "targets": "*i64", "first": "i32", "sums": "*fp32", "columns": "*fp32",
    "lse_bits": "*fp32", "stride": "i32", "num_columns": "i32", "dz": "*bf16", "high": "*bf16", "low": "*bf16",
    "top": "*fp32", "column": "*i64",
}  # fmt: skip
CONSTANTS = {"BLOCK": 4096, "HAS_SLOPE": True, "HAS_LOW": True}

if __name__ == "__main__":
    for name in ("_reduce_kernel", "_gradient_kernel", "_probabilities_kernel"):
        kernel = getattr(triton_passes, name)
        constants = {(at,): CONSTANTS[word] for at, word in enumerate(kernel.arg_names) if word in CONSTANTS}
        signature = {word: TYPES.get(word, "constexpr") for word in kernel.arg_names}
        for capability in CAPABILITIES:
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            print(name, capability, len(compiled.asm["cubin"]))
