"""Files are whole or not there."""

import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest

from fdfast.files import (
    MANIFEST,
    atomic_dir,
    atomic_file,
    build_once,
    cache_dir,
    damage,
    remove_leftovers,
    write_manifest,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fill_the_disk():
        with atomic_file(path) as temporary:
            temporary.write_text("new, but")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_succeeds_takes_the_place(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_kept(tmp_path):
    path = tmp_path / "d"
    with atomic_dir(path) as temporary:
        (temporary / "a").write_text("old")

    def interrupted():
        with atomic_dir(path) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "a").read_text() == "old"
    with atomic_dir(path) as temporary:
        (temporary / "b").write_text("new")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def slow_build(folder):
    time.sleep(0.3)
    (folder / "part").write_text("1")
    with (folder.parent / "builds").open("a") as file:
        file.write("x")


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=build_once, args=(tmp_path / "it", slow_build)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "builds").read_text() == "x"
    assert (tmp_path / "it" / "part").read_text() == "1"


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FDFAST_CACHE", raising=False)
    assert cache_dir() == tmp_path / "fdfast"
    monkeypatch.setenv("FDFAST_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.chdir(tmp_path)  # a relative one means the same file from every working folder
    monkeypatch.setenv("FDFAST_CACHE", "own")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FDFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", ".")
    assert cache_dir() == tmp_path / "fdfast"


def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_it_returns(
    tmp_path, monkeypatch
):
    """What a power cut would leave can't be tested here; the order of the calls can."""
    events, fsync, replace = [], os.fsync, Path.replace

    def syncing(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def replacing(self, target):
        events.append(("rename", target))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    with atomic_dir(tmp_path / "d") as temporary:
        (temporary / "below").mkdir()
        for name in ("a", "below/b"):
            (temporary / name).write_text("x")
    renamed = events.index(("rename", tmp_path / "d"))
    before = {path for kind, path in events[:renamed] if kind == "sync"}
    inside = {temporary / name for name in ("a", "below", "below/b")}
    assert before == {temporary} | inside
    assert events[renamed + 1 :] == [("sync", tmp_path)]
    events.clear()
    with atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("x")
    assert events == [("sync", temporary), ("rename", tmp_path / "f"), ("sync", tmp_path)]


@pytest.fixture
def listed(tmp_path):
    folder = tmp_path / "saved"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(bytes(range(256)) * 40)
    (folder / "state").write_bytes(b"state")
    write_manifest(folder)
    return folder


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_whole_folder_is_whole(listed):
    assert damage(listed) == ""
    assert damage(listed, checksums=False) == ""


def test_every_kind_of_damage_is_found_and_named(listed):
    weights = listed / "model" / "weights"
    whole = weights.read_bytes()
    for bit in (0, 4095, len(whole) * 8 - 1):
        flip(weights, bit)
        assert damage(listed) == "model/weights is not what was written: its SHA-256 differs"
        assert damage(listed, checksums=False) == "", "sizes alone do not show it, as documented"
        weights.write_bytes(whole)
    for cut in (0, 1, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        said = f"model/weights has {cut} bytes instead of {len(whole)}"
        assert damage(listed) == said
        assert damage(listed, checksums=False) == said
    weights.unlink()
    assert "model/weights can't be read (No such file" in damage(listed)


def test_a_manifest_that_is_torn_or_missing_is_damage(listed):
    text = (listed / MANIFEST).read_text()
    for torn in ("", text[: len(text) // 2], "[]", '{"files": {"state": 3}}'):
        (listed / MANIFEST).write_text(torn)
        assert damage(listed).startswith(f"{MANIFEST} can't be read (")
    (listed / MANIFEST).unlink()
    assert damage(listed) == f"it has no {MANIFEST}, which is written last"


def test_leftovers_of_our_own_names_alone_are_removed(tmp_path):
    ours = [".checkpoint-3.123.0a1b2c3d", ".metrics.jsonl.7.ffffffff"]
    others = [".checkpoint-3.123.0a1b2c3d.x", ".checkpoint-x.1.0a1b2c3d", ".notes.1.0a1b2c3d"]
    others += [".lock", "checkpoint-3", ".checkpoint-3"]
    for name in (ours[0], *others):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / ours[1]).write_text("half")
    remove_leftovers(tmp_path, re.compile(r"checkpoint-\d+|metrics\.jsonl"))
    assert {path.name for path in tmp_path.iterdir()} == set(others)
