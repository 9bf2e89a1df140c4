"""What the broker and systemd tell each other: sockets that are passed (sd_listen_fds(3)), and how it goes
(sd_notify(3)). Both are a few environment variables, one of which names a datagram socket; started otherwise, all of
this does nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import MutableMapping
from typing import Final

import structlog

FIRST: Final = 3
"""SD_LISTEN_FDS_START: passed sockets are 3, 4, 5 …"""

PATIENCE: Final = 5
"""Seconds for which systemd may have no room for a message that it must not miss."""

log = structlog.get_logger(__name__)


class Systemd:
    """The service manager that has started this process, if one has.

    Takes its variables out of `environ`, since they are not meant for children. Make one early: what is passed must
    be taken before anything else is opened.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        given = {name: environ.pop(name, "") for name in VARIABLES}
        self.problems: list[str] = []
        """What is wrong with that which was passed."""
        self.sockets = _passed(given, self.problems)
        """The sockets that were passed, by the names that their units give them."""
        self._address = given["NOTIFY_SOCKET"]
        self._notify: socket.socket | None = None
        self.watchdog = 0.0
        """Seconds within which the broker has to say that it lives; 0 if nobody watches."""
        if given["WATCHDOG_USEC"].isdigit() and given["WATCHDOG_PID"] in ("", str(os.getpid())):
            self.watchdog = int(given["WATCHDOG_USEC"]) / 1e6
        if self._address.startswith(("/", "@")):
            # Kept open, so that it also works when no descriptors are left.
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            # A timeout of Python's own would poll this socket, which has room when the other one has none.
            self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", PATIENCE, 0))
        self._failed = False

    @property
    def listens(self) -> bool:
        """Whether anybody takes notice of `notify`."""
        return self._notify is not None

    def notify(self, *lines: str) -> None:
        """Tell how it goes, as `READY=1` and `STATUS=…`.

        What cannot be delivered at once is not delivered; but for `READY` and `STOPPING`, which systemd waits for, and
        which are waited for in turn, for some seconds.
        """
        if self._notify is None:
            if self._address:
                self._fail("its address is of a kind that is not known here")
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        matters = lines[0] in MATTER
        try:
            self._notify.sendto("\n".join(lines).encode(), 0 if matters else socket.MSG_DONTWAIT, address)
        except OSError as exc:
            if matters or exc.errno != errno.EAGAIN:
                self._fail((exc.strerror or str(exc)).lower())

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning("cannot notify systemd", socket=self._address, reason=reason)

    def close(self) -> None:
        """Tell nothing more, and close what was passed."""
        for _, sock in self.sockets:
            sock.close()
        if self._notify is not None:
            self._notify.close()
            self._notify = None


def status(text: str) -> str:
    """What `systemctl status` is to show."""
    return "STATUS=" + text.replace("\n", " ")


def reloading() -> str:
    """Say that the configuration is being read, and when it began: systemd tells this READY=1 from an earlier one."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def extend(seconds: float) -> str:
    """Ask for more time, counted from now."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


MATTER: Final = ("READY=1", "STOPPING=1")
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")


def _passed(given: dict[str, str], problems: list[str]) -> list[tuple[str, socket.socket]]:
    """Take over what was passed, each with its name; `unknown` is systemd's own word for none."""
    if given["LISTEN_PID"] != str(os.getpid()) or not given["LISTEN_FDS"].isdigit():
        return []
    count = int(given["LISTEN_FDS"])
    names = given["LISTEN_FDNAMES"].split(":") if given["LISTEN_FDNAMES"] else []
    names += ["unknown"] * (count - len(names))
    passed = []
    for number, name in zip(range(FIRST, FIRST + count), names, strict=False):
        try:
            os.set_inheritable(number, False)
            passed.append((name, socket.socket(fileno=number)))
        except OSError as exc:
            if exc.errno == errno.EBADF:
                problems.append(f"systemd: has announced {count} sockets, and passed {number - FIRST}")
                break
            problems.append(f"systemd: what it has passed as `{name}` is no socket")
    return passed
