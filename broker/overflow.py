"""The overflow policies and the reasons of a gap, for configuration, protocol, clients and command line.

The one table of each is native: `_speedups/policies.pxi`.
"""

from __future__ import annotations

from typing import Final

from broker._speedups import GAP_REASONS, OVERFLOW, GapReason, Overflow

__all__ = ["GAP_REASONS", "OVERFLOWS", "GapReason", "Overflow"]

OVERFLOWS: Final[tuple[str, ...]] = tuple(OVERFLOW)
"""The overflow policies, the default first."""
