"""benchmarks.optimizers: every form makes the same update, the shapes are SDXL's, and one run on tiny ones."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import optimizers as benchmark
from benchmarks.optimizers import FORMS, lora_shapes
from bilora_diffusion.bases.single_file import SDXL_CONFIG


def test_the_shapes_are_those_of_sdxl():
    """70 blocks with two attentions of four projections: 560 layers, 640 and 1,280 wide, prompts 2,048."""
    shapes = lora_shapes(json.loads((SDXL_CONFIG / "unet" / "config.json").read_text()), 4)
    assert len(shapes) == 1120
    assert {tuple(shape) for shape in shapes} == {
        *((4, width) for width in (640, 1280, 2048)),
        *((width, 4) for width in (640, 1280)),
    }


@pytest.mark.parametrize("count", [1, 2])
def test_all_forms_make_the_same_updates(count: int):
    """Some of them, so that gradients that were left behind or clipped twice would show."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (5, 4), (4, 3)]
    values = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(count)]
    updates = {name: form(values) for name, form in FORMS.items()}
    for _ in range(3):
        gradients = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(count)]
        for update in updates.values():
            update.receive([[value.clone() for value in adapter] for adapter in gradients])
            update()
    reference = updates["default"].parameters
    for adapter, before in zip(reference, values, strict=True):
        assert all((one - other).abs().max() > 1e-5 for one, other in zip(adapter, before, strict=True))
    for name, update in updates.items():
        for adapter, others in zip(update.parameters, reference, strict=True):
            torch.testing.assert_close(adapter, others, msg=lambda text, name=name: f"{name}: {text}")


def test_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture):
    step = {
        "configuration": {"device": "cpu"},
        "sample": ["round", "place", "seconds", "cpu_seconds"],
        "contenders": {"lora": {"samples": [[0, 0, 9.0, 2.0], [0, 4, 9.0, 2.0]]}},
    }
    (tmp_path / "speed_sdxl_cpu_256px.json").write_text(json.dumps(step))
    benchmark.main(["--base", "tiny-random", "--rounds", "3", "--folder", str(tmp_path)])
    measured = json.loads((tmp_path / "optimizers_cpu.json").read_text())
    seen = {(count, name, number) for count, name, number, *_ in measured["samples"]}
    assert seen == {(count, name, number) for count in (1, 2) for name in FORMS for number in range(3)}
    assert all(min(sample[3:]) >= 0 < sample[3] for sample in measured["samples"])
    text = (tmp_path / "optimizers.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| fused |")]
    assert len(rows) == 2 and all(" | 1.00 | " in row and row.endswith("% |") for row in rows)
    assert "of 2 s, `lora`'s in speed_sdxl_cpu_256px.json" in text
    assert "optimizers_cpu.json" in capsys.readouterr().out
