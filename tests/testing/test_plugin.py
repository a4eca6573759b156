# SPDX-License-Identifier: MIT
"""The pytest plugin as an outsider's suite meets it: an ordinary session, with tests that ran in real guests."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

PATIENCE = 120


class Suite:
    """A project of somebody else, with temporary files in a folder of its own, which tells its guests from others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "t"
        self.temporary.mkdir()
        self.tests = folder / "project"
        self.tests.mkdir()
        (self.tests / "pytest.ini").write_text("[pytest]\n", encoding="ascii")

    def write(self, text: str, name: str = "test_it.py") -> None:
        (self.tests / name).write_text("import dmlib, os, pytest\n" + textwrap.dedent(text), encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=../r.xml", "-rA", *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.temporary), "PYTHONDONTWRITEBYTECODE": "1", **more}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.tests, env=self.environment(**env), capture_output=True, text=True,
            check=False, timeout=PATIENCE,
        )  # fmt: skip

    def outcomes(self) -> dict[str, str]:
        """What became of each test, from the report that pytest writes for other programs."""
        outcomes = {}
        for case in ET.parse(self.folder / "r.xml").iter("testcase"):  # noqa: S314 - our own pytest wrote it
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[case.get("name", "")] = kinds[0] if kinds else "passed"
        return outcomes

    def processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if str(self.temporary) in line:
                    found.append(line)
        return found


@pytest.fixture
def suite():
    folder = Path(tempfile.mkdtemp(prefix="dmlib-p-"))
    made = Suite(folder)
    yield made
    deadline = time.monotonic() + 10
    while made.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert made.processes() == []
    assert list(made.temporary.iterdir()) == []
    shutil.rmtree(folder)


MIXED = """
    needs = pytest.mark.needs_device_mapper

    @needs
    def test_writes(thin_device):
        assert os.geteuid() == 0
        with open(thin_device.path, "r+b") as file:
            file.write(bytes(4096))

    @needs
    def test_fails(linear_device):
        print("said in the guest")
        assert linear_device.info().open_count == 7

    @needs
    def test_leaks():
        dmlib.Device.create("leaky", dmlib.Table.single(dmlib.MiB(1), dmlib.Zero()))

    @needs
    def test_sees_no_leak():
        assert dmlib.list_devices() == []

    @needs(targets=["linear", "no-such-target"])
    def test_lacks_a_target():
        pass

    @needs(driver=(9, 0))
    def test_lacks_a_driver():
        pass

    @needs
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_panics_in_the_middle(number):
        if number == 2:
            with open("/proc/sysrq-trigger", "w") as file:
                file.write("c")

    def test_stays_here():
        with pytest.raises(dmlib.DriverUnavailableError):
            dmlib.list_devices()
"""


def test_a_session_with_everything(suite):
    """Tests pass, fail, leak, are skipped and take their guest down, and the session tells each as if it were here."""
    suite.write(MIXED)
    done = suite.run("--dm-run=uml")
    assert suite.outcomes() == {
        "test_stays_here": "passed",
        "test_writes": "passed",
        "test_fails": "failure",
        "test_leaks": "error",
        "test_sees_no_leak": "passed",
        "test_lacks_a_target": "skipped",
        "test_lacks_a_driver": "skipped",
        "test_panics_in_the_middle[1]": "passed",
        "test_panics_in_the_middle[2]": "failure",
        "test_panics_in_the_middle[3]": "passed",
    }
    assert done.returncode == 1
    assert done.stderr == ""
    for text in (
        "assert 0 == 7",  # the traceback of the guest, with values
        "said in the guest",
        "left behind: {'devices': ['leaky'], 'nodes': ['leaky']}",
        "the kernel has no target no-such-target",
        "driver 9.0 is needed, and this is 4.",
        "the guest ended while this test ran: The guest (uml) died",
        "sysrq triggered crash",
    ):
        assert text in done.stdout
    assert re.search(r"2 failed, 6 passed, 2 skipped, 1 error in", done.stdout)


def test_strict(suite):
    """With --dm-strict, what the kernel lacks is a failure."""
    suite.write(MIXED)
    done = suite.run("--dm-run=uml", "--dm-strict", "-k", "lacks")
    assert suite.outcomes() == {"test_lacks_a_target": "error", "test_lacks_a_driver": "error"}
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "outcome", "status"),
    [
        ([], "skipped", 0),
        (["--dm-strict"], "error", 1),
        (["--dm-run=qemu"], "skipped", 0),
        (["--dm-run=direct"], "skipped", 0),
    ],
)
def test_a_machine_that_lacks_everything(suite, arguments, outcome, status):
    """Where there is no way to a device mapper, tests are skipped with the packages to install, or fail if strict."""
    suite.write("@pytest.mark.needs_device_mapper\ndef test_it(): pass\ndef test_other(): pass\n")
    done = suite.run(*arguments, PATH="/nowhere")
    assert suite.outcomes() == {"test_it": outcome, "test_other": "passed"}
    assert done.returncode == status
    reason = {"--dm-run=qemu": "qemu-system-x86", "--dm-run=direct": "driver"}.get(
        "".join(arguments), "user-mode-linux"
    )
    assert reason in done.stdout


def test_options_and_warnings_cross_over(suite):
    """An option of the project's own reaches the guest; a warning there is shown here; -x stops."""
    suite.write(
        """
        def pytest_addoption(parser):
            parser.addoption("--flavour")

        @pytest.fixture
        def flavour(request):
            return request.config.getoption("flavour")
        """,
        "conftest.py",
    )
    suite.write(
        """
        import warnings
        pytestmark = pytest.mark.needs_device_mapper

        def test_flavour(flavour):
            warnings.warn("watch out in the guest")
            assert flavour == "salty"

        def test_stops():
            assert False

        def test_not_reached():
            pass
        """
    )
    done = suite.run("--dm-run=uml", "--flavour=salty", "-x")
    assert suite.outcomes() == {"test_flavour": "passed", "test_stops": "failure"}
    assert "UserWarning: watch out in the guest" in done.stdout
    assert "stopping after 1 failures" in done.stdout


def test_ctrl_c(suite):
    """Ctrl-C ends the session at once, with what was known, and leaves no guest."""
    suite.write(
        """
        import time
        pytestmark = pytest.mark.needs_device_mapper

        def test_passes():
            pass

        def test_hangs():
            time.sleep(100)
        """
    )
    process = subprocess.Popen(
        suite.command("--dm-run=uml", "-v"), cwd=suite.tests, env=suite.environment(), stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "test_passes PASSED" in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "KeyboardInterrupt" in rest
    assert "1 passed" in rest


def test_a_session_that_is_killed(suite):
    """A pytest that is killed leaves no guest either; its folder with the orders is all that stays."""
    suite.write(
        """
        import time

        @pytest.mark.needs_device_mapper
        def test_hangs():
            open("out/hanging", "w").close()
            time.sleep(100)
        """
    )
    (suite.tests / "out").mkdir()
    command = suite.command("--dm-run=uml", f"--dm-writable={suite.tests / 'out'}")
    process = subprocess.Popen(command, cwd=suite.tests, env=suite.environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (suite.tests / "out" / "hanging").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while suite.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert suite.processes() == []
    for folder in suite.temporary.glob("dmlib-orders-*"):
        shutil.rmtree(folder)


def test_time_limit(suite):
    """A guest that takes too long is ended: the test that ran fails, those after it get another guest."""
    suite.write(
        """
        import time
        pytestmark = pytest.mark.needs_device_mapper

        def test_hangs():
            time.sleep(100)

        def test_after():
            pass
        """
    )
    done = suite.run("--dm-run=uml", "--dm-timeout=8")
    assert suite.outcomes() == {"test_hangs": "failure", "test_after": "passed"}
    assert "did not end within 8 seconds" in done.stdout


def test_only_what_is_marked_boots_a_guest(suite):
    """A suite without marked tests runs as if the plugin were not there, and so does collection."""
    suite.write("def test_it(): pass\n")
    begin = time.monotonic()
    assert suite.run().returncode == 0
    suite.write("@pytest.mark.needs_device_mapper(targets=['linear'])\ndef test_it(): pass\n")
    assert "1 test collected" in suite.run("--collect-only", "-q").stdout
    assert time.monotonic() - begin < 15
