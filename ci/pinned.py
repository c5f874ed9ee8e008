"""Prints NAME==VERSION of the packages that are named, as they are installed where this runs.

python ci/pinned.py NAME ...
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def main() -> None:
    """A package that is not installed is printed without a version."""
    for name in sys.argv[1:]:
        try:
            print(f"{name}=={version(name)}")
        except PackageNotFoundError:
            print(name)


if __name__ == "__main__":
    main()
