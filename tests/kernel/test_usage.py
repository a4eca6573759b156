# SPDX-License-Identifier: MIT
"""Who uses a block device: each kind of user for real, and what each looks like in an error message."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from dmlib import usage
from dmlib.ids import DeviceNumber
from dmlib.loop import LoopDevice, create_sparse_file
from dmlib.units import MiB
from dmlib.usage import MountPoint, User, mount_points, stacked_on, users_of

NOBODY = 65534


def tool(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def users(number):
    """Ask once udev has looked at what was changed."""
    deadline = time.monotonic() + 5
    while True:
        found = users_of(number)
        if time.monotonic() > deadline or not any("udev" in user.command for user in found):
            return found
        time.sleep(0.05)


def texts(number):
    return [str(user) for user in users(number)]


def kinds(number):
    return [user.kind for user in users(number)]


@pytest.fixture
def loop(tmp_path):
    path = tmp_path / "file"
    create_sparse_file(path, MiB(16))
    with LoopDevice.temporary(path) as device:
        yield device


@pytest.fixture
def ext4(loop):
    tool("mkfs.ext4", "-q", loop.path)
    return loop


@contextlib.contextmanager
def mounted(source, directory, *options):
    directory = os.fspath(directory)
    os.makedirs(directory, exist_ok=True)
    tool("mount", *options, os.fspath(source), directory)
    try:
        yield directory
    finally:
        tool("umount", directory)


@contextlib.contextmanager
def linear(below, name, length=32768):
    """A linear device of dmsetup's making, with a node of its own."""
    tool("dmsetup", "create", name, "--table", f"0 {length} linear {below} 0")
    try:
        number = tool("dmsetup", "info", "-c", "--noheadings", "-o", "major,minor", name)
        yield DeviceNumber.parse(number)
    finally:
        tool("dmsetup", "remove", "--retry", name)


@contextlib.contextmanager
def running(*words):
    """Run a program that says when it is ready, and stays until it is told to go."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, "it ended before it was ready"
        yield process
    finally:
        process.communicate(timeout=60)
    assert process.returncode == 0


@contextlib.contextmanager
def shell(script):
    with running("sh", "-e", "-c", f"{script}\necho ready\nread wait || true") as process:
        yield process


def in_own_namespace(script):
    return running("unshare", "-m", "--propagation", "private", "sh", "-e", "-c", f"{script}\necho ready\nread wait||:")


# -- each kind of user


def test_nobody(loop):
    """A device that nobody uses has no users, no mount points and nothing on top of it."""
    assert users(loop.number) == []
    assert mount_points(loop.number) == []
    assert stacked_on(loop.number) == []


def test_a_device_that_does_not_exist():
    """About a device that is not there, the answer is nobody, not an error."""
    nowhere = DeviceNumber(7, 99999)
    assert (users(nowhere), mount_points(nowhere), stacked_on(nowhere)) == ([], [], [])


def test_a_mount(tmp_path, ext4):
    """A mounted file system is a user while it is mounted, and can be reached at its mount point."""
    with mounted(ext4, tmp_path / "mnt") as directory:
        assert users(ext4.number) == [User("mount", directory, ext4.number)]
        assert texts(ext4.number) == [f"mounted on {directory}"]
        assert mount_points(ext4.number) == [MountPoint(directory, "/", None)]
        assert DeviceNumber.from_dev(os.stat(directory).st_dev) == ext4.number
    assert users(ext4.number) == []


@pytest.mark.parametrize("name", ["with space", "tab\tand\nline", r"back\slash", r"\040", "#", "\udcff"])
def test_unusual_mount_points(tmp_path, ext4, name):
    """The path of a mount point comes back as it is, and an error message stays on one line."""
    with mounted(ext4, tmp_path / name) as directory:
        (place,) = mount_points(ext4.number)
        assert place.path == directory
        assert os.path.ismount(place.path)
        (user,) = users(ext4.number)
        assert user.name == directory
        assert str(user).isprintable()


def test_bind_mounts(tmp_path, ext4):
    """Bind mounts are users of their own; the whole file system comes first, and a pipe is no mount point to open."""
    with mounted(ext4, tmp_path / "z") as whole:
        os.mkdir(f"{whole}/sub")
        os.mkfifo(f"{whole}/fifo")
        for name in ("a", "b"):
            with open(tmp_path / name, "wb"):
                pass
        with open(f"{whole}/plain", "wb"):
            pass
        with contextlib.ExitStack() as stack:
            stack.enter_context(mounted(f"{whole}/sub", tmp_path / "0", "--bind"))
            for source, target in (("fifo", "a"), ("plain", "b")):
                tool("mount", "--bind", f"{whole}/{source}", tmp_path / target)
                stack.callback(tool, "umount", tmp_path / target)
            assert {user.name for user in users(ext4.number)} == {
                whole,
                *(os.fspath(tmp_path / name) for name in ("0", "a", "b")),
            }
            places = mount_points(ext4.number)
            assert places[0] == MountPoint(whole, "/", None)
            assert {(place.path, place.root) for place in places[1:]} == {
                (os.fspath(tmp_path / "0"), "/sub"),
                (os.fspath(tmp_path / "b"), "/plain"),
            }


def test_a_mount_in_another_namespace(tmp_path, ext4):
    """A mount that only another mount namespace has is found, names a process there, and can be reached from here."""
    directory = tmp_path / "private"
    directory.mkdir()
    with in_own_namespace(f"mount {ext4.path} {directory}; echo hello > {directory}/inside") as process:
        assert tool("findmnt", "-n", "-o", "TARGET", "--list").splitlines().count(os.fspath(directory)) == 0
        (user,) = users(ext4.number)
        assert (user.kind, user.name, user.pid) == ("mount", os.fspath(directory), process.pid)
        assert str(user) == f"mounted on {directory} in the mount namespace of pid {process.pid} (sh)"
        (place,) = mount_points(ext4.number)
        assert place.path == f"/proc/{process.pid}/root{directory}"
        assert place.pid == process.pid
        with open(f"{place.path}/inside", encoding="ascii") as inside:
            assert inside.read() == "hello\n"
    assert users(ext4.number) == []


def test_each_namespace_once(tmp_path, ext4):
    """A copy of a mount in another namespace is listed once, however many processes live there; ours comes first."""
    with mounted(ext4, tmp_path / "mnt") as directory, in_own_namespace("sleep 60 & sleeper=$!") as process:
        try:
            assert [(user.name, user.pid) for user in users(ext4.number)] == [
                (directory, None),
                (directory, process.pid),
            ]
            assert [place.pid for place in mount_points(ext4.number)] == [None, process.pid]
        finally:
            tool("pkill", "-P", str(process.pid))


def test_a_hidden_mount_is_listed_but_not_reached(tmp_path, ext4):
    """A mount with another one on top of it is a user, and no mount point: its path leads elsewhere."""
    with mounted(ext4, tmp_path / "mnt") as directory:
        with mounted("none", directory, "-t", "tmpfs"):
            assert kinds(ext4.number) == ["mount"]
            assert mount_points(ext4.number) == []
        assert len(mount_points(ext4.number)) == 1


def test_a_process_in_a_chroot_hides_nothing(tmp_path, ext4):
    """Mounts outside the root directory of the first process of a namespace are found through another one."""
    jail = tmp_path / "jail"
    jail.mkdir()
    script = f"""
        mount --rbind / {jail}
        mount {ext4.path} {tmp_path}/out
        exec {sys.executable} -c 'import os
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
os.chroot("{jail}")
print("ready", flush=True)
os.waitpid(child, 0)'
    """
    (tmp_path / "out").mkdir()
    with running("unshare", "-m", "--propagation", "private", "sh", "-e", "-c", script) as process:
        (user,) = users(ext4.number)
        assert user.name == os.fspath(tmp_path / "out")
        assert user.pid != process.pid
        (place,) = mount_points(ext4.number)
        assert DeviceNumber.from_dev(os.stat(place.path).st_dev) == ext4.number


def test_a_mount_seen_from_two_roots_counts_once(tmp_path, ext4):
    """A mount that a process with another root directory sees too, under another path, is one user."""
    jailed = "import os, sys; os.chroot(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    with (
        mounted(ext4, tmp_path / "jail" / "mnt") as directory,
        running(sys.executable, "-c", jailed, tmp_path / "jail"),
    ):
        assert users(ext4.number) == [User("mount", directory, ext4.number)]
        assert mount_points(ext4.number) == [MountPoint(directory, "/", None)]


def test_a_source_stands_for_a_number_of_its_own(tmp_path, loop):
    """A file system whose mounts have an anonymous number, as btrfs has, is known by its source."""
    with mounted(loop, tmp_path / "mnt", "-t", "tmpfs") as directory:
        assert os.stat(directory).st_dev != os.stat(loop.path).st_rdev
        assert users(loop.number) == [User("mount", directory, loop.number)]
        assert [place.path for place in mount_points(loop.number)] == [directory]


def test_an_opener(loop):
    """A process that has the device open is named, once, by pid and command."""
    with shell(f"exec 3< {loop.path} 4< {loop.path}") as process:
        assert users(loop.number) == [User("opener", "sh", loop.number, process.pid, "sh")]
        assert texts(loop.number) == [f"open in pid {process.pid} (sh)"]
    assert users(loop.number) == []


def test_an_opener_by_another_node(tmp_path, loop):
    """It is the number that counts, not the node's path, and not whether that still exists."""
    with mounted("none", tmp_path / "nodes", "-t", "tmpfs") as nodes:  # /tmp may be mounted nodev
        node, link = f"{nodes}/node", f"{nodes}/link"
        tool("mknod", node, "b", *map(str, loop.number))
        os.symlink(loop.path, link)
        with shell(f"exec 3< {node}; rm {node}") as process:
            assert [user.pid for user in users(loop.number)] == [process.pid]
        with shell(f"exec 3< {link}") as process:
            assert [user.pid for user in users(loop.number)] == [process.pid]


def test_an_opener_within_a_namespace(tmp_path, loop):
    """A node in a file system that only another mount namespace has is recognised as well."""
    script = f"mount -t tmpfs none {tmp_path}; mknod {tmp_path}/x b {loop.number.major} {loop.number.minor}"
    with in_own_namespace(f"{script}; exec 3< {tmp_path}/x") as process:
        assert [(user.kind, user.pid) for user in users(loop.number)] == [("opener", process.pid)]


def test_this_process_is_an_opener_too(loop):
    """A descriptor of one's own is a user like any other."""
    descriptor = os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        (user,) = users(loop.number)
        with open("/proc/self/comm", encoding="utf-8") as comm:
            assert str(user) == f"open in pid {os.getpid()} ({comm.read().rstrip()})"
    finally:
        os.close(descriptor)
    assert users(loop.number) == []


def test_swap(loop):
    """A device that the kernel swaps to says so."""
    tool("mkswap", loop.path)
    tool("swapon", loop.path)
    try:
        assert users(loop.number) == [User("swap", loop.path, loop.number)]
        assert texts(loop.number) == [f"used as swap ({loop.path})"]
    finally:
        tool("swapoff", loop.path)
    assert users(loop.number) == []


def test_a_mapped_device_on_top(loop):
    """A mapped device holds what its table names, under the name people gave it."""
    with linear(loop.number, "test usage") as above:
        assert users(loop.number) == [User("holder", "test usage", above)]
        assert texts(loop.number) == [f"held by device test usage ({above})"]
        assert stacked_on(loop.number) == [above]
        assert users(above) == []


def test_devices_on_top_of_each_other(tmp_path, ext4):
    """stacked_on goes all the way up, each device once; the users of the lower device are the devices next to it."""
    with (
        linear(ext4.number, "test-usage-left") as left,
        linear(ext4.number, "test-usage-right") as right,
        linear(left, "test-usage-top") as top,
    ):
        assert stacked_on(ext4.number)[-1] == top
        assert sorted(stacked_on(ext4.number)) == sorted([left, right, top])
        assert stacked_on(left) == [top]
        assert stacked_on(top) == []
        with mounted("/dev/mapper/test-usage-top", tmp_path / "mnt") as directory:
            assert texts(top) == [f"mounted on {directory}"]
            assert mount_points(ext4.number) == []
            assert texts(ext4.number) == [
                f"held by device test-usage-left ({left})",
                f"held by device test-usage-right ({right})",
            ]


def test_a_loop_device_over_the_node(loop):
    """A loop device over a block device's node is on top of it, although sysfs calls it no holder."""
    with LoopDevice.temporary(loop.path) as above:
        assert texts(loop.number) == [f"held by device {os.path.basename(above.path)} ({above.number})"]
        assert stacked_on(loop.number) == [above.number]
    assert stacked_on(loop.number) == []


def test_partitions(tmp_path):
    """What uses a partition keeps the whole device busy."""
    path = tmp_path / "disk"
    create_sparse_file(path, MiB(20))
    node = tool("losetup", "--partscan", "--find", "--show", path)
    try:
        tool("addpart", node, "1", "2048", "32768")
        whole, part = (DeviceNumber.from_dev(os.stat(name).st_rdev) for name in (node, f"{node}p1"))
        tool("mkfs.ext4", "-q", f"{node}p1")
        with mounted(f"{node}p1", tmp_path / "mnt") as directory:
            assert users(whole) == users(part) == [User("mount", directory, part)]
            assert stacked_on(whole) == [part]
            assert mount_points(whole) == []
            assert [place.path for place in mount_points(part)] == [directory]
    finally:
        tool("losetup", "-d", node)


def test_all_kinds_at_once(tmp_path, loop):
    """Holder, mount, swap and opener appear together, in this order."""
    with (
        linear(loop.number, "test-usage-swap", 8192) as above,
        mounted(loop, tmp_path / "mnt", "-t", "tmpfs"),
        shell(f"exec 3< {loop.path}"),
    ):
        assert kinds(loop.number) == ["holder", "mount", "opener"]
        tool("mkswap", "/dev/mapper/test-usage-swap")
        tool("swapon", "/dev/mapper/test-usage-swap")
        assert kinds(above) == ["swap"]
        tool("swapoff", "/dev/mapper/test-usage-swap")


# -- what is in the way of looking


def test_processes_that_come_and_go(loop):
    """Looking while processes start and end is no error, and the lasting user is seen every time."""
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            subprocess.run(["true"], check=True)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    with shell(f"exec 3< {loop.path}") as process:
        for thread in threads:
            thread.start()
        try:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                assert process.pid in [user.pid for user in users(loop.number)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_without_root(tmp_path, ext4):
    """An ordinary user sees the mounts of the own namespace and the holders; what may not be read is passed over."""
    with (
        mounted(ext4, tmp_path / "mnt") as directory,
        shell(f"exec 3< {ext4.path}") as process,
    ):
        assert kinds(ext4.number) == ["mount", "opener"]
        os.seteuid(NOBODY)
        try:
            seen = users(ext4.number)
        finally:
            os.seteuid(0)
        assert [user.name for user in seen if user.kind == "mount"] == [directory]
        assert process.pid not in [user.pid for user in seen]


LOOK = """
import sys
from dmlib.ids import DeviceNumber
from dmlib.usage import mount_points, stacked_on, users_of
number = DeviceNumber.parse(sys.argv[1])
print(users_of(number), stacked_on(number), mount_points(number))
"""


@pytest.mark.parametrize("directory", ["/proc", "/sys"])
def test_without_proc_or_sys(loop, directory):
    """Where /proc or /sys is not mounted, what it would tell is missing, and nothing else."""
    script = f'mount -t tmpfs none {directory}; exec "$0" -c "$@"'
    with linear(loop.number, "test-usage-dark") as above, shell(f"exec 3< {loop.path}") as process:
        output = tool("unshare", "-m", "sh", "-e", "-c", script, sys.executable, LOOK, str(loop.number))
    if directory == "/proc":
        holder = User("holder", "test-usage-dark", above)
        assert output == f"{[holder]} {[above]} []"
    else:
        opener = User("opener", "sh", loop.number, process.pid, "sh")
        assert output == f"{[opener]} [] []"


def test_files_that_may_hang_are_not_looked_at():
    """A file of a network file system is told by the mount that it is really on."""
    number = DeviceNumber(0, 1)
    mounts = [
        usage._Mount(index, number, "/", point, fs_type, "source")
        for index, (point, fs_type) in enumerate(
            [("/", "9p"), ("/dev", "devtmpfs"), ("/srv", "nfs4"), ("/srv/disk", "ext4"), ("/home", "fuse.sshfs")]
        )
    ]
    hanging = {path: usage._may_hang(path, mounts) for path in ("/x", "/dev/dm-0", "/srv/a", "/srv/disk/a", "/home/a")}
    assert hanging == {"/x": True, "/dev/dm-0": False, "/srv/a": True, "/srv/disk/a": False, "/home/a": True}
    assert not usage._may_hang("/anything", [])


def test_descriptors_are_closed(tmp_path, ext4):
    """Looking leaves no descriptor open, also when a mount point cannot be entered."""
    with tempfile.TemporaryDirectory() as hidden, mounted(ext4, tmp_path / "mnt"), mounted(ext4, hidden):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            users(ext4.number)
            assert len(mount_points(ext4.number)) == 2
        assert len(os.listdir("/proc/self/fd")) == before
