"""`python -m app`: opens the app; `--help` lists what it can be told."""

import os
import signal
import sys
from collections.abc import Sequence

from app.options import DEFAULT_PORT, Options, parse
from app.quick_import import import_gradio
from bilora_diffusion.errors import UserError

__all__ = ["launch", "main"]

MOST_UPLOAD = "2gb"


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C. Returns 0, or 2 for a mistake of the user's, told in one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that its temporary folder goes with it
    try:
        options = parse(argv)
        blocks = launch(options)
    except UserError as error:
        error.tell()
        return 2
    blocks.block_thread()
    return 0


def launch(options: Options):
    """Opens the app and returns its `gr.Blocks`, which `close()` ends.

    Raises:
        UserError: gradio is not installed, or the port is taken.
    """
    from app.services import Services

    services = Services(options)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # Gradio's own copies of pictures and uploads: they go with the app, which Gradio alone would not see to.
    os.environ["GRADIO_TEMP_DIR"] = str(services.folder / "gradio")
    try:
        import_gradio()
        from app.build import build
        from app.look import CSS, HEAD, theme
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('gradio is missing: install it with `pip install "bilora-diffusion[app]"`') from None
    blocks = build(services)
    try:
        _, url, shared = blocks.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=options.auth,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=MOST_UPLOAD,
            footer_links=[],
            theme=theme(),
            css=CSS,
            head=HEAD,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
        )
    except OSError as error:
        port = options.port or DEFAULT_PORT
        raise UserError(f"--port {port}: nothing can listen there ({error}); name another") from None
    print(shared or url, flush=True)
    services.warm_up()
    return blocks


if __name__ == "__main__":
    sys.exit(main())
