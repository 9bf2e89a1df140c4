/* Parts of the load program by themselves, for test_load_parts.py.
 *
 *   load_parts percentiles THOUSANDTHS…   of the whole numbers on standard input; then the largest of them
 *   load_parts ticks                      busy clock ticks of what /proc/stat says, on standard input
 *   load_parts thread NANOSECONDS         CPU time of this process, after a thread that took so much has ended
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../bench/load/die.c"
#include "../../bench/load/histogram.h"
#include "../../bench/load/process.c"

static struct histogram histogram;

static void *take(void *nanoseconds) {
    struct timespec used;
    do
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    while ((uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec < *(uint64_t *)nanoseconds);
    return NULL;
}

int main(int argc, char **argv) {
    uint64_t value;
    if (strcmp(argv[1], "percentiles") == 0) {
        while (scanf("%" SCNu64, &value) == 1)
            histogram_add(&histogram, value);
        for (int i = 2; i < argc; i++)
            printf("%" PRIu64 "\n", histogram_percentile(&histogram, (unsigned)atoi(argv[i])));
        printf("%" PRIu64 "\n", histogram.max);
    } else if (strcmp(argv[1], "ticks") == 0) {
        printf("%" PRIu64 "\n", busy_ticks(stdin));
    } else {
        pthread_t thread;
        value = strtoull(argv[2], NULL, 10);
        pthread_create(&thread, NULL, take, &value);
        pthread_join(thread, NULL);
        printf("%" PRIu64 "\n", process_cpu(getpid()));
    }
    return 0;
}
