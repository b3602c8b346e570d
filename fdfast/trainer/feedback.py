"""The provider that a run's settings name, and the rules between those settings."""

import math
from typing import TYPE_CHECKING, Any

from fdfast.errors import InputError
from fdfast.feedback import (
    FeedbackProvider,
    LLMFeedback,
    LLMSettings,
    Prices,
    SelfFeedback,
    WithFallback,
    feedback_provider,
)
from fdfast.feedback.chat_endpoint import api_key
from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions

if TYPE_CHECKING:
    from fdfast.trainer.config import TrainConfig


def check_feedback(config: "TrainConfig") -> None:
    """The rules between the settings of feedback.

    Raises:
        InputError: one is broken.
    """
    sources, failing = _sources(config), config.feedback.source in ("llm", "self")
    if "constant" in sources and not config.feedback.text.strip():
        raise InputError(
            "config: feedback 'constant' wants feedback.text, the sentence for the teacher"
        )
    for source in sources:
        if config.data.task == "chat" and source in ("verifier", "solution"):
            raise InputError(
                f"config: feedback {source!r} wants task 'lean'; with task 'chat' take "
                "feedback.source=constant and a feedback.text"
            )
    if config.feedback.on_failure != "skip" and not failing:
        raise InputError(
            f"config: feedback.on_failure is for feedback llm and self, {config.feedback.source!r} "
            f"never fails; got {config.feedback.on_failure!r}"
        )
    if config.feedback.on_failure == config.feedback.source:
        raise InputError(
            f"config: feedback.on_failure must be skip or another source than feedback; got "
            f"{config.feedback.on_failure!r} for both"
        )
    if not all(math.isfinite(p) and p >= 0 for p in config.feedback.prices_usd):
        raise InputError(
            "config: feedback.prices_usd must be two numbers, not negative; got "
            f"{config.feedback.prices_usd}"
        )
    if "llm" in sources:
        _llm_settings(config)
    staleness = config.rollout.max_staleness
    if "self" in sources and config.feedback.self_model == "teacher" and staleness:
        raise InputError(
            "config: feedback.self_model 'teacher' would write while it scores and changes, with "
            f"rollout.max_staleness {staleness}; take self_model 'initial', or max_staleness 0"
        )
    for mark in ("{prompt}", "{feedback}"):
        if config.feedback.template and mark not in config.feedback.template:
            raise InputError(
                f"config: feedback.template must contain {mark}; got {config.feedback.template!r}"
            )


def check_key(config: "TrainConfig") -> None:
    """Refuse a run whose endpoint wants a key that is not there, before a model is loaded.

    Raises:
        InputError: it is not.
    """
    if "llm" in _sources(config):
        api_key(config.feedback.api_key_env)


def make_provider(
    config: "TrainConfig", teacher: Any, tokenizer: Any, *, is_initial: bool
) -> FeedbackProvider:
    """The provider of `config.feedback`, with another one for its failures if it names one.

    Args:
        config: of the run.
        teacher: the model of source self, if the settings say so or it is the initial one.
        tokenizer: its tokenizer.
        is_initial: whether the teacher is the initial model and stays it.

    Raises:
        InputError: the endpoint's key is missing, or the model has no chat template.
        MachineError: a package is missing, or the cache can't be used.
    """
    provider, *others = [
        _provider(s, config, teacher, tokenizer, is_initial) for s in _sources(config)
    ]
    return WithFallback(provider, others[0]) if others else provider


def _sources(config: "TrainConfig") -> list[str]:
    """The source, and the one for its failures."""
    return [s for s in (config.feedback.source, config.feedback.on_failure) if s != "skip"]


def _provider(
    source: str, config: "TrainConfig", teacher: Any, tokenizer: Any, is_initial: bool
) -> FeedbackProvider:
    if source == "llm":
        return LLMFeedback(_llm_settings(config))
    if source != "self":
        return feedback_provider(source, config.feedback.text)
    options = SamplingOptions(
        max_completion_length=config.feedback.max_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
    )
    model = teacher
    if config.feedback.self_model == "initial" and not is_initial:
        model, _ = load_model(config.model.model_name_or_path, dtype=config.model.dtype)
        model.requires_grad_(False).to(next(teacher.parameters()).device)
    return SelfFeedback(
        HFEngine(model, tokenizer, batch_size=config.rollout.generation_batch_size),
        tokenizer,
        options,
        # As long as the longest text that the student itself may come to.
        max_prompt_length=config.prompt.max_prompt_length + config.rollout.max_completion_length,
        allow_solution=config.feedback.allow_solution,
        seed=config.seed,
    )


def _llm_settings(config: "TrainConfig") -> LLMSettings:
    return LLMSettings(
        base_url=config.feedback.base_url,
        model=config.feedback.model,
        api_key_env=config.feedback.api_key_env,
        max_concurrency=config.feedback.max_concurrency,
        max_retries=config.feedback.max_retries,
        timeout_s=config.feedback.timeout_s,
        max_completion_length=config.feedback.max_tokens,
        allow_solution=config.feedback.allow_solution,
        prices=Prices(*config.feedback.prices_usd),
        budget_tokens=config.feedback.budget_tokens,
        budget_usd=config.feedback.budget_usd,
    )
