# Batches that go to many members are sent by several threads, see senders.h.
#
# Invariant: what this does to the broker is what the walks of flush.pxi do, in their order. The threads only send; what
# a socket did not take is settled here, on the loop, when all have sent. Until then nothing else runs.

cdef extern from * nogil:
    void __builtin_prefetch(const void* address)

cdef enum:
    # How many members ahead the walk over an audience fetches: one system call takes longer than memory.
    AHEAD = 2

    # Units of work (see loop_state.pxi) from which on it is worth waking threads: some 60 sends.
    SHARED_WORK = 2400


cdef inline bint is_shared(LoopState context, uint64_t sends, uint64_t size) noexcept:
    """Whether so many sends, of so many bytes together, are shared with the threads."""
    return context.senders != NULL and sends * SEND_WORK + (size >> WORK_SHIFT) >= context.shared_work


cdef uint64_t pending_bytes(list audiences):
    """How many bytes the batches of these audiences are, each counted for each live member."""
    cdef uint64_t size = 0
    cdef AudienceBase audience
    for audience in audiences:
        size += audience.live * audience.batch.size
    return size


cdef inline send_job* add_job(senders* pool, Writer connection) noexcept:
    """The next job of the run. There is room for it. Without a descriptor it is left to `settle_job`."""
    cdef send_job* job = &pool.jobs[pool.size]
    pool.size += 1
    job.fd = -1
    job.parts = 0
    job.audience = job.member = NULL
    job.connection = <void*> connection
    return job


cdef int share_audience(AudienceBase self) except -1:
    """Send the batch to each live member, by one call for each."""
    cdef senders* pool = self.context.senders
    cdef uint32_t i = self.live
    # Backwards, because a member that stops being live changes place with the last live one.
    while i:
        pool.size = pool.parts = 0
        i = add_members(self, pool, i)
        senders_run(pool)
        settle_run(self.context, pool)
    return 0


cdef uint32_t add_members(AudienceBase self, senders* pool, uint32_t i) except? 0:
    """Add jobs for the members before place `i`, as many as there is room for; return the place of the last one."""
    cdef Member* member
    cdef Writer connection
    cdef send_job* job
    cdef bint deflates
    cdef const unsigned char* batch
    while i and pool.size < SENDERS_JOBS:
        i -= 1
        if i >= AHEAD:
            __builtin_prefetch(&(<Writer> self.places[i - AHEAD].connection).fd)
        member = self.places[i]
        connection = <Writer> member.connection
        job = add_job(pool, connection)
        job.audience = <void*> self
        job.member = member
        if connection.control.size or connection.fd < 0:
            continue
        try:
            job.data = batch_for(connection.deflates, self, &job.size)
        except Exception as error:
            give_up(connection, error)
            pool.size -= 1
            continue
        job.fd = connection.fd
        job.events = self.segment_count
    return i


cdef int share_pending(LoopState context, list connections) except -1:
    """Write once to each of these connections the batches that are pending for it."""
    cdef senders* pool = context.senders
    cdef Py_ssize_t place = 0
    cdef Writer connection
    while place < len(connections):
        pool.size = pool.parts = 0
        while place < len(connections) and pool.size < SENDERS_JOBS and pool.parts + MAX_PIECES <= SENDERS_PARTS:
            connection = <Writer> connections[place]
            place += 1
            if connection.pending_first < 0:
                continue  # it was disconnected since
            try:
                add_pending(pool, connection)
            except Exception as error:
                give_up(connection, error)
                pool.size -= 1
        senders_run(pool)
        settle_run(context, pool)
    return 0


cdef int add_pending(senders* pool, Writer connection) except -1:
    """Add a job for all batches that are pending for a connection. If it also has answers, queued events or no
    descriptor, the job stays empty, and `settle_job` calls its `write`."""
    cdef send_job* job = add_job(pool, connection)
    cdef Outbox* outbox = &connection.outbox
    cdef int32_t index = connection.pending_first
    cdef Pending* pending
    cdef size_t size = 0, parts = 0, events = 0, batch_size
    cdef iovec* vector = &pool.vector[pool.parts]
    if connection.control.size or connection.fd < 0 or outbox.changed != NULL or outbox.sendable.first != NULL:
        return 0
    while index >= 0:
        if parts == MAX_PIECES or size > 2 * MAX_WRITE:
            return 0
        pending = pending_at(connection.context, index)
        vector[parts].iov_base = <void*> batch_for(connection.deflates, <AudienceBase> pending.audience, &batch_size)
        vector[parts].iov_len = batch_size
        size += batch_size
        events += (<AudienceBase> pending.audience).segment_count
        parts += 1
        index = pending.next
    pool.parts += parts
    job.data = vector
    job.parts = parts
    job.size = size
    job.events = events
    job.fd = connection.fd
    return 0


cdef int settle_run(LoopState context, senders* pool) except -1:
    """Account for what the sockets took."""
    cdef size_t left = keep_unsettled(context, pool), place = 0
    cdef send_job* job = NULL
    while place < left:
        try:
            while place < left:
                job = &pool.jobs[place]
                place += 1
                settle_job(job)
        except Exception as error:
            give_up(<Writer> job.connection, error)
    return 0


cdef size_t keep_unsettled(LoopState context, senders* pool) noexcept:
    """Count what went out whole, and move the other jobs to the front; return how many there are.

    Nothing is written to their connections before they are settled: it would come into the middle of a frame.
    """
    cdef size_t left = 0, place
    cdef send_job* job
    for place in range(pool.size):
        job = &pool.jobs[place]
        if job.fd >= 0 and job.sent == <ssize_t> job.size:
            context.bytes_out += job.size
            context.delivered += job.events
            if job.member == NULL:
                (<Writer> job.connection).pending_first = -1
        else:
            if job.fd >= 0:
                (<Writer> job.connection).outbox.writing = True
            pool.jobs[left] = job[0]
            left += 1
    return left


cdef int settle_job(send_job* job) except -1:
    """Account for a job that was not carried out, or that the socket did not take whole."""
    cdef Writer connection = <Writer> job.connection
    cdef Piece pieces[MAX_PIECES]
    cdef Member* member = <Member*> job.member
    cdef int count = 1
    if job.fd < 0:
        if member != NULL:
            reserve(&connection.context.pending, sizeof(Pending), 64 * sizeof(Pending))
            pend(connection, <AudienceBase> job.audience, member)
        return connection.write()
    connection.outbox.writing = False
    if job.sent < 0:
        if job.error != EAGAIN:
            return connection.disconnect()
        job.sent = 0
    if member != NULL:
        set_batch(&pieces[0], <AudienceBase> job.audience, member, job.size)
    else:
        count = take_pending(connection, pieces)
    connection.outbox.writing = True
    try:
        return settle_pieces(connection, pieces, count, job.sent)
    finally:
        connection.outbox.writing = False


cdef int take_pending(Writer connection, Piece* pieces) except -1:
    """Make the pieces of all batches that are pending for a connection; return how many they are."""
    cdef int count = 0
    cdef Pending* pending
    cdef size_t size
    while connection.pending_first >= 0:
        pending = pending_at(connection.context, connection.pending_first)
        connection.pending_first = pending.next
        batch_for(connection.deflates, <AudienceBase> pending.audience, &size)
        set_batch(&pieces[count], <AudienceBase> pending.audience, pending.member, size)
        count += 1
    return count
