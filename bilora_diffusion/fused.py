"""A linear layer and all its adapters in three matrix products forward, however many adapters there are.

    h = x [A1; A2]'                       (rows, r1 + r2)
    y = x W0' + b + s h [B1, B2]'         added into the base's result in place

and, for the gradient g of y, with one product added into another again:

    gh = s g [B1, B2],   gx = g W0 + gh [A1; A2],   [gA1; gA2] = gh' x,   [gB1, gB2] = s g' h

With dropout each adapter has its own x, so a product down for each; of what it drew a byte an element is kept, where
peft's layers keep the dropped x too.

The factors are joined for all layers at once where a pass says so (`AllFactors`), else layer by layer; see `joined`.

peft adds one adapter after another: each reads x, writes a whole y, and does both again in the backward pass. The
factors stay peft's own parameters; only the layer's forward is another. benchmarks/speed measures what it saves.

A perturbation of the weight costs no product either: the layer computes with W0 + N, which is made for each pass anew.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bilora_diffusion.joined import Joined, Joiner, LayerFactors, join
from bilora_diffusion.stored_linear import StoredLinear, StoredWeight, compute_dtype

__all__ = ["AllFactors", "FusedLinear", "Perturbation", "fuse", "tap", "unfuse"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Perturbation(Protocol):
    """N, added to the weight of one layer in each of its passes."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W0 + N)^T + b, (rows, in) -> (rows, out) in the precision of x; the same N at each call."""
        ...

    def backward(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """g (W0 + N), (rows, out) -> (rows, in), with the same N."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """x N^T alone, (..., in) -> (..., out), with a gradient for x."""
        ...


class FusedLinear(Linear):
    """peft's linear layer, computed as above where that is the same thing, and by peft where it is not.

    By peft: DoRA and peft's other variants, merged or disabled adapters, adapters chosen for each row, a base
    that is quantised by others, trained, hooked or on another device, and a precision that peft would convert on the
    way. A `StoredLinear` is restored in each pass.

    Attributes:
        perturbation: of the base's weight, None for none.
        on_gradient: called in the backward pass with the input as rows (rows, in) and the gradient of the output (rows,
            out), both as the products have them; None for none.
    """

    perturbation: Perturbation | None = None
    on_gradient: Callable[[Tensor, Tensor], None] | None = None
    _ready: tuple[list[str], Joined] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), in the precision that peft's forward gives."""
        dtype = compute_dtype(x)
        ready = self._ready
        if ready is None or ready[1].down.dtype != dtype or args or kwargs:
            autocast = torch.is_autocast_enabled(x.device.type)
            names = None if args or kwargs or dtype is None else self._stackable(x.device, dtype, autocast)
            if not names:
                y = super().forward(x, *args, **kwargs)
                y = y if self.perturbation is None else y + self.perturbation.product(x.to(y.dtype))
                return y if self.on_gradient is None else tap(x, y, self.on_gradient)
            ready = names, join(self._factors(names), dtype)
        names, joined = ready
        chances = [_chance(self.lora_dropout[name]) for name in names]
        base = self.base_layer
        weight = base.stored if isinstance(base, StoredLinear) else base.weight
        own = self.perturbation, self.on_gradient
        return _Stacked.apply(x.to(dtype), weight, base.bias, *own, joined.scale, joined.ranks, chances, *joined[:2])

    def _stackable(self, device: torch.device, dtype: torch.dtype, autocast: bool) -> list[str] | None:
        """The adapters that add something, None where peft's own forward is needed."""
        if self._disable_adapters or self.merged_adapters or not _is_plain(self.base_layer, device):
            return None
        names = [name for name in self.active_adapters if name in self.lora_A and self.scaling[name] != 0]
        if not all(self._is_vanilla(name) for name in names):
            return None
        dtypes = {factors[name].weight.dtype for name in names for factors in (self.lora_A, self.lora_B)}
        converts = dtypes != {dtype} and not autocast
        return None if converts or len(dtypes) > 1 else names

    def _is_vanilla(self, name: str) -> bool:
        drops_elements = type(self.lora_dropout[name]) in (nn.Identity, nn.Dropout)
        return name not in self.lora_variant and self.lora_B[name].bias is None and drops_elements

    def _factors(self, names: list[str]) -> LayerFactors:
        return [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in names]


class AllFactors:
    """The factors of all fused layers of some models, for passes in which they stay as they are.

    Arguments:
        models: all adapters attached.
    """

    MOST = 16
    """States that are remembered: what is on and what is trained differs between a method's passes."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._layers = [layer for model in models for layer in _layers(model, FusedLinear)]
        self._factors = [
            factor.weight for layer in self._layers for some in (layer.lora_A, layer.lora_B) for factor in some.values()
        ]
        self._plans: dict[Hashable, tuple[list[tuple[FusedLinear, list[str]]], Joiner]] = {}

    @contextmanager
    def joined(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, the layers find their factors joined: for a forward pass, and for its backward pass, in which
        gradient checkpointing computes it again. Neither the factors nor which of them are on may change meanwhile.

        Arguments:
            dtype: of the products; where it is a half precision, the passes are autocast's.
        """
        state = (dtype, *self._state())
        if state not in self._plans:
            if len(self._plans) == self.MOST:
                self._plans.clear()
            self._plans[state] = self._plan(dtype)
        layers, joiner = self._plans[state]
        try:
            for (layer, names), factors in zip(layers, joiner.join(dtype), strict=True):
                vars(layer)["_ready"] = names, factors  # not by nn.Module, which looks at what it is
            yield
        finally:
            for layer, _ in layers:
                vars(layer).pop("_ready", None)

    def _state(self) -> Iterator[Hashable]:
        """All that a plan depends on and that may be another in another pass.

        Looked up without the modules' own attributes and properties, which would take ten times as long: there are
        hundreds of layers, and the device waits meanwhile.
        """
        for layer in self._layers:
            own = vars(layer)
            base = own["_modules"]["base_layer"]
            of_base = vars(base)
            active = own["_active_adapter"]
            yield (
                type(layer),
                own["_disable_adapters"],
                active if isinstance(active, str) else tuple(active),
                *own["merged_adapters"],
                *own["scaling"].values(),
                base,
                "forward" in of_base or bool(of_base["_forward_hooks"] or of_base["_forward_pre_hooks"]),
                *[one.requires_grad for one in of_base["_parameters"].values() if one is not None],
            )
        for factor in self._factors:
            yield factor.requires_grad
            yield factor.dtype

    def _plan(self, dtype: torch.dtype) -> tuple[list[tuple[FusedLinear, list[str]]], Joiner]:
        """The layers that compute in the fused way now, with their adapters that add something."""
        layers = []
        for layer in self._layers:
            if type(layer) is FusedLinear:  # not peft's again
                device = next(iter(layer.lora_A.values())).weight.device
                names = layer._stackable(device, dtype, autocast=dtype.itemsize == 2)
                if names:
                    layers.append((layer, names))
        return layers, Joiner([layer._factors(names) for layer, names in layers])


def fuse(model: nn.Module) -> None:
    """Lets all linear layers with peft adapters compute in this way; those of other kinds are left as they are."""
    for layer in _layers(model, Linear):
        layer.__class__ = FusedLinear


def unfuse(model: nn.Module) -> None:
    """The layers are peft's again, to compare."""
    for layer in _layers(model, FusedLinear):
        layer.__class__ = Linear


def _layers(model: nn.Module, kind: type) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module) is kind)


def _is_plain(base: nn.Module, device: torch.device) -> bool:
    """A frozen `nn.Linear` or `StoredLinear` and nothing else: no hook that means to see or change a call."""
    if type(base) not in (nn.Linear, StoredLinear) or "forward" in vars(base):
        return False
    if base._forward_hooks or base._forward_pre_hooks:
        return False
    return all(
        type(tensor) is nn.Parameter and tensor.dtype in FLOATS and not tensor.requires_grad and tensor.device == device
        for tensor in base.parameters(recurse=False)
    )


def _chance(dropout: nn.Module) -> float:
    """That an element is dropped now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class _Stacked(torch.autograd.Function):
    """x (W0 + N)' + b + scale sum over adapters of up down d(x), d its dropout; the base has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | StoredWeight,
        bias: Tensor | None,
        perturbation: Perturbation | None,
        on_gradient: Callable[[Tensor, Tensor], None] | None,
        scale: float,
        ranks: tuple[int, ...],
        chances: list[float],
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if any(chances):
            shown = [_dropped(rows, chance) for chance in chances]
            h = _cat([x @ one.mT for (x, _), one in zip(shown, down.split(ranks), strict=True)], 1)
            masks = [mask for _, mask in shown]
        else:
            h, masks = rows @ down.mT, []
        if perturbation is None:
            y = nn.functional.linear(rows, _whole(weight, x.dtype), bias)
        else:
            y = perturbation.linear(rows, _unrounded(weight, x.dtype), bias)
        y.addmm_(h, up.mT, alpha=scale)
        is_stored = not isinstance(weight, Tensor)
        ctx.save_for_backward(rows, h, None if is_stored else weight, down, up, *masks)
        ctx.stored = weight if is_stored else None
        ctx.on_gradient, ctx.perturbation = on_gradient, perturbation
        ctx.scale, ctx.shape, ctx.ranks, ctx.chances = scale, x.shape, ranks, chances
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, weight, down, up, *masks = ctx.saved_tensors
        of_x, of_down, of_up = ctx.needs_input_grad[0], *ctx.needs_input_grad[-2:]
        weight = ctx.stored if weight is None else weight
        g = gradient.reshape(-1, gradient.shape[-1])
        if ctx.on_gradient is not None:
            ctx.on_gradient(rows, g)
        gx = gdown = gup = None
        if of_x or of_down:
            gh = g @ up
            if ctx.scale != 1:
                gh *= ctx.scale
            pieces = []
            if masks:  # what stays counts for what is dropped: in the few columns here, not in the many of the rows
                of_each = zip(gh.split(ctx.ranks, 1), ctx.chances, strict=True)
                pieces = [piece / (1 - chance) for piece, chance in of_each]
            if of_x:
                if ctx.perturbation is None:
                    gx = g @ _whole(weight, g.dtype)
                else:
                    gx = ctx.perturbation.backward(g, _unrounded(weight, g.dtype))
                if masks:
                    for piece, one, mask in zip(pieces, down.split(ctx.ranks), masks, strict=True):
                        gx += _shown(piece @ one, mask)
                else:
                    gx.addmm_(gh, down)
                gx = gx.view(ctx.shape)
            if of_down and masks:
                gdown = _cat([piece.mT @ _shown(rows, mask) for piece, mask in zip(pieces, masks, strict=True)], 0)
            elif of_down:
                gdown = gh.mT @ rows
        if of_up:
            gup = g.mT @ h
            if ctx.scale != 1:
                gup *= ctx.scale
        return gx, *[None] * 7, gdown, gup


def _dropped(rows: Tensor, chance: float) -> tuple[Tensor, Tensor | None]:
    """As `nn.Dropout`, from the same random numbers; and which elements stay, None for all."""
    return torch.native_dropout(rows, chance, True) if chance else (rows, None)


def _shown(rows: Tensor, stays: Tensor | None) -> Tensor:
    return rows if stays is None else rows * stays


def tap(x: Tensor, y: Tensor, on_gradient: Callable[[Tensor, Tensor], None]) -> Tensor:
    """y itself, whose gradient is shown beside x on the way back."""
    return _Tap.apply(x, y, on_gradient)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, on_gradient: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)  # not kept by `on_gradient`: under gradient checkpointing it is computed again
        ctx.on_gradient = on_gradient
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.on_gradient(x, gradient)
        return None, gradient, None


def _whole(weight: Tensor | StoredWeight, dtype: torch.dtype) -> Tensor:
    return _unrounded(weight, dtype).to(dtype)


def _unrounded(weight: Tensor | StoredWeight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.restored(dtype)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
