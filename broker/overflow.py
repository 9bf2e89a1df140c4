"""The overflow policies and the reasons of a gap: one table for configuration, protocol, clients and command line."""

from __future__ import annotations

from typing import Final, Literal, get_args

Overflow = Literal["drop_oldest", "drop_newest", "latest", "replay", "block", "close"]
"""What happens to an event when a subscription's queue is full."""
OVERFLOWS: Final[tuple[str, ...]] = get_args(Overflow)
"""The overflow policies, the default first."""

GapReason = Literal["overflow", "conflated", "age", "expired", "epoch", "lost"]
"""Why a subscriber missed events."""
GAP_REASONS: Final[tuple[str, ...]] = get_args(GapReason)
