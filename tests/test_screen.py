"""The live view: what it shows, on any terminal, and that nothing of it is left behind."""

import io

import pytest
from rich.console import Console

from fdfast.trainer.screen import Screen

ROW = {
    "step": 3, "stage": 1, "loss": 0.1234, "kl": 0.0567, "entropy": 1.5, "reward": 0.25,
    "completions/mean_length": 41.5, "completions/max_length": 64.0, "grad_norm": None,
    "learning_rate": 1e-5, "num_tokens": 12345, "time/rollout": 6.0, "time/update": 3.0,
    "time/step": 10.0, "time/idle/rollout": 0.4, "alarms": ["entropy"], "skipped": 0.0,
}  # fmt: skip


def console(width=80, terminal=True):
    return Console(
        file=io.StringIO(), width=width, height=24, force_terminal=terminal, highlight=False,
        color_system=None, legacy_windows=False,
    )  # fmt: skip


def drawn(width):
    """The lines of the view, without the escape codes of a live display."""
    seen = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    screen = Screen("run", total=9, quiet=False, console=console(width))
    screen.at(3)
    screen.show(ROW, ["entropy 0.010 is below 0.5 of its median, which precedes a collapse"])
    seen.print(screen.view)
    return seen.file.getvalue().splitlines()


def test_the_view_shows_the_step_its_numbers_its_time_and_its_alarms():
    text = "\n".join(drawn(100))
    for part in (
        "3/9", "stage 2", "loss 0.1234", "kl 0.0567", "entropy 1.500", "proved 25.0%",
        "length 41.5", "rate 1.00e-05", "tokens 12,345", "precedes a collapse",
    ):  # fmt: skip
        assert part in text, part
    assert "gradient" not in text, "it was not finite"
    rollout, update = (line for line in text.splitlines() if " s  " in line)
    assert rollout.startswith("rollout          6.00 s  60% ")
    assert rollout.count("\u2588") == 2 * update.count("\u2588")
    assert "idle" not in text, "a share is no seconds"


def test_the_time_that_is_left_is_told_of_steps_that_take_minutes():
    now = [0.0]
    screen = Screen("run", total=9, quiet=False, console=console(100))
    screen.view.progress.get_time = lambda: now[0]
    for step in range(4):
        now[0] += 100.0
        screen.at(step)
    seen = Console(file=io.StringIO(), width=100, color_system=None, highlight=False)
    seen.print(screen.view)
    assert "3/9 0:10:00" in seen.file.getvalue()


@pytest.mark.parametrize("width", [1, 10, 20, 33, 50, 80, 200])
def test_it_fits_any_width(width):
    assert all(len(line) <= width for line in drawn(width))
    if width >= 20:
        assert any("loss 0.1234" in line for line in drawn(width))


def interrupted(seen):
    with Screen("run", total=9, quiet=False, console=seen) as screen:
        screen.show(ROW)
        screen.say("step 3/9  kl 0.0567 [not markup]")
        raise KeyboardInterrupt


def test_on_a_terminal_it_is_drawn_below_the_lines_and_taken_away_at_the_end():
    seen = console()
    with pytest.raises(KeyboardInterrupt):
        interrupted(seen)
    written = seen.file.getvalue()
    assert "step 3/9  kl 0.0567 [not markup]" in written
    assert "proved 25.0%" in written
    assert written.rstrip().endswith("\x1b[2K"), "the view is erased"
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor is back"


def test_without_a_terminal_there_are_plain_lines_alone(capsys):
    with Screen("run", total=9, quiet=False) as screen:
        screen.show(ROW, ["an alarm"])
        screen.at(3)
        screen.say("step 3/9")
    assert capsys.readouterr().out == "step 3/9\n"


def test_quiet_shows_nothing(capsys):
    with Screen("run", total=9, quiet=True) as screen:
        screen.show(ROW)
        screen.say("step 3/9")
    assert capsys.readouterr().out == ""
