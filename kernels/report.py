"""The table of `fdfast kernels report`: what every kernel costs on every architecture.

`python -m fdfast.kernels.report` prints the rows as JSON, one a line.
"""

import json
import sys
import time
from collections.abc import Iterator

from fdfast.kernels import aot
from fdfast.kernels.variants import LOADS, Case, variants

CAPABILITIES = (80, 90, 100)


def rows(
    capabilities: tuple[int, ...] = CAPABILITIES, cases: tuple[Case, ...] | None = None
) -> Iterator[dict[str, object]]:
    """One row a kernel, specialisation and architecture: compiled here, run nowhere.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so there is no compiler.
    """
    from fdfast.kernels.launch import INTERPRETING

    if INTERPRETING:
        raise RuntimeError("kernels report: unset TRITON_INTERPRET; the interpreter compiles not")
    for capability in capabilities:
        for variant in variants(capability, cases):
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
    """Print the rows of the capabilities and cases given ("90", "bfloat16", "softcap") as JSON."""
    import torch

    capabilities = tuple(int(a) for a in arguments if a.isdigit()) or CAPABILITIES
    dtypes = [getattr(torch, a) for a in arguments if hasattr(torch, a)]
    loads = [load for load in LOADS if load in arguments] or LOADS
    cases = tuple(Case(dtype, load) for dtype in dtypes for load in loads) or None
    for capability in capabilities:
        for row in rows((capability,), cases):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
