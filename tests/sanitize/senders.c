/* Uses the threads of senders.h as the loop does, and harder: sockets that are full, closed between two runs and opened
 * again under the same number, pools that begin and end. Every byte that is said to be sent is looked for at the other
 * end. Built with ThreadSanitizer by test_senders.py, which ends the program at a data race.
 *
 * Usage: senders ROUNDS SEED. Exit status 0: all is well. */

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include "senders.h"

enum { SOCKETS = 96, LONGEST = 6000, MOST = 1 << 17 };

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "line %d: not true: %s\n", __LINE__, #condition);   \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

static unsigned char text[LONGEST];
static int ours[SOCKETS], theirs[SOCKETS];
static unsigned char waiting[SOCKETS][MOST]; /* what was sent and not read yet */
static size_t expected[SOCKETS];             /* how many bytes of it */
static uint64_t sent_bytes, partial, full, broken, empty, in_parts;
static uint64_t state;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void open_pair(int i)
{
    int pair[2], size = 4608;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size) == 0);
    CHECK(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0);
    ours[i] = pair[0];
    theirs[i] = pair[1];
    expected[i] = 0;
}

static void close_pair(int i)
{
    close(ours[i]);
    if (theirs[i] >= 0)
        close(theirs[i]);
}

/* Read all that waits at the other end: it must be what was said to be sent. */
static void read_all(int i)
{
    unsigned char buffer[MOST];
    size_t found = 0;
    ssize_t size;
    while (theirs[i] >= 0 && (size = read(theirs[i], buffer + found, sizeof buffer - found)) > 0)
        found += size;
    if (theirs[i] >= 0)
        CHECK(found == expected[i] && memcmp(buffer, waiting[i], found) == 0);
    expected[i] = 0;
}

static void add_jobs(struct senders *senders)
{
    int i;
    for (i = 0; i < SOCKETS; i++) {
        struct send_job *job = &senders->jobs[senders->size++];
        size_t parts = next_random() % 4, size = next_random() % LONGEST, part;
        memset(job, 0, sizeof *job);
        job->fd = next_random() % 16 ? ours[i] : -1;
        job->member = (void *)(intptr_t)i;
        job->data = text;
        job->size = size;
        if (parts < 2)
            continue;
        job->parts = parts;
        job->data = &senders->vector[senders->parts];
        for (part = 0; part < parts; part++) {
            struct iovec *vector = &senders->vector[senders->parts++];
            size_t from = size * part / parts;
            vector->iov_base = text + from;
            vector->iov_len = size * (part + 1) / parts - from;
        }
    }
}

static void settle(struct senders *senders)
{
    size_t place;
    for (place = 0; place < senders->size; place++) {
        struct send_job *job = &senders->jobs[place];
        int i = (int)(intptr_t)job->member;
        CHECK(i == (int)place);
        if (job->fd < 0) {
            CHECK(job->sent == 0 && job->error == 0);
            empty++;
        } else if (job->sent < 0) {
            CHECK(job->error == EAGAIN || job->error == EPIPE || job->error == ECONNRESET);
            full += job->error == EAGAIN;
            broken += job->error != EAGAIN;
        } else {
            CHECK((size_t)job->sent <= job->size);
            partial += (size_t)job->sent < job->size;
            in_parts += job->parts > 0;
            if (theirs[i] >= 0) {
                CHECK(expected[i] + job->sent <= MOST);
                memcpy(waiting[i] + expected[i], text, job->sent);
                expected[i] += job->sent;
            }
            sent_bytes += job->sent;
        }
    }
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 100, round;
    struct senders *senders = NULL;
    int i;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    CHECK(state != 0);
    for (i = 0; i < LONGEST; i++)
        text[i] = (unsigned char)(i * 2654435761u >> 24);
    for (i = 0; i < SOCKETS; i++)
        open_pair(i);
    for (round = 0; round < rounds; round++) {
        if (round % 50 == 0) {
            senders_free(senders); /* NULL at first */
            senders = senders_new(1 + (int)(next_random() % 4));
            CHECK(senders != NULL);
        }
        senders->size = senders->parts = 0;
        if (next_random() % 8)
            add_jobs(senders);
        senders_run(senders);
        settle(senders);
        for (i = 0; i < SOCKETS; i++) {
            switch (next_random() % 16) {
            case 0:
                read_all(i);
                close_pair(i); /* the next one has its number */
                open_pair(i);
                break;
            case 1:
                if (theirs[i] >= 0 && next_random() % 4 == 0) {
                    close(theirs[i]);
                    theirs[i] = -1;
                }
                break;
            case 2: case 3: case 4: case 5: case 6: case 7:
                read_all(i);
                break;
            default:
                break;
            }
        }
    }
    senders_free(senders);
    printf("%lu bytes, %lu full, %lu partial, %lu broken, %lu empty, %lu in parts\n", sent_bytes, full, partial, broken,
           empty, in_parts);
    CHECK(rounds < 100 || (sent_bytes && full && partial && broken && empty && in_parts));
    return 0;
}
