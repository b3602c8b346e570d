"""What a step takes on a GPU, memory and time of each stage, modelled.

Arithmetic from counts; nothing is run and no weights are read. What is assumed stands in ASSUMED.
Not counted: communication between GPUs, what activation_offloading copies, waiting for tools, the
tail of rollouts.
Legend: P parameters, D hidden, V vocabulary, T tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fdfast.errors import InputError, MachineError
from fdfast.kernels.cost import BANDWIDTH_TB, TFLOPS
from fdfast.models import fetch_demo_model, import_transformers
from fdfast.trainer.config_groups import GPU_PASS_TOKENS

# What torch finds free on an empty card; the vendor's 80, 80, 141 and 180 GB.
MEMORY_GIB = {"a100": 78.0, "h100": 78.0, "h200": 139.0, "b200": 177.0}
GIB = 2**30
# Assumed, not measured; each is printed below the table.
ASSUMED = {
    "mfu": 0.40,  # share of the bfloat16 peak that passes over packs and prefills hold
    "bandwidth": 0.70,  # share of the memory bandwidth that decoding and the optimizer hold
    "usable": 0.92,  # share of the memory beside CUDA's context and fragmentation
    "lean_check_s": 2.0,  # a check with Mathlib
    "llm_answer_s": 10.0,  # an answer of the feedback endpoint
    "server_gb_s": 2.0,  # weights to a vLLM server
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What of a model memory and time follow from.

    Attributes:
        name: for people.
        num_parameters: all, shared ones once.
        num_active: that a token passes through, embeddings not counted, the head counted.
        hidden: D.
        num_layers: blocks.
        query: heads times head size.
        key_value: key heads times head size.
        intermediate: width of the MLP; of a mixture of experts those of one token.
        vocabulary: V.
    """

    name: str
    num_parameters: int
    num_active: int
    hidden: int
    num_layers: int
    query: int
    key_value: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Workload:
    """A stage's step; names are the settings'.

    Attributes:
        prompt_tokens: of a prompt.
        feedback_tokens: that the teacher's prompt has more.
        completion_tokens: of an attempt.
        teacher_weights: whether the teacher has weights of its own.
        teacher_dtype: of them; "" for the student's.
        teacher_copies: whether it has a float32 master on the GPU, beside narrower weights.
        samples_ahead: whether the trained model samples while it is trained, from a copy.
        feedback: the source.
    """

    prompts_per_step: int
    num_generations: int
    prompt_tokens: int
    completion_tokens: int
    feedback_tokens: int = 1024
    max_pass_tokens: int = GPU_PASS_TOKENS
    generation_batch_size: int = 16
    dtype: str = "bfloat16"
    distillation_weight: float = 1.0
    beta: float = 0.0
    teacher_top_k: int = 25
    teacher_weights: bool = True
    teacher_dtype: str = ""
    teacher_copies: bool = True
    samples_ahead: bool = False
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    workspace_mb: float = 160.0
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False
    lean: bool = True
    lean_workers: int = 2
    feedback: str = "verifier"
    feedback_max_completion_length: int = 2048
    feedback_max_concurrency: int = 16

    @property
    def num_attempts(self) -> int:
        """Of a step."""
        return self.prompts_per_step * self.num_generations


@dataclass(frozen=True)
class Estimate:
    """Modelled, all of it.

    Attributes:
        memory_bytes: part -> bytes on each GPU.
        rollout_bytes: held while attempts are sampled.
        update_bytes: held at the peak of the update.
        seconds: stage -> seconds.
        arithmetic_s: of these, what the passes of student and teacher over packs take.
    """

    memory_bytes: dict[str, float]
    rollout_bytes: float
    update_bytes: float
    seconds: dict[str, float]
    arithmetic_s: float

    @property
    def peak_bytes(self) -> float:
        """The larger of both."""
        return max(self.rollout_bytes, self.update_bytes)


def read_shape(name_or_path: str) -> ModelShape:
    """Of "demo", a folder with a config.json, such a file itself, or a hub name; without weights.

    Raises:
        InputError: it is no configuration of a causal LM.
        MachineError: the hub does not answer, or transformers is missing.
    """
    transformers = import_transformers()
    place = str(fetch_demo_model()) if name_or_path == "demo" else name_or_path
    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except OSError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise MachineError(
            f"{name_or_path}: no configuration was found ({reason}); give a folder, a config.json, "
            "or a hub name that can be reached"
        ) from error
    except ValueError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{name_or_path}: is no model's configuration ({reason})") from error
    return shape_of(config, name=name_or_path)


def shape_of(config: Any, *, name: str = "model") -> ModelShape:
    """The shape of a configuration of transformers; the model is built on the meta device, so
    parameters are counted and not guessed.

    Raises:
        InputError: it is no causal LM, or of a shape that is not known here.
    """
    transformers = import_transformers()
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(text)
        heads, layers = text.num_attention_heads, text.num_hidden_layers
        hidden, intermediate = text.hidden_size, text.intermediate_size
    except (ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{name}: its memory and time can't be modelled ({reason})") from error
    head_size = getattr(text, "head_dim", None) or hidden // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    if experts > 1:
        intermediate = (getattr(text, "moe_intermediate_size", None) or intermediate) * chosen
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    spread = sum(size for n, size in sizes.items() if ".experts." in n) * (1 - chosen / experts)
    table = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    total = sum(sizes.values())
    return ModelShape(
        name=name,
        num_parameters=total,
        num_active=int(total - spread - (0 if tied else table)),
        hidden=hidden,
        num_layers=layers,
        query=heads * head_size,
        key_value=key_heads * head_size,
        intermediate=intermediate,
        vocabulary=text.vocab_size,
    )


def activation_bytes(
    shape: ModelShape, dtype: str, *, checkpointing: bool = False, offloading: bool = False
) -> float:
    """Kept for the backward pass, for each token of a pass.

    A block keeps four tensors as wide as its MLP, queries, keys and values before and after the
    rotation, four as wide as the model, and for its two norms two each in float32.
    """
    size, D = BYTES[dtype], shape.hidden
    attention = 2 * (shape.query + 2 * shape.key_value)
    block = size * (4 * shape.intermediate + attention + 4 * D) + 4 * (4 * D)
    if offloading:  # what is needed next comes back early: about a block
        return float(block)
    if checkpointing:
        return float(size * D * shape.num_layers + block)
    return float(block * shape.num_layers)


def estimate(shape: ModelShape, work: Workload, *, gpu: str, gpus: int = 1) -> Estimate:
    """Memory and time of one step.

    Args:
        shape: of the model.
        work: of the step.
        gpu: a name in MEMORY_GIB.
        gpus: that weights, gradients and optimizer are sharded over (FSDP2), and that passes and
            attempts are shared out to.

    Raises:
        InputError: a GPU that is not known, or fewer than one.
    """
    if gpu not in MEMORY_GIB:
        raise InputError(f"--gpu must be one of {', '.join(MEMORY_GIB)}; got {gpu!r}")
    if gpus < 1:
        raise InputError(f"--gpus must be at least 1; got {gpus}")
    memory = _memory(shape, work, gpus) | _sampler_memory(shape, work, gpu, gpus)
    held = sum(memory.get(name, 0.0) for name in (*STATES, COPY))
    sampler = sum(memory[name] for name in SAMPLER if name in memory)
    update = sum(memory[name] for name in UPDATE if name in memory)
    # What HF's engine samples with is gone before the update; vLLM's share stays unless it sleeps.
    stays = work.use_vllm and work.vllm_mode == "colocate" and not work.vllm_enable_sleep_mode
    seconds, arithmetic_s = _times(shape, work, gpu, gpus)
    return Estimate(memory, held + sampler, held + update + stays * sampler, seconds, arithmetic_s)


STATES = ("student", "master weights", "Adam", "teacher", "teacher master", "reference")
COPY = "copy to sample from"  # of the whole student, on each GPU and all the time
SAMPLER = ("vLLM's share", "KV cache of rollouts")
UPDATE = ("gradients", "activations", "head and its workspace", "teacher evidence")


def _memory(shape: ModelShape, work: Workload, gpus: int) -> dict[str, float]:
    """What the trainer holds on each GPU."""
    size, P = BYTES[work.dtype], shape.num_parameters / gpus
    narrow, distils = size < 4, work.distillation_weight > 0
    scores = BYTES[work.teacher_dtype or work.dtype]
    tokens = work.max_pass_tokens
    evidence = 12 * work.teacher_top_k if work.teacher_top_k else size * shape.hidden
    head = 4 * shape.vocabulary * shape.hidden + work.workspace_mb * 2**20
    kept = activation_bytes(
        shape,
        work.dtype,
        checkpointing=work.gradient_checkpointing,
        offloading=work.activation_offloading,
    )
    parts = {
        "student": size * P,
        "master weights": 4 * P * narrow,
        "Adam": 8 * P,
        "teacher": scores * P * work.teacher_weights,
        "teacher master": 4 * P * (scores < 4 and work.teacher_copies),
        "reference": size * P * (work.beta > 0 and work.distillation_weight < 1),
        "gradients": (size + 4 * narrow) * P,
        "activations": kept * tokens,
        "head and its workspace": head,
        "teacher evidence": float(evidence * tokens * distils),
    }
    return {name: float(value) for name, value in parts.items() if value}


def _sampler_memory(shape: ModelShape, work: Workload, gpu: str, gpus: int) -> dict[str, float]:
    """What sampling takes beside, on each GPU."""
    if work.use_vllm:
        share = work.vllm_gpu_memory_utilization * MEMORY_GIB[gpu] * GIB
        return {"vLLM's share": share} if work.vllm_mode == "colocate" else {}
    length = work.prompt_tokens + work.completion_tokens
    found = {"KV cache of rollouts": _at_once(work, gpus) * length * _kv_bytes(shape, work)}
    if gpus > 1 or work.samples_ahead:
        found[COPY] = float(BYTES[work.dtype] * shape.num_parameters)
    return found


def _kv_bytes(shape: ModelShape, work: Workload) -> float:
    """Of one token in all layers."""
    return float(2 * shape.key_value * shape.num_layers * BYTES[work.dtype])


def _at_once(work: Workload, gpus: int) -> int:
    """Attempts that one GPU samples together."""
    return min(math.ceil(work.num_attempts / gpus), work.generation_batch_size)


def _times(
    shape: ModelShape, work: Workload, gpu: str, gpus: int
) -> tuple[dict[str, float], float]:
    flops = TFLOPS[gpu] * 1e12 * ASSUMED["mfu"]
    if work.dtype == "float32":
        flops /= 2  # TF32's peak is half of bfloat16's
    bandwidth = BANDWIDTH_TB[gpu] * 1e12 * ASSUMED["bandwidth"]
    B, G, size = work.prompts_per_step, work.num_generations, BYTES[work.dtype]
    length = work.prompt_tokens + work.completion_tokens
    distils = work.distillation_weight > 0
    own = B * (work.prompt_tokens + G * work.completion_tokens)
    told = B * (work.prompt_tokens + G * (work.feedback_tokens + work.completion_tokens)) * distils
    forward = _forward_flops(shape, own, length) / flops / gpus
    teacher = _forward_flops(shape, told, length + work.feedback_tokens) / flops / gpus
    passes = 4 if work.gradient_checkpointing else 3
    reference = forward * (work.beta > 0 and work.distillation_weight < 1)
    # AdamW reads and writes weight and two moments, reads the gradient; narrow weights are written.
    moved = (7 * 4 + (size if size < 4 else 0)) * shape.num_parameters / gpus
    sync = 2 * size * shape.num_parameters / bandwidth
    if work.use_vllm and work.vllm_mode == "server":
        sync = size * shape.num_parameters / (ASSUMED["server_gb_s"] * 1e9)
    seconds = {
        "weights sync": sync,
        "rollout": _sampling_s(
            shape, work, flops, bandwidth, gpus, work.prompt_tokens, work.completion_tokens
        ),
        "Lean": work.num_attempts * ASSUMED["lean_check_s"] / work.lean_workers * work.lean,
        "feedback": _feedback_s(shape, work, flops, bandwidth, gpus) if distils else 0.0,
        "teacher": teacher,
        "reference": reference,
        "student": passes * forward,
        "optimizer": moved / bandwidth,
    }
    return {n: s for n, s in seconds.items() if s}, teacher + reference + passes * forward


def _forward_flops(shape: ModelShape, tokens: float, length: float) -> float:
    """Two a weight, and causal attention over half of the length on average."""
    return tokens * (2.0 * shape.num_active + 2.0 * length * shape.query * shape.num_layers)


def _sampling_s(
    shape: ModelShape,
    work: Workload,
    flops: float,
    bandwidth: float,
    gpus: int,
    prompt: int,
    completion: int,
) -> float:
    """Prefill by arithmetic; each decoded token reads all weights and the keys before it."""
    if work.use_vllm:
        gpus = max(1, gpus // work.vllm_tensor_parallel_size)
        flops *= work.vllm_tensor_parallel_size
        bandwidth *= work.vllm_tensor_parallel_size
    together = _at_once(work, gpus)
    rounds = math.ceil(work.num_attempts / gpus / together)
    prefill = _forward_flops(shape, work.prompts_per_step * prompt, prompt) / flops / gpus
    read = float(BYTES[work.dtype] * shape.num_active)
    read += together * (prompt + completion / 2) * _kv_bytes(shape, work)
    arithmetic = together * 2.0 * shape.num_active / flops
    return prefill + rounds * completion * max(read / bandwidth, arithmetic)


def _feedback_s(
    shape: ModelShape, work: Workload, flops: float, bandwidth: float, gpus: int
) -> float:
    if work.feedback == "llm":
        rounds = math.ceil(work.num_attempts / work.feedback_max_concurrency)
        return rounds * ASSUMED["llm_answer_s"]
    if work.feedback != "self":
        return 0.0
    prompt = work.prompt_tokens + work.completion_tokens
    written = work.feedback_max_completion_length
    return _sampling_s(shape, work, flops, bandwidth, gpus, prompt, written)
