"""The interface to systemd: passed sockets (sd_listen_fds(3)) and notifications (sd_notify(3)).

Both use environment variables, one of which names a datagram socket. Without them this module does nothing.
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

LISTEN_FDS_START: Final = 3
"""SD_LISTEN_FDS_START: passed sockets are 3, 4, 5 …"""

NOTIFY_TIMEOUT: Final = 5
"""Seconds to wait for a full socket of systemd, for messages that must be delivered."""

log = structlog.get_logger(__name__)


class Systemd:
    """The service manager, if it has started this process.

    Removes its variables from `environ`, since they are not meant for children. Create it before anything else is
    opened: the passed descriptors have fixed numbers.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        given = {name: environ.pop(name, "") for name in VARIABLES}
        self.problems: list[str] = []
        """Problems with the passed sockets."""
        self.sockets = _adopt_sockets(given, self.problems)
        """The passed sockets, with the names from their units."""
        self._address = given["NOTIFY_SOCKET"]
        self._notify: socket.socket | None = None
        self.watchdog = 0.0
        """Watchdog interval in seconds; 0: no watchdog."""
        if given["WATCHDOG_USEC"].isdigit() and given["WATCHDOG_PID"] in ("", str(os.getpid())):
            self.watchdog = int(given["WATCHDOG_USEC"]) / 1e6
        if self._address.startswith(("/", "@")):
            # Kept open, so that it works when no descriptors are left.
            self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            # A timeout of Python's own would poll this socket, which has room when the other one has none.
            self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", NOTIFY_TIMEOUT, 0))
        self._failure_logged = False

    @property
    def is_notified(self) -> bool:
        """Whether systemd receives notifications."""
        return self._notify is not None

    def notify(self, *lines: str) -> None:
        """Send a notification, such as `READY=1` or `STATUS=…`.

        It is dropped if it cannot be sent at once. For `READY` and `STOPPING`, which systemd waits for, the call waits
        up to NOTIFY_TIMEOUT seconds.
        """
        if self._notify is None:
            if self._address:
                self._log_failure("unknown kind of address")
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        matters = lines[0] in MUST_DELIVER
        try:
            self._notify.sendto("\n".join(lines).encode(), 0 if matters else socket.MSG_DONTWAIT, address)
        except OSError as exc:
            if matters or exc.errno != errno.EAGAIN:
                self._log_failure((exc.strerror or str(exc)).lower())

    def _log_failure(self, reason: str) -> None:
        if not self._failure_logged:
            self._failure_logged = True
            log.warning("cannot notify systemd", socket=self._address, reason=reason)

    def close(self) -> None:
        """Stop notifying, and close the passed sockets."""
        for _, sock in self.sockets:
            sock.close()
        if self._notify is not None:
            self._notify.close()
            self._notify = None


def status(text: str) -> str:
    """Format the text for `systemctl status`."""
    return "STATUS=" + text.replace("\n", " ")


def reloading() -> str:
    """Announce a reload and its start time, by which systemd tells its READY=1 from an earlier one."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def extend_timeout(seconds: float) -> str:
    """Extend the timeout of systemd, counted from now."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


MUST_DELIVER: Final = ("READY=1", "STOPPING=1")
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")


def _adopt_sockets(given: dict[str, str], problems: list[str]) -> list[tuple[str, socket.socket]]:
    """Adopt the passed sockets with their names; systemd uses `unknown` for none."""
    if given["LISTEN_PID"] != str(os.getpid()) or not given["LISTEN_FDS"].isdigit():
        return []
    count = int(given["LISTEN_FDS"])
    names = given["LISTEN_FDNAMES"].split(":") if given["LISTEN_FDNAMES"] else []
    names += ["unknown"] * (count - len(names))
    passed = []
    for number, name in zip(range(LISTEN_FDS_START, LISTEN_FDS_START + count), names, strict=False):
        try:
            os.set_inheritable(number, False)
            passed.append((name, socket.socket(fileno=number)))
        except OSError as exc:
            if exc.errno == errno.EBADF:
                problems.append(f"systemd: has announced {count} sockets, and passed {number - LISTEN_FDS_START}")
                break
            problems.append(f"systemd: what it has passed as `{name}` is no socket")
    return passed
