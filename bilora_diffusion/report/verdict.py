"""What the paired numbers say, in plain words, and never more than they carry."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from bilora_diffusion.curves import Curve, mean_of
from bilora_diffusion.paired import Difference
from bilora_diffusion.report.plan import title
from bilora_diffusion.report.quantities import Compared, Quantity, amount

__all__ = ["Sentence", "caveat", "gap_note", "overfitting", "sentence", "verdict"]

TOLD = ("held_out", "training", "gap", "drift", "nearest", "sharpness", "seconds")
"""The quantities that the verdict has a sentence about; the tables have all."""
FEW_SEEDS = 4
"""Up to so many the interval is so wide that even a large difference, the same way in each, is often not shown."""
WORTH_STOPPING = 0.01
"""The least rise of the held-out loss behind its lowest point, as a share, that a word is said about."""
Outcome = Literal["lower", "higher", "not shown", "one seed", "equal", "not measured", "too long"]


@dataclass(frozen=True)
class Sentence:
    """Attributes:
    outcome: `lower` and `higher` only where the 95 % interval leaves zero out.
    leads: the first about its method.
    """

    text: str
    outcome: Outcome
    leads: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdict(
    found: Sequence[Compared], methods: Sequence[str], *, held_out: int, notes: Sequence[tuple[str, str]]
) -> list[Sentence]:
    """The sentences about every method against the first.

    Arguments:
        held_out: how many pictures were.
        notes: (method, what its runs said of a perturbation that did nothing, too much or the opposite).
    """
    by_key = {one.quantity.key: one for one in found}
    sentences = []
    if not held_out:
        text = "No picture was held out, so overfitting was not measured: 8 pictures or more, or --hold_out, allow it."
        sentences.append(Sentence(text, "not measured"))
    for method in methods[1:]:
        for number, one in enumerate(by_key[key] for key in TOLD if key in by_key):
            difference, seeds = one.differences[method], len(one.values[method])
            said = sentence(one.quantity, method, methods[0], difference, seeds, held_out)
            sentences.append(replace(said, leads=number == 0))
    for method, text in notes:
        sentences.append(Sentence(f"{title(method)}: {text}.", "not measured"))
    if len(methods) == 1:
        sentences.append(Sentence(f"Only {title(methods[0])} was trained: nothing was compared.", "not measured"))
    return sentences


def sentence(
    quantity: Quantity, method: str, first: str, difference: Difference | None, seeds: int, held_out: int
) -> Sentence:
    """What one quantity of one method says against the first method."""
    phrase = quantity.phrase.format(held_out=f"{held_out} held-out picture{'' if held_out == 1 else 's'}")
    subject, other = f"{title(method)}'s {phrase}", f"{title(first)}'s"
    if difference is None:
        text = f"{subject} cannot be held against {other}: in some run it was no finite number above 0."
        return Sentence(text, "not measured")
    is_than = f"{subject} was {amount(quantity, difference.mean)} than {other}"
    if difference.interval is None:
        return Sentence(f"On the one seed that was run, {is_than}: one seed shows nothing.", "one seed")
    if difference.is_zero:
        return Sentence(f"On {seeds} paired seeds {subject} was exactly {other}.", "equal")
    low, high = (amount(quantity, end) for end in difference.interval)
    start = f"On {seeds} paired seeds {is_than} (95 % interval: {low} to {high})"
    if not difference.is_shown:
        if seeds <= FEW_SEEDS and difference.is_one_sided:
            text = f"{start}: every seed went the same way, but so few cannot rule out chance."
            return Sentence(text, "not shown")
        return Sentence(f"{start}: no difference was shown.", "not shown")
    return Sentence(
        f"{start}: more than the chance of the seeds explains.", "lower" if difference.mean < 0 else "higher"
    )


def overfitting(method: str, courses: Sequence[Curve]) -> Sentence | None:
    """Where to stop, if the loss on the held-out pictures was lower at a checkpoint than after the last step.

    Arguments:
        courses: of each run, its loss on the held-out pictures at its checkpoints and, last, at its end.
    """
    mean = mean_of(courses)
    best_step, best = min(mean, key=lambda point: point[1])
    last_step, last = mean[-1]
    if best_step == last_step or not last / best > 1 + WORTH_STOPPING:
        return None
    text = (
        f"{title(method)} overfits: its loss on the held-out pictures was lowest at step {best_step:.0f}, and "
        f"{100 * (last / best - 1):.2g} % higher at step {last_step:.0f}. The LoRA of that step is in "
        f"checkpoint-{best_step:.0f} of each run's folder (chosen on these same pictures, which flatters it)."
    )
    return Sentence(text, "too long")


def gap_note(method: str, gaps: Sequence[float], clean: Sequence[float]) -> str:
    """What the loss gaps of a method's runs say; a negative one means more than an auxiliary that does nothing.

    Arguments:
        gaps: the mean of each run, L(perturbed) - L(clean).
        clean: and of L(clean), on the same draws.
    """
    below = sum(gap < 0 for gap in gaps)
    text = (
        f"{title(method)}'s loss gap was {sum(gaps) / len(gaps):+.2g} ({sum(gaps) / sum(clean):+.1%} of the loss "
        "without the perturbation), the mean of its runs."
    )
    if below:
        text += (
            f" In {below} of {len(gaps)} it was negative: the loss was lower with the perturbation than without it, "
            "and the LoRA that is kept is the one without it."
        )
    return text


def caveat(count: int, seeds: int, held_out: int) -> str:
    """What the numbers do not carry.

    Arguments:
        count: of the differences that were looked at.
    """
    parts = [
        "A seed changes the first weights, the order of the pictures and the noise."
        if seeds > 1
        else "With one seed, what a method does and what chance does cannot be told apart."
    ]
    same = "the base, the settings and the pictures"
    if held_out:
        same += f", the {held_out} held-out one{'s' if held_out > 1 else ''} among them,"
    parts.append(f"In all runs {same} were the same: nothing here speaks for others.")
    if seeds > 1 and count > 1:
        parts.append(
            f"{count} differences were looked at; were there none, about one in twenty would seem to be one by chance."
        )
    return " ".join(parts)
