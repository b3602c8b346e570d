"""`fdfast show`: the colours are the log-ratios, and nothing that a model writes is obeyed."""

import dataclasses
import io
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from fdfast.cli import main
from fdfast.lean.verdict import Message, Verdict
from fdfast.rollout import ToolCall, Trajectory
from fdfast.rollout.records import Record, to_dict, write_jsonl, write_parquet
from fdfast.rollout.show import ShowOptions, record_row, record_view
from fdfast.rollout.show_ratios import DARK, LIGHT, coloured, legend, summarise, terminal_palette
from fdfast.rollout.show_text import cut, harmless

TOKENS = ["by", " simp", "\n", "  exact", " h", "<|im_end|>"]
RATIOS = [0.0, 2.0, -1.0, -5.0, 0.5, 0.05]
COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")


def record(tokens=TOKENS, ratios=RATIOS, **changes):
    own = {f.name for f in dataclasses.fields(Trajectory)}
    trajectory = Trajectory(
        ids=list(range(len(tokens))),
        logprobs=[-1.0] * len(tokens),
        wrote=[True] * len(tokens),
        text="".join(tokens),
        end="stop",
    )
    told = {name: changes.pop(name) for name in [*changes] if name in own}
    row = Record(
        problem="add_zero",
        statement="theorem add_zero (h : a) : a :=",
        trajectory=dataclasses.replace(trajectory, **told),
        tokens=list(tokens),
        student_logprobs=None if ratios is None else [-6.0] * len(tokens),
        teacher_logprobs=None if ratios is None else [-6.0 + ratio for ratio in ratios],
    )
    return dataclasses.replace(row, **changes)


def with_tools(**changes):
    """Two turns: write a file, check it with a call that fails, then an answer."""
    written = json.dumps({"path": "A.lean", "content": "theorem t : a := by\n  simp"})
    calls = [
        ToolCall("write_file", written, "A.lean is written", True, 0.01, 2),
        ToolCall("check_file", '{"path": ["∀"]}', "no such file", False, 2.5, 2),
    ]
    row = record(["I", " write", "<told>", "</told>", "done"], None)
    trajectory = dataclasses.replace(
        row.trajectory, wrote=[True, True, False, False, True], tool_calls=calls, waited_s=2.51
    )
    return dataclasses.replace(row, trajectory=trajectory, **changes)


def lines(row, palette=None, width=80, **options):
    """What a console would print, as segments."""
    system = None if palette is None else "truecolor"
    console = Console(
        width=width, color_system=system, force_terminal=True, highlight=False, file=io.StringIO()
    )
    shown = []
    for part in record_view(row, 0, ShowOptions(palette, **options)):
        shown += console.render_lines(part, console.options, pad=False)
    return shown


def text(row, palette=None, width=80, **options):
    shown = lines(row, palette, width, **options)
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in shown)


def background(style):
    if style is None or style.bgcolor is None or style.bgcolor.is_default:
        return None
    return tuple(style.bgcolor.triplet)


@pytest.mark.parametrize("palette", [DARK, LIGHT])
def test_a_colour_is_the_log_ratio_clipped_at_the_scale(palette):
    def at(ratio, scale=2.0):
        return background(palette.style(ratio, scale))

    assert at(0.0) is None
    assert at(0.09) is None, "what is not to be seen has no colour"
    assert at(2.0) == at(50.0) == palette.likelier[1]
    assert at(-2.0) == at(-50.0) == palette.less_likely[1]
    assert at(1.0) == at(2.0, scale=4.0), "the scale is in nats"
    for channel, low, high in zip(at(1.0), *palette.likelier, strict=True):
        assert abs(channel - (low + high) / 2) <= 0.5
    assert at(0.5)[1] > at(0.5)[0], "likelier is green"
    assert at(-0.5)[0] > at(-0.5)[1], "less likely is red"


@pytest.mark.parametrize("palette", [DARK, LIGHT])
def test_text_on_every_colour_can_be_read(palette):
    def luminance(colour):  # WCAG 2
        parts = [c / 255 for c in colour]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for ratio in [n / 10 for n in range(-20, 21) if abs(n) > 1]:
        pair = [luminance(palette.text), luminance(background(palette.style(ratio, 2.0)))]
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.0, ratio


@pytest.mark.parametrize("palette", [DARK, LIGHT])
def test_each_token_on_the_screen_has_its_own_colour(palette):
    shown = lines(record(), palette)
    start = next(i for i, line in enumerate(shown) if line and line[0].text.startswith("turn 1"))
    cells = []
    for line in shown[start + 1 : start + 3]:
        drawn = [(c, background(segment.style)) for segment in line for c in segment.text]
        assert drawn[:2] == [(" ", None)] * 2, "the indent"
        while drawn[-1] == (" ", None):  # the line is filled
            drawn.pop()
        cells += drawn[2:]
    wanted = []
    for token, ratio in zip(TOKENS, RATIOS, strict=True):
        drawn = token.replace("\n", "↵")  # its background alone would not be seen
        wanted += [(character, background(palette.style(ratio, 2.0))) for character in drawn]
    assert cells == wanted


def test_the_legend_is_symmetric_and_says_the_scale():
    for scale in (2.0, 0.5):
        drawn = legend(DARK, scale)
        assert f"-{scale:.1f} " in drawn.plain
        assert f"+{scale:.1f} " in drawn.plain
        blocks = [background(span.style) for span in drawn.spans if background(span.style)]
        assert (blocks[0], blocks[-1]) == (DARK.less_likely[1], DARK.likelier[1])
        assert len(blocks) % 2 == 0


def test_without_colours_the_tokens_that_moved_most_are_marked():
    marked = coloured(TOKENS, RATIOS, None, 2.0).plain
    assert marked == "by ⟦simp|+2.0⟧⟦↵|-1.0⟧\n  ⟦exact|-5.0⟧ h<|im_end|>"
    assert coloured(["  ", "a"], [3.0, 0.0], None, 2.0).plain == "⟦␣␣|+3.0⟧a"
    assert coloured(["", "é"], [-3.0, 3.0], None, 2.0).plain == "⟦é|+3.0⟧", "half a character"
    assert "1 nat or more" in legend(None, 2.0).plain
    assert coloured(TOKENS, None, None, 2.0).plain == "".join(TOKENS)


def test_the_summary_counts_what_the_model_wrote():
    row = record(wrote=[True, True, True, True, True, False])
    seen = summarise(row)
    assert seen.count == 5
    assert seen.mean == pytest.approx(sum(RATIOS[:5]) / 5)
    assert seen.mean_abs == pytest.approx(sum(map(abs, RATIOS[:5])) / 5)
    assert seen.likelier == [(" simp", 2.0), (" h", 0.5)]
    assert seen.less_likely == [("  exact", -5.0), ("\n", -1.0)]
    said = text(row)
    assert "mean -0.700, mean |.| 1.700 nats over 5 tokens" in said
    assert 'likelier    " simp" +2.00   " h" +0.50' in said
    assert 'less likely "  exact" -5.00   "↵" -1.00' in said


def test_without_a_teacher_it_is_plain_and_says_how_to_get_one():
    said = text(record(ratios=None), DARK)
    assert "`fdfast rollout` without --no-feedback gets them" in said
    assert "log-ratio" not in said
    row = record(ratios=None)
    assert all(background(s.style) is None for line in lines(row, DARK) for s in line)


def test_a_record_is_shown_from_verdict_to_feedback():
    messages = [Message("error", n, 4, f"goal {n}\n⊢ a = a") for n in range(1, 6)]
    row = record(
        verdict=Verdict("failed", tuple(messages), "1:4: goal 1 ⊢ a = a", 0),
        end="length",
        feedback="Use rfl.",
        seed=7,
        step=12,
        evaluation=True,
        model="org/model",
    )
    said = text(row)
    order = ["add_zero  failed", "cut at the token limit", "6 tokens written", "org/model"]
    order += ["step 12", "seed 7", "evaluation", "1:4 error goal 1\n      ⊢ a = a", "3:4 error"]
    order += ["2 more messages", "theorem add_zero", "turn 1  6 tokens", "Use rfl."]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    assert "goal 4" not in said
    assert "5:4 error goal 5" in text(row, full=True)
    assert said.count("goal 1") == 1, "the reason is that message"
    warnings = [Message("warning", 0, 1, "unused\nhint"), Message("error", 1, 0, "wrong\nterm")]
    said = text(record(verdict=Verdict("failed", tuple(warnings), "1:0: wrong term")))
    assert "1:0 error wrong\n      term\n    0:1 warning unused ...\n" in said
    assert "1:0: wrong" not in said
    rejected = record(verdict=Verdict("rejected", (), "`sorry` in the proof"))
    assert "`sorry` in the proof" in text(rejected)
    assert "proved at level 1" in text(record(verdict=Verdict("proved", level=1)))


def test_a_verdict_has_its_colour():
    for kind, name in (("proved", "green"), ("failed", "red"), ("timeout", "yellow")):
        [shown] = [
            segment
            for segment in lines(record(verdict=Verdict(kind)), DARK)[0]
            if segment.text.strip() == kind
        ]
        assert shown.style.color.name == name


def test_turns_show_their_calls_and_what_these_answered():
    said = text(with_tools())
    order = ["2 calls, 2.51 s waited", "turn 1  2 tokens", "I write", "→ write_file  ok  0.01 s"]
    order += ["path: A.lean", "1 │ theorem t : a := by", "2 │   simp", "← A.lean is written"]
    order += ["→ check_file  failed  2.50 s", 'path: ["∀"]', "← no such file", "turn 2  1 token"]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    assert "<told>" not in said, "the outputs say it already"
    lost = with_tools()
    told = dataclasses.replace(lost.trajectory, tool_calls=[])
    assert "<told></told>" in text(dataclasses.replace(lost, trajectory=told))
    assert "theorem t : a := by" in text(with_tools(), DARK)


def test_what_is_no_call_is_shown_as_it_was_written():
    row = with_tools()
    for written in ("{oops", "[1]", '"text"', "[" * 100_000):
        call = ToolCall("", written, "the call is not JSON", False, 0.0, 2)
        told = dataclasses.replace(row.trajectory, tool_calls=[call])
        said = text(dataclasses.replace(row, trajectory=told))
        assert "(no call that can be read)  failed" in said
        assert written[:60] in said


def test_long_outputs_are_cut_with_a_note_unless_all_is_asked_for():
    row = with_tools()
    output = "\n".join(f"line {n}" for n in range(100))
    call = dataclasses.replace(row.trajectory.tool_calls[0], output=output)
    row = dataclasses.replace(
        row, trajectory=dataclasses.replace(row.trajectory, tool_calls=[call])
    )
    assert "line 11\n" in text(row)
    assert "line 12\n" not in text(row)
    assert "88 more lines (--full shows all)" in text(row)
    assert "line 99" in text(row, full=True)


def test_a_cut_says_what_it_cut():
    assert cut("a\nb", lines=2) == "a\nb"
    assert cut("a\nb\nc", lines=2) == "a\nb\n... 1 more line (--full shows all)"
    assert cut("a" * 30, lines=2, chars=10).startswith("a" * 10 + "\n... 20 more characters")
    assert cut("a\n\n\nb", lines=1) == "a\n... 3 more lines (--full shows all)"


HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b5m\r\x08\x00\x7f\u202eright\u2066\u200f\ufeff\u2028"
    "\ud800\U000e0041[bold]x[/bold][/nonsense][link=http://x]:smile:"
)


def hostile():
    """Every text of a record."""
    calls = [
        ToolCall(HOSTILE, json.dumps({HOSTILE: HOSTILE, "n": [HOSTILE]}), HOSTILE, True, 0.0, 2),
        ToolCall("write_file", json.dumps({"content": HOSTILE, "path": HOSTILE}), "", True, 0, 2),
        ToolCall("x", HOSTILE, HOSTILE, False, 0.0, 2),
    ]
    return record(
        [HOSTILE, "x", HOSTILE, HOSTILE],
        [2.0, -2.0, 0.0, -9.0],
        wrote=[True, True, False, True],
        tool_calls=calls,
        proof=HOSTILE,
        verdict=Verdict("failed", (Message(HOSTILE, 1, 2, HOSTILE),), HOSTILE, 0),
        problem=HOSTILE,
        statement=HOSTILE,
        prompt=HOSTILE,
        feedback=HOSTILE,
        model=HOSTILE,
    )


@pytest.mark.parametrize("words", [[], ["--full"], ["--list"]])
@pytest.mark.parametrize("colour", ["--color", "--no-color"])
def test_nothing_that_a_model_writes_is_obeyed(words, colour, tmp_path, capsys):
    write_jsonl(tmp_path / "r.jsonl", [hostile(), dataclasses.replace(hostile(), feedback=None)])
    assert main(["show", str(tmp_path / "r.jsonl"), colour, *words]) == 0
    said = capsys.readouterr().out
    assert ("\x1b" in said) == (colour == "--color")
    plain = COLOUR_CODE.sub("", said)
    bad = {c for c in plain if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert bad <= {"\n"}
    if "--list" in words:  # a name is folded in its column
        return
    joined = re.sub(r"[\s│]+", "", plain)
    for part in ("␛[31mred␛]0;title␇␛[2J<U+009B>5m␍␈␀␡<U+202E>right", "[bold]x[/bold][/nonsense]"):
        assert part in joined, "it is to be seen"
    assert "[link=http://x]:smile:" in joined


def test_joiners_and_wide_characters_stay():
    for whole in ("👩‍👩‍👧", "∀ x ∈ ℝ, 中文\tかな\n", "é\u0301"):  # noqa: RUF001
        assert harmless(whole) == whole


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8),
    st.integers(40, 90),
    st.booleans(),
)
def test_no_line_is_wider_than_the_terminal(tokens, width, plain):
    ratios = [(-1) ** n * n / 2 for n in range(len(tokens))]
    row = record(tokens, ratios, statement="".join(tokens), feedback="".join(tokens))
    for line in text(row, None if plain else DARK, width).split("\n"):
        assert cell_len(line) <= width


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=8))
def test_all_that_the_model_wrote_is_shown(tokens):
    said = text(record(tokens, [0.0] * len(tokens)), DARK)
    written = re.sub(r"\s+", "", harmless("".join(tokens)))
    assert written in re.sub(r"\s+", "", said)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Twelve records of three problems, of steps 1 to 4."""
    folder = tmp_path_factory.mktemp("show")
    rows = [
        dataclasses.replace(record(), problem=f"problem_{n % 3}", seed=n, step=n // 3 + 1)
        for n in range(12)
    ]
    write_jsonl(folder / "r.jsonl", rows)
    write_jsonl(folder / "trajectories.jsonl", rows)
    write_parquet(folder / "r.parquet", rows)
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_bytes((folder / "r.jsonl").read_bytes()[:100])
    (folder / "wrong.jsonl").write_text('{"format": 1}\n')
    (folder / "old.jsonl").write_text('{"step": 1, "problem": "a"}\n')
    (folder / "r.txt").touch()
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        (["r.jsonl"], range(10)),
        (["."], range(10)),
        (["r.parquet", "--limit", "3"], range(3)),
        (["r.jsonl", "--index", "11"], [11]),
        (["r.jsonl", "--problem", "problem_1"], [1, 4, 7, 10]),
        (["r.jsonl", "--problem", "*_[12]", "--step", "4"], [10, 11]),
        (["r.jsonl", "--step", "2"], [3, 4, 5]),
        (["r.jsonl", "--limit", "99"], range(12)),
    ],
)
def test_the_records_that_are_asked_for_are_shown(words, seeds, trajectories, monkeypatch, capsys):
    monkeypatch.chdir(trajectories)
    assert main(["show", *words]) == 0
    said = capsys.readouterr().out
    assert [int(seed) for seed in re.findall(r"seed (\d+)", said)] == [*seeds]
    left = {"r.jsonl": 2, ".": 2, "r.parquet": 9}[words[0]]
    cut_off = len(words) == 1 or words[1:] == ["--limit", "3"]
    assert (f"... {left} more; --limit 12 shows all" in said) == cut_off
    assert ("more;" in said) == cut_off


def test_a_list_is_a_line_a_record(trajectories, capsys):
    assert main(["show", str(trajectories / "r.jsonl"), "--list", "--width", "90"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.split("\n") if "problem_" in line]
    assert len(rows) == 12
    assert rows[4] == ["4", "problem_1", "-", "stop", "2", "6", "0", "-0.575"]
    checked = dataclasses.replace(record().trajectory, verdict=Verdict("proved", level=1))
    cells = [str(c) for c in record_row(record(trajectory=checked, step=3, evaluation=True), 7)]
    assert cells == ["7", "add_zero", "proved", "stop", "3 eval", "6", "0", "-0.575"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["none.jsonl"], "none.jsonl: no such file or folder"),
        (["r.txt"], "ends in .jsonl or .parquet"),
        (["folder"], "folder: is a folder without trajectories.jsonl and attempts.jsonl"),
        (["empty.jsonl"], "empty.jsonl: holds no trajectory"),
        (["torn.jsonl"], "holds no trajectory (torn.jsonl:1: the last line is torn, and left out)"),
        (["wrong.jsonl"], "wrong.jsonl:1: field 'problem' is missing"),
        (["old.jsonl"], "old.jsonl:1: has no 'format'"),
        (["r.jsonl", "--index", "12"], "--index must be from 0 to 11; got 12"),
        (["r.jsonl", "--index", "-1"], "--index must be at least 0"),
        (["r.jsonl", "--limit", "0"], "--limit must be at least 1"),
        (["r.jsonl", "--width", "3"], "--width must be at least 40"),
        (["r.jsonl", "--scale", "0"], "--scale must be more than 0 nats"),
        (["r.jsonl", "--scale", "nan"], "--scale must be more than 0 nats"),
        (
            ["r.jsonl", "--problem", "x"],
            "no trajectory of problem 'x'; it has problems 'problem_0'",
        ),
        (["r.jsonl", "--step", "9"], "no trajectory of step 9; it has"),
        (["r.jsonl", "--step", "9"], "and steps 1 to 4"),
        (["r.jsonl", "--index", "1", "--step", "1"], "--index names one record"),
        (["r.jsonl", "--html", "folder"], "--html folder: is a folder; name a file"),
    ],
)
def test_a_wrong_word_is_one_line(words, line, trajectories, monkeypatch, capsys):
    monkeypatch.chdir(trajectories)
    assert main(["show", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fdfast: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1


def test_a_torn_line_is_a_note_on_the_error_stream(trajectories, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_bytes((trajectories / "r.jsonl").read_bytes()[:-20])
    assert main(["show", str(path), "--list"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"fdfast: {path}:12: the last line is torn, and left out\n"


def shell(words, **environment):
    base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLORTERM")}
    command = [sys.executable, "-m", "fdfast.cli", "show", *map(str, words)]
    return {"args": command, "env": {**base, "TERM": "xterm-256color", **environment}}


def test_a_pipe_gets_no_escape_code_whatever_the_terminal_is(trajectories):
    wanted = shell([trajectories / "r.jsonl"], FORCE_COLOR="1", COLORTERM="truecolor")
    done = subprocess.run(**wanted, capture_output=True, check=True, timeout=60)
    assert b"\x1b" not in done.stdout
    assert not re.search(rb" \n", done.stdout), "no blanks at the ends of lines"
    asked = shell([trajectories / "r.jsonl", "--color"])
    done = subprocess.run(**asked, capture_output=True, check=True, timeout=60)
    assert b"\x1b[38;2;" in done.stdout


@pytest.mark.parametrize(
    ("environment", "words", "code"),
    [
        ({"COLORTERM": "truecolor"}, [], b"48;2;20;132;68m"),
        ({"COLORTERM": "truecolor", "COLORFGBG": "0;15"}, [], b"48;2;84;190;118m"),
        ({}, [], b"\x1b[38;5;"),
        ({"NO_COLOR": "1"}, [], None),
        ({"TERM": "dumb"}, [], None),
        ({}, ["--no-color"], None),
    ],
)
def test_a_terminal_gets_the_colours_it_has(environment, words, code, trajectories):
    ours, theirs = pty.openpty()
    wanted = shell([trajectories / "r.jsonl", "--limit", "1", *words], **environment)
    with subprocess.Popen(**wanted, stdout=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 4096):
                seen += piece
        except OSError:  # Linux's word for the end of a pty
            pass
    os.close(ours)
    assert process.returncode == 0
    assert b"add_zero" in seen
    assert (b"\x1b" in seen) == (code is not None)
    assert code is None or code in seen


def test_whoever_has_read_enough_may_go(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [record()] * 300)
    wanted = shell([tmp_path / "r.jsonl", "--limit", "300"])
    with subprocess.Popen(**wanted, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_terminal_that_is_not_utf8_is_no_crash(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [hostile(), with_tools(feedback="∀")])
    wanted = shell([tmp_path / "r.jsonl"], PYTHONIOENCODING="ascii")
    done = subprocess.run(**wanted, capture_output=True, check=True, timeout=60)
    assert done.stdout.isascii()


def test_a_page_is_whole_asks_no_network_and_keeps_text_text(tmp_path, capsys):
    row = dataclasses.replace(record(), feedback="<script>alert(1)</script> & 'q'")
    write_jsonl(tmp_path / "r.jsonl", [row])
    out = tmp_path / "new" / "page.html"
    assert main(["show", str(tmp_path / "r.jsonl"), "--html", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 1 of {tmp_path / 'r.jsonl'}\n"
    page = out.read_text(encoding="utf-8")
    for outside in ("http://", "https://", "<script", "<link", "url("):
        assert outside not in page
    assert "&lt;script&gt;" in page
    green = "#{:02x}{:02x}{:02x}".format(*LIGHT.likelier[1])
    assert f"background-color: {green}" in page


def test_the_palette_follows_the_terminal(monkeypatch):
    for value, palette in (("0;15", LIGHT), ("15;0", DARK), ("12;default;7", LIGHT), ("", DARK)):
        monkeypatch.setenv("COLORFGBG", value)
        assert terminal_palette() is palette


def test_a_record_without_a_token_is_shown():
    assert "the model wrote nothing" in text(record([], []))
    assert to_dict(record([], []))["tokens"] == []
