// Takes uploads over TLS and costs as little as can be, so that a benchmark measures the client.
//
//     receiver PORT-OR-0 CHAIN.pem KEY.pem DELAY_MS      (prints its port; ends when its standard input does)
//
// Bodies above a megabyte are not even deciphered: their TLS records are counted and dropped in the kernel
// (MSG_TRUNC). After such a body the connection can't be read any more, so it is closed after the answer.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROOM = 1 << 16, SKIPPED_ABOVE = 1 << 20, RECORD_HEAD = 5, TLS13_OVERHEAD = 17 };

static SSL_CTX *context;
static long delay_ms;
static atomic_long uploads;

static int skip(int fd, long left, char *room) {
    while (left > 0) {
        unsigned char head[RECORD_HEAD];
        if (recv(fd, head, sizeof head, MSG_WAITALL) != sizeof head) return 0;
        long record = head[3] * 256 + head[4];
        left -= record - TLS13_OVERHEAD;
        while (record > 0) {
            long n = recv(fd, room, record, MSG_TRUNC | MSG_WAITALL);
            if (n <= 0) return 0;
            record -= n;
        }
    }
    return left == 0;
}

static int drain(SSL *tls, long left, char *room) {
    while (left > 0) {
        int n = SSL_read(tls, room, left < ROOM ? left : ROOM);
        if (n <= 0) return 0;
        left -= n;
    }
    return 1;
}

static void answer(SSL *tls, int last) {
    char body[256], whole[768];
    int n = snprintf(body, sizeof body,
                     "{\"code\":20000,\"message\":\"Ok\",\"status\":true,\"data\":{\"id\":\"file-%010ld\","
                     "\"object\":\"file\",\"purpose\":\"batch\"}}",
                     atomic_fetch_add(&uploads, 1));
    n = snprintf(whole, sizeof whole,
                 "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-siliconcloud-trace-id: ti_benchmark\r\n"
                 "%sContent-Length: %d\r\n\r\n%s",
                 last ? "Connection: close\r\n" : "", n, body);
    SSL_write(tls, whole, n);
}

// One request; 0 when the connection is over.
static int serve_one(SSL *tls, int fd, char *room) {
    int have = 0;
    char *end = NULL;
    while (!end) {
        int n = have < ROOM ? SSL_read(tls, room + have, ROOM - have) : 0;
        if (n <= 0) return 0;
        have += n;
        room[have] = 0;
        end = strstr(room, "\r\n\r\n");
    }
    end += 4;
    char saved = *end;
    *end = 0;
    char *said = strcasestr(room, "\r\ncontent-length:");
    int waits = strcasestr(room, "100-continue") != NULL;
    long length = said ? atol(said + strlen("\r\ncontent-length:")) : 0;
    *end = saved;
    long left = length - (room + have - end);
    if (waits) SSL_write(tls, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    int last = left > SKIPPED_ABOVE;
    if (!(last ? skip(fd, left, room) : drain(tls, left, room))) return 0;
    if (delay_ms) usleep(delay_ms * 1000);
    answer(tls, last);
    return !last;
}

static void *serve(void *argument) {
    int fd = (int)(long)argument;
    char *room = malloc(ROOM + 1);
    SSL *tls = SSL_new(context);
    SSL_set_fd(tls, fd);
    if (SSL_accept(tls) > 0)
        while (serve_one(tls, fd, room)) {}
    SSL_free(tls);
    close(fd);
    free(room);
    return NULL;
}

static void *end_with_input(void *unused) {
    char byte;
    while (read(0, &byte, 1) > 0) {}
    exit(0);
}

int main(int count, char **words) {
    if (count != 5) return 2;
    signal(SIGPIPE, SIG_IGN);
    context = SSL_CTX_new(TLS_server_method());
    delay_ms = atol(words[4]);
    if (SSL_CTX_use_certificate_chain_file(context, words[2]) <= 0) return 1;
    if (SSL_CTX_use_PrivateKey_file(context, words[3], SSL_FILETYPE_PEM) <= 0) return 1;
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in place = {.sin_family = AF_INET,
                                .sin_port = htons(atoi(words[1])),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof place;
    if (bind(listener, (void *)&place, size) || listen(listener, 128)) return 1;
    getsockname(listener, (void *)&place, &size);
    printf("%d\n", ntohs(place.sin_port));
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, end_with_input, NULL);
    for (;;) {
        long fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        pthread_create(&thread, NULL, serve, (void *)fd);
        pthread_detach(thread);
    }
}
