# SPDX-License-Identifier: MIT
"""Device mapper for Python: typed, exception-raising, udev-correct."""
