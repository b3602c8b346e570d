"""Settings of what makes the attempts: data, prompts, feedback, rollouts, vLLM, Ray, Lean."""

from dataclasses import dataclass
from typing import Literal

from fdfast.feedback import SOURCES
from fdfast.losses.policy import IS_MODES
from fdfast.trainer.settings import (
    Settings,
    at_least_one,
    not_negative,
    one_of,
    positive,
    within,
)


@dataclass(frozen=True)
class DataSettings(Settings):
    """What is attempted.

    Attributes:
        task: chat (questions without a check) or lean (theorems, checked by Lean).
        dataset: a file or folder of theorems or hf:OWNER/NAME, in the fields of miniF2F or another
            published set (data.jsonl.read_theorems); for chat a JSONL file of questions.
            "base_theorems" and "questions" ship with fdfast.
        dataset_split: the split to train on; "" for all.
        problem_names: keep problems whose name fits one of these patterns (easy_*); () for all.
    """

    group = "data."

    task: Literal["chat", "lean"] = "lean"
    dataset: str = "base_theorems"
    dataset_split: str = "train"
    problem_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSettings(Settings):
    """What the model reads.

    Attributes:
        system_prompt: first message of every prompt; "" for the chat template's own.
        prompt_template: the user's message; {prompt} is the problem.
        examples: worked examples as chat turns before the problem: [question, answer] pairs.
        completion_prefix: begins the assistant's turn, given and not trained; {prompt} as above.
        max_prompt_length: a prompt with more tokens is an error, never cut silently.
    """

    group = "prompt."

    system_prompt: str = ""
    prompt_template: str = "{prompt}"
    examples: tuple[tuple[str, str], ...] = ()
    completion_prefix: str = ""
    max_prompt_length: int = at_least_one(2048)


@dataclass(frozen=True)
class FeedbackSettings(Settings):
    """What the teacher is told of an attempt.

    Attributes:
        source: constant, verifier, solution, llm (a model behind an OpenAI-compatible chat
            endpoint) or self (the model itself).
        text: the constant's sentence.
        position: where it stands in the user's message to the teacher, end or start; the paper does
            not say.
        template: that whole message in your words instead; {prompt} as above (already in its own
            template) and {feedback}. "" for the source's own at position.
        on_failure: of llm or self: skip leaves the attempt out of the step, another source steps
            in.
        allow_solution: whether llm and self may say the solution.
        max_feedback_length: tokens of feedback in the teacher's prompt at most; longer is cut in
            the middle.
        max_tokens: tokens that llm or self may write, thinking included.
        self_model: who is self: the initial model as in the paper (of a moving teacher a second
            copy in memory, read from model_name_or_path again at --resume), or the teacher.
        base_url: of llm's API, with its version: http://127.0.0.1:8000/v1, say.
        model: its name there.
        api_key_env: the environment variable with the key; "" sends none.
        max_concurrency: requests at once.
        max_retries: requests sent again for one answer, after an error.
        timeout_s: seconds that one request may take.
        prices_usd: US dollars per million tokens of prompts and of answers.
        budget_tokens: of this process in all; 0 for no limit. Cached answers cost nothing.
        budget_usd: likewise.
    """

    group = "feedback."

    source: str = one_of("verifier", SOURCES)
    text: str = ""
    position: Literal["end", "start"] = "end"
    template: str = ""
    on_failure: str = one_of("skip", ("skip", *SOURCES))
    allow_solution: bool = False
    max_feedback_length: int = at_least_one(1024)
    max_tokens: int = at_least_one(2048)
    self_model: Literal["initial", "teacher"] = "initial"
    base_url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrency: int = at_least_one(16)
    max_retries: int = not_negative(5)
    timeout_s: float = positive(120.0)
    prices_usd: tuple[float, float] = (0.0, 0.0)
    budget_tokens: int = not_negative(0)
    budget_usd: float = not_negative(0.0)


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """How attempts are sampled.

    Attributes:
        prompts_per_step: problems a step.
        max_staleness: updates by which the weights that sample a batch may be older than those
            that it changes; 0 makes a batch when the one before it is trained on, as the paper
            does. Above, rollouts, Lean and feedback of later steps go on while a step is trained
            on, with a copy of the model (vLLM and Ray have theirs), and GRPO corrects by
            vllm.importance_sampling_*. A resumed run makes anew what was under way.
        num_generations: attempts a problem.
        max_completion_length: tokens of an attempt at most.
        temperature: of sampling.
        top_p: nucleus of sampling; 1 is off.
        top_k: of sampling; 0 is off.
        stop_strings: text that ends an attempt, beside the model's end token.
        generation_batch_size: attempts generated at once.
        use_vllm: whether vLLM samples, on a copy of the weights that follows every step; else the
            trained model itself.
        tools: whether the model may write Lean files, check them, and search tool_libraries, before
            it answers; for task lean and a model whose chat template has tools.
        tool_libraries: folders of Lean files to search.
        max_tool_calling_iterations: turns of an attempt that may end in tool calls.
        max_tool_tokens: of the tools' answers to one turn; longer ones are cut in the middle.
    """

    group = "rollout."

    prompts_per_step: int = at_least_one(128)
    max_staleness: int = not_negative(0)
    num_generations: int = at_least_one(1)
    max_completion_length: int = at_least_one(8192)
    temperature: float = positive(1.0)
    top_p: float = within(1.0, lambda p: 0 < p <= 1, "(0, 1]")
    top_k: int = not_negative(0)
    stop_strings: tuple[str, ...] = ()
    generation_batch_size: int = at_least_one(16)
    use_vllm: bool = False
    tools: bool = False
    tool_libraries: tuple[str, ...] = ()
    max_tool_calling_iterations: int = at_least_one(8)
    max_tool_tokens: int = at_least_one(1024)


@dataclass(frozen=True)
class VLLMSettings(Settings):
    """For rollout.use_vllm.

    Attributes:
        mode: colocate (in this process, on the same device) or server (one that runs already).
        server_base_url: of the server: http://127.0.0.1:8000, say.
        weights_dir: a folder that the server sees too, through which it gets new weights; "" for
            one in memory (/dev/shm), for a server on this machine.
        max_model_length: tokens of a prompt with all that follows it; 0 for the model's own.
        gpu_memory_utilization: share of the GPU's memory for a colocated vLLM.
        tensor_parallel_size: GPUs of a colocated vLLM.
        enable_sleep_mode: whether a colocated vLLM gives its memory back during the update.
        importance_sampling_correction: whether what vLLM's arithmetic, or rollout.max_staleness,
            makes of the policy is corrected by p_train / p_sampler.
        importance_sampling_mode: token or sequence, truncate or mask.
        importance_sampling_clip_max: upper bound of that ratio.
    """

    group = "vllm."

    mode: Literal["colocate", "server"] = "colocate"
    server_base_url: str = ""
    weights_dir: str = ""
    max_model_length: int = not_negative(0)
    gpu_memory_utilization: float = within(0.3, lambda u: 0 < u <= 1, "(0, 1]")
    tensor_parallel_size: int = at_least_one(1)
    enable_sleep_mode: bool = False
    importance_sampling_correction: bool = True
    importance_sampling_mode: str = one_of("sequence_mask", IS_MODES)
    importance_sampling_clip_max: float = positive(3.0)


@dataclass(frozen=True)
class RaySettings(Settings):
    """A Ray cluster that samples and checks.

    Attributes:
        address: HOST:PORT of its head, or "auto" for the one that this machine belongs to; "" for
            none. Each actor has the model (rollout.use_vllm: in vLLM), lean.workers and tools of
            its own; rollout.generation_batch_size is for each.
        num_actors: actors on it; what finds no room joins when there is some.
        gpus_per_actor: 0 samples on the CPU.
        cpus_per_actor: as Ray counts them.
    """

    group = "ray."

    address: str = ""
    num_actors: int = at_least_one(1)
    gpus_per_actor: float = not_negative(1.0)
    cpus_per_actor: float = not_negative(1.0)


@dataclass(frozen=True)
class LeanSettings(Settings):
    """Lean's checks.

    Attributes:
        timeout_s: seconds a check may take, of an attempt or of a tool's file.
        workers: checks at once.
    """

    group = "lean."

    timeout_s: float = positive(30.0)
    workers: int = at_least_one(2)
