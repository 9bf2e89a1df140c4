/* What the kernel says in /proc about the server under load, about this program and about everybody else. */
#ifndef PROCESS_H
#define PROCESS_H

#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

/* CPU time that a process and all its threads have used, those that have ended too, user and system, in nanoseconds. */
uint64_t process_cpu(pid_t pid);

/* Resident memory of a process in bytes; what the kernel holds for its sockets is not in it. */
uint64_t process_rss(pid_t pid);

/* The same, at once, where process_rss() walks over all pages; it may be off by some hundred kB. */
uint64_t process_rss_roughly(pid_t pid);

/* CPU time that everything on this machine has used, and what other machines have stolen from it, in nanoseconds, in
 * steps of a clock tick (10 ms). */
uint64_t machine_cpu(void);

/* The same in clock ticks, read from what /proc/stat says; 0 if it says something else. */
uint64_t busy_ticks(FILE *file);

#endif
