"""bitsandbytes and torchao for the tests that need them, which `make setup` installs beside the other packages."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "quantised"
NEEDED = "BILORA_TESTS_NEED_QUANTISERS"


def add_quantisers() -> None:
    """Makes them importable; skips the tests where they are not, or fails there if they are meant to be."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    missing = [name for name in ("bitsandbytes", "torchao") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get(NEEDED):
        pytest.fail(f"{NEEDED} is set and there is no {' and no '.join(missing)}: make setup installs them")
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: make setup installs them")
