"""bitsandbytes and torchao for the tests that need them, which `make setup` installs beside the other packages."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "quantised"


def add_quantisers() -> None:
    """Makes them importable; the test fails where they are not."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    missing = [name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.fail(f"there is no {' and no '.join(missing)}: make setup installs them in {FOLDER}")
