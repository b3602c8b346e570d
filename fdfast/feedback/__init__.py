"""Feedback on an attempt: F(problem, attempt, verdict) -> text for the teacher's prompt."""

from fdfast.feedback.providers import PROVIDERS, FeedbackProvider, feedback_provider

__all__ = ["PROVIDERS", "FeedbackProvider", "feedback_provider"]
