#include "transport.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"
#include "die.h"

/* OpenSSL's library is opened when TLS is asked for, and not before: nobody needs its headers to build wsbroker, nor the
 * library to do without TLS. These functions and constants are the same in OpenSSL 1.1 and 3. */
static struct {
    void *context;
    const void *(*TLS_client_method)(void);
    void *(*SSL_CTX_new)(const void *);
    long (*SSL_CTX_ctrl)(void *, int, long, void *);
    void *(*SSL_new)(void *);
    int (*SSL_set_fd)(void *, int);
    long (*SSL_ctrl)(void *, int, long, void *);
    void (*SSL_set_connect_state)(void *);
    int (*SSL_do_handshake)(void *);
    int (*SSL_read)(void *, void *, int);
    int (*SSL_write)(void *, const void *, int);
    int (*SSL_get_error)(const void *, int);
    void (*ERR_clear_error)(void);
} tls;

enum {
    SSL_ERROR_WANT_READ = 2,
    SSL_ERROR_WANT_WRITE = 3,
    SSL_ERROR_ZERO_RETURN = 6,
    SSL_CTRL_MODE = 33,
    SSL_CTRL_SET_TLSEXT_HOSTNAME = 55,
    /* Partial writes, from a buffer that may move, and no buffers kept for thousands of idle connections. */
    SSL_MODE = 0x1 | 0x2 | 0x10,
};

void server_parse(struct server *server, const char *text) {
    char host[64];
    uint16_t port;
    int used = 0;
    if (strncmp(text, "unix:", 5) == 0) {
        if (text[5] == '\0' || strlen(text + 5) >= sizeof server->address.local.sun_path)
            die("%s is not the path of a Unix socket", text);
        server->address.local.sun_family = AF_UNIX;
        strcpy(server->address.local.sun_path, text + 5);
        server->address_size = sizeof server->address.local;
        snprintf(server->name, sizeof server->name, "localhost");
        return;
    }
    snprintf(server->name, sizeof server->name, "%s", text);
    if (sscanf(text, "%63[0-9.]:%" SCNu16 "%n", host, &port, &used) == 2 && text[used] == '\0' &&
        inet_pton(AF_INET, host, &server->address.v4.sin_addr) == 1) {
        server->address.v4.sin_family = AF_INET;
        server->address.v4.sin_port = htons(port);
        server->address_size = sizeof server->address.v4;
        return;
    }
    used = 0;
    if (sscanf(text, "[%63[0-9a-fA-F:.]]:%" SCNu16 "%n", host, &port, &used) == 2 && text[used] == '\0' &&
        inet_pton(AF_INET6, host, &server->address.v6.sin6_addr) == 1) {
        server->address.v6.sin6_family = AF_INET6;
        server->address.v6.sin6_port = htons(port);
        server->address_size = sizeof server->address.v6;
        return;
    }
    die("--server is an address and a port, such as 127.0.0.1:8765 or [::1]:8765, or unix:/path");
}

/* Where there are more clients than ports, they come from 127.0.0.1, 127.0.0.2 and so on. */
static void bind_source(int fd, const struct server *server, uint32_t number) {
    uint32_t step = number / CLIENTS_PER_ADDRESS;
    if (step == 0 || server->address.any.sa_family != AF_INET ||
        ntohl(server->address.v4.sin_addr.s_addr) >> 24 != IN_LOOPBACKNET)
        return;
    int one = 1;
    struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + step)};
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
        die("bind: %s", strerror(errno));
}

int transport_connect(const struct server *server, uint32_t number) {
    int one = 1, fd = socket(server->address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket: %s (the limit on open files is `ulimit -n`)", strerror(errno));
    if (server->address.any.sa_family != AF_UNIX)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    bind_source(fd, server, number);
    int status = connect(fd, &server->address.any, server->address_size);
    /* A Unix socket whose backlog is full says EAGAIN at once, where TCP would try again by itself. */
    for (int tries = 0; status < 0 && errno == EAGAIN && tries < 1000; tries++) {
        usleep(1000);
        status = connect(fd, &server->address.any, server->address_size);
    }
    if (status < 0 && errno != EINPROGRESS)
        die("connect: %s", strerror(errno));
    return fd;
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (found == NULL)
        die("TLS: %s", dlerror());
    return found;
}

static void load_tls(void) {
    void *library = dlopen("libssl.so.3", RTLD_NOW);
    if (library == NULL)
        library = dlopen("libssl.so.1.1", RTLD_NOW);
    if (library == NULL)
        die("TLS needs OpenSSL's libssl, and there is none (Debian: apt install libssl3)");
/* C has no cast from an object's address to a function's; POSIX says that this is how it is done. */
#define LOAD(name) *(void **)&tls.name = symbol(library, #name)
    LOAD(TLS_client_method);
    LOAD(SSL_CTX_new);
    LOAD(SSL_CTX_ctrl);
    LOAD(SSL_new);
    LOAD(SSL_set_fd);
    LOAD(SSL_ctrl);
    LOAD(SSL_set_connect_state);
    LOAD(SSL_do_handshake);
    LOAD(SSL_read);
    LOAD(SSL_write);
    LOAD(SSL_get_error);
    LOAD(ERR_clear_error);
#undef LOAD
    tls.context = tls.SSL_CTX_new(tls.TLS_client_method());
    if (tls.context == NULL)
        die("TLS: there is no context");
    tls.SSL_CTX_ctrl(tls.context, SSL_CTRL_MODE, SSL_MODE, NULL);
}

void transport_secure(struct client *client, const struct server *server) {
    if (tls.context == NULL)
        load_tls();
    client->tls = tls.SSL_new(tls.context);
    if (client->tls == NULL || tls.SSL_set_fd(client->tls, client->fd) != 1)
        die("TLS: no memory");
    char name[sizeof server->name];
    snprintf(name, sizeof name, "%s", server->name);
    char *colon = strrchr(name, ':');
    if (colon != NULL && name[0] != '[')
        *colon = '\0';
    if (name[strspn(name, "0123456789.")] != '\0' && name[0] != '[') /* RFC 6066, section 3: a name, no address */
        tls.SSL_ctrl(client->tls, SSL_CTRL_SET_TLSEXT_HOSTNAME, 0, name);
    tls.SSL_set_connect_state(client->tls);
}

/* What a TLS call that returned this status would have set errno to without TLS. */
static ssize_t tls_status(struct client *client, int status) {
    if (status > 0)
        return status;
    switch (tls.SSL_get_error(client->tls, status)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE: errno = EAGAIN; return -1;
    case SSL_ERROR_ZERO_RETURN: return 0;
    default: errno = errno == 0 ? EPROTO : errno; return -1;
    }
}

bool transport_is_secure(struct client *client) {
    tls.ERR_clear_error();
    errno = 0;
    int status = tls.SSL_do_handshake(client->tls);
    if (status == 1)
        return true;
    if (tls_status(client, status) == 0 || errno != EAGAIN)
        die("connection %u: the TLS handshake failed", client->number);
    return false;
}

ssize_t transport_read(struct client *client, void *bytes, size_t size) {
    if (client->tls == NULL)
        return recv(client->fd, bytes, size, 0);
    tls.ERR_clear_error();
    errno = 0;
    return tls_status(client, tls.SSL_read(client->tls, bytes, (int)size));
}

ssize_t transport_write(struct client *client, const void *bytes, size_t size) {
    if (client->tls == NULL)
        return send(client->fd, bytes, size, MSG_NOSIGNAL);
    tls.ERR_clear_error();
    errno = 0;
    return tls_status(client, tls.SSL_write(client->tls, bytes, (int)(size < (1 << 30) ? size : (1 << 30))));
}
