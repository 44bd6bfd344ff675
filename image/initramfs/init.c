/*
 * The whole initramfs: load the modules, open the root partition through dm-verity with the root hash of the kernel
 * command line, mount it, hand over to systemd. Everything but that hash is compiled in (params.h, made by the build), and
 * there is nothing to fall back to: an error ends this process, which panics the kernel, which reboots (panic=-1).
 *
 * Refused: a command line without exactly one root hash, and whatever the host put into the initrd through the EFI stub
 * (credentials, extensions) - all of /.extra but the stub's own os-release. Both are measured as well; this is so that
 * they have no effect even where nobody looks.
 *
 * Interfaces: linux/dm-ioctl.h (4.x), Documentation/admin-guide/device-mapper/verity.rst, systemd-stub(7).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "params.h" /* MODULES, DATA_PARTUUID, HASH_PARTUUID, DATA_BLOCKS, SALT */

#define BLOCK 4096
#define WAIT_MS 60000
#define HASH_HEX 64

static void refuse(const char *code, const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    dprintf(STDERR_FILENO, "countermark: refused %s: %s\n", code, text);
    sleep(1); /* the serial line is slower than the panic */
    _exit(1);
}

static void mount_or_die(const char *type, const char *target, unsigned long flags)
{
    if (mkdir(target, 0755) && errno != EEXIST)
        refuse("init.mount", "%s: %s", target, strerror(errno));
    if (mount(type, target, type, flags, NULL) && errno != EBUSY)
        refuse("init.mount", "%s: %s", target, strerror(errno));
}

static size_t read_text(const char *path, char *out, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    if (fd < 0)
        return 0;
    while (used < size - 1) {
        ssize_t got = read(fd, out + used, size - 1 - used);
        if (got <= 0)
            break;
        used += (size_t)got;
    }
    close(fd);
    out[used] = 0;
    return used;
}

/* The one roothash= of the command line: 64 lower-case hexadecimal digits. */
static void root_hash(char out[HASH_HEX + 1])
{
    static char line[8192];
    char *rest = line, *word;
    int seen = 0;
    if (read_text("/proc/cmdline", line, sizeof line) >= sizeof line - 1)
        refuse("init.cmdline", "longer than %zu bytes", sizeof line - 2);
    while ((word = strsep(&rest, " \n"))) {
        if (strncmp(word, "roothash=", 9))
            continue;
        seen++;
        if (strlen(word + 9) != HASH_HEX || strspn(word + 9, "0123456789abcdef") != HASH_HEX)
            refuse("init.roothash", "expected %d hexadecimal digits", HASH_HEX);
        memcpy(out, word + 9, HASH_HEX + 1);
    }
    if (seen != 1)
        refuse("init.roothash", "expected it once, got it %d times", seen);
}

static void refuse_extra(void)
{
    DIR *folder = opendir("/.extra");
    struct dirent *entry;
    if (!folder && errno == ENOENT)
        return;
    if (!folder)
        refuse("init.extra", "%s", strerror(errno));
    while ((entry = readdir(folder))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (strcmp(entry->d_name, "os-release"))
            refuse("init.extra", "the host put %s into the initrd", entry->d_name);
    }
    closedir(folder);
}

static void load_modules(void)
{
    static const char *const modules[] = {MODULES};
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        char path[128];
        snprintf(path, sizeof path, "/modules/%s.ko", modules[i]);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        /* ENODEV: this machine is not a TD, or lacks the device. Whoever needs it finds it missing. */
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST && errno != ENODEV))
            refuse("init.module", "%s: %s", modules[i], strerror(errno));
        close(fd);
        unlink(path);
    }
}

/* The block device of the partition with this GPT GUID, as /dev/NAME. Which of two would not matter: verity decides. */
static bool find_partition(const char *partuuid, char *out, size_t size)
{
    char wanted[64];
    bool found = false;
    struct dirent *entry;
    DIR *folder = opendir("/sys/class/block");
    if (!folder)
        return false;
    snprintf(wanted, sizeof wanted, "\nPARTUUID=%s\n", partuuid);
    while (!found && (entry = readdir(folder))) {
        char path[320], text[4096] = "\n";
        snprintf(path, sizeof path, "/sys/class/block/%s/uevent", entry->d_name);
        if (read_text(path, text + 1, sizeof text - 1) && strstr(text, wanted)) {
            snprintf(out, size, "/dev/%s", entry->d_name);
            found = access(out, F_OK) == 0;
        }
    }
    closedir(folder);
    return found;
}

static void await_partition(const char *partuuid, char *out, size_t size)
{
    const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};
    for (int waited = 0; waited < WAIT_MS; waited += 10) {
        if (find_partition(partuuid, out, size))
            return;
        nanosleep(&pause, NULL);
    }
    refuse("init.partition", "no partition %s within %d s", partuuid, WAIT_MS / 1000);
}

static struct dm_ioctl *dm_call(int control, unsigned long command, const char *what, const char *hash,
                                unsigned flags, const char *parameters)
{
    static char buffer[4096] __attribute__((aligned(8)));
    struct dm_ioctl *call = (struct dm_ioctl *)buffer;
    memset(buffer, 0, sizeof buffer);
    call->version[0] = DM_VERSION_MAJOR;
    call->data_size = sizeof buffer;
    call->data_start = sizeof *call;
    call->flags = flags;
    snprintf(call->name, sizeof call->name, "countermark-root");
    if (command == DM_DEV_CREATE)
        snprintf(call->uuid, sizeof call->uuid, "countermark-verity-%s", hash);
    if (parameters) {
        struct dm_target_spec *target = (struct dm_target_spec *)(buffer + sizeof *call);
        call->target_count = 1;
        target->length = (unsigned long long)DATA_BLOCKS * (BLOCK / 512);
        snprintf(target->target_type, sizeof target->target_type, "verity");
        snprintf((char *)(target + 1), sizeof buffer - sizeof *call - sizeof *target, "%s", parameters);
    }
    if (ioctl(control, command, call))
        refuse("init.verity", "%s: %s", what, strerror(errno));
    return call;
}

/* The verity device of the root, as /dev/dm-N. A block that is not what was measured panics; so does one unreadable. */
static void open_verity(const char *hash, char *out, size_t size)
{
    char data[300], tree[300], parameters[1024];
    await_partition(DATA_PARTUUID, data, sizeof data);
    await_partition(HASH_PARTUUID, tree, sizeof tree);
    snprintf(parameters, sizeof parameters, "1 %s %s %d %d %llu 1 sha256 %s %s 2 panic_on_corruption panic_on_error",
             data, tree, BLOCK, BLOCK, (unsigned long long)DATA_BLOCKS, hash, SALT);
    int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
    if (control < 0)
        refuse("init.verity", "/dev/mapper/control: %s", strerror(errno));
    dm_call(control, DM_DEV_CREATE, "create", hash, DM_READONLY_FLAG, NULL);
    dm_call(control, DM_TABLE_LOAD, "load", hash, DM_READONLY_FLAG, parameters);
    struct dm_ioctl *done = dm_call(control, DM_DEV_SUSPEND, "resume", hash, DM_READONLY_FLAG, NULL);
    snprintf(out, size, "/dev/dm-%u", minor(done->dev));
    close(control);
}

int main(void)
{
    char hash[HASH_HEX + 1] = "", root[32];
    mount_or_die("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC);
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);
    mount_or_die("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC);
    mount_or_die("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC);

    refuse_extra();
    root_hash(hash);
    load_modules();
    open_verity(hash, root, sizeof root);

    mkdir("/root", 0755);
    if (mount(root, "/root", "erofs", MS_RDONLY | MS_NODEV | MS_NOSUID, NULL))
        refuse("init.root", "%s: %s", root, strerror(errno));
    if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL) || mount("/proc", "/root/proc", NULL, MS_MOVE, NULL) ||
        mount("/sys", "/root/sys", NULL, MS_MOVE, NULL) || chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) ||
        chroot(".") || chdir("/"))
        refuse("init.root", "switch: %s", strerror(errno));
    if (console > 2)
        close(console);
    char *const arguments[] = {"/usr/lib/systemd/systemd", NULL};
    char *const environment[] = {"TERM=dumb", NULL};
    execve(arguments[0], arguments, environment);
    refuse("init.systemd", "%s", strerror(errno));
}
