/* N subscribers of T topics, and one publisher.
 *
 * A publish is under way from the moment it is sent until every subscriber of its topic has got the event; it is done
 * then.
 *
 * Closed loop (--window): while fewer than the window are under way the publisher sends; at the end of a turn of the event
 * loop all that are due, by one write, the topics taking turns. A window of 1 is strict question and answer.
 *
 * Open loop (--rate): the publishes have their times, evenly spaced, and are sent then, whatever became of those before.
 * Latencies count from the time at which a publish should have been sent: a server that stands still for a second has a
 * second's worth of late events, and not one.
 *
 * With --spin the load never sleeps. A server that wakes up a sleeping reader pays for it (on a virtual machine up to a
 * quarter of what a send costs), and whether the reader sleeps depends on who of the two is a little faster: an effect
 * that clients on other machines do not have. What was spent on waiting is not part of its CPU share then.
 *
 * Stalled subscribers (--stalled) subscribe and then never read. They are not part of any figure but the server's.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "die.h"
#include "load.h"
#include "process.h"

/* So many bytes of publishes may wait in the publisher, if they are not more than its window. */
#define MAX_UNSENT (1024 * 1024)
/* So many publishes may be under way in an open loop; what a server does not get done it gets no more of. */
#define MAX_UNDER_WAY (1 << 18)
#define MAX_SAMPLES 100000
#define MAX_TOPICS 100000

/* A publish under way. */
struct slot {
    uint64_t sent;      /* when; in an open loop: when it should have been */
    uint32_t remaining; /* deliveries that are still to come */
};

static struct {
    struct client *client;
    char **frames; /* what publishes to each topic */
    size_t *sizes;
    size_t max_unsent; /* so many bytes may wait for the socket to take them */
    uint64_t begun; /* of an open loop: the time of publish number 0 */
    uint64_t published, done, writes;
    uint64_t oldest; /* every publish before this one is done */
    struct slot *ring;
    uint64_t ring_mask;
    uint32_t audience; /* subscribers of each topic that read */
    uint64_t deliveries, last_delivery;
    struct histogram done_latency, delivery_latency;
} publisher;

/* Time spent on looking in vain whether anything has arrived, or is to be sent (--spin). */
static uint64_t spun;

/* How long it took until all clients were open. */
static uint64_t connecting;

static struct {
    double seconds;
    uint64_t rss;
} samples[MAX_SAMPLES];
static size_t sample_count;

/* What is shown on the way (--progress). */
static struct {
    const char *phase;
    uint64_t begun, shown, deliveries;
    struct histogram latency;
} status;

struct counts {
    uint64_t published, done, deliveries, writes, reads, spun;
};

static struct counts counts_now(void) {
    return (struct counts){publisher.published, publisher.done, publisher.deliveries, publisher.writes, swarm.reads, spun};
}

static void show_progress(void) {
    uint64_t now = monotonic();
    if (options.progress == 0 || now - status.shown < options.progress)
        return;
    uint64_t deliveries = publisher.deliveries - status.deliveries;
    printf("{\"progress\": {\"phase\": \"%s\", \"seconds\": %.2f, \"open\": %u, \"publishes\": %" PRIu64
           ", \"deliveries\": %" PRIu64 ", \"deliveries_per_second\": %.0f, \"p50_us\": %.1f, \"p99_us\": %.1f}}\n",
           status.phase, share(now - status.begun, SECOND), swarm.open, publisher.published, publisher.deliveries,
           share(deliveries, now - status.shown) * SECOND, (double)histogram_percentile(&status.latency, 500) / 1e3,
           (double)histogram_percentile(&status.latency, 990) / 1e3);
    if (fflush(stdout) != 0)
        die("nobody reads the progress: %s", strerror(errno));
    memset(&status.latency, 0, sizeof status.latency);
    status.shown = now;
    status.deliveries = publisher.deliveries;
}

static void delivered(struct client *client, uint64_t count) {
    uint64_t number = (client->delivered - count) * options.topics + client->topic;
    publisher.deliveries += count;
    publisher.last_delivery = swarm.now;
    for (; count > 0; count--, number += options.topics) {
        struct slot *slot = &publisher.ring[number & publisher.ring_mask];
        if (number >= publisher.published || number < publisher.oldest || slot->remaining == 0)
            die("connection %u got more events than were published", client->number);
        uint64_t latency = swarm.now > slot->sent ? swarm.now - slot->sent : 0;
        histogram_add(&publisher.delivery_latency, latency);
        if (options.progress > 0)
            histogram_add(&status.latency, latency);
        if (--slot->remaining > 0)
            continue;
        histogram_add(&publisher.done_latency, latency);
        publisher.done++;
    }
}

/* When publish number n should be sent, in an open loop. */
static uint64_t intended(uint64_t number) {
    return publisher.begun + (uint64_t)((double)number / options.rate * SECOND);
}

static bool is_due(uint64_t now) {
    if (options.rate > 0)
        return intended(publisher.published) <= now;
    return publisher.published - publisher.done < options.window;
}

/* Publishes that wait, and of which nothing has gone out yet. */
static uint64_t count_waiting(void) {
    return (publisher.client->outgoing.size - publisher.client->outgoing.head) / publisher.sizes[0];
}

static void publish_due(void) {
    uint64_t now = monotonic(), first = publisher.published;
    while (publisher.oldest < publisher.published &&
           publisher.ring[publisher.oldest & publisher.ring_mask].remaining == 0)
        publisher.oldest++;
    while (publisher.published - publisher.oldest <= publisher.ring_mask && is_due(now)) {
        uint32_t topic = (uint32_t)(publisher.published % options.topics);
        if (publisher.client->outgoing.size + publisher.sizes[topic] > publisher.max_unsent)
            break;
        client_append(publisher.client, publisher.frames[topic], publisher.sizes[topic]);
        uint64_t sent = options.rate > 0 ? intended(publisher.published) : now;
        publisher.ring[publisher.published & publisher.ring_mask] = (struct slot){sent, publisher.audience};
        publisher.published++;
    }
    if (publisher.published > first)
        publisher.writes++;
    client_flush(publisher.client);
}

static void check_stalled(uint64_t now) {
    if (publisher.done == publisher.published) /* nothing is awaited */
        publisher.last_delivery = now;
    if (now > publisher.last_delivery && now - publisher.last_delivery > options.patience)
        die("no delivery for %.1f s, with %" PRIu64 " of %" PRIu64 " publishes done", share(options.patience, SECOND),
            publisher.done, publisher.published);
}

/* How many milliseconds nothing has to be done but read. */
static int leisure(uint64_t now) {
    if (options.spin)
        return 0;
    if (options.rate == 0)
        return 100;
    uint64_t next = intended(publisher.published), most = now + SECOND / 10;
    return next <= now ? 0 : (int)(((next < most ? next : most) - now) / 1000000);
}

static void take_sample(uint64_t begun, uint64_t now) {
    if (options.sample == 0 || sample_count == MAX_SAMPLES || now - begun < sample_count * options.sample)
        return;
    uint64_t rss = 0;
    for (int i = 0; i < options.pid_count; i++)
        rss += process_rss_roughly(options.pids[i]);
    samples[sample_count].seconds = share(now - begun, SECOND);
    samples[sample_count++].rss = rss;
}

/* Whether the server has taken more memory than it may (--most-memory), when last looked at. */
static bool has_grown_too_far(void) {
    return options.most_memory > 0 && sample_count > 0 && samples[sample_count - 1].rss > options.most_memory * 1000000ull;
}

static void publish_for(uint64_t duration, bool measuring) {
    uint64_t begun = monotonic();
    for (uint64_t now = begun; now - begun < duration;) {
        uint64_t turn = now, reads = swarm.reads, published = publisher.published;
        publish_due();
        swarm_turn(&swarm, leisure(monotonic()));
        now = monotonic();
        if (options.spin && swarm.reads == reads && publisher.published == published)
            spun += now - turn;
        check_stalled(now);
        if (measuring)
            take_sample(begun, now);
        if (has_grown_too_far())
            return;
        show_progress();
    }
}

/* Publishes nothing more, and waits until all that is under way is done. Then every count must be exact. */
static void drain(void) {
    status.phase = "draining";
    publisher.last_delivery = monotonic();
    if (options.rate > 0) { /* what the socket did not begin to take is taken back: a slow server has enough to do */
        uint64_t whole = count_waiting();
        publisher.published -= whole;
        publisher.client->outgoing.size -= whole * publisher.sizes[0];
    }
    while (publisher.done < publisher.published) {
        client_flush(publisher.client);
        swarm_turn(&swarm, publisher.client->outgoing.size > 0 ? 1 : 100);
        check_stalled(monotonic());
        show_progress();
    }
    swarm_turn(&swarm, 20); /* in case a server delivers something twice */
    for (uint32_t i = 0; i < options.subscribers; i++) {
        uint64_t expected =
            publisher.published / options.topics + (clients[i].topic < publisher.published % options.topics);
        if (clients[i].delivered != expected)
            die("connection %u got %" PRIu64 " events of %" PRIu64, i, clients[i].delivered, expected);
    }
}

/* The clients: the subscribers, the publisher, and then the stalled ones. */
static void make_clients(void) {
    uint32_t count = options.subscribers + 1 + options.stalled;
    clients = allocate(count, sizeof *clients);
    for (uint32_t i = 0; i < count; i++) {
        clients[i].number = i;
        clients[i].topic = i % options.topics;
        clients[i].role = i < options.subscribers ? SUBSCRIBER : STALLED;
    }
    publisher.client = &clients[options.subscribers];
    publisher.client->role = PUBLISHER;
    publisher.client->topic = 0;
    open_clients(0, count, show_progress);
}

static void prepare_publisher(void) {
    uint64_t ring = 1, most = options.rate > 0 ? MAX_UNDER_WAY : 16ull * options.window;
    while (ring < most)
        ring *= 2;
    publisher.ring = allocate(ring, sizeof *publisher.ring);
    publisher.ring_mask = ring - 1;
    publisher.audience = options.subscribers / options.topics;
    publisher.frames = allocate(options.topics, sizeof *publisher.frames);
    publisher.sizes = allocate(options.topics, sizeof *publisher.sizes);
    for (uint32_t topic = 0; topic < options.topics; topic++)
        publisher.frames[topic] = encode(&options.dialogue, options.dialogue.publish, topic, &publisher.sizes[topic]);
    publisher.max_unsent = publisher.sizes[0] * options.window;
    if (options.rate > 0 || publisher.max_unsent > MAX_UNSENT)
        publisher.max_unsent = publisher.sizes[0] > MAX_UNSENT ? publisher.sizes[0] : MAX_UNSENT;
    publisher.last_delivery = publisher.begun = monotonic();
}

/* The first event of topic 0 as it came, if that had to be learned, without its frame header. */
static void print_learned(void) {
    printf("\"learned\": \"");
    if (options.dialogue.deflate && swarm.events[0].bytes != NULL) {
        size_t start = (swarm.events[0].bytes[1] & 0x7f) == 126 ? 4 : 2;
        printf("%s", swarm.events[0].bytes[0] & 0x40 ? "" : "-"); /* a "-" in front: it came uncompressed */
        for (size_t i = start; i < swarm.events[0].size; i++)
            printf("%02x", (unsigned char)swarm.events[0].bytes[i]);
    }
    printf("\"");
}

static void print_result(const struct moment *start, const struct moment *end, const struct counts *from,
                         const struct counts *to, uint64_t unsent, uint64_t rss_before, uint64_t rss) {
    uint64_t time = end->time - start->time, deliveries = to->deliveries - from->deliveries;
    printf("{\"subscribers\": %u, \"stalled\": %u, \"topics\": %u, \"window\": %u, \"rate\": %.1f, \"event_bytes\": %zu, ",
           options.subscribers, options.stalled, options.topics, options.rate > 0 ? 0 : options.window, options.rate,
           swarm.events[0].size);
    printf("\"connect_seconds\": %.4f, ", share(connecting, SECOND));
    printf("\"seconds\": %.3f, \"publishes\": %" PRIu64 ", \"deliveries\": %" PRIu64
           ", \"deliveries_per_second\": %.0f, \"unsent\": %" PRIu64 ", ",
           share(time, SECOND), to->done - from->done, deliveries, share(deliveries, time) * SECOND, unsent);
    printf("\"total_publishes\": %" PRIu64 ", \"total_deliveries\": %" PRIu64 ", ", publisher.published,
           publisher.deliveries);
    print_cpu(start, end, to->spun - from->spun);
    printf(", \"server_us_per_delivery\": %.4f, \"server_rss_before\": %" PRIu64 ", \"server_rss\": %" PRIu64 ", ",
           share(end->server_cpu - start->server_cpu, deliveries) / 1e3, rss_before, rss);
    printf("\"publishes_per_write\": %.2f, \"deliveries_per_read\": %.2f, ",
           share(to->published - from->published, to->writes - from->writes), share(deliveries, to->reads - from->reads));
    print_latency("done_us", &publisher.done_latency);
    printf(", ");
    print_latency("delivery_us", &publisher.delivery_latency);
    printf(", \"samples\": [");
    for (size_t i = 0; i < sample_count; i++)
        printf("%s[%.3f, %" PRIu64 "]", i > 0 ? ", " : "", samples[i].seconds, samples[i].rss);
    printf("], ");
    print_learned();
    printf("}\n");
}

/* How many publishes should have been sent by now, and were not. */
static uint64_t count_unsent(void) {
    if (options.rate == 0)
        return 0;
    uint64_t now = monotonic(), wanted = (uint64_t)((double)(now - publisher.begun) / SECOND * options.rate);
    uint64_t late = wanted > publisher.published ? wanted - publisher.published : 0;
    return late + count_waiting();
}

void run_publish(void) {
    if (options.subscribers == 0 || options.topics == 0 || options.subscribers % options.topics != 0)
        die("the number of subscribers must be a multiple of the number of topics, and not 0");
    if (options.topics > MAX_TOPICS)
        die("--topics is at most %d: their numbers have five digits", MAX_TOPICS);
    if (options.dialogue.publish[0] == '\0' || options.dialogue.event[0] == '\0')
        die("publish needs --publish and --event");
    if (options.window == 0 && options.rate == 0)
        die("publish needs a --window of 1 or more, or a --rate");
    status.phase = "connecting";
    status.begun = status.shown = monotonic();
    swarm_init(&swarm, options.topics);
    swarm.delivered = delivered;
    make_clients();
    connecting = monotonic() - status.begun;

    uint64_t rss_before = server_rss();
    prepare_publisher();
    status.phase = "warmup";
    publish_for(options.warmup, false);
    memset(&publisher.done_latency, 0, sizeof publisher.done_latency);
    memset(&publisher.delivery_latency, 0, sizeof publisher.delivery_latency);
    status.phase = "measuring";
    struct moment start = moment_now();
    struct counts from = counts_now();
    publish_for(options.duration, true);
    struct moment end = moment_now();
    struct counts to = counts_now();
    uint64_t unsent = count_unsent();
    uint64_t rss = server_rss();
    drain();
    print_result(&start, &end, &from, &to, unsent, rss_before, rss);
}
