#include "client.h"

#include <errno.h>
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

static const char DEFLATE_OFFER[] = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; "
                                    "client_no_context_takeover\r\n";

enum opcode { CONTINUATION = 0, TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10 };

/* So much of what nobody takes is kept at most, beside publishes. */
#define MAX_HEAD (1024 * 1024)

/* TLS encrypts so many bytes at a time at most (RFC 8446, section 5.1). */
#define TLS_RECORD (16 * 1024)

enum { RSV1 = 0x40 }; /* RFC 7692, section 6: this message is compressed */

static void progress(struct swarm *swarm, struct client *client);
static size_t read_bytes(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static size_t read_response(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static size_t read_frames(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static size_t read_stream(struct swarm *swarm, struct client *client, char *bytes, size_t size);
static void read_frame(struct swarm *swarm, struct client *client, int opcode, bool compressed, char *payload,
                       size_t size);

void client_connect(struct swarm *swarm, struct client *client) {
    client->since = monotonic();
    client->fd = transport_connect(&swarm->server, client->number);
    client->state = CONNECTING;
    swarm->opening++;
    /* Edge-triggered: the kernel need not look at thousands of sockets again that have been read to the end. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = client};
    if (epoll_ctl(swarm->epoll, EPOLL_CTL_ADD, client->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

/* Puts the client's unread bytes behind what it kept, and reads them; false when nothing more has come. */
static bool read_once(struct swarm *swarm, struct client *client) {
    size_t kept = client->kept_size, free_space = BUFFER_SIZE - kept;
    if (kept > 0)
        memcpy(swarm->buffer, client->kept, kept);
    ssize_t got = transport_read(client, swarm->buffer + kept, free_space);
    if (got < 0 && errno == EINTR)
        return true;
    if (got < 0 && errno == EAGAIN)
        return false;
    if (got < 0)
        die("connection %u was lost: %s", client->number, strerror(errno));
    if (got == 0)
        die("connection %u was ended by the server", client->number);
    swarm->reads++;
    swarm->now = monotonic();
    size_t size = kept + (size_t)got, used = read_bytes(swarm, client, swarm->buffer, size);
    client->kept_size = size - used;
    if (client->kept_size > BUFFER_SIZE / 2)
        die("connection %u got a message of more than %d bytes", client->number, BUFFER_SIZE / 2);
    if (client->kept_size > 0) {
        client->kept = resize(client->kept, client->kept_size);
        memcpy(client->kept, swarm->buffer + used, client->kept_size);
    }
    /* A read that did not fill the buffer has emptied the socket, and epoll will tell of more (epoll(7), Q9). TLS gives
     * out one record at a time. */
    return (size_t)got == free_space || client->tls != NULL;
}

/* Goes on after epoll has reported something. Dies when the connection is lost: a load whose connections go away measures
 * nothing. */
static void client_ready(struct swarm *swarm, struct client *client, uint32_t epoll_events) {
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
    if (client->state == SECURING) {
        if (!transport_is_secure(client))
            return;
        progress(swarm, client);
    }
    if (epoll_events & EPOLLOUT)
        client_flush(client);
    if (!(epoll_events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
        return;
    while (read_once(swarm, client))
        if (client->role == STALLED && client->state == OPEN)
            return;
    if (epoll_events & EPOLLRDHUP) /* the end has come with the last bytes, and will not be told again */
        read_once(swarm, client);
}

void swarm_turn(struct swarm *swarm, int timeout) {
    struct epoll_event ready[256];
    int count = epoll_wait(swarm->epoll, ready, 256, timeout);
    if (count < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++)
        client_ready(swarm, ready[i].data.ptr, ready[i].events);
}

/* Puts bytes behind the first `at` of those that wait. */
static void insert(struct outgoing *out, size_t at, const char *bytes, size_t size) {
    if (out->size + size > out->capacity) {
        out->capacity = 2 * (out->size + size);
        out->bytes = resize(out->bytes, out->capacity);
    }
    memmove(out->bytes + at + size, out->bytes + at, out->size - at);
    memcpy(out->bytes + at, bytes, size);
    out->size += size;
}

void client_append(struct client *client, const char *frame, size_t size) {
    insert(&client->outgoing, client->outgoing.size, frame, size);
    client->outgoing.frame = size;
}

/* Sends a small message: at once, or as soon as what was begun before it is complete. */
static void send_soon(struct client *client, const char *bytes, size_t size) {
    struct outgoing *out = &client->outgoing;
    insert(out, out->head, bytes, size);
    out->head += size;
    if (out->head > MAX_HEAD)
        die("connection %u takes nothing of %zu bytes", client->number, out->head);
    client_flush(client);
}

/* The head grows to the end of the frame in which the first `size` bytes end. */
static void extend_head(struct outgoing *out, size_t size) {
    if (size > out->head)
        out->head += (size - out->head + out->frame - 1) / out->frame * out->frame;
}

void client_flush(struct client *client) {
    struct outgoing *out = &client->outgoing;
    if (out->size == 0)
        return;
    ssize_t sent = transport_write(client, out->bytes, out->size);
    if (sent < 0 && errno == EINTR)
        return;
    if (sent < 0 && errno != EAGAIN)
        die("connection %u was lost: %s", client->number, strerror(errno));
    if (sent < 0) {
        if (client->tls != NULL) /* the same bytes have to be offered again, as many at least */
            extend_head(out, out->size < TLS_RECORD ? out->size : TLS_RECORD);
        return;
    }
    extend_head(out, (size_t)sent);
    out->head -= (size_t)sent;
    out->size -= (size_t)sent;
    memmove(out->bytes, out->bytes + sent, out->size);
}

/* The text with the topic put in. The caller frees it. */
static char *put_topic(const char *text, uint32_t topic) {
    char *filled = allocate(strlen(text) * 3 + 8, 1), *out = filled;
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

static void send_text(struct swarm *swarm, struct client *client, const char *text) {
    if (text[0] == '\0')
        return;
    size_t size;
    char *bytes = encode(swarm->dialogue, text, client->topic, &size);
    send_soon(client, bytes, size);
    free(bytes);
}

static void send_request(struct swarm *swarm, struct client *client) {
    const struct dialogue *dialogue = swarm->dialogue;
    bool own_path = client->role == PUBLISHER && dialogue->publisher_path[0] != '\0';
    char request[8192], *path = put_topic(own_path ? dialogue->publisher_path : dialogue->path, client->topic);
    int size = snprintf(request, sizeof request,
                        "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n%s%s\r\n",
                        path, swarm->server.name, KEY, dialogue->deflate ? DEFLATE_OFFER : "", swarm->headers);
    free(path);
    if (size >= (int)sizeof request)
        die("the request for the opening handshake is too long");
    send_soon(client, request, (size_t)size);
}

/* Whether nothing more has to come before the client is open. */
static bool is_greeted(const struct swarm *swarm, const struct client *client) {
    const struct dialogue *dialogue = swarm->dialogue;
    if (dialogue->framing == FRAMING_TEXT)
        return client->greetings == 0;
    return (client->role == PUBLISHER ? dialogue->publisher_answer : dialogue->answer)[0] == '\0';
}

static void become_open(struct swarm *swarm, struct client *client) {
    client->state = OPEN;
    swarm->opening--;
    swarm->open++;
    if (client->role == STALLED && epoll_ctl(swarm->epoll, EPOLL_CTL_DEL, client->fd, NULL) < 0)
        die("epoll_ctl: %s", strerror(errno));
    if (swarm->opened != NULL)
        swarm->opened(client);
}

/* One step towards OPEN: connected → TLS → handshake → greeting (with the subscription under way) → open. */
static void progress(struct swarm *swarm, struct client *client) {
    const struct dialogue *dialogue = swarm->dialogue;
    if (client->state == CONNECTING && swarm->server.tls) {
        transport_secure(client, &swarm->server);
        client->state = SECURING;
        return;
    }
    if (client->state <= SECURING && dialogue->framing != FRAMING_RAW) {
        client->state = UPGRADING;
        send_request(swarm, client);
        return;
    }
    if (client->state != GREETING) {
        client->state = GREETING;
        bool publisher = client->role == PUBLISHER;
        client->greetings = publisher ? dialogue->publisher_greetings : dialogue->subscriber_greetings;
        send_text(swarm, client, publisher ? dialogue->hello : dialogue->subscribe);
    }
    if (is_greeted(swarm, client))
        become_open(swarm, client);
}

static size_t read_bytes(struct swarm *swarm, struct client *client, char *bytes, size_t size) {
    size_t used = 0;
    if (swarm->dialogue->framing == FRAMING_RAW)
        return read_stream(swarm, client, bytes, size);
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
    if (swarm->dialogue->deflate && memmem(bytes, head, "server_no_context_takeover", 26) == NULL)
        die("the server does not take permessage-deflate without context takeover");
    progress(swarm, client);
    return head;
}

static void know_event(struct event *event, const char *bytes, size_t size) {
    event->bytes = allocate(size < 8 ? 8 : size, 1);
    event->size = size;
    memcpy(event->bytes, bytes, size);
}

/* Events at the beginning of these bytes: counts them, notes the last one, and returns where they end. */
static char *skip_events(const struct event *event, char *at, const char *end, uint64_t *count, char **last) {
    uint64_t header;
    if (event->bytes == NULL)
        return at;
    for (; (size_t)(end - at) >= event->size; at += event->size) {
        memcpy(&header, at, sizeof header);
        if ((header & event->mask) != event->header)
            break;
        *last = at;
        ++*count;
    }
    return at;
}

static void count_events(struct swarm *swarm, struct client *client, const char *last, uint64_t count) {
    if (count == 0)
        return;
    const struct event *event = &swarm->events[client->topic];
    /* Comparing one of each read keeps the server honest, and costs little beside the read. */
    if (memcmp(last, event->bytes, event->size) != 0)
        die("connection %u got an event that is not the one published: %.*s", client->number,
            event->size - 2 < 200 ? (int)event->size - 2 : 200, last + 2);
    client->delivered += count;
    swarm->delivered(client, count);
}

/* Reads the whole frames in these bytes, and returns how many bytes they are. */
static size_t read_frames(struct swarm *swarm, struct client *client, char *bytes, size_t size) {
    bool stream = swarm->dialogue->framing == FRAMING_STREAM;
    char *at = bytes, *end = bytes + size, *last = NULL;
    uint64_t count = 0;
    size_t streamed = client->partial_size;
    if (stream && streamed > 0)
        memcpy(swarm->stream, client->partial, streamed);
    for (;;) {
        struct event *event = &swarm->events[client->topic];
        bool listening = client->state == OPEN && client->role == SUBSCRIBER;
        if (listening && !stream) /* the short way for what comes by the million */
            at = skip_events(event, at, end, &count, &last);
        unsigned char *header = (unsigned char *)at;
        size_t left = (size_t)(end - at), start = 2;
        if (left < 2)
            break;
        size_t length = header[1];
        if (length == 126) {
            start = 4;
            if (left >= start)
                length = (size_t)header[2] << 8 | header[3];
        } else if (length == 127) {
            start = 10;
            if (left >= start)
                for (int i = length = 0; i < 8; i++)
                    length = length << 8 | header[2 + i];
        } else if (length > 127) {
            die("connection %u got a masked frame", client->number);
        }
        if (left < start || left - start < length) {
            if (length > BUFFER_SIZE / 2)
                die("connection %u got a frame of %zu bytes", client->number, length);
            break;
        }
        bool compressed = swarm->dialogue->deflate && (header[0] & 0xf0) == (0x80 | RSV1);
        if ((header[0] & 0xf0) != 0x80 && !compressed)
            die("connection %u got a fragment or reserved bits", client->number);
        int opcode = header[0] & 0x0f;
        if (stream && opcode <= BINARY) {
            if (streamed + length > BUFFER_SIZE)
                die("connection %u got a message that does not end", client->number);
            memcpy(swarm->stream + streamed, at + start, length);
            streamed += length;
            size_t used = read_stream(swarm, client, swarm->stream, streamed);
            memmove(swarm->stream, swarm->stream + used, streamed -= used);
        } else if (listening && event->bytes == NULL && opcode == TEXT) {
            know_event(event, at, start + length);
            memset(&event->mask, 0xff, start < sizeof event->mask ? start : sizeof event->mask);
            memcpy(&event->header, event->bytes, sizeof event->header);
            event->header &= event->mask;
            continue; /* it is known now */
        } else {
            read_frame(swarm, client, opcode, compressed, at + start, length);
        }
        at += start + length;
    }
    count_events(swarm, client, last, count);
    if (stream && (client->partial_size = streamed) > 0) {
        client->partial = resize(client->partial, streamed);
        memcpy(client->partial, swarm->stream, streamed);
    }
    return (size_t)(at - bytes);
}

/* Reads the whole messages in these bytes of a stream, and returns how many bytes they are. */
static size_t read_stream(struct swarm *swarm, struct client *client, char *bytes, size_t size) {
    const struct dialogue *dialogue = swarm->dialogue;
    char *at = bytes, *end = bytes + size, *last = NULL;
    bool publisher = client->role == PUBLISHER;
    if (client->state == GREETING) {
        const char *answer = publisher ? dialogue->publisher_answer : dialogue->answer;
        char *found = memmem(bytes, size, answer, strlen(answer));
        if (found == NULL)
            return 0;
        become_open(swarm, client);
        at = found + strlen(answer);
    }
    size_t ping = strlen(dialogue->ping);
    if (publisher) { /* answers to publishes, which nobody reads, and pings */
        if (!dialogue->publisher_ignores && at < end && (ping == 0 || memmem(at, end - at, dialogue->ping, ping) == NULL))
            die("the publisher got an answer: %.*s", end - at < 200 ? (int)(end - at) : 200, at);
        if (ping > 0 && memmem(at, (size_t)(end - at), dialogue->ping, ping) != NULL)
            send_text(swarm, client, dialogue->pong);
        return size;
    }
    const struct event *event = &swarm->events[client->topic];
    uint64_t count = 0;
    for (;;) {
        at = skip_events(event, at, end, &count, &last);
        size_t left = (size_t)(end - at);
        if (ping > 0 && left >= ping && memcmp(at, dialogue->ping, ping) == 0) {
            send_text(swarm, client, dialogue->pong);
            at += ping;
            continue;
        }
        size_t known = left < event->size ? left : event->size;
        if (memcmp(at, event->bytes, known) != 0 && !(left < ping && memcmp(at, dialogue->ping, left) == 0))
            die("connection %u got something that is not an event: %.*s", client->number, left < 200 ? (int)left : 200,
                at);
        break;
    }
    count_events(swarm, client, last, count);
    return (size_t)(at - bytes);
}

/* Any frame but an event, and but those of a byte stream. */
static void read_frame(struct swarm *swarm, struct client *client, int opcode, bool compressed, char *payload,
                       size_t size) {
    int shown = size < 200 ? (int)size : 200;
    if (opcode == PING) {
        char pong[2 + 4 + 125] = {(char)(0x80 | PONG), (char)(0x80 | size)};
        memcpy(pong + 2, MASK, 4);
        for (size_t i = 0; i < size && i < 125; i++)
            pong[6 + i] = (char)(payload[i] ^ MASK[i % 4]);
        send_soon(client, pong, 6 + (size < 125 ? size : 125));
        return;
    }
    if (opcode == PONG)
        return;
    if (opcode == CLOSE) {
        int code = size >= 2 ? (unsigned char)payload[0] << 8 | (unsigned char)payload[1] : 1005;
        die("connection %u was closed by the server: %d %.*s", client->number, code, size > 2 ? shown - 2 : 0,
            payload + 2);
    }
    if (client->role == PUBLISHER && swarm->dialogue->publisher_ignores && client->state == OPEN)
        return;
    if (client->state != GREETING)
        die("connection %u got something that is not an event: %.*s", client->number, shown, payload);
    client->greetings--;
    const char *answer = swarm->dialogue->answer;
    if (compressed) /* nothing here can read it, and an error is not what a server compresses first */
        answer = "";
    if (client->greetings == 0 && client->role != PUBLISHER && memmem(payload, size, answer, strlen(answer)) == NULL)
        die("the server did not accept a subscription: %.*s", shown, payload);
    progress(swarm, client);
}

/* Writes the header of a frame and returns its size. RFC 6455, section 5.2. */
static size_t put_header(char *frame, int opcode, size_t length, bool masked) {
    char mask_bit = masked ? (char)0x80 : 0;
    if (length > MAX_EVENT)
        die("messages above %d bytes are not provided for", MAX_EVENT);
    frame[0] = (char)(0x80 | opcode);
    if (length < 126) {
        frame[1] = (char)((char)length | mask_bit);
        return 2;
    }
    frame[1] = (char)(126 | mask_bit);
    frame[2] = (char)(length >> 8);
    frame[3] = (char)length;
    return 4;
}

char *encode(const struct dialogue *dialogue, const char *text, uint32_t topic, size_t *size) {
    char *filled = put_topic(text, topic);
    size_t length = strlen(filled);
    if (dialogue->framing == FRAMING_RAW) {
        *size = length;
        return filled;
    }
    char *frame = allocate(length + 16, 1);
    size_t start = put_header(frame, dialogue->framing == FRAMING_TEXT ? TEXT : BINARY, length, true);
    memcpy(frame + start, MASK, 4);
    start += 4;
    for (size_t i = 0; i < length; i++)
        frame[start + i] = (char)(filled[i] ^ MASK[i % 4]);
    free(filled);
    *size = start + length;
    return frame;
}

/* What the event of a topic will look like. With permessage-deflate it is learned from the first one. */
static void expect_event(struct swarm *swarm, uint32_t topic) {
    const struct dialogue *dialogue = swarm->dialogue;
    struct event *event = &swarm->events[topic];
    if (dialogue->deflate || dialogue->event[0] == '\0')
        return;
    char *text = put_topic(dialogue->event, topic);
    size_t length = strlen(text), start = 0, counted = sizeof event->mask;
    char *frame = allocate(length + 16, 1);
    if (dialogue->framing == FRAMING_TEXT)
        counted = start = put_header(frame, TEXT, length, false);
    memcpy(frame + start, text, length);
    if (start + length < sizeof event->header)
        die("an event of %zu bytes cannot be told from others", length);
    know_event(event, frame, start + length);
    memset(&event->mask, 0xff, counted);
    memcpy(&event->header, event->bytes, sizeof event->header);
    event->header &= event->mask;
    free(frame);
    free(text);
}

void swarm_init(struct swarm *swarm, uint32_t topics) {
    swarm->epoll = epoll_create1(EPOLL_CLOEXEC);
    swarm->buffer = allocate(BUFFER_SIZE + sizeof(uint64_t), 1);
    swarm->stream = allocate(2 * BUFFER_SIZE + sizeof(uint64_t), 1);
    swarm->events = allocate(topics, sizeof *swarm->events);
    for (uint32_t topic = 0; topic < topics; topic++)
        expect_event(swarm, topic);
}

uint64_t monotonic(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}
