"""Files: written whole or not at all, and read from regular files only, within a limit."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO
from uuid import uuid4
from zlib import crc32

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

_CHUNK = 2**20

# Set where the system has them: a FIFO is opened without waiting for a writer, and no terminal becomes ours.
_OPEN = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file in one step: others see the old file or the whole new one, and after an error the old one.

    The new file is written beside the old one under the name `.sparsifai-HOST-RANDOM.tmp`, flushed to the disk, and
    moved over the old one. It gets the permissions of the old file; the permissions of a new file are those that
    `open` gives. An error removes it. A process that is killed leaves it; the next write to that folder from the same
    machine and user removes it, as no process has it locked any more.

    Of a symbolic link, the file that it leads to is written, and the link stays as it is. Another hard link keeps the
    old content.

    Args:
        path: The file. Its folder must exist and be writable.
        write: A function that writes the content to the binary file that it is given. It runs once.

    Raises:
        OSError: The file cannot be written, or the path is a folder, a device, a pipe or a socket. What was there is
            unchanged.
    """
    path = os.fsdecode(path)
    old = _old_file(path)
    goal = os.path.realpath(path)
    folder = os.path.dirname(goal)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist; create it first", folder)
    _remove_abandoned(folder)
    try:
        name, file = _new_file(folder, 0o666 if old is None else 0o600)
        try:
            with file:
                _call(write, file)
                file.flush()
                if old is not None:
                    _take_over(file, old)
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows moves no open file
                os.replace(name, goal)  # while the lock is held, or another process could remove it as abandoned
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        if error.errno is None:
            raise
        why = error.strerror or os.strerror(error.errno)
        raise OSError(error.errno, f"{why}; the file was not written, and an earlier one is unchanged", path) from error
    _sync_folder(folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8 with `write_whole`.

    Args:
        path: The file.
        text: The text.

    Raises:
        OSError: The file cannot be written. What was there is unchanged.
        UnicodeEncodeError: The text has surrogates, which UTF-8 cannot write. What was there is unchanged.
    """
    data = text.encode()
    write_whole(path, lambda file: file.write(data))


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading, without ever waiting.

    The kind of file is that of the opened one, so it makes no difference if another process replaces the file.

    Args:
        path: The file, or a symbolic link to it.

    Returns:
        The open binary file. Close it, or use it with `with`.

    Raises:
        OSError: The file cannot be opened, or is a folder, a device, a pipe or a socket.
    """
    path = os.fsdecode(path)
    descriptor = os.open(path, os.O_RDONLY | _OPEN)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike, limit: int, what: str) -> bytes:
    """Read a regular file whole, if it is not too large.

    Args:
        path: The file.
        limit: The most bytes that it may have.
        what: What the file should be, for the message, such as 'a recipe'.

    Returns:
        Its bytes.

    Raises:
        OSError: The file cannot be read, or is a folder, a device, a pipe or a socket.
        ValueError: It has more than `limit` bytes. No more than that are read, whatever size the file says it has.
    """
    with open_regular(path) as file:
        size, read = os.fstat(file.fileno()).st_size, bytearray()
        while max(size, len(read)) <= limit:
            chunk = file.read(min(_CHUNK, limit + 1 - len(read)))
            if chunk is None:  # /proc has regular files that make a reader wait
                raise BlockingIOError(errno.EAGAIN, "it has no content yet; pass a file on a disk", os.fspath(path))
            if not chunk:
                return bytes(read)
            read += chunk
    raise ValueError(f"{path} has more than {limit:,} bytes, which is the limit for {what}; is it another file?")


# --- Kinds of files -----------------------------------------------------------------------------------------------


def _check_regular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; pass the name of a file", path)
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "no regular file")
        raise OSError(errno.EINVAL, f"it is {kind}; pass the name of a regular file", path)


def _old_file(path: str) -> os.stat_result | None:
    """The state of a file that may be written, None if there is none yet."""
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return None
    _check_regular(path, old.st_mode)
    if not os.access(
        path, os.W_OK, effective_ids=os.access in os.supports_effective_ids
    ):  # moving another file over it would need no permission of its own
        raise PermissionError(errno.EACCES, "it is protected against writing", path)
    return old


# --- The new file -------------------------------------------------------------------------------------------------


class _Watched:
    """A binary file that keeps the first error of the system."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _call(write: Callable[[BinaryIO], Any], file: BinaryIO) -> None:
    """Let a function write, and raise the error of the system: torch.save raises another one, without the reason."""
    watched: Any = _Watched(file)
    try:
        write(watched)
    except Exception:
        if watched.error is None:
            raise
    if watched.error is not None:
        raise watched.error


def _prefix() -> str:
    # Locks tell nothing of the processes of another machine.
    return f".sparsifai-{crc32(socket.gethostname().encode()):08x}-"


def _new_file(folder: str, mode: int) -> tuple[str, BinaryIO]:
    """Create a file of a name that no other has, and lock it for as long as it is open."""
    while True:
        name = os.path.join(folder, f"{_prefix()}{uuid4().hex}.tmp")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, mode)
        try:
            # Between these two lines another process may have taken the file for an abandoned one.
            if _lock(descriptor) and os.fstat(descriptor).st_nlink:
                return name, os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file. False if another process holds it; True on systems and disks that have no locks, too."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _take_over(file: BinaryIO, old: os.stat_result) -> None:
    """Give a file the owner, if that is allowed, and the permissions of the old one."""
    if os.name != "posix":
        return
    own = os.fstat(file.fileno())
    if (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
    os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))


def _sync_folder(folder: str) -> None:
    """Flush a folder to the disk. Where that is not possible, a power cut may bring the old file back, whole."""
    if os.name == "posix":
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | _OPEN)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_abandoned(folder: str) -> None:
    """Remove the new files of killed processes: of our name, owner and machine, and locked by no process."""
    if fcntl is None:
        return
    ours = re.compile(re.escape(_prefix()) + "[0-9a-f]{32}[.]tmp")
    with suppress(OSError):  # the file is written; of what is in the way here, the next write tells
        for name in os.listdir(folder):
            if ours.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(os.path.join(folder, name))


def _remove_if_abandoned(name: str) -> None:
    assert fcntl is not None
    descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | _OPEN)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name)
    finally:
        os.close(descriptor)
