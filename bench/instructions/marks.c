/* What the program under callgrind says to it (https://valgrind.org/docs/manual/cl-manual.html#cl-manual.clientrequests).
 * Outside valgrind all of it does nothing. */
#include <valgrind/callgrind.h>

/* Whether callgrind, or another tool of valgrind, runs this program. */
int marks_heard(void)
{
    return RUNNING_ON_VALGRIND != 0;
}

/* Count from here on. */
void marks_start(void)
{
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

/* Write down what was counted since the last mark, under this name, and begin at zero again. */
void marks_dump(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
}

/* Count no more. */
void marks_stop(void)
{
    CALLGRIND_STOP_INSTRUMENTATION;
}
