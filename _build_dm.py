# SPDX-License-Identifier: MIT
"""
The extension ``dmlib._dm``: what dmlib uses of libdevmapper, and a small shim in C.

The only file that names ``libdevmapper.h``. A reader finds a C function by its topic below. The shim
holds what cannot be Python: a variadic log callback, and the moments in which a device is suspended.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NoReturn

import cffi

FLOOR = (1, 2, 175)
"""Oldest libdevmapper that is supported."""

PACKAGES = (
    "Debian/Ubuntu: apt install gcc pkg-config libdevmapper-dev; Fedora: dnf install gcc pkgconf device-mapper-devel"
)

# What the shim is told about one device that is to be suspended; said to cffi and to C from one text.
HOLD = """
    struct dmlib_hold {
        struct dm_task *suspend, *resume, *clear, *restore, *resume_restored;
        int suspended, resumed, cleared, restored, resumed_restored;
    };
"""

CDEF = {
    "task": """
        struct dm_task;
        enum {
            DM_DEVICE_CREATE, DM_DEVICE_RELOAD, DM_DEVICE_REMOVE, DM_DEVICE_SUSPEND, DM_DEVICE_RESUME,
            DM_DEVICE_INFO, DM_DEVICE_DEPS, DM_DEVICE_RENAME, DM_DEVICE_VERSION, DM_DEVICE_STATUS,
            DM_DEVICE_TABLE, DM_DEVICE_CLEAR, DM_DEVICE_MKNODES, DM_DEVICE_LIST_VERSIONS,
            DM_DEVICE_TARGET_MSG, DM_DEVICE_REMOVE_ALL, DM_DEVICE_SET_GEOMETRY, DM_DEVICE_GET_TARGET_VERSION, ...
        };
        struct dm_task *dm_task_create(int type);
        void dm_task_destroy(struct dm_task *dmt);
        int dm_task_set_name(struct dm_task *dmt, const char *name);
        int dm_task_set_uuid(struct dm_task *dmt, const char *uuid);
        int dm_task_set_major_minor(struct dm_task *dmt, int major, int minor, int allow_default_major_fallback);
        int dm_task_set_newname(struct dm_task *dmt, const char *newname);
        int dm_task_set_newuuid(struct dm_task *dmt, const char *newuuid);
        int dm_task_set_message(struct dm_task *dmt, const char *message);
        int dm_task_set_sector(struct dm_task *dmt, uint64_t sector);
        int dm_task_set_ro(struct dm_task *dmt);
        int dm_task_no_flush(struct dm_task *dmt);
        int dm_task_skip_lockfs(struct dm_task *dmt);
        int dm_task_query_inactive_table(struct dm_task *dmt);
        int dm_task_deferred_remove(struct dm_task *dmt);
        int dm_task_secure_data(struct dm_task *dmt);
        int dm_task_set_geometry(struct dm_task *dmt, const char *cylinders, const char *heads, const char *sectors,
                                 const char *start);
        int dm_task_set_minor(struct dm_task *dmt, int minor);
        int dm_task_set_uid(struct dm_task *dmt, uint32_t uid);
        int dm_task_set_gid(struct dm_task *dmt, uint32_t gid);
        int dm_task_set_mode(struct dm_task *dmt, uint32_t mode);
        typedef enum { DM_ADD_NODE_ON_RESUME, DM_ADD_NODE_ON_CREATE, ... } dm_add_node_t;
        int dm_task_set_add_node(struct dm_task *dmt, dm_add_node_t add_node);
        int dm_task_add_target(struct dm_task *dmt, uint64_t start, uint64_t size, const char *ttype,
                               const char *params);
        int dm_task_get_driver_version(struct dm_task *dmt, char *version, size_t size);
    """,
    "results": """
        struct dm_info {
            int exists; int suspended; int live_table; int inactive_table;
            int32_t open_count; uint32_t event_nr; uint32_t major; uint32_t minor;
            int read_only; int32_t target_count; int deferred_remove; int internal_suspend;
            ...;
        };
        struct dm_deps { uint32_t count; uint64_t device[]; ...; };
        struct dm_versions { uint32_t next; uint32_t version[3]; char name[]; ...; };
        int dm_task_get_info(struct dm_task *dmt, struct dm_info *dmi);
        const char *dm_task_get_name(const struct dm_task *dmt);
        const char *dm_task_get_uuid(const struct dm_task *dmt);
        struct dm_deps *dm_task_get_deps(struct dm_task *dmt);
        struct dm_versions *dm_task_get_versions(struct dm_task *dmt);
        const char *dm_task_get_message_response(struct dm_task *dmt);
        void *dm_get_next_target(struct dm_task *dmt, void *next, uint64_t *start, uint64_t *length,
                                 char **target_type, char **params);
    """,
    "library": """
        int dm_get_library_version(char *version, size_t size);
        typedef enum { DM_STRING_MANGLING_AUTO, ... } dm_string_mangling_t;
        int dm_set_name_mangling_mode(dm_string_mangling_t name_mangling_mode);
        const char *dm_dir(void);
        int dm_set_dev_dir(const char *dir);
        void dm_hold_control_dev(int hold_open);
        void dm_lib_release(void);
        void dm_task_update_nodes(void);
    """,
    "udev": """
        #define DM_UDEV_DISABLE_DM_RULES_FLAG ...
        #define DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG ...
        #define DM_UDEV_DISABLE_DISK_RULES_FLAG ...
        #define DM_UDEV_DISABLE_OTHER_RULES_FLAG ...
        #define DM_UDEV_LOW_PRIORITY_FLAG ...
        #define DM_UDEV_DISABLE_LIBRARY_FALLBACK ...
        int dm_task_set_cookie(struct dm_task *dmt, uint32_t *cookie, uint16_t flags);
        int dm_udev_wait_immediate(uint32_t cookie, int *ready);
        void dm_udev_set_sync_support(int sync_with_udev);
        int dm_udev_get_sync_support(void);
    """,
    "hold": HOLD,
    "shim": """
        const char *dmlib_version(void);
        void dmlib_log_install(void);
        void dmlib_log_threshold(int level);
        int dmlib_log_count(void);
        int dmlib_log_level(int index);
        const char *dmlib_log_text(int index);
        void dmlib_log_clear(void);
        void dmlib_run(struct dm_task *task, int *outcome);
        void dmlib_section(struct dmlib_hold *hold, int holds, struct dm_task **message, int *sent, int messages,
                           int keep_suspended, int *gate, uint64_t *held_ns);
        int dmlib_gate_abandon(int *gate);
        void dmlib_cookie_discard(uint32_t cookie);
        int dmlib_syncfs(int fd);
        int dmlib_ima_measurement(struct dm_task *task);
        void dmlib_wipe(char *text, size_t size);
    """,
}

# An outcome, as the shim writes it: 1 done, 0 not tried, -1 failed before the ioctl, -errno - 1 refused with errno.
SHIM = r"""
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <libdevmapper.h>

@HOLD@
static const char *dmlib_version(void) { return DMLIB_VERSION; }

/*
 * libdevmapper's log callback is variadic, so Python cannot be it. Lines are kept by thread until the call that
 * caused them has returned and Python takes them. The first lines are kept when there are too many: they tell the
 * cause. Nothing here calls Python, so the library may log at any time, also while the process exits.
 */
enum { LOG_LINES = 64, LOG_WIDTH = 512, LOG_LEVEL_BITS = 7, LOG_WARNING = 4 };
static int log_threshold = LOG_WARNING;
static __thread int log_count;
static __thread struct { int level; char text[LOG_WIDTH]; } log_line[LOG_LINES];

static void log_keep(int level, const char *file, int line, int dm_errno, const char *format, ...)
{
    va_list arguments;

    (void) file; (void) line; (void) dm_errno;
    level &= LOG_LEVEL_BITS;
    if (level > __atomic_load_n(&log_threshold, __ATOMIC_RELAXED) || log_count == LOG_LINES)
        return;
    va_start(arguments, format);
    vsnprintf(log_line[log_count].text, LOG_WIDTH, format, arguments);
    va_end(arguments);
    log_line[log_count++].level = level;
}

static void dmlib_log_install(void) { dm_log_with_errno_init(log_keep); }
static void dmlib_log_threshold(int level) { __atomic_store_n(&log_threshold, level, __ATOMIC_RELAXED); }
static int dmlib_log_count(void) { return log_count; }
static int dmlib_log_level(int index) { return log_line[index].level; }
static const char *dmlib_log_text(int index) { return log_line[index].text; }
static void dmlib_log_clear(void) { log_count = 0; }

/* The outcome is stored from here, so that Python knows it even if a signal handler raises as the call returns. */
static void dmlib_run(struct dm_task *task, int *outcome)
{
    *outcome = dm_task_run(task) ? 1 : -dm_task_get_errno(task) - 1;
}

static int run(struct dm_task *task, int *outcome)
{
    if (task)
        dmlib_run(task, outcome);
    return *outcome == 1;
}

enum { GATE_OPEN, GATE_PASSED, GATE_ABANDONED };

static int gate_move(int *gate, int to)
{
    int from = GATE_OPEN;

    return __atomic_compare_exchange_n(gate, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Tell a section that nobody waits for it any more; 0 if it has passed its last suspend and will soon be done. */
static int dmlib_gate_abandon(int *gate) { return gate_move(gate, GATE_ABANDONED); }

/*
 * Suspend devices in order, send messages, resume in reverse: all prepared, nothing allocated, no Python. Only a
 * suspend can take long. Whoever waits may give up until the last one is through; a section given up sends
 * nothing, drops the tables that were to be swapped in, and resumes. When the kernel refuses to resume with a new
 * table, the old one is put back: otherwise the device would stay suspended. A suspend that fails without an errno
 * may have been carried out (libdevmapper could not read the answer), so it is followed by a resume as well.
 */
static void dmlib_section(struct dmlib_hold *hold, int holds, struct dm_task **message, int *sent, int messages,
                          int keep_suspended, int *gate, uint64_t *held_ns)
{
    struct timespec begin = {0, 0}, end;
    sigset_t all, before;
    int i, ok = __atomic_load_n(gate, __ATOMIC_ACQUIRE) == GATE_OPEN, passed;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (i = 0; ok && i < holds; i++) {
        if (!i)
            clock_gettime(CLOCK_MONOTONIC, &begin);
        ok = run(hold[i].suspend, &hold[i].suspended);
    }
    passed = gate_move(gate, GATE_PASSED);
    for (i = 0; ok && passed && i < messages; i++)
        ok = run(message[i], &sent[i]);
    for (i = holds; i-- > 0; ) {
        if ((hold[i].suspended != 1 && hold[i].suspended != -1) || (keep_suspended && ok && passed))
            continue;
        if (!(ok && passed))
            run(hold[i].clear, &hold[i].cleared);
        if (!run(hold[i].resume, &hold[i].resumed) && run(hold[i].restore, &hold[i].restored))
            run(hold[i].resume_restored, &hold[i].resumed_restored);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    *held_ns = (uint64_t) (end.tv_sec - begin.tv_sec) * 1000000000u + (uint64_t) (end.tv_nsec - begin.tv_nsec);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Take a cookie down, whatever udev still owes it: a semaphore must not outlive the process that made it. */
static void dmlib_cookie_discard(uint32_t cookie)
{
    int ready = 0, left = 1 << 16; /* a semaphore counts no further */

    while (left-- && dm_udev_wait_immediate(cookie, &ready) && !ready)
        if (!dm_udev_complete(cookie))
            break;
}

static int dmlib_syncfs(int fd) { return syncfs(fd) ? errno : 0; }

/* Newer than the oldest library that is supported, so perhaps not there: linked weakly. */
int dm_task_ima_measurement(struct dm_task *dmt);
#pragma weak dm_task_ima_measurement
static int dmlib_ima_measurement(struct dm_task *task)
{
    return dm_task_ima_measurement ? dm_task_ima_measurement(task) : 0;
}

/* A compiler may leave out a memset of what is freed next, but not this. */
static void dmlib_wipe(char *text, size_t size) { explicit_bzero(text, size); }
""".replace("@HOLD@", HOLD)


def _stop(problem: str) -> NoReturn:
    raise SystemExit(f"dmlib cannot be built: {problem}. {PACKAGES}")


def _check_tools() -> None:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        _stop(f"there is no C compiler ({compiler})")
    pkg_config = os.environ.get("PKG_CONFIG", "pkg-config")
    if shutil.which(pkg_config) is None:
        _stop(f"there is no {pkg_config}")
    found = subprocess.run([pkg_config, "--modversion", "devmapper"], capture_output=True, text=True, check=False)
    if found.returncode:
        _stop("the headers of libdevmapper are missing")
    version = tuple(int(number) for number in re.findall(r"\d+", found.stdout)[:3])
    if version < FLOOR:
        _stop(f"libdevmapper is {found.stdout.strip()}, and 1.02.175 is the oldest that works")


def _package_version() -> str:
    text = (Path(__file__).parent / "dmlib" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        _stop("dmlib/__init__.py names no version")
    return match[1]


_check_tools()
ffibuilder = cffi.FFI()
for topic in CDEF.values():
    ffibuilder.cdef(topic)
ffibuilder.set_source_pkgconfig(
    "dmlib._dm",
    ["devmapper"],
    SHIM,
    define_macros=[("DMLIB_VERSION", f'"{_package_version()}"')],
    extra_compile_args=shlex.split(os.environ.get("DMLIB_CFLAGS", "")),
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
