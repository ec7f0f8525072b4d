"""The GPU kernels compiled for a Hopper GPU where there is none; prints a line of JSON for each.

A process of its own, without TRITON_INTERPRET. The backend runs on meta tensors, which have shapes and no numbers, with
recorders in the place of its kernels: so each is compiled with just the arguments it would be launched with, and code
that read a number back would fail.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchnorm.kernels.contract import Affine, Branch
from batchnorm.kernels.triton import backend, dual
from batchnorm.stats.moments import Moments

KERNELS = {
    backend: (
        "partial_moments", "merged_moments", "applied", "partial_sums", "merged_sums", "differentiated", "updated",
    ),
    dual: (
        "coefficients_of_both", "applied_both", "partial_sums_of_both", "merged_sums_of_both", "differentiated_both",
    ),
}  # fmt: skip
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Recorder:
    """Stands in for a kernel and remembers what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((self.kernel, grid, args, named))


def record():
    """The launches from now on, as a list that grows."""
    launches = []
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Recorder(getattr(module, name), launches))
    return launches


def compiled(kernel, _, args, named):
    """What Triton makes of a launch, with the specialisations it chooses: ones, multiples of 16, absent pointers."""
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k not in options}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value, is_special = values[name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and is_special):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], is_aligned = TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[name], is_aligned = "fp32", False
        else:
            signature[name], is_aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if is_aligned and is_special:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def described(code, *, reads_tiles):
    """Registers, bytes of stack, and how often each instruction that touches memory stands in the machine code.

    Those are looked for where tiles are read: to disassemble takes longer than to compile.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = _printed("cuobjdump", "-res-usage", file.name)
        machine = _printed("nvdisasm", "-c", file.name) if reads_tiles else ""
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    names = re.findall(r"\b((?:LDG|STG|LDL|STL)[.\w]*)", machine)
    return {"registers": registers, "stack": stack, "memory": {name: names.count(name) for name in set(names)}}


def _printed(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def run(shape, dtype, memory_format, activation, form):
    """One training step of a layer of that shape, without numbers: "alone", with a "residual", or two of them."""
    n, channels, *_ = shape
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format).reshape(n, channels, -1)
    weight = torch.empty(channels, device="meta")
    affine = Affine(weight, weight, 1e-5, activation)
    if form == "dual":  # whose statistics are the others', taken twice
        moments = Moments(weight.double(), weight.double(), x.numel() // channels)
        first, second = Branch(x, moments, affine), Branch(x, moments, affine._replace(activation=None))
        backend.apply_both(first, second)
        backend.backward_both(x, first, second, is_estimated=(True, True), wants_sums=True)
        return
    moments = backend.stats(x)
    kept = None
    if form == "residual":
        kept = backend.apply_packing(x, moments, affine, x)[1]
    else:
        backend.apply(x, moments, affine)
    backend.backward(x, x, moments, affine, kept, is_estimated=True)
    tracked = torch.empty((), dtype=torch.int64, device="meta")
    backend.update_running(backend.Running(weight, weight.clone()), tracked, moments, 0.1)


FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

if __name__ == "__main__":
    launches = record()
    for case in json.loads(sys.argv[1]):
        shape, dtype, layout, activation, form = case
        run(shape, getattr(torch, dtype), FORMATS[layout], activation, form)
        for launch in launches:
            kernel = launch[0]
            found = described(compiled(*launch), reads_tiles="BR" in kernel.arg_names)
            print(json.dumps({"case": case, "kernel": kernel.__name__, **found}))
        launches.clear()
