"""RMSNorm and SwiGLU of Hugging Face models in one pass each, and less of them kept for backward.

Plain PyTorch keeps, a token and layer, the input of each norm, its normalized copy and its output,
and of the MLP gate, silu(gate), up and their product: 1.5 MiB a token in SmolLM2-135M. Here the
norm's input, gate and up stay. What linear layers keep of the outputs is made again in the backward
pass, where it costs one cheap pass over the rows. On the CPU in float32 the passes are C++; in any
other dtype and on any other device they are the model's own operations.
Legend: ... any leading shape, D numbers of a row.
"""

import contextlib
import functools
import importlib
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfast.cpu import fused_layers as cpu
from fdfast.offloading import Offload

# transformers' families whose RMSNorm and MLP are computed as below, no more and no less.
_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SILU = ("SiLU", "SiLUActivation")
# Outputs that the layers still to come may keep: those of q_norm and k_norm, with the one before.
_RECENT = 4


def fuse_layers(model: torch.nn.Module) -> int:
    """Replace the forward of every RMSNorm and SwiGLU MLP that is known exactly; others stay.

    Parameters, their names and the linear layers (adapters on them too) stay what they are.

    Args:
        model: of transformers, peft's wrapper included.

    Returns:
        How many modules were replaced.
    """
    norms, mlps = _known_classes()
    found = 0
    for module in model.modules():
        if type(module) in norms:
            module.forward = types.MethodType(_norm_forward, module)
        elif type(module) in mlps and type(module.act_fn).__name__ in _SILU:
            module.forward = types.MethodType(_mlp_forward, module)
        else:
            continue
        found += 1
    return found


@functools.cache
def _known_classes() -> tuple[set[type], set[type]]:
    norms, mlps = set(), set()
    for family, name in _FAMILIES.items():
        models = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        norms.add(getattr(models, f"{name}RMSNorm"))
        mlps.add(getattr(models, f"{name}MLP"))
    return norms, mlps


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    x, weight, eps = hidden_states, self.weight, self.variance_epsilon
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    _remember(y, functools.partial(_rms_norm, eps=eps), x, weight)
    return y


def _mlp_forward(self: Any, x: Tensor) -> Any:
    gate, up = self.gate_proj(x), self.up_proj(x)
    y: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    _remember(y, _swiglu, gate, up)
    return self.down_proj(y)


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return cpu.rms_norm(x, weight_D, eps)[0] if cpu.takes(x, weight_D) else _plain(x, weight_D, eps)


def _plain(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """transformers' own: float32 within, whatever the dtype."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight_D * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return cpu.swiglu(gate, up) if cpu.takes(gate, up) else torch.nn.functional.silu(gate) * up


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and, from C++, one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        if cpu.takes(x, weight_D):
            y, inv_rms = cpu.rms_norm(x, weight_D, eps)
            ctx.save_for_backward(x, weight_D, inv_rms)
            return y
        ctx.save_for_backward(x, weight_D)
        return _plain(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, *inv_rms = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if inv_rms:
            return (*cpu.rms_norm_grads(dy, x, weight_D, inv_rms[0], needs), None)
        with torch.enable_grad():
            x, weight_D = x.detach().requires_grad_(needs[0]), weight_D.detach()
            weight_D.requires_grad_(needs[1])
            wanted = [t for t in (x, weight_D) if t.requires_grad]
            found = iter(torch.autograd.grad(_plain(x, weight_D, ctx.eps), wanted, dy))
        return (*(next(found) if need else None for need in needs), None)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if cpu.takes(dy, gate, up):
            return cpu.swiglu_grads(dy, gate, up)
        dgate: Tensor = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dy * torch.nn.functional.silu(gate)


class _Recipe:
    """Makes an output again, once for all who kept it."""

    def __init__(
        self, output: Tensor, make: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        self.make = make
        self.inputs = inputs
        self.offload: Offload | None = None
        self.kept: list[Any] | None = None  # the inputs, once somebody kept the output
        self.made: Tensor | None = None
        # Held while it may be asked for, so that no other tensor gets its address.
        self.output: Tensor | None = output

    def makes(self, tensor: Tensor) -> bool:
        """Whether a tensor is the output, of whatever shape."""
        own = self.output
        return (
            own is not None
            and tensor.data_ptr() == own.data_ptr()
            and (tensor.dtype, tensor.numel()) == (own.dtype, own.numel())
            and tensor.is_contiguous()
        )

    def keep(self, offload: Offload | None) -> None:
        """Keep the inputs, brought away where the pass brings away what it keeps."""
        if self.kept is None:
            self.offload = offload
            self.kept = [i if offload is None else offload.pack(i) for i in self.inputs]
            self.inputs = ()

    def close(self) -> None:
        """Nobody who does not keep the output now will."""
        self.output, self.inputs = None, ()

    def tensor(self, shape: torch.Size) -> Tensor:
        """The output, in the shape in which it was kept."""
        if self.made is None:
            assert self.kept is not None
            offload = self.offload
            with torch.no_grad():
                inputs = [k if offload is None else offload.unpack(k) for k in self.kept]
                self.made = self.make(*inputs)
            self.kept = []
        return self.made.view(shape)


class _Made(NamedTuple):
    recipe: _Recipe
    shape: torch.Size


# Of the pass of this thread, if it has a `made_again` around it.
_recent: ContextVar[deque[_Recipe] | None] = ContextVar("_recent", default=None)


def _remember(output: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> None:
    recent = _recent.get()
    if recent is not None and output.is_contiguous():
        if len(recent) == _RECENT:
            recent.popleft().close()
        recent.append(_Recipe(output.detach(), make, inputs))


@contextlib.contextmanager
def made_again(offload: Offload | None = None) -> Iterator[None]:
    """Within a forward pass: what is kept of fused layers' outputs is how to make them.

    For a pass with a backward one. Not together with gradient checkpointing, which keeps less yet
    and whose own hooks would not see what these keep.

    Args:
        offload: brings away all else that is kept, with what the outputs are made of: torch asks
            the innermost hooks alone, so others have to be asked from here.
    """
    recent: deque[_Recipe] = deque()
    before = _recent.set(recent)

    def pack(tensor: Tensor) -> Any:
        for recipe in recent:
            if recipe.makes(tensor):
                recipe.keep(offload)
                return _Made(recipe, tensor.shape)
        return tensor if offload is None else offload.pack(tensor)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _Made):
            return kept.recipe.tensor(kept.shape)
        return kept if offload is None else offload.unpack(kept)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _recent.reset(before)
        for recipe in recent:
            recipe.close()
