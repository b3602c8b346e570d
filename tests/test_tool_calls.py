"""Tool calls are read as the templates write them, and what is none says why."""

import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fdfast.rollout.tool_calls import FORMS, Call, read_calls

HERMES, XML, LLAMA = FORMS["hermes"], FORMS["qwen3-coder"], FORMS["llama"]
SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "properties": {
                    "s": {"type": "string"},
                    "b": {"type": "boolean"},
                    "n": {"type": "integer"},
                    "o": {"type": "object"},
                    "z": {"type": ["number", "null"]},
                }
            },
        },
    }
]


def xml(name, **values):
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def hermes(text):
    return f"<tool_call>\n{text}\n</tool_call>"


def arguments(calls):
    [call] = calls
    assert not call.fault
    return json.loads(call.arguments)


MARKS = ["</tool_call>", "</parameter>", "<think>", "<tool_call>", "</function>", ";", "{", "\n"]
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(MARKS), max_size=5
).map("".join)


@given(TEXTS, TEXTS)
def test_any_text_comes_through_json_calls_unchanged(first, second):
    records = [{"name": "f", "arguments": {"s": text}} for text in (first, second)]
    text = "I see.\n" + "\n".join(hermes(json.dumps(r, ensure_ascii=False)) for r in records)
    assert [json.loads(c.arguments)["s"] for c in read_calls(text, HERMES)] == [first, second]
    records = [{"name": "f", "parameters": r["arguments"]} for r in records]
    for separator in (";", "\n", " ; "):
        text = separator.join(json.dumps(r) for r in records)
        for begin in ("", "<|python_tag|>", "\n"):
            calls = read_calls(begin + text, LLAMA)
            assert [json.loads(c.arguments)["s"] for c in calls] == [first, second]


@given(TEXTS)
def test_any_text_comes_through_xml_calls_unchanged(text):
    # What looks like the value's end is taken for it: the form has no escapes.
    assume(not re.search(r"</parameter>\s*(</function>|$)", text))
    calls = read_calls("I see.\n" + xml("f", b="true", s=text) + xml("g"), XML, SCHEMAS)
    assert calls[1] == Call("g", "{}")
    assert arguments(calls[:1]) == {"b": True, "s": text}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"s": "true"}, {"s": "true"}),
        ({"s": "12"}, {"s": "12"}),
        ({"s": "  by\n  simp\n"}, {"s": "  by\n  simp\n"}),
        ({"b": "True"}, {"b": True}),
        ({"b": "false"}, {"b": False}),
        ({"b": "maybe"}, {"b": "maybe"}),
        ({"n": " 3 "}, {"n": 3}),
        ({"o": '{"a": [1]}'}, {"o": {"a": [1]}}),
        ({"z": "None"}, {"z": None}),
        ({"z": "0.5"}, {"z": 0.5}),
        ({"unknown": "3"}, {"unknown": "3"}),
    ],
)
def test_xml_values_have_the_schemas_types(written, read):
    assert arguments(read_calls(xml("f", **written), XML, SCHEMAS)) == read


def test_xml_values_on_the_line_of_their_marks_are_read_too():
    text = "<tool_call><function=f><parameter=s>a b</parameter></function></tool_call>"
    assert arguments(read_calls(text, XML, SCHEMAS)) == {"s": "a b"}


@pytest.mark.parametrize(
    ("form", "text", "fault"),
    [
        (HERMES, hermes("{oops"), "the call is not JSON (Expecting property name"),
        (HERMES, hermes('{"name": "f"}}'), "the call is not JSON (text follows the object)"),
        (HERMES, hermes("[" * 100_000), "the call is not JSON"),
        (HERMES, hermes('{"name": "f", "arguments": {"n": ' + "1" * 5000 + "}}"), "the call is"),
        (HERMES, hermes('{"arguments": {}}'), 'a call is {"name": ..., "arguments": {...}}'),
        (HERMES, hermes('{"name": ""}'), "a call is"),
        (HERMES, hermes('{"name": "\\ud835"}'), "a call is"),
        (HERMES, hermes('{"name": 3}'), "a call is"),
        (HERMES, hermes('["f"]'), "a call is"),
        (HERMES, hermes('{"name": "f", "arguments": [1]}'), "a call is"),
        (HERMES, xml("f", s="a"), "the call is not JSON"),
        (HERMES, '<tool_call>{"name": "f"}', "the call is not closed; end it with </tool_call>"),
        (HERMES, "<tool_call>", "the call is not closed"),
        (XML, hermes('{"name": "f"}'), "a call is <tool_call><function=NAME>"),
        (XML, hermes("<function=>"), "a call is <tool_call><function=NAME>"),
        (XML, xml("f", s="a").removesuffix("</tool_call>"), "the call is not closed"),
        (XML, hermes("<function=f><parameter=s>a</function>"), "the call is not closed"),
        (XML, hermes("<function=f><parameter=s>a</parameter>"), "the call is not closed"),
        (
            XML,
            hermes("<function=f><parameter=s>a<parameter=b>true</parameter></function>"),
            "parameter s is not closed; end it with </parameter>",
        ),
        (
            XML,
            hermes("<function=f>" + "<parameter=s>a</parameter>" * 2 + "</function>"),
            "parameter s is given twice",
        ),
        (LLAMA, '{"name": "f", "parameters": {', "the call is not JSON"),
        (LLAMA, '{"parameters": {}}', 'a call is {"name": ..., "parameters": {...}}'),
        (LLAMA, "<|python_tag|>print(1)", "the call is not JSON"),
        (LLAMA, "<|python_tag|>", "the call is not JSON"),
    ],
)
def test_a_broken_call_says_what_is_wrong(form, text, fault):
    [call] = read_calls(text, form, SCHEMAS)
    assert call.name == ""
    assert call.fault.startswith(fault)
    assert "\n" not in call.fault


def test_what_follows_a_broken_call_is_read():
    calls = read_calls(hermes("{oops") + hermes('{"name": "f"}'), HERMES)
    assert [bool(call.fault) for call in calls] == [True, False]
    calls = read_calls(hermes("oops") + xml("f"), XML)
    assert [bool(call.fault) for call in calls] == [True, False]
    calls = read_calls('{"name": "f"} and so on', LLAMA)
    assert [call.name for call in calls] == ["f", ""]
    assert calls[1].fault.startswith("what follows a call is not JSON")


def test_llama_calls_are_the_whole_turn():
    for text in ("", "Proved.", 'I call {"name": "f"}', "{ x | x > 0 } is open", "```\n{}\n```"):
        assert read_calls(text, LLAMA) == []


def test_a_call_that_is_quoted_in_thinking_is_none():
    first, second = hermes('{"name": "f"}'), hermes('{"name": "g"}')
    for form, quoted, real in (
        (HERMES, first, second),
        (XML, xml("f"), xml("g")),
        (LLAMA, '{"name": "f"}', '{"name": "g"}'),
    ):
        thought = f"<think>\nMaybe {quoted}\n"
        assert [c.name for c in read_calls(f"{thought}</think>\n\n{real}", form)] == ["g"]
        assert read_calls(f"{thought}</think>\nDone.", form) == []
        assert read_calls(thought, form) == [], "the turn was cut in its thinking"
        # Where the template opened the block, the turn begins within it.
        within = thought.removeprefix("<think>")
        assert read_calls(within, form, thinking=True) == []
        assert [c.name for c in read_calls(f"{within}</think>{real}", form, thinking=True)] == ["g"]
    between = f"{first}<think>{first}</think>{second}"
    assert [c.name for c in read_calls(between, HERMES)] == ["f", "g"]


def test_think_is_a_word_within_a_call():
    call = hermes('{"name": "f", "arguments": {"s": "-- <think>"}}')
    assert [c.name for c in read_calls(call * 2, HERMES)] == ["f", "f"]
    assert [c.name for c in read_calls(xml("f", s="<think>") * 2, XML)] == ["f", "f"]


def test_arguments_in_a_string_stay_as_they_are():
    [call] = read_calls(hermes('{"name": "f", "arguments": "{\\"s\\": \\"\\ud835\\"}"}'), HERMES)
    assert call == Call("f", '{"s": "\\ud835"}')
    call.arguments.encode()
