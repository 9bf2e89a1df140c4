# Threads that send to many sockets at once, as C: see senders.h.
#
# Invariant: they do nothing but what `senders_run` waits for.

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "senders.h" nogil:
    enum:
        SENDERS_JOBS  # of one run
        SENDERS_PARTS  # of all its jobs together
    cdef struct send_job:
        int fd
        int error
        ssize_t sent
        const void* data
        size_t size
        size_t parts
        size_t events
        void* audience
        void* member
        void* connection
    cdef struct senders:
        int wanted  # threads
        size_t size  # jobs of the run
        size_t parts
        send_job* jobs
        iovec* vector
    senders* senders_new(int wanted)
    void senders_run(senders* pool)
    void senders_free(senders* pool)
