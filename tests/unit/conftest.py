# SPDX-License-Identifier: MIT
"""Settings of the pure tests."""

from hypothesis import settings

# No deadline: a guest kernel may stop for longer than any. No database: the tree may be read-only.
settings.register_profile("dmlib", deadline=None, database=None, print_blob=True)
settings.load_profile("dmlib")
