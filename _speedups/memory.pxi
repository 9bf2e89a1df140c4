# Gives memory that was freed back to the system.
#
# Invariant: it may take milliseconds, so nothing on the data path calls it.

cdef extern from *:
    """
    #ifdef __GLIBC__
    #include <malloc.h>
    static int trim_heap(void) { return malloc_trim(0); }
    #else
    static int trim_heap(void) { return 0; }
    #endif
    """
    int trim_heap() nogil


def trim_memory():
    """Give memory that was freed back to the system, as far as the C library can (malloc_trim(3)).

    Of itself glibc gives back what lies at the end of its heap only, and so nothing as long as one small thing is left
    behind many that have gone. Returns whether there was anything.
    """
    cdef int found
    with nogil:
        found = trim_heap()
    return found != 0
