"""RMSNorm and SwiGLU on the CPU in float32: one pass over the rows in C++ (csrc/fused_layers.hpp).

Legend: ... any leading shape, D numbers of a row.
"""

import torch
from torch import Tensor

from fdfast import _cpu


def takes(*tensors: Tensor) -> bool:
    """Whether they are plain float32 tensors on the CPU (a DTensor has no address)."""
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        for x in tensors
    )


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x), (..., D), and 1 / rms(x), (...)."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    y, inv_rms = torch.empty_like(x), x.new_empty(x.shape[:-1])
    addresses = (x.data_ptr(), weight_D.data_ptr())
    results = (y.data_ptr(), inv_rms.data_ptr())
    _cpu.rms_norm(*addresses, inv_rms.numel(), len(weight_D), eps, _threads(), *results)
    return y, inv_rms


def rms_norm_grads(
    dy: Tensor, x: Tensor, weight_D: Tensor, inv_rms: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight; None where not needed."""
    dy, x, weight_D = dy.contiguous(), x.contiguous(), weight_D.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    dweight_D = torch.empty_like(weight_D) if needs[1] else None
    given = (dy.data_ptr(), x.data_ptr(), weight_D.data_ptr(), inv_rms.data_ptr())
    results = [0 if g is None else g.data_ptr() for g in (dx, dweight_D)]
    _cpu.rms_norm_grads(*given, inv_rms.numel(), len(weight_D), _threads(), *results)
    return dx, dweight_D


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _cpu.swiglu(gate.data_ptr(), up.data_ptr(), y.numel(), _threads(), y.data_ptr())
    return y


def swiglu_grads(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    given = (dy.data_ptr(), gate.data_ptr(), up.data_ptr())
    results = (dgate.data_ptr(), dup.data_ptr())
    _cpu.swiglu_grads(*given, dy.numel(), _threads(), *results)
    return dgate, dup


def _threads() -> int:
    return torch.get_num_threads()
