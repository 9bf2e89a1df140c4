/* The C floor: what it costs at least to unmask a frame and to send() it to all subscribers. No bounds, no topics, no
 * JSON, no SHA-1 (the load program always sends the same key), no answer to anything that the load program does not
 * send.
 *
 *   floor 127.0.0.1:PORT|unix:/path message|batch
 *
 * `message`: one send for each message and subscriber; `batch`: one for all that came in one read.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define TEN "----------"
/* Compiled with -DPADDING='""' it does without; see docs/benchmarks.md. */
#ifndef PADDING
#define PADDING TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN
#endif

enum { MAX_FDS = 65536, SIZE = 256 * 1024 };

static struct {
    unsigned char *bytes;
    size_t size;
    int upgraded;
} clients[MAX_FDS];
static int subscribers[MAX_FDS], subscriber_count;
static unsigned char batch[SIZE];

static void send_to_all(size_t size) {
    for (int i = 0; i < subscriber_count && size > 0; i++)
        if (send(subscribers[i], batch, size, MSG_NOSIGNAL) < 0) /* blocks while a subscriber is behind */
            subscribers[i--] = subscribers[--subscriber_count];
}

/* Eight bytes at a time, as anybody would who means it. */
static void unmask(unsigned char *to, const unsigned char *from, size_t length, const unsigned char *mask) {
    uint64_t wide, word;
    size_t i = 0;
    memcpy(&wide, mask, 4), memcpy((char *)&wide + 4, mask, 4);
    for (; length - i >= 8; i += 8) {
        memcpy(&word, from + i, 8);
        word ^= wide;
        memcpy(to + i, &word, 8);
    }
    for (; i < length; i++)
        to[i] = from[i] ^ mask[i % 4];
}

/* Takes what is whole of the bytes from this client, and returns how many bytes that is. */
static size_t take(int fd, unsigned char *bytes, size_t size, int batching) {
    /* As long as a server with a greeting sends at first, because the client's kernel acknowledges every event once it
     * has seen a longer segment on the connection, and only every second if not. */
    static const char response[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                   "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
                                   "X-Padding: " PADDING "\r\n\r\n";
    if (!clients[fd].upgraded) {
        if (memmem(bytes, size, "\r\n\r\n", 4) == NULL)
            return 0;
        clients[fd].upgraded = send(fd, response, sizeof response - 1, MSG_NOSIGNAL) > 0;
        return size;
    }
    size_t used = 0, filled = 0;
    while (size - used >= 8) {
        unsigned char *frame = bytes + used;
        size_t length = frame[1] & 0x7f, start = 2;
        if (length == 126)
            length = (size_t)frame[2] << 8 | frame[3], start = 4;
        if (size - used < start + 4 + length)
            break;
        memcpy(batch + filled, frame, start);
        batch[filled + 1] &= 0x7f;
        unmask(batch + filled + start, frame + start + 4, length, frame + start);
        used += start + 4 + length;
        if (length >= 4 && memcmp(batch + filled + start, "sub ", 4) == 0) {
            subscribers[subscriber_count++] = fd;
            send(fd, "\x81\x02ok", 4, MSG_NOSIGNAL);
            continue;
        }
        filled += start + length;
        if (!batching)
            send_to_all(filled), filled = 0;
    }
    send_to_all(filled);
    return used;
}

/* A listening socket, or -1 with errno set. */
static int listening(const char *address) {
    struct sockaddr_in tcp = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    int one = 1, unix_socket = strncmp(address, "unix:", 5) == 0;
    int listener = socket(unix_socket ? AF_UNIX : AF_INET, SOCK_STREAM, 0);
    const char *colon = strrchr(address, ':');
    tcp.sin_port = htons(colon != NULL ? (unsigned short)atoi(colon + 1) : 0);
    snprintf(local.sun_path, sizeof local.sun_path, "%s", unix_socket ? address + 5 : "");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    int bound = unix_socket ? bind(listener, (struct sockaddr *)&local, sizeof local)
                            : bind(listener, (struct sockaddr *)&tcp, sizeof tcp);
    return bound < 0 || listen(listener, 4096) < 0 ? -1 : listener;
}

int main(int argc, char **argv) {
    if (argc < 3)
        return fprintf(stderr, "usage: floor 127.0.0.1:PORT|unix:/path message|batch\n"), 1;
    int one = 1, batching = strcmp(argv[2], "batch") == 0, listener = listening(argv[1]);
    if (listener < 0)
        return perror("floor"), 1;
    int epoll = epoll_create1(0);
    struct epoll_event ready[256], event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll, ready, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                fd = event.data.fd = accept(listener, NULL, NULL);
                if (fd < 0 || fd >= MAX_FDS)
                    return fprintf(stderr, "floor: no descriptor for a further connection\n"), 1;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                clients[fd].bytes = malloc(SIZE);
                clients[fd].size = 0, clients[fd].upgraded = 0;
                epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
                continue;
            }
            unsigned char *bytes = clients[fd].bytes;
            ssize_t got = recv(fd, bytes + clients[fd].size, SIZE - clients[fd].size, 0);
            if (got <= 0) {
                for (int at = 0; at < subscriber_count; at++)
                    if (subscribers[at] == fd)
                        subscribers[at--] = subscribers[--subscriber_count];
                free(bytes);
                close(fd);
                continue;
            }
            size_t size = clients[fd].size + (size_t)got, used = take(fd, bytes, size, batching);
            memmove(bytes, bytes + used, clients[fd].size = size - used);
        }
    }
}
