# The overflow policies and the reasons of gaps: the one table of each, for the wire, the configuration and the code.
#
# Invariant: names are those of the protocol; the first policy is the default. speedups.pyi repeats both for type
# checkers, and a test compares them.

cdef enum:
    DROP_OLDEST = 0
    DROP_NEWEST = 1
    CLOSE_AT_BOUND = 2
    LATEST = 3
    BLOCK = 4
    REPLAY = 5
    POLICIES = REPLAY + 1

    REASON_OVERFLOW = 0
    REASON_CONFLATED = 1
    REASON_AGE = 2
    REASONS = 3  # those of a queue, which counts them
    REASON_LOST = 5

OVERFLOW = {
    "drop_oldest": DROP_OLDEST,
    "drop_newest": DROP_NEWEST,
    "latest": LATEST,
    "replay": REPLAY,
    "block": BLOCK,
    "close": CLOSE_AT_BOUND,
}
OVERFLOW_NAMES = {number: name for name, number in OVERFLOW.items()}
Overflow = Literal[tuple(OVERFLOW)]

# First those with a count of dropped events, then those that the engine or the history gives: `lost` has no count.
GAP_REASONS = ("overflow", "conflated", "age", "expired", "epoch", "lost")
GapReason = Literal[GAP_REASONS]
