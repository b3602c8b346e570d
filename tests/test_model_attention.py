"""Packs through real Hugging Face models: what separate runs give, gradients included."""

import copy

import peft
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from fdfast.errors import InputError
from fdfast.models import hidden_states, load_model
from fdfast.packing import PrefixTree

SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 20
CONFIGS = {
    "llama": lambda **more: LlamaConfig(**SIZES, **more),
    "qwen3": lambda **more: Qwen3Config(**SIZES, **more),
    "mistral, window": lambda **more: MistralConfig(**SIZES, sliding_window=WINDOW, **more),
    "gemma3, window": lambda **more: Gemma3TextConfig(
        **SIZES,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **more,
    ),
}


@pytest.fixture(autouse=True)
def _norms_in_float64(monkeypatch):
    """transformers' norms compute in float32 whatever the model: these in the model's dtype."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    for module, name in (
        (modeling_llama, "LlamaRMSNorm"),
        (modeling_qwen3, "Qwen3RMSNorm"),
        (modeling_mistral, "MistralRMSNorm"),
    ):
        monkeypatch.setattr(getattr(module, name), "forward", forward)


def model_of(kind, **more):
    """Weights far enough from 0 that every token matters to those after it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**more)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model.train()


def group(seed=0):
    """Prompt, feedback and completions of a few problems, and which tokens are trained."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, 211, (count,), generator=generator).tolist()

    sequences, masks = [], []
    for length in (37, 50):
        prompt = ids(length)
        for feedback in (ids(33), []):
            for count in (5, 1, 12):
                sequences.append([*prompt, *feedback, *ids(count)])
                masks.append([False] * (len(prompt) + len(feedback)) + [True] * count)
    masks[0][-3] = False  # the output of a tool
    return sequences, masks


def apart(model, sequences, masks):
    """Each sequence on its own, with the model's own attention."""
    rows = []
    for sequence, mask in zip(sequences, masks, strict=True):
        out = model.model(torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
        rows.append(out[:-1][torch.tensor(mask[1:])])
    return torch.cat(rows)


def gradients(model, hidden, targets):
    """Of a loss over log-probs, each with another weight."""
    model.zero_grad()
    logprobs = model.lm_head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (logprobs * torch.linspace(0.5, 2, len(targets), dtype=logprobs.dtype)).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def checkpoint_gradients(model, *, reentrant):
    """By the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def assert_alike(seen, truth, tolerance):
    scale = max(float(truth.abs().max()), 1e-3)
    assert float((seen - truth).abs().max()) <= tolerance * scale


def assert_exact(model, sequences, masks, tolerance, min_share=32):
    tree = PrefixTree.from_sequences(sequences, masks, min_share)
    assert tree.ratio > 1.5
    implementation = model.config._attn_implementation
    seen = hidden_states(model, tree)
    assert model.config._attn_implementation == implementation
    seen_logprobs, seen_gradients = gradients(model, seen, tree.target_ids)
    assert model.config._attn_implementation == implementation
    truth = apart(model, sequences, masks)
    logprobs, right = gradients(model, truth, tree.target_ids)
    assert_alike(seen.detach(), truth.detach(), tolerance)
    assert_alike(seen_logprobs, logprobs, tolerance)
    for name, gradient in right.items():
        assert_alike(seen_gradients[name], gradient, tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_and_every_gradient_are_those_of_separate_runs(kind):
    tolerance = 1e-5 if "gemma" in kind else 1e-11  # gemma's norm stays transformers' own
    assert_exact(model_of(kind), *group(), tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds(reentrant):
    model = model_of("qwen3")
    checkpoint_gradients(model, reentrant=reentrant)
    assert_exact(model, *group(), 1e-11)


def test_a_fork_of_many_turns():
    generator = torch.Generator().manual_seed(3)
    turns = [torch.randint(3, 211, (9,), generator=generator).tolist() for _ in range(8)]
    sequences = [
        [*turns[0], *turns[1], *turns[2]],
        [*turns[0], *turns[1], *turns[3], *turns[4]],
        [*turns[0], *turns[1], *turns[3], *turns[5]],
        [*turns[0], *turns[6]],
        [*turns[0], *turns[1]],
    ]
    masks = [[i >= 9 for i in range(len(s))] for s in sequences]
    assert_exact(model_of("llama"), sequences, masks, 1e-11, min_share=4)


@pytest.mark.filterwarnings("ignore::FutureWarning:peft.*", "ignore:.*is_gradient:FutureWarning")
def test_lora():
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model_of("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    ).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    sequences, masks = group()
    tree = PrefixTree.from_sequences(sequences, masks)
    seen = hidden_states(adapted, tree)
    truth = apart(adapted.get_base_model(), sequences, masks)
    assert_alike(seen.detach(), truth.detach(), 1e-11)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    weights = torch.randn(seen.shape, dtype=seen.dtype)
    ours = torch.autograd.grad((seen * weights).sum(), trained)
    theirs = torch.autograd.grad((truth * weights).sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        assert_alike(one, other, 1e-11)


def test_no_gradient_reaches_another_branch():
    model = model_of("qwen3")
    sequences, masks = group()
    tree = PrefixTree.from_sequences(sequences, masks)
    embedded = {}
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, out: embedded.setdefault("out", out)
    )
    seen = hidden_states(model, tree)
    hook.remove()
    first = sum(masks[0])
    (gradient,) = torch.autograd.grad(seen[:first].square().sum(), embedded["out"])
    own = torch.zeros(tree.num_tokens, dtype=torch.bool)
    last = int(tree.logits_index[first - 1])
    own[: last + 1] = last < tree.kv_end[: last + 1]
    assert gradient[0, ~own].abs().max() == 0
    assert (gradient[0, own].abs().sum(-1) > 0).all()


def test_the_same_prompts_give_the_same_hidden_states_to_the_bit():
    """So a teacher that is the student's copy, without feedback, diverges by exactly 0."""
    model = model_of("llama")
    teacher = copy.deepcopy(model).eval()
    tree = PrefixTree.from_sequences(*group())
    assert torch.equal(hidden_states(model, tree), hidden_states(teacher, tree))


def test_another_tree_is_no_other_program():
    model = model_of("llama").eval()
    compiled = 0

    def count(graph, _example):
        nonlocal compiled
        compiled += 1
        return graph

    trees = [PrefixTree.from_sequences(*group(seed)) for seed in range(4)]
    with torch.no_grad():
        expected = [hidden_states(model, tree) for tree in trees]
        model.model.compile(backend=count, dynamic=True)
        for tree, right in zip(trees, expected, strict=True):
            assert torch.allclose(hidden_states(model, tree), right, rtol=0, atol=1e-12)
            if tree is trees[0]:
                first = compiled
    assert first > 0
    assert compiled == first


def test_what_would_be_wrong_is_refused():
    tree = PrefixTree.from_sequences(*group())
    with pytest.raises(InputError, match=r"attention_dropout is 0\.1; set it to 0"):
        hidden_states(model_of("llama", attention_dropout=0.1), tree)
    hybrid = model_of("llama")
    hybrid.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(InputError, match="layers of type linear_attention carry state"):
        hidden_states(hybrid, tree)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=211, hidden_size=48, n_layer=2, n_head=4)
    )  # ALiBi
    with pytest.raises(InputError, match="Bloom"):
        hidden_states(bloom, tree)
    scaled = model_of(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    scaled.config.max_position_embeddings = 64
    with pytest.raises(InputError, match="depends on a sequence's length beyond 64 tokens"):
        hidden_states(scaled, tree)


@pytest.mark.slow
def test_smollm2():
    """The demo's model, 135M parameters, in float32."""
    model, _ = load_model("demo")
    generator = torch.Generator().manual_seed(0)
    prompt, *completions = (
        torch.randint(100, 40000, (n,), generator=generator).tolist() for n in (64, 20, 9, 30)
    )
    sequences = [prompt + c for c in completions]
    masks = [[False] * 64 + [True] * len(c) for c in completions]
    assert_exact(model, sequences, masks, 1e-4)
