"""What can stand behind `--method`, and which flags each method reads. Imports nothing: `--help` is made from it."""

__all__ = ["BALL_METHODS", "FLAGS_OF_METHODS", "METHOD_NAMES", "WITH_NOISE"]

METHOD_NAMES = (
    "bilora",
    "lora",
    "bilora-fresh",
    "bilora-echo",
    "dual-lora",
    "flat-lora",
    "lora-sam",
    "looksam",
    "s2-sam",
    "eflat-lora",
    "rwp-lora",
    "rwp-full",
    "obar",
    "nbar",
)

BALL_METHODS = ("bilora", "bilora-fresh", "bilora-echo", "dual-lora")  # they have a second adapter, held in a ball
WITH_NOISE = ("bilora", "bilora-fresh", "bilora-echo")  # flat-lora's, on top, where `--sigma` is given
FLAGS_OF_METHODS: dict[str, tuple[str, ...]] = {
    "rho": (*BALL_METHODS, "lora-sam", "looksam", "s2-sam", "eflat-lora"),
    "rho_relative": BALL_METHODS,
    "rho_schedule": ("bilora",),
    "auxiliary_rank": BALL_METHODS,
    "auxiliary_init": ("bilora", "bilora-fresh", "dual-lora"),
    "ascent": ("bilora",),
    "ascent_fraction": ("bilora",),
    "auxiliary_learning_rate": ("bilora", "dual-lora"),
    "auxiliary_weight_decay": ("bilora", "dual-lora"),
    "ascent_share": ("lora-sam", "bilora-fresh"),
    "ascent_every": ("bilora-fresh",),
    "ascent_basis": ("bilora-fresh",),
    "sigma": ("flat-lora", "rwp-full", "rwp-lora", *WITH_NOISE),
    "sigma_schedule": ("flat-lora", *WITH_NOISE),
    "looksam_every": ("looksam",),
    "looksam_alpha": ("looksam",),
    "eflat_beta": ("eflat-lora",),
    "bar_strength": ("obar", "nbar"),
    "bar_schedule": ("obar", "nbar"),
}
"""Which methods read a flag of the group Method; the flags that are not here hold for all."""
