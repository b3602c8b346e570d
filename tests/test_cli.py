"""The command line: a wrong word, a missing path or a bad file is one line and exit status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fdfast
from fdfast.cli import main
from tests.tiny import save_tiny_model


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fdfast.cli", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lean", "check"], "the following arguments are required: FILE"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["train", "--fast"], "unrecognized arguments: --fast"),
        (["train", "max_step=3"], "unknown key 'max_step'; did you mean 'max_steps'?"),
        (["train", "--config", "none.yaml"], "none.yaml: no such config file"),
        (["train", "dataset=none.jsonl"], "none.jsonl: cannot be read"),
        (["train", "model_name_or_path=./none"], "none: no such model folder"),
        (["train", "model_name_or_path=nobody/none"], "the hub gave no such model"),
        (["train", "--resume"], "--resume found no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_status_two(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(words)
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "a run that never began left a folder"


def test_the_version_is_the_packages():
    assert run("--version").stdout.strip() == fdfast.__version__


def test_a_training_run_from_the_shell(tmp_path):
    model = save_tiny_model(tmp_path / "tiny")
    (tmp_path / "q.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "What?"}\n')
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {model}\ntask: chat\ndataset: q.jsonl\ndataset_split: ''\n"
        "feedback: constant\nfeedback_text: Be concise.\nprompts_per_step: 2\n"
        "max_completion_length: 4\noutput_dir: out\n"
    )
    done = run("train", "--config", "run.yaml", "max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    again = run("train", "--config", "run.yaml", "max_steps=2", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("fdfast: out: holds a run already")
