"""Where an adversarial example may lie: a ball around the input, cut by the box of valid images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["Bounds", "Norm", "PerturbationSet"]

Norm = Literal["linf", "l2"]
Bounds = tuple[float | Tensor, float | Tensor] | None


class PerturbationSet:
    r"""All images within ``eps`` of ``inputs`` that lie in the box, and the operations that attacks need on them.

    .. math:: \{x' : \lVert x' - x \rVert_p \le \epsilon,\ lower \le x' \le upper\}

    Attacks move *coordinates* ``v``: the image itself, or with ``luminance_only`` the change ``(N, 1, H, W)`` of its
    luminance. In full-range YCbCr (ITU-R BT.601) ``R = Y + 1.402 Cr``, ``G = Y - 0.344 Cb - 0.714 Cr``,
    ``B = Y + 1.772 Cb``: changing Y alone adds the same number to R, G and B of a pixel and leaves Cb and Cr as they
    are. ``eps`` bounds the change in RGB: in ``linf`` that of Y is as large, in ``l2`` smaller by ``sqrt(3)``.

    Coordinates are float32 (float64 for float64 inputs) also where inputs are half precision; images handed to the
    network have the type of the inputs and are rounded toward the input, so that they stay in the set (in half
    precision the three channels of a luminance change then differ by a rounding).

    Args:
        inputs: images ``(N, ...)``, floating-point, inside the box.
        eps: radius in the units of the inputs, at least 0: a number, ``(N, 1, 1, 1)`` for one per image, or, in
            ``linf``, any shape that broadcasts to the inputs, such as ``(1, C, 1, 1)``.
        norm: ``"linf"`` (largest change of a value) or ``"l2"`` (Euclidean length over the image).
        bounds: lowest and highest valid value, numbers or ``(1, C, 1, 1)`` for inputs that were normalised outside of
            the network; None for no box.
        luminance_only: let all three channels of a pixel change by the same amount. RGB inputs only.

    Attributes:
        inputs: the images in the type of the coordinates.
        origin: coordinates of the inputs.
        lower: smallest allowed coordinates: of box and ``linf`` ball, or of the box alone in ``l2``.
        upper: largest allowed coordinates.
        box_lower: smallest coordinates of the box.
        box_upper: largest coordinates of the box.
        radius: ``eps`` in coordinates.
        unit: length in the image of a step of length 1 in coordinates.

    Raises:
        ValueError: for inputs that are not floating-point, not finite or outside of the box, a bad radius, or
            ``luminance_only`` with inputs that are not ``(N, 3, H, W)``.

    Example:
        >>> inputs = torch.tensor([[0.0, 0.5, 0.95]])
        >>> ball = PerturbationSet(inputs, 0.1)
        >>> ball.project(torch.tensor([[-1.0, 0.55, 2.0]]))
        tensor([[0.0000, 0.5500, 1.0000]])
    """

    @check_types
    def __init__(
        self,
        inputs: Tensor,
        eps: float | Tensor,
        *,
        norm: Norm = "linf",
        bounds: Bounds = (0.0, 1.0),
        luminance_only: bool = False,
    ) -> None:
        if norm not in ("linf", "l2"):
            raise ValueError(f'norm must be "linf" or "l2", got {norm!r}')
        low, high = _check_bounds(bounds)
        _check_inputs(inputs, low, high)
        self.per_channel = check_length("eps", eps, inputs)
        if norm == "l2" and self.per_channel:
            raise ValueError('eps must be one number per image with norm="l2"; radii per channel need norm="linf"')
        if luminance_only:
            if inputs.ndim != 4 or inputs.shape[1] != 3:
                raise ValueError(f"luminance_only needs RGB inputs (N, 3, H, W), found shape {tuple(inputs.shape)}")
            if self.per_channel or isinstance(low, Tensor) or isinstance(high, Tensor):
                raise ValueError(
                    "luminance_only needs one eps and one pair of bounds for all channels; normalise inside the network"
                )
        self._build(inputs, eps, norm, low, high, luminance_only)

    def _build(
        self,
        inputs: Tensor,
        eps: float | Tensor,
        norm: Norm,
        low: float | Tensor,
        high: float | Tensor,
        luminance_only: bool,
    ) -> None:
        self.dtype = inputs.dtype
        self.norm, self.luminance_only = norm, luminance_only
        self._given = inputs, eps, low, high
        x = self.inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        eps, low, high = (_like(value, x) for value in (eps, low, high))
        self._low, self._high = low, high
        self.unit = math.sqrt(3.0) if luminance_only and norm == "l2" else 1.0
        self.radius: float | Tensor = eps / self.unit
        self.origin = torch.zeros_like(x[:, :1]) if luminance_only else x
        if luminance_only:
            self.box_lower = low - x.amin(1, keepdim=True)
            self.box_upper = high - x.amax(1, keepdim=True)
        else:
            self.box_lower, self.box_upper = torch.zeros_like(x) + low, torch.zeros_like(x) + high
        self.lower, self.upper = self.box_lower, self.box_upper
        if norm == "linf":
            self.lower = torch.maximum(self.origin - self.radius, self.box_lower)
            self.upper = torch.minimum(self.origin + self.radius, self.box_upper)

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, index: Tensor) -> PerturbationSet:
        """Return the set of some of the images."""
        inputs, eps, low, high = self._given
        if isinstance(eps, Tensor) and eps.ndim == inputs.ndim and len(eps) == len(inputs):
            eps = eps[index]
        part = object.__new__(PerturbationSet)
        part.per_channel = self.per_channel
        part._build(inputs[index], eps, self.norm, low, high, self.luminance_only)
        return part

    def repeat(self, times: int) -> PerturbationSet:
        """Return the set of ``times`` copies of the images, one after the other."""
        return self.rows(torch.arange(len(self), device=self.inputs.device).repeat(times))

    def image(self, coordinates: Tensor) -> Tensor:
        """Return the images at the coordinates, in the type of the inputs and inside the box."""
        x = self.inputs
        values = coordinates
        if self.luminance_only:
            values = torch.clamp(x + coordinates, self._low, self._high)  # type: ignore[arg-type]
        if values.dtype == self.dtype:
            return values
        rounded = values.to(self.dtype)
        too_far = (rounded - x).abs() > (values - x).abs()
        return torch.where(too_far, torch.nextafter(rounded, x.to(self.dtype)), rounded)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to the coordinates, given the one with respect to the image."""
        gradient = gradient.to(self.inputs.dtype)
        return gradient.sum(1, keepdim=True) if self.luminance_only else gradient

    def project(self, coordinates: Tensor) -> Tensor:
        """Return the coordinates moved into the set: shrunk toward the origin in ``l2``, then clipped."""
        if self.norm == "l2":
            change = coordinates - self.origin
            coordinates = self.origin + change * (self.radius / norm_of(change, "l2").clamp_min(1e-30)).clamp(max=1.0)
        return torch.clamp(coordinates, self.lower, self.upper)

    def ascend(self, coordinates: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """Return the coordinates after a step of this length along the gradient's steepest direction, not projected.

        A gradient of zero leaves its image where it is, however small another one is; lengths are those in the image.
        """
        if self.norm == "linf":
            return coordinates + step * gradient.sign()
        return coordinates + (step / self.unit) * direction_of(gradient)

    def boundary(self, noise: Tensor, size: float | Tensor = 1.0) -> Tensor:
        """Return the coordinates at ``size`` radii from the origin in the direction of the noise, projected."""
        length = norm_of(noise, self.norm).clamp_min(1e-30)
        return self.project(self.origin + (self.radius * size) * (noise / length))

    def distance(self, coordinates: Tensor) -> Tensor:
        """Return the distances ``(N,)`` of the coordinates from the origin, in the units of ``radius``."""
        return norm_of(coordinates - self.origin, self.norm).flatten()

    def draw(self, generator: torch.Generator, *, normal: bool = False) -> Tensor:
        """Return noise of the coordinates' shape: uniform in [0, 1), or standard normal.

        The numbers do not depend on the memory format, and depend on the device only through the generator's.
        """
        sample = torch.randn if normal else torch.rand
        noise = sample(self.origin.shape, generator=generator, device=generator.device, dtype=self.origin.dtype)
        return torch.empty_like(self.origin).copy_(noise)


def norm_of(change: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each row, with the other dimensions kept at size 1."""
    dims = tuple(range(1, change.ndim))
    length: Tensor = torch.linalg.vector_norm(change, math.inf if norm == "linf" else 2, dim=dims, keepdim=True)
    return length


def direction_of(gradient: Tensor) -> Tensor:
    """Return gradients of Euclidean length 1; zero, infinite and undefined ones become zero.

    Dividing by the largest entry first keeps tiny gradients, whose squares would vanish in float32.
    """
    peak = norm_of(gradient, "linf")
    usable = (peak > 0) & peak.isfinite()
    scaled = gradient / torch.where(usable, peak, torch.ones_like(peak))
    return torch.where(usable, scaled / norm_of(scaled, "l2").clamp_min(1.0), torch.zeros_like(scaled))


def check_length(name: str, length: float | Tensor, inputs: Tensor) -> bool:
    """Check a radius or step size; return whether it differs within an image.

    Raises:
        ValueError: if it is negative, not finite, or does not broadcast.
    """
    if not isinstance(length, Tensor):
        if not (length >= 0 and math.isfinite(length)):
            raise ValueError(f"{name} must be a finite number of at least 0, got {length!r}")
        return False
    shape = tuple(length.shape)
    if length.ndim not in (0, inputs.ndim) or any(
        size not in (1, of) for size, of in zip(shape, inputs.shape, strict=False)
    ):
        raise ValueError(
            f"{name} must be a number or broadcast to the inputs, such as (N, 1, 1, 1) or (1, C, 1, 1); found shape "
            f"{shape} for inputs {tuple(inputs.shape)}"
        )
    if not bool(((length >= 0) & length.isfinite()).all()):
        raise ValueError(f"{name} must hold finite numbers of at least 0, got {length.flatten()[:8].tolist()}")
    return any(size != 1 for size in shape[1:])


def _check_bounds(bounds: Bounds) -> tuple[float | Tensor, float | Tensor]:
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if not bool(torch.as_tensor(low <= high).all()):
        raise ValueError(f"bounds must be (lowest, highest) valid value, got {bounds!r}")
    return low, high


def _check_inputs(inputs: Tensor, low: float | Tensor, high: float | Tensor) -> None:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs must be a floating-point tensor, found {found}; divide 8-bit images by 255")
    if inputs.ndim < 2:
        raise ValueError(f"inputs must have a batch dimension (N, ...), found shape {tuple(inputs.shape)}")
    if inputs.numel() == 0:
        return
    low, high = _like(low, inputs), _like(high, inputs)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        smallest, largest = (float(value) for value in inputs.aminmax())
        if smallest >= low and largest <= high and math.isfinite(smallest) and math.isfinite(largest):
            return
    elif bool(((inputs >= low) & (inputs <= high) & inputs.isfinite()).all()):
        return
    if not bool(inputs.isfinite().all()):
        raise ValueError("inputs must be finite, found NaN or infinite values; drop these images")
    raise ValueError(
        f"inputs must lie inside bounds {_show(low)} to {_show(high)}, found {float(inputs.min()):.6g} to "
        f"{float(inputs.max()):.6g}; clamp them, or move the normalisation into the network, or pass bounds="
    )


def _like(value: float | Tensor, inputs: Tensor) -> float | Tensor:
    """Move a tensor to the device and type of the inputs; a number stays a number."""
    return value.to(inputs) if isinstance(value, Tensor) else float(value)


def _show(value: float | Tensor) -> str:
    return f"{value:.6g}" if not isinstance(value, Tensor) else str(value.flatten().tolist())
