"""Models with fused RMSNorm and SwiGLU against the same models as transformers has them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from fdfast.cpu import fused_layers as cpu
from fdfast.fused_layers import fuse_layers, made_again
from fdfast.models import hidden_states
from fdfast.packing import PrefixTree

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Of RMSNorm: 2 a layer and the last; Qwen3 has two more a layer. Of MLPs: 1 a layer.
MODULES = {"llama": 7, "qwen2": 7, "qwen3": 11}


def _model(kind: str, dtype: torch.dtype, **options: Any) -> Any:
    config = CONFIGS[kind](
        vocab_size=384,
        hidden_size=72,  # no multiple of a register's 16 lanes
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        **options,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def _tree() -> PrefixTree:
    return PrefixTree.from_sequences(
        [list(range(3, 90)), [*range(3, 60), *[7] * 20], list(range(200, 230))]
    )


def _results(model: Any) -> list[Tensor]:
    """Hidden states and every gradient of a loss that weighs all of them."""
    hidden = hidden_states(model, _tree())
    (hidden.double() ** 3).sum().backward()  # type: ignore[no-untyped-call]
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fused_layers_change_no_bit_where_the_operations_are_the_models_own(
    kind: str, dtype: torch.dtype
) -> None:
    plain = _model(kind, dtype)
    fused = copy.deepcopy(plain)
    assert fuse_layers(fused) == MODULES[kind]
    for own, truth in zip(_results(fused), _results(plain), strict=True):
        assert torch.equal(own, truth)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_layers_in_float32_are_as_exact_as_torchs(kind: str) -> None:
    plain = _model(kind, torch.float32)
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    pairs = zip(_results(fused), _results(plain), strict=True)
    for number, (own, other) in enumerate(pairs):
        # transformers' norm is float32 within, so a float64 model is no truth beyond it.
        worst = float((own - other).abs().max() / other.abs().max())
        assert worst < 4e-6, f"result {number}: {worst}"


@pytest.mark.parametrize("D", [1, 15, 16, 17, 576])
def test_the_rows_of_a_norm_meet_float64s(D: int) -> None:
    torch.manual_seed(D)
    x, dy = torch.randn(2, 9, D), torch.randn(2, 9, D)
    x[0, 0] *= 1e4
    x[0, 1] = 0.0
    weight = torch.randn(D)
    y, inv_rms = cpu.rms_norm(x, weight, 1e-5)
    found = (y, *cpu.rms_norm_grads(dy, x, weight, inv_rms, (True, True)))
    for own, truth, torchs in zip(
        found, _norm(x.double(), weight, dy), _norm(x, weight, dy), strict=True
    ):
        assert own is not None
        _check(own, truth, torchs)


def _norm(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    pair = [t.detach().to(x.dtype).requires_grad_() for t in (x, weight)]
    y = pair[1] * (pair[0] * torch.rsqrt(pair[0].pow(2).mean(-1, keepdim=True) + 1e-5))
    return (y.detach(), *torch.autograd.grad(y, pair, dy.to(x.dtype)))


@pytest.mark.parametrize("n", [1, 16, 4097])
def test_swiglu_meets_float64s_also_far_out(n: int) -> None:
    torch.manual_seed(n)
    gate, up, dy = 3 * torch.randn(n), torch.randn(n), torch.randn(n)
    gate[: n // 3] *= 40.0
    found = (cpu.swiglu(gate, up), *cpu.swiglu_grads(dy, gate, up))
    for own, truth, torchs in zip(
        found, _swiglu(gate.double(), up, dy), _swiglu(gate, up, dy), strict=True
    ):
        _check(own, truth, torchs)


def _swiglu(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    pair = [t.detach().to(gate.dtype).requires_grad_() for t in (gate, up)]
    y = torch.nn.functional.silu(pair[0]) * pair[1]
    return (y.detach(), *torch.autograd.grad(y, pair, dy.to(gate.dtype)))


def _check(own: Tensor, truth: Tensor, torchs: Tensor) -> None:
    """The tolerance rule; the floor is a rounding of the largest number."""
    floor = 1e-6 * float(truth.abs().max())
    worst = float((own.double() - truth).abs().max())
    allowed = 2 * float((torchs.double() - truth).abs().max()) + floor
    assert worst <= allowed, f"{worst} against {allowed}"


def test_a_nan_stays_one() -> None:
    x = torch.tensor([1.0, float("nan"), 2.0])
    assert cpu.swiglu(x, torch.ones(3)).isnan().tolist() == [False, True, False]
    assert cpu.rms_norm(x[None], torch.ones(3), 1e-5)[0].isnan().all()


def test_less_is_kept_for_the_backward_pass() -> None:
    kept = {}
    for name in ("plain", "fused"):
        model = _model("llama", torch.float32)
        if name == "fused":
            fuse_layers(model)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[name] = _kept_bytes(hidden_states(model, _tree()).grad_fn, weights)
    # Of SmolLM2 it is half; attention keeps more of this model, whose heads are wider than D.
    assert kept["fused"] < 0.65 * kept["plain"], kept


def _kept_bytes(root: Any, weights: set[int]) -> int:
    """Bytes of the storages that the graph below a node holds, each once, without the weights."""
    sizes: dict[int, int] = {}
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [below for below, _ in node.next_functions]
        names = [n for n in dir(node) if n.startswith("_raw_saved")]
        saved = [getattr(node, name) for name in names]
        flat = [x for s in saved for x in (s if isinstance(s, (list, tuple)) else [s])]
        for raw in flat:
            data = getattr(raw, "data", None)
            if isinstance(data, Tensor):
                sizes[data.untyped_storage().data_ptr()] = data.untyped_storage().nbytes()
    return sum(size for place, size in sizes.items() if place not in weights)


def test_checkpointing_gives_the_same_gradient() -> None:
    plain = _model("llama", torch.float32)
    fuse_layers(plain)
    other = copy.deepcopy(plain)
    other.train()
    enable = getattr(other, "activation_checkpointing_enable", None)
    (enable or other.gradient_checkpointing_enable)({"use_reentrant": False})
    for own, truth in zip(_results(other), _results(plain), strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max()))


def test_a_copy_is_fused_too_and_reads_its_own_weights() -> None:
    model = _model("llama", torch.float32)
    fuse_layers(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.zero_()
        assert hidden_states(other, _tree()).abs().max() == 0
        assert hidden_states(model, _tree()).abs().max() > 0


def test_an_mlp_of_another_activation_stays_as_it_is() -> None:
    model = _model("llama", torch.float32, hidden_act="gelu")
    assert fuse_layers(model) == MODULES["llama"] - 2


def test_what_a_frozen_norm_keeps_gives_no_gradient_of_it() -> None:
    model = _model("llama", torch.float32)
    fuse_layers(model)
    model.model.norm.weight.requires_grad_(False)
    _results(model)
    assert model.model.norm.weight.grad is None
    assert model.model.layers[0].input_layernorm.weight.grad is not None


def test_an_output_is_made_again_bit_for_bit() -> None:
    model = _model("llama", torch.float32)
    fuse_layers(model)
    own = _results(copy.deepcopy(model))
    ids = _tree().input_ids[None]
    with made_again():
        again = model.model(input_ids=ids, use_cache=False).last_hidden_state
    plain = model.model(input_ids=ids, use_cache=False).last_hidden_state
    parameters = list(model.model.parameters())
    first, second = (torch.autograd.grad((x**3).sum(), parameters) for x in (again, plain))
    assert own
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
