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
