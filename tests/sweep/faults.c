/* A library for LD_PRELOAD, after SQLite's tests: the Nth change of the disk below a folder fails, or kills the process.

   Opening for writing, a run of writes to one file, fsync, rename, link, symlink, unlink, mkdir and rmdir count as one
   operation each. A kill in a write leaves half of it on the disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL, FULL }; /* FULL: every operation that takes room fails from the Nth on */

static char prefix[4096];
static int mode, target, counted, last_written = -1;

void fault_arm(const char *folder, int how, int nth) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    mode = how, target = nth, counted = 0, last_written = -1;
}

int fault_count(void) { return counted; }

static int below(const char *path) {
    size_t length = strlen(prefix);
    return length && !strncmp(path, prefix, length) && (path[length] == '/' || !path[length]);
}

static int is_watched(int folder, const char *path) {
    char whole[8192], link[64];
    ssize_t length = 0;
    if (path && path[0] == '/') return below(path);
    if (folder == AT_FDCWD) return getcwd(whole, 4096) && below(strncat(strcat(whole, "/"), path ? path : "", 4000));
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, whole, 4096);
    if (length < 0) return 0;
    whole[length] = 0;
    return below(whole);
}

/* Counts an operation. Returns whether it must fail. */
static int fault(int takes_room) {
    last_written = -1;
    counted++;
    if (mode == KILL && counted == target) kill(getpid(), SIGKILL);
    if ((mode == FAIL && counted == target) || (mode == FULL && counted >= target && takes_room)) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int fault_of_write(int fd) {
    if (fd <= 2 || !is_watched(fd, NULL)) return 0;
    if (fd == last_written && !(mode == FULL && counted >= target)) return 0;
    int fails = fault(1);
    last_written = fd;
    return fails;
}

#define KILLED_NEXT(fd) (mode == KILL && counted == target - 1 && fd > 2 && fd != last_written && is_watched(fd, NULL))

ssize_t write(int fd, const void *data, size_t size) {
    if (KILLED_NEXT(fd)) REAL(write)(fd, data, size / 2);
    return fault_of_write(fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (KILLED_NEXT(fd)) REAL(writev)(fd, parts, count / 2);
    return fault_of_write(fd) ? -1 : REAL(writev)(fd, parts, count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return fault_of_write(fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    ssize_t (*real)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
    return fault_of_write(to) ? -1 : real(to, from, at, size);
}
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags) {
    return fault_of_write(to) ? -1 : REAL(copy_file_range)(from, at, to, there, size, flags);
}

static int fault_of_open(int folder, const char *path, int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && is_watched(folder, path) && fault(1);
}

#define OPEN(name)                                            \
    int name(const char *path, int flags, ...) {              \
        va_list rest;                                         \
        va_start(rest, flags);                                \
        int permissions = va_arg(rest, int);                  \
        va_end(rest);                                         \
        if (fault_of_open(AT_FDCWD, path, flags)) return -1;  \
        return REAL(name)(path, flags, permissions);          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                          \
    int name(int folder, const char *path, int flags, ...) {  \
        va_list rest;                                         \
        va_start(rest, flags);                                \
        int permissions = va_arg(rest, int);                  \
        va_end(rest);                                         \
        if (fault_of_open(folder, path, flags)) return -1;    \
        return REAL(name)(folder, path, flags, permissions);  \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                   \
    FILE *name(const char *path, const char *how) {                                                   \
        if (fault_of_open(AT_FDCWD, path, strpbrk(how, "wa+") ? O_WRONLY : O_RDONLY)) return NULL;    \
        return REAL(name)(path, how);                                                                 \
    }
FOPEN(fopen)
FOPEN(fopen64)

int fsync(int fd) { return is_watched(fd, NULL) && fault(1) ? -1 : REAL(fsync)(fd); }

int rename(const char *from, const char *to) {
    return is_watched(AT_FDCWD, to) && fault(0) ? -1 : REAL(rename)(from, to);
}
int renameat(int folder, const char *from, int there, const char *to) {
    return is_watched(there, to) && fault(0) ? -1 : REAL(renameat)(folder, from, there, to);
}
int link(const char *from, const char *to) { return is_watched(AT_FDCWD, to) && fault(1) ? -1 : REAL(link)(from, to); }
int symlink(const char *from, const char *to) {
    return is_watched(AT_FDCWD, to) && fault(1) ? -1 : REAL(symlink)(from, to);
}
int unlink(const char *path) { return is_watched(AT_FDCWD, path) && fault(0) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
    return is_watched(folder, path) && fault(0) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return is_watched(AT_FDCWD, path) && fault(0) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t permissions) {
    return is_watched(AT_FDCWD, path) && fault(1) ? -1 : REAL(mkdir)(path, permissions);
}
int mkdirat(int folder, const char *path, mode_t permissions) {
    return is_watched(folder, path) && fault(1) ? -1 : REAL(mkdirat)(folder, path, permissions);
}
