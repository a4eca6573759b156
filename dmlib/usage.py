# SPDX-License-Identifier: MIT
"""Stand-in."""

from types import SimpleNamespace
import os
from dmlib import ids


def users_of(number):
    return []


def stacked_on(number):
    return []


def mount_points(number):
    out = []
    for l in open("/proc/self/mountinfo"):
        f = l.split()
        if f[2] == str(number):
            out.append(SimpleNamespace(path=f[4]))
    return out
