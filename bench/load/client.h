/* The client side of what the servers under load speak: RFC 6455 as much of it as a load needs, and byte streams.
 *
 * Thousands of clients share one epoll instance and one receive buffer. What a client keeps for itself is the beginning
 * of a frame or of a message whose rest has not come yet.
 */
#ifndef CLIENT_H
#define CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "transport.h"

enum client_state { CONNECTING, SECURING, UPGRADING, GREETING, OPEN };

/* PUBLISHER: sends events. SUBSCRIBER: gets them. STALLED: subscribes, and then never reads. */
enum client_role { SUBSCRIBER, PUBLISHER, STALLED };

/* What a client has to send and the socket has not taken. The head of it cannot be kept apart any more: the rest of a
 * frame that has gone out in part, control frames, and what TLS has made a record of already. Whole frames of an equal
 * size follow; only a publisher has those. */
struct outgoing {
    char *bytes;
    size_t size, capacity;
    size_t head;
    size_t frame; /* the size of each of those that follow */
};

struct client {
    int fd;
    void *tls; /* NULL without TLS */
    enum client_state state;
    enum client_role role;
    uint32_t number;     /* position in the table of clients */
    uint32_t topic;      /* position in the table of topics; a publisher has none */
    uint32_t greetings;  /* messages that are still to come before the client counts as open */
    uint64_t since;      /* when it began to connect */
    uint64_t delivered;  /* events so far */
    char *kept;          /* the beginning of a frame */
    size_t kept_size;
    char *partial; /* in a byte stream: the beginning of a message */
    size_t partial_size;
    struct outgoing outgoing;
};

enum framing {
    FRAMING_TEXT,   /* each message is a WebSocket text frame */
    FRAMING_STREAM, /* WebSocket binary frames carry a byte stream; messages need not align with frames */
    FRAMING_RAW     /* a byte stream without WebSocket */
};

/* What clients say and what they expect, made by the driver of the server's protocol. "%t" stands for the topic in each
 * text: its number, with five digits, so that a text has the same length for all topics. */
struct dialogue {
    enum framing framing;
    const char *path;              /* target of a subscriber's opening handshake */
    const char *publisher_path;    /* of the publisher's; empty: the same */
    const char *subscribe;         /* sent by a subscriber once it is through the handshake; empty: nothing */
    const char *answer;            /* a subscriber is open after a message that contains this; empty: any */
    uint32_t subscriber_greetings; /* messages (FRAMING_TEXT) that a subscriber gets before the first event */
    uint32_t publisher_greetings;
    const char *hello;            /* sent by the publisher once it is through the handshake; empty: nothing */
    const char *publisher_answer; /* in a byte stream: what the publisher then waits for; empty: nothing */
    const char *publish;          /* what publishes an event */
    const char *event;            /* the event as subscribers get it */
    const char *ping;             /* in a byte stream: what the server may say in between; empty: nothing */
    const char *pong;             /* the answer to it */
    bool publisher_ignores;       /* whether the server may say anything to the publisher */
    bool deflate;                 /* permessage-deflate is asked for (RFC 7692), without context takeover */
};

/* An event as it comes, and how to know it at a glance. */
struct event {
    char *bytes; /* the whole frame, or the whole message in a byte stream; NULL while it is not known */
    size_t size;
    uint64_t header; /* its first bytes, and which of the eight count */
    uint64_t mask;
};

/* Everything that the clients of a load share. */
struct swarm {
    int epoll;
    struct server server;
    const struct dialogue *dialogue;
    const char *headers;  /* more lines for the opening handshake, each with its line end */
    char *buffer;         /* the one receive buffer */
    char *stream;         /* the byte stream taken out of its frames */
    struct event *events; /* one for each topic */
    uint64_t now;         /* CLOCK_MONOTONIC in nanoseconds, at the last read */
    uint64_t reads;       /* successful reads from a socket */
    uint32_t opening;     /* clients under way to OPEN */
    uint32_t open;
    /* Called when a client is open. */
    void (*opened)(struct client *client);
    /* Called when events (one or more, all that came in one read) have arrived at a client. */
    void (*delivered)(struct client *client, uint64_t count);
};

#define BUFFER_SIZE (256 * 1024)
#define MAX_EVENT 65535

/* The time now, by CLOCK_MONOTONIC, in nanoseconds. */
uint64_t monotonic(void);

/* Prepares the swarm for its server and its dialogue, which are set, and encodes the events of all topics. */
void swarm_init(struct swarm *swarm, uint32_t topics);

/* One turn of the event loop: waits at most this many milliseconds, and serves what is ready. */
void swarm_turn(struct swarm *swarm, int timeout);

/* Begins to connect. The client's number, topic and role are set; the rest follows from epoll. */
void client_connect(struct swarm *swarm, struct client *client);

/* Appends a whole frame to what the client has to send; all frames of a client have the same size. client_flush() sends
 * it. */
void client_append(struct client *client, const char *frame, size_t size);

/* Sends what waits, as much of it as the socket takes. */
void client_flush(struct client *client);

/* The bytes that send this text of the topic: a masked frame, or the text itself where there are no frames. Their size
 * goes to *size. The caller frees them. */
char *encode(const struct dialogue *dialogue, const char *text, uint32_t topic, size_t *size);

#endif
