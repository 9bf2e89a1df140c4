# One topic on the fast path: the `event` message of a plain publish command, its delivery, and its receipt.
#
# Invariant: what is written here is byte for byte what `broker.messages` would encode. An event of a topic with history
# is kept before it is delivered.


@cython.no_gc
@cython.final
cdef class Route:
    """What is known of a topic: its audience, and how its `event` messages begin."""

    cdef:
        AudienceBase audience
        str topic
        bytes name  # the topic as UTF-8
        bytes prefix
        TopicLog log  # where its events are kept; None: not in this process
        object keeper  # the Keeper that its publishes wait in for a store; None: they do not wait
        object retention  # for the store
        bint is_kept  # whether it has a log or a keeper
        Link of_audience  # in `AudienceBase.routes`
        PyObject* cache  # borrowed
        uint64_t serial  # no other route of the cache ever had it

    def __dealloc__(self):
        if self.audience is not None:
            remove(&self.audience.routes, &self.of_audience)


cdef inline size_t payload_size(Route route, const Publish* command) noexcept:
    """The length of the `event` message of a publish command, without an offset."""
    cdef size_t size = PyBytes_GET_SIZE(route.prefix) + len(b',"data":}') + command.data_size
    return size if command.key == NULL else size + len(b',"key":""') + command.key_size


cdef inline unsigned char* write_event(unsigned char* out, Route route, const Publish* command,
                                       unsigned char** key) noexcept:
    """Write the `event` message of a publish command up to the end of its data. Returns where that is; sets `key`."""
    cdef size_t prefix_size = PyBytes_GET_SIZE(route.prefix)
    memcpy(out, PyBytes_AS_STRING(route.prefix), prefix_size)
    out += prefix_size
    if command.key != NULL:
        memcpy(out, b',"key":"', 8)
        out += 8
        key[0] = out
        memcpy(out, command.key, command.key_size)
        out += command.key_size
        out[0] = 0x22
        out += 1
    memcpy(out, b',"data":', 8)
    out += 8
    memcpy(out, command.data, command.data_size)
    return out + command.data_size


cdef int publish_command(Route route, const Publish* command, Writer origin, Receipt* receipt) except -1:
    """Write the event of a publish command into the batch of its audience, and commit it."""
    cdef:
        unsigned char head[MAX_SERVER_HEAD]
        unsigned char* frame
        unsigned char* key = NULL
        size_t size = payload_size(route, command)
        size_t head_size = write_head(head, OP_TEXT, size)
        uint32_t key_start = 0
    size += head_size
    if route.audience.size:
        frame = reserve_frame(route.audience, size)
        memcpy(frame, head, head_size)
        write_event(frame + head_size, route, command, &key)[0] = 0x7D
        if key != NULL:
            key_start = key - frame
    return commit(route.audience, size, route.topic, key_start, command.key_size, None, origin, receipt)


cdef int publish_kept(Route route, const Publish* command, Writer origin, Receipt* receipt) except -1:
    """The same for a topic with history, whose log is there: the event gets a number, and is kept."""
    cdef:
        TopicLog log = route.log
        unsigned char head[MAX_SERVER_HEAD]
        char offset[OFFSET_TEXT]
        char* end
        unsigned char* frame
        unsigned char* key = NULL
        size_t size, head_size
        Kept* entry
    end = put_offset_field(offset, log.top + 1)
    size = payload_size(route, command) + (end - offset) - 1  # `}` is in both
    head_size = write_head(head, OP_TEXT, size)
    size += head_size
    frame = begin_append(log, size)
    try:
        memcpy(frame, head, head_size)
        memcpy(write_event(frame + head_size, route, command, &key), offset, end - offset)
        if route.audience.size:
            memcpy(reserve_frame(route.audience, size), frame, size)
    except BaseException:
        free(frame)
        raise
    entry = end_append(log, frame, size)
    entry.data_size = <uint32_t> command.data_size
    if key != NULL:
        entry.key_start = <uint32_t> (key - frame)
        entry.key_size = <uint32_t> command.key_size
        entry.tombstone = command.data_size == 4 and memcmp(command.data, b"null", 4) == 0
    return deliver_kept(route, entry, origin, receipt)


cdef int deliver_kept(Route route, Kept* entry, Writer origin, Receipt* receipt) except -1:
    """Go by the retention, and commit the event, whose frame is in the batch already."""
    cdef:
        LoopState context = route.audience.context
        size_t size = entry.size
        uint32_t key_start = entry.key_start, key_size = entry.key_size
        bytes key = None
    context.offset = entry.offset
    if route.log.retained.compact and key_start:
        key = key_of(entry)
    try:
        settle_publish(route.log, entry, key)
        return commit(route.audience, size, route.topic, key_start, key_size, None, origin, receipt)
    finally:
        context.offset = 0


cdef int answer_receipt(Connection connection, const unsigned char* id, size_t id_size, Receipt* receipt,
                        bytes epoch, uint64_t offset) except -1:
    """Put the `ok` of a publish into the control buffer. `epoch` is None where the event was not kept."""
    cdef:
        char text[256]  # the id has at most 66 bytes, the numbers at most 10 each, the offset 20, the epoch MAX_EPOCH
        char* end
    memcpy(text, b'{"op":"ok","id":', 16)
    memcpy(text + 16, id, id_size)
    end = text + 16 + id_size
    # snprintf would take 1,400 instructions of the 2,000 that an answer costs.
    memcpy(end, b',"receivers":', 13)
    end = put_number(end + 13, receipt.receivers)
    memcpy(end, b',"queued":', 10)
    end = put_number(end + 10, receipt.queued)
    memcpy(end, b',"dropped":', 11)
    end = put_number(end + 11, receipt.dropped)
    if epoch is not None:
        end = put_position(end, epoch, offset)
    end[0] = 0x7D
    end += 1
    if connection.parking is not None:
        connection.parking.answers.append(PyBytes_FromStringAndSize(text, end - text))
        return 0
    return connection.append_frame(OP_TEXT, <const unsigned char*> text, end - text)


cdef char* put_position(char* out, bytes epoch, uint64_t offset) noexcept:
    """Write where an event is, as fields of a receipt, and return where that ends."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(epoch)
    memcpy(out, b',"epoch":"', 10)
    memcpy(out + 10, PyBytes_AS_STRING(epoch), size)
    memcpy(out + 10 + size, b'","offset":', 11)
    return put_offset(out + 21 + size, offset)


cdef char* put_offset_field(char* out, uint64_t offset) noexcept:
    """Write how the `event` message of a kept event ends, behind its data, and return where that ends."""
    memcpy(out, b',"offset":', 10)
    out = put_offset(out + 10, offset)
    out[0] = 0x7D
    return out + 1


cdef char* put_number(char* out, uint32_t number) noexcept nogil:
    """Write a number in decimal, and return where it ends."""
    cdef char digits[10]
    cdef int count = 0
    while True:
        digits[count] = 0x30 + number % 10
        number //= 10
        count += 1
        if number == 0:
            break
    while count:
        count -= 1
        out[0] = digits[count]
        out += 1
    return out


cdef char* put_offset(char* out, uint64_t number) noexcept nogil:
    """The same for an offset. (Most are small, and 32 bits are divided in fewer steps.)"""
    if number < 1000000000:
        return put_number(out, <uint32_t> number)
    out = put_offset(out, number // 10)
    out[0] = 0x30 + number % 10
    return out + 1
