"""One rank of a training run: `torchrun ... -m tests.rank_worker SETTINGS.json OUTPUT [resume]`.

SETTINGS: `config`, the run's settings, and `turns`, texts that attempt number n writes in turn n
modulo their number (the model samples where there are none). The main rank saves the returned rows.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from fdfast.cli import main
from fdfast.errors import MachineError
from fdfast.models import load_model
from fdfast.rollout import HFEngine
from fdfast.trainer.config_file import make_config
from fdfast.trainer.loop import train
from fdfast.trainer.scoring import Scorer
from tests.scripted import script


def hurt(what: str) -> None:
    """Make rank 1 fail or be ended in the third step's rollout, or in its first pass of all."""
    if what == "pass":

        def fails(self, *given, **options):
            raise MachineError("the tape is torn")

        Scorer._pass = fails
        return
    sample, calls = HFEngine.generate, []

    def generate(self, *given, **options):
        calls.append(given)
        if len(calls) == 3 and what == "error":
            raise MachineError("the tape is torn")
        if len(calls) == 3:
            os.kill(os.getpid(), {"int": signal.SIGINT, "kill": signal.SIGKILL}[what])
        return sample(self, *given, **options)

    HFEngine.generate = generate


def run() -> int:
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = make_config(settings["config"])
    if turns := settings.get("turns"):
        _, tokenizer = load_model(config.model.model_name_or_path)
        patch = pytest.MonkeyPatch()
        script(patch, tokenizer, tokenizer.eos_token_id, lambda n: [turns[n % len(turns)]])
    if settings.get("hurt") and os.environ.get("RANK") == "1":
        hurt(settings["hurt"])
    train(config, resume="resume" in sys.argv[2:], quiet=True)
    return 0


if __name__ == "__main__":
    import fdfast.cli

    fdfast.cli._run = lambda argv: run()  # the command line's own endings
    sys.exit(main())
