"""Reads the files that the configuration names.

No file may stop the broker: one without an end would fill the memory, and a pipe that nobody writes to would block the
event loop in a reload.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

MAX_FILE: Final = 4 * 2**20
"""Bytes of the largest file that is read: enough for 100,000 rules."""


def read_file(path: str | os.PathLike[str], *, wait: bool = False) -> bytes:
    """Read a whole file. Pipes and terminals are refused, unless the caller can `wait` for their writer.

    Raises OSError, whose `strerror` says why, and ValueError for a path with a NUL.
    """
    # A pipe without a writer blocks already when it is opened.
    more = 0 if wait else os.O_NONBLOCK
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | more)) as file:
        if not wait and (stat.S_ISFIFO(os.fstat(file.fileno()).st_mode) or file.isatty()):
            raise OSError(errno.EINVAL, "it is a pipe or a terminal, and not a file")
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_FILE // 2**20} MiB")
    return data
