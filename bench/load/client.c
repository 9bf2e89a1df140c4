#include "client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "die.h"

/* The nonce of the example in RFC 6455, section 1.3, and the answer to it. A client should draw its own; with a fixed
 * one neither the load nor the C floor needs SHA-1, and a server cannot tell the difference. */
static const char KEY[] = "dGhlIHNhbXBsZSBub25jZQ==";
static const char ACCEPT[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/* Any key will do as long as no byte of it is zero; a fixed one makes every run send the same bytes. */
static const unsigned char MASK[4] = {0x9d, 0x3b, 0x51, 0xe6};

enum opcode { CONTINUATION = 0, TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10 };

static void progress(struct swarm *swarm, struct client *client);
static size_t read_bytes(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static size_t read_response(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static size_t read_frames(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static void read_frame(struct swarm *swarm, struct client *client, int opcode, char *payload, size_t size);

void client_connect(struct swarm *swarm, struct client *client) {
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0)
        die("socket: %s (the limit on open files is `ulimit -n`)", strerror(errno));
    int one = 1;
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    uint32_t step = client->number / CLIENTS_PER_ADDRESS;
    if (step > 0) {
        struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + step)};
        setsockopt(client->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(client->fd, (struct sockaddr *)&source, sizeof source) < 0)
            die("bind: %s", strerror(errno));
    }
    client->state = CONNECTING;
    swarm->opening++;
    if (connect(client->fd, (struct sockaddr *)&swarm->server, sizeof swarm->server) < 0 && errno != EINPROGRESS)
        die("connect: %s", strerror(errno));
    /* Edge-triggered: the kernel need not look at thousands of sockets again that have been read to the end. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = client};
    if (epoll_ctl(swarm->epoll, EPOLL_CTL_ADD, client->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

void client_ready(struct swarm *swarm, struct client *client, uint32_t epoll_events) {
    if (client->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error != 0)
            die("connection %u of %u: %s", client->number, swarm->open, strerror(error));
        if (!(epoll_events & EPOLLOUT))
            return;
        progress(swarm, client);
    }
    if (!(epoll_events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return;
    for (;;) {
        size_t kept = client->kept_size, room = BUFFER_SIZE - kept;
        if (kept > 0)
            memcpy(swarm->buffer, client->kept, kept);
        ssize_t got = recv(client->fd, swarm->buffer + kept, room, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return;
        if (got < 0)
            die("connection %u was lost: %s", client->number, strerror(errno));
        if (got == 0)
            die("connection %u was ended by the server", client->number);
        swarm->reads++;
        swarm->now = monotonic();
        size_t size = kept + (size_t)got, used = read_bytes(swarm, client, swarm->buffer, size);
        client->kept_size = size - used;
        if (client->kept_size > 0) {
            client->kept = realloc(client->kept, client->kept_size);
            memcpy(client->kept, swarm->buffer + used, client->kept_size);
        }
        /* A read that did not fill the buffer has emptied the socket, and epoll will tell of more (epoll(7), Q9). */
        if ((size_t)got < room)
            return;
    }
}

static void send_all(struct client *client, const char *bytes, size_t size) {
    /* What is sent here is small, and the peer's buffer is empty. */
    if (send(client->fd, bytes, size, MSG_NOSIGNAL) != (ssize_t)size)
        die("connection %u does not take %zu bytes: %s", client->number, size, strerror(errno));
}

/* One step towards OPEN: connected → handshake → greeting (with the subscription under way) → open. */
static void progress(struct swarm *swarm, struct client *client) {
    const struct dialogue *dialogue = swarm->dialogue;
    if (client->state == CONNECTING) {
        char request[1024];
        int size = snprintf(request, sizeof request,
                            "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            "Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n",
                            dialogue->path, swarm->host, KEY);
        client->state = UPGRADING;
        send_all(client, request, (size_t)size);
        return;
    }
    if (client->state == UPGRADING) {
        client->state = GREETING;
        client->greetings = client->publisher ? dialogue->publisher_greetings : dialogue->subscriber_greetings;
        if (!client->publisher && dialogue->subscribe[0] != '\0') {
            size_t size;
            char *frame = text_frame(dialogue->subscribe, client->topic, &size);
            send_all(client, frame, size);
            free(frame);
        }
    }
    if (client->state == GREETING && client->greetings == 0) {
        client->state = OPEN;
        swarm->opening--;
        swarm->open++;
    }
}

static size_t read_bytes(struct swarm *swarm, struct client *client, char *bytes, size_t size) {
    size_t used = 0;
    if (client->state == UPGRADING) {
        used = read_response(swarm, client, bytes, size);
        if (client->state == UPGRADING)
            return used;
    }
    return used + read_frames(swarm, client, bytes + used, size - used);
}

static size_t read_response(struct swarm *swarm, struct client *client, char *bytes, size_t size) {
    char *end = memmem(bytes, size, "\r\n\r\n", 4);
    if (end == NULL)
        return 0;
    size_t head = (size_t)(end - bytes) + 4;
    if (head < 12 || memcmp(bytes, "HTTP/1.1 101", 12) != 0)
        die("the server refused the handshake: %.*s", (int)((char *)memchr(bytes, '\r', head) - bytes), bytes);
    if (memmem(bytes, head, ACCEPT, sizeof ACCEPT - 1) == NULL)
        die("the server's handshake has no proper Sec-WebSocket-Accept");
    progress(swarm, client);
    return head;
}

/* Reads the whole frames in these bytes, and returns how many bytes they are. */
static size_t read_frames(struct swarm *swarm, struct client *client, char *bytes, size_t size) {
    char *at = bytes, *end = bytes + size, *last = NULL;
    uint64_t count = 0;
    for (;;) {
        size_t left = (size_t)(end - at);
        if (client->state == OPEN && !client->publisher) {
            /* The short way for what comes by the million: an event is known by its header, so its length. */
            for (uint64_t header; left >= swarm->event_size; left -= swarm->event_size, at += swarm->event_size) {
                memcpy(&header, at, sizeof header);
                if ((header & swarm->header_mask) != swarm->event_header)
                    break;
                last = at;
                count++;
            }
        }
        unsigned char *header = (unsigned char *)at;
        if (left < 2)
            break;
        size_t start = 2, length = header[1];
        if (length == 126) {
            start = 4;
            if (left >= start)
                length = (size_t)header[2] << 8 | header[3];
        } else if (length > 126) {
            die("connection %u got a masked or very large frame", client->number);
        }
        if (left < start || left - start < length) {
            if (start + length > BUFFER_SIZE / 2)
                die("connection %u got a frame of %zu bytes", client->number, length);
            break;
        }
        if ((header[0] & 0xf0) != 0x80)
            die("connection %u got a fragment or reserved bits", client->number);
        read_frame(swarm, client, header[0] & 0x0f, at + start, length);
        at += start + length;
    }
    if (count > 0) {
        /* Comparing one of each read keeps the server honest, and costs little beside the read. */
        if (memcmp(last, swarm->events + (size_t)client->topic * swarm->event_size, swarm->event_size) != 0)
            die("connection %u got an event that is not the one published: %.*s", client->number, 200, last + 2);
        client->delivered += count;
        swarm->delivered(client, count);
    }
    return (size_t)(at - bytes);
}

/* Any frame but an event. */
static void read_frame(struct swarm *swarm, struct client *client, int opcode, char *payload, size_t size) {
    int shown = size < 200 ? (int)size : 200;
    if (opcode == PING) {
        char pong[2 + 4 + 125] = {(char)(0x80 | PONG), (char)(0x80 | size)};
        memcpy(pong + 2, MASK, 4);
        for (size_t i = 0; i < size; i++)
            pong[6 + i] = (char)(payload[i] ^ MASK[i % 4]);
        send_all(client, pong, 6 + size);
        return;
    }
    if (opcode == PONG)
        return;
    if (opcode == CLOSE) {
        int code = size >= 2 ? (unsigned char)payload[0] << 8 | (unsigned char)payload[1] : 1005;
        die("connection %u was closed by the server: %d %.*s", client->number, code, size > 2 ? shown - 2 : 0,
            payload + 2);
    }
    if (client->state != GREETING)
        die("connection %u got something that is not an event: %.*s", client->number, shown, payload);
    client->greetings--;
    const char *answer = swarm->dialogue->answer;
    if (client->greetings == 0 && !client->publisher && memmem(payload, size, answer, strlen(answer)) == NULL)
        die("the server did not accept a subscription: %.*s", shown, payload);
    progress(swarm, client);
}

/* The text with the topic put in. The caller frees it. */
static char *put_topic(const char *text, uint32_t topic) {
    char *filled = malloc(strlen(text) * 3 + 8), *out = filled;
    while (*text != '\0') {
        if (text[0] == '%' && text[1] == 't') {
            out += sprintf(out, "%05u", topic);
            text += 2;
        } else {
            *out++ = *text++;
        }
    }
    *out = '\0';
    return filled;
}

/* Writes the header of a text frame and returns its size. RFC 6455, section 5.2. */
static size_t put_header(char *frame, size_t length, bool masked) {
    char mask_bit = masked ? (char)0x80 : 0;
    if (length > MAX_EVENT)
        die("messages above %d bytes are not provided for", MAX_EVENT);
    frame[0] = (char)(0x80 | TEXT);
    if (length < 126) {
        frame[1] = (char)((char)length | mask_bit);
        return 2;
    }
    frame[1] = (char)(126 | mask_bit);
    frame[2] = (char)(length >> 8);
    frame[3] = (char)length;
    return 4;
}

char *text_frame(const char *text, uint32_t topic, size_t *size) {
    char *filled = put_topic(text, topic);
    size_t length = strlen(filled);
    char *frame = malloc(length + 16);
    size_t start = put_header(frame, length, true);
    memcpy(frame + start, MASK, 4);
    start += 4;
    for (size_t i = 0; i < length; i++)
        frame[start + i] = (char)(filled[i] ^ MASK[i % 4]);
    free(filled);
    *size = start + length;
    return frame;
}

void swarm_init(struct swarm *swarm, const char *host, uint16_t port, const struct dialogue *dialogue,
                uint32_t topics) {
    swarm->epoll = epoll_create1(EPOLL_CLOEXEC);
    swarm->server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, host, &swarm->server.sin_addr) != 1)
        die("%s is not an IPv4 address", host);
    snprintf(swarm->host, sizeof swarm->host, "%s:%u", host, port);
    swarm->dialogue = dialogue;
    swarm->buffer = malloc(BUFFER_SIZE + sizeof(uint64_t));
    for (uint32_t topic = 0; topic < topics; topic++) {
        char *text = put_topic(dialogue->event, topic);
        size_t length = strlen(text);
        char frame[16];
        size_t start = put_header(frame, length, false);
        if (topic == 0) {
            swarm->event_size = start + length;
            swarm->events = malloc(swarm->event_size * topics + sizeof(uint64_t));
        }
        char *event = swarm->events + topic * swarm->event_size;
        memcpy(event, frame, start);
        memcpy(event + start, text, length);
        free(text);
        memset(&swarm->header_mask, 0xff, start);
        memcpy(&swarm->event_header, event, start);
    }
}

uint64_t monotonic(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}
