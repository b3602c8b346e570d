"""Every specialisation of the attention kernels that is worth a row of `fdfast kernels report`.

Legend: T tokens, H query heads, G key and value heads, D head size, S tiles in a list.
"""

import dataclasses
from collections.abc import Iterator

import torch

from fdfast.kernels import prefix_attention as attention
from fdfast.kernels import prefix_attention_tiles
from fdfast.kernels.aot import Variant
from fdfast.kernels.prefix_attention_backward import _dkv_kernel, _dq_kernel
from fdfast.kernels.prefix_attention_forward import _forward_kernel
from fdfast.kernels.variants import _empty, _variant

# Qwen3-8B's heads; an odd number of tokens makes the masked case.
T, H, G, S = 8191, 32, 8, 4097
WINDOW = 4095
_KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """What the caller's tensors and options make of the kernels."""

    dtype: torch.dtype
    D: int
    window: bool = False

    @property
    def label(self) -> str:
        """For people."""
        name = f"{str(self.dtype).removeprefix('torch.')} D={self.D}"
        return f"{name} window" if self.window else name


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Every row of the tile tables, those with masks by a head size that is no power of two and a window
# where models have such.
SHAPES = (
    (16, False),
    (16, True),
    (32, False),
    (32, True),
    (48, True),
    (64, False),
    (96, True),
    (128, False),
    (192, True),
    (256, False),
)


def cases(
    dtypes: tuple[torch.dtype, ...] = DTYPES, sizes: tuple[int, ...] = ()
) -> tuple[AttentionCase, ...]:
    """Those of the dtypes and head sizes; no sizes: all."""
    return tuple(
        AttentionCase(dtype, D, window)
        for dtype in dtypes
        for D, window in SHAPES
        if not sizes or D in sizes
    )


def variants(capability: int, wanted: tuple[AttentionCase, ...]) -> Iterator[Variant]:
    """Forward, dq and dk/dv of each case for sm_<capability>."""
    table = prefix_attention_tiles.TABLES[f"sm_{capability}"]
    for case in wanted:
        for kind, kernel in _KERNELS.items():
            window = WINDOW if case.window else None
            tile = table[attention.key_of(kind, case.dtype, case.D, window)]
            blocks = -(-T // (tile.block_k if kind == "dkv" else tile.block_q))
            lists = attention.TileLists(
                _empty(blocks + 1, dtype=torch.int32),
                _empty(blocks, dtype=torch.int32),
                _empty(S, dtype=torch.int32),
                _empty(T, dtype=torch.int32) if case.window else None,
            )
            queries = dict.fromkeys(
                ("q", "out", "dout", "dq"), _empty(T, H, case.D, dtype=case.dtype)
            )
            keys = dict.fromkeys(("k", "v", "dk", "dv"), _empty(T, G, case.D, dtype=case.dtype))
            row = _empty(H, T, dtype=torch.float32)
            arguments = attention.arguments(
                tile,
                lists,
                _empty(T, dtype=torch.int32),
                case.D**-0.5,
                window,
                **queries,
                **keys,
            )
            arguments |= {"lse_ptr": row, "delta_ptr": row}
            yield dataclasses.replace(
                _variant(f"attention {kind} {case.label}", kernel, arguments),
                gemm=True,
                tile=f"{tile.block_q}x{tile.block_k}x{attention.block_d(case.D)}",
            )
