"""The command line: a wrong word, a missing path or a bad file is one line and exit status 2."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fdfast
from fdfast.cli import main
from fdfast.trainer import PRESETS
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
        (["train", "seed=1", "--resume", "fast"], "unrecognized arguments: fast"),
        (["config", "show", "seed=1", "--preset", "lab"], "unrecognized arguments: --preset lab"),
        (["config", "show", "fast"], "invalid choice: 'fast' (choose from 'fd_paper', "),
        (["train", "seed=1", "--resume", "max_step=3"], "unknown key 'max_step'"),
        (["train", "max_step=3"], "unknown key 'max_step'; did you mean 'max_steps'?"),
        (["train", "--config", "none.yaml"], "none.yaml: no such config file"),
        (["train", "dataset=none.jsonl"], "none.jsonl: cannot be read"),
        (["train", "model_name_or_path=./none"], "none: no such model folder"),
        (["train", "model_name_or_path=nobody/none"], "the hub gave no such model"),
        (["train", "--resume"], "--resume found no "),
        (["train", "--preset", "fast"], "invalid choice: 'fast' (choose from 'fd_paper', "),
        (["train", "feedback_text={unclosed", "seed={"], "seed: '{' is no YAML"),
        (["train", "--config", "."], "fdfast: .: Is a directory"),
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


def test_settings_may_stand_before_and_after_options(capsys):
    words = ["config", "show", "grpo_paper", "seed=1", "beta=0.5", "--set", "r=4", "seed=3"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "\nseed: 3\n" in shown
    assert main(["config", "show", "seed=5"]) == 0, "the preset may be left out"
    assert "\nseed: 5\n" in capsys.readouterr().out
    assert "  beta: 0.5\n" in shown
    assert "  r: 4\n" in shown


def test_the_version_is_the_packages():
    assert run("--version").stdout.strip() == fdfast.__version__


def test_a_training_run_from_the_shell(tmp_path):
    model = save_tiny_model(tmp_path / "tiny")
    (tmp_path / "q.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "What?"}\n')
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {model}\ntask: chat\ndataset: q.jsonl\ndataset_split: ''\n"
        "feedback: {source: constant, text: Be concise.}\nprompts_per_step: 2\n"
        "max_completion_length: 4\noutput_dir: out\n"
    )
    done = run("train", "--config", "run.yaml", "max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    again = run("train", "--config", "run.yaml", "max_steps=2", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("fdfast: out: holds a run already")


def test_help_says_what_train_does_and_where_its_settings_are():
    text = run("train", "--help").stdout
    assert "fdfast config show" in text
    assert all(name in text for name in PRESETS)


def test_a_command_without_a_model_does_not_wait_for_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fdfast.cli import main\n"
        "main(['lean', 'check', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: fdfast lean check")


@pytest.mark.parametrize(
    "code",
    [
        "f = fdfast.policy_head",
        "from fdfast import policy_head as f",
        "import fdfast.policy_head; f = fdfast.policy_head",
        "import fdfast.topk_head, fdfast.losses; f = fdfast.policy_head",
        "from fdfast.policy_head import prepare; f = fdfast.policy_head",
        "from fdfast import *; f = policy_head",
        "import pickle; f = pickle.loads(pickle.dumps(fdfast.policy_head))",
    ],
)
def test_the_ops_are_functions_however_they_are_imported(code):
    """Their submodules have the same names."""
    check = "\nimport types, sys\nassert type(f) is types.FunctionType, f\n"
    check += "assert f is sys.modules['fdfast.policy_head'].policy_head\n"
    subprocess.run([sys.executable, "-c", f"import fdfast\n{code}{check}"], check=True)


def test_submodules_come_with_the_package_and_other_names_do_not():
    code = "import fdfast; print(fdfast.lean.verify.__name__, hasattr(fdfast, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "verify False\n"
    assert set(fdfast.__all__) <= set(dir(fdfast))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["import", "command"])
def test_ctrl_c_and_sigterm_end_any_command_with_one_line(number, moment):
    """In the seconds that torch takes to import too: here a module of that name that never ends."""
    code = (
        "import sys, time, types, fdfast.cli as cli\n"
        "def wait(*_):\n    print('ready', flush=True); time.sleep(60)\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': wait()\n"
        "if sys.argv[1] == 'import':\n"
        "    sys.meta_path.insert(0, Slow()); cli_words = ['train', 'task=chat']\n"
        "else:\n"
        "    cli._fetch_demo = wait; cli_words = ['model', 'fetch-demo']\n"
        "sys.exit(cli.main(cli_words))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "fdfast: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_it_quietly(unbuffered):
    code = (
        "import sys, fdfast.cli as cli\n"
        "def say(_):\n    print('words'); return 0\n"
        "cli._fetch_demo = say; sys.exit(cli.main(['model', 'fetch-demo']))\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_output_is_told(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fdfast.cli._fetch_demo", broken)
    assert main(["model", "fetch-demo"]) == 2
    assert capsys.readouterr().err == "fdfast: Broken pipe\n"
