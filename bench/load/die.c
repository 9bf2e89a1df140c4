#include "die.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void die(const char *format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    for (char *at = line; *at != '\0'; at++) /* a server's own words may be anything */
        if ((unsigned char)*at < ' ' || (unsigned char)*at > '~')
            *at = '?';
    fprintf(stderr, "load: %s\n", line);
    exit(1);
}

void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (memory == NULL)
        die("there is no memory for %zu times %zu bytes", count, size);
    return memory;
}

void *resize(void *memory, size_t size) {
    memory = realloc(memory, size);
    if (memory == NULL)
        die("there is no memory for %zu bytes", size);
    return memory;
}
