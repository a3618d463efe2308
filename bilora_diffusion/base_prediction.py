"""Prior preservation without class pictures: the class rows are held to what the frozen base itself predicts.

    L = ||f(z_t, t, caption) - target||^2  +  weight ||f(z_t, t, class prompt) - f_base(z_t, t, class prompt)||^2

f is the adapted model under whatever perturbation the method has on, f_base the same with every adapter off and
without a gradient. A class row has the latents z_t, noise, timestep and size conditioning of the instance row before it
and differs in the prompt alone. There the adapters pull hardest: they are trained on these very inputs, and what they
learn leaks from the caption to the class prompt through them. And as the pair shares all but the prompt, the two terms
together say that the subject belongs to its caption. Where the two agree, as at the first step, the term is 0.

The base's prediction is a constant of the row, as its noise is: it is computed once a step, whatever the number of
passes that a method makes.

Reference:
    Differential output preservation, kohya-ss/sd-scripts pull request 1710 and ostris/ai-toolkit (the same latents
    with the class in the trigger word's place); Nerogar/OneTrainer pull request 505 (any prompt, on the training
    pictures themselves). On class pictures: Noise Consistency Regularization for Improved Subject-Driven Image
    Synthesis (Ni et al., 2025), arXiv 2506.06483.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from bilora_diffusion.adapters import adapted_layers
from bilora_diffusion.batches import TrainingMicroBatch
from bilora_diffusion.data.pictures import Picture
from bilora_diffusion.errors import UserError
from bilora_diffusion.loss_gap import no_dropout

__all__ = ["check_prior_prompt", "hold_to_base", "only_base"]

_CLASS_ROWS = slice(1, None, 2)  # each follows its instance row


def check_prior_prompt(prior_prompt: str, pictures: Sequence[Picture]) -> None:
    """Raises: UserError: a picture is to be learnt under the very prompt that is to stay as the base has it."""
    for picture in pictures:
        if picture.caption == prior_prompt.strip():
            raise UserError(
                f"--class_prompt is also the caption of {picture.name}: with --prior_source base_prediction the two "
                "work against each other; put a word for the subject into the caption or the --instance_prompt"
            )


def hold_to_base(micro_batch: TrainingMicroBatch) -> TrainingMicroBatch:
    """The same rows, their class rows with the base's prediction to be held to.

    Arguments:
        micro_batch: instance and class rows in turn; see `BatchMaker`, `prior_prompt`.
    """
    models = list(micro_batch.models.values())
    with only_base(models), no_dropout(models):
        predictions = micro_batch.predictions(_CLASS_ROWS)
    held = torch.zeros(micro_batch.batch.latents.shape, device=predictions.device)
    held[_CLASS_ROWS] = predictions
    return replace(micro_batch, batch=replace(micro_batch.batch, base_predictions=held))


@contextmanager
def only_base(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the models compute W0 alone, a DoRA's magnitudes out of play too. Not to be nested."""
    layers = [layer for model in models for _, layer in adapted_layers(model)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # all of them are active, and trained again
