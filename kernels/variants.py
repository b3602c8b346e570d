"""Every specialisation of every kernel that the launchers can ask for, for ahead-of-time
compilation: the arguments come from the launchers' own functions over tensors without storage.

Legend: N tokens, D hidden, V vocabulary, S splits, K top-k, B columns of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fdfast.divergences import TABLE
from fdfast.kernels import launch, tiles
from fdfast.kernels.aot import Variant
from fdfast.kernels.policy_head_filter import (
    COLUMNS,
    NUM_EDGES,
    ROWS_OF_SCAN,
    _active_kernel,
    _threshold_kernel,
)
from fdfast.kernels.policy_head_forward import MERGE_BLOCK, TOPK_BLOCK, Kept, kept_arguments
from fdfast.kernels.policy_head_grad import _dlogits_kernel, _scatter_kernel
from fdfast.kernels.policy_head_merge import _merge_kernel, _sum_splits_kernel
from fdfast.kernels.policy_head_pair import (
    _pair_dlogits_kernel,
    _pair_kl_kernel,
    _pair_settle_kernel,
)
from fdfast.kernels.policy_head_settle import _settle_kernel
from fdfast.kernels.policy_head_sweep import _sweep_kernel
from fdfast.kernels.tiles import Tile
from fdfast.kernels.token_objective import BLOCK_N, _token_objective_kernel
from fdfast.kernels.topk_head import _fold_norms_kernel, _logits_kernel
from fdfast.types import Head, HeadOptions

# Qwen3-8B's head; an odd number of tokens and an odd hidden size make the masked case.
N, D, V, K, B = 8191, 4096, 151936, 100, 2048
UNEVEN_D = 4112  # a multiple of 16, so that rows stay aligned, but of no BLOCK_D
LOADS = ("plain", "bias", "softcap")
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Case:
    """What the caller's tensors and options make of a kernel."""

    dtype: torch.dtype
    load: str = "plain"  # bias: with a bias, a mask and a D of no whole blocks; softcap: that, too

    @property
    def label(self) -> str:
        """For people."""
        name = str(self.dtype).removeprefix("torch.")
        return name if self.load == "plain" else f"{name} {self.load}"

    def kind(self, kind: str) -> str:
        """The tile table's kind of this case."""
        return launch.tile_kind(kind, softcap=self.load == "softcap")


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _variant(
    name: str, kernel: Any, arguments: dict[str, Any], tile: Tile | None = None
) -> Variant:
    """The specialisation that the JIT would make of these arguments."""
    types, constants, aligned = {}, {}, set()
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            types[parameter.name] = _TYPES[value.dtype]
            aligned.add(parameter.name)
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        elif value == 1:
            constants[parameter.name] = 1
        else:
            types[parameter.name] = "i32"
            if value % 16 == 0:
                aligned.add(parameter.name)
    size = "" if tile is None else f"{tile.block_n}x{tile.block_v}x{tile.block_d}"
    return Variant(
        name,
        kernel,
        types,
        constants,
        frozenset(aligned),
        num_warps=arguments.get("num_warps", 4),
        num_stages=arguments.get("num_stages", 2),
        gemm=tile is not None,
        tile=size,
    )


def _gemm(case: Case, tile: Tile, *, teacher: bool) -> dict[str, Any]:
    """Arguments of a GEMM kernel for one case."""
    hidden_size = D if case.load == "plain" else UNEVEN_D
    bias = None if case.load == "plain" else _empty(V, dtype=case.dtype)
    head = Head(
        _empty(2 * N, hidden_size, dtype=case.dtype), _empty(V, hidden_size, dtype=case.dtype), bias
    )
    rows = None if case.load == "plain" else _empty(N, dtype=torch.int64)
    options = HeadOptions(logit_softcap=30.0 if case.load == "softcap" else None)
    return {
        "N": N,
        **launch.gemm_arguments(head, head if teacher else None, rows, options, tile),
    }


def _kept(case: Case, tile: Tile, *, teacher: bool) -> Kept:
    """The logits of a chunk, as the token-chunk way stores them."""
    dtype = torch.float32 if case.dtype == torch.float32 else torch.float16
    part_v = tile.block_v // tile.parts
    return Kept(
        _empty(N, V, dtype=dtype),
        _empty(N, V, dtype=dtype) if teacher or dtype == torch.float16 else None,
        _empty(2, triton.cdiv(V, part_v), N, dtype=torch.float32),
        part_v,
        tile.split_v,
    )


def _sweeps(case: Case, table: dict[tuple[str, int], Tile], *, keeps: bool) -> Iterator[Variant]:
    """The forward's first GEMM kernel, of either way."""
    for mode in ("student", "topk", "forward_kl", "reverse_kl"):
        pair, topk = mode.endswith("kl"), mode == "topk"
        kind = ("keep_" if keeps else "") + ("pair" if pair else "single")
        tile = table[case.kind(kind), case.dtype.itemsize]
        S = triton.cdiv(V, tile.split_v)
        arguments = {
            **kept_arguments(_kept(case, tile, teacher=pair) if keeps else None),
            **_gemm(case, tile, teacher=pair),
            "targets_ptr": _empty(N, dtype=torch.int64),
            "ids_ptr": _empty(N, K, dtype=torch.int32) if topk else None,
            "first_ptr": _empty(S, N, dtype=torch.int32) if topk else None,
            "part_ptr": _empty(7, S, N, dtype=torch.float32),
            "best_ptr": _empty(S, N, dtype=torch.int32),
            "z_target_ptr": _empty(N, dtype=torch.float32),
            "z_topk_ptr": _empty(N, K, dtype=torch.float32) if topk else None,
            "K": K if topk else 0,
            "num_splits": S,
            "SPLIT_V": tile.split_v,
            "HAS_TEACHER": pair,
            "HAS_TOPK": topk,
            "BY_STUDENT": mode == "reverse_kl",
        }
        verb = "keep" if keeps else "sweep"
        yield _variant(f"{verb} {mode} {case.label}", _sweep_kernel, arguments, tile)


def _settles(case: Case, table: dict[tuple[str, int], Tile]) -> Iterator[Variant]:
    """The second sweep of jsd and skew_kl."""
    tile = table[case.kind("settle"), case.dtype.itemsize]
    S = triton.cdiv(V, tile.split_v)
    for mode in ("jsd", "skew_kl"):
        arguments = {
            **_gemm(case, tile, teacher=True),
            "row_ptr": _empty(11, N, dtype=torch.float32),
            "part_ptr": _empty(2, S, N, dtype=torch.float32),
            "num_splits": S,
            "alpha": 0.5,
            "rest": 0.5,
            "SPLIT_V": tile.split_v,
            "IS_JSD": mode == "jsd",
        }
        yield _variant(f"settle {mode} {case.label}", _settle_kernel, arguments, tile)


def _gradients(case: Case, table: dict[tuple[str, int], Tile]) -> Iterator[Variant]:
    """The backward's GEMM kernel, and that of topk_head."""
    for mode in ("student", *TABLE):
        pair = mode != "student"
        tile = table[case.kind("grad_pair" if pair else "grad_single"), case.dtype.itemsize]
        arguments = {
            **_gemm(case, tile, teacher=pair),
            "targets_ptr": _empty(N, dtype=torch.int64),
            "row_ptr": _empty(11, N, dtype=torch.float32),
            "out_ptr": _empty(N, B, dtype=case.dtype),
            "first": B,
            "B": B,
            "stride_on": B,
            "alpha": 0.5,
            "rest": 0.5,
            "HAS_TEACHER": pair,
            "KIND": TABLE[mode].code if pair else 0,
        }
        yield _variant(f"dlogits {mode} {case.label}", _dlogits_kernel, arguments, tile)
    tile = table["topk", case.dtype.itemsize]
    arguments = {
        **_gemm(case, tile, teacher=False),
        "out_ptr": _empty(N, B, dtype=torch.float32),
        "part_ptr": _empty(2, triton.cdiv(B, tile.block_v), N, dtype=torch.float32),
        "first": B,
        "B": B,
        "stride_on": B,
    }
    yield _variant(f"topk logits {case.label}", _logits_kernel, arguments, tile)


def _pairs(case: Case, table: dict[tuple[str, int], Tile]) -> Iterator[Variant]:
    """The token-chunk way's kernels without a GEMM."""
    for mode in ("student", *TABLE):
        pair = mode != "student"
        tile = table[case.kind("keep_pair" if pair else "keep_single"), case.dtype.itemsize]
        kept = _kept(case, tile, teacher=pair)
        arguments = {
            **kept.arguments(),
            "row_ptr": _empty(11, N, dtype=torch.float32),
            "part_ptr": _empty(7, kept.num_splits, N, dtype=torch.float32),
            "out_ptr": _empty(N, V, dtype=case.dtype),
            "targets_ptr": _empty(N, dtype=torch.int64),
            "softcap": 30.0,
            "inv_temperature": 0.5,
            "alpha": 0.5,
            "rest": 0.5,
            "HAS_TEACHER": pair,
            "HAS_SOFTCAP": case.load == "softcap",
            "KIND": TABLE[mode].code if pair else 0,
            "IS_JSD": mode == "jsd",
            "BY_STUDENT": mode == "reverse_kl",
        }
        yield _variant(f"pair dlogits {mode} {case.label}", _pair_dlogits_kernel, arguments)
        if pair and TABLE[mode].needs_alpha:
            yield _variant(f"pair settle {mode} {case.label}", _pair_settle_kernel, arguments)
        elif pair:
            yield _variant(f"pair {mode} {case.label}", _pair_kl_kernel, arguments)


def _small() -> Iterator[Variant]:
    """The kernels without a GEMM."""
    f32, f64, i32 = torch.float32, torch.float64, torch.int32
    S = triton.cdiv(V, 2048)
    for mode in ("student", "topk", "forward_kl", "reverse_kl"):
        topk = mode == "topk"
        arguments = {
            "part_ptr": _empty(7, S, N, dtype=f32),
            "best_ptr": _empty(S, N, dtype=i32),
            "z_target_ptr": _empty(N, dtype=f32),
            "ids_ptr": _empty(N, K, dtype=i32) if topk else None,
            "z_topk_ptr": _empty(N, K, dtype=f32) if topk else None,
            "out_ptr": _empty(10, N, dtype=f64),
            "argmax_ptr": _empty(N, dtype=torch.int64),
            "N": N,
            "K": K if topk else 0,
            "num_splits": S,
            "HAS_TEACHER": mode.endswith("kl"),
            "HAS_TOPK": topk,
            "BY_STUDENT": mode == "reverse_kl",
            "BLOCK_N": TOPK_BLOCK if topk else MERGE_BLOCK,
            "BLOCK_K": triton.next_power_of_2(K) if topk else 1,
        }
        yield _variant(f"merge {mode}", _merge_kernel, arguments)
    part, out = _empty(2, S, N, dtype=f32), _empty(2, N, dtype=f64)
    sums = {"part_ptr": part, "out_ptr": out, "N": N, "num_splits": S, "BLOCK_N": 64}
    yield _variant("sum splits", _sum_splits_kernel, sums)
    norms = {"part_ptr": part, "norm_ptr": out, "N": N, "num_tiles": S, "BLOCK_N": 64}
    yield _variant("fold norms", _fold_norms_kernel, norms)
    dlogits = _empty(N, B, dtype=torch.bfloat16)
    scatter = {
        "out_ptr": dlogits,
        "ids_ptr": _empty(N, K, dtype=i32),
        "draw_ptr": _empty(N, K, dtype=f32),
        "N": N,
        "B": B,
        "first": B,
        "K": K,
        "stride_on": B,
        "BLOCK_N": 8,
        "BLOCK_K": 128,
    }
    yield _variant("scatter", _scatter_kernel, scatter)
    column = {"dlogits_ptr": dlogits, "B": B, "stride_dr": B, "COLUMNS": COLUMNS}
    row = _empty(N, dtype=f32)
    threshold = {"seen_ptr": row, "dropped_ptr": row, "threshold_ptr": row, "share": 0.03}
    yield _variant(
        "filter threshold", _threshold_kernel, {**column, **threshold, "NUM_EDGES": NUM_EDGES}
    )
    active = {"threshold_ptr": row, "active_ptr": _empty(B, dtype=torch.int8), "R": N}
    yield _variant(
        "filter active", _active_kernel, {**column, **active, "ROWS_OF_SCAN": ROWS_OF_SCAN}
    )
    for family in range(3):
        arguments = {name: row for name in _token_objective_kernel.arg_names if "_ptr" in name}
        arguments |= dict.fromkeys(("epsilon", "epsilon_high", "tau_pos", "tau_neg", "beta"), 0.5)
        arguments |= {"N": N, "FAMILY": family, "HAS_REF": True, "BLOCK_N": BLOCK_N}
        yield _variant(f"token objective {family}", _token_objective_kernel, arguments)


def variants(capability: int, cases: tuple[Case, ...] | None = None) -> Iterator[Variant]:
    """Every specialisation for sm_<capability>; `cases` None: all."""
    table = tiles.TABLES[f"sm_{capability}"]
    if cases is None:
        kinds = (torch.bfloat16, torch.float16, torch.float32)
        cases = tuple(Case(dtype, load) for dtype in kinds for load in LOADS)
    for case in cases:
        yield from _sweeps(case, table, keeps=False)
        yield from _sweeps(case, table, keeps=True)
        yield from _settles(case, table)
        yield from _gradients(case, table)
        yield from _pairs(case, table)
    yield from _small()
