# The keep-alive sweep: it pings, looks for signs of life, ends closing handshakes and waits under `block`, and
# reports connections that lag.
#
# Invariant: one asyncio timer serves all connections; an idle connection has no task, no timer object and no buffer.

cdef enum:
    # How long a connection lags behind before it is reported, in milliseconds. Every client with a burst does, for a
    # moment.
    REPORT_AFTER = 1000


cdef Connection next_due(LoopState context, int kind):
    """The first connection of a list, if it is due."""
    cdef Link* link = context.timers[kind].first
    if link == NULL or (<Connection> link.owner).timer.due > context.clock:
        return None
    return <Connection> link.owner


cdef int sweep_timers(LoopState context) except -1:
    """Ping those that it is time to ping; close those that gave no sign of life or do not end their closing."""
    cdef Connection connection
    while True:
        connection = next_due(context, NEXT_PING)
        if connection is None:
            break
        send_ping(context, connection)
    while True:
        connection = next_due(context, SIGN_OF_LIFE)
        if connection is None:
            break
        if connection.heard or connection.halted:  # halted: it is the broker that does not listen
            start_timer(context, &connection.timer, NEXT_PING, context.ping_pause)
        else:
            end_silence(context, connection)
    while True:
        connection = next_due(context, END_OF_CLOSE)
        if connection is None:
            break
        stop_timer(context, &connection.timer)
        connection.abort()
    return 0


cdef int send_ping(LoopState context, Connection connection) except -1:
    """Send a ping. Where the time for an answer is longer than that to the next ping, look for it there."""
    if context.limits.ping_timeout <= context.limits.ping_interval:
        connection.heard = False
        start_timer(context, &connection.timer, SIGN_OF_LIFE, context.limits.ping_timeout)
    else:
        if connection.heard or connection.halted:
            connection.heard = False
            connection.timer.asked = context.clock
        elif context.clock - connection.timer.asked >= context.limits.ping_timeout:
            return end_silence(context, connection)
        start_timer(context, &connection.timer, NEXT_PING, context.ping_pause)
    if is_open(&connection.outbox):
        connection.append_frame(OP_PING, NULL, 0)
    return 0


cdef int end_silence(LoopState context, Connection connection) except -1:
    """Close a connection that gave no sign of life."""
    if is_open(&connection.outbox):
        return connection.close_by_code(CLOSE_PING_TIMEOUT)
    stop_timer(context, &connection.timer)
    connection.abort()  # its transport is closing, and has not got rid of what it holds
    return 0


cdef int end_parked(LoopState context) except -1:
    """Close the subscribers for which a publisher has been parked for long enough, unless age makes room."""
    cdef SubscriptionBase subscription
    cdef Park entry
    for subscription in list(context.parked):
        if subscription.queue.count and context.max_age is not None:
            drop_aged(subscription)
            release_parked(subscription)
            if subscription.parks is None:
                continue
        entry = longest_parked(subscription)
        if entry is not None and entry.due <= context.clock:
            ask_close(subscription.outbox, CLOSE_SLOW_CONSUMER)
    return 0


cdef int report_lagging(LoopState context) except -1:
    """Forget those that lag behind no more, and report the others, each once."""
    cdef Connection connection
    cdef list news = []
    cdef uint64_t now = now_ms()
    for connection in list(context.lagging):
        if is_lagging(&connection.outbox):
            if not connection.outbox.reported and now - connection.outbox.lagging_since >= REPORT_AFTER:
                connection.outbox.reported = True
                news.append((connection, True))
            continue
        connection.outbox.listed = False
        del context.lagging[connection]
        if connection.outbox.reported:
            connection.outbox.reported = False
            if is_open(&connection.outbox):
                news.append((connection, False))
    if context.on_lagging is not None:
        for connection, lagging in news:
            context.on_lagging(connection, lagging)
    return 0
