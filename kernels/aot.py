"""Ahead-of-time compilation of a kernel without a GPU, and what its cubin says about it.

Works only where TRITON_INTERPRET is not set: the interpreter replaces the compiler.
"""

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_OF_SM_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS_OF_SM = 65536
WARPS_OF_SM = 64


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as the launcher would ask the JIT for it.

    Attributes:
        name: for people.
        kernel: the @triton.jit function.
        types: argument -> "*bf16", "i32", "fp32"...
        constants: argument -> value; None for an absent pointer, 1 for a unit stride.
        aligned: arguments that are multiples of 16, as the JIT finds them out itself.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        gemm: whether tensor cores are expected.
        tile: for people.
    """

    name: str
    kernel: Any  # Triton has no types
    types: dict[str, str]
    constants: dict[str, object]
    aligned: frozenset[str]
    num_warps: int = 4
    num_stages: int = 2
    gemm: bool = False
    tile: str = ""
    row: dict[str, object] = field(default_factory=dict)


def compile_variant(variant: Variant, capability: int) -> Any:
    """The compiled kernel for sm_<capability>."""
    kernel = variant.kernel
    names = kernel.arg_names
    signature = {n: variant.types.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): v for n, v in variant.constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tool(name: str, *args: str) -> str:
    done = subprocess.run(
        [os.path.join(TOOLS, name), *args], capture_output=True, text=True, check=True
    )
    return done.stdout


_OPCODE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.M
)


def resources(compiled: Any, capability: int) -> dict[str, object]:
    """Registers, spills, shared memory, occupancy and the instruction mix of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump said nothing about registers: {usage}"
    registers, stack, _, local = (int(x) for x in found.groups())
    opcodes = _OPCODE.findall(sass)
    stems = collections.Counter(o.split(".")[0] for o in opcodes)
    full = collections.Counter(opcodes)
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    by_registers = REGISTERS_OF_SM // (max(registers, 1) * 32 * num_warps)
    by_shared = SHARED_OF_SM_BYTES[capability] // (shared + 1024)
    programs = min(by_registers, by_shared, WARPS_OF_SM // num_warps, 32)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "local_bytes": local,
        "spill_instructions": stems["LDL"] + stems["STL"],
        "shared_bytes": shared,
        "programs_per_sm": programs,
        "occupancy": programs * num_warps / WARPS_OF_SM,
        "wgmma": stems["HGMMA"],
        "mma": stems["HMMA"],
        "tcgen05": sum(v for o, v in stems.items() if o.startswith("UTC") and "MMA" in o),
        "ffma": stems["FFMA"] + stems["FFMA2"],
        "exp2": sum(v for o, v in full.items() if o.startswith("MUFU.EX2")),
        "async_copies_16B": sum(
            v for o, v in full.items() if o.startswith("LDGSTS") and ".128" in o
        ),
        "bulk_copies": stems["UTMALDG"] + stems["UBLKCP"],
        "loads_16B": sum(v for o, v in full.items() if o.startswith("LDG") and ".128" in o),
        "atomics": stems["ATOMG"] + stems["ATOM"] + stems["RED"] + stems["REDG"],
        "instructions": len(opcodes),
    }
