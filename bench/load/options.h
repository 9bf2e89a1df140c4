/* What the load program is asked to do. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "client.h"

#define SECOND 1000000000ull
#define MAX_PIDS 64

/* Times are in nanoseconds. */
struct options {
    struct server server;
    struct dialogue dialogue;
    char headers[4096];
    pid_t pids[MAX_PIDS]; /* the server's processes */
    int pid_count;
    uint32_t opening; /* handshakes under way at the same time */
    uint64_t patience; /* how long nothing may happen */
    /* publish */
    uint32_t subscribers, stalled, topics, window;
    double rate; /* publishes per second; 0: a closed loop */
    uint64_t warmup, duration, sample, progress;
    uint32_t most_memory; /* of the server, in megabytes; beyond it the measuring ends. 0: any */
    bool spin;
    /* open */
    uint32_t connections, base;
    uint64_t settle;
};

/* Reads the options behind the name of the mode. Dies of the first that is unknown or wrong. */
void read_options(struct options *options, int argc, char **argv);

#endif
