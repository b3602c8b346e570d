"""`fdfast rollout`: the trainer's attempts without its updates, kept in files."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fdfast.errors import InputError
from fdfast.interrupts import sigterm_as_interrupt
from fdfast.models import load_model
from fdfast.trainer.batch import Attempt, Prompts
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.engines import make_engine
from fdfast.trainer.feedback import check_key, make_provider
from fdfast.trainer.metrics import Clock, summary
from fdfast.trainer.rollouts import Rollouts, lean_pool, read_split, schemas
from fdfast.trainer.scoring import token_logprobs
from fdfast.trainer.screen import Screen
