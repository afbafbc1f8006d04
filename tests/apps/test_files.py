"""Files that are whole at every moment, and directories that one run at a time works in."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest

from fused_lora import files


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_have_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_whole({tmp_path / "a/b": b"content"})
        files.write_json(tmp_path / "c.json", {"x": 1})
    finally:
        os.umask(before)
    for name in ("a/b", "c.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_write_json(tmp_path):
    files.write_json(tmp_path / "c.json", {"x": [1, "é"]})
    text = (tmp_path / "c.json").read_text()
    assert json.loads(text) == {"x": [1, "é"]} and text.endswith("}\n")


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch/file")
    for content in (b"first", b"second"):
        files.write_whole({tmp_path / "link": content})
        assert (tmp_path / "link").is_symlink() and (tmp_path / "scratch/file").read_bytes() == content
    assert os.listdir(tmp_path / "scratch") == ["file"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole({tmp_path / "pipe": b"content"})
    assert os.read(reader, 100) == b"content" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)
    files.write_whole({tmp_path / "file": b"x"})
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_a_claimed_directory_refuses_a_second_run_and_nothing_is_left(tmp_path):
    with files.claimed(tmp_path / "a/out", pytest.fail):
        with (
            pytest.raises(BlockingIOError, match="another run is at work in it.*a/out"),
            files.claimed(tmp_path / "a/out", pytest.fail),
        ):
            pytest.fail("claimed twice")
        assert (tmp_path / "a/out").is_dir(), "the refused run must not remove what is another's"
    assert os.listdir(tmp_path / "a") == []
    with files.claimed(tmp_path / "a", pytest.fail):
        (tmp_path / "a/file").write_text("kept")
    assert os.listdir(tmp_path / "a") == ["file"]


def test_the_lock_of_a_killed_run_does_not_stay(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fused_lora import files\n"
        "with files.claimed(Path(sys.argv[1]), print):\n    print('claimed', flush=True)\n    time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "claimed\n"
    with pytest.raises(BlockingIOError), files.claimed(tmp_path, pytest.fail):
        pytest.fail("claimed twice")
    run.kill()
    run.communicate()
    assert os.listdir(tmp_path) == [files.LOCK]
    with files.claimed(tmp_path, pytest.fail):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_went_between_open_and_lock_does_not_count(tmp_path, monkeypatch):
    """The owner removes its lock file while another waits with it open: the other must take the new one."""
    real, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / files.LOCK).unlink()
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.claimed(tmp_path, pytest.fail):
        assert len(calls) == 2 and (tmp_path / files.LOCK).exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with files.claimed(tmp_path, said.append):
        pass
    assert len(said) == 1 and "has no locks" in said[0] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device.*/out'"), files.claimed(tmp_path / "out", pytest.fail):
        pytest.fail("claimed")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_run_go(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom fused_lora import files\n"
        "os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_whole({Path(sys.argv[1]): b'content'})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "ours.bin")])
    (tmp_path / ".other.bin.0123456789abcdef.tmp").write_text("")
    assert len(os.listdir(tmp_path)) == 2
    files.remove_leftovers(tmp_path, ("ours.bin",))
    assert os.listdir(tmp_path) == [".other.bin.0123456789abcdef.tmp"]


def test_space(tmp_path, monkeypatch):
    files.check_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"No space left on device: needs 1e\+09 GB, .* GB are free.*"):
        files.check_space(tmp_path, 10**18)
    zeros = os.statvfs_result([0] * 10)
    monkeypatch.setattr(os, "statvfs", lambda path: zeros)
    files.check_space(tmp_path, 10**18)
