"""The table of `fdfast kernels report`: what every kernel costs on every architecture.

`python -m fdfast.kernels.report` prints the rows as JSON, one a line.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator

from fdfast.kernels import aot, prefix_attention_variants, variants
from fdfast.kernels.prefix_attention_variants import AttentionCase
from fdfast.kernels.variants import LOADS, Case

CAPABILITIES = (80, 90, 100)
OPERATIONS = ("policy_head", "prefix_attention")


def rows(
    capabilities: tuple[int, ...] = CAPABILITIES,
    cases: tuple[Case, ...] | None = None,
    attention_cases: tuple[AttentionCase, ...] | None = None,
) -> Iterator[dict[str, object]]:
    """One row a kernel, specialisation and architecture: compiled here, run nowhere.

    Args:
        capabilities: of CAPABILITIES.
        cases: of policy_head and topk_head; None: all, an empty tuple: none.
        attention_cases: of prefix_attention, likewise.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so there is no compiler.
    """
    from fdfast.kernels.launch import INTERPRETING

    if INTERPRETING:
        raise RuntimeError("kernels report: unset TRITON_INTERPRET; the interpreter compiles not")
    if attention_cases is None:
        attention_cases = prefix_attention_variants.cases()
    for capability in capabilities:
        heads = () if cases == () else variants.variants(capability, cases)
        attention = prefix_attention_variants.variants(capability, attention_cases)
        for variant in itertools.chain(heads, attention):
            begin = time.perf_counter()
            compiled = aot.compile_variant(variant, capability)
            yield {
                "kernel": variant.name,
                "arch": f"sm_{capability}",
                "tile": variant.tile,
                "num_warps": variant.num_warps,
                "num_stages": variant.num_stages,
                "gemm": variant.gemm,
                **aot.resources(compiled, capability),
                "shared_limit_bytes": aot.SHARED_LIMIT_BYTES[capability],
                "compile_s": round(time.perf_counter() - begin, 1),
            }


def main(arguments: list[str]) -> None:
    """Print the rows of what is given as JSON: capabilities and operations, dtypes of both, loads
    of policy_head and head sizes of prefix_attention ("90", "bfloat16", "softcap", "D=64").
    """
    import torch

    capabilities = tuple(int(a) for a in arguments if a.isdigit()) or CAPABILITIES
    operations = [o for o in OPERATIONS if o in arguments] or OPERATIONS
    dtypes = tuple(getattr(torch, a) for a in arguments if hasattr(torch, a))
    loads = [load for load in LOADS if load in arguments] or LOADS
    sizes = tuple(int(a.removeprefix("D=")) for a in arguments if a.startswith("D="))
    cases = tuple(Case(dtype, load) for dtype in dtypes for load in loads) or None
    attention = prefix_attention_variants.cases(dtypes or prefix_attention_variants.DTYPES, sizes)
    for capability in capabilities:
        wanted = (
            cases if "policy_head" in operations else (),
            attention if "prefix_attention" in operations else (),
        )
        for row in rows((capability,), *wanted):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
