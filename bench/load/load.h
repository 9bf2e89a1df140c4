/* What both loads use: the options, the clients, and the counters at one moment. */
#ifndef LOAD_H
#define LOAD_H

#include "client.h"
#include "histogram.h"
#include "options.h"

extern struct options options;
extern struct swarm swarm;
extern struct client *clients;

/* CPU time and the like at one moment, in nanoseconds; a measurement is the difference of two. */
struct moment {
    uint64_t time, server_cpu, load_cpu, machine_cpu;
};

struct moment moment_now(void);

uint64_t server_cpu(void);
uint64_t server_rss(void);

/* Part of a whole, or 0 where there is no whole. */
double share(uint64_t part, uint64_t whole);

/* Opens the clients from the first up to, but without, the last; `each_turn` is called now and then, if it is set. */
void open_clients(uint32_t first, uint32_t last, void (*each_turn)(void));

/* Prints `"name": {"p50": …}` in microseconds. */
void print_latency(const char *name, const struct histogram *latency);

/* The CPU shares between two moments, as JSON fields; `vain` is time that the load spent on waiting. */
void print_cpu(const struct moment *start, const struct moment *end, uint64_t vain);

/* The loads. */
void run_publish(void);
void run_open(void);
void run_flush(void);

#endif
