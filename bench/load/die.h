/* The one way in which the load program fails. */
#ifndef DIE_H
#define DIE_H

#include <stddef.h>

/* Prints one line of ASCII to standard error and exits with status 1. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Memory for so many things of this size, all zeros; dies where there is none. */
void *allocate(size_t count, size_t size);

/* The same memory with another size; dies where there is none. */
void *resize(void *memory, size_t size);

#endif
