/* How long it takes until an event is in the sockets of all its subscribers.
 *
 * N subscribers and a publisher; one publish at a time. While it is under way the load program sleeps, so that the server
 * has all cores. When an event arrived is what the kernel says (SO_TIMESTAMPNS): its clock at the moment at which the
 * last bytes came into the socket. They are read afterwards.
 *
 * What comes is compared with the first event, as a number of bytes; what is in it other loads look at.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "die.h"
#include "load.h"

/* The first events are waited for so long: by then each has come. */
#define LEARNING (SECOND / 5)
/* Between two looks at what has come. */
#define SHORTEST_SLEEP (SECOND / 1000)

static struct {
    struct client *publisher;
    char *frame;
    size_t frame_size;
    size_t event_size;  /* bytes in which an event comes; 0: not known yet */
    uint64_t usual;     /* how long the last one took */
    struct histogram done;
} flush;

static uint64_t realtime(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

static void sleep_for(uint64_t duration) {
    struct timespec left = {.tv_sec = (time_t)(duration / SECOND), .tv_nsec = (long)(duration % SECOND)};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

static void ask_for_timestamps(struct client *client) {
    int on = 1;
    if (setsockopt(client->fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on) != 0)
        die("this system does not say when something arrived: %s", strerror(errno));
}

/* Reads what has come to a client; how many bytes it was. When the last of it came goes to *arrived. */
static size_t read_arrived(struct client *client, uint64_t *arrived) {
    char control[CMSG_SPACE(sizeof(struct timespec))];
    struct iovec vector = {.iov_base = swarm.buffer, .iov_len = BUFFER_SIZE};
    size_t found = 0;
    for (;;) {
        struct msghdr message = {
            .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t size = recvmsg(client->fd, &message, MSG_DONTWAIT);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return found;
        if (size <= 0)
            die("connection %u was closed by the server", client->number);
        found += (size_t)size;
        for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head != NULL; head = CMSG_NXTHDR(&message, head)) {
            struct timespec time;
            if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_TIMESTAMPNS)
                continue;
            memcpy(&time, CMSG_DATA(head), sizeof time);
            *arrived = (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
        }
    }
}

/* Waits until every subscriber has got the event that was published at this time; when the last one had it. */
static uint64_t wait_for_all(uint64_t sent) {
    uint64_t last = sent;
    size_t *found = allocate(options.subscribers, sizeof *found);
    for (uint32_t left = options.subscribers; left > 0;) {
        sleep_for(flush.event_size == 0 ? LEARNING : 2 * flush.usual + SHORTEST_SLEEP);
        left = 0;
        for (uint32_t i = 0; i < options.subscribers; i++) {
            uint64_t arrived = 0;
            if (flush.event_size > 0 && found[i] == flush.event_size)
                continue;
            found[i] += read_arrived(&clients[i], &arrived);
            last = arrived > last ? arrived : last;
            left += found[i] < (flush.event_size > 0 ? flush.event_size : swarm.events[0].size);
            if (flush.event_size > 0 && found[i] > flush.event_size)
                die("connection %u got %zu bytes and not %zu", i, found[i], flush.event_size);
        }
        if (realtime() - sent > options.patience)
            die("%u of %u subscribers have not got the event", left, options.subscribers);
    }
    for (uint32_t i = 1; i < options.subscribers; i++)
        if (found[i] != found[0])
            die("connection %u got %zu bytes and not %zu", i, found[i], found[0]);
    flush.event_size = found[0];
    free(found);
    return last;
}

static uint64_t flush_for(uint64_t duration) {
    uint64_t count = 0;
    for (uint64_t begun = monotonic(); count == 0 || monotonic() - begun < duration; count++) {
        uint64_t arrived = 0, sent = realtime();
        client_append(flush.publisher, flush.frame, flush.frame_size);
        client_flush(flush.publisher);
        if (flush.publisher->outgoing.size > 0)
            die("the server does not take the publish");
        flush.usual = wait_for_all(sent) - sent;
        histogram_add(&flush.done, flush.usual);
        read_arrived(flush.publisher, &arrived); /* answers, which nobody reads */
    }
    return count;
}

void run_flush(void) {
    if (options.subscribers == 0)
        die("flush needs --subscribers");
    if (options.dialogue.publish[0] == '\0' || options.dialogue.event[0] == '\0')
        die("flush needs --publish and --event");
    if (options.server.tls)
        die("flush knows no TLS");
    swarm_init(&swarm, 1);
    clients = allocate(options.subscribers + 1, sizeof *clients);
    for (uint32_t i = 0; i <= options.subscribers; i++)
        clients[i] = (struct client){.number = i, .role = i < options.subscribers ? SUBSCRIBER : PUBLISHER};
    flush.publisher = &clients[options.subscribers];
    open_clients(0, options.subscribers + 1, NULL);
    for (uint32_t i = 0; i < options.subscribers; i++)
        ask_for_timestamps(&clients[i]);
    flush.frame = encode(&options.dialogue, options.dialogue.publish, 0, &flush.frame_size);

    flush_for(options.warmup);
    memset(&flush.done, 0, sizeof flush.done);
    struct moment start = moment_now();
    uint64_t count = flush_for(options.duration);
    struct moment end = moment_now();
    printf("{\"subscribers\": %u, \"event_bytes\": %zu, \"seconds\": %.3f, \"publishes\": %" PRIu64 ", ",
           options.subscribers, flush.event_size, share(end.time - start.time, SECOND), count);
    print_cpu(&start, &end, 0);
    printf(", \"server_us_per_delivery\": %.4f, ",
           share(end.server_cpu - start.server_cpu, count * options.subscribers) / 1e3);
    print_latency("done_us", &flush.done);
    printf("}\n");
}
