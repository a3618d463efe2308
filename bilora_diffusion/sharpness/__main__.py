"""python -m bilora_diffusion.sharpness LORA.safetensors --base BASE --data FOLDER

Measures how sharp the loss is around a LoRA, in the space of its factors and in that of the merged weights: along
random directions, along the gradient, the Hessian's top eigenvalue, and how much of the gradient has rank r.
Writes sharpness.json and plots. Nothing is trained and the file is not changed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bilora_diffusion.commands import exit_code
from bilora_diffusion.data.folders import check_folder
from bilora_diffusion.errors import UserError
from bilora_diffusion.sharpness.plots import SPACES

__all__ = ["main"]

RANDOM_SIZES = (-1.0, -0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
WORST_SIZES = (0.005, 0.01, 0.02, 0.05, 0.1)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for a mistake of the user's, told in one line; 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)

    def work() -> None:
        _check(arguments)
        for line in _measure(arguments):
            print(line)

    return exit_code(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bilora_diffusion.sharpness",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lora", type=Path, help="a LoRA file in diffusers or Kohya format")
    parser.add_argument(
        "--base", default="embedded", help="the SDXL base it belongs to: hub id, folder, file, embedded"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures, with captions beside them")
    parser.add_argument("--instance_prompt", help="for pictures without a caption")
    parser.add_argument("--resolution", type=int, help="side in pixels; unset: the base's own")
    parser.add_argument(
        "--draws", type=int, default=64, help="of picture, timestep and noise, the same for every point"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="draws computed at once")
    parser.add_argument("--directions", type=int, default=3, help="random directions")
    parser.add_argument("--power_steps", type=int, default=10, help="of the power iteration; 0 = no eigenvalue")
    parser.add_argument("--space", choices=("lora", "full", "both"), default="both")
    parser.add_argument("--run", type=Path, help="the run's folder: also how its weights turned, from its checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, mps; unset: the GPU if there is one")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sharpness"))
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="only the JSON file")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """What can be told before torch is imported."""
    if arguments.lora.suffix != ".safetensors":
        raise UserError(f"{arguments.lora}: only .safetensors files are read, never pickles")
    if not arguments.lora.is_file():
        raise UserError(f"{arguments.lora}: no such file")
    check_folder(arguments.data, "--data")
    for name, least in (("draws", 1), ("batch_size", 1), ("directions", 1), ("power_steps", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} is {getattr(arguments, name)}: give {least} or more")
    if arguments.plots:
        from bilora_diffusion.sharpness.plots import need_matplotlib

        need_matplotlib(way_out=", or give --no-plots")


def _measure(arguments: argparse.Namespace) -> list[object]:
    """Returns the lines to print: the numbers in short, and the written files."""
    import torch
    from tqdm.auto import tqdm

    from bilora_diffusion.atomic import write_text_atomically
    from bilora_diffusion.bases import Base
    from bilora_diffusion.finishing import package_versions
    from bilora_diffusion.sharpness import measures
    from bilora_diffusion.sharpness.course import cosines_to_the_last
    from bilora_diffusion.sharpness.plots import draw
    from bilora_diffusion.sharpness.setting import load_scene
    from bilora_diffusion.strict_json import strict_json

    course = cosines_to_the_last(arguments.run) if arguments.run else None
    base = Base(arguments.base)
    scene = load_scene(
        arguments.lora,
        base,
        arguments.data,
        instance_prompt=arguments.instance_prompt,
        resolution=arguments.resolution,
        draws=arguments.draws,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")),
    )
    spaces = ("lora", "full") if arguments.space == "both" else (arguments.space,)
    report: dict = {
        "file": arguments.lora.name,
        "base": base.shared_name,
        "draws": arguments.draws,
        "seed": arguments.seed,
        "layers": scene.layers,
        "versions": package_versions(),
    }
    total = len(spaces) * (arguments.directions + 1 + arguments.power_steps + 1)
    with tqdm(total=total, desc="sharpness") as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(1)

        for space in spaces:
            landscape = getattr(scene, space)()
            report.setdefault("loss", landscape.loss())
            found = {
                "random": measures.along_random(landscape, RANDOM_SIZES, arguments.directions, arguments.seed, say),
                "worst_case": measures.worst_case(landscape, WORST_SIZES, say),
            }
            if arguments.power_steps:
                found["hessian"] = measures.top_eigenvalue(landscape, arguments.power_steps, arguments.seed, say)
            if space == "full":
                found["gradient"] = measures.ky_fan(landscape, scene.rank)
            say(space)
            report[space] = found
    if course is not None:
        report["course"] = course
    path = arguments.output_dir / "sharpness.json"
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {arguments.output_dir} cannot be used as a folder: {error.strerror}") from error
    write_text_atomically(path, strict_json(report))
    return [*_in_short(report), path, *(draw(report, arguments.output_dir) if arguments.plots else [])]


def _in_short(report: dict) -> list[str]:
    lines = [f"loss {report['loss']:.5f}, the mean of {report['draws']} draws"]
    for space, name in SPACES.items():
        if space not in report:
            continue
        found, loss = report[space], report["loss"]
        random, worst = found["random"], found["worst_case"]
        told = [
            f"{random['mean'][RANDOM_SIZES.index(0.25)] / loss - 1:+.1%} at size 0.25 of random directions",
            f"{worst['losses'][WORST_SIZES.index(0.01)] / loss - 1:+.1%} after 1% of the norm along the gradient",
        ]
        if "hessian" in found:
            told.append(f"top Hessian eigenvalue {found['hessian']['eigenvalue']:.3g}")
        if "gradient" in found:
            told.append(f"{found['gradient']['share']:.0%} of the gradient has rank {found['gradient']['rank']}")
        lines.append(f"{name}: {'; '.join(told)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
