"""Outputs of a trained network, kept in a file: what post-hoc calibration needs, without the network."""

from __future__ import annotations

import csv
import io
import math
import zipfile
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.checks import check_types

__all__ = ["LogitsDataModule", "Scores", "read_logits"]

Scores = Literal["logits", "probs", "log_probs"]
"""What the rows of a file are."""

Part = tuple[Tensor, Tensor]
"""Logits ``(N, C)`` and labels ``(N,)``."""

_SCORE_NAMES = ("logits", "probs", "log_probs", "predictions", "scores", "outputs")
_LABEL_NAMES = ("labels", "label", "targets", "target", "ground_truth", "y")
_PARTS = {"val": "val", "valid": "val", "validation": "val", "cal": "val", "calibration": "val", "test": "test"}
_SUFFIXES = (".npz", ".safetensors", ".npy", ".csv")


class LogitsDataModule(pl.LightningDataModule):
    """Logits and labels from a file, for :class:`.LogitsModule` and whatever calibrates or measures its outputs.

    The validation data is what calibrators are fitted on. Files:

    - ``.npz`` and ``.safetensors``: an array of scores ``(N, C)``, named ``logits``, ``probs``, ``log_probs``,
      ``predictions``, ``scores`` or ``outputs``, and one of classes, named ``labels``, ``targets``, ``ground_truth`` or
      ``y``; or two of each, with ``_val`` and ``_test`` behind (or ``val_``, ``test_`` before) their names.
    - ``.csv``: a row for each sample, a column for each class and one for the label: the last one, or, where there is a
      line of names, the one called ``label``. A column ``split`` may say ``val`` or ``test``.
    - ``.npy``: an array ``(N, C + 1)`` with the labels in its last column.

    Pickled objects are refused, since loading them runs code. Without a file, the data are the log-probabilities that a
    small scikit-learn network gives for 1,597 digits after training on 200 others, a tenth of them with labels at
    random: an example of an overconfident net that needs no download and a second of one core.

    Args:
        logits: path of the file; None for the example.
        input: what the scores are; never guessed. Probabilities become logits by their logarithm, zeros count as 1e-38.
        calibration_fraction: share of the samples, drawn at random, that becomes the validation data, in (0, 1); the
            others are the test data. Without effect where the file says which are which.
        batch_size: rows of a batch, at least 1.
        seed: of the draw, at least 0.

    Attributes:
        val_set: logits and labels of the validation data after ``setup``; None before.
        test_set: likewise of the test data.

    Shape:
        - batches: logits ``(B, C)`` float32 or float64, labels ``(B,)`` int64.

    Raises:
        FileNotFoundError: in ``setup``, if there is no such file.
        ValueError: for a wrong argument; in ``setup``, if the file does not hold what it should.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "net.npz")
        >>> np.savez(path, logits=np.eye(4, 3, dtype=np.float32), labels=np.array([0, 1, 2, 0]))
        >>> data = LogitsDataModule(str(path), batch_size=2)
        >>> data.setup()
        >>> data.num_classes, [batch[0].shape for batch in data.val_dataloader()]
        (3, [torch.Size([2, 3])])
    """

    @check_types
    def __init__(
        self,
        logits: str | None = None,
        *,
        input: Scores = "logits",
        calibration_fraction: float = 0.5,
        batch_size: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if input not in get_args(Scores):
            raise ValueError(f"input must be one of {', '.join(get_args(Scores))}, got {input!r}")
        if not 0 < calibration_fraction < 1:
            raise ValueError(f"calibration_fraction must lie in (0, 1), got {calibration_fraction!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed!r}")
        self.logits = logits
        self.input: Scores = input
        self.calibration_fraction = calibration_fraction
        self.batch_size = batch_size
        self.seed = seed
        self.val_set: TensorDataset | None = None
        self.test_set: TensorDataset | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes C; reads the file if that has not been done."""
        self.setup()
        return int(self._ready(self.val_set).tensors[0].shape[1])

    def setup(self, stage: str | None = None) -> None:
        """Read the file, or train the example's network, once."""
        if self.val_set is not None:
            return
        parts = _example() if self.logits is None else read_logits(self.logits, input=self.input)
        if "all" in parts:
            logits, labels = parts["all"]
            taken = round(self.calibration_fraction * len(labels))
            if not 0 < taken < len(labels):
                raise ValueError(
                    f"calibration_fraction={self.calibration_fraction} of {len(labels)} samples leaves "
                    f"{'no validation' if taken == 0 else 'no test'} data; choose another fraction or pass more samples"
                )
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
            first, second = order[:taken], order[taken:]
            parts = {"val": (logits[first], labels[first]), "test": (logits[second], labels[second])}
        self.val_set, self.test_set = TensorDataset(*parts["val"]), TensorDataset(*parts["test"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation data: there is nothing to train, and a Trainer asks for it all the same."""
        return self.val_dataloader()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the batches that calibrators are fitted on."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the batches that they are measured on."""
        return self._loader(self.test_set)

    def _loader(self, dataset: TensorDataset | None) -> DataLoader[tuple[Tensor, ...]]:
        # Without a generator of its own, a loader draws a seed from the global one each time it starts.
        return DataLoader(self._ready(dataset), batch_size=self.batch_size, generator=torch.Generator())

    def _ready(self, dataset: TensorDataset | None) -> TensorDataset:
        if dataset is None:
            raise RuntimeError("no data loaded yet; call setup() first")
        return dataset


@check_types
def read_logits(path: str | Path, *, input: Scores = "logits") -> dict[str, Part]:
    r"""Read logits and labels from a file in one of the forms of :class:`LogitsDataModule`.

    Args:
        path: the file.
        input: what its scores are.

    Returns:
        Logits ``(N, C)`` and labels ``(N,)`` under ``"val"`` and ``"test"``, or under ``"all"`` if the file does not
        split them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold what it should; the message says what was found and what to do.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "net.csv")
        >>> path.write_text("cat,dog,label\n0.9,0.1,0\n0.2,0.8,1\n")
        34
        >>> read_logits(path, input="probs")["all"]
        (tensor([[-0.1054, -2.3026],
            [-1.6094, -0.2231]]), tensor([0, 1]))
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"a file of logits ends in {', '.join(_SUFFIXES)}, got {str(path)!r}; convert it to one of them"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; pass the path of a file of logits and labels")
    if path.suffix == ".csv":
        parts = _read_csv(path)
    elif path.suffix == ".npy":
        table = _arrays(path)[""]
        if table.ndim != 2 or table.shape[1] < 3:
            raise ValueError(
                f"{path} holds an array {table.shape}, and a .npy file of logits is (N, C + 1) with the labels in its "
                "last column; keep logits and labels as two arrays of an .npz file"
            )
        parts = {"all": (table[:, :-1], table[:, -1])}
    else:
        parts = _by_name(path, _arrays(path), input)
    checked = {part: _checked(f"{path} ({part})" if len(parts) > 1 else str(path), *arrays, input)
               for part, arrays in parts.items()}  # fmt: skip
    widths = {logits.shape[1] for logits, _ in checked.values()}
    if len(widths) > 1:
        raise ValueError(f"{path} has {sorted(widths)} classes in its two parts; both must come from one network")
    return checked


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            # Through torch, which knows bfloat16.
            return {
                name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
                for name, value in load_file(path).items()
            }
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # each format has its own exceptions for damage
        if isinstance(error, ValueError) and "allow_pickle" in str(error):
            raise ValueError(
                f"{path} holds pickled Python objects, which are not loaded because that would run code; save plain "
                "arrays of numbers instead"
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        kind = "zip archive" if isinstance(error, zipfile.BadZipFile) else f"{path.suffix} file"
        raise ValueError(f"{path} is damaged or no {kind} ({reason}); save it again") from error


def _by_name(path: Path, arrays: dict[str, np.ndarray], input: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found: dict[str, dict[str, str]] = {}
    for name in arrays:
        part, plain = _part_of(name.lower())
        kind = "scores" if plain in _SCORE_NAMES else "labels" if plain in _LABEL_NAMES else None
        if kind is None:
            continue
        if plain in get_args(Scores) and plain != input:
            raise ValueError(
                f"{path} has an array {name!r}, and input is {input!r}; say what the scores are by input={plain!r}"
            )
        if kind in found.setdefault(part, {}):
            raise ValueError(
                f"{path} has two arrays of {kind}, {found[part][kind]!r} and {name!r}; leave only one of them in it"
            )
        found[part][kind] = name
    complete = all(len(kinds) == 2 for kinds in found.values())
    if not complete or set(found) not in ({"all"}, {"val", "test"}):
        raise ValueError(
            f"{path} must have arrays 'logits' and 'labels', or 'logits_val', 'labels_val', 'logits_test' and "
            f"'labels_test', found {', '.join(map(repr, sorted(arrays))) or 'none'}; rename them"
        )
    return {
        part: (arrays[found[part]["scores"]], arrays[found[part]["labels"]]) for part in sorted(found, reverse=True)
    }


def _part_of(name: str) -> tuple[str, str]:
    """Return the part that a name speaks of, ``"all"`` without one, and the rest of the name."""
    for word, part in _PARTS.items():
        if name.endswith(f"_{word}"):
            return part, name.removesuffix(f"_{word}")
        if name.startswith(f"{word}_"):
            return part, name.removeprefix(f"{word}_")
    return "all", name


def _read_csv(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no text in comma-separated form ({error}); save it again") from error
    if not rows:
        raise ValueError(f"{path} is empty; it needs a row for each sample")
    has_names = not all(_is_number(cell) for cell in rows[0])
    first = 2 if has_names else 1
    names = [cell.strip().lower() for cell in rows[0]] if has_names else [""] * (len(rows[0]) - 1) + ["label"]
    rows = rows[1:] if has_names else rows
    labels = [place for place, name in enumerate(names) if name in _LABEL_NAMES]
    if len(labels) != 1:
        raise ValueError(
            f"{path} needs one column called 'label', found the columns {', '.join(names)}; name it, or leave out the "
            "line of names and put the labels last"
        )
    splits = names.index("split") if "split" in names else None
    scores = [place for place in range(len(names)) if place not in (labels[0], splits)]
    parts: dict[str, list[list[float]]] = {}
    for number, row in enumerate(rows, first):
        if len(row) != len(names):
            raise ValueError(
                f"line {number} of {path} has {len(row)} cells, and there are {len(names)} columns; mend it"
            )
        word = "" if splits is None else row[splits].strip()
        part = "all" if splits is None else _PARTS.get(word.lower(), "")
        if not part:
            raise ValueError(f"line {number} of {path} has the split {word!r}; write val or test")
        try:
            parts.setdefault(part, []).append([float(row[place]) for place in (*scores, labels[0])])
        except ValueError as error:
            raise ValueError(f"line {number} of {path} holds something that is no number ({error}); mend it") from error
    if set(parts) not in ({"all"}, {"val", "test"}):
        raise ValueError(
            f"{path} has {', '.join(sorted(parts)) or 'no'} samples; it needs some of val and some of test, or no "
            "column 'split'"
        )
    tables = {part: np.asarray(parts[part], dtype=np.float32) for part in sorted(parts, reverse=True)}
    return {part: (table[:, :-1], table[:, -1]) for part, table in tables.items()}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _checked(where: str, scores: np.ndarray, labels: np.ndarray, input: Scores) -> Part:
    """Return logits and int64 labels, after a look at everything that could be wrong with them."""
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if scores.ndim != 2 or scores.shape[1] < 2 or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(
            f"{where} must have floating-point scores (N, C) of at least 2 classes, found {scores.dtype} "
            f"{scores.shape}; save one row for each sample"
        )
    if labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"{where} must have one class index for each of the {len(scores)} rows of scores, and at least one row, "
            f"found labels {labels.shape}; save class indices, not one-hot rows"
        )
    num_classes = scores.shape[1]
    whole = labels == np.floor(labels) if labels.dtype.kind in "iuf" else np.zeros(len(labels), dtype=bool)
    wrong = labels[~(whole & (labels >= 0) & (labels < num_classes))] if labels.dtype.kind in "iuf" else labels
    if len(wrong):
        raise ValueError(
            f"{where} must have labels that are integers from 0 to {num_classes - 1}, found {wrong[0]!s}; drop the "
            "rows of ignored labels and number the classes from 0"
        )
    values = torch.from_numpy(np.ascontiguousarray(scores if scores.dtype.itemsize >= 4 else scores.astype(np.float32)))
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    return _as_logits(where, values, input), torch.from_numpy(labels.astype(np.int64))


def _as_logits(where: str, scores: Tensor, input: Scores) -> Tensor:
    if bool(scores.isnan().any()) or bool(scores.isposinf().any()):
        raise ValueError(f"{where} holds NaN or infinity; drop those rows")
    if input == "logits":
        if bool(scores.isneginf().any()):
            raise ValueError(
                f"{where} holds -infinity among its logits; use large negative numbers, or drop those rows"
            )
        low, high = (float(bound) for bound in scores.aminmax())
        if 0 <= low < high <= 1 and bool(((scores.sum(1) - 1).abs() <= 1e-3).all()):
            raise ValueError(f"{where} looks like probabilities, and input is 'logits'; pass input='probs'")
        return scores
    probs = scores if input == "probs" else scores.exp()
    gap = float((probs.sum(1) - 1).abs().max())
    if not gap <= 1e-3 or float(probs.min()) < 0:
        raise ValueError(
            f"{where} must hold {input} whose probabilities are at least 0 and sum to 1 in every row, found a sum that "
            f"is off by {gap:.3g}; pass input='logits' for raw outputs of a network"
        )
    tiny = torch.finfo(torch.float32).tiny
    return probs.clamp_min(tiny).log() if input == "probs" else scores.clamp_min(math.log(tiny))


def _example() -> dict[str, Part]:
    """Train a small network on few digits, some mislabelled, and return its log-probabilities of all others."""
    import warnings

    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    train, rest = order[:200], order[200:]
    draws = np.random.default_rng(1)
    noisy = draws.random(len(train)) < 0.1
    targets = np.where(noisy, draws.integers(0, 10, len(train)), digits.target[train])
    network = MLPClassifier((64,), alpha=0.0, learning_rate_init=0.01, max_iter=200, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(digits.data[train] / 16, targets)
    probs = torch.from_numpy(network.predict_proba(digits.data[rest] / 16))
    labels = torch.from_numpy(digits.target[rest].astype(np.int64))
    return {"all": (probs.clamp_min(torch.finfo(torch.float32).tiny).log().float(), labels)}
