#include "options.h"

#include <getopt.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "die.h"

enum kind { TEXT, NUMBER, FLAG, SECONDS, RATE, FRAMING, SERVER, HOST, HEADER, PID };

/* One option: its name, how its value is read, and where it goes. */
struct known {
    const char *name;
    enum kind kind;
    size_t offset;
};

#define AT(member) offsetof(struct options, member)

static const struct known KNOWN[] = {
    {"server", SERVER, AT(server)},
    {"tls", FLAG, AT(server.tls)},
    {"host", HOST, AT(server.name)},
    {"header", HEADER, AT(headers)},
    {"pid", PID, AT(pids)},
    {"opening", NUMBER, AT(opening)},
    {"patience", SECONDS, AT(patience)},
    {"framing", FRAMING, AT(dialogue.framing)},
    {"path", TEXT, AT(dialogue.path)},
    {"publisher-path", TEXT, AT(dialogue.publisher_path)},
    {"subscribe", TEXT, AT(dialogue.subscribe)},
    {"answer", TEXT, AT(dialogue.answer)},
    {"subscriber-greetings", NUMBER, AT(dialogue.subscriber_greetings)},
    {"publisher-greetings", NUMBER, AT(dialogue.publisher_greetings)},
    {"hello", TEXT, AT(dialogue.hello)},
    {"publisher-answer", TEXT, AT(dialogue.publisher_answer)},
    {"publish", TEXT, AT(dialogue.publish)},
    {"event", TEXT, AT(dialogue.event)},
    {"ping", TEXT, AT(dialogue.ping)},
    {"pong", TEXT, AT(dialogue.pong)},
    {"publisher-ignores", FLAG, AT(dialogue.publisher_ignores)},
    {"deflate", FLAG, AT(dialogue.deflate)},
    {"subscribers", NUMBER, AT(subscribers)},
    {"stalled", NUMBER, AT(stalled)},
    {"topics", NUMBER, AT(topics)},
    {"window", NUMBER, AT(window)},
    {"rate", RATE, AT(rate)},
    {"warmup", SECONDS, AT(warmup)},
    {"duration", SECONDS, AT(duration)},
    {"sample", SECONDS, AT(sample)},
    {"most-memory", NUMBER, AT(most_memory)},
    {"progress", SECONDS, AT(progress)},
    {"spin", FLAG, AT(spin)},
    {"connections", NUMBER, AT(connections)},
    {"base", NUMBER, AT(base)},
    {"settle", SECONDS, AT(settle)},
};

#define KNOWN_COUNT (sizeof KNOWN / sizeof *KNOWN)

static double read_real(const char *name, const char *text, double most) {
    char *end;
    double value = strtod(text, &end);
    if (*text == '\0' || *end != '\0' || !(value >= 0 && value <= most))
        die("--%s: %s is not a number from 0 to %.0f", name, text, most);
    return value;
}

static uint32_t read_number(const char *name, const char *text) {
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || value > 1000000)
        die("--%s: %s is not a whole number from 0 to 1000000", name, text);
    return (uint32_t)value;
}

static enum framing read_framing(const char *text) {
    static const char *const names[] = {[FRAMING_TEXT] = "text", [FRAMING_STREAM] = "stream", [FRAMING_RAW] = "raw"};
    for (int i = 0; i < 3; i++)
        if (strcmp(text, names[i]) == 0)
            return (enum framing)i;
    die("--framing is text, stream or raw");
}

static void add_header(struct options *options, const char *text) {
    size_t size = strlen(options->headers), free_space = sizeof options->headers - size;
    if (strpbrk(text, "\r\n") != NULL || strchr(text, ':') == NULL)
        die("--header is one line, Name: value");
    if (snprintf(options->headers + size, free_space, "%s\r\n", text) >= (int)free_space)
        die("there are too many headers");
}

static void add_pid(struct options *options, const char *text) {
    if (options->pid_count == MAX_PIDS)
        die("at most %d processes can be watched", MAX_PIDS);
    options->pids[options->pid_count++] = (pid_t)read_number("pid", text);
}

static void read_option(struct options *options, const struct known *known, const char *text) {
    void *place = (char *)options + known->offset;
    switch (known->kind) {
    case TEXT: *(const char **)place = text; break;
    case NUMBER: *(uint32_t *)place = read_number(known->name, text); break;
    case FLAG: *(bool *)place = read_number(known->name, text) != 0; break;
    case SECONDS: *(uint64_t *)place = (uint64_t)(read_real(known->name, text, 86400) * SECOND); break;
    case RATE: *(double *)place = read_real(known->name, text, 1e8); break;
    case FRAMING: *(enum framing *)place = read_framing(text); break;
    case SERVER: server_parse(&options->server, text); break;
    case HOST: snprintf(options->server.name, sizeof options->server.name, "%s", text); break;
    case HEADER: add_header(options, text); break;
    case PID: add_pid(options, text); break;
    }
}

void read_options(struct options *options, int argc, char **argv) {
    struct option names[KNOWN_COUNT + 1] = {0};
    const char *host = NULL;
    *options = (struct options){.topics = 1, .window = 1, .opening = 64, .patience = 5 * SECOND};
    /* An option that is a text is empty where it is not given. */
    for (size_t i = 0; i < KNOWN_COUNT; i++) {
        if (KNOWN[i].kind == TEXT)
            *(const char **)((char *)options + KNOWN[i].offset) = "";
        names[i] = (struct option){KNOWN[i].name, required_argument, NULL, (int)i + 1};
    }
    options->dialogue.path = "/";
    optind = 1;
    opterr = 0;
    for (int found; (found = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        if (found < 1 || found > (int)KNOWN_COUNT)
            die("%s is no option, or has no value", argv[optind - 1]);
        if (KNOWN[found - 1].kind == HOST)
            host = optarg;
        read_option(options, &KNOWN[found - 1], optarg);
    }
    if (optind < argc)
        die("%s is no option", argv[optind]);
    if (options->server.address_size == 0)
        die("--server is needed");
    if (host != NULL) /* also where --server came after it */
        snprintf(options->server.name, sizeof options->server.name, "%s", host);
    if (options->opening == 0)
        die("--opening is at least 1");
}
