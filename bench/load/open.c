/* Connections that are opened and then left alone.
 *
 * The first ones (--base) are not counted, so that what a server sets up once, for any number of them, is not. At most
 * --opening handshakes are under way at the same time.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "die.h"
#include "load.h"

static struct histogram connect_latency;

static void opened(struct client *client) {
    if (client->number >= options.base)
        histogram_add(&connect_latency, swarm.now > client->since ? swarm.now - client->since : 0);
}

static void settle(void) {
    for (uint64_t end = monotonic() + options.settle; monotonic() < end;)
        swarm_turn(&swarm, 10);
}

void run_open(void) {
    if (options.connections <= options.base)
        die("open needs --connections above --base");
    swarm_init(&swarm, 1);
    swarm.opened = opened;
    clients = allocate(options.connections, sizeof *clients);
    for (uint32_t i = 0; i < options.connections; i++)
        clients[i] = (struct client){.number = i};
    open_clients(0, options.base, NULL);
    settle();
    uint64_t rss = server_rss();
    struct moment start = moment_now();
    open_clients(options.base, options.connections, NULL);
    struct moment end = moment_now();
    settle();
    uint64_t rss_after = server_rss();
    /* What a server does for a connection after it has answered counts too, so its CPU time is read once more. */
    uint64_t time = end.time - start.time, server = server_cpu() - start.server_cpu;
    uint32_t connections = options.connections - options.base;
    printf("{\"connections\": %u, \"base\": %u, \"seconds\": %.3f, \"connects_per_second\": %.0f, ", options.connections,
           options.base, share(time, SECOND), share(connections, time) * SECOND);
    print_cpu(&start, &end, 0);
    printf(", \"server_us_per_connect\": %.2f, \"server_rss_base\": %" PRIu64 ", \"server_rss\": %" PRIu64
           ", \"rss_per_connection\": %.0f, ",
           share(server, connections) / 1e3, rss, rss_after, ((double)rss_after - (double)rss) / connections);
    print_latency("connect_us", &connect_latency);
    printf("}\n");
}
