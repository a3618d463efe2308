"""The speed benchmark: its intervals from made-up samples, its instruments on known work, and one real measurement."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import __main__ as speed
from benchmarks.speed import measuring
from benchmarks.speed.bases import SharedBase
from benchmarks.speed.contenders import BASELINE, FULL_SIZE, Setting, Specification, specifications
from benchmarks.speed.measuring import NEIGHBOURS, Runner, StepCounter, in_rounds, prepare
from benchmarks.speed.report import ratio_to_baseline, table
from bilora_diffusion.bases.tiny import build_tiny_random
from bilora_diffusion.errors import UserError
from bilora_diffusion.fused import unfuse
from bilora_diffusion.method_names import METHOD_NAMES

CPU = torch.device("cpu")


def counted(runner: Runner) -> dict:
    with StepCounter(CPU) as counter:
        return measuring._counted(runner, counter)


def content(samples: dict[str, list[tuple[int, int, float]]]) -> dict:
    """A measurement on a CPU with (round, place, CPU seconds) of each contender."""
    facts = {"flops": 1e9, "operations": 1234.0, "counted_bytes": 5 * 2**19, "outside_unet": 0.1}
    facts |= {"peak_memory_bytes": None, "kernels": None}
    return {
        "configuration": {
            "model": "tiny",
            "resolution": 64,
            "batch": 1,
            "precision": "no",
            "rank": 4,
            "checkpointing": False,
            "device": "cpu",
        },
        "device": "a CPU",
        "matmul": {"size": 10, "flops_per_second": 1e10},
        "contenders": {
            name: facts | {"samples": [[number, place, 2 * seconds, seconds] for number, place, seconds in some]}
            for name, some in samples.items()
        },
    }


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    """Ten times slower by the end; a sample is compared with the baseline's just before and after it."""
    speeds = [1 + place for place in range(10)]
    base = [(0, place, float(speeds[place])) for place in range(0, 10, 2)]
    other = [(0, place, 1.5 * speeds[place]) for place in range(1, 9, 2)]
    assert ratio_to_baseline(content({BASELINE: base, "bilora": other}), "bilora") == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_covers_the_truth_and_shrinks():
    widths = []
    for count in (20, 320):
        draw = torch.Generator().manual_seed(count)
        noise = (torch.randn(2 * count + 1, generator=draw) / 20).exp().tolist()
        base = [(0, place, noise[place]) for place in range(0, 2 * count + 1, 2)]
        other = [(0, place, 1.1 * noise[place]) for place in range(1, 2 * count + 1, 2)]
        middle, low, high = ratio_to_baseline(content({BASELINE: base, "bilora": other}), "bilora")
        assert low < 1.1 < high and low <= middle <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_table_says_what_is_pending():
    measured = content({BASELINE: [(0, 0, 1.0), (0, 2, 1.0)], "bilora": [(0, 1, 1.02)]})
    (row,) = (line for line in table([measured]).splitlines() if line.startswith("| bilora"))
    assert row == "| bilora | 1.02 | 1.020 (1.020 to 1.020) | 10.0% | 10% | 1,234 | 2.5 MiB | pending | pending |"


def test_a_file_of_before_memory_was_counted_still_has_its_row():
    measured = content({BASELINE: [(0, 0, 1.0), (0, 2, 1.0)]})
    del measured["contenders"][BASELINE]["counted_bytes"]
    (row,) = (line for line in table([measured]).splitlines() if line.startswith("| lora"))
    assert row == "| lora | 1 | 1 | 10.0% | 10% | 1,234 | - | pending | pending |"


def test_every_method_and_both_stock_recipes_are_measured():
    names = [one.name for one in specifications()]
    assert set(METHOD_NAMES) | {"stock", "stock, latents kept"} <= set(names) and len(set(names)) == len(names)
    assert [one.name for one in specifications(["nbar"])] == [BASELINE, "nbar"]
    assert [one.name for one in specifications(FULL_SIZE)][:2] == [BASELINE, "bilora"]
    assert len(list(specifications(FULL_SIZE))) == len(FULL_SIZE) < len(names)
    compiled = list(specifications(["bilora", "stock"], compiled=True))
    assert [one.name for one in compiled] == [BASELINE, "bilora", "stock", "lora, compiled", "bilora, compiled"]
    assert [one.flags.get("compile", False) for one in compiled] == [False, False, False, True, True]
    with pytest.raises(UserError, match="--only nothing: there is 'lora', 'bilora'"):
        list(specifications(["nothing"]))


class Products:
    """Takes one product forward and two backward in a step, all in its `unet`, and as many forward outside it."""

    cycle = 1

    def __init__(self, size: int) -> None:
        self.unet = _Twice(size)
        self.x = torch.randn(size, size, requires_grad=True)
        self.steps: list[int] = []

    def step(self, number: int) -> float:
        self.steps.append(number)
        (loss,) = self.unet(self.x)
        loss.backward()
        for _ in range(3):
            self.x.detach() @ self.x.detach()
        return 0.0


class _Twice(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return ((x @ self.weight).sum(),)


def test_the_instruments_on_known_work():
    runner = Runner("products", Products(256), CPU)
    assert counted(runner)["flops"] == 6 * 2 * 256**3
    assert 0.3 < measuring._outside_unet(runner) < 0.7  # half of it by count
    reached = measuring.matmul_flops_per_second(torch.device("cpu"), torch.float32)
    assert 1e9 < reached["flops_per_second"] < 1e13


def test_products_in_place_are_counted():
    contender = Products(8)
    contender.step = lambda number: torch.zeros(4, 6).addmm_(torch.ones(4, 5), torch.ones(5, 6)).sum().item()
    assert counted(Runner("in place", contender, CPU))["flops"] == 2 * 4 * 5 * 6


def test_operations_are_counted_without_views():
    one = torch.randn(4, 4, requires_grad=True)
    with StepCounter(CPU) as counter:
        y = (one.T @ one.detach()).view(16)[:8].exp()  # a product and an exponential
        assert counter.operations == 2
        y.sum().backward()
    assert counter.operations > 5
    assert counted(Runner("products", Products(8), CPU))["operations"] >= 6


def test_products_are_counted_as_torch_counts_them(build):
    """Attention and convolutions among them; in a layer without adapters there is no product in place."""
    run = build("lora")
    unet = run.parts.models["unet"]
    unfuse(unet)
    run.train(1)
    with StepCounter(CPU) as ours:
        run.train(1, start=1)
    with FlopCounterMode(display=False) as theirs:
        run.train(1, start=1)
    assert ours.flops == theirs.get_total_flops() > 1e6


class Kept:
    """Is built with an adapter, allocates a moment in the first step; a step makes a product and its gradient.

    Arguments:
        base: frozen, (side, side).
    """

    cycle = 1

    def __init__(self, base: torch.Tensor) -> None:
        self.unet = nn.Module()
        self.unet.weight = nn.Parameter(base, requires_grad=False)
        self.unet.layer = nn.Module()
        self.unet.layer.lora_A = nn.Parameter(torch.ones(4, len(base)))
        self.moment: torch.Tensor | None = None

    def step(self, number: int) -> float:
        factor = self.unet.layer.lora_A
        if self.moment is None:
            self.moment = torch.zeros_like(factor)
        y = factor @ self.unet.weight.mT  # (4, side)
        z = y.exp()  # keeps its output
        del y
        z.backward(torch.ones_like(z))
        del z
        factor.grad = None
        return 0.0

    def beside_unet(self) -> Iterator[torch.Tensor]:
        yield torch.ones(7)


def test_memory_is_counted_as_one_adds_it_up_by_hand():
    """Without the base; adapter and moment stay; of the step, at most four more of their size are there at once."""
    side = 1024
    size = 4 * side * 4
    pipeline = build_tiny_random()
    setting = Setting(SharedBase(pipeline), CPU, torch.float32, 64, 1, False, Path())
    base = torch.ones(side, side)
    specification = Specification("kept", {}, lambda _: Kept(base.clone()))  # made while it counts, and not counted
    with mock.patch.object(measuring, "_outside_unet", lambda _: 0.0):
        _, facts = prepare([specification], setting, lambda _: None)
    # At the end of the backward pass z, the gradient given for it, that of y, and the adapter's.
    assert facts["kept"]["counted_bytes"] == 2 * size + 4 * size + 28
    assert facts["kept"]["flops"] == 2 * 2 * 4 * side**2


def test_the_baseline_is_never_far():
    runners = [Runner(name, Products(2), torch.device("cpu")) for name in (BASELINE, *"abcde")]
    in_rounds(runners, lambda rounds: rounds >= 2, lambda _: None)
    order = {sample.place: runner.name for runner in runners for sample in runner.samples}
    names = [order[place] for place in range(len(order))]
    half = len(names) // 2
    assert names[:half] != names[half:]  # another order
    for part in (names[:half], names[half:]):
        assert sorted(set(part)) == ["a", "b", "c", "d", "e", BASELINE]
        places = [place for place, name in enumerate(part) if name == BASELINE]
        assert places[0] == 0 and places[-1] == len(part) - 1
        assert max(b - a for a, b in itertools.pairwise(places)) <= NEIGHBOURS + 1
    assert all(runner.contender.steps == list(range(runner.taken)) for runner in runners)


def test_copies_share_their_weights_and_not_their_adapters():
    base = SharedBase.build("tiny", torch.device("cpu"), torch.float32)
    with base.in_place_of_files():
        one, other = (base._load(("unet",)).unet for _ in range(2))
    assert one is not other and one.conv_in is not other.conv_in
    pointers = [[p.data_ptr() for p in unet.parameters()] for unet in (one, other, base.pipeline.unet)]
    assert pointers[0] == pointers[1] == pointers[2]


def test_another_setting_is_another_file(tmp_path: Path):
    words = ["--model", "tiny", "--minutes", "0", "--folder", str(tmp_path), "--quiet", "--only", "nbar"]
    speed.main([*words, "--resolution", "32", "--precision", "bf16", "--checkpointing"])
    assert (tmp_path / "speed_tiny_cpu_32px_bf16_checkpointing.json").is_file()
    assert "32 px, batch 1, precision bf16, rank 4, gradient checkpointing" in (tmp_path / "speed.md").read_text()


def test_it_measures(tmp_path: Path, capsys):
    speed.main(["--model", "tiny", "--minutes", "0", "--folder", str(tmp_path), "--quiet", "--only", "bilora", "stock"])
    measured = json.loads((tmp_path / "speed_tiny_cpu.json").read_text())
    counted = {name: found["operations"] for name, found in measured["contenders"].items()}
    assert counted[BASELINE] < counted["bilora"] < counted["stock"]
    assert measured["configuration"]["flags"]["bilora"] == {"method": "bilora", "fused": True}
    for name in (BASELINE, "bilora", "stock"):
        found = measured["contenders"][name]
        assert len(found["samples"]) == (6 if name == BASELINE else 3)
        assert all(min(seconds, cpu) > 0 for _, _, seconds, cpu in found["samples"])
        assert found["counted_bytes"] > 1e5
        assert 0 < found["outside_unet"] < 1 and found["kernels"] is found["peak_memory_bytes"] is None
    vae = sum(tensor.nbytes for tensor in build_tiny_random().vae.parameters())
    assert measured["contenders"]["stock"]["counted_bytes"] > vae + 1e6  # it has to be there
    flops = {name: found["flops"] for name, found in measured["contenders"].items()}
    assert 1 < flops["bilora"] / flops[BASELINE] < 1.1 < flops["stock"] / flops[BASELINE] < 3  # the VAE's
    assert (tmp_path / "speed_tiny_cpu.png").stat().st_size > 5000
    assert "| bilora |" in (tmp_path / "speed.md").read_text()
    assert "speed_tiny_cpu.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "sdxl"], "error: --model sdxl at 1024 px needs a CUDA GPU, and none is visible"),
        (["--model", "tiny", "--only", "nonsense"], "error: --only nonsense: there is"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^2$"):
        speed.main(words)
    printed = capsys.readouterr().err
    assert printed.startswith(told) and printed.count("\n") == 1
