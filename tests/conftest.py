"""Set-up for all tests: no network, one thread, and no test that changes the global random state for the next."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any of the libraries is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests state what a CPU promises: bit for bit equality, forked ranks. Also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"

import gc
from collections.abc import Iterator

import pytest
import tiny_run
import torch
from diffusers import StableDiffusionXLPipeline

from bilora_diffusion.bases.tiny import build_tiny_random


def pytest_sessionstart() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """What a module's tests have imported need not be walked each time that `assemble` frees memory: a million
    objects with the libraries, as many again with the app's."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_random_state() -> Iterator[None]:
    """Every test starts from the same global random numbers, whichever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny() -> StableDiffusionXLPipeline:
    """The tiny base in float32, frozen. Shared: whoever changes a part takes a deep copy."""
    pipeline = build_tiny_random()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).requires_grad_(False)
    return pipeline


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> tiny_run.Builder:
    """Builds a run on the tiny base from flags, by `assemble`, as `train` does. See `tiny_run.TinyRun`."""
    return tiny_run.Builder(*tiny_run.write_both(tmp_path_factory.mktemp("tiny_run")))
