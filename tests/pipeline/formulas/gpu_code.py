"""Compiles every Triton kernel for a GPU that need not be here, and looks at what it takes.

    python tests/pipeline/formulas/gpu_code.py

Run by `tests/pipeline/formulas/test_fused.py`. The losses are called as for a GPU, and where a
kernel would start it is compiled instead, for the types it was given. A line a kernel: registers a
thread, bytes a thread that did not fit them, bytes of shared memory a program.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pipeline.formulas.kernels import fused
from pipeline.formulas.losses import both_directions

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
REGISTERS, SHARED = 65536, 48 * 1024  # of a processor; of a program without asking for more
compiled = {}


def source_of(kernel, given):
    """The kernel with the types of what it was given, and what was known of that."""
    types, known, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            types[parameter.name], known[place,] = "constexpr", value
        elif torch.is_tensor(value):
            types[parameter.name] = TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=types, constexprs=known, attrs=attributes)


def compile_in_place(kernel, *given, grid, warmup, num_warps, num_stages, maxnreg=None, **known):
    source = source_of(kernel, dict(zip(kernel.arg_names, given, strict=False)) | known)
    name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"
    if (key := (name, source.hash(), num_warps)) in compiled:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    options |= {"maxnreg": maxnreg} if maxnreg else {}
    compiled[key] = found = triton.compile(source, target=TARGET, options=options)
    registers, spilled = resources(found.asm["cubin"])
    print(
        f"{name} {registers} registers, {spilled} bytes beside them, {found.metadata.shared} shared"
    )
    assert registers * 32 * num_warps <= REGISTERS
    assert spilled <= 512 and found.metadata.shared <= SHARED
    # Sums are made in the cache, and nobody waits for what was there before.
    assert not re.search(r"\bATOMG?\.", machine_code(found.asm["cubin"]))


def tool(name, cubin, *options):
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin):
    found = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", cubin, "-res-usage"))
    return int(found[1]), int(found[2])


def machine_code(cubin):
    return tool("nvdisasm", cubin, "-c")


def main():
    JITFunction.run = compile_in_place
    fused.interpreted = lambda: True
    for name, size, kind, masked in (
        ("smooth_ndcg", 16, torch.bfloat16, False),
        ("smooth_ndcg", 272, torch.float32, False),
        ("smooth_ndcg", 4112, torch.float32, True),
        ("info_nce", 272, torch.float32, True),
        ("kendall_rank", 64, torch.float32, True),
    ):
        scores = torch.zeros(size, size, dtype=kind, requires_grad=True)
        target = torch.eye(size)
        mask = target == 0 if masked else None
        both_directions(name, scores, target > 0 if name == "info_nce" else target, mask_QN=mask)


if __name__ == "__main__":
    main()
