/* The load program of the bench: one process, one epoll instance, thousands of WebSocket connections to one server.
 *
 *   load publish …   opens N subscribers of T topics and one publisher, which keeps a window of publishes under way
 *   load open …      opens connections, and measures what they cost the server
 *
 * A closed loop: a publish is under way from the moment it is sent until every subscriber of its topic has got the
 * event, and it is done then. While fewer than the window are under way the publisher sends: at the end of a turn of
 * the event loop all that are due, by one send(), the topics taking turns. A window of 1 is strict question and answer.
 *
 * With --spin the publishing load never sleeps. A server that wakes up a sleeping reader pays for it (on a virtual
 * machine up to a quarter of what a send costs), and whether the reader sleeps depends on who of the two is a little
 * faster: an effect that clients on other machines do not have. What was spent on waiting is not part of its CPU share
 * then.
 *
 * The result is one JSON object on standard output. Anything that makes a run worthless (a connection lost, an event
 * that was not published, nothing delivered for --patience seconds) is one line on standard error and exit status 1.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "client.h"
#include "die.h"
#include "histogram.h"
#include "process.h"

#define SECOND 1000000000ull
#define MAX_PIDS 64
/* Handshakes under way at the same time: below the backlog of 100 that asyncio's servers have. */
#define OPENING 64

static struct {
    char host[64];
    uint16_t port;
    pid_t pids[MAX_PIDS]; /* the server's processes */
    int pid_count;
    uint32_t subscribers, topics, window; /* publish */
    uint64_t warmup, duration;
    uint32_t connections, base; /* open */
    uint64_t settle;
    uint64_t patience; /* both: how long nothing may happen */
    bool spin;
    struct dialogue dialogue;
} options = {
    .topics = 1,
    .window = 1,
    .patience = 5 * SECOND,
    .dialogue = {.path = "/", .subscribe = "", .answer = "", .publish = "", .event = ""},
};

/* A publish under way. */
struct slot {
    uint64_t sent;      /* when */
    uint32_t remaining; /* deliveries that are still to come */
};

static struct swarm swarm;
static struct client *clients;

static struct {
    struct client *client;
    char **frames; /* what publishes to each topic */
    size_t *sizes;
    char *unsent; /* what the socket did not take yet */
    size_t unsent_size;
    uint64_t published, done, writes;
    uint64_t oldest; /* every publish before this one is done */
    struct slot *ring;
    uint64_t ring_mask;
    uint32_t audience; /* subscribers of each topic */
    uint64_t deliveries, last_delivery;
    struct histogram done_latency, delivery_latency;
} publisher;

/* Time spent on looking in vain whether anything has arrived (--spin). */
static uint64_t spun;

/* All counters at one moment; a measurement is the difference of two. */
struct moment {
    uint64_t time, server_cpu, load_cpu, spun, machine_cpu, published, done, deliveries, writes, reads;
};

static double share(uint64_t part, uint64_t whole) {
    return whole == 0 ? 0 : (double)part / (double)whole;
}

static uint64_t server_cpu(void) {
    uint64_t total = 0;
    for (int i = 0; i < options.pid_count; i++)
        total += process_cpu(options.pids[i]);
    return total;
}

static uint64_t server_rss(void) {
    uint64_t total = 0;
    for (int i = 0; i < options.pid_count; i++)
        total += process_rss(options.pids[i]);
    return total;
}

static struct moment moment(void) {
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (struct moment){
        .time = monotonic(),
        .server_cpu = server_cpu(),
        .load_cpu = (uint64_t)used.tv_sec * SECOND + (uint64_t)used.tv_nsec,
        .spun = spun,
        .machine_cpu = machine_cpu(),
        .published = publisher.published,
        .done = publisher.done,
        .deliveries = publisher.deliveries,
        .writes = publisher.writes,
        .reads = swarm.reads,
    };
}

/* One turn of the event loop: waits at most this many milliseconds, and serves what is ready. */
static void turn(int timeout) {
    struct epoll_event ready[256];
    int count = epoll_wait(swarm.epoll, ready, 256, timeout);
    if (count < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++)
        client_ready(&swarm, ready[i].data.ptr, ready[i].events);
}

/* Opens the clients from the first up to, but without, the last. */
static void open_clients(uint32_t first, uint32_t last) {
    uint32_t next = first;
    uint64_t progressed = monotonic();
    while (swarm.open < last) {
        for (; next < last && swarm.opening < OPENING; next++)
            client_connect(&swarm, &clients[next]);
        uint32_t open = swarm.open;
        turn(100);
        uint64_t now = monotonic();
        if (swarm.open > open)
            progressed = now;
        if (now - progressed > options.patience)
            die("%u of %u connections are open, and nothing more happens", swarm.open, last);
    }
}

static void delivered(struct client *client, uint64_t count) {
    uint64_t number = (client->delivered - count) * options.topics + client->topic;
    publisher.deliveries += count;
    publisher.last_delivery = swarm.now;
    for (; count > 0; count--, number += options.topics) {
        struct slot *slot = &publisher.ring[number & publisher.ring_mask];
        if (number >= publisher.published || number < publisher.oldest || slot->remaining == 0)
            die("connection %u got more events than were published", client->number);
        uint64_t latency = swarm.now - slot->sent;
        histogram_add(&publisher.delivery_latency, latency);
        if (--slot->remaining > 0)
            continue;
        histogram_add(&publisher.done_latency, latency);
        publisher.done++;
    }
}

static void publish_due(void) {
    uint64_t now = monotonic(), first = publisher.published;
    while (publisher.oldest < publisher.published &&
           publisher.ring[publisher.oldest & publisher.ring_mask].remaining == 0)
        publisher.oldest++;
    while (publisher.published - publisher.done < options.window &&
           publisher.published - publisher.oldest <= publisher.ring_mask) {
        uint32_t topic = (uint32_t)(publisher.published % options.topics);
        memcpy(publisher.unsent + publisher.unsent_size, publisher.frames[topic], publisher.sizes[topic]);
        publisher.unsent_size += publisher.sizes[topic];
        publisher.ring[publisher.published & publisher.ring_mask] = (struct slot){now, publisher.audience};
        publisher.published++;
    }
    if (publisher.unsent_size == 0)
        return;
    ssize_t sent = send(publisher.client->fd, publisher.unsent, publisher.unsent_size, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        die("the publisher's connection was lost: %s", strerror(errno));
    if (publisher.published > first)
        publisher.writes++;
    if (sent <= 0)
        return;
    publisher.unsent_size -= (size_t)sent;
    memmove(publisher.unsent, publisher.unsent + sent, publisher.unsent_size);
}

static void check_stalled(uint64_t now) {
    if (now > publisher.last_delivery && now - publisher.last_delivery > options.patience)
        die("no delivery for %.1f s, with %" PRIu64 " of %" PRIu64 " publishes done", share(options.patience, SECOND),
            publisher.done, publisher.published);
}

static void publish_for(uint64_t duration) {
    for (uint64_t now = monotonic(), end = now + duration; now < end;) {
        publish_due();
        uint64_t before = monotonic(), reads = swarm.reads;
        turn(options.spin ? 0 : 100);
        now = monotonic();
        if (options.spin && swarm.reads == reads)
            spun += now - before;
        check_stalled(now);
    }
}

/* Publishes nothing more, and waits until all that is under way is done. Then every count must be exact. */
static void drain(void) {
    while (publisher.done < publisher.published) {
        turn(100);
        check_stalled(monotonic());
    }
    turn(20); /* in case a server delivers something twice */
    for (uint32_t i = 0; i < options.subscribers; i++) {
        uint64_t expected =
            publisher.published / options.topics + (clients[i].topic < publisher.published % options.topics);
        if (clients[i].delivered != expected)
            die("connection %u got %" PRIu64 " events of %" PRIu64, i, clients[i].delivered, expected);
    }
}

static void prepare_publisher(void) {
    uint64_t ring = 1;
    while (ring < 16ull * options.window)
        ring *= 2;
    publisher.ring = calloc(ring, sizeof *publisher.ring);
    publisher.ring_mask = ring - 1;
    publisher.audience = options.subscribers / options.topics;
    publisher.frames = calloc(options.topics, sizeof *publisher.frames);
    publisher.sizes = calloc(options.topics, sizeof *publisher.sizes);
    for (uint32_t topic = 0; topic < options.topics; topic++)
        publisher.frames[topic] = text_frame(options.dialogue.publish, topic, &publisher.sizes[topic]);
    publisher.unsent = malloc(publisher.sizes[0] * options.window);
    publisher.last_delivery = monotonic();
}

static void print_latency(const char *name, const struct histogram *latency) {
    static const struct {
        const char *name;
        double share;
    } points[] = {{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"p99.9", 0.999}};
    printf("  \"%s\": {", name);
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        printf("\"%s\": %.1f, ", points[i].name, (double)histogram_percentile(latency, points[i].share) / 1e3);
    printf("\"max\": %.1f}", (double)latency->max / 1e3);
}

static void run_publish(void) {
    if (options.subscribers == 0 || options.topics == 0 || options.subscribers % options.topics != 0)
        die("the number of subscribers must be a multiple of the number of topics, and not 0");
    if (options.window == 0 || options.dialogue.publish[0] == '\0' || options.dialogue.event[0] == '\0')
        die("publish needs --window of 1 or more, --publish and --event");
    clients = calloc(options.subscribers + 1, sizeof *clients);
    for (uint32_t i = 0; i <= options.subscribers; i++)
        clients[i] = (struct client){.number = i, .topic = i % options.topics, .publisher = i == options.subscribers};
    publisher.client = &clients[options.subscribers];
    open_clients(0, options.subscribers + 1);

    prepare_publisher();
    publish_for(options.warmup);
    memset(&publisher.done_latency, 0, sizeof publisher.done_latency);
    memset(&publisher.delivery_latency, 0, sizeof publisher.delivery_latency);
    struct moment start = moment();
    publish_for(options.duration);
    struct moment end = moment();
    uint64_t rss = server_rss();
    drain();

    uint64_t time = end.time - start.time, deliveries = end.deliveries - start.deliveries;
    uint64_t server = end.server_cpu - start.server_cpu, load = end.load_cpu - start.load_cpu;
    uint64_t machine = end.machine_cpu - start.machine_cpu, vain = end.spun - start.spun;
    printf("{\n  \"subscribers\": %u, \"topics\": %u, \"window\": %u, \"event_bytes\": %zu,\n", options.subscribers,
           options.topics, options.window, swarm.event_size);
    printf("  \"seconds\": %.3f, \"publishes\": %" PRIu64 ", \"deliveries\": %" PRIu64
           ", \"deliveries_per_second\": %.0f,\n",
           share(time, SECOND), end.done - start.done, deliveries, share(deliveries, time) * SECOND);
    printf("  \"total_publishes\": %" PRIu64 ", \"total_deliveries\": %" PRIu64 ",\n", publisher.published,
           publisher.deliveries);
    printf("  \"server_cpu\": %.3f, \"load_cpu\": %.3f, \"other_cpu\": %.3f,\n", share(server, time),
           share(load > vain ? load - vain : 0, time),
           share(machine > server + load ? machine - server - load : 0, time));
    printf("  \"server_us_per_delivery\": %.4f, \"server_rss\": %" PRIu64 ",\n", share(server, deliveries) / 1e3, rss);
    printf("  \"publishes_per_write\": %.2f, \"deliveries_per_read\": %.2f,\n",
           share(end.published - start.published, end.writes - start.writes),
           share(deliveries, end.reads - start.reads));
    print_latency("done_us", &publisher.done_latency);
    printf(",\n");
    print_latency("delivery_us", &publisher.delivery_latency);
    printf("\n}\n");
}

static void settle(void) {
    for (uint64_t end = monotonic() + options.settle; monotonic() < end;)
        turn(10);
}

static void run_open(void) {
    if (options.connections <= options.base)
        die("open needs --connections above --base");
    clients = calloc(options.connections, sizeof *clients);
    for (uint32_t i = 0; i < options.connections; i++)
        clients[i] = (struct client){.number = i};
    open_clients(0, options.base);
    settle();
    uint64_t rss = server_rss();
    struct moment start = moment();
    open_clients(options.base, options.connections);
    struct moment end = moment();
    settle();
    uint64_t rss_after = server_rss();
    /* What a server does for a connection after it has answered counts too, so its CPU time is read once more. */
    uint64_t time = end.time - start.time, server = server_cpu() - start.server_cpu,
             load = end.load_cpu - start.load_cpu;
    uint64_t busy = end.server_cpu - start.server_cpu + load, machine = end.machine_cpu - start.machine_cpu;
    uint32_t connections = options.connections - options.base;
    printf("{\n  \"connections\": %u, \"base\": %u, \"seconds\": %.3f, \"connects_per_second\": %.0f,\n",
           options.connections, options.base, share(time, SECOND), share(connections, time) * SECOND);
    printf("  \"server_cpu\": %.3f, \"load_cpu\": %.3f, \"other_cpu\": %.3f,\n",
           share(end.server_cpu - start.server_cpu, time), share(load, time),
           share(machine > busy ? machine - busy : 0, time));
    printf("  \"server_us_per_connect\": %.2f,\n", share(server, connections) / 1e3);
    printf("  \"server_rss_base\": %" PRIu64 ", \"server_rss\": %" PRIu64 ", \"rss_per_connection\": %.0f\n}\n", rss,
           rss_after, ((double)rss_after - (double)rss) / connections);
}

static uint32_t number(const char *text) {
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value > 1000000)
        die("%s is not a number from 0 to 1000000", text);
    return (uint32_t)value;
}

static uint64_t seconds(const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (*text == '\0' || *end != '\0' || !(value >= 0 && value <= 3600))
        die("%s is not a number of seconds", text);
    return (uint64_t)(value * SECOND);
}

static void set_server(const char *text) {
    int used = 0;
    if (sscanf(text, "%63[0-9.]:%" SCNu16 "%n", options.host, &options.port, &used) != 2 || text[used] != '\0')
        die("--server is an IPv4 address and a port, such as 127.0.0.1:8765");
}

static void set_pid(const char *text) {
    if (options.pid_count == MAX_PIDS)
        die("at most %d processes can be watched", MAX_PIDS);
    options.pids[options.pid_count++] = (pid_t)strtol(text, NULL, 10);
}

static void read_options(int argc, char **argv) {
    enum {
        SERVER = 1,
        PID,
        PATH,
        SUBSCRIBE,
        ANSWER,
        PUBLISH,
        EVENT,
        SUBSCRIBER_GREETINGS,
        PUBLISHER_GREETINGS,
        SUBSCRIBERS,
        TOPICS,
        WINDOW,
        WARMUP,
        DURATION,
        CONNECTIONS,
        BASE,
        SETTLE,
        PATIENCE,
        SPIN
    };
    static const struct option known[] = {
        {"server", required_argument, NULL, SERVER},
        {"pid", required_argument, NULL, PID},
        {"path", required_argument, NULL, PATH},
        {"subscribe", required_argument, NULL, SUBSCRIBE},
        {"answer", required_argument, NULL, ANSWER},
        {"publish", required_argument, NULL, PUBLISH},
        {"event", required_argument, NULL, EVENT},
        {"subscriber-greetings", required_argument, NULL, SUBSCRIBER_GREETINGS},
        {"publisher-greetings", required_argument, NULL, PUBLISHER_GREETINGS},
        {"subscribers", required_argument, NULL, SUBSCRIBERS},
        {"topics", required_argument, NULL, TOPICS},
        {"window", required_argument, NULL, WINDOW},
        {"warmup", required_argument, NULL, WARMUP},
        {"duration", required_argument, NULL, DURATION},
        {"connections", required_argument, NULL, CONNECTIONS},
        {"base", required_argument, NULL, BASE},
        {"settle", required_argument, NULL, SETTLE},
        {"patience", required_argument, NULL, PATIENCE},
        {"spin", no_argument, NULL, SPIN},
        {NULL, 0, NULL, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case SERVER: set_server(optarg); break;
        case PID: set_pid(optarg); break;
        case PATH: options.dialogue.path = optarg; break;
        case SUBSCRIBE: options.dialogue.subscribe = optarg; break;
        case ANSWER: options.dialogue.answer = optarg; break;
        case PUBLISH: options.dialogue.publish = optarg; break;
        case EVENT: options.dialogue.event = optarg; break;
        case SUBSCRIBER_GREETINGS: options.dialogue.subscriber_greetings = number(optarg); break;
        case PUBLISHER_GREETINGS: options.dialogue.publisher_greetings = number(optarg); break;
        case SUBSCRIBERS: options.subscribers = number(optarg); break;
        case TOPICS: options.topics = number(optarg); break;
        case WINDOW: options.window = number(optarg); break;
        case WARMUP: options.warmup = seconds(optarg); break;
        case DURATION: options.duration = seconds(optarg); break;
        case CONNECTIONS: options.connections = number(optarg); break;
        case BASE: options.base = number(optarg); break;
        case SETTLE: options.settle = seconds(optarg); break;
        case PATIENCE: options.patience = seconds(optarg); break;
        case SPIN: options.spin = true; break;
        default: exit(2);
        }
    }
    if (options.port == 0 || options.pid_count == 0)
        die("--server and --pid are needed");
}

int main(int argc, char **argv) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (argc < 2 || (strcmp(argv[1], "publish") != 0 && strcmp(argv[1], "open") != 0))
        die("usage: load publish|open --server HOST:PORT --pid PID …");
    read_options(argc - 1, argv + 1);
    swarm_init(&swarm, options.host, options.port, &options.dialogue, options.topics);
    swarm.delivered = delivered;
    if (strcmp(argv[1], "publish") == 0)
        run_publish();
    else
        run_open();
    return 0;
}
