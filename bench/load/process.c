#include "process.h"

#include <inttypes.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "die.h"

uint64_t process_cpu(pid_t pid) {
    /* In nanoseconds, and with the threads that have ended; the fields in stat, ticks of 10 ms, are too coarse for a run
     * of a second. */
    clockid_t clock;
    struct timespec used;
    if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &used) < 0)
        die("the server (process %d) is gone", (int)pid);
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

uint64_t process_rss(pid_t pid) {
    /* smaps_rollup is exact, while the counters in statm and status may lag by some hundred kB. */
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", (int)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        die("the server (process %d) is gone", (int)pid);
    uint64_t kilobytes = 0;
    while (fgets(line, sizeof line, file) != NULL && sscanf(line, "Rss: %" SCNu64, &kilobytes) != 1)
        ;
    fclose(file);
    return kilobytes * 1024;
}

uint64_t process_rss_roughly(pid_t pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        die("the server (process %d) is gone", (int)pid);
    uint64_t size, resident = 0;
    if (fscanf(file, "%" SCNu64 " %" SCNu64, &size, &resident) != 2)
        resident = 0;
    fclose(file);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t busy_ticks(FILE *file) {
    /* Stolen time is what the hypervisor gave to other machines although this one had something to do (proc(5)). */
    uint64_t user, nice, system, idle, wait, irq, softirq, steal;
    int found = fscanf(file,
                       "cpu %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64,
                       &user, &nice, &system, &idle, &wait, &irq, &softirq, &steal);
    return found == 8 ? user + nice + system + irq + softirq + steal : 0;
}

uint64_t machine_cpu(void) {
    FILE *file = fopen("/proc/stat", "r");
    if (file == NULL)
        return 0;
    uint64_t ticks = busy_ticks(file);
    fclose(file);
    return ticks * (1000000000u / (uint64_t)sysconf(_SC_CLK_TCK));
}
