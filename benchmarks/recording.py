"""What a file of results says beside its numbers: versions, device, commit."""

import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "circumstances", "rounded"]

RESULTS = Path(__file__).parent / "results"


def circumstances(threads: int) -> dict[str, Any]:
    """Versions, the device that computes and the commit.

    Arguments:
        threads: of a process, where it computes on the CPU.
    """
    import torch

    from bilora_diffusion.finishing import package_versions

    cpu = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "versions": package_versions() | {"cuda": torch.version.cuda},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "commit": _commit(),
    }


def rounded(value: Any) -> Any:
    """Six digits are more than the measurements carry; the files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
