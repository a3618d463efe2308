"""The host asks for a step without waiting for its device: what is not finite is found, and left out, there."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny_run
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bilora_diffusion.method_names import METHOD_NAMES
from bilora_diffusion.processes import Reading

WAITING = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select")
"""What `.item()`, `float()`, `if tensor:`, boolean indexing and `torch.equal` are made of."""


class Waits(TorchDispatchMode):
    """Counts them, and `tolist()`, which on a CPU is no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __enter__(self):
        listed = torch.Tensor.tolist
        self._patch = mock.patch.object(torch.Tensor, "tolist", lambda x: self.seen.append("tolist") or listed(x))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "how", [float, bool, torch.Tensor.item, lambda x: x.tolist(), lambda x: x[x > 0], lambda x: torch.equal(x, x)]
)
def test_waiting_is_seen(how):
    with Waits() as waits:
        how(torch.ones(()))
    assert waits.seen


@pytest.mark.parametrize(
    ("method", "ascent"), [*((method, "adamw") for method in METHOD_NAMES), ("bilora", "sgd"), ("bilora", "normalized")]
)
def test_no_method_asks_its_tensors_anything(build, method, ascent):
    run = build(method, ascent=ascent, looksam_every=2, train_batch_size=1)
    for number in range(2):
        micro_batches = run.micro_batches(number)  # its rows are drawn on the host
        with Waits() as waits:
            step = run.parts.trainer.begin_step(micro_batches, number)
        assert not waits.seen
        with Waits() as waits:
            assert step.result().applied
        assert waits.seen == ["tolist"]


@pytest.mark.parametrize("flags", [{"optimizer": "adafactor"}, {"optimizer": "prodigy"}])
def test_other_optimisers_are_waited_for_and_skip_what_is_not_finite(build, flags):
    run = build("lora", **flags)
    run.step(0)
    before = run.tensors()
    (batch,) = run.batches(1)
    micro_batches = run.parts.trainer.micro_batches([replace(batch, latents=batch.latents * float("nan"))])
    with Waits() as waits:
        step = run.parts.trainer.begin_step(micro_batches, 1)
    assert waits.seen and not step.result().applied
    assert tiny_run.all_equal(before, run.tensors())
    assert run.step(2).applied and not tiny_run.all_equal(before, run.tensors())


def test_measures_are_read_as_they_are():
    values = {"one": torch.tensor(0.1, dtype=torch.float64), "other": torch.tensor(3)}
    assert Reading(values).numbers() == {"one": 0.1, "other": 3.0}


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="needs a CUDA GPU")
def test_no_step_waits_for_a_gpu(tmp_path: Path):
    """In a process of its own: this one has hidden the GPU from itself."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    told = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    counts = json.loads(told.stdout.splitlines()[-1])
    assert counts == dict.fromkeys(METHOD_NAMES, 0)


def count_on_gpu() -> dict[str, int]:
    """How often one step of each method, its batch included, waits for the GPU, by torch's own count."""
    device = torch.device("cuda")
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        build = tiny_run.Builder(*tiny_run.write_both(Path(folder)))
        for method in METHOD_NAMES:
            run = build(method, "bf16", device=device)
            for number in range(2):
                run.step(number)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step = run.parts.trainer.begin_step(run.micro_batches(2), 2)
            torch.cuda.set_sync_debug_mode("default")
            assert step.result().applied
            counts[method] = sum("called a synchronizing" in str(one.message) for one in caught)
    return counts


if __name__ == "__main__":
    print(json.dumps(count_on_gpu()))
