"""What a forward pass keeps for the backward pass, on the CPU in between.

torch's own `save_on_cpu` copies each tensor as often as it is kept, weights too, and waits for each
copy. Here a tensor goes once, whoever keeps it and in whatever shape; weights and small tensors
stay; copies run beside the arithmetic, in a stream of their own.
"""

import weakref
from collections import deque
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fdfast.errors import InputError

MIN_BYTES = 2**16  # what is smaller takes longer to send than it is worth
# Tensors on their way at once: those that leave are held on the GPU until they have left, those
# that come back are asked for so many before they are needed.
ON_THE_WAY = 4


class Copies(Protocol):
    """Brings tensors away and back."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where it can be brought away from."""

    def leave(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor away; what is returned stands for it."""

    def come(self, copy: Any) -> Any:
        """Begin to copy it back."""

    def here(self, coming: Any) -> Tensor:
        """What came back, ready for the work that follows."""

    def all_left(self) -> None:
        """No more will leave: let go of what is held because it still leaves."""


def check_device(device: torch.device) -> None:
    """Refuse a device that nothing can be brought away from.

    Raises:
        InputError: it is no GPU.
    """
    if device.type != "cuda":
        raise InputError(
            "activation_offloading moves to the CPU what a GPU keeps between forward and backward, "
            f"and this model is on the {device.type}: drop it, or train on a GPU"
        )


class CudaCopies:
    """Between a GPU and pinned memory, in a stream of their own.

    Args:
        device: the GPU.

    Raises:
        InputError: it is none.
    """

    def __init__(self, device: torch.device) -> None:
        check_device(device)
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is on the GPU."""
        return tensor.device == self.device

    def leave(self, tensor: Tensor) -> Tensor:
        """Begin the way out; the GPU's memory is free once the arithmetic has waited for it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(self.stream):
            copy.copy_(tensor, non_blocking=True)
            left = self.stream.record_event()
        # Held instead of record_stream: else all of a pass could be waiting to be freed at once,
        # since the host is far ahead of the GPU.
        self._leaving.append((tensor, left))
        while len(self._leaving) > ON_THE_WAY:
            self._let_go()
        return copy

    def come(self, copy: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Begin the way back."""
        tensor = torch.empty_like(copy, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # used this memory before
        with torch.cuda.stream(self.stream):
            tensor.copy_(copy, non_blocking=True)
            back = self.stream.record_event()
        tensor.record_stream(self.stream)  # it may be dropped before it came
        return tensor, back

    def here(self, coming: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """The tensor; what is computed from here on waits for it."""
        tensor, back = coming
        torch.cuda.current_stream(self.device).wait_event(back)
        return tensor

    def all_left(self) -> None:
        """At the end of the forward pass."""
        while self._leaving:
            self._let_go()

    def _let_go(self) -> None:
        _, left = self._leaving.popleft()
        torch.cuda.current_stream(self.device).wait_event(left)


class _Away:
    """A tensor that was brought away, for all who keep it."""

    def __init__(self, copy: Any, place: int) -> None:
        self.copy, self.place = copy, place
        self.keepers = 0  # that have not asked for it yet
        self.coming: Any = None


class _Kept(NamedTuple):
    away: _Away
    shape: torch.Size


class Offload:
    """The hooks of one forward pass: torch.autograd.graph.saved_tensors_hooks(pack, unpack).

    Stay where they are: parameters and views of them, tensors below `min_bytes`, tensors elsewhere
    than on the GPU, and views that repeat numbers (expanded ones).

    Args:
        copies: what brings tensors away and back.
        min_bytes: see above.
    """

    def __init__(self, copies: Copies, *, min_bytes: int = MIN_BYTES) -> None:
        self.copies, self.min_bytes = copies, min_bytes
        # As weak as can be: what nobody keeps any more is freed, here and on the CPU.
        self._known: dict[Any, tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self._order: list[weakref.ref[_Away]] = []

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        """What autograd keeps in place of a tensor."""
        if self._stays(tensor):
            return tensor
        away = self._away(tensor)
        away.keepers += 1
        return _Kept(away, tensor.shape)

    def unpack(self, kept: Tensor | _Kept) -> Tensor:
        """The tensor again; those kept before it begin to come, which are needed next."""
        if isinstance(kept, Tensor):
            return kept
        away = kept.away
        self._call(away)
        for place in range(away.place - 1, max(away.place - 1 - ON_THE_WAY, -1), -1):
            before = self._order[place]()
            if before is not None and before.keepers > 0:
                self._call(before)
        tensor = self.copies.here(away.coming)
        away.keepers -= 1
        if away.keepers <= 0:
            away.coming = None
        return tensor if tensor.shape == kept.shape else tensor.view(kept.shape)

    def close(self) -> None:
        """At the end of the forward pass."""
        self._known.clear()
        self.copies.all_left()

    def _stays(self, tensor: Tensor) -> bool:
        base = tensor if tensor._base is None else tensor._base
        return (
            isinstance(base, torch.nn.Parameter)
            or tensor.numel() * tensor.element_size() < self.min_bytes
            or not self.copies.takes(tensor)
            or _repeats(tensor)
        )

    def _away(self, tensor: Tensor) -> _Away:
        """What stands for these numbers, brought away now if they are new."""
        # In another shape they are the same ones, where none are left out.
        layout: Any = tensor.numel()
        if not tensor.is_contiguous():
            layout = (tensor.shape, tensor.stride())
        key = (tensor.data_ptr(), tensor.dtype, layout, tensor._version)
        if key in self._known:
            storage, known = self._known[key]
            away = known()
            # While its storage lives, no other tensor has its address.
            if away is not None and not storage.expired():  # type: ignore[no-untyped-call]
                return away
        away = _Away(self.copies.leave(tensor.detach()), len(self._order))
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[key] = storage, weakref.ref(away)
        self._order.append(weakref.ref(away))
        return away

    def _call(self, away: _Away) -> None:
        if away.coming is None:
            away.coming = self.copies.come(away.copy)


def _repeats(tensor: Tensor) -> bool:
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return any(step == 0 and size > 1 for step, size in steps)
