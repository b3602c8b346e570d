"""Trajectories in files: what was written comes back, and a broken file is one clear line."""

import dataclasses
import io
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import get_type_hints

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fdfast.data.problems import Problem
from fdfast.errors import InputError, MachineError
from fdfast.lean.tools import ToolResult
from fdfast.lean.verdict import Message, Verdict
from fdfast.rollout import HFEngine, SamplingOptions, ToolCall, Trajectory
from fdfast.rollout.record_fields import FIELDS, MESSAGE, TOOL_CALL, VERDICT
from fdfast.rollout.records import (
    Record,
    RecordWriter,
    from_dict,
    make_record,
    read_records,
    to_dict,
    token_pieces,
    write_jsonl,
    write_parquet,
)
from tests.scripted import script
from tests.tiny import save_tiny_model, tiny_tokenizer

MESSAGES = (Message("error", 1, 4, "unsolved goals\n⊢ a"), Message("warning", 0, 0, ""))
WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet}


def record(count=3, **changes):
    trajectory = Trajectory(
        ids=list(range(count)),
        logprobs=[-0.5] * count,
        wrote=[True] * count,
        text="by simp",
        end="stop",
        tool_calls=[ToolCall("check_file", '{"path": "A.lean"}', "no errors", True, 0.25, 2)],
        waited_s=0.25,
        prompt_ids=[7, 8],
        verdict=Verdict("failed", MESSAGES, "unsolved goals", 1),
    )
    whole = Record(
        "add_zero",
        "theorem add_zero : True :=",
        trajectory,
        tokens=["by", " si", "mp"][:count],
        prompt="<|im_start|>user",
        student_logprobs=[-1.0] * count,
        teacher_logprobs=[-0.5] * count,
    )
    return dataclasses.replace(whole, **changes)


# Any Unicode text: NUL, CR, U+2028 and what lies beyond 16 bits among it, but no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["\u2028\u2029\x85\r\n", "\0\x1b[31m", "\U0001d53d\U0001f600\ufffd", ""]
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.just(-0.0)
INT64 = st.integers(-(2**63), 2**63 - 1)
VERDICTS = st.none() | st.builds(
    Verdict,
    kind=st.sampled_from(["proved", "failed", "timeout", "crashed", "rejected"]),
    messages=st.lists(st.builds(Message, TEXT, INT64, INT64, TEXT), max_size=2).map(tuple),
    reason=TEXT,
    level=st.sampled_from([0, 1, 2]),
)
CALLS = st.builds(ToolCall, TEXT, TEXT, TEXT, st.booleans(), NUMBERS, INT64)


@st.composite
def records(draw):
    count = draw(st.integers(0, 4))

    def many(kind):
        return st.lists(kind, min_size=count, max_size=count)

    ids = st.integers(0, 2**31 - 1)
    trajectory = st.builds(
        Trajectory,
        ids=many(ids),
        logprobs=many(NUMBERS),
        wrote=many(st.booleans()),
        text=TEXT,
        end=st.sampled_from(["stop", "length", "tool_limit"]),
        tool_calls=st.lists(CALLS, max_size=2),
        waited_s=NUMBERS,
        prompt_ids=st.lists(ids, max_size=3),
        verdict=VERDICTS,
        proof=TEXT,
    )
    built = st.builds(
        Record,
        problem=TEXT,
        statement=TEXT,
        trajectory=trajectory,
        tokens=many(TEXT),
        prompt=TEXT,
        feedback=st.none() | TEXT,
        student_logprobs=st.none() | many(NUMBERS),
        teacher_logprobs=st.none() | many(NUMBERS),
        model=TEXT,
        seed=INT64,
        step=st.none() | INT64,
        evaluation=st.booleans(),
    )
    return draw(built)


def exact(values):
    """repr tells -0.0 from 0.0, and 1 from 1.0."""
    return [repr(value) for value in values]


@pytest.mark.parametrize("suffix", WRITERS)
@given(written=st.lists(records(), max_size=3))
def test_what_was_written_comes_back_to_the_last_bit(suffix, tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / f"round_trip{suffix}"
    WRITERS[suffix](path, written)
    assert exact(read_records(path)) == exact(written)


@given(written=st.lists(records(), min_size=1, max_size=3))
def test_a_line_is_a_line_for_every_program(tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    write_jsonl(path, written)
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(written)


@pytest.mark.parametrize("suffix", WRITERS)
def test_lone_surrogates_become_the_replacement_character(suffix, tmp_path):
    call = ToolCall("\ud800", "{}", "\udfff", False, 0.0, 0)
    hurt = record(feedback="a\ud83db", tokens=["\udc00", "", ""])
    hurt = dataclasses.replace(
        hurt, trajectory=dataclasses.replace(hurt.trajectory, tool_calls=[call])
    )
    WRITERS[suffix](tmp_path / f"r{suffix}", [hurt])
    [back] = read_records(tmp_path / f"r{suffix}")
    assert (back.feedback, back.tokens[0]) == ("a\ufffdb", "\ufffd")
    assert back.trajectory.tool_calls[0].name == "\ufffd"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_number_that_is_not_finite_is_refused_and_leaves_no_file(value, suffix, tmp_path):
    bad = record(teacher_logprobs=[0.0, value, 0.0])
    rule = rf"'add_zero': field 'teacher_logprobs\[1\]' must be a finite number; got {value}"
    with pytest.raises(InputError, match=rule):
        WRITERS[suffix](tmp_path / f"r{suffix}", [record(), bad])
    assert not [*tmp_path.iterdir()]


def test_the_table_knows_every_field():
    """A field that is added to a class but not to the table would be an error of every write."""
    own = {f.name for f in dataclasses.fields(Record)} - {"trajectory"}
    trajectory = {f.name for f in dataclasses.fields(Trajectory)} - {"text"}
    assert set(FIELDS) == own | trajectory | {"format", "completion"}
    for table, kind in ((TOOL_CALL, ToolCall), (VERDICT, Verdict), (MESSAGE, Message)):
        assert list(table) == [f.name for f in dataclasses.fields(kind)]
        assert set(table) == set(get_type_hints(kind))


def test_columns_have_real_types(tmp_path):
    path = tmp_path / "r.parquet"
    write_parquet(path, [record(), record(student_logprobs=None, feedback="x")])
    schema = pyarrow.parquet.read_schema(path)
    assert schema.field("ids").type == pyarrow.list_(pyarrow.int32())
    assert schema.field("teacher_logprobs").type == pyarrow.list_(pyarrow.float64())
    assert schema.field("wrote").type == pyarrow.list_(pyarrow.bool_())
    assert schema.field("tokens").type == pyarrow.list_(pyarrow.string())
    assert pyarrow.types.is_struct(schema.field("tool_calls").type.value_type)
    assert schema.field("verdict").type.field("kind").type == pyarrow.string()
    frame = pyarrow.parquet.read_table(path).to_pandas()
    assert frame["ids"][0].tolist() == [0, 1, 2]
    assert frame["verdict"][1]["messages"][0]["text"] == "unsolved goals\n⊢ a"


def test_datasets_reads_both_forms_alike(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [record(), record(feedback="x", step=3)]
    for suffix, write in WRITERS.items():
        write(tmp_path / f"r{suffix}", rows)
    cache = str(tmp_path / "cache")
    tables = [
        datasets.load_dataset(
            kind, data_files=str(tmp_path / f"r{suffix}"), split="train", cache_dir=cache
        )
        for kind, suffix in (("json", ".jsonl"), ("parquet", ".parquet"))
    ]
    assert [row["tokens"] for row in tables[0]] == [row["tokens"] for row in tables[1]]
    assert tables[1][1]["tool_calls"][0]["name"] == "check_file"


def changed(**changes):
    return {**to_dict(record()), **changes}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (changed(format=2), "is of format 2; this fdfast reads format 1"),
        ({"step": 1, "problem": "x"}, "has no 'format'"),
        (changed(colour="red"), "field 'colour' is not known in format 1; got 'red'"),
        (changed(**{"\x1b[2J": 1}), "field '\\x1b[2J' is not known in format 1; got 1"),
        (changed(verdict={"kind": "proved"}), "field 'verdict.messages' is missing"),
        (changed(end="tired"), "field 'end' must be one of length, stop, tool_limit; got 'tired'"),
        (changed(ids=[0, 1, 2**31]), "field 'ids[2]' must be a token id"),
        (changed(ids=[0, 1]), "must have an element for each of the 2 ids; it has 3"),
        (changed(wrote=[1, 1, 1]), "field 'wrote[0]' must be true or false; got 1"),
        (changed(tool_calls=[{**changed()["tool_calls"][0], "ok": None}]), "'tool_calls[0].ok'"),
        (changed(seed=True), "field 'seed' must be a whole number"),
        (changed(tokens="abc"), "field 'tokens' must be a list"),
        ([1], "a JSON object is wanted; got list"),
    ],
)
def test_a_wrong_line_is_named_with_its_rule(row, line, tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [record()])
    with path.open("a") as file:
        file.write("\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_row_of_parquet_is_named(tmp_path):
    path = tmp_path / "r.parquet"
    rows = [to_dict(record()), changed(seed=None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match=r"r.parquet\[1\]: field 'seed' must be a whole number"):
        list(read_records(path))


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet", "r.txt"])
def test_a_file_that_is_missing_or_something_else_is_one_line(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(InputError, match=r"cannot be read|ends in .jsonl or .parquet"):
        list(read_records(path))
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"is not JSON|cannot be read|no parquet|ends in"):
        list(read_records(path))


def test_a_torn_last_line_is_left_out_with_a_note(tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [record(feedback="⊢ é")] * 2)
    whole = path.read_bytes()
    line = len(whole) // 2
    random.seed(0)
    for cut in [*random.sample(range(line + 1, 2 * line - 1), 20), whole.rindex("é".encode()) + 1]:
        path.write_bytes(whole[:cut])
        notes = []
        assert len([*read_records(path, notes)]) == 1
        assert notes == [f"{path}:2: the last line is torn, and left out"]
    with pytest.warns(UserWarning, match="torn"):
        list(read_records(path))


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [record()])
    path.write_bytes(path.read_bytes()[:40] + b"\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"r.jsonl:1: is not JSON .*; remove the line"):
        list(read_records(path))


@pytest.mark.parametrize("tail", ["", "torn", "unended"])
def test_a_writer_goes_on_where_a_crash_left_the_file(tail, tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [record(seed=1)])
    whole = path.read_bytes()
    path.write_bytes({"": whole, "torn": whole + whole[:50], "unended": whole[:-1]}[tail])
    with RecordWriter(path, parquet=tmp_path / "r.parquet") as writer:
        writer.write(record(seed=2))
        assert [r.seed for r in read_records(path)] == [1, 2], "a line is on disk at once"
    assert [r.seed for r in read_records(path.with_suffix(".parquet"))] == [1, 2]


def test_an_error_leaves_the_lines_and_no_parquet(tmp_path):
    path = tmp_path / "new" / "r.jsonl"

    def write_and_stop():
        with RecordWriter(path, parquet=path.with_suffix(".parquet")) as writer:
            writer.write(record())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert len([*read_records(path)]) == 1
    assert not path.with_suffix(".parquet").exists()


def test_a_signal_in_the_middle_of_a_write_waits_until_the_line_is_whole(tmp_path, monkeypatch):
    class Slow(io.BytesIO):
        def write(self, line):
            super().write(line[:10])
            os.kill(os.getpid(), signal.SIGINT)
            return 10 + super().write(line[10:])

    writer = RecordWriter(tmp_path / "r.jsonl")
    writer.close()
    monkeypatch.setattr(writer, "_file", Slow())
    with pytest.raises(KeyboardInterrupt):
        writer.write(record())
    assert json.loads(writer._file.getvalue()) == to_dict(record())


_ENDLESS = """
import sys
from pathlib import Path
from fdfast.rollout.records import RecordWriter, read_records
[one] = read_records(Path(sys.argv[1]))
with RecordWriter(Path(sys.argv[2])) as writer:
    print("go", flush=True)
    while True:
        writer.write(one)
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_as_it_writes_leaves_whole_lines(kill, tmp_path):
    source, path = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    write_jsonl(source, [record(prompt="x" * 300_000)])  # long: a write can be cut
    command = [sys.executable, "-c", _ENDLESS, str(source), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"go\n"
        while path.stat().st_size < 10 * source.stat().st_size:
            time.sleep(0.001)
        process.send_signal(kill)
    notes = []
    assert len([*read_records(path, notes)]) >= 9
    if kill == signal.SIGINT:
        assert not notes
        assert path.read_bytes().endswith(b"\n")


def test_without_pyarrow_a_writer_says_so_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError, match=r"need pyarrow .*; run: pip install 'fdfast\[data\]'"):
        RecordWriter(tmp_path / "r.jsonl", parquet=tmp_path / "r.parquet")
    assert not [*tmp_path.iterdir()]


TOKENIZER = tiny_tokenizer()


@given(st.lists(st.integers(0, 383), max_size=40))
def test_pieces_together_are_the_text_of_any_ids(ids):
    assert "".join(token_pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_split_character_stands_at_its_last_token(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    pieces = token_pieces(TOKENIZER, ids)
    assert "".join(pieces) == TOKENIZER.decode(ids) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
        for end in range(len(ids)):
            known = TOKENIZER.decode(ids[: end + 1]).rstrip("\ufffd")
            assert "".join(pieces[: end + 1]) == known


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self):
        self.count = 0

    def decode(self, ids, **options):
        self.count += len(ids)
        return TOKENIZER.decode(ids, **options)


def test_bytes_that_are_no_text_take_linear_time_and_hurt_nothing_after():
    [byte] = TOKENIZER.convert_tokens_to_ids(["Ģ"])  # 0x80, which begins no character
    after = TOKENIZER("∀ x", add_special_tokens=False).input_ids
    tokenizer = Counting()
    for count in (1, 15, 16, 17, 18, 19, 20, 4000):
        pieces = token_pieces(tokenizer, [byte] * count + after)
        assert "".join(pieces) == "\ufffd" * count + "∀ x"
    assert tokenizer.count < 4200 * 40


def llama_tokenizer():
    """As sentencepiece has it: no space before the first word, bytes where there is no token."""
    words = ["<unk>", "<0xE2>", "<0x88>", "<0x80>", "▁a", "▁b", "c", "▁"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


LLAMA = llama_tokenizer()


@given(st.lists(st.integers(0, 7), max_size=12))
def test_pieces_of_a_tokenizer_that_drops_the_first_space(ids):
    pieces, text = "".join(token_pieces(LLAMA, ids)), LLAMA.decode(ids)
    # A run of bytes with one too many makes its decoder take back the characters before.
    assert pieces == text or "\ufffd" in text


def test_words_and_bytes_of_such_a_tokenizer_stand_at_their_tokens():
    ids = [4, 5, 1, 2, 3, 5, 6]
    assert token_pieces(LLAMA, ids) == ["a", " b", "", "", "∀", " b", "c"]


def test_a_rollouts_record_reads_as_its_trajectory(tmp_path):
    from fdfast.models import load_model

    model, tokenizer = load_model(save_tiny_model(tmp_path / "tiny"))
    prompt = tokenizer("Why is the sky ∀?").input_ids
    options = SamplingOptions(max_completion_length=24)
    made = HFEngine(model, tokenizer).generate([prompt] * 8, options, seed=0)
    rows = [make_record(Problem("sky", "Why?"), t, tokenizer, seed=0) for t in made]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert exact(read_records(tmp_path / "r.jsonl")) == exact(rows)
    for row in rows:
        assert row.prompt == "Why is the sky ∀?"
        assert row.text == tokenizer.decode(row.trajectory.ids)


def test_the_answer_is_the_last_turns_tokens_without_special_ones(tmp_path, monkeypatch):
    from fdfast.models import load_model

    model, tokenizer = load_model(save_tiny_model(tmp_path / "tiny"))
    engine = HFEngine(model, tokenizer)
    turns = ['∀ 😀 <tool_call>{"name": "echo"}</tool_call>', "so: 😀 ⊢ é"]
    script(monkeypatch, tokenizer, engine.end_ids[0], lambda _number: turns)
    answers = SimpleNamespace(schemas=[], call=lambda *_: ToolResult("heard 😀", 0.0, ok=True))
    options = SamplingOptions(max_completion_length=200)
    [made] = engine.generate([[5, 6]], options, seed=0, tools=lambda _number: answers)
    row = make_record(Problem("p", "?"), made, tokenizer)
    marks = [*itertools.accumulate(not wrote for wrote in made.wrote)]
    last = [token for token, mark in zip(row.tokens, marks, strict=True) if mark == marks[-1]]
    assert "".join(last[1:]).removesuffix("<|im_end|>") == made.text == turns[1]
    assert row.text.startswith(turns[0] + "<|im_end|>")
    assert "heard 😀" in row.text


def test_log_ratios_are_those_of_what_the_model_wrote():
    told = dataclasses.replace(record().trajectory, wrote=[True, False, True])
    row = record(trajectory=told, student_logprobs=[-1.0, 0.0, -2.0])
    assert row.log_ratios == [0.5, 0.0, 1.5]
    assert record(student_logprobs=None).log_ratios is None
    assert from_dict(to_dict(row)) == row
