"""The command: `train_dreambooth_bilora.py`, and `train-dreambooth-bilora` where the package is installed."""

import os
import sys
from collections.abc import Sequence

from bilora_diffusion.errors import UserError

__all__ = ["main"]

INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a training from the command line's words (`sys.argv` if None).

    Returns:
        0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C.
    """
    from bilora_diffusion import command_line

    try:
        config = command_line.parse(argv)
        if config.instance_data_dir is not None:
            from bilora_diffusion.data.folders import check_folder

            check_folder(config.instance_data_dir, "--instance_data_dir")
        from bilora_diffusion.run import (
            train,  # torch and diffusers: not before the flags are known to be right
        )

        return INTERRUPTED if train(config).interrupted else 0
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once a process
            error.tell()
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
