/* The one way in which the load program fails. */
#ifndef DIE_H
#define DIE_H

/* Prints one line of ASCII to standard error and exits with status 1. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
