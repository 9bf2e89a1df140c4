"""What the counter knows, and how it changes. No input or output, and no clock: times come from the caller."""

from __future__ import annotations

# A page names itself. This bounds what anybody can make the program remember.
MAX_PAGES = 10_000
MAX_NAME = 64


class Counting:
    """The value, and the pages that are there. `timeout` is for how many seconds a page may be silent."""

    def __init__(self, timeout: float) -> None:
        self.value = 0
        self._timeout = timeout
        self._last_seen: dict[str, float] = {}  # page → time of its last event

    @property
    def state(self) -> dict[str, int]:
        """What the pages show."""
        return {"value": self.value, "online": len(self._last_seen)}

    def handle(self, op: str, data: object, now: float) -> bool:
        """Takes what a page says. Whether the state has to be told to all; what makes no sense is passed over."""
        match data:
            case {"page": str(page), **rest} if 0 < len(page) <= MAX_NAME:
                known = page in self._last_seen
            case _:
                return False
        if op == "bye":
            self._last_seen.pop(page, None)
            return known
        if not known and len(self._last_seen) >= MAX_PAGES:
            return False
        self._last_seen[page] = now
        counted = op == "add" and self._add(rest.get("by"))
        # A page that says hello has not seen the state yet, even if it was here before: its connection is a new one.
        return counted or op == "hello" or not known

    def _add(self, by: object) -> bool:
        if not isinstance(by, int) or by not in (1, -1):
            return False
        self.value += by
        return True

    def remove_silent(self, now: float) -> bool:
        """Forgets the pages that have been silent for too long. Whether there were any."""
        silent = [page for page, last_seen in self._last_seen.items() if now - last_seen > self._timeout]
        for page in silent:
            del self._last_seen[page]
        return bool(silent)

    def reset_timeouts(self, now: float) -> None:
        """Restarts the timeout of every page, because it was the program that received nothing."""
        self._last_seen = dict.fromkeys(self._last_seen, now)
