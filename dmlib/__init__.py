# SPDX-License-Identifier: MIT
"""Device mapper for Python: typed, exception-raising, udev-correct."""

__version__ = "0.1.0.dev0"
