# The second half of a publish that has waited for a store: its event is kept, and is delivered and answered now.
#
# Invariant: events are delivered in the order of the batch, to those who are subscribed now. A failure with one of them
# does not keep the others from being delivered.


def deliver_batch(PendingBatch batch not None, RouteCache routes not None, audience_of not None, double seconds):
    """Deliver and answer the publishes of a batch that were numbered. Returns whether all have been: False after this
    time, and it is to be called again.

    `audience_of(topic)` gives the audience of a topic whose route is not in `routes` any more.
    """
    cdef double until = exact_time() + seconds
    cdef Waiting* entry
    failure = None
    while batch.delivered < batch.count:
        entry = waiting_at(batch, batch.delivered)
        batch.delivered += 1
        if entry.offset and entry.origin != NULL:
            try:
                deliver_waiting(batch, entry, routes, audience_of)
            except Exception as error:
                failure = error
        if batch.delivered % 64 == 0 and exact_time() > until:
            break
    if failure is not None:
        raise failure
    return batch.delivered == batch.count


cdef int deliver_waiting(PendingBatch batch, Waiting* entry, RouteCache routes, audience_of) except -1:
    """Deliver one event, and answer its publisher."""
    cdef:
        Route route = <Route> entry.route
        Connection origin = <Connection> entry.origin
        AudienceBase audience = route.audience
        bytes epoch = batch.epochs[entry.place], name = route.name
        Receipt receipt
    Py_DECREF(origin)
    entry.origin = NULL  # `origin` has a reference of its own
    end_waiting(origin)
    receipt.receivers = receipt.queued = receipt.dropped = 0
    try:
        if routes.look_up(<const unsigned char*> PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)) is not route:
            audience = <Audience?> audience_of(route.topic)
        publish_waiting(batch, entry, route, audience, origin, &receipt)
    finally:
        # Whatever the delivery met with, the event is kept.
        if entry.id_size and is_open(&origin.outbox):
            answer_receipt(origin, id_of_entry(batch, entry), entry.id_size, &receipt, epoch, entry.offset)
    return 0


cdef int publish_waiting(PendingBatch batch, Waiting* entry, Route route, AudienceBase audience, Connection origin,
                         Receipt* receipt) except -1:
    """Write the event into the batch of its audience, and commit it."""
    cdef:
        Publish command
        unsigned char head[MAX_SERVER_HEAD]
        char offset[OFFSET_TEXT]
        char* end
        unsigned char* frame
        unsigned char* key = NULL
        size_t size, head_size
        uint32_t key_start = 0
    memset(&command, 0, sizeof(Publish))
    command.data = batch.text.data + entry.start + entry.key_size
    command.data_size = entry.data_size
    command.key = batch.text.data + entry.start if entry.keyed else NULL
    command.key_size = entry.key_size
    prepare_members(audience)
    end = put_offset_field(offset, entry.offset)
    size = payload_size(route, &command) + (end - offset) - 1  # `}` is in both
    head_size = write_head(head, OP_TEXT, size)
    size += head_size
    if audience.size:
        frame = reserve_frame(audience, size)
        memcpy(frame, head, head_size)
        memcpy(write_event(frame + head_size, route, &command, &key), offset, end - offset)
        if key != NULL:
            key_start = <uint32_t> (key - frame)
    audience.context.offset = entry.offset
    try:
        return commit(audience, size, route.topic, key_start, entry.key_size, None, origin, receipt)
    finally:
        audience.context.offset = 0
