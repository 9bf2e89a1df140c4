# What a connection may wait for: one list for each kind, in the order in which they are due.
#
# Invariant: all who wait for the same wait equally long, so that a list is in order by itself. No timer is an object.

cdef enum:
    NEXT_PING = 0
    SIGN_OF_LIFE = 1
    END_OF_CLOSE = 2
    NOTHING = 3


cdef struct Timer:
    # Of one connection; part of it.
    Link link
    double due  # in the clock of the sweep
    double asked  # when the first ping went out that had no answer yet
    uint8_t kind


cdef void start_timer(LoopState context, Timer* timer, int kind, double seconds) noexcept:
    """Wait for this, in place of what was waited for."""
    stop_timer(context, timer)
    timer.due = context.clock + seconds
    timer.kind = kind
    append(&context.timers[kind], &timer.link)


cdef void stop_timer(LoopState context, Timer* timer) noexcept:
    if timer.kind != NOTHING:
        remove(&context.timers[timer.kind], &timer.link)
        timer.kind = NOTHING
