# Monotonic time: a cheap clock for ages, an exact one for durations.
#
# Invariant: neither makes a Python object.

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* time)
    enum:
        CLOCK_MONOTONIC
        CLOCK_MONOTONIC_COARSE


cdef uint64_t now_ms() noexcept:
    """Milliseconds of a clock that costs no system call; it moves every few of them (clock_gettime(2))."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time)
    return <uint64_t> time.tv_sec * 1000 + time.tv_nsec // 1000000


cdef double exact_time() noexcept:
    """Seconds of a clock that moves all the time, and costs some tens of nanoseconds."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9
