"""Optuna's journal, a file of one JSON record a line, which neither a full disk nor kill -9 damages.

A record counts once its line has ended. A writer that finds a torn last line, whose write was never confirmed, removes
it before it appends; one whose own write fails puts the file back as it was. Older versions, and plain Optuna, append
to a torn line: what they appended is read, the torn part is skipped.

The lock is flock(2) on the journal itself, so it ends with its process; Linux hands it on to the server of a network
file system (NFS from 3 on, if its lock service runs). Optuna's own locks, a link or a file beside the journal, stay
behind after kill -9 and cost the next one 30 s; they are not looked at. So all that write to a journal at the same time
must be workers of this version; others may read.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from hpo.errors import StorageError
from hpo.stopping import ANSWER_SECONDS

_HEAD = b'{"op_code":'
"""How Optuna begins a record. Within a string of a record it cannot stand: the quotes are escaped there."""
_BLOCK = 1 << 16
_POLL_SECONDS = 0.002
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JournalFile(BaseJournalBackend):
    """The journal at `path`, made if it is not there.

    All methods raise StorageError where the file is gone, another one, or damaged; OSError where the disk is full;
    TimeoutError where another process keeps the lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        os.close(os.open(path, os.O_RDONLY if path.exists() else os.O_CREAT | os.O_RDWR, 0o666))
        self._file = _identity(os.stat(path))
        self._starts = [0]
        """Where each record that was read begins, or the blank lines before it, in bytes; last: where to read on."""

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from that number on, counted from 0."""
        start = self._starts[log_number_from]
        del self._starts[log_number_from + 1 :]
        size = self._size()
        if size == start:
            return
        with self._open(os.O_RDONLY) as file, self._locked(file, fcntl.LOCK_SH):
            size = os.fstat(file).st_size  # what is there now is written whole, or its writer is dead
        if size < start:
            raise self._error(f"has become shorter, {size} bytes in place of {start}; put back a copy of it")
        with self._path.open("rb") as lines:
            lines.seek(start)
            while (line := lines.readline()).endswith(b"\n") and start + len(line) <= size:
                start += len(line)
                if line.strip(b"\0 \t\r\n"):
                    if (record := _record(line)) is None:
                        raise self._refusal(line, start)
                    self._starts.append(start)
                    yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write the records, or raise and write nothing."""
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._open(os.O_RDWR | os.O_APPEND) as file, self._locked(file, fcntl.LOCK_EX):
            size = self._mend(file)
            try:
                _write(file, content)
                os.fsync(file)
            except BaseException:
                with suppress(OSError):  # the next writer finds the torn line then
                    os.ftruncate(file, size)
                raise

    def lock(self) -> None:
        """Take the lock and let it go, to see that it can be had."""
        with self._open(os.O_RDWR) as file, self._locked(file, fcntl.LOCK_EX):
            pass

    def _mend(self, file: int) -> int:
        """Make the file end with a line's end; return its size. The lock must be held."""
        size = os.fstat(file).st_size
        start = _last_line(file, size)
        tail = os.pread(file, size - start, start)
        if not tail:
            return size
        torn = tail.strip(b"\0")
        if _record(tail):
            _write(file, b"\n")  # whole but for its end: it may have been copied so
            return size + 1
        if torn.startswith(_HEAD) or _HEAD.startswith(torn):
            os.ftruncate(file, start)
            return start
        raise self._refusal(tail, size)

    def _refusal(self, line: bytes, end: int) -> StorageError:
        """Return the error for a line that ends there and is no record, not even at its end."""
        with self._path.open("rb") as file:
            number = file.read(end - 1).count(b"\n") + 1
        return self._error(
            f"line {number} holds no record of Optuna's ({line[:40]!r}); put back a copy of the file, or remove that "
            "line, and its change is lost; if the file is another program's, give another path"
        )

    def _size(self) -> int:
        """Return the size of the journal in bytes; raise StorageError where it is not the file that it was."""
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise self._error(f"cannot be read any more ({error.strerror}); put it back") from error
        if _identity(found) != self._file:
            raise self._error("was replaced by another file while in use; run the same command again to resume with it")
        return found.st_size

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        self._size()
        try:
            file = os.open(self._path, flags)
        except OSError as error:
            raise self._error(f"cannot be opened ({error.strerror}); make it readable and writable") from error
        try:
            yield file
        except OSError as error:
            if isinstance(error, TimeoutError) or error.errno in _ROOM:
                raise
            raise self._error(f"cannot be read or written ({error.strerror})") from error
        finally:
            os.close(file)

    @contextmanager
    def _locked(self, file: int, how: int) -> Iterator[None]:
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"another process held {self._path} for {ANSWER_SECONDS:g} s") from None
            time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # not only by closing: a child that was forked meanwhile has it open too

    def _error(self, what: str) -> StorageError:
        return StorageError(f"the journal {self._path} {what}")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record that `line` is, or that it ends with where a torn one was appended to; None: there is none."""
    start = 0
    while start >= 0:
        try:
            found = json.loads(line[start:].decode())
        except ValueError:
            found = None
        if isinstance(found, dict) and isinstance(found.get("op_code"), int) and "worker_id" in found:
            return found
        start = line.find(_HEAD, start + 1)
    return None


def _last_line(file: int, size: int) -> int:
    """Return where the last line begins, which is `size` where the file ends with a line's end."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK)
        if (at := os.pread(file, end - start, start).rfind(b"\n")) >= 0:
            return start + at + 1
        end = start
    return 0


def _write(file: int, content: bytes) -> None:
    while content:  # a disk that is nearly full takes a part
        content = content[os.write(file, content) :]
