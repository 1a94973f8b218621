"""Files that appear whole or not at all."""

import multiprocessing
import os
import signal

import pytest

from pixclip_hf.data.whole_files import whole_file


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("ne")
        assert path.read_text() == "old" and unfinished.name.startswith(".") and unfinished.parent == tmp_path
        unfinished.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as unfinished:
        unfinished.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing was written
    assert path.read_text() == "old"


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor):
        steps.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda source, target: (steps.append(target), replace(source, target)))
    with whole_file(tmp_path / "a") as unfinished:
        unfinished.write_text("x")
        file = unfinished.stat().st_ino
    assert steps == [file, tmp_path / "a", tmp_path.stat().st_ino]


def write_and_die(path):
    with whole_file(path) as unfinished:
        unfinished.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_the_file_as_it_was(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=[tmp_path / "a.parquet"])
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.parquet.") and left.endswith(".tmp")


def test_writers_of_one_file_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" and os.listdir(tmp_path) == ["a"]
