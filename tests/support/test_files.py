"""Files are written whole or not at all, and read once, from regular files only, within a limit."""

import errno
import os
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import file_writers
import pytest
import torch
from file_writers import content, is_whole

from sparsifai.support import files
from sparsifai.support.files import open_regular, read_bytes, write_whole

LIMIT = 1_000_000


def write_text(path, text="new"):
    write_whole(path, lambda file: file.write(text.encode()))


def start(task, path, number):
    """A process of tests/file_writers.py."""
    command = [sys.executable, file_writers.__file__, task, str(path), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the limit of the size of files is tested everywhere")
    yield folder
    subprocess.run(["umount", folder], check=True)


# --- Writing ------------------------------------------------------------------------------------------------------


def test_a_new_file_has_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path):
    path = tmp_path / "file"
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o000, 0o666)):
        with umask(mask):
            write_text(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.unlink()
    for mode in (0o640, 0o755, 0o600, 0o666):
        path.write_text("old")
        path.chmod(mode)
        with umask(0o077):
            write_text(path)
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files to others")
def test_the_owner_is_kept_where_that_is_allowed(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 1234, 4321)
    write_text(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "link").symlink_to("folder/file")
    (tmp_path / "link to link").symlink_to(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("folder/none")
    write_text(tmp_path / "link to link")
    write_text(tmp_path / "dangling", "none before")
    assert [os.readlink(tmp_path / name) for name in ("link", "dangling")] == ["folder/file", "folder/none"]
    assert (tmp_path / "link to link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert (tmp_path / "folder" / "none").read_text() == "none before"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "folder", "link", "link to link"]
    assert sorted(os.listdir(tmp_path / "folder")) == ["file", "none"]


@contextmanager
def other_kinds(folder):
    """Paths that are no regular files, and the word in the error."""
    with socket.socket(socket.AF_UNIX) as listening:
        os.mkfifo(folder / "pipe")
        before = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        listening.bind("socket")
        os.chdir(before)
        (folder / "folder").mkdir()
        (folder / "link").symlink_to("pipe")
        yield {
            folder / "pipe": "a pipe", folder / "socket": "a socket", folder / "folder": "a folder",
            folder / "link": "a pipe", "/dev/zero": "a device", "/dev/null": "a device",
        }  # fmt: skip


def test_other_kinds_of_files_are_never_replaced_and_never_read(tmp_path):
    with other_kinds(tmp_path) as kinds:
        for path, word in kinds.items():
            before = os.lstat(path)
            with pytest.raises(OSError, match=f"it is {word}; pass the name of a .*{path}") as raised:
                write_text(path)
            assert isinstance(raised.value, IsADirectoryError) == (word == "a folder")
            for read in (open_regular, lambda path: read_bytes(path, LIMIT, "a test")):
                match = "No such device" if word == "a socket" else f"it is {word}; pass the name of a .*{path}"
                with pytest.raises(OSError, match=match):
                    read(path)
            assert os.lstat(path)[:3] == before[:3]
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe", "socket"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"the folder does not exist; create it first: '{tmp_path}/none'"):
        write_text(tmp_path / "none" / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        write_text(tmp_path / "loop")


def test_a_protected_file_is_not_replaced():
    user = os.geteuid()
    with TemporaryDirectory() as folder:  # others may not enter the folders of pytest
        path = Path(folder) / "file"
        path.write_text("old")
        path.chmod(0o444)
        if user == 0:  # root may write everything
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=f"it is protected against writing: '{path}'"):
                write_text(path)
        finally:
            os.seteuid(user)
        assert path.read_text() == "old"


def test_names_of_other_files_do_not_matter(tmp_path):
    others = ["file.part", "file.tmp", ".file", ".sparsifai-.tmp"]
    for name in others:
        (tmp_path / name).write_text(name)
    write_text(tmp_path / "file")
    write_text(tmp_path / ("a" * 255))
    assert all((tmp_path / name).read_text() == name for name in others)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "file", "a" * 255])


# --- Failures while writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError("no number"), MemoryError()])
def test_an_error_of_the_writing_function_leaves_the_old_file(tmp_path, error):
    def fail(file):
        file.write(b"half")
        raise error

    for earlier in (False, True):
        path = tmp_path / "file"
        if earlier:
            path.write_text("old")
        with pytest.raises(type(error)) as raised:
            write_whole(path, fail)
        assert raised.value is error
        assert os.listdir(tmp_path) == ["file"] * earlier
        assert not earlier or path.read_text() == "old"


def test_an_error_of_the_disk_that_the_writing_function_hides_is_raised(tmp_path, full_disk):
    def hide(file):
        for _ in range(20):
            try:
                file.write(bytes(10_000))
            except OSError:
                return

    with pytest.raises(OSError, match="No space left on device; the file was not written") as raised:
        write_whole(full_disk / "file", hide)
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(full_disk) == []


def test_every_call_of_the_system_may_fail(tmp_path, monkeypatch):
    """Each call in turn: the old file or, after the last step, the new one; no litter; a retry succeeds."""
    path = tmp_path / "file"
    left = 0

    def failing(name):
        def call(*given, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.EIO, "Input/output error")
            return getattr(os, name)(*given, **options)

        return call

    names = ("open", "fstat", "fdopen", "fchown", "fchmod", "fsync", "replace", "stat", "access", "listdir", "close")
    broken = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    vars(broken).update({name: failing(name) for name in names})
    outcomes = []
    for number in range(1, 30):
        path.write_text("old")
        path.chmod(0o640)
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(files, "os", broken)
            try:
                write_text(path)
                outcomes.append("written")
            except OSError as error:
                outcomes.append(errno.errorcode[error.errno])
        assert os.listdir(tmp_path) == ["file"]
        assert path.read_text() == ("new" if outcomes[-1] == "written" else "old")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        write_text(path, "again")
        assert path.read_text() == "again"
    assert set(outcomes) == {"EIO", "written"}
    assert outcomes.count("EIO") >= 9
    assert outcomes[-1] == "written"


@pytest.mark.parametrize("save", ["bytes", "torch"])
def test_a_full_disk_leaves_the_old_file(full_disk, save):
    path = full_disk / "file"
    large = torch.randn(100_000)
    for earlier in (False, True):
        if earlier:
            write_text(path, "old")
        with pytest.raises(OSError, match="No space left on device; the file was not written") as raised:
            write_whole(path, lambda file: torch.save(large, file) if save == "torch" else file.write(bytes(200_000)))
        assert raised.value.errno == errno.ENOSPC
        assert str(path) in str(raised.value)
        assert os.listdir(full_disk) == ["file"] * earlier
        assert not earlier or path.read_text() == "old"
    write_text(path, "there is room again")
    assert path.read_text() == "there is room again"


def test_a_limit_of_the_size_of_files_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    out, _ = start("write_over_limit", path, 100_000).communicate()
    assert f"{errno.EFBIG} " in out
    assert "File too large; the file was not written, and an earlier one is unchanged" in out
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_writers_that_are_killed_leave_a_whole_file(tmp_path):
    """200 processes, each killed at another line."""
    path = tmp_path / "file"
    path.write_bytes(content(0))
    out, _ = start("kill_often", path, 200).communicate()
    whole, changed, abandoned = map(int, out.split())
    assert whole == 200
    assert 20 < changed < 180  # killed before and after the new file was in its place
    assert abandoned > 20
    write_text(path)
    assert os.listdir(tmp_path) == ["file"]


def abandoned_name(host="", name="0" * 32):
    return f"{host or files._prefix()}{name}.tmp"


def test_only_abandoned_files_of_our_own_are_removed(tmp_path):
    kept = [
        abandoned_name(".sparsifai-00000000-"), abandoned_name(name="0" * 31), abandoned_name(name="g" * 32),
        "prefix" + abandoned_name(), abandoned_name() + "x", abandoned_name(name="1" * 32),
        abandoned_name(name="2" * 32), abandoned_name(name="3" * 32),
    ]  # fmt: skip
    for name in kept[:-2]:
        (tmp_path / name).write_text("kept")
    (tmp_path / kept[-2]).mkdir()
    (tmp_path / "victim").write_text("kept")
    (tmp_path / kept[-1]).symlink_to("victim")
    (tmp_path / abandoned_name()).write_text("abandoned")
    with open(tmp_path / abandoned_name(name="1" * 32), "rb") as another:
        files.fcntl.flock(another, files.fcntl.LOCK_EX)  # as the process that writes it does
        write_text(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "file", "victim"])
    assert (tmp_path / "victim").read_text() == "kept"


# --- Several at once ----------------------------------------------------------------------------------------------


def test_readers_always_see_a_whole_file(tmp_path):
    """2,000 reads while two processes write the file."""
    path = tmp_path / "file"
    path.write_bytes(content(250))
    writers = [start("write_often", path, 10**9) for _ in range(2)]
    while read_bytes(path, LIMIT, "a test") == content(250):
        assert [writer.poll() for writer in writers] == [None, None]
    reads = [read_bytes(path, LIMIT, "a test") for _ in range(2000)]
    for writer in writers:
        assert writer.poll() is None
        writer.kill()
        writer.communicate()
    assert sum(map(is_whole, reads)) == 2000
    assert len(set(reads)) > 1
    write_text(path)
    assert os.listdir(tmp_path) == ["file"]


def test_two_processes_and_four_threads_may_write_at_once(tmp_path):
    path = tmp_path / "file"
    writers = [start("write_in_threads", path, 50) for _ in range(2)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert path.read_bytes() == content(49)
    assert os.listdir(tmp_path) == ["file"]


# --- Reading ------------------------------------------------------------------------------------------------------


def test_reading_keeps_the_limit(tmp_path):
    path = tmp_path / "file"
    for size in (0, 1, 999, 1000):
        path.write_bytes(b"x" * size)
        assert read_bytes(path, 1000, "a test") == b"x" * size
    path.write_bytes(b"x" * 1001)
    with pytest.raises(ValueError, match=f"{path} has more than 1,000 bytes, which is the limit for a test; is it"):
        read_bytes(path, 1000, "a test")
    os.truncate(path, 2**40)  # takes no space on the disk
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_bytes(path, 1000, "a test")
    with pytest.raises(FileNotFoundError, match="none"):
        read_bytes(tmp_path / "none", 1000, "a test")


def test_a_file_that_says_no_size_is_read_up_to_the_limit():
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("files that say a size of 0 are those of /proc")
    assert os.stat("/proc/self/maps").st_size == 0
    assert b"python" in read_bytes("/proc/self/maps", LIMIT, "a test")
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_bytes("/proc/self/maps", 100, "a test")


def test_a_file_that_grows_is_read_up_to_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    real = os.fstat

    def grow(descriptor):
        found = real(descriptor)
        path.write_bytes(b"x" * 5000)
        return found

    monkeypatch.setattr(files.os, "fstat", grow)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_bytes(path, 1000, "a test")


def test_reading_closes_what_it_opens(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    before = len(os.listdir("/dev/fd"))
    with other_kinds(tmp_path) as kinds:
        for each in kinds:
            with pytest.raises(OSError, match="."):
                read_bytes(each, 10, "a test")
            with pytest.raises(OSError, match="."):
                write_text(each)
    for _ in range(10):
        read_bytes(path, 10, "a test")
        write_text(path, "y")
    assert len(os.listdir("/dev/fd")) == before
