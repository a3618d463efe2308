"""Imports Gradio in two thirds of the time: the app should open in seconds.

For each of its components Gradio parses its own source and renews a stub for editors beside it. An app has no use for
that, and in a read-only installation it could not be written either. Gradio skips it for a class that has no file.
"""

import gc
import inspect
import sys
from typing import Any
from unittest import mock

__all__ = ["import_gradio"]


def import_gradio() -> None:
    """Imports it, unless that was done before."""
    if "gradio" in sys.modules:
        return
    getfile = inspect.getfile

    def no_file_for_stubs(thing: Any) -> str:
        if sys._getframe(1).f_globals.get("__name__") == "gradio.component_meta":
            raise OSError
        return getfile(thing)

    collecting = gc.isenabled()
    gc.disable()  # nothing that an import makes is garbage; looking for some takes a tenth of the time
    try:
        with mock.patch.object(inspect, "getfile", no_file_for_stubs):
            import gradio  # noqa: F401
    finally:
        if collecting:
            gc.enable()
