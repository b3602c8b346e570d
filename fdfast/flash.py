"""Attention over a prefix forest by flash-attn's kernels for packed sequences, in a cascade.

Every node's own causal part is one call. Then, depth by depth, the tokens below each node attend to
its keys without a mask, one call a depth, and the parts are merged by their log-sum-exps. The
backward of every part is given the merged output and log-sum-exp: autograd through such a merge
gives the right output and wrong gradients, since flash-attn drops the gradient of the log-sum-exp.
A sliding window that hides something goes another way, one causal call whose keys are, for each
node, those of its ancestors within the window and its own.

Works with FlashAttention-2 (Dao 2023, arXiv:2307.08691), -3 (Shah et al. 2024, arXiv:2407.08608)
and -4, by the signatures of the sources and wheels named beside each adapter. **It has not run on
a GPU**: it was tested against modules with these signatures in plain PyTorch.
Legend: T tokens, N nodes, H query heads, G key and value heads, D head size, Q
and K rows of a part.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fdfast.errors import MachineError

_INSTALL = "run `pip install flash-attn --no-build-isolation`, or take backend='triton'"


class Part(NamedTuple):
    """One call: rows of queries and keys, packed, and where each sequence of them begins."""

    query_rows: Tensor | slice  # (Q,) int64, no row twice
    key_rows: Tensor | slice  # (K,) int64
    cu_seqlens_q: Tensor  # (sequences + 1,) int32
    cu_seqlens_k: Tensor  # likewise
    max_q: int
    max_k: int
    causal: bool  # aligned to the bottom right: a sequence's last query sees its last key
    repeats: bool = False  # whether a key is in several sequences


class Library(NamedTuple):
    """A flash-attn behind one signature.

    `forward(q, k, v, part, scale, left)` gives the output (Q, H, D) and log-sum-exp (H, Q);
    `backward(dout, q, k, v, out, lse, part, scale, left)` gives dq, dk and dv. `left` counts the
    keys that a query sees before its own; None: all.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_end: Tensor,
    position_ids: Tensor,
    scale: float,
    sliding_window: int | None,
    cu_seqlens: Tensor,
    parent: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: (T, H, D) in q's dtype and (H, T) float32, natural logarithm.

    Args:
        q: (T, H, D) float16 or bfloat16, on a CUDA GPU.
        k: (T, G, D) likewise, G a divisor of H.
        v: likewise.
        kv_end: (T,); not read, the nodes say as much.
        position_ids: (T,); likewise.
        scale: of the scores.
        sliding_window: a query sees keys less than this far behind its own position.
        cu_seqlens: (N + 1,) int32: where the nodes begin, in depth-first order; may repeat.
        parent: (N,) int32: a node before it, or -1.

    Raises:
        TypeError: neither float16 nor bfloat16.
        MachineError: no flash-attn that works here.
    """
    library = _library_for(q)
    if len(q) == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    parts, left = plan(cu_seqlens, parent, sliding_window)
    first, *rest = parts
    out, lse = library.forward(q, k[first.key_rows], v[first.key_rows], first, scale, left)
    lse = without_keys(lse)
    if not rest:
        return out, lse
    # Rounded to 16 bits once, at the end.
    merged = out.float()
    for part in rest:
        rows, keys = part.query_rows, part.key_rows
        part_out, part_lse = library.forward(q[rows], k[keys], v[keys], part, scale, None)
        merged[rows], lse[:, rows] = merge(merged[rows], lse[:, rows], part_out, part_lse)
    return merged.to(q.dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_end: Tensor,
    position_ids: Tensor,
    scale: float,
    sliding_window: int | None,
    cu_seqlens: Tensor,
    parent: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in its tensor's shape and dtype.

    The sums over parts are float32 and in one order; each part is as repeatable as the library's
    backward, which is asked to be deterministic where torch is.

    Args:
        dout: (T, H, D), of `out`.
        q: as in `forward`.
        k: likewise.
        v: likewise.
        out: of `forward`.
        lse: likewise.
        kv_end: as in `forward`.
        position_ids: likewise.
        scale: likewise.
        sliding_window: likewise.
        cu_seqlens: likewise.
        parent: likewise.

    Raises:
        TypeError: neither float16 nor bfloat16.
        MachineError: no flash-attn that works here.
    """
    library = _library_for(q)
    if len(q) == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    parts, left = plan(cu_seqlens, parent, sliding_window)
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    for part in parts:
        rows, keys = part.query_rows, part.key_rows
        row_lse = lse[:, rows].contiguous()
        gradients = library.backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], row_lse, part, scale, left
        )
        sums[0][rows] += gradients[0]
        for total, gradient in zip(sums[1:], gradients[1:], strict=True):
            if part.repeats and isinstance(keys, Tensor):
                # By sorting, not by atomics: the order of the sum is always the same.
                total.index_put_((keys,), gradient.float(), accumulate=True)
            else:
                total[keys] += gradient
    dq, dk, dv = (total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv


def without_keys(lse: Tensor) -> Tensor:
    """A log-sum-exp that is -inf in rows without keys, where FlashAttention-2 writes +inf."""
    return torch.where(lse == float("inf"), float("-inf"), lse)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the same queries' attention as one, in float32.

    Args:
        out: (Q, H, D) float32.
        lse: (H, Q) float32, finite: every row has a key here.
        part_out: (Q, H, D).
        part_lse: (H, Q) float32; infinite, of either sign, in rows without keys.
    """
    part_lse = without_keys(part_lse)
    both = torch.logaddexp(lse, part_lse)
    share, part_share = ((x - both).exp().T[..., None] for x in (lse, part_lse))
    # A row without keys may hold anything.
    part_out = torch.where(part_share == 0.0, 0.0, part_out.float())
    return out * share + part_out * part_share, both


# --- the calls of a forest ---------------------------------------------------------------------


class _Kept(NamedTuple):
    """A plan, and what it was made of: it holds until one of these is written to."""

    parts: list[Part]
    left: int | None
    parent: Tensor
    versions: tuple[int, int]


_kept: Any = WeakTensorKeyDictionary()  # cu_seqlens -> dict of its plans


def plan(
    cu_seqlens: Tensor, parent: Tensor, sliding_window: int | None
) -> tuple[list[Part], int | None]:
    """The calls that a forest takes, and how many keys a query sees before its own (None: all).

    Made once for a forest, since it is made on the host: layers share it.

    Args:
        cu_seqlens: (N + 1,) int32.
        parent: (N,) int32.
        sliding_window: or None.
    """
    versions = tuple(0 if x.is_inference() else x._version for x in (cu_seqlens, parent))
    of_forest: dict[int | None, _Kept] = _kept.setdefault(cu_seqlens, {})
    kept = of_forest.get(sliding_window)
    if kept is None or kept.parent is not parent or kept.versions != versions:
        bounds = list(itertools.pairwise(cu_seqlens.tolist()))
        parts, left = _make_plan(bounds, parent.tolist(), sliding_window, cu_seqlens.device)
        kept = _Kept(parts, left, parent, versions)  # type: ignore[arg-type]
        of_forest[sliding_window] = kept
    return kept.parts, kept.left


Range = tuple[int, int]  # of rows: first, and one past the last


def _make_plan(
    nodes: list[Range], parents: list[int], sliding_window: int | None, device: torch.device
) -> tuple[list[Part], int | None]:
    """See `plan`."""
    # Ancestors with tokens, the root first; and the end of the subtree.
    paths: list[list[Range]] = []
    ends = [end for _, end in nodes]
    for index, above in enumerate(parents):
        node = nodes[above]
        has_tokens = above >= 0 and node[1] > node[0]
        paths.append([*(paths[above] if above >= 0 else []), *([node] if has_tokens else [])])
        assert above < index
    for index in reversed(range(len(nodes))):
        if parents[index] >= 0:
            ends[parents[index]] = max(ends[parents[index]], ends[index])
    own = [(node, path) for node, path in zip(nodes, paths, strict=True) if node[1] > node[0]]
    longest = max(sum(e - s for s, e in [*path, node]) for node, path in own)
    if sliding_window is not None and sliding_window < longest:
        keys = [_last(path, sliding_window - 1) for _, path in own]
        below = [[*above, node] for (node, _), above in zip(own, keys, strict=True)]
        part = _part([[node] for node, _ in own], below, device, causal=True, repeats=True)
        return [part], sliding_window - 1
    alone = [[node] for node, _ in own]
    parts = [_part(alone, alone, device, causal=True)]
    levels: dict[int, list[tuple[Range, Range]]] = {}
    for node, path, end in zip(nodes, paths, ends, strict=True):
        if node[1] > node[0] and end > node[1]:
            levels.setdefault(len(path), []).append(((node[1], end), node))
    for _, level in sorted(levels.items()):
        queries, keys = [[q] for q, _ in level], [[k] for _, k in level]
        parts.append(_part(queries, keys, device, causal=False))
    return parts, None


def _last(path: list[Range], count: int) -> list[Range]:
    """The last `count` rows of a path."""
    taken: list[Range] = []
    for start, end in reversed(path):
        if count <= 0:
            break
        taken.insert(0, (max(start, end - count), end))
        count -= end - start
    return taken


def _part(
    queries: list[list[Range]],
    keys: list[list[Range]],
    device: torch.device,
    *,
    causal: bool,
    repeats: bool = False,
) -> Part:
    """The call of these sequences, each some ranges of rows."""
    query_rows, cu_seqlens_q, max_q = _packed(queries, device)
    key_rows, cu_seqlens_k, max_k = _packed(keys, device)
    return Part(query_rows, key_rows, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, repeats)


def _packed(sequences: list[list[Range]], device: torch.device) -> tuple[Any, Tensor, int]:
    """Rows, where the sequences begin among them, and the longest."""
    ranges = [r for sequence in sequences for r in sequence]
    lengths = [sum(e - s for s, e in sequence) for sequence in sequences]
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(lengths)
    if all(a[1] == b[0] for a, b in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1]), cu_seqlens, longest  # a view, not a copy
    rows = torch.cat([torch.arange(*r) for r in ranges])
    return rows.to(device), cu_seqlens, longest


# --- the libraries -----------------------------------------------------------------------------


def _library_for(q: Tensor) -> Library:
    """The fastest flash-attn for the tensor's GPU.

    Raises:
        TypeError: neither float16 nor bfloat16.
        MachineError: none works here.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"prefix_attention: backend='flash' computes in float16 or bfloat16; got {q.dtype}; "
            "take backend='triton'"
        )
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise MachineError(
            "prefix_attention: flash-attn takes head sizes that are multiples of 8 up to 256; got "
            f"{q.shape[2]}; take backend='triton'"
        )
    return library(capability_of(q.device))


def capability_of(device: torch.device) -> int:
    """The major compute capability of a GPU.

    Raises:
        MachineError: it is none, or of another maker.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        raise MachineError(
            "prefix_attention: backend='flash' wants tensors on an NVIDIA GPU; got one on "
            f"{device}; move it, or take backend='auto'"
        )
    return torch.cuda.get_device_capability(device)[0]


def library(major: int) -> Library:
    """The fastest flash-attn that is installed and made for GPUs of this major capability.

    Raises:
        MachineError: none; it says what is wrong with each.
    """
    if major < 8:
        raise MachineError(
            f"prefix_attention: flash-attn wants compute capability 8.0; this GPU has {major}.x; "
            "take backend='auto'"
        )
    wanted = {9: (_flash_3, _flash_4, _flash_2), 10: (_flash_4, _flash_2)}.get(major, (_flash_2,))
    lacking = []
    for load in wanted:
        try:
            return load()
        except ImportError as error:
            lacking.append(str(error))
    raise MachineError(f"prefix_attention: no flash-attn ({'; '.join(lacking)}); {_INSTALL}")


def _functions(module: str, *names: str) -> list[Any]:
    """Functions of a module.

    Raises:
        ImportError: it, or one of them, is not there.
    """
    loaded = importlib.import_module(module)
    missing = [name for name in names if not hasattr(loaded, name)]
    if missing:
        raise ImportError(f"{module} has no {', '.join(missing)}")
    return [getattr(loaded, name) for name in names]


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Of a function, or of the one inside a torch.library.custom_op."""
    return dict(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def _check_parameters(module: str, function: Any, *names: str) -> None:
    """A function takes these, or it is of another version.

    Raises:
        ImportError: it does not.
    """
    missing = set(names) - _parameters(function).keys()
    if missing:
        takes = f"{getattr(function, '__name__', function)} takes no {', '.join(sorted(missing))}"
        raise ImportError(f"{module}: {takes}: another version than fdfast knows")


def _packing(part: Part) -> dict[str, Any]:
    return {
        "cu_seqlens_q": part.cu_seqlens_q,
        "cu_seqlens_k": part.cu_seqlens_k,
        "max_seqlen_q": part.max_q,
        "max_seqlen_k": part.max_k,
    }


def _sides(left: int | None) -> dict[str, int]:
    """A window as FlashAttention-2 and -3 want it: -1 is no bound."""
    sides = (-1, -1) if left is None else (left, 0)
    return {"window_size_left": sides[0], "window_size_right": sides[1]}


def _fresh(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors of these shapes, for gradients."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


def _flash_2() -> Library:
    """flash-attn 2.7 and 2.8: flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention."""
    module = "flash_attn.flash_attn_interface"
    names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    run_forward, run_backward = _functions(module, *names)
    for function in (run_forward, run_backward):
        _check_parameters(module, function, "window_size_left", "softcap", "cu_seqlens_q")

    def forward_(
        q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float, left: int | None
    ) -> tuple[Tensor, Tensor]:
        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": part.causal, **_sides(left)}
        out, lse, *_ = run_forward(q, k, v, **_packing(part), **options)
        return out, lse

    def backward_(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        scale: float,
        left: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _fresh(q, k, v)
        run_backward(
            *(dout, q, k, v, out, lse, dq, dk, dv),
            **_packing(part),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=part.causal,
            **_sides(left),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv

    return Library("FlashAttention-2", forward_, backward_)


def _flash_3() -> Library:
    """FlashAttention-3: hopper/flash_attn_interface.py of Dao-AILab/flash-attention, whose window
    was one argument at first and is two now, as its causal was, and is is_causal in the backward.
    """
    module = "flash_attn_interface"
    run_forward, run_backward = _functions(module, "_flash_attn_forward", "_flash_attn_backward")
    for function in (run_forward, run_backward):
        _check_parameters(module, function, "cu_seqlens_q", "max_seqlen_q", "softmax_scale")

    def options(function: Any, part: Part, scale: float, left: int | None) -> dict[str, Any]:
        parameters = _parameters(function)
        sides = _sides(left)
        window: dict[str, Any] = dict(sides)
        if "window_size_left" not in parameters:
            window = {"window_size": tuple(sides.values())}
        causal = "is_causal" if "is_causal" in parameters else "causal"
        # The first versions have no defaults: whatever is not asked for is None.
        unset = {n: None for n, p in parameters.items() if p.default is inspect.Parameter.empty}
        asked = {**_packing(part), "softmax_scale": scale, causal: part.causal, **window}
        return unset | asked

    def forward_(
        q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float, left: int | None
    ) -> tuple[Tensor, Tensor]:
        asked = options(run_forward, part, scale, left) | {"q": q, "k": k, "v": v}
        out, lse, *_ = run_forward(**asked)
        return out, lse

    def backward_(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        scale: float,
        left: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _fresh(q, k, v)
        given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
        given |= {"dq": dq, "dk": dk, "dv": dv}
        asked = options(run_backward, part, scale, left) | given
        deterministic = torch.are_deterministic_algorithms_enabled()
        run_backward(**asked, deterministic=deterministic)
        return dq, dk, dv

    return Library("FlashAttention-3", forward_, backward_)


def _flash_4() -> Library:
    """FlashAttention-4: flash_attn/cute/interface.py of the wheel flash-attn-4 4.0.0b36."""
    module = "flash_attn.cute.interface"
    run_forward, run_backward = _functions(module, "_flash_attn_fwd", "_flash_attn_bwd")
    packing = ("cu_seqlens_q", "max_seqlen_q", "window_size_left")
    _check_parameters(module, run_forward, *packing, "return_lse")
    _check_parameters(module, run_backward, *packing, "deterministic")

    def options(part: Part, scale: float, left: int | None) -> dict[str, Any]:
        window = {} if left is None else {"window_size_left": left, "window_size_right": 0}
        return {"softmax_scale": scale, "causal": part.causal, **window, **_packing(part)}

    def forward_(
        q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float, left: int | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = run_forward(q, k, v, **options(part, scale, left), return_lse=True)
        return out, lse

    def backward_(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        scale: float,
        left: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        asked = options(part, scale, left) | {"deterministic": deterministic}
        dq, dk, dv, *_ = run_backward(q, k, v, out, dout, lse, **asked)
        return dq, dk, dv

    return Library("FlashAttention-4", forward_, backward_)
