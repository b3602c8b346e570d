"""The teacher: a copy of the student that follows it slowly, at times, at once or not at all."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfast.errors import InputError
from fdfast.lora import DeltaLinear, adapted_layers
from fdfast.models import has_adapters

KINDS = ("ema", "frozen", "live", "periodic")
SCORING_DTYPES = ("", "bfloat16")
MASTER_DEVICES = ("", "cpu")
# Weights that are brought to the master's dtype and device at once, for one foreach call.
_CHUNK_ELEMENTS = 1 << 26


class _Product(NamedTuple):
    """Where in the student's weights a layer's delta comes from: scaling * up @ down."""

    up: str
    down: str
    scaling: float


class EMATeacher:
    """mu <- alpha mu + (1 - alpha) theta every `every` optimizer steps (arXiv 2605.30861).

    Other kinds: frozen stays the initial student; periodic becomes the student every `every` steps;
    live is the student itself, whose tensors it shares, in modules of its own that are always in
    eval mode. The master copy of kind ema is float32 whatever the model's dtype: an average kept
    in bfloat16 stalls, since most of its updates round to nothing.

    What the student does not train is never copied but shared. So the teacher of a student with
    LoRA adapters has its base weights; beside them the kinds frozen and periodic have adapters of
    their own, and ema has for each adapted layer a matrix `delta`, the average of the *product*
    scaling B A. (The average of B times that of A is another matrix.) It is exact, and takes 4
    bytes for each weight of an adapted layer, and the scoring dtype's beside it where that is
    narrower: as much as the teacher of a fully trained student, on the CPU if master_device
    says so.

    Args:
        student: the model that is trained; the teacher begins as its copy.
        kind: see above.
        alpha: of ema, in [0, 1]; the paper takes 0.9. 1 makes it frozen.
        every: optimizer steps between updates; the paper takes 5.
        scoring_dtype: of the model that scores: "" for the student's, or bfloat16.
        master_device: of ema's float32 copy: "" for where the model is, or cpu.
        prepare: changes the copy in place before its masters are made: cuts it over ranks, say.
            Not asked for a live teacher, which has no copy.

    Raises:
        InputError: a setting is off, or the student's adapters are not plain LoRA.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        *,
        kind: str = "ema",
        alpha: float = 0.9,
        every: int = 5,
        scoring_dtype: str = "",
        master_device: str = "",
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        _check(kind, alpha, every, scoring_dtype, master_device)
        self.kind = "frozen" if kind == "ema" and alpha == 1.0 else kind
        self.alpha, self.every = alpha, every
        self.products: dict[str, _Product] = {}
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if self.kind == "live":
            trained = {}
        widths = {str(p.dtype).removeprefix("torch.") for p in student.parameters()}
        narrows = scoring_dtype not in ("", *widths) or (scoring_dtype and len(widths) > 1)
        if narrows and len(trained) < len(dict(student.named_parameters())):
            raise InputError(
                f"teacher: scoring_dtype must be '' for a teacher that shares weights with the "
                f"student (kind live, adapters, frozen layers); got {scoring_dtype!r} with kind "
                f"{kind!r}: load the model in that dtype"
            )
        self.model: Any = _sharing_copy(student, trained).eval()
        if narrows:
            self.model = self.model.to(getattr(torch, scoring_dtype))
        if self.kind == "ema" and has_adapters(student):
            self.model, self.products = _with_deltas(self.model)
            self.names = frozenset(self.products)
        else:
            self.names = frozenset(trained)
        for parameter in self.own().values():
            parameter.requires_grad_(False)
        if prepare is not None and self.kind != "live":
            prepare(self.model)
        # A float32 tensor that lies there already is its own master; others have one beside them.
        self.master: dict[str, Tensor] = {}
        if self.kind == "ema":
            self.master = {
                name: p.detach().to(master_device or p.device, torch.float32)
                for name, p in self.own().items()
            }
        if narrows and self.kind == "ema":  # the average begins at the student, not at its rounding
            for name, theta in trained.items():
                self.master[name].copy_(theta.detach())

    @property
    def frozen(self) -> bool:
        """Whether the teacher stays what it was."""
        return self.kind == "frozen"

    def own(self) -> dict[str, Tensor]:
        """The tensors of its model that it does not share with the student, by name."""
        return {name: p for name, p in self.model.named_parameters() if name in self.names}

    @torch.no_grad()
    def step(self, student: Mapping[str, Tensor], num_steps: int) -> bool:
        """Follow the student if optimizer step number `num_steps` is due; says whether it did.

        Args:
            student: its trained weights by name; float32 masters where it has them.
            num_steps: finished optimizer steps, from 1.
        """
        if self.kind == "live":
            return True
        if self.frozen or num_steps % self.every:
            return False
        own = self.own()
        if self.kind == "periodic":
            for name, theta in student.items():
                own[name].copy_(theta)
            return True
        for chunk in _chunks(self._targets(student)):
            masters = [self.master[name] for name in chunk]
            thetas = [
                theta.to(master.device, torch.float32)
                for theta, master in zip(chunk.values(), masters, strict=True)
            ]
            torch._foreach_lerp_(masters, thetas, 1.0 - self.alpha)
            self._narrow(own, chunk)
        return True

    def _targets(self, student: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What is averaged: the weights, or of adapted layers the products."""
        if not self.products:
            for name, theta in student.items():
                yield name, theta.detach()
        for name, product in self.products.items():
            up, down = student[product.up].detach(), student[product.down].detach()
            yield name, (up.float() @ down.float()).mul_(product.scaling)

    def _narrow(self, own: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> None:
        """Round masters into the model that scores, where they are not its own tensors."""
        for name in names:
            if self.master[name].data_ptr() != own[name].data_ptr():
                own[name].copy_(self.master[name])

    def state_dict(self) -> dict[str, Any]:
        """The tensors that are its own (the master's, where it has one) with its settings."""
        weights = self.master or {name: p.detach() for name, p in self.own().items()}
        return {"kind": self.kind, "alpha": self.alpha, "every": self.every, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; kind, alpha and every stay those of this teacher.

        Raises:
            InputError: the weights are of another model.
        """
        own, weights = self.own(), state["weights"]
        if weights.keys() != own.keys():
            odd = sorted(weights.keys() ^ own.keys())[0]
            raise InputError(f"EMATeacher: the saved teacher is of another model: parameter {odd}")
        for name, value in weights.items():
            own[name].copy_(value)
            if name in self.master:
                self.master[name].copy_(value)


def _check(kind: str, alpha: float, every: int, scoring_dtype: str, master_device: str) -> None:
    for setting, value, known in (
        ("kind", kind, KINDS),
        ("scoring_dtype", scoring_dtype, SCORING_DTYPES),
        ("master_device", master_device, MASTER_DEVICES),
    ):
        if value not in known:
            raise InputError(
                f"teacher: {setting} must be one of {', '.join(map(repr, known))}; got {value!r}"
            )
    if not 0 <= alpha <= 1 or every < 1:
        raise InputError(
            f"EMATeacher: alpha must lie in [0, 1] and every be at least 1; got {alpha}, {every}"
        )


def _sharing_copy(model: torch.nn.Module, own: Mapping[str, Tensor]) -> torch.nn.Module:
    """Its modules anew, over the very same tensors but for copies of `own`."""
    copied = {id(tensor) for tensor in own.values()}
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in copied})


def _with_deltas(model: Any) -> tuple[Any, dict[str, _Product]]:
    """A peft model's copy without the wrapper, its adapted layers as base + delta.

    Raises:
        InputError: something else than plain LoRA is trained.
    """
    products = {}
    layers = adapted_layers(model)
    base = model.get_base_model()
    for path, (layer, adapter) in layers.items():
        up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        scaling = layer.scaling[adapter]
        delta = (up.detach().float() @ down.detach().float()).mul_(scaling)
        place = path.removeprefix("base_model.model.")
        parent, _, leaf = place.rpartition(".")
        base_layer = layer.get_base_layer()
        setattr(
            base.get_submodule(parent),
            leaf,
            DeltaLinear(base_layer, delta.to(base_layer.weight.dtype)),
        )
        products[f"{place}.delta"] = _Product(
            f"{path}.lora_B.{adapter}.weight", f"{path}.lora_A.{adapter}.weight", scaling
        )
    return base, products


def _chunks(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Some at once, so that what foreach is given does not double the memory."""
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in pairs:
        if chunk and size + tensor.numel() > _CHUNK_ELEMENTS:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = tensor
        size += tensor.numel()
    if chunk:
        yield chunk
