"""The command line of the app, checked before anything heavy is imported."""

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bilora_diffusion.embedded import EMBEDDED
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import nearest
from bilora_diffusion.model_names import existing_path

__all__ = ["AUTH_VARIABLE", "Options", "parse"]

AUTH_VARIABLE = "BILORA_APP_AUTH"
DEFAULT_PORT = 7860


@dataclass(frozen=True)
class Options:
    """Attributes:
    bases: the bases to choose from, the first is the default.
    lora_dirs: folders whose LoRA files are offered.
    runs_dir: folder of training runs; its LoRA files are offered too.
    clip: a CLIP for the numbers of Compare on other bases than the embedded one.
    auth: user and password, None for none.
    training: whether runs may be started and stopped from the app.
    """

    bases: tuple[str, ...] = (EMBEDDED,)
    lora_dirs: tuple[Path, ...] = (Path("outputs"),)
    runs_dir: Path = Path("outputs")
    clip: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = field(default=None, repr=False)
    training: bool = True


def parse(argv: Sequence[str] | None = None) -> Options:
    """Raises:
    UserError: in one line.
    SystemExit: after `--help`, or for words that argparse refuses.
    """
    given = _parser().parse_args(argv)
    auth = _auth(given.auth or os.environ.get(AUTH_VARIABLE))
    public = given.share or not _is_loopback(given.host)
    if public and auth is None:
        asked = "--share" if given.share else f"--host {given.host}"
        raise UserError(
            f"{asked} opens the app to others: give --auth USER:PASSWORD (or set {AUTH_VARIABLE}), or leave {asked} out"
        )
    if given.port is not None and not 0 < given.port < 65536:
        raise UserError(f"--port is {given.port}: it must be an integer in [1, 65535]")
    for folder in given.lora_dir or ():
        if not Path(folder).is_dir():
            raise UserError(f"--lora_dir {folder} is no folder: check the path")
    for base in given.base or ():
        _check_base(base)
    return Options(
        bases=tuple(dict.fromkeys(given.base or (EMBEDDED,))),
        lora_dirs=tuple(Path(folder) for folder in given.lora_dir or ("outputs",)),
        runs_dir=_folder(given.runs_dir),
        clip=given.clip,
        host=given.host,
        port=given.port,
        share=given.share,
        auth=auth,
        training=not public or given.allow_training,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m app", description="Generate with LoRAs, compare Bi-LoRA with plain LoRA, watch training runs."
    )
    parser.add_argument(
        "--base",
        action="append",
        help="hub id, folder, .safetensors checkpoint or built-in name; may be given several times [default: embedded]",
    )
    parser.add_argument("--lora_dir", action="append", help="folder of LoRA files; several times [default: outputs]")
    parser.add_argument("--runs_dir", default="outputs", help="folder of training runs [default: outputs]")
    parser.add_argument("--clip", help="a CLIP, folder or hub id, for the numbers of Compare on other bases")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [default: 127.0.0.1]")
    parser.add_argument("--port", type=int, help=f"[default: {DEFAULT_PORT}, or the next one that is free]")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's relay; needs --auth")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", help=f"ask for it; better in the environment as {AUTH_VARIABLE}"
    )
    parser.add_argument(
        "--allow_training", action="store_true", help="start and stop runs also where others can reach the app"
    )
    return parser


def _check_base(name: str) -> None:
    """A mistyped path or built-in name; whether the hub has a model only a download can tell."""
    on_disk = existing_path(name, "--base") is not None
    if not on_disk and "/" not in name and name != EMBEDDED and nearest(name, [EMBEDDED]):
        raise UserError(f"--base {name}: did you mean {EMBEDDED}? A model on the hub is owner/name")


def _folder(text: str) -> Path:
    """`--runs_dir`, which need not be there yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise UserError(f"--runs_dir {path} is no folder: name the folder of the training runs")
    return path


def _auth(text: str | None) -> tuple[str, str] | None:
    if not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UserError("--auth must be USER:PASSWORD, neither of them empty")
    return user, password


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
