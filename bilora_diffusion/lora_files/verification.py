"""Proof that a written LoRA file is the model that was trained, taken through the loader a user will use.

The order is: `record_trained` while the adapters are attached and the auxiliary is off; `strip_adapters` on
each part, which leaves the bare base; `verify_file` for each file, which loads it with
`pipeline.load_lora_weights` into that same base, compares, and unloads. Three comparisons, because each sees
what the others miss:

- the file's tensors with the recorded ones, name by name and bit by bit: loaders pass over a key that is
  missing or that they do not know;
- every loaded layer's A, B and scale with the recorded ones: a wrong strength or a layer in the wrong place;
- the outputs of the UNet and the text encoders on fixed inputs: anything else between file and picture.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, adapted_layers
from bilora_diffusion.lora_files.difference import file_factors
from bilora_diffusion.lora_files.diffusers_format import portable_name
from bilora_diffusion.lora_files.kohya import has_kohya_keys, kohya_tensors
from bilora_diffusion.lora_files.outputs import PARTS, Outputs, base_dtype, compare_outputs, record_outputs

__all__ = [
    "TOLERANCES",
    "LayerRecord",
    "TrainedRecord",
    "Verification",
    "VerificationError",
    "record_trained",
    "strip_adapters",
    "verify_file",
]

TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative L2 difference of an output that is put down to arithmetic, by the dtype of the part's base.

Seen on a CPU, on the tiny SDXL, whose adapters changed the outputs by 0.01 to 0.2: exactly 0 in float32, up
to 1.8e-3 in float16 and 1.3e-2 in bfloat16, where the loader rounds the adapters to the base's dtype and all
sums round anew; on SDXL's full size with random weights, 1.6e-2 in bfloat16. A file of lower precision than
the base adds its own rounding, seen to be 0.5 eps times the adapters' effect.
"""
FILE_ROUNDINGS = 4.0  # eight times what was seen

COMPLAINTS = (
    "unexpected",
    "missing",
    "no lora keys",
    "not compatible",
)  # in lower case, in a loader's warning


@dataclass(frozen=True)
class LayerRecord:
    """One layer's primary adapter as files hold it: tensors in their own dtype on the CPU.

    Arguments:
        A: (r, in) or (r, in, k, k).
        B: (out, r) or (out, r, 1, 1).
        scale: the factor on B A, alpha / r.
        magnitude: (out,) for DoRA, otherwise None.
    """

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class TrainedRecord:
    """The trained model as far as a file can be held against it.

    Arguments:
        layers: part -> module path as files spell it -> its adapter.
        outputs: of all parts, the adapted and the others.
    """

    layers: Mapping[str, Mapping[str, LayerRecord]]
    outputs: Outputs


@dataclass(frozen=True)
class Verification:
    """What was found for a file that passed.

    Arguments:
        file: its name, without the folder.
        layout: `diffusers` or `kohya`.
        layers: how many adapted layers it holds.
        differences: output -> relative L2 difference between the trained model and the loaded file.
        effects: output -> relative L2 difference between the trained model and the bare base, to read the
            differences by: a difference as large as the effect would prove nothing.
        tolerances: output -> what its difference was allowed to be.
    """

    file: str
    layout: str
    layers: int
    differences: Mapping[str, float]
    effects: Mapping[str, float]
    tolerances: Mapping[str, float]


@dataclass(eq=False)
class VerificationError(Exception):
    """A written file is not the trained model.

    The lists name keys as the file spells them, and layers by their path in the model.

    Arguments:
        file: its name, without the folder.
        missing: tensors or layers that were trained and are not in the file or not loaded from it.
        unexpected: tensors or layers in the file that were not trained.
        different: tensors whose values differ.
        wrong_scale: alphas and layers with another strength than the trained.
        outputs: outputs that differ by more than the tolerance, with both numbers.
        messages: the loader's exception or warnings.
    """

    file: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    wrong_scale: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = [
            f"{kind}: {_shortened(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("different values", self.different),
                ("wrong scale", self.wrong_scale),
                ("different outputs", self.outputs),
                ("the loader says", self.messages),
            )
            if names
        ]
        return f"{self.file} does not hold the trained model; " + "; ".join(found)

    @property
    def found_any(self) -> bool:
        """Whether there is anything to report."""
        return any((self.missing, self.unexpected, self.different, self.wrong_scale, self.outputs, self.messages))


def record_trained(models: Mapping[str, nn.Module]) -> TrainedRecord:
    """Records the primary adapter of every layer, and the outputs of every part.

    Arguments:
        models: part -> model, all parts of the pipeline that are in memory, out of any wrapper. Adapters may
            be missing from some; where they are, the auxiliary is off (`adapters.auxiliary_off`).

    Raises:
        ValueError: the auxiliary is on, and the outputs would not be those of the exported model.
    """
    for part, model in models.items():
        if any(layer.scaling.get(AUXILIARY) for _, layer in adapted_layers(model)):
            raise ValueError(f"the auxiliary adapter of the {part} is on: record inside auxiliary_off")
    layers = {part: records for part, model in models.items() if (records := _layer_records(part, model, PRIMARY))}
    return TrainedRecord(layers, record_outputs(models))


def strip_adapters(model: nn.Module) -> None:
    """Removes every adapter and its wrappers: the base is left with its own modules, weights and names."""
    recurse_remove_peft_layers(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    # Both diffusers and transformers ask this flag whether adapter names are taken.
    model._hf_peft_config_loaded = False
    left = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if left:
        raise RuntimeError(f"adapters could not be removed from {_shortened(left)}")


def verify_file(
    path: str | os.PathLike[str],
    pipeline: Any,
    trained: TrainedRecord,
    tolerance: float | None = None,
    base_outputs: Outputs | None = None,
) -> Verification:
    """Loads a LoRA file as a user would, holds it against the trained model, and leaves the pipeline bare.

    Arguments:
        path: a file of `save_diffusers` or `save_kohya`.
        pipeline: an SDXL pipeline around the stripped base; text encoders that were not trained may be None.
        trained: from `record_trained`, before the stripping.
        tolerance: relative L2 difference allowed to every output, None = by precision, see `TOLERANCES`.
        base_outputs: `record_outputs` of the stripped parts, None = computed here.

    Raises:
        VerificationError: the file and the trained model differ; the keys are named.
    """
    models = {part: getattr(pipeline, part) for part in PARTS if getattr(pipeline, part, None) is not None}
    absent = set(trained.layers) - set(models)
    if absent:
        raise ValueError(f"the pipeline lacks a part that was trained: {', '.join(sorted(absent))}")
    errors = VerificationError(Path(path).name)
    try:
        layout, file_dtype = _compare_tensors(Path(path), trained, getattr(pipeline.unet, "config", None), errors)
    except (safetensors.SafetensorError, OSError) as error:
        errors.messages.append(f"{type(error).__name__}: {error}")
        raise errors from error
    base_outputs = record_outputs(models) if base_outputs is None else base_outputs
    effects = compare_outputs(base_outputs, trained.outputs)
    tolerances = {
        name: _tolerance(base_dtype(models[name.split(".")[0]]), file_dtype, effect) if tolerance is None else tolerance
        for name, effect in effects.items()
    }
    differences: dict[str, float] = {}
    try:
        with _loader_messages() as messages:
            pipeline.load_lora_weights(str(path))
        errors.messages += _complaints(messages, trained)
        _compare_layers(models, trained, file_dtype, errors)
        differences = compare_outputs(record_outputs(models), trained.outputs)
        errors.outputs += [
            f"{name} ({difference:.2e}, allowed {tolerances[name]:.0e})"
            for name, difference in differences.items()
            if not difference <= tolerances[name]
        ]
    except Exception as error:
        # Whatever a loader raises on a file it cannot read: the tensor lists say why better than its words.
        errors.messages.append(f"{type(error).__name__}: {error}")
    finally:
        for model in models.values():
            strip_adapters(model)
    if errors.found_any:
        raise errors
    layers = sum(map(len, trained.layers.values()))
    return Verification(errors.file, layout, layers, differences, effects, tolerances)


def _tolerance(dtype: torch.dtype, file_dtype: torch.dtype, effect: float) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32]) + FILE_ROUNDINGS * torch.finfo(file_dtype).eps * min(
        effect, 1.0
    )


def _layer_records(part: str, model: nn.Module, adapter: str | None) -> dict[str, LayerRecord]:
    """The adapter of every layer; `adapter` None = the only one there is."""
    records = {}
    for name, layer in adapted_layers(model):
        if adapter is None:
            (loaded,) = layer.lora_A
        elif adapter in layer.lora_A:
            loaded = adapter
        else:
            continue
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        A, B = file_factors(layer, loaded)
        records[portable_name(part, name)] = LayerRecord(
            A=A,
            B=B,
            scale=float(layer.scaling[loaded]),
            magnitude=_copy(magnitudes[loaded].weight) if loaded in magnitudes else None,
        )
    return records


def _compare_tensors(
    path: Path, trained: TrainedRecord, unet_config: Mapping | None, errors: VerificationError
) -> tuple[str, torch.dtype]:
    """Holds the file's tensors against the recorded ones, rounded as they are; gives its layout and dtype."""
    found = safetensors.torch.load_file(path)
    kohya = has_kohya_keys(list(found))
    expected = _expected_tensors(trained, unet_config, kohya)
    errors.missing += sorted(expected.keys() - found.keys())
    errors.unexpected += sorted(found.keys() - expected.keys())
    for name in sorted(expected.keys() & found.keys()):
        if not torch.equal(found[name], expected[name].to(found[name].dtype)):
            (errors.wrong_scale if name.endswith(".alpha") else errors.different).append(name)
    dtypes = {tensor.dtype for name, tensor in found.items() if not name.endswith(".alpha")}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return ("kohya" if kohya else "diffusers"), coarsest


def _expected_tensors(trained: TrainedRecord, unet_config: Mapping | None, kohya: bool) -> dict[str, Tensor]:
    expected: dict[str, Tensor] = {}
    for part, records in trained.layers.items():
        layers: dict[str, Tensor] = {}
        for name, record in records.items():
            layers |= {f"{name}.lora_A.weight": record.A, f"{name}.lora_B.weight": record.B}
            if record.magnitude is not None:
                layers[f"{name}.lora_magnitude_vector.weight"] = record.magnitude
        if kohya:
            alphas = {name: record.scale * record.rank for name, record in records.items()}
            expected |= kohya_tensors(part, layers, alphas, config=unet_config)
        else:
            expected |= {f"{part}.{name}": tensor for name, tensor in layers.items()}
    return expected


def _compare_layers(
    models: Mapping[str, nn.Module],
    trained: TrainedRecord,
    file_dtype: torch.dtype,
    errors: VerificationError,
) -> None:
    """Holds what the loader made against the recorded layers."""
    for part, model in models.items():
        loaded = _layer_records(part, model, None)
        records = trained.layers.get(part, {})
        errors.missing += [f"{part}.{name} (not loaded)" for name in sorted(records.keys() - loaded.keys())]
        errors.unexpected += [f"{part}.{name} (loaded)" for name in sorted(loaded.keys() - records.keys())]
        for name in sorted(records.keys() & loaded.keys()):
            wanted, got = records[name], loaded[name]
            if abs(got.scale - wanted.scale) > 1e-6 * abs(wanted.scale):
                errors.wrong_scale.append(f"{part}.{name} ({got.scale:g}, trained {wanted.scale:g})")
            pairs = {
                "A": (got.A, wanted.A),
                "B": (got.B, wanted.B),
                "magnitude": (got.magnitude, wanted.magnitude),
            }
            errors.different += [
                f"{part}.{name} ({kind} as loaded)"
                for kind, (value, reference) in pairs.items()
                if not _equal_after_rounding(value, reference, file_dtype)
            ]


def _equal_after_rounding(value: Tensor | None, reference: Tensor | None, file_dtype: torch.dtype) -> bool:
    """Whether a loaded tensor is the recorded one, rounded to the file's dtype and then to the loader's.

    diffusers casts adapters to the base's dtype; that rounding is as exact to repeat as the file's.
    """
    if value is None or reference is None:
        return value is None and reference is None
    return torch.equal(value, reference.to(file_dtype).to(value.dtype))


def _complaints(messages: Sequence[str], trained: TrainedRecord) -> list[str]:
    """The loader's warnings of a loss. "No LoRA keys ..." is right for a part that was not trained."""
    untrained = [f"found with the prefix='{part}'." for part in PARTS if part not in trained.layers]
    return [
        " ".join(message.split())
        for message in messages
        if any(word in message.lower() for word in COMPLAINTS) and not any(prefix in message for prefix in untrained)
    ]


@contextmanager
def _loader_messages() -> Iterator[list[str]]:
    """Collects what diffusers, transformers and peft warn of inside instead of printing it; no bars."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    bars_shown = is_progress_bar_enabled()
    try:
        disable_progress_bar()
        for logger in loggers:
            # Also where the run silenced them: on all ranks but the first, for example.
            logger.handlers, logger.propagate = [Collector(logging.WARNING)], False
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
        messages += [str(warning.message) for warning in caught]
    finally:
        if bars_shown:
            enable_progress_bar()
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _shortened(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
