/* Threads that send to many sockets at once, for the one event loop.
 *
 * The loop makes a list of jobs, `senders_run` carries them out, by the threads and by the caller itself, and returns
 * when all are done. So nothing else happens meanwhile: no descriptor is closed, no memory freed, no order changed. The
 * threads know neither Python nor the broker: they take jobs, and call send(2) and sendmsg(2).
 *
 * Invariant: outside of `senders_run` no thread touches a job. A thread that wakes too late finds the run over.
 */

#ifndef WSBROKER_SENDERS_H
#define WSBROKER_SENDERS_H

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

enum {
    /* Jobs of one run, and parts of all of them together. */
    SENDERS_JOBS = 2048,
    SENDERS_PARTS = 8192,
    /* Jobs that a thread takes at once: few enough that all end at about the same time, many enough that they do not
     * fight for the counter. */
    SENDERS_CHUNK = 16,
    SENDERS_STACK = 65536,
};

/* One call of send(2), or of sendmsg(2). */
struct send_job {
    int fd;           /* -1: nothing to do */
    int error;        /* out: errno, where `sent` is -1 */
    ssize_t sent;     /* out: how many bytes the socket took, or -1 */
    const void *data; /* the bytes, or the first of the parts */
    size_t size;      /* bytes, of all parts together */
    size_t parts;     /* 0: `data` are the bytes */
    size_t events;    /* the caller's own, as the next three */
    void *audience;
    void *member;
    void *connection;
};

struct senders {
    int wanted;            /* threads, without the caller */
    int count;             /* of those, how many there are */
    pthread_t *threads;
    pthread_mutex_t lock;  /* of the following four */
    pthread_cond_t begun;
    pthread_cond_t left;
    int running;           /* whether there is a run that threads may join */
    int inside;            /* threads that have joined it */
    unsigned long run;     /* its number: no thread joins it twice */
    int ending;
    _Atomic size_t next;   /* the first job that nobody has taken */
    size_t size;           /* jobs of the run */
    size_t parts;          /* parts of the run */
    struct send_job jobs[SENDERS_JOBS];
    struct iovec vector[SENDERS_PARTS];
};

/* Send one job. Like send(2), but that a signal does not end it. */
static inline void senders_send(struct send_job *job)
{
    struct msghdr message;
    if (job->fd < 0)
        return;
    do {
        if (job->parts == 0) {
            job->sent = send(job->fd, job->data, job->size, MSG_DONTWAIT | MSG_NOSIGNAL);
        } else {
            memset(&message, 0, sizeof message);
            message.msg_iov = (struct iovec *)job->data;
            message.msg_iovlen = job->parts;
            job->sent = sendmsg(job->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        }
    } while (job->sent < 0 && errno == EINTR);
    if (job->sent < 0)
        job->error = errno;
}

/* Take jobs until there are none left. */
static inline void senders_work(struct senders *senders)
{
    size_t size = senders->size, from, to;
    while ((from = atomic_fetch_add_explicit(&senders->next, SENDERS_CHUNK, memory_order_relaxed)) < size) {
        to = size - from < SENDERS_CHUNK ? size : from + SENDERS_CHUNK;
        for (; from < to; from++)
            senders_send(&senders->jobs[from]);
    }
}

static void *senders_thread(void *argument)
{
    struct senders *senders = argument;
    unsigned long seen = 0;
    pthread_mutex_lock(&senders->lock);
    for (;;) {
        while (!senders->ending && !(senders->running && senders->run != seen))
            pthread_cond_wait(&senders->begun, &senders->lock);
        if (senders->ending)
            break;
        seen = senders->run;
        senders->inside++;
        pthread_mutex_unlock(&senders->lock);
        senders_work(senders);
        pthread_mutex_lock(&senders->lock);
        if (--senders->inside == 0)
            pthread_cond_signal(&senders->left);
    }
    pthread_mutex_unlock(&senders->lock);
    return NULL;
}

/* Start the threads that are wanted and not there yet; fewer, where the system allows no more. They take no signals:
 * those are the loop's. */
static inline void senders_start(struct senders *senders)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    size_t stack = SENDERS_STACK < PTHREAD_STACK_MIN ? PTHREAD_STACK_MIN : SENDERS_STACK;
    if (pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setstacksize(&attributes, stack);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (senders->count < senders->wanted &&
           pthread_create(&senders->threads[senders->count], &attributes, senders_thread, senders) == 0)
        senders->count++;
    senders->wanted = senders->count;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Carry out the first `size` jobs. The calling thread takes part, and waits for those that others have taken. */
static inline void senders_run(struct senders *senders)
{
    if (senders->count < senders->wanted)
        senders_start(senders);
    pthread_mutex_lock(&senders->lock);
    atomic_store_explicit(&senders->next, 0, memory_order_relaxed);
    senders->run++;
    senders->running = 1;
    pthread_cond_broadcast(&senders->begun);
    pthread_mutex_unlock(&senders->lock);
    senders_work(senders);
    pthread_mutex_lock(&senders->lock);
    senders->running = 0;
    while (senders->inside > 0)
        pthread_cond_wait(&senders->left, &senders->lock);
    pthread_mutex_unlock(&senders->lock);
}

/* Make a pool of `wanted` threads beside the caller. They start with the first run. NULL: no memory. */
static inline struct senders *senders_new(int wanted)
{
    struct senders *senders = calloc(1, sizeof *senders);
    if (senders == NULL)
        return NULL;
    senders->threads = calloc(wanted, sizeof *senders->threads);
    if (senders->threads == NULL) {
        free(senders);
        return NULL;
    }
    senders->wanted = wanted;
    pthread_mutex_init(&senders->lock, NULL);
    pthread_cond_init(&senders->begun, NULL);
    pthread_cond_init(&senders->left, NULL);
    return senders;
}

/* End the threads and free the pool. Not while a run is under way. */
static inline void senders_free(struct senders *senders)
{
    int i;
    if (senders == NULL)
        return;
    pthread_mutex_lock(&senders->lock);
    senders->ending = 1;
    pthread_cond_broadcast(&senders->begun);
    pthread_mutex_unlock(&senders->lock);
    for (i = 0; i < senders->count; i++)
        pthread_join(senders->threads[i], NULL);
    pthread_cond_destroy(&senders->left);
    pthread_cond_destroy(&senders->begun);
    pthread_mutex_destroy(&senders->lock);
    free(senders->threads);
    free(senders);
}

#endif
