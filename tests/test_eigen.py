"""Jacobi's method against LAPACK's, without a wait."""

import pytest
import torch
from test_waiting import Waits

from bilora_diffusion.methods.eigen import eigh_of_all, jacobi

SIZES = [1, 2, 3, 5, 8, 12, 20, 32]


def symmetric(kind: str, size: int, count: int = 7) -> torch.Tensor:
    draw = torch.Generator().manual_seed(size)
    square = torch.randn(count, size, size, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(square)[0]
    values = {
        "any": torch.randn(count, size, generator=draw, dtype=torch.float64),
        "graded": 10.0 ** -torch.arange(size, dtype=torch.float64).expand(count, size),
        "of low rank": (torch.arange(size) < 2).double().expand(count, size),
        "equal": torch.full((count, size), 3.0, dtype=torch.float64),
        "zero": torch.zeros(count, size, dtype=torch.float64),
        "diagonal": torch.ones(count, size, dtype=torch.float64),
    }[kind]
    if kind == "diagonal":
        return torch.diag_embed(torch.randn(count, size, generator=draw, dtype=torch.float64))
    found = basis @ torch.diag_embed(values) @ basis.mT
    return (found + found.mT) / 2


@pytest.mark.parametrize("kind", ["any", "graded", "of low rank", "equal", "zero", "diagonal"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_lapacks(kind: str, size: int):
    matrices = symmetric(kind, size)
    values, vectors = jacobi(matrices)
    most = 1e-8 if kind == "graded" and size > 12 else 1e-12
    assert (values - torch.linalg.eigvalsh(matrices)).abs().max() < most
    assert (values.diff(dim=1) >= 0).all()
    eye = torch.eye(size, dtype=torch.float64)
    assert (vectors.mT @ vectors - eye).abs().max() < 1e-12
    assert (vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs().max() < most


def test_float32_is_as_good_as_it_can_be():
    matrices = symmetric("any", 8).float()
    values, vectors = jacobi(matrices)
    assert values.dtype == torch.float32
    assert (vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs().max() < 1e-5


def test_nobody_waits_for_it():
    matrices = symmetric("any", 8)
    with Waits() as waits:
        jacobi(matrices)
    assert not waits.seen


@pytest.mark.parametrize("form", ["lapack", "jacobi"])
def test_all_sizes_come_back_in_their_places(form: str, monkeypatch: pytest.MonkeyPatch):
    if form == "jacobi":  # as off the CPU
        monkeypatch.setattr(torch.linalg, "eigh", jacobi)
    given = [symmetric("any", 8), symmetric("any", 3, 2), symmetric("graded", 8, 4)]
    for matrices, (values, vectors) in zip(given, eigh_of_all(given), strict=True):
        assert values.shape == matrices.shape[:2]
        assert (vectors @ torch.diag_embed(values) @ vectors.mT - matrices).abs().max() < 1e-12
