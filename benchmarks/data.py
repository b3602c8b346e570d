"""What the contenders are given: hidden states of a real student and its teacher, or drawn ones.

The real pair is SmolLM2-135M-Instruct on theorems of fdfast with their proofs; the teacher is the
same model with a known proof as feedback in its prompt. Nearer teachers lie on the line between
the two.
Legend: N tokens, D hidden, V vocabulary.
"""

import hashlib
import inspect
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.shapes import SMOLLM2_135M, Shape
from fdfast import TeacherHidden, policy_head
from fdfast.data import base_theorems_path
from fdfast.data.jsonl import Theorem, read_theorems
from fdfast.files import build_once, cache_dir
from fdfast.models import DEMO_GGUF, fetch_demo_model, hidden_states, load_model
from fdfast.trainer.batch import completion_tree

Inputs = dict[str, Tensor]

SEQUENCES = 8  # of GRPO; tokens are dealt out to them in equal runs
QUESTION = "Write this statement in Lean 4 and prove it. {informal}"
FEEDBACK = "A proof that Lean accepts is: {proof}\n\n"
BATCH = 8  # theorems in one forward pass of the model


def make_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    mean_kl: float | None = None,
) -> Inputs:
    """The inputs of every contender.

    Args:
        shape: of SmolLM2-135M: real hidden states, the first N tokens; of another model: drawn.
        dtype: of hidden, weight and teacher.
        device: where they lie.
        mean_kl: wanted between teacher and student, before rounding; None: as the pair comes.

    Returns:
        hidden (N, D), teacher (N, D), weight (V, D), targets (N,) int64, advantages (8,) float32.

    Raises:
        MachineError: the real model is not installed.
    """
    x = _real(shape) if is_real(shape) else _drawn(shape, device)
    x = {name: t.to(device=device) for name, t in x.items()}
    if mean_kl is not None:
        x["teacher"] = nearer_teacher(x, mean_kl)
    for name in ("hidden", "weight", "teacher"):
        x[name] = x[name].to(dtype)
    generator = torch.Generator().manual_seed(1)
    x["advantages"] = torch.randn(SEQUENCES, generator=generator).to(device)
    return x


def is_real(shape: Shape) -> bool:
    """Whether a real model gives the hidden states of this shape."""
    return shape[2:] == SMOLLM2_135M[2:] and shape.model == SMOLLM2_135M.model


def nearer_teacher(x: Inputs, mean_kl: float) -> Tensor:
    """hidden + c (teacher - hidden), (N, D), at the mean KL that is wanted, in float32.

    Along that line the logits are linear in c, so KL(T_c || S) grows with c: its derivative is c
    times a variance. c is found by bisection. Rounding to bfloat16, which comes after, moves the
    KL of a very near pair a little (it jumps, so nothing could be bisected there).

    Raises:
        ValueError: the pair itself is nearer than that.
    """
    hidden, teacher = x["hidden"], x["teacher"]

    def blend(c: float) -> Tensor:
        return hidden + c * (teacher - hidden)

    def kl_at(c: float) -> float:
        return mean_divergence(hidden, blend(c), x["weight"], x["targets"])

    return blend(bisect(kl_at, mean_kl))


def bisect(grows: Callable[[float], float], wanted: float, *, tolerance: float = 0.01) -> float:
    """The c in (0, 1] where `grows` is within `tolerance` of `wanted`, relatively.

    Raises:
        ValueError: `grows` does not reach it, or jumps over it.
    """
    most = grows(1.0)
    if most < wanted:
        raise ValueError(f"bisect: a value of {wanted} is wanted; the most there is is {most:.3g}")
    low, high = 0.0, 1.0
    for _ in range(60):
        c = (low + high) / 2
        value = grows(c)
        if abs(value - wanted) <= tolerance * wanted:
            return c
        low, high = (c, high) if value < wanted else (low, c)
    raise ValueError(f"bisect: no value within {tolerance:.0%} of {wanted}; it jumps near c = {c}")


def mean_divergence(hidden: Tensor, teacher: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Mean KL(teacher || student) in nats a token, logits in float32."""
    with torch.no_grad():
        head = policy_head(hidden, weight, targets, teacher=TeacherHidden(teacher, weight))
    return float(head.divergence.mean())


def widened(x: Inputs) -> Inputs:
    """The same numbers in float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in x.items()}


def first_tokens(x: Inputs, count: int) -> Inputs:
    """The same inputs with their first `count` tokens alone."""
    return x | {name: x[name][:count] for name in ("hidden", "teacher", "targets")}


def _drawn(shape: Shape, device: str) -> Inputs:
    """Peaked logits and a teacher some way from the student: mean KL about 0.6."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.V, shape.D) / shape.D**0.5
    targets = torch.randint(0, shape.V, (shape.N,), generator=generator, device=device)
    hidden = 2.0 * normal(shape.N, shape.D) + 6.0 * weight[targets]
    teacher = hidden + 1.2 * normal(shape.N, shape.D)
    return {"hidden": hidden, "weight": weight, "teacher": teacher, "targets": targets}


def _real(shape: Shape) -> Inputs:
    """The first N tokens of the stored pair, with the model's own head."""
    model = fetch_demo_model()
    folder = build_once(cache_dir() / "benchmarks" / f"smollm2-{_content_key()}", _build_real)
    x = first_tokens(load_file(folder / "pair.safetensors"), shape.N)
    with safe_open(model / "model.safetensors", "pt") as file:  # the head is tied to it
        x["weight"] = file.get_tensor("model.embed_tokens.weight").clone()
    return x


def _content_key() -> str:
    """Changes with whatever the stored pair is made from."""
    parts = (QUESTION, FEEDBACK, str(SMOLLM2_135M), DEMO_GGUF, inspect.getsource(_build_real))
    return hashlib.sha256(
        base_theorems_path().read_bytes() + "\0".join(parts).encode()
    ).hexdigest()[:12]


def _build_real(folder: Path) -> None:
    """Hidden states that predict statements and proofs, theorem after theorem, until N tokens."""
    model, tokenizer = load_model("demo")
    theorems = read_theorems(base_theorems_path())
    random.Random(0).shuffle(theorems)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def prompt(theorem: Theorem, feedback: str) -> list[int]:
        informal = theorem.informal_prefix.strip().removeprefix("/--").removesuffix("-/").strip()
        words = feedback.format(proof=theorem.proof) + QUESTION.format(informal=informal)
        chat = [{"role": "user", "content": words}]
        return ids(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    made: dict[str, list[Tensor]] = {"hidden": [], "teacher": [], "targets": []}
    while sum(map(len, made["targets"])) < SMOLLM2_135M.N:
        some, theorems = theorems[:BATCH], theorems[BATCH:]
        answers = [ids(f"{t.formal_statement} {t.proof}") for t in some]
        with torch.no_grad():
            for name, feedback in (("hidden", ""), ("teacher", FEEDBACK)):
                prompts = [prompt(t, feedback) for t in some]
                made[name].append(hidden_states(model, completion_tree(prompts, answers)))
        made["targets"].append(torch.tensor([i for answer in answers for i in answer]))
    tensors = {name: torch.cat(parts)[: SMOLLM2_135M.N].clone() for name, parts in made.items()}
    save_file(tensors, folder / "pair.safetensors")
