"""Feedback on attempts: what the teacher's prompt says of them."""

from fdfast.feedback.chat_endpoint import LLMSettings
from fdfast.feedback.item import FeedbackItem
from fdfast.feedback.ledger import FeedbackCounters, Prices
from fdfast.feedback.llm import LLMFeedback
from fdfast.feedback.own_model import AdapterEngine, SelfFeedback
from fdfast.feedback.providers import (
    PROVIDERS,
    FeedbackProvider,
    WithFallback,
    feedback_provider,
)

# Those of PROVIDERS need a text at most; the other two need an endpoint or a model.
SOURCES = (*PROVIDERS, "llm", "self")

__all__ = [
    "PROVIDERS",
    "SOURCES",
    "AdapterEngine",
    "FeedbackCounters",
    "FeedbackItem",
    "FeedbackProvider",
    "LLMFeedback",
    "LLMSettings",
    "Prices",
    "SelfFeedback",
    "WithFallback",
    "feedback_provider",
]
