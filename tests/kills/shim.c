// LD_PRELOAD: counts the operations on files below a folder, and has something happen at the n-th one: the process is
// killed, gets a signal, or the call fails. It also takes away what some file systems lack: exchanged names, locks,
// links, reserved room.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

// child.py has the same numbers.
enum { NO_EXCHANGE = 1, NO_LOCKS = 2, NO_LINKS = 4, NO_ROOM_AHEAD = 8, READS_TOO = 16 };
enum { KILL = 1, FAIL = 2, SIGNAL = 3 };

static char watched[4096];
static int done, lacks, act, value, first, last;

// Which folder; what the file system lacks; what happens (0: nothing) with which error or signal, from the operation
// `from` to the operation `to`.
void shim_arm(const char *folder, int without, int what, int with, int from, int to) {
    snprintf(watched, sizeof watched, "%s", folder);
    done = 0;
    lacks = without;
    act = what;
    value = with;
    first = from;
    last = to;
}
int shim_count(void) { return done; }

// 1 when the call has to fail, with errno set.
static int step(const char *path) {
    if (!watched[0] || !path || !strstr(path, watched)) return 0;
    int number = __sync_add_and_fetch(&done, 1);
    if (!act || number < first || number > last) return 0;
    if (act == KILL) kill(getpid(), SIGKILL);
    if (act == SIGNAL && (number == first || number == last)) kill(getpid(), value);
    if (act != FAIL) return 0;
    errno = value;
    return 1;
}
static int step_at(int folder, const char *path) {
    char name[64], found[4096];
    if (path && path[0] == '/') return step(path);
    snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(name, found, sizeof found - 1);
    if (length < 0) return 0;
    found[length] = 0;
    return step(found);
}
static int lacking(int what, int error) {
    if (!(lacks & what)) return 0;
    errno = error;
    return 1;
}
static int read_of(int file) { return (lacks & READS_TOO) && step_at(file, 0); }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define COUNTS(flags) (((flags) & (O_CREAT | O_TRUNC)) || (lacks & READS_TOO))
#define OR_FAIL(condition) if (condition) return -1

int open(const char *path, int flags, ...) { MODE(flags) REAL(open); OR_FAIL(COUNTS(flags) && step(path)); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) REAL(open64); OR_FAIL(COUNTS(flags) && step(path)); return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) REAL(openat); OR_FAIL(COUNTS(flags) && step_at(at, path)); return real(at, path, flags, mode); }
int rename(const char *from, const char *to) { REAL(rename); OR_FAIL(step(from)); return real(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    OR_FAIL(lacking(NO_EXCHANGE, EINVAL));
    OR_FAIL(step(from));
    return real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); OR_FAIL(step(path)); return real(path, mode); }
int rmdir(const char *path) { REAL(rmdir); OR_FAIL(step(path)); return real(path); }
int unlink(const char *path) { REAL(unlink); OR_FAIL(step(path)); return real(path); }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); OR_FAIL(step_at(at, path)); return real(at, path, flags); }
int link(const char *from, const char *to) { REAL(link); OR_FAIL(lacking(NO_LINKS, EPERM) || step(to)); return real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { REAL(linkat); OR_FAIL(lacking(NO_LINKS, EPERM) || step_at(b, to)); return real(a, from, b, to, flags); }
int symlink(const char *what, const char *at) { REAL(symlink); OR_FAIL(step(at)); return real(what, at); }
int chmod(const char *path, mode_t mode) { REAL(chmod); OR_FAIL(step(path)); return real(path, mode); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); OR_FAIL(step_at(file, 0)); return real(file, size); }
int fallocate64(int file, int mode, off64_t start, off64_t size) { REAL(fallocate64); OR_FAIL(lacking(NO_ROOM_AHEAD, EOPNOTSUPP) || step_at(file, 0)); return real(file, mode, start, size); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t start) { REAL(pwrite64); OR_FAIL(step_at(file, 0)); return real(file, data, size, start); }
ssize_t write(int file, const void *data, size_t size) { REAL(write); OR_FAIL(step_at(file, 0)); return real(file, data, size); }
int fsync(int file) { REAL(fsync); OR_FAIL(step_at(file, 0)); return real(file); }
int flock(int file, int how) { REAL(flock); OR_FAIL(lacking(NO_LOCKS, ENOLCK)); return real(file, how); }
ssize_t read(int file, void *into, size_t size) { REAL(read); OR_FAIL(read_of(file)); return real(file, into, size); }
ssize_t pread64(int file, void *into, size_t size, off64_t start) { REAL(pread64); OR_FAIL(read_of(file)); return real(file, into, size, start); }
ssize_t preadv64(int file, const struct iovec *into, int count, off64_t start) { REAL(preadv64); OR_FAIL(read_of(file)); return real(file, into, count, start); }
ssize_t preadv64v2(int file, const struct iovec *into, int count, off64_t start, int flags) { REAL(preadv64v2); OR_FAIL(read_of(file)); return real(file, into, count, start, flags); }
