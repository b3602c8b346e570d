"""An agent's tools: what they do, what they refuse, and that nothing leaves the work folder."""

import ctypes
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdfast.errors import InputError, MachineError
from fdfast.lean import LeanPool
from fdfast.lean.filecheck import Checked
from fdfast.lean.tools import SCHEMAS, Limits, Toolbox, ToolResult
from fdfast.lean.verdict import Message
from fdfast.lean.workfolder import Refused, WorkFolder
from tests.tiny import tiny_tokenizer


def no_check(text: str, timeout_s: float) -> Checked:
    raise AssertionError(f"checked: {text!r}")


@pytest.fixture(scope="module")
def pool() -> Iterator[LeanPool]:
    with LeanPool(workers=1) as made:
        yield made


@pytest.fixture
def box(tmp_path: Path, pool: LeanPool) -> Iterator[Toolbox]:
    (tmp_path / "work").mkdir()
    (tmp_path / "library" / "Order").mkdir(parents=True)
    (tmp_path / "library" / "Order" / "Basic.lean").write_text("theorem le : True := trivial\n")
    with Toolbox(tmp_path / "work", pool.check_file, {"Lib": tmp_path / "library"}) as made:
        yield made


def call(box: Toolbox, name: str, **arguments: object) -> ToolResult:
    return box.call(name, json.dumps(arguments))


def test_a_file_is_written_checked_and_mended(box: Toolbox) -> None:
    wrong = "theorem swap (a b : Prop) (h : And a b) : And b a :=\n  h\n"
    written = call(box, "write_file", path="Lemmas/Swap.lean", content=wrong)
    assert (written.text, written.ok) == ("Lemmas/Swap.lean is written: 2 lines.", True)
    checked = call(box, "check_file", path="Lemmas/Swap.lean")
    assert checked.ok
    assert checked.seconds > 0
    first, second = checked.text.split("\n")[:2]
    assert first == "Lemmas/Swap.lean: 1 error, 0 warnings."
    assert second.startswith("Lemmas/Swap.lean:2:2: error: ")
    right = wrong.replace("  h\n", "  And.intro h.right h.left\n")
    call(box, "write_file", path="Lemmas/Swap.lean", content=right)
    checked = call(box, "check_file", path="Lemmas/Swap.lean")
    assert checked.text == "Lemmas/Swap.lean: 0 errors, 0 warnings."
    assert box.files() == {"Lemmas/Swap.lean": right}


def test_imports_that_are_not_there_are_an_error_of_the_file(box: Toolbox) -> None:
    call(box, "write_file", path="A.lean", content="import Mathlib\n")
    assert (
        "A.lean:1:0: error: header imports Mathlib" in call(box, "check_file", path="A.lean").text
    )
    text = "prelude\nimport FdBase\ntheorem t : True := True.intro"
    call(box, "write_file", path="A.lean", content=text)
    assert "0 errors" in call(box, "check_file", path="A.lean").text


def test_a_library_is_searched(box: Toolbox) -> None:
    found = call(box, "search_library", pattern=r"^theorem \w+", path="Order/")
    assert (found.text, found.ok) == ("Lib/Order/Basic.lean:1: theorem le : True := trivial", True)
    assert call(box, "search_library", pattern="THEOREM").text == "No line matches."
    assert "le : True" in call(box, "search_library", pattern="THEOREM", ignore_case=True).text


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("rm", "{}", "there is no tool 'rm'; the tools are write_file, check_file, search_library"),
        ("check_file", "{", "check_file: the arguments are not JSON ("),
        ("check_file", "[" * 100_000, "check_file: the arguments are not JSON ("),
        ("check_file", "[]", "check_file: the arguments must be a JSON object; got list; write"),
        (
            "check_file",
            "{}",
            "check_file: argument 'path' is missing; check_file takes path (needed",
        ),
        ("check_file", '{"path": 3}', "check_file: argument 'path' must be a string; got int"),
        ("check_file", '{"file": "A.lean"}', "check_file has no argument 'file'; check_file takes"),
        ("check_file", '{"path": "A.lean"}', "A.lean is not read: there is no such file; write it"),
        ("check_file", " " * 300_000, "check_file: the arguments have 300000 characters, at most"),
        (
            "write_file",
            '{"path": "A.lean", "content": "\\ud800"}',
            "A.lean is not written: the text",
        ),
        (
            "write_file",
            '{"path": "A.lean", "content": "\\u0000"}',
            "A.lean is not written: the text",
        ),
        (
            "write_file",
            '{"path": "\\ud800.lean", "content": ""}',
            "path '\\ud800.lean' is not allow",
        ),
        ("search_library", '{"pattern": "("}', "search_library: pattern '(' is no regular express"),
        ("search_library", '{"pattern": ""}', "search_library: pattern must have 1 to 500 charact"),
        ("search_library", '{"pattern": "\\udc00"}', "search_library: the text is no Unicode"),
        (
            "search_library",
            '{"pattern": "a", "ignore_case": "yes"}',
            "search_library: argument 'ignore_case' must be a boolean; got str",
        ),
    ],
)
def test_what_the_model_did_wrong_is_answered(
    box: Toolbox, name: str, arguments: str, answer: str
) -> None:
    result = box.call(name, arguments)
    assert not result.ok
    assert result.text.startswith(answer)
    assert len(result.text) < 400
    assert "\n" not in result.text


def test_arguments_may_come_parsed_and_null_is_left_out(box: Toolbox) -> None:
    assert box.call("write_file", {"path": "A.lean", "content": "x"}).ok
    assert box.call("search_library", {"pattern": "le", "path": None}).ok


PATHS = [
    *("/etc/passwd.lean", "../A.lean", "a/../../A.lean", "./A.lean", "a//A.lean", "", ".", ".."),
    *("~/A.lean", "A.olean", "lakefile.lean", "A", ".lean", ".hidden.lean", "-A.lean", "a b.lean"),
    *(
        "a\\..\\A.lean",
        "A.lean/",
        "A\n.lean",
        "a/b/c/d/e.lean",
        f"{'a' * 200}.lean",
        "%2e%2e/A.lean",
    ),
]


@pytest.mark.parametrize("path", PATHS)
def test_other_paths_than_plain_ones_are_refused(box: Toolbox, tmp_path: Path, path: str) -> None:
    for name, more in (("write_file", {"content": "x"}), ("check_file", {})):
        result = call(box, name, path=path, **more)
        assert not result.ok
        assert result.text.startswith("path ")
        assert "use a relative path such as 'Main.lean'" in result.text
    assert list((tmp_path / "work").iterdir()) == []


names = st.sampled_from(["..", ".", "", "a", "A.lean", "link", "file.lean", "/", "~", "etc", "\0"])
any_path = st.one_of(
    st.text(max_size=20),
    st.lists(names, max_size=5).map("/".join),
    st.lists(names, max_size=4).map(lambda parts: "/".join(parts) + "/x.lean"),
)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@given(st.lists(any_path, min_size=1, max_size=4))
def test_no_path_reaches_out_of_the_work_folder(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str]
) -> None:
    base = tmp_path_factory.mktemp("agent")
    (base / "work").mkdir()
    (base / "outside").mkdir()
    (base / "outside" / "secret.lean").write_text("secret")
    (base / "work" / "link").symlink_to(base / "outside")
    (base / "work" / "file.lean").symlink_to(base / "outside" / "secret.lean")
    before = tree(base / "outside")
    with Toolbox(base / "work", lambda text, timeout_s: Checked((), text)) as box:
        for path in paths:
            assert "secret" not in box.call("check_file", {"path": path}).text
            box.call("write_file", {"path": path, "content": "written"})
            assert all("secret" not in text for text in box.files().values())
    assert tree(base / "outside") == before
    assert set(os.listdir(base)) == {"work", "outside"}
    assert all(data == b"written" for data in tree(base / "work").values())


def test_a_folder_that_becomes_a_link_during_the_use_leads_nowhere(tmp_path: Path) -> None:
    work, outside = tmp_path / "work", tmp_path / "outside"
    for folder in (work / "a", outside):
        folder.mkdir(parents=True)
    (work / "link").symlink_to(outside)
    (outside / "x.lean").write_text("secret")
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    names = [os.fsencode(work / name) for name in ("a", "link")]
    stop = threading.Event()

    def swap() -> None:  # the folder and the link take each other's name, as fast as can be
        while not stop.is_set():
            assert rename(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = set()
    files = WorkFolder(work, file_bytes=1000, num_files=100)
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            for use in (lambda: files.write("a/x.lean", "mine"), lambda: files.read("a/x.lean")):
                try:
                    assert use() in (None, "mine")
                    outcomes.add("done")
                except Refused as refused:
                    outcomes.add("link" if "(or a link)" in str(refused) else str(refused))
    finally:
        stop.set()
        thread.join()
        files.close()
    assert {"done", "link"} <= outcomes  # both were met, or there was no race
    assert (outside / "x.lean").read_text() == "secret"
    assert os.listdir(outside) == ["x.lean"]


def test_links_pipes_and_folders_in_the_place_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.lean").write_text("secret")
    work = tmp_path / "work"
    work.mkdir()
    (work / "link.lean").symlink_to(tmp_path / "outside.lean")
    os.mkfifo(work / "pipe.lean")
    (work / "folder.lean").mkdir()
    (work / "plain.lean").write_text("x")
    (work / "bytes.lean").write_bytes(b"\xff")
    with Toolbox(work, no_check, limits=Limits(check_seconds=5)) as box:
        for path, reason in (
            ("link.lean", "it is a symbolic link"),
            ("pipe.lean", "it is no regular file"),
            ("folder.lean", "it is "),
            ("plain.lean/x.lean", "a part of the path is a file"),
            ("bytes.lean", "no UTF-8 at byte 0"),
        ):
            assert f"{path} is not read: {reason}" in call(box, "check_file", path=path).text
        assert "it is a folder" in call(box, "write_file", path="folder.lean", content="").text
        assert call(box, "write_file", path="link.lean", content="mine").ok
    assert (tmp_path / "outside.lean").read_text() == "secret"
    assert not (work / "link.lean").is_symlink()


def test_size_number_and_output_are_limited_and_say_so(tmp_path: Path) -> None:
    def many(text: str, timeout_s: float) -> Checked:
        return Checked(tuple(Message("error", n, 0, "x" * 50) for n in range(1, 100)))

    limits = Limits(file_bytes=20, num_files=2, output_chars=400)
    with Toolbox(tmp_path, many, limits=limits) as box:
        long = call(box, "write_file", path="A.lean", content="é" * 11)
        assert long.text.startswith(
            "A.lean is not written: it has 22 bytes, at most 20 are allowed"
        )
        for path in ("A.lean", "B/B.lean", "A.lean"):
            assert call(box, "write_file", path=path, content="x").ok
        third = call(box, "write_file", path="C.lean", content="x")
        assert "there are 2 files, at most 2 are allowed; write over one of them" in third.text
        text = call(box, "check_file", path="A.lean").text
        assert len(text) <= 400
        assert text.startswith("A.lean: 99 errors, 0 warnings.\nA.lean:1:0: error: xxx")
        kept, _, note = text.rpartition("\n")
        whole = len("A.lean: 99 errors, 0 warnings.") + sum(
            len(f"\nA.lean:{n}:0: error: ") + 50 for n in range(1, 100)
        )
        assert note == f"[cut: {whole - len(kept)} more characters]"


@pytest.mark.parametrize(
    "text",
    [
        "#eval 1",
        "run_cmd foo",
        "elab x : y",
        "macro x : y",
        "initialize x",
        "unsafe def x := 1",
        "simproc x := y",
        "@[init] def x := y",
        "def x := IO.FS.removeFile",
        "open IO FS\ndef x := removeFile",
        "theorem t : by_elab x := y",
    ],
)
def test_files_that_run_code_while_they_compile_are_not_compiled(tmp_path: Path, text: str) -> None:
    with Toolbox(tmp_path, no_check) as box:
        call(box, "write_file", path="A.lean", content=text)
        result = call(box, "check_file", path="A.lean")
    assert not result.ok
    assert result.text.startswith("A.lean is not checked: `")


def test_a_check_that_does_not_end_says_so(tmp_path: Path, pool: LeanPool) -> None:
    text = "theorem t (a : Prop) (h : a) : a := h\n"
    with Toolbox(tmp_path, pool.check_file, limits=Limits(check_seconds=0.001)) as box:
        call(box, "write_file", path="A.lean", content=text)
        result = call(box, "check_file", path="A.lean")
    assert "A.lean: not finished: Lean was still busy after 0.001 s" in result.text


def test_the_machines_faults_are_raised(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"work folder .*absent cannot be opened"):
        Toolbox(tmp_path / "absent", no_check)
    with pytest.raises(InputError, match="library 'Lib' must be a folder"):
        Toolbox(tmp_path, no_check, {"Lib": tmp_path / "absent"})
    with pytest.raises(InputError, match="Limits: num_files must be positive; got 0"):
        Limits(num_files=0)
    box = Toolbox(tmp_path, no_check)
    box.close()
    for name, more in (("write_file", {"content": "x"}), ("check_file", {})):
        with pytest.raises(InputError, match="the work folder is closed"):
            call(box, name, path="A.lean", **more)


# The part about tools of the template of Qwen's models: the schemas as JSON, one a line, and calls.
QWEN_LIKE = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}{%- for tool in tools %}"
    "{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    '{%- for call in m.tool_calls or [] %}{{- \'<tool_call>\n{"name": "\' }}'
    '{{- call.function.name }}{{- \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
)


def test_chat_templates_render_the_schemas(box: Toolbox) -> None:
    tokenizer = tiny_tokenizer(chat_template=QWEN_LIKE)
    arguments = {"path": "A.lean"}
    messages = [
        {"role": "user", "content": "Prove it."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "check_file", "arguments": arguments}}
            ],
        },
    ]
    text = tokenizer.apply_chat_template(messages, tools=box.schemas, tokenize=False)
    block = text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in block.split("\n")] == list(SCHEMAS.values())
    asked = json.loads(text.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0])
    assert "there is no such file" in box.call(asked["name"], asked["arguments"]).text


def test_without_a_library_there_is_no_search(tmp_path: Path) -> None:
    with Toolbox(tmp_path, no_check) as box:
        names = [schema["function"]["name"] for schema in box.schemas]
        assert names == ["write_file", "check_file"]
        assert "there is no tool 'search_library'" in call(box, "search_library", pattern="x").text


def test_the_work_folder_may_go_while_it_is_used(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with Toolbox(work, no_check) as box:
        shutil.rmtree(work)
        result = call(box, "write_file", path="A.lean", content="x")
    assert "A.lean is not written: there is no such file" in result.text
