"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# No test depends on speed, and a failure in CI is the failure of whoever runs it next.
settings.register_profile("enginery", deadline=None, derandomize=True, database=None)
settings.load_profile("enginery")
