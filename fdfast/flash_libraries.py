"""FlashAttention-2, -3 and -4 behind one signature, by the sources and wheels named beside each.

None of it has run on a GPU: see fdfast/flash.py.
Legend: H query heads, D head size, Q and K rows of a part.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
