"""What is kept for the backward pass goes away and comes back; nothing else changes."""

import copy
import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig

from fdfast import model_attention
from fdfast.errors import InputError
from fdfast.fused_layers import fuse_layers
from fdfast.models import hidden_states
from fdfast.offloading import ON_THE_WAY, Offload
from fdfast.packing import PrefixTree
from fdfast.streaming import backward_in_parts
from fdfast.trainer import train
from fdfast.trainer.config_file import make_config
from fdfast.trainer.sharding import inside, shard
from tests.tiny import save_tiny_model


class Buffers:
    """Copies to other memory of the same machine, and counts."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []
        self.copies: list[weakref.ref[Tensor]] = []
        self.bytes = self.came = self.most_coming = 0
        self.coming: list[weakref.ref[Tensor]] = []

    def takes(self, tensor: Tensor) -> bool:
        return True

    def leave(self, tensor: Tensor) -> Tensor:
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        self.bytes += tensor.numel() * tensor.element_size()
        away = tensor.clone()
        self.copies.append(weakref.ref(away))
        return away

    def come(self, away: Tensor) -> Tensor:
        self.came += 1
        tensor = away.clone()
        self.coming.append(weakref.ref(tensor))
        alive = sum(ref() is not None for ref in self.coming)
        self.most_coming = max(self.most_coming, alive)
        return tensor

    def here(self, coming: Tensor) -> Tensor:
        return coming

    def all_left(self) -> None:
        pass

    @property
    def num_held(self) -> int:
        """Tensors that left and are here still, because somebody holds them."""
        return sum(not storage.expired() for storage in set(self.storages))


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    """In place of a GPU's copies; of these models the trees and the sums of squares are small."""
    found = Buffers()
    monkeypatch.setattr(model_attention, "CudaCopies", lambda device: found)
    monkeypatch.setattr(model_attention, "Offload", functools.partial(Offload, min_bytes=2000))
    return found


def model_of(*, fused: bool = True, checkpointing: bool = False) -> Any:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=72,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if fused:
        fuse_layers(model)
    if checkpointing:
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def tree_of() -> PrefixTree:
    return PrefixTree.from_sequences(
        [list(range(3, 90)), [*range(3, 60), *[7] * 20], list(range(200, 230))]
    )


def gradients_of(model: Any, **options: Any) -> list[Tensor]:
    hidden = hidden_states(model, tree_of(), **options)
    (hidden**3).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_the_same_bit_for_bit(
    buffers: Buffers, fused: bool, checkpointing: bool
) -> None:
    model = model_of(fused=fused, checkpointing=checkpointing)
    right = gradients_of(copy.deepcopy(model))
    assert not buffers.bytes
    found = gradients_of(model, offload=True)
    assert buffers.bytes
    assert len(found) == len(right)
    assert all(torch.equal(own, truth) for own, truth in zip(found, right, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_no_weight_moves_frozen_ones_neither(buffers: Buffers, fused: bool) -> None:
    model = model_of(fused=fused)
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)
    gradients_of(model, offload=True)
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    assert weights.isdisjoint(buffers.storages)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_the_forward_pass_nothing_that_left_is_held(
    buffers: Buffers, checkpointing: bool
) -> None:
    model = model_of(checkpointing=checkpointing)
    hidden = hidden_states(model, tree_of(), offload=True)
    assert len(buffers.copies) >= 4 * (1 if checkpointing else 8)
    assert buffers.num_held == 0
    assert hidden.requires_grad


def test_with_checkpointing_the_inputs_of_the_layers_leave_and_no_more(buffers: Buffers) -> None:
    model, tree = model_of(checkpointing=True), tree_of()
    hidden_states(model, tree, offload=True)
    inputs = 4 * tree.num_tokens * 72 * 4
    assert buffers.bytes == inputs + tree.num_tokens * 72 * 4  # and that of the last norm


def test_a_tensor_leaves_once_whoever_keeps_it(buffers: Buffers) -> None:
    """A layer keeps the inputs of its two norms, gate, up, queries, keys, values and attention's
    output with its log-sum-exps; the rotations are kept once for all layers.
    """
    model, tree = model_of(), tree_of()
    hidden_states(model, tree, offload=True)
    layer = 2 * 72 + 2 * 160 + 2 * 4 * 32 + 2 * 2 * 32 + 4
    assert buffers.bytes == tree.num_tokens * 4 * (4 * layer + 2 * 32 + 72)


def test_what_is_needed_next_comes_before_and_goes_after(buffers: Buffers) -> None:
    gradients_of(model_of(), offload=True)
    assert buffers.came == len(buffers.copies) == 4 * 9 + 3
    # A layer's nine, the rotations of all, and one of the layer before.
    assert ON_THE_WAY < buffers.most_coming <= 12
    assert not any(ref() is not None for ref in buffers.copies)


def test_a_second_backward_pass_finds_everything_again(buffers: Buffers) -> None:
    model = model_of()
    loss = (hidden_states(model, tree_of(), offload=True) ** 3).sum()
    parameters = list(model.model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("max_tokens", [1, 60, 1000])
def test_a_stream_of_parts_is_the_same_bit_for_bit(buffers: Buffers, max_tokens: int) -> None:
    model, tree = model_of(), tree_of()
    other = copy.deepcopy(model)

    def loss(hidden: Tensor, rows: Tensor) -> Tensor:
        return ((hidden * (1 + rows[:, None])) ** 3).sum()

    backward_in_parts(other, tree, loss, max_tokens=max_tokens)
    assert not buffers.bytes
    backward_in_parts(model, tree, loss, max_tokens=max_tokens, offload=True)
    assert buffers.bytes
    for (name, own), truth in zip(model.named_parameters(), other.parameters(), strict=True):
        if truth.grad is not None:
            assert torch.equal(own.grad, truth.grad), name


def test_small_and_repeated_tensors_stay_and_views_of_one_leave_once() -> None:
    copies = Buffers()
    offload = Offload(copies, min_bytes=1024)
    x = torch.randn(16, 32)
    assert offload.pack(x[:2]).data_ptr() == x.data_ptr()  # type: ignore[union-attr]
    assert isinstance(offload.pack(x[:1].expand(64, 32)), Tensor)
    kept = [offload.pack(view) for view in (x, x.view(32, 16), x.t(), x[:8], x[::2])]
    assert copies.bytes == (2 * 16 * 32 + 2 * 8 * 32) * 4
    views = [x, x.view(32, 16), x.t(), x[:8], x[::2]]
    for own, view in zip(kept, views, strict=True):
        assert torch.equal(offload.unpack(own), view)


def test_what_is_changed_in_place_between_is_kept_as_it_was() -> None:
    offload = Offload(Buffers(), min_bytes=1)
    x = torch.zeros(4)
    before = offload.pack(x)
    after = offload.pack(x.add_(1))
    assert offload.unpack(before).tolist() == [0] * 4
    assert offload.unpack(after).tolist() == [1] * 4


def test_another_tensor_at_the_same_address_is_another() -> None:
    offload = Offload(Buffers(), min_bytes=1)
    kept = [offload.pack(torch.full((1000,), float(n))) for n in range(50)]
    assert [float(offload.unpack(k)[0]) for k in kept] == list(range(50))


def test_without_a_gradient_nothing_leaves(buffers: Buffers) -> None:
    with torch.no_grad():
        hidden_states(model_of(), tree_of(), offload=True)
    assert not buffers.bytes


def test_a_model_on_the_cpu_is_refused_in_one_line(tmp_path: Any) -> None:
    line = "activation_offloading moves to the CPU .* on the cpu: drop it, or train on a GPU"
    with pytest.raises(InputError, match=line):
        hidden_states(model_of(), tree_of(), offload=True)
    settings = {
        "model_name_or_path": str(save_tiny_model(tmp_path / "tiny")),
        "output_dir": str(tmp_path / "run"),
        "activation_offloading": True,
        "max_steps": 1,
        "save_final_model": False,
    }
    with pytest.raises(InputError, match=line):
        train(make_config(settings), quiet=True)


def test_sharded_weights_do_not_move_either(buffers: Buffers) -> None:
    """FSDP2 gathers each layer's weights on the way, into memory that was not there before."""
    model = model_of()
    right = copy.deepcopy(model)
    gradients_of(right, offload=True)
    alone, buffers.bytes = buffers.bytes, 0
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        shard(model, torch.device("cpu"))
        hidden = inside(model, lambda: hidden_states(model, tree_of(), offload=True))
        (hidden**3).sum().backward()
        assert buffers.bytes == alone
        for own, truth in zip(model.model.parameters(), right.model.parameters(), strict=True):
            assert torch.equal(own.grad.full_tensor(), truth.grad)
    finally:
        torch.distributed.destroy_process_group()
