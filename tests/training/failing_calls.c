/* Lets one call of the system fail: the N-th that writes below a folder. Loaded with LD_PRELOAD, asleep until armed.

   Descriptors below the folder are known by their path in /proc/self/fd. Every call that counts is written to a list,
   so that a test can choose by name which of them shall fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int armed, wanted, answer, seen, sticky, list = -1;

void amltrain_arm(const char *below, int number, int error, int stays, int listing) {
    snprintf(folder, sizeof folder, "%s", below);
    wanted = number, answer = error, sticky = stays, list = listing, seen = 0, armed = 1;
}

static int fails(const char *call, const char *path) {
    if (!armed || !path || strncmp(path, folder, strlen(folder))) return 0;
    int number = __sync_add_and_fetch(&seen, 1);
    if (list >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d %s %s\n", number, call, path + strlen(folder));
        int saved = armed;
        armed = 0;
        if (write(list, line, length) < 0) {}
        armed = saved;
    }
    if (number != wanted && !(sticky && number > wanted && wanted > 0)) return 0;
    errno = answer;
    return 1;
}

static const char *path_of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define DESCRIPTOR(name, fd) char buffer[PATH_MAX]; if (armed && fails(name, path_of(fd, buffer))) return -1

int open(const char *path, int flags, ...) {
    REAL(open);
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails("open", path)) return -1;
    return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails("open", path)) return -1;
    return real(path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(openat64);
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails("open", path)) return -1;
    return real(at, path, flags, mode);
}
/* A disk that is full and stays so takes the first half of what is written, and says so; then it takes nothing. */
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    char buffer[PATH_MAX];
    if (armed && fails("write", path_of(fd, buffer))) {
        if (!sticky || seen != wanted || size < 2) return -1;
        return real(fd, data, size / 2);
    }
    return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(writev); DESCRIPTOR("write", fd); return real(fd, parts, count); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range); DESCRIPTOR("write", out); return real(in, from, out, to, size, flags);
}
ssize_t sendfile64(int out, int in, off64_t *from, size_t size) { REAL(sendfile64); DESCRIPTOR("write", out); return real(out, in, from, size); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); DESCRIPTOR("write", fd); return real(fd, data, size, at); }
int fsync(int fd) { REAL(fsync); DESCRIPTOR("fsync", fd); return real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); DESCRIPTOR("truncate", fd); return real(fd, size); }
int close(int fd) {
    REAL(close);
    char buffer[PATH_MAX];
    int writes = armed && (fcntl(fd, F_GETFL) & (O_WRONLY | O_RDWR));
    int broken = writes && fails("close", path_of(fd, buffer)), kept = errno;
    int result = real(fd);
    if (broken) { errno = kept; return -1; }
    return result;
}
int rename(const char *from, const char *to) { REAL(rename); return fails("rename", to) ? -1 : real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); return fails("rename", to) ? -1 : real(a, from, b, to); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails("mkdir", path) ? -1 : real(path, mode); }
int link(const char *from, const char *to) { REAL(link); return fails("link", to) ? -1 : real(from, to); }
int symlink(const char *from, const char *to) { REAL(symlink); return fails("symlink", to) ? -1 : real(from, to); }
int unlink(const char *path) { REAL(unlink); return fails("unlink", path) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return fails("rmdir", path) ? -1 : real(path); }
int utimensat(int at, const char *path, const struct timespec times[2], int flags) { REAL(utimensat); return fails("utime", path) ? -1 : real(at, path, times, flags); }
