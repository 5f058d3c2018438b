"""AutoAttack: a cascade of attacks without settings, each on the images that withstood those before it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.files import write_atomically
from lightning_plugins.robustness.apgd import NEEDED_CLASSES, Search, run_apgd
from lightning_plugins.robustness.attack import (
    MANY_ZEROS,
    AttackResult,
    LogitsFn,
    Network,
    attacking,
    check_targets,
    make_space,
    private_generator,
)
from lightning_plugins.robustness.fab import run_fab
from lightning_plugins.robustness.perturbation import Bounds, Norm
from lightning_plugins.robustness.square import check_images, run_square

__all__ = ["AutoAttackResult", "AutoAttackSummary", "auto_attack", "auto_attack_dataset"]

Version = Literal["standard", "plus", "rand", "quick"]

_VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "quick": ("apgd-t",),
}
_RESTARTS = {"apgd-ce": 5, "apgd-dlr": 5, "fab": 5}  # of "plus"
_NUM_TARGETS = 9
_RAND_SAMPLES = 20
_RANDOM_REPEATS = 5
_RANDOM_DISTANCE = 1e-4
_MASKED_SHARE = 0.002
_PRIME = 1_000_003


@dataclass(frozen=True)
class AutoAttackResult(AttackResult):
    """What the cascade found: an `AttackResult`, and which attack broke which image.

    Attributes:
        broken_by: ``(N,)`` int64: -1 for a robust image, 0 for one that was misclassified before, else the number of
            the attack that broke it, from 1.
        components: names of the attacks, in order.
    """

    broken_by: Tensor
    components: tuple[str, ...]

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy in [0, 1] on the clean images (``"clean"``) and after each attack."""
        return _accuracies(self.broken_by, self.components)


@dataclass(frozen=True)
class AutoAttackSummary:
    """The cascade's result over a data set.

    Attributes:
        broken_by: ``(N,)`` int64, see `AutoAttackResult`.
        components: names of the attacks, in order.
        num_gradients: passes forward and backward to the input.
        num_forwards: all forward passes.
    """

    broken_by: Tensor
    components: tuple[str, ...]
    num_gradients: int
    num_forwards: int

    @property
    def success(self) -> Tensor:
        """``(N,)`` booleans: the image is misclassified, before or after the attacks."""
        return self.broken_by >= 0

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy in [0, 1] on the clean images (``"clean"``) and after each attack."""
        return _accuracies(self.broken_by, self.components)

    @property
    def robust_accuracy(self) -> float:
        """Share of the images that withstood everything."""
        return float((self.broken_by < 0).double().mean())


@check_types
def auto_attack(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    version: Version = "standard",
    num_steps: int = 100,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    sanity_checks: bool = True,
    generator: torch.Generator | None = None,
) -> AutoAttackResult:
    """Attack with an ensemble that needs no tuning; an image is robust if it withstands every part.

    - ``"standard"``: APGD on the cross-entropy, targeted APGD and targeted FAB (9 classes each), Square.
    - ``"plus"``: APGD on the cross-entropy and on the DLR loss and FAB, 5 restarts each; Square, targeted APGD, FAB.
    - ``"rand"``: for networks that are random themselves: both APGDs, with gradients averaged over 20 passes.
    - ``"quick"``: targeted APGD alone, mostly within a point of ``"standard"`` at a fraction of its cost; not a
      number to compare with published ones.

    The targeted DLR loss needs four classes and the plain one three; with fewer, the margin ``o_t - o_y`` takes their
    place. Each part draws from a generator of its own. A module is attacked in evaluation mode and left as it was; the
    caller's autocast is switched off.

    Args:
        logits_fn: from images to logits ``(N, C)``.
        inputs: images ``(N, C, H, W)`` inside ``bounds``, floating-point.
        targets: true classes ``(N,)``, int64.
        eps: radius in the units of the inputs: a number or ``(N, 1, 1, 1)``.
        norm: ``"linf"`` or ``"l2"``.
        version: see above.
        num_steps: of APGD and FAB; the published evaluation uses 100.
        num_queries: of Square; the published evaluation uses 5000.
        bounds: lowest and highest valid value; None for none.
        luminance_only: change only the luminance of RGB images; see `PerturbationSet`.
        sanity_checks: look for the signs of a misleading evaluation, at the cost of six forward passes.
        generator: its next number seeds all parts. Default: one seeded with 0.

    Returns:
        The cascade's result; ``adversarial`` is the input where ``success`` is False.

    Raises:
        ValueError: for an argument out of range, inputs that are not images inside ``bounds``, or ``"rand"`` for a
            network that is not random, which it would attack less well than the others.

    Warns:
        UserWarning: if the outputs look like probabilities, differ from call to call, or are computed with gradients
            inside the network; if many gradients of the cross-entropy are zero; or if Square breaks images that
            gradient attacks did not (more than 0.2 % of all and more than one). Robustness is then likely overstated.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        >>> images = torch.rand(8, 1, 4, 4)
        >>> result = auto_attack(net, images, net(images).argmax(1), eps=0.05, num_steps=10, num_queries=50)
        >>> list(result.accuracies)
        ['clean', 'apgd-ce', 'apgd-t', 'fab-t', 'square']

    Reference:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", ICML 2020.
    """
    _check_settings(version, num_steps, num_queries)
    seed = _next_seed(private_generator(generator))
    with attacking(logits_fn, inputs, full_precision=True) as network:
        space = make_space(inputs, eps, norm, bounds, luminance_only)
        targets = check_targets("targets", targets, space.inputs)
        if "square" in _VERSIONS[version]:
            check_images(space)
        search = Search(network, space, targets, _RAND_SAMPLES if version == "rand" else 1)
        cascade = _Cascade(search, version, num_steps, num_queries, seed)
        if sanity_checks and len(space):
            _check_network(network, space.image(space.origin), version)
        cascade.run(lambda component: None)
        if sanity_checks:
            _warn_of_zeros(cascade.zeros)
            _warn_of_masking(cascade.broken_by, cascade.components)
        found = network.result(space.image(search.coordinates), search.logits, targets, warn=False)
    return AutoAttackResult(**vars(found), broken_by=cascade.broken_by, components=cascade.components)


@check_types
def auto_attack_dataset(
    logits_fn: LogitsFn,
    data: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    eps: float,
    norm: Norm = "linf",
    version: Version = "standard",
    num_steps: int = 100,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    device: torch.device | str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> AutoAttackSummary:
    """Run :func:`auto_attack` over a data set, with a progress bar, and continue where an interruption left it.

    With ``state_path`` the outcome so far is written after each attack on each batch, whole or not at all. The same
    call with the same file goes on from there and ends in the same result as a run in one piece; a finished file is
    read without further attacks.

    Args:
        logits_fn: from images to logits ``(N, C)``.
        data: a loader that gives the same batches in the same order each time, or a pair of tensors (images, classes).
        eps: radius in the units of the inputs.
        norm: ``"linf"`` or ``"l2"``.
        version: see :func:`auto_attack`.
        num_steps: of APGD and FAB.
        num_queries: of Square.
        bounds: lowest and highest valid value; None for none.
        luminance_only: change only the luminance of RGB images.
        seed: of all random draws.
        batch_size: for a pair of tensors.
        batch_fn: picks images and classes out of a loader's batch. Default: its first two elements.
        device: where the images go. Default: that of a module's parameters, else they stay.
        state_path: file for the outcome so far, by convention ``*.safetensors``.
        progress: show a bar with the accuracy so far.

    Returns:
        Which attack broke which image, and accuracies.

    Raises:
        ValueError: as :func:`auto_attack`; if the data is empty; or if the file belongs to other settings, another
            network or other data.

    Warns:
        UserWarning: as :func:`auto_attack`; the checks of the network look at the first batch.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        >>> images = torch.rand(8, 1, 4, 4)
        >>> data = images, net(images).argmax(1)
        >>> summary = auto_attack_dataset(net, data, eps=0.5, version="quick", num_steps=5, progress=False)
        >>> summary.accuracies["clean"], summary.robust_accuracy
        (1.0, 0.0)
    """
    _check_settings(version, num_steps, num_queries)
    settings = {
        "eps": float(eps),
        "norm": norm,
        "version": version,
        "num_steps": num_steps,
        "num_queries": num_queries,
        "bounds": None if bounds is None else [torch.as_tensor(bound).tolist() for bound in bounds],
        "luminance_only": luminance_only,
        "seed": seed,
        "network": _network_checksum(logits_fn),
    }
    components = _VERSIONS[version]
    state = _State.open(state_path, settings)
    if device is None and isinstance(logits_fn, nn.Module):
        device = next((parameter.device for parameter in logits_fn.parameters()), None)
    batches, total = _batches(data, batch_size, batch_fn)
    with _bar(total, len(components), shown=progress) as advance:
        for index, (inputs, targets) in enumerate(batches):
            if not len(inputs):
                continue
            checksum = _checksum(inputs, zlib.crc32(str(targets.tolist()).encode()))
            if state.has(index, checksum):
                advance(len(inputs) * len(components), state.broken_by)
                continue
            if device is not None:
                inputs, targets = inputs.to(device), targets.to(device)
            with attacking(logits_fn, inputs, full_precision=True) as network:
                space = make_space(inputs, eps, norm, bounds, luminance_only)
                targets = check_targets("targets", targets, space.inputs)
                if "square" in components:
                    check_images(space)
                if index == 0:
                    _check_network(network, space.image(space.origin), version)
                search = Search(network, space, targets, _RAND_SAMPLES if version == "rand" else 1)
                cascade = _Cascade(search, version, num_steps, num_queries, _batch_seed(seed, index))
                state.resume(index, checksum, cascade)
                advance(cascade.done * len(inputs), None)

                def keep(done: int, cascade: _Cascade = cascade, index: int = index, checksum: int = checksum) -> None:
                    state.record(index, checksum, cascade, last=done == len(components))
                    advance(len(cascade.broken_by), torch.cat([state.broken_by, state.open_rows]))

                cascade.run(keep)
    if not len(state.broken_by):
        raise ValueError("data holds no images; a loader that was used up must be made anew")
    _warn_of_zeros((state.zeros, state.zeros_of))
    _warn_of_masking(state.broken_by, components)
    return AutoAttackSummary(state.broken_by, components, state.num_gradients, state.num_forwards)


class _Cascade:
    """The attacks of a version on one batch, one after the other."""

    def __init__(self, search: Search, version: str, num_steps: int, num_queries: int, seed: int) -> None:
        self.search, self.version, self.seed = search, version, seed
        self.num_steps, self.num_queries = num_steps, num_queries
        self.components = _VERSIONS[version]
        self.done = 0
        self.broken_by = torch.where(search.robust, -1, 0)
        self.zeros = (0, 0)

    def continue_from(self, done: int, broken_by: Tensor) -> None:
        """Take over what the first ``done`` attacks found."""
        self.done, self.broken_by = done, broken_by.to(self.broken_by)
        self.search.robust = self.broken_by < 0

    def run(self, after: Callable[[int], None]) -> None:
        """Run the remaining attacks and call back after each with the number of those done."""
        for number in range(self.done, len(self.components)):
            before = self.search.network.zero_gradients()
            generator = torch.Generator().manual_seed((self.seed + _PRIME * (number + 1)) % 2**63)
            self._attack(self.components[number], generator)
            if self.components[number] == "apgd-ce":
                zeros, of = self.search.network.zero_gradients()
                self.zeros = zeros - before[0], of - before[1]
            fell = (self.broken_by < 0) & ~self.search.robust
            self.broken_by = torch.where(fell, number + 1, self.broken_by)
            self.done = number + 1
            after(self.done)

    def _attack(self, component: str, generator: torch.Generator) -> None:
        search, classes = self.search, self.search.clean_logits.shape[1]
        restarts = _RESTARTS.get(component, 1) if self.version == "plus" else 1
        if component == "square":
            run_square(search, generator, self.num_queries)
        elif component.startswith("fab"):
            num_targets = _NUM_TARGETS if component == "fab-t" else None
            run_fab(search, generator, self.num_steps, restarts, num_targets, stop_within=True)
        else:
            loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr_targeted"}[component]
            if classes < NEEDED_CLASSES.get(loss, 2):
                loss = "margin_targeted"
            run_apgd(search, generator, loss, self.num_steps, restarts, _NUM_TARGETS)


class _State:
    """The outcome so far, kept in a file."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.broken_by = torch.zeros(0, dtype=torch.int64)
        self.open_rows = torch.zeros(0, dtype=torch.int64)
        self.open_batch, self.open_checksum, self.open_done = -1, 0, 0
        self.checksums: list[int] = []
        self.batches: list[int] = []
        self.num_gradients = self.num_forwards = self.zeros = self.zeros_of = 0
        self._counted: tuple[_Cascade | None, int, int] = (None, 0, 0)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> _State:
        """Read the file if there is one."""
        state = cls(None if path is None else Path(path), settings)
        if state.path is None or not state.path.exists():
            return state
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(state.path, framework="pt") as file:
                about = file.metadata() or {}
                plain = json.loads(about["auto_attack"])
                state.broken_by, state.open_rows = file.get_tensor("broken_by"), file.get_tensor("open_rows")
            tensors = {"broken_by": state.broken_by, "open_rows": state.open_rows}
            # Files of earlier versions have no checksum.
            if about.get("checksum", checksum := _state_checksum(tensors, about["auto_attack"])) != checksum:
                raise ValueError("its checksum differs from the one that was written")
            found = plain.pop("settings")
            numbers = {name: type(getattr(state, name))(plain[name]) for name in _State._plain}
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(state.path)!r} does not hold the state of an attack ({error}); name another file"
            ) from error
        if differing := [name for name in settings if found.get(name) != settings[name]]:
            raise ValueError(
                f"{os.fspath(state.path)!r} belongs to a run with other {', '.join(differing)}; delete it to start "
                "anew, or name another file"
            )
        vars(state).update(numbers)
        return state

    _plain = (
        "open_batch",
        "open_checksum",
        "open_done",
        "checksums",
        "batches",
        "num_gradients",
        "num_forwards",
        "zeros",
        "zeros_of",
    )

    def has(self, index: int, checksum: int) -> bool:
        """Whether the batch is done.

        Raises:
            ValueError: if it has changed.
        """
        if index not in self.batches:
            return False
        self._compare(index, self.checksums[self.batches.index(index)], checksum)
        return True

    def resume(self, index: int, checksum: int, cascade: _Cascade) -> None:
        """Let the cascade go on after the attacks on the batch that are done.

        Raises:
            ValueError: if the batch has changed.
        """
        network = cascade.search.network
        if index != self.open_batch:
            self._counted = cascade, 0, 0
            return
        self._compare(index, self.open_checksum, checksum)
        cascade.continue_from(self.open_done, self.open_rows)
        self._counted = cascade, network.num_gradients, network.num_forwards  # passes that were counted before

    def _compare(self, index: int, known: int, checksum: int) -> None:
        if known != checksum:
            raise ValueError(
                f"batch {index} differs from the one in {os.fspath(self.path or '')!r}; give the data in a fixed order "
                "without random transforms, or delete the file"
            )

    def record(self, index: int, checksum: int, cascade: _Cascade, *, last: bool) -> None:
        """Write the outcome after an attack on a batch."""
        network = cascade.search.network
        _, gradients, forwards = self._counted
        self.num_gradients += network.num_gradients - gradients
        self.num_forwards += network.num_forwards - forwards
        self._counted = cascade, network.num_gradients, network.num_forwards
        if cascade.components[cascade.done - 1] == "apgd-ce":
            self.zeros += cascade.zeros[0]
            self.zeros_of += cascade.zeros[1]
        rows = cascade.broken_by.cpu()
        if last:
            self.broken_by = torch.cat([self.broken_by, rows])
            self.checksums.append(checksum)
            self.batches.append(index)
            self.open_rows, self.open_batch, self.open_checksum, self.open_done = rows[:0], -1, 0, 0
        else:
            self.open_rows, self.open_batch, self.open_checksum = rows, index, checksum
            self.open_done = cascade.done
        if self.path is not None:
            from safetensors.torch import save

            plain = {name: getattr(self, name) for name in _State._plain} | {"settings": self.settings}
            tensors = {"broken_by": self.broken_by, "open_rows": self.open_rows}
            text = json.dumps(plain)
            about = {"auto_attack": text, "checksum": _state_checksum(tensors, text)}
            write_atomically(self.path, save(tensors, metadata=about))


def _state_checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(
            f"{name} {tensors[name].dtype}".encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _check_settings(version: str, num_steps: int, num_queries: int) -> None:
    if version not in _VERSIONS:
        raise ValueError(f"version must be one of {sorted(_VERSIONS)}, got {version!r}")
    if num_steps < 1 or num_queries < 1:
        raise ValueError(f"num_steps and num_queries must be at least 1, got {num_steps!r} and {num_queries!r}")


def _accuracies(broken_by: Tensor, components: tuple[str, ...]) -> dict[str, float]:
    names = ("clean", *components)
    return {name: float(((broken_by < 0) | (broken_by > number)).double().mean()) for number, name in enumerate(names)}


def _next_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _batch_seed(seed: int, index: int) -> int:
    return (seed * _PRIME + index * 15_485_863) % 2**62


def _check_network(network: Network, images: Tensor, version: str) -> None:
    with _watch_gradients() as calls:
        outputs = [network.logits(images)]
    outputs += [network.logits(images) for _ in range(_RANDOM_REPEATS)]
    first = outputs[0]
    sums = first.sum(1)
    if bool((first >= 0).all()) and bool(((sums - 1.0).abs() < 1e-4).all()):
        warn_caller("the outputs look like probabilities, which hide gradients; return logits from logits_fn")
    directions = [output / output.norm(dim=1, keepdim=True).clamp_min(1e-30) for output in outputs]
    random = any(bool(((d - directions[0]).norm(dim=1) > _RANDOM_DISTANCE).any()) for d in directions[1:])
    if random and version != "rand":
        warn_caller('the outputs differ from call to call: the network is random; attack it with version="rand"')
    if not random and version == "rand":
        raise ValueError(
            'version="rand" is for networks whose outputs differ from call to call, and these do not; use "standard"'
        )
    if calls:
        warn_caller(
            "the network computes gradients inside its forward pass; a defence that adapts to its input needs an "
            "attack made for it"
        )


@contextmanager
def _watch_gradients() -> Iterator[list[str]]:
    """Collect the names of autograd's entry points that are called meanwhile."""
    entries = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}
    calls: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in entries:
            calls.append(frame.f_code.co_name)

    previous = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(previous)


def _warn_of_zeros(zeros: tuple[int, int]) -> None:
    if zeros[0] > MANY_ZEROS * zeros[1]:
        warn_caller(
            f"{zeros[0]} of {zeros[1]} input gradients of the cross-entropy were exactly zero: the logits are "
            "saturated, and attacks on the cross-entropy alone overstate the robustness of this network"
        )


def _warn_of_masking(broken_by: Tensor, components: tuple[str, ...]) -> None:
    if "square" not in components:
        return
    dropped = int((broken_by == components.index("square") + 1).sum())
    if dropped > max(1.0, _MASKED_SHARE * len(broken_by)):
        warn_caller(
            f"Square, which sees no gradients, broke {dropped} of {len(broken_by)} images that the gradient attacks "
            "before it did not: the network probably masks its gradients, and its robustness is overstated"
        )


def _batches(
    data: Iterable[Any] | tuple[Tensor, Tensor],
    batch_size: int,
    batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None,
) -> tuple[Iterator[tuple[Tensor, Tensor]], int | None]:
    """Return pairs of images and classes, and the number of images where it is known."""
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        inputs, targets = data
        if len(inputs) != len(targets):
            raise ValueError(f"data holds {len(inputs)} images and {len(targets)} classes; they must be as many")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        return zip(inputs.split(batch_size), targets.split(batch_size), strict=True), len(inputs)
    if batch_fn is None:
        from lightning_plugins.batches import inputs_and_targets

        batch_fn = inputs_and_targets
    try:
        total = len(data.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        total = None
    return (batch_fn(batch) for batch in data), total


def _checksum(tensor: Tensor, start: int = 0) -> int:
    plain = tensor.detach().cpu().contiguous()
    return zlib.crc32(plain.view(torch.uint8).numpy().tobytes(), start) if plain.numel() else start


def _network_checksum(logits_fn: LogitsFn) -> int:
    """Return a checksum of a module's weights and buffers; 0 for a function, which has none."""
    checksum = 0
    if isinstance(logits_fn, nn.Module):
        for tensor in (*logits_fn.parameters(), *logits_fn.buffers()):
            checksum = _checksum(tensor.reshape(-1), checksum)
    return checksum


@contextmanager
def _bar(total: int | None, parts: int, *, shown: bool) -> Iterator[Callable[[int, Tensor | None], None]]:
    """Show a bar; what is yielded takes progress in images times attacks, and which attack broke which image."""
    if not shown:
        yield lambda amount, broken_by: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("AutoAttack", total=None if total is None else total * parts)

        def advance(amount: int, broken_by: Tensor | None) -> None:
            if broken_by is not None and len(broken_by):
                robust = float((broken_by < 0).double().mean())
                bar.update(task, description=f"AutoAttack, robust so far {robust:.1%} of {len(broken_by)}")
            bar.advance(task, amount)

        yield advance
