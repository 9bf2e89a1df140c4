/* Sockets: TCP over IPv4 and IPv6, Unix, and TLS over any of them. */
#ifndef TRANSPORT_H
#define TRANSPORT_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/un.h>

struct server {
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_un local;
    } address;
    socklen_t address_size;
    char name[128]; /* for the Host header and for TLS */
    bool tls;
};

/* Clients of one source address: well below the 28,000 local ports that Linux hands out to each. */
#define CLIENTS_PER_ADDRESS 20000

struct client;

/* Reads an address: 127.0.0.1:8765, [::1]:8765 or unix:/path. Dies if it is none. */
void server_parse(struct server *server, const char *text);

/* A socket on its way to the server, non-blocking. Dies where there can be none. */
int transport_connect(const struct server *server, uint32_t number);

/* Begins TLS on a connected socket. */
void transport_secure(struct client *client, const struct server *server);

/* One step of the TLS handshake; whether it is complete. */
bool transport_is_secure(struct client *client);

/* Like recv(2) and send(2): -1 with errno EAGAIN where it would block, and 0 at the end. */
ssize_t transport_read(struct client *client, void *bytes, size_t size);
ssize_t transport_write(struct client *client, const void *bytes, size_t size);

#endif
