"""A GPU's memory with and without what is kept for the backward pass on the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fdfast.fused_layers import fuse_layers
from fdfast.models import hidden_states
from fdfast.packing import PrefixTree


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies of a GPU's memory")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_keeps_less_and_its_gradients_are_the_same(checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    fuse_layers(model)
    if checkpointing:
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    ids = torch.randint(3, 384, (4, 2048), generator=torch.Generator().manual_seed(0))
    tree = PrefixTree.from_sequences(ids.tolist()).to("cuda")
    found, kept = [], []
    for offload in (False, True):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        hidden = hidden_states(model, tree, offload=offload)
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        (hidden.float() ** 2).mean().backward()
        found.append([p.grad for p in model.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # Of 12 layers' inputs the last norm's result alone is left.
    assert kept[1] < (0.5 if checkpointing else 0.2) * kept[0], kept
