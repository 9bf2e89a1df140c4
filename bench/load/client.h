/* The client side of RFC 6455, as much of it as a load needs: opening, masked text frames out, frames in.
 *
 * Thousands of clients share one epoll instance and one receive buffer. What a client keeps for itself is the beginning
 * of a frame whose rest has not come yet.
 */
#ifndef CLIENT_H
#define CLIENT_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum client_state { CONNECTING, UPGRADING, GREETING, OPEN };

struct client {
    int fd;
    enum client_state state;
    uint32_t number;    /* position in the table of clients */
    uint32_t topic;     /* position in the table of topics; a publisher has none */
    uint32_t greetings; /* frames that are still to come before the client counts as open */
    bool publisher;
    uint64_t delivered; /* events so far */
    char *kept;         /* the beginning of a frame */
    size_t kept_size;
};

/* What clients say and what they expect, made by the driver of the server's protocol. "%t" stands for the topic in each
 * text: its number, with five digits, so that a text has the same length for all topics. */
struct dialogue {
    const char *path;              /* target of the opening handshake */
    const char *subscribe;         /* sent by a subscriber once it is through the handshake; empty: nothing */
    const char *answer;            /* the last frame before a subscriber is open contains this; empty: anything */
    uint32_t subscriber_greetings; /* frames that a subscriber gets before the first event */
    uint32_t publisher_greetings;
    const char *publish; /* what publishes an event */
    const char *event;   /* the event as subscribers get it */
};

/* Everything that the clients of a load share. */
struct swarm {
    int epoll;
    struct sockaddr_in server;
    char host[64]; /* for the Host header */
    const struct dialogue *dialogue;
    char *buffer;          /* the one receive buffer */
    size_t event_size;     /* a whole event frame, header included */
    uint64_t event_header; /* its first bytes, and which of the eight count */
    uint64_t header_mask;
    char *events;     /* the event frames, one for each topic, one after the other */
    uint64_t now;     /* CLOCK_MONOTONIC in nanoseconds, at the last read */
    uint64_t reads;   /* successful recv() calls */
    uint32_t opening; /* clients under way to OPEN */
    uint32_t open;
    /* Called when events (one or more, all that came in one read) have arrived at a client. */
    void (*delivered)(struct client *client, uint64_t count);
};

#define BUFFER_SIZE (256 * 1024)
#define MAX_EVENT 65535
/* Clients of one source address: well below the 28,000 local ports that Linux hands out to each. */
#define CLIENTS_PER_ADDRESS 20000

/* The time now, by CLOCK_MONOTONIC, in nanoseconds. */
uint64_t monotonic(void);

/* Prepares the swarm for the server at host (IPv4, in numbers) and port, and encodes the events of all topics. */
void swarm_init(struct swarm *swarm, const char *host, uint16_t port, const struct dialogue *dialogue, uint32_t topics);

/* Begins to connect. The client's number, topic and role are set; the rest follows from epoll. */
void client_connect(struct swarm *swarm, struct client *client);

/* Goes on after epoll has reported something for this client. Dies when the connection is lost: a load whose
 * connections go away measures nothing. */
void client_ready(struct swarm *swarm, struct client *client, uint32_t epoll_events);

/* A masked text frame for the text of this topic; its size goes to *size. The caller frees it. */
char *text_frame(const char *text, uint32_t topic, size_t *size);

#endif
