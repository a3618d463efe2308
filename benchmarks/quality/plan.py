"""What is trained: every method at some strengths and learning rates, chosen on validation names."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALSO_MEASURED", "CONFIRMED", "EDGES", "LOOKED_AT", "TRANSFERRED", "Configuration", "candidates"]

RATES = (5e-4, 1e-3)
RATES_OF_LORA = (2.5e-4, *RATES, 2e-3)
"""Wider, to see that LoRA's best lies between the others' rates."""


FULL_RANK = 160
"""The widest layer's: `bilora-fresh` then holds the batch's whole gradient, and is SAM in the space of the weights."""


@dataclass(frozen=True)
class Configuration:
    """One training, but for its seed.

    Arguments:
        settings: the method's own flags.
    """

    method: str
    learning_rate: float
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        own = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.method}, lr {self.learning_rate:g}" + (f", {own}" if own else "")

    @property
    def key(self) -> str:
        """For looking a result up."""
        return str(self)

    @property
    def slug(self) -> str:
        """For a file's name: "flat-lora-lr-0.001-sigma-0.3"."""
        return str(self).replace(", ", "-").replace(" ", "-")


STRENGTHS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {},
        {"steps_per_draw": 2},
        {"ema_decay": 0.98},  # in 400 steps a higher one is the same: it grows to (1 + n) / (10 + n)
        {"lora_dropout": 0.1},
        {"lora_dropout": 0.3},
        {"lora_dropout": 0.5},
        {"lora_dropout": 0.7},
        {"lora_dropout": 0.85},
    ],
    "bilora": [
        {"rho": 0.05},
        {},
        {"rho": 2.0},
        {"rho": 6.0},
        {"rho": 2.0, "ascent": "sgd"},
        {"rho": 2.0, "ascent": "normalized"},
        {"rho": 0.7},
        {"rho": 2.0, "auxiliary_init": "kaiming"},
        {"rho": 2.0, "sigma": 0.5, "sigma_schedule": "constant"},
        {"rho": 2.0, "lora_dropout": 0.5},
        {"rho": 2.0, "lora_dropout": 0.7},
        {"rho": 2.0, "lora_dropout": 0.85},
    ],
    "bilora-fresh": [
        {"rho": 0.475734, "ascent_share": 1.0},
        {"rho": 1.0, "ascent_share": 1.0},
        {"rho": 1.0, "ascent_share": 0.5},
        {"rho": 1.0, "ascent_share": 0.25},
        {"rho": 2.0, "ascent_share": 0.5},
        {"rho": 1.0, "ascent_share": 1.0, "auxiliary_rank": FULL_RANK},
        {"rho": 1.0, "ascent_share": 0.5, "sigma": 0.5, "sigma_schedule": "constant"},
        {"rho": 1.0, "ascent_share": 0.5, "lora_dropout": 0.5},
        {"rho": 1.0, "ascent_share": 0.5, "lora_dropout": 0.7},
        {"rho": 0.475734, "ascent_share": 1.0, "ascent_basis": "tracked"},
        {"rho": 0.475734, "ascent_share": 0.5, "ascent_basis": "tracked"},
        {"rho": 1.0, "ascent_share": 1.0, "ascent_basis": "tracked"},
    ],
    "bilora-echo": [
        {"rho": 0.5},
        {"rho": 1.0},
        {"rho": 2.0},
        {"rho": 1.0, "sigma": 0.5, "sigma_schedule": "constant"},
        {"rho": 1.0, "lora_dropout": 0.5},
        {"rho": 1.0, "lora_dropout": 0.7},
    ],
    "dual-lora": [{}],
    "flat-lora": [
        {"sigma": 0.1, "sigma_schedule": "cosine"},
        {"sigma": 0.3, "sigma_schedule": "constant"},
        {"sigma": 0.5, "sigma_schedule": "constant"},
        {"sigma": 1.0, "sigma_schedule": "constant"},
        {"sigma": 0.5, "sigma_schedule": "linear"},
        {"sigma": 0.5, "sigma_schedule": "cosine"},
    ],
    "rwp-lora": [{"sigma": 0.1}, {"sigma": 0.5}],
    "lora-sam": [{"rho": 0.05}, {"rho": 0.2}, {"rho": 0.5}],
    "looksam": [{"rho": 0.05}, {"rho": 0.2}, {"rho": 0.2, "looksam_every": 2}],
    "s2-sam": [{"rho": 0.05}, {"rho": 0.2}],
    "eflat-lora": [{"rho": 0.01}, {"rho": 0.05}, {"rho": 0.5}],
    "obar": [{"bar_strength": 0.25}, {"bar_strength": 2.0}, {"bar_strength": 8.0}],
    "nbar": [{"bar_strength": 0.25}, {"bar_strength": 2.0}, {"bar_strength": 8.0}],
}
"""At each method's own flags; `rwp-full` is flat-lora with a constant schedule."""


_NOISE = {"sigma": 0.5, "sigma_schedule": "constant"}
_AT_HALF_THE_RATE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"lora_dropout": 0.7}),
    ("bilora", {"rho": 2.0}),
    ("bilora", {"rho": 2.0, "lora_dropout": 0.7}),
    ("bilora-fresh", {"rho": 1.0, "ascent_share": 0.5}),
    ("bilora-echo", {"rho": 1.0}),
    ("dual-lora", {}),
    ("flat-lora", _NOISE),
    ("lora-sam", {"rho": 0.05}),
    ("looksam", {"rho": 0.05}),
    ("s2-sam", {"rho": 0.05}),
    ("eflat-lora", {"rho": 0.01}),
    ("obar", {"bar_strength": 2.0}),
    ("nbar", {"bar_strength": 2.0}),
)
EDGES = (
    *(Configuration(method, 2.5e-4, settings) for method, settings in _AT_HALF_THE_RATE),
    Configuration("lora-sam", 5e-4, {"rho": 0.01}),
    Configuration("lora-sam", 5e-4, {"rho": 0.05, "ascent_share": 0.5}),
    Configuration("looksam", 5e-4, {"rho": 0.01}),
    Configuration("looksam", 1e-3, {"rho": 0.01}),
    Configuration("s2-sam", 5e-4, {"rho": 0.01}),
    Configuration("eflat-lora", 5e-4, {"rho": 0.05, "eflat_beta": 0.5}),
    Configuration("eflat-lora", 5e-4, {"rho": 0.05, "eflat_beta": 0.1}),
    Configuration("bilora", 5e-4, {"rho": 0.05, "ascent": "sgd"}),
    Configuration("bilora", 5e-4, {"rho": 2.0, "ascent": "sgd", "auxiliary_learning_rate": 100.0}),
    Configuration("bilora-fresh", 5e-4, {"rho": 1.0, "ascent_share": 1.0, "ascent_every": 2}),
    Configuration("bilora-fresh", 5e-4, {"rho": 1.0, "ascent_share": 1.0, "ascent_every": 4}),
)
"""Candidates at one rate: whether what is best above is the best because nothing further out was tried."""

ALSO_MEASURED = (
    Configuration("bilora", 5e-4, {"rho": 0.05, "ascent": "sgd"}),  # the paper's defaults
    Configuration("bilora", 5e-4, {"rho": 2.0}),  # with its usual start
    Configuration("bilora", 5e-4, {"rho": 2.0, "rho_schedule": "anneal"}),
    Configuration("bilora", 5e-4, {"rho": 2.0} | _NOISE),
    Configuration("flat-lora", 5e-4, _NOISE),
    Configuration("lora", 2.5e-4),  # what half the learning rate does to overfitting, and what is left to win then
    Configuration("bilora", 2.5e-4, {"rho": 2.0}),
    Configuration("bilora-echo", 2.5e-4, {"rho": 1.0}),
    Configuration("bilora-fresh", 2.5e-4, {"rho": 1.0, "ascent_share": 0.5}),
    Configuration("flat-lora", 2.5e-4, _NOISE),
    Configuration("lora", 5e-4, {"lora_dropout": 0.1}),
    Configuration("lora", 5e-4, {"lora_dropout": 0.7}),
    Configuration("bilora", 5e-4, {"rho": 2.0, "lora_dropout": 0.5}),
    Configuration("bilora", 5e-4, {"rho": 2.0, "lora_dropout": 0.7}),
    Configuration("bilora-echo", 5e-4, {"rho": 1.0, "lora_dropout": 0.5}),
    Configuration("bilora-fresh", 5e-4, {"rho": 1.0, "ascent_share": 0.5, "lora_dropout": 0.5}),
    Configuration("lora", 5e-4, {"steps_per_draw": 2}),
    Configuration("lora-sam", 5e-4, {"rho": 0.05}),
    Configuration("looksam", 1e-3, {"rho": 0.05}),
    Configuration("s2-sam", 5e-4, {"rho": 0.05}),
    Configuration("eflat-lora", 5e-4, {"rho": 0.01}),
)
"""Beside what is chosen: the paper's radius and ascent, others at LoRA's learning rate, and what was the choice before
`EDGES` were tried."""
CONFIRMED = (
    *(Configuration(method, 5e-4) for method in ("lora", "bilora", "bilora-echo", "bilora-fresh", "nbar", "flat-lora")),
    Configuration("lora", 5e-4, {"lora_dropout": 0.7}),
    Configuration("bilora", 5e-4, {"lora_dropout": 0.5}),
    Configuration("bilora-echo", 5e-4, {"lora_dropout": 0.5}),
    Configuration("lora", 2.5e-4),
    Configuration("flat-lora", 2.5e-4),
)
"""LoRA, then the methods that differed from it, with the strengths that the trainer has by default, at LoRA's learning
rate; dropout; half that rate, and the one method that there lowered both the loss and what is forgotten. Each was named
before it was run on the seeds that measure it."""

_FRESH = {"rho": 1.0, "ascent_share": 0.5}
LOOKED_AT = (
    Configuration("lora", 5e-4),
    Configuration("bilora", 5e-4, {"rho": 0.05, "ascent": "sgd"}),
    Configuration("bilora", 5e-4, {"rho": 2.0}),
    Configuration("bilora", 5e-4, {"rho": 2.0} | _NOISE),
    Configuration("bilora", 5e-4, {"rho": 2.0, "lora_dropout": 0.5}),
    Configuration("bilora-echo", 5e-4, {"rho": 1.0}),
    Configuration("bilora-fresh", 5e-4, _FRESH),
    Configuration("bilora-fresh", 5e-4, _FRESH | {"ascent_share": 1.0}),
    Configuration("bilora-fresh", 5e-4, _FRESH | {"ascent_share": 1.0, "auxiliary_rank": FULL_RANK}),
    Configuration("bilora-fresh", 5e-4, {"rho": 0.475734, "ascent_share": 0.5, "ascent_basis": "tracked"}),
    Configuration("bilora-fresh", 5e-4, _FRESH | _NOISE),
    Configuration("dual-lora", 5e-4),
    Configuration("eflat-lora", 5e-4, {"rho": 0.01}),
    Configuration("flat-lora", 5e-4, _NOISE),
    Configuration("looksam", 1e-3, {"rho": 0.05}),
    Configuration("lora-sam", 5e-4, {"rho": 0.05}),
    Configuration("rwp-lora", 5e-4, {"sigma": 0.1}),
    Configuration("s2-sam", 5e-4, {"rho": 0.05}),
)
"""What `rises` looks at: LoRA, for the directions that any method could have, and all that perturb, at strengths that
change something."""


TRANSFERRED = (
    Configuration("lora", 5e-4),
    Configuration("lora", 2.5e-4),
    Configuration("lora", 5e-4, {"lora_dropout": 0.7}),
    Configuration("lora", 5e-4, {"steps_per_draw": 2}),
    Configuration("bilora", 5e-4, {"rho": 2.0}),
    Configuration("bilora", 5e-4, {"rho": 2.0, "rho_schedule": "anneal"}),
    Configuration("bilora", 5e-4, {"rho": 2.0, "lora_dropout": 0.5}),
    Configuration("bilora-echo", 5e-4, {"rho": 1.0}),
    Configuration("bilora-fresh", 5e-4, _FRESH),
    Configuration("flat-lora", 5e-4, _NOISE),
    Configuration("flat-lora", 1e-3, _NOISE),
    Configuration("flat-lora", 2.5e-4, _NOISE),
    Configuration("looksam", 1e-3, {"rho": 0.05}),
    Configuration("nbar", 5e-4, {"bar_strength": 2.0}),
)
"""What `transfer` trains elsewhere: the controls, and what differed from LoRA on the 3D icons; obar and nbar cannot be
told apart there."""


def candidates(methods: list[str] | None = None) -> Iterator[Configuration]:
    """All of them, or those of some methods."""
    for method, strengths in STRENGTHS.items():
        if methods and method not in methods:
            continue
        for settings in strengths:
            for rate in RATES_OF_LORA if method == "lora" and not settings else RATES:
                yield Configuration(method, rate, settings)
    yield from (one for one in EDGES if not methods or one.method in methods)
