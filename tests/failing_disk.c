/* A disk that fails, for LD_PRELOAD: from a chosen call on, calls that write under a folder return an error.

A full disk refuses new files and further bytes; a read-only one refuses new files, folders and names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[4096];
static long calls, first = -1;
static int error;

void fail_from(const char *folder, long call, int number) {
  strncpy(under, folder, sizeof under - 1);
  calls = 0, first = call, error = number;
}

long counted(void) { return calls; }

static int fails(const char *path) {
  if (!*under || !path || strncmp(path, under, strlen(under))) return 0;
  if (calls++ < first || first < 0) return 0;
  errno = error;
  return 1;
}

static int fails_in(int file) {
  char link[64], path[4096];
  if (!*under || error != ENOSPC) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                                                        \
  int name(const char *path, int flags, ...) {                                                            \
    va_list rest;                                                                                         \
    va_start(rest, flags);                                                                                \
    mode_t mode = va_arg(rest, mode_t);                                                                   \
    va_end(rest);                                                                                         \
    if ((flags & (O_CREAT | O_TRUNC | (error == EACCES ? O_WRONLY | O_RDWR : 0))) && fails(path)) return -1; \
    return NEXT(name)(path, flags, mode);                                                                 \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                      \
  int name(int folder, const char *path, int flags, ...) {                                                \
    va_list rest;                                                                                         \
    va_start(rest, flags);                                                                                \
    mode_t mode = va_arg(rest, mode_t);                                                                   \
    va_end(rest);                                                                                         \
    if ((flags & (O_CREAT | O_TRUNC)) && fails(path)) return -1;                                          \
    return NEXT(name)(folder, path, flags, mode);                                                         \
  }
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : NEXT(mkdir)(path, mode); }

int rename(const char *from, const char *to) {
  return error == EACCES && fails(to) ? -1 : NEXT(rename)(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  return error == EACCES && fails(to) ? -1 : NEXT(renameat)(a, from, b, to);
}

int unlink(const char *path) { return error == EACCES && fails(path) ? -1 : NEXT(unlink)(path); }

ssize_t write(int file, const void *bytes, size_t count) {
  return fails_in(file) ? -1 : NEXT(write)(file, bytes, count);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  return fails_in(file) ? -1 : NEXT(writev)(file, parts, count);
}
