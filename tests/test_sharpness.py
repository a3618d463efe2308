"""The sharpness of any LoRA file: each measure on a loss whose answer is known, and the command on a real file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lora_samples import ALL_PARTS, KOHYA_FILE, write_lora
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bilora_diffusion.bases import Base
from bilora_diffusion.cli import main as train
from bilora_diffusion.embedded import CONCEPT_FOLDER
from bilora_diffusion.errors import UserError
from bilora_diffusion.sharpness import measures
from bilora_diffusion.sharpness.__main__ import main
from bilora_diffusion.sharpness.course import cosines_to_the_last
from bilora_diffusion.sharpness.landscape import Landscape, norm
from bilora_diffusion.sharpness.setting import load_scene


@dataclass
class Quadratic:
    """L(w) = (w - m)' H (w - m) / 2 for a matrix w, taken as one long vector."""

    w: nn.Parameter
    H: Tensor
    m: Tensor

    def __len__(self) -> int:
        return 1

    def loss(self, rows: slice = slice(None)) -> Tensor:
        apart = self.w.flatten() - self.m
        return apart @ self.H @ apart / 2

    def add_gradient(self, rows: slice = slice(None), weight: float = 1.0) -> Tensor:
        loss = self.loss(rows)
        (loss * weight).backward()
        return loss.detach()


def quadratic() -> Quadratic:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=draw, dtype=torch.float64)
    w = nn.Parameter(torch.randn(3, 4, generator=draw, dtype=torch.float64))
    return Quadratic(w, root @ root.T, torch.randn(12, generator=draw, dtype=torch.float64))


def say(text: str) -> None:
    assert text


def test_the_top_eigenvalue():
    one = quadratic()
    found = measures.top_eigenvalue(Landscape([one.w], [one]), 60, 0, say)
    assert found["eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(one.H).max().item(), rel=1e-4)
    assert len(found["history"]) == 60 and found["history"][0] < found["eigenvalue"]


def test_the_worst_case_is_a_step_along_the_gradient():
    one = quadratic()
    before = one.w.detach().clone()
    found = measures.worst_case(Landscape([one.w], [one]), [0.1, 0.5], say)
    g = one.H @ (before.flatten() - one.m)
    assert found["gradient_norm"] == pytest.approx(g.norm().item())
    for size, length, loss in zip(found["sizes"], found["lengths"], found["losses"], strict=True):
        assert length == pytest.approx(size * before.norm().item())
        at = before.flatten() + length * g / g.norm() - one.m
        assert loss == pytest.approx((at @ one.H @ at / 2).item())
    assert torch.equal(one.w.detach(), before) and one.w.grad is None


def test_random_directions_are_filter_normalised():
    one = quadratic()
    (direction,) = measures.filter_normalized([one.w], 0, 0)
    assert torch.allclose(direction.norm(dim=1), one.w.detach().norm(dim=1))
    assert not torch.equal(direction, measures.filter_normalized([one.w], 0, 1)[0])
    found = measures.along_random(Landscape([one.w], [one]), [-0.5, 0.0, 0.5], 2, 0, say)
    assert [losses[1] for losses in found["losses"]] == [one.loss().item()] * 2
    at = one.w.detach().flatten() + 0.5 * direction.flatten() - one.m
    assert found["losses"][0][2] == pytest.approx((at @ one.H @ at / 2).item())
    assert found["mean"] == pytest.approx([sum(column) / 2 for column in zip(*found["losses"], strict=True)])


def test_the_part_of_the_gradient_that_has_a_rank():
    one = quadratic()
    G = (one.H @ (one.w.detach().flatten() - one.m)).reshape(3, 4)
    values = torch.linalg.svdvals(G)
    found = measures.ky_fan(Landscape([one.w], [one]), 2)
    assert found["top"] == pytest.approx(values[:2].norm().item())
    assert found["whole"] == pytest.approx(values.norm().item())
    assert measures.ky_fan(Landscape([one.w], [one]), 3)["share"] == pytest.approx(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharpness") / "run"
    flags = {
        "pretrained_model_name_or_path": "embedded",
        "instance_data_dir": str(CONCEPT_FOLDER),
        "output_dir": str(folder),
        "max_train_steps": "6",
        "checkpointing_steps": "2",
        "learning_rate": "1e-3",
        "rho": "1.0",
        "seed": "0",
        "report_to": "none",
        "loss_gap_steps": "0",
        "train_text_encoder": "true",
        "text_encoder_lr": "1e-3",
    }
    assert train([word for name, value in flags.items() for word in (f"--{name}", value)]) == 0
    return folder


def scene(lora: Path):
    return load_scene(
        lora,
        Base("embedded"),
        CONCEPT_FOLDER,
        instance_prompt=None,
        resolution=None,
        draws=6,
        batch_size=4,
        seed=0,
        device=torch.device("cpu"),
    )


def test_both_spaces_are_around_the_same_model(run: Path):
    """The same loss, and gradients that the chain rule connects: dL/dB = s G A'."""
    one = scene(run / "pytorch_lora_weights.safetensors")
    assert one.layers == 80 and one.rank == 4
    lora = one.lora()
    loss, gradient = lora.loss(), lora.gradient()
    scale = 1.0
    pairs = [(lora.points[i].detach().clone(), gradient[i + 1]) for i in range(0, len(gradient), 2)]
    full = one.full()
    assert full.loss() == pytest.approx(loss, rel=1e-5)
    for (A, gB), G in zip(pairs, full.gradient(), strict=True):
        assert torch.allclose(gB, scale * G @ A.T, rtol=1e-3, atol=1e-6)
    assert norm(full.gradient()) > 0


def test_a_kohya_file_is_the_same_model(run: Path):
    losses = [scene(run / f"pytorch_lora_weights{end}.safetensors").lora().loss() for end in ("", "_kohya")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


OTHERS = {
    "DoRA": {"use_dora": True},
    "convolutions": {"targets": ("to_q", "conv1", "conv2")},
    "another alpha, text encoders": {"parts": ALL_PARTS, "rank": 3, "alpha": 1.5},
}


@pytest.mark.parametrize("kind", [*OTHERS, "an alpha for each layer"])
def test_whoever_trained_it(kind: str, tmp_path: Path):
    """The spaces of factors and of merged weights agree on where the file stands, away from the bare base."""
    base = Base("embedded")
    file = write_lora(tmp_path, base.load(*ALL_PARTS), **OTHERS.get(kind, {}))
    if kind not in OTHERS:
        file = tmp_path / KOHYA_FILE
        tensors = load_file(file)
        for number, name in enumerate(sorted(name for name in tensors if name.endswith(".alpha"))):
            tensors[name] = torch.tensor(1.0 + number % 5)
        save_file(tensors, file)
    nothing = {name: torch.zeros_like(one) for name, one in load_file(file).items() if "magnitude" not in name}
    nothing |= {name: one for name, one in load_file(file).items() if name not in nothing or name.endswith("alpha")}
    save_file(nothing, tmp_path / "nothing.safetensors")
    one, bare = scene(file), scene(tmp_path / "nothing.safetensors")
    lora = one.lora()
    loss, slope = lora.loss(), norm(lora.gradient())
    assert abs(loss - bare.lora().loss()) > 1e-4 * loss
    full = one.full()  # merges
    assert full.loss() == pytest.approx(loss, rel=1e-5)
    assert min(slope, norm(full.gradient())) > 0


def test_the_command_measures_and_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = [str(run / "pytorch_lora_weights.safetensors"), "--data", str(CONCEPT_FOLDER), "--run", str(run)]
    words += ["--draws", "4", "--directions", "1", "--power_steps", "2", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    *told, first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    paths = first, second, third, fourth, fifth
    assert sorted(Path(path).name for path in paths) == sorted(
        ["sharpness.json", "sharpness.png", "sharpness.svg", "course.png", "course.svg"]
    )
    report = json.loads((tmp_path / "sharpness.json").read_text())
    assert f"{report['loss']:.5f}" in told[0] and len(told) == 3
    assert f"top Hessian eigenvalue {report['full']['hessian']['eigenvalue']:.3g}" in told[2]
    for space in ("lora", "full"):
        found = report[space]
        middle = found["random"]["sizes"].index(0.0)
        assert found["random"]["mean"][middle] == pytest.approx(report["loss"], rel=1e-4)
        losses = found["worst_case"]["losses"]
        assert losses[1] > report["loss"] and math.isfinite(found["hessian"]["eigenvalue"])
    assert 0 < report["full"]["gradient"]["share"] <= 1
    assert report["course"]["steps"] == [2, 4, 6] and report["course"]["primary"][-1] == pytest.approx(1)
    assert report["course"]["auxiliary"][0] < 1
    assert str(tmp_path) not in (tmp_path / "sharpness.json").read_text()
    with Image.open(tmp_path / "sharpness.png") as picture:
        assert picture.width > 500


def test_the_course_of_a_known_turn(tmp_path: Path):
    """B A in the plane of two matrices, at 60 and 30 degrees from where it ends; the auxiliary begins at nothing."""
    random = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(6, 4, generator=random))[0].mT  # rows of length 1 at right angles
    B = torch.randn(5, 2, generator=random)
    for number, degrees in ((10, 60), (20, 30), (30, 0)):
        turn = math.radians(degrees)
        turned = math.cos(turn) * A[:2] + math.sin(turn) * A[2:]
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        for file, size in (("pytorch_lora_weights.safetensors", 1.0), ("auxiliary.safetensors", float(number > 10))):
            layers = {f"unet.{layer}.lora_{side}.weight": one.clone().contiguous()
                      for layer, scale in (("a", 1.0), ("b", 3.0))
                      for side, one in (("A", scale * turned), ("B", size * number * B))}  # fmt: skip
            save_file(layers, folder / file)
    course = cosines_to_the_last(tmp_path)
    assert course["steps"] == [10, 20, 30]
    assert course["primary"] == pytest.approx([0.5, math.sqrt(0.75), 1.0], abs=1e-6)
    assert course["auxiliary"] == [None, *(pytest.approx(value, abs=1e-6) for value in (math.sqrt(0.75), 1.0))]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.safetensors", "--data", str(CONCEPT_FOLDER)], "nowhere.safetensors: no such file"),
        ([__file__, "--data", str(CONCEPT_FOLDER)], "never pickles"),
        (["x.safetensors", "--data", "nowhere"], "--data nowhere is not there"),
        (["x.safetensors", "--data", "tests"], "--data tests holds no pictures"),
        (["x.safetensors", "--data", str(CONCEPT_FOLDER), "--draws", "0"], "--draws is 0"),
        (["x.safetensors", "--data", str(CONCEPT_FOLDER), "--run", "nowhere"], "--run nowhere: 0 checkpoint(s)"),
    ],
)
def test_mistakes_get_one_line(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert main([word.replace("x.safetensors", str(tmp_path / "x.safetensors")) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and told in message and message.count("\n") == 1


def test_another_file_is_refused(tmp_path: Path):
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"0" * 300)
    with pytest.raises(UserError, match=r"damaged.safetensors.* is not a LoRA for SDXL"):
        scene(tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors.* holds no layer under a name"):
        scene(tmp_path / "other.safetensors")
