"""Files are whole or not there."""

import multiprocessing
import time

import pytest

from fdfast.files import atomic_dir, atomic_file, build_once, cache_dir


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
