#include "process.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "die.h"

uint64_t process_cpu(pid_t pid) {
    char path[288];
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    if (tasks == NULL)
        die("the server (process %d) is gone", (int)pid);
    /* schedstat counts nanoseconds; the fields in stat, ticks of 10 ms, are too coarse for a run of a second. */
    uint64_t total = 0;
    for (struct dirent *task; (task = readdir(tasks)) != NULL;) {
        if (task->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/proc/%d/task/%.20s/schedstat", (int)pid, task->d_name);
        FILE *file = fopen(path, "r");
        uint64_t running;
        if (file == NULL)
            continue; /* a thread that has ended since */
        if (fscanf(file, "%" SCNu64, &running) == 1)
            total += running;
        fclose(file);
    }
    closedir(tasks);
    return total;
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

uint64_t machine_cpu(void) {
    FILE *file = fopen("/proc/stat", "r");
    uint64_t user, nice, system, idle, wait, irq, softirq;
    if (file == NULL)
        return 0;
    int found = fscanf(file, "cpu %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64,
                       &user, &nice, &system, &idle, &wait, &irq, &softirq);
    fclose(file);
    if (found != 7)
        return 0;
    return (user + nice + system + irq + softirq) * (1000000000u / (uint64_t)sysconf(_SC_CLK_TCK));
}
