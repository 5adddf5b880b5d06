// LD_PRELOAD: counts the operations that change files below a folder, and kills the process before the n-th one.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char watched[4096];
static int done, last, exchanges = 1;

// Called by the driver: which folder, the operation to die at (0 for none), and whether names can be exchanged.
void shim_arm(const char *folder, int at, int can_exchange) {
    snprintf(watched, sizeof watched, "%s", folder);
    done = 0;
    last = at;
    exchanges = can_exchange;
}
int shim_count(void) { return done; }

static void step(const char *path) {
    if (!watched[0] || !path || !strstr(path, watched)) return;
    if (__sync_add_and_fetch(&done, 1) == last) kill(getpid(), SIGKILL);
}
static void step_at(int folder, const char *path) {
    char name[64], found[4096];
    if (path && path[0] == '/') { step(path); return; }
    snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(name, found, sizeof found - 1);
    if (length < 0) return;
    found[length] = 0;
    step(found);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) { MODE(flags) REAL(open); if (CHANGES(flags)) step(path); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) REAL(open64); if (CHANGES(flags)) step(path); return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) REAL(openat); if (CHANGES(flags)) step_at(at, path); return real(at, path, flags, mode); }
int rename(const char *from, const char *to) { REAL(rename); step(from); return real(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    if (!exchanges) { errno = EINVAL; return -1; }
    step(from);
    return real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); step(path); return real(path, mode); }
int rmdir(const char *path) { REAL(rmdir); step(path); return real(path); }
int unlink(const char *path) { REAL(unlink); step(path); return real(path); }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); step_at(at, path); return real(at, path, flags); }
int link(const char *from, const char *to) { REAL(link); step(to); return real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { REAL(linkat); step_at(b, to); return real(a, from, b, to, flags); }
int symlink(const char *what, const char *at) { REAL(symlink); step(at); return real(what, at); }
int chmod(const char *path, mode_t mode) { REAL(chmod); step(path); return real(path, mode); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); step_at(file, 0); return real(file, size); }
int fallocate64(int file, int mode, off64_t start, off64_t size) { REAL(fallocate64); step_at(file, 0); return real(file, mode, start, size); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t start) { REAL(pwrite64); step_at(file, 0); return real(file, data, size, start); }
ssize_t write(int file, const void *data, size_t size) { REAL(write); step_at(file, 0); return real(file, data, size); }
int fsync(int file) { REAL(fsync); step_at(file, 0); return real(file); }
