"""A step waits for its device once: to hear whether its loss and gradients are finite."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import tiny_run
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bilora_diffusion.method_names import METHOD_NAMES
from bilora_diffusion.processes import on_host

WAITING = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select")
"""What `.item()`, `float()`, `if tensor:`, boolean indexing and `torch.equal` are made of."""


class Waits(TorchDispatchMode):
    """Counts them. `tolist()` of a vector on the CPU is none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", [float, bool, torch.Tensor.item, lambda x: x[x > 0], lambda x: torch.equal(x, x)])
def test_waiting_is_seen(how):
    with Waits() as waits:
        how(torch.ones(()))
    assert waits.seen


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_no_method_asks_its_tensors_anything(build, method):
    """All but the one `tolist` of the step would be seen."""
    run = build(method, looksam_every=2, train_batch_size=1)
    for number in range(2):
        micro_batches = run.micro_batches(number)  # its rows are drawn on the host
        with Waits() as waits:
            assert run.parts.trainer.training_step(micro_batches, number).applied
        assert not waits.seen


def test_measures_are_read_as_they_are():
    values = {"one": torch.tensor(0.1, dtype=torch.float64), "other": torch.tensor(3)}
    assert on_host(values) == {"one": 0.1, "other": 3.0}
    assert on_host({}) == {}


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="needs a CUDA GPU")
def test_a_step_waits_for_a_gpu_once(tmp_path: Path):
    """In a process of its own: this one has hidden the GPU from itself."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    told = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    counts = json.loads(told.stdout.splitlines()[-1])
    assert counts == dict.fromkeys(METHOD_NAMES, 1)


def count_on_gpu() -> dict[str, int]:
    """How often one step of each method waits for the GPU, by torch's own count."""
    device = torch.device("cuda")
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        build = tiny_run.Builder(*tiny_run.write_both(Path(folder)))
        for method in METHOD_NAMES:
            run = build(method, "bf16", device=device)
            for number in range(2):
                run.step(number)
            micro_batches = run.micro_batches(2)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run.parts.trainer.training_step(micro_batches, 2)
            torch.cuda.set_sync_debug_mode("default")
            counts[method] = sum("called a synchronizing" in str(one.message) for one in caught)
    return counts


if __name__ == "__main__":
    print(json.dumps(count_on_gpu()))
