"""What every launcher needs: is there a machine for it, which tile, and the arguments of a head.

Legend: M tokens, N trained tokens, D hidden, V vocabulary.
"""

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdfast.errors import InputError
from fdfast.kernels import tiles
from fdfast.kernels.policy_head_settle import ROWS
from fdfast.kernels.tiles import Tile
from fdfast.types import Head, HeadOptions

# @triton.jit asks for this once, when a kernel's module is imported, so it is asked for once here.
INTERPRETING = bool(triton.knobs.runtime.interpret)
_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def check_dtypes(operation: str, *tensors: Tensor | None) -> None:
    """No tensor is wider than what the kernels compute in; fdfast.dispatch has seen to the machine.

    Raises:
        TypeError: float64.
    """
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise TypeError(
            f"{operation}: backend='triton' computes in float32; got a float64 tensor; take "
            "backend='reference'"
        )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def same_low_precision(head: Head) -> bool:
    """Whether the head multiplies on 16-bit tensor cores."""
    return head.hidden_ND.dtype == head.weight_VD.dtype and head.hidden_ND.dtype in _DOT


def dot_dtype(head: Head) -> Any:
    """The operands' dtype in tl.dot; the interpreter computes bfloat16 wrongly, and float32
    products of 16-bit numbers are exact.
    """
    if same_low_precision(head) and not INTERPRETING:
        return _DOT[head.hidden_ND.dtype]
    return tl.float32


def tile_kind(kind: str, *, softcap: bool) -> str:
    """The tile table's name for a kernel: a softcap costs these sweeps their registers."""
    tight = kind in ("pair", "keep_pair", "keep_single")
    return f"{kind}_softcap" if softcap and tight else kind


def tile_for(kind: str, *heads: Head | None) -> Tile:
    """The row of the tile table for these heads."""
    given = [head for head in heads if head is not None]
    size = 2 if all(same_low_precision(head) for head in given) else 4
    name = "interpret"
    if not INTERPRETING:
        name = tiles.table_name(torch.cuda.get_device_capability(given[0].hidden_ND.device))
    return tiles.TABLES[name][kind, size]


def head_arguments(head: Head | None, tile: Tile, *, teacher: bool) -> dict[str, Any]:
    """Pointers, strides and constants of one head under the kernels' names; None is no head."""
    t, upper = ("t", "T_") if teacher else ("", "")
    which = "TEACHER_" if teacher else ""
    hidden, weight, bias = (None, None, None) if head is None else head
    D = 0 if hidden is None else hidden.shape[1]
    strides = [0, 1, 0, 1]
    if hidden is not None and weight is not None:
        strides = [*hidden.stride(), *weight.stride()]
    names = (f"stride_{t}xn", f"stride_{t}xd", f"stride_{t}wv", f"stride_{t}wd")
    return {
        f"{t}x_ptr": hidden,
        f"{t}w_ptr": weight,
        f"{t}b_ptr": None if bias is None else bias.contiguous(),  # the kernels take no stride
        f"{t.upper()}D": D,
        **dict(zip(names, strides, strict=True)),
        f"HAS_{which}BIAS": bias is not None,
        f"EVEN_{t.upper()}D": D % tile.block_d == 0,
        f"{upper}DOT": tl.float32 if head is None else dot_dtype(head),
    }


def tile_arguments(tile: Tile) -> dict[str, Any]:
    """The tile under the kernels' names; the interpreter takes no warps or stages."""
    sizes = {
        "GROUP_N": tile.group_n,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "PARTS": tile.parts,
    }
    return {**sizes, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def gemm_arguments(
    student: Head, teacher: Head | None, rows_N: Tensor | None, options: HeadOptions, tile: Tile
) -> dict[str, Any]:
    """The arguments that every GEMM kernel shares."""
    return {
        "V": len(student.weight_VD),
        "rows_ptr": rows_N,
        "HAS_ROWS": rows_N is not None,
        "HAS_SOFTCAP": options.logit_softcap is not None,
        "softcap": float(options.logit_softcap or 1.0),
        "inv_temperature": 1.0 / options.temperature,
        "teacher_inv_temperature": 1.0 / options.teacher_temperature,
        **head_arguments(student, tile, teacher=False),
        **head_arguments(teacher, tile, teacher=True),
        **tile_arguments(tile),
    }


def chunk_of(
    head: Head | None, rows_N: Tensor | None, chunk: slice
) -> tuple[Head | None, Tensor | None]:
    """The head and rows of a chunk of trained tokens: views."""
    if rows_N is not None:
        return head, rows_N[chunk]
    return None if head is None else head._replace(hidden_ND=head.hidden_ND[chunk]), None


def row_constants(merged_RN: Tensor) -> Tensor:
    """The rows of policy_head_settle.ROWS, (ROWS, N) float32: norms, lse_T - lse_S, else 0."""
    row_RN = merged_RN.new_zeros(ROWS, merged_RN.shape[1], dtype=torch.float32)
    row_RN[:2], row_RN[2:4] = merged_RN[:2], merged_RN[4:6]
    row_RN[4] = merged_RN[7]
    row_RN[5] = merged_RN[7] - row_RN[4].double()
    return row_RN


def only(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the kernel takes, and its launch options."""
    known = {*kernel.arg_names, "num_warps", "num_stages"}
    return {name: value for name, value in arguments.items() if name in known}


def token_chunk(N: int, token_bytes: int, workspace_bytes: int, block_n: int) -> int:
    """How many of N tokens fit the workspace: all, or whole blocks of them.

    Raises:
        InputError: not even one block fits.
    """
    fits = workspace_bytes // token_bytes
    if fits >= N:
        return N
    if fits < block_n:
        raise too_small(workspace_bytes, token_bytes * block_n)
    return fits // block_n * block_n


def too_small(
    workspace_bytes: int, wanted_bytes: int, operation: str = "policy_head"
) -> InputError:
    """The error of a workspace in which not even one block of tokens fits."""
    enough_mb = math.ceil((wanted_bytes + 1) / 2**20 * 1000) / 1000  # rounded up, so that it is
    return InputError(
        f"{operation}: workspace_mb={workspace_bytes / 2**20:.3g} holds not even one block of "
        f"tokens of this vocabulary; give workspace_mb={enough_mb:g} or more"
    )
