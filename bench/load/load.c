/* The load program: one process, one epoll instance, thousands of connections to one server.
 *
 *   load publish …   opens N subscribers of T topics and one publisher, and measures rates and latencies (publish.c)
 *   load open …      opens connections, and measures what they cost the server (open.c)
 *   load flush …     opens N subscribers and one publisher, and measures how soon all have an event (flush.c)
 *
 * The result is one JSON object, the last line of standard output. Anything that makes a run worthless (a connection lost,
 * an event that was not published, nothing delivered for --patience seconds) is one line on standard error and exit
 * status 1.
 */
#include "load.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "die.h"
#include "process.h"

struct options options;
struct swarm swarm;
struct client *clients;

double share(uint64_t part, uint64_t whole) {
    return whole == 0 ? 0 : (double)part / (double)whole;
}

uint64_t server_cpu(void) {
    uint64_t total = 0;
    for (int i = 0; i < options.pid_count; i++)
        total += process_cpu(options.pids[i]);
    return total;
}

uint64_t server_rss(void) {
    uint64_t total = 0;
    for (int i = 0; i < options.pid_count; i++)
        total += process_rss(options.pids[i]);
    return total;
}

struct moment moment_now(void) {
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (struct moment){
        .time = monotonic(),
        .server_cpu = server_cpu(),
        .load_cpu = (uint64_t)used.tv_sec * SECOND + (uint64_t)used.tv_nsec,
        .machine_cpu = machine_cpu(),
    };
}

void open_clients(uint32_t first, uint32_t last, void (*each_turn)(void)) {
    uint32_t next = first;
    uint64_t progressed = monotonic();
    while (swarm.open < last) {
        for (; next < last && swarm.opening < options.opening; next++)
            client_connect(&swarm, &clients[next]);
        uint32_t open = swarm.open;
        swarm_turn(&swarm, 100);
        if (each_turn != NULL)
            each_turn();
        uint64_t now = monotonic();
        if (swarm.open > open)
            progressed = now;
        if (now - progressed > options.patience)
            die("%u of %u connections are open, and nothing more happens", swarm.open, last);
    }
}

void print_latency(const char *name, const struct histogram *latency) {
    static const struct {
        const char *name;
        unsigned thousandths;
    } points[] = {{"p50", 500}, {"p90", 900}, {"p99", 990}, {"p99.9", 999}};
    printf("\"%s\": {", name);
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        printf("\"%s\": %.1f, ", points[i].name, (double)histogram_percentile(latency, points[i].thousandths) / 1e3);
    printf("\"max\": %.1f}", (double)latency->max / 1e3);
}

void print_cpu(const struct moment *start, const struct moment *end, uint64_t vain) {
    uint64_t time = end->time - start->time, server = end->server_cpu - start->server_cpu,
             load = end->load_cpu - start->load_cpu, machine = end->machine_cpu - start->machine_cpu;
    /* All the time but what went by in vain, and no more than it got of its core. */
    uint64_t busy = time > vain ? time - vain : 0;
    busy = busy < load ? busy : load;
    /* A server whose processes are not known is one of the others. */
    printf("\"server_cpu\": %.3f, \"load_cpu\": %.3f, \"other_cpu\": %.3f", share(server, time),
           share(busy, time), share(machine > server + load ? machine - server - load : 0, time));
}

static const struct {
    const char *name;
    void (*run)(void);
} LOADS[] = {{"publish", run_publish}, {"open", run_open}, {"flush", run_flush}};

#define LOAD_COUNT (sizeof LOADS / sizeof *LOADS)

/* Does what the arguments say; the exit status. May be called once in a process. */
int load_main(int argc, char **argv) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    size_t chosen = 0;
    while (chosen < LOAD_COUNT && (argc < 2 || strcmp(argv[1], LOADS[chosen].name) != 0))
        chosen++;
    if (chosen == LOAD_COUNT)
        die("usage: load publish|open|flush --server ADDRESS …");
    read_options(&options, argc - 1, argv + 1);
    swarm.server = options.server;
    swarm.dialogue = &options.dialogue;
    swarm.headers = options.headers;
    LOADS[chosen].run();
    if (fflush(stdout) != 0)
        die("the result cannot be written: %s", strerror(errno));
    return 0;
}
