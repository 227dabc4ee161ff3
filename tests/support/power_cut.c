/* Preloaded into a process, it keeps what each fsync makes durable: a file's content, or a folder's list of names.
 *
 * POSIX promises no more: what was written and not synced may be lost, and so may a name whose folder was not synced. For files below
 * $CUT_WATCHED, a sync copies the content to $CUT_KEPT/<inode>.file, or the names and inodes to $CUT_KEPT/<inode>.folder.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void keep(int fd) {
    const char *watched = getenv("CUT_WATCHED"), *kept = getenv("CUT_KEPT");
    char link[64], path[PATH_MAX], part[PATH_MAX], whole[PATH_MAX];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!watched || !kept || length < 0 || fstat(fd, &status)) return;
    path[length] = 0;
    if (strncmp(path, watched, strlen(watched))) return;
    snprintf(whole, sizeof whole, "%s/%lu.%s", kept, (unsigned long)status.st_ino, S_ISDIR(status.st_mode) ? "folder" : "file");
    snprintf(part, sizeof part, "%s.part", whole);
    FILE *out = fopen(part, "wb");
    if (!out) abort();
    if (S_ISDIR(status.st_mode)) {
        DIR *folder = opendir(path);
        struct dirent *entry;
        while (folder && (entry = readdir(folder)))
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
                fprintf(out, "%lu %s\n", (unsigned long)entry->d_ino, entry->d_name);
        if (folder) closedir(folder);
    } else {
        char block[65536];
        int in = open(path, O_RDONLY);
        ssize_t got;
        while (in >= 0 && (got = read(in, block, sizeof block)) > 0) fwrite(block, 1, (size_t)got, out);
        if (in >= 0) close(in);
    }
    fclose(out);
    rename(part, whole);
}

#define SYNC(name)                                         \
    int name(int fd) {                                     \
        int (*real)(int) = dlsym(RTLD_NEXT, #name);        \
        int failed = real(fd);                             \
        if (!failed) keep(fd);                             \
        return failed;                                     \
    }

SYNC(fsync)
SYNC(fdatasync)
