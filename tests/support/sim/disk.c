/* Writes down what a process does to the files below one folder, for tests.support.sim.disk. Preloaded (LD_PRELOAD), so
 * that SQLite's own system calls are seen too. Nothing is ever really fsynced: the model decides what a power cut leaves.
 *
 * A record: op, fd, fd2, flags (int32 each), offset, size (int64), length of the first and second text (uint32), then both.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, SIZE, RENAME, LINK, UNLINK, MKDIR, FSYNC, CLOSE };
#define FDS_MAX 4096

struct record {
    int32_t op, fd, fd2, flags;
    int64_t offset, size;
    uint32_t first, second;
};

static char root[PATH_MAX];
static size_t root_length;
static int recording;         /* 0: the power is off, or was never on */
static int links = 1;         /* whether this file system knows hard links */
static long operations, cut;  /* changes so far; the power goes before this one (0: never) */
static char *log_bytes;
static size_t log_length, log_room;
static unsigned char tracked[FDS_MAX];

void sim_start(const char *folder) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    memset(tracked, 0, sizeof tracked);
    operations = cut = 0;
    log_length = 0;
    recording = 1;
}
void sim_stop(void) { recording = 0; }
void sim_cut(long n) { cut = n ? operations + n : 0; }
void sim_links(int there) { links = there; }
int sim_on(void) { return recording; }
long sim_operations(void) { return operations; }
const char *sim_log(void) { return log_bytes; }
size_t sim_log_length(void) { return log_length; }
void sim_log_clear(void) { log_length = 0; }

static int ours(int dirfd, const char *path) {
    if (!recording || path == NULL) return 0;
    if (path[0] != '/') return dirfd >= 0 && dirfd < FDS_MAX && tracked[dirfd];
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}
static int our_fd(int fd) { return recording && fd >= 0 && fd < FDS_MAX && tracked[fd]; }

/* Whether a change still happens on the disk: the cut comes before the operation with its number. */
static int change(void) {
    if (!recording) return 0;
    operations++;
    if (cut && operations >= cut) recording = 0;
    return recording;
}

static void note(int op, int fd, int fd2, int flags, int64_t offset, int64_t size, const void *first, uint32_t n,
                 const void *second, uint32_t m) {
    struct record r = {op, fd, fd2, flags, offset, size, n, m};
    size_t need = log_length + sizeof r + n + m;
    if (need > log_room) {
        log_room = need * 2 + (1 << 20);
        log_bytes = realloc(log_bytes, log_room);
        if (!log_bytes) abort();
    }
    memcpy(log_bytes + log_length, &r, sizeof r);
    memcpy(log_bytes + log_length + sizeof r, first, n);
    if (m) memcpy(log_bytes + log_length + sizeof r + n, second, m);
    log_length = need;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

static int opened(int fd, int dirfd, const char *path, int flags) {
    if (fd < 0) return fd;
    if (fd < FDS_MAX) tracked[fd] = 0;
    if (!ours(dirfd, path)) return fd;
    if (fd >= FDS_MAX) abort();
    if ((flags & (O_CREAT | O_TRUNC)) && !change()) return fd;
    tracked[fd] = 1;
    note(OPEN, fd, dirfd, flags, 0, 0, path, strlen(path), "", 0);
    return fd;
}
/* SQLite's own chance, of which it makes the salts of its log: the same in every run. */
static const char *chance(const char *path) { return path && !strcmp(path, "/dev/urandom") ? "/dev/zero" : path; }
#define MODE(flags, last) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, last); mode = va_arg(a, int); va_end(a); }
int open(const char *path, int flags, ...) { REAL(open); path = chance(path); MODE(flags, flags); return opened(real(path, flags, mode), AT_FDCWD, path, flags); }
int open64(const char *path, int flags, ...) { REAL(open64); path = chance(path); MODE(flags, flags); return opened(real(path, flags, mode), AT_FDCWD, path, flags); }
int openat(int dirfd, const char *path, int flags, ...) { REAL(openat); MODE(flags, flags); return opened(real(dirfd, path, flags, mode), dirfd, path, flags); }
int openat64(int dirfd, const char *path, int flags, ...) { REAL(openat64); MODE(flags, flags); return opened(real(dirfd, path, flags, mode), dirfd, path, flags); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < FDS_MAX && tracked[fd]) {
        tracked[fd] = 0;
        if (recording) note(CLOSE, fd, 0, 0, 0, 0, "", 0, "", 0);
    }
    return real(fd);
}

static ssize_t wrote(int fd, const void *data, ssize_t n, int64_t offset) {
    if (n > 0 && our_fd(fd) && change()) note(WRITE, fd, 0, 0, offset, n, data, n, "", 0);
    return n;
}
ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    ssize_t done = real(fd, data, n);
    if (done > 0 && our_fd(fd)) return wrote(fd, data, done, lseek(fd, 0, SEEK_CUR) - done);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) { REAL(pwrite); return wrote(fd, data, real(fd, data, n, offset), offset); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) { REAL(pwrite64); return wrote(fd, data, real(fd, data, n, offset), offset); }
static ssize_t wrote_many(int fd, const struct iovec *parts, ssize_t done, int64_t offset) {
    ssize_t left = done;
    for (int i = 0; left > 0; i++) {
        ssize_t n = (ssize_t)parts[i].iov_len < left ? (ssize_t)parts[i].iov_len : left;
        wrote(fd, parts[i].iov_base, n, offset);
        offset += n;
        left -= n;
    }
    return done;
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    ssize_t done = real(fd, parts, count);
    return done > 0 && our_fd(fd) ? wrote_many(fd, parts, done, lseek(fd, 0, SEEK_CUR) - done) : done;
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { REAL(pwritev); return wrote_many(fd, parts, real(fd, parts, count, offset), offset); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) { REAL(pwritev64); return wrote_many(fd, parts, real(fd, parts, count, offset), offset); }

/* Copies inside the kernel: refused, so that callers fall back to read and write. */
ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    REAL(sendfile);
    if (our_fd(out)) { errno = EINVAL; return -1; }
    return real(out, in, offset, count);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
    REAL(sendfile64);
    if (our_fd(out)) { errno = EINVAL; return -1; }
    return real(out, in, offset, count);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    REAL(copy_file_range);
    if (our_fd(out)) { errno = ENOSYS; return -1; }
    return real(in, from, out, to, n, flags);
}

static int sized(int fd, int result, int64_t size, int grow) {
    if (result == 0 && our_fd(fd) && change()) note(SIZE, fd, 0, grow, 0, size, "", 0, "", 0);
    return result;
}
int ftruncate(int fd, off_t size) { REAL(ftruncate); return sized(fd, real(fd, size), size, 0); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return sized(fd, real(fd, size), size, 0); }
int truncate(const char *path, off_t size) { int fd = open(path, O_WRONLY), done; if (fd < 0) return fd; done = ftruncate(fd, size); close(fd); return done; }
int truncate64(const char *path, off64_t size) { return truncate(path, size); }
int fallocate(int fd, int mode, off_t offset, off_t n) { REAL(fallocate); return mode ? real(fd, mode, offset, n) : sized(fd, real(fd, mode, offset, n), offset + n, 1); }
int posix_fallocate(int fd, off_t offset, off_t n) { REAL(posix_fallocate); return sized(fd, real(fd, offset, n), offset + n, 1); }
int posix_fallocate64(int fd, off64_t offset, off64_t n) { REAL(posix_fallocate64); return sized(fd, real(fd, offset, n), offset + n, 1); }

static int named(int op, int result, int dir, const char *first, int dir2, const char *second, int flags) {
    if (result == 0 && (ours(dir, first) || (second && ours(dir2, second))) && change())
        note(op, dir, dir2, flags, 0, 0, first, strlen(first), second ? second : "", second ? strlen(second) : 0);
    return result;
}
int renameat(int dir, const char *from, int dir2, const char *to) { REAL(renameat); return named(RENAME, real(dir, from, dir2, to), dir, from, dir2, to, 0); }
int rename(const char *from, const char *to) { REAL(rename); return named(RENAME, real(from, to), AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int dir, const char *from, int dir2, const char *to, int flags) {
    REAL(linkat);
    if (!links && ours(dir2, to)) { errno = EPERM; return -1; }
    return named(LINK, real(dir, from, dir2, to, flags), dir, from, dir2, to, 0);
}
int link(const char *from, const char *to) {
    REAL(link);
    if (!links && ours(AT_FDCWD, to)) { errno = EPERM; return -1; }
    return named(LINK, real(from, to), AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); return named(UNLINK, real(dir, path, flags), dir, path, 0, NULL, flags & AT_REMOVEDIR); }
int unlink(const char *path) { REAL(unlink); return named(UNLINK, real(path), AT_FDCWD, path, 0, NULL, 0); }
int rmdir(const char *path) { REAL(rmdir); return named(UNLINK, real(path), AT_FDCWD, path, 0, NULL, 1); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat); return named(MKDIR, real(dir, path, mode), dir, path, 0, NULL, 0); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return named(MKDIR, real(path, mode), AT_FDCWD, path, 0, NULL, 0); }

static int synced(int fd) {
    if (our_fd(fd) && change()) note(FSYNC, fd, 0, 0, 0, 0, "", 0, "", 0);
    return fcntl(fd, F_GETFD) < 0 ? -1 : 0;
}
int fsync(int fd) { return synced(fd); }
int fdatasync(int fd) { return synced(fd); }
