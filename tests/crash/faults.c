/*
 * Calls that fail or kill on request, to be preloaded (LD_PRELOAD) into a Python process.
 *
 * Once armed, every call listed below is counted, in all threads together. The call with the number asked for
 * either does not happen and fails with an errno, or the process is killed just before or just after it.
 * Count and name stand in a page that the caller shares, where they can be read after the death.
 *
 * Python, its extension modules and SQLite all reach the kernel through these functions; calls that the C
 * library makes for itself (name resolution, opendir) are not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

enum mode { FAIL, KILL_BEFORE, KILL_AFTER, FAIL_AFTER };
enum fate { GO_ON, FAILS, DIES_AFTER, FAILS_AFTER };

struct page {
	atomic_int count;
	char name[60];
};

static struct page *page; /* NULL: not armed */
static int wanted, mode, number;

void faults_arm(void *shared, int point, int what, int error)
{
	wanted = point;
	mode = what;
	number = error;
	page = shared;
}

static void die(void)
{
	kill(getpid(), SIGKILL);
	for (;;)
		pause();
}

static enum fate meet(const char *name)
{
	if (!page || atomic_fetch_add(&page->count, 1) + 1 != wanted)
		return GO_ON;
	strncpy(page->name, name, sizeof page->name - 1);
	if (mode == KILL_BEFORE)
		die();
	return mode == FAIL ? FAILS : mode == FAIL_AFTER ? FAILS_AFTER : DIES_AFTER;
}

static void *next(const char *name)
{
	void *found = dlsym(RTLD_NEXT, name);
	if (!found)
		abort();
	return found;
}

#define END(fate, result)              \
	if ((fate) == DIES_AFTER)      \
		die();                 \
	if ((fate) == FAILS_AFTER) {   \
		errno = number;        \
		return -1;             \
	}                              \
	return result;

#define COUNTED(type, name, parameters, arguments)       \
	type name parameters                             \
	{                                                \
		static type(*real) parameters;           \
		if (!real)                               \
			real = next(#name);              \
		enum fate fate = meet(#name);            \
		if (fate == FAILS) {                     \
			errno = number;                  \
			return -1;                       \
		}                                        \
		type result = real arguments;            \
		END(fate, result)                        \
	}

COUNTED(int, rename, (const char *a, const char *b), (a, b))
COUNTED(int, renameat, (int x, const char *a, int y, const char *b), (x, a, y, b))
COUNTED(int, renameat2, (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f))
COUNTED(int, link, (const char *a, const char *b), (a, b))
COUNTED(int, linkat, (int x, const char *a, int y, const char *b, int f), (x, a, y, b, f))
COUNTED(int, unlink, (const char *a), (a))
COUNTED(int, unlinkat, (int x, const char *a, int f), (x, a, f))
COUNTED(int, rmdir, (const char *a), (a))
COUNTED(int, mkdir, (const char *a, mode_t m), (a, m))
COUNTED(int, mkdirat, (int x, const char *a, mode_t m), (x, a, m))
COUNTED(int, fsync, (int fd), (fd))
COUNTED(int, fdatasync, (int fd), (fd))
COUNTED(int, ftruncate, (int fd, off_t n), (fd, n))
COUNTED(int, ftruncate64, (int fd, off64_t n), (fd, n))
COUNTED(int, fchmod, (int fd, mode_t m), (fd, m))
COUNTED(int, fchown, (int fd, uid_t u, gid_t g), (fd, u, g))
COUNTED(int, futimens, (int fd, const struct timespec t[2]), (fd, t))
COUNTED(int, fsetxattr, (int fd, const char *a, const void *v, size_t n, int f), (fd, a, v, n, f))
COUNTED(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n))
COUNTED(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
COUNTED(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
COUNTED(ssize_t, read, (int fd, void *b, size_t n), (fd, b, n))
COUNTED(ssize_t, pread, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
COUNTED(ssize_t, pread64, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
COUNTED(ssize_t, preadv, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o))
COUNTED(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
COUNTED(ssize_t, preadv2, (int fd, const struct iovec *v, int n, off_t o, int f), (fd, v, n, o, f))
COUNTED(ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off64_t o, int f), (fd, v, n, o, f))
COUNTED(int, connect, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
COUNTED(ssize_t, recv, (int fd, void *b, size_t n, int f), (fd, b, n, f))
COUNTED(ssize_t, recvmsg, (int fd, struct msghdr *m, int f), (fd, m, f))
COUNTED(ssize_t, recvfrom, (int fd, void *b, size_t n, int f, struct sockaddr *a, socklen_t *l),
	(fd, b, n, f, a, l))

/* A socket that reports an error has taken nothing of that call: there is no "afterwards", see tcp_sendmsg. */
#define SENT(type, name, parameters, arguments)          \
	type name parameters                             \
	{                                                \
		static type(*real) parameters;           \
		if (!real)                               \
			real = next(#name);              \
		enum fate fate = meet(#name);            \
		if (fate == FAILS || fate == FAILS_AFTER) { \
			errno = number;                  \
			return -1;                       \
		}                                        \
		type result = real arguments;            \
		if (fate == DIES_AFTER)                  \
			die();                           \
		return result;                           \
	}

SENT(ssize_t, send, (int fd, const void *b, size_t n, int f), (fd, b, n, f))
SENT(ssize_t, sendmsg, (int fd, const struct msghdr *m, int f), (fd, m, f))
SENT(ssize_t, sendto, (int fd, const void *b, size_t n, int f, const struct sockaddr *a, socklen_t l),
	(fd, b, n, f, a, l))

/* A pipe is how threads of a process wake each other: that is neither disk nor network, and cannot fail. */
ssize_t write(int fd, const void *block, size_t size)
{
	static ssize_t (*real)(int, const void *, size_t);
	struct stat st;
	if (!real)
		real = next("write");
	if (!page || (fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode)))
		return real(fd, block, size);
	enum fate fate = meet("write");
	if (fate == FAILS) {
		errno = number;
		return -1;
	}
	ssize_t result = real(fd, block, size);
	END(fate, result)
}

/* A close that fails has closed all the same, see close(2). */
int close(int fd)
{
	static int (*real)(int);
	if (!real)
		real = next("close");
	enum fate fate = meet("close");
	int result = real(fd);
	if (fate == FAILS) {
		errno = number;
		return -1;
	}
	END(fate, result)
}

/* The third parameter is there only if a file may be made; a register more does no harm. An opening that
 * fails has made nothing, so nothing is opened that would have to be closed. */
#define OPENED(name, parameters, arguments)              \
	int name parameters                              \
	{                                                \
		static int(*real) parameters;            \
		if (!real)                               \
			real = (int(*) parameters)next(#name); \
		va_list more;                            \
		va_start(more, flags);                   \
		mode_t bits = va_arg(more, mode_t);      \
		va_end(more);                            \
		enum fate fate = meet(#name);            \
		if (fate == FAILS || fate == FAILS_AFTER) { \
			errno = number;                  \
			return -1;                       \
		}                                        \
		int result = real arguments;             \
		if (fate == DIES_AFTER)                  \
			die();                           \
		return result;                           \
	}

OPENED(open, (const char *path, int flags, ...), (path, flags, bits))
OPENED(open64, (const char *path, int flags, ...), (path, flags, bits))
OPENED(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, bits))
OPENED(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, bits))
