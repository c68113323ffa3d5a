"""Data that come with Python and scikit-learn, nothing downloaded: three tasks to train on.

Each is the same at every call. The source text is that of the Python that runs: another version
has other sources, and results a little different.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autograd_lib.command.named import called, imported
from autograd_lib.core.optional import optional

VOCABULARY = 128  # ASCII; any other character is a question mark


def _answers(output: Tensor, targets: Tensor) -> Tensor:
    """The logits that are judged: of a sequence with one target those at its last position."""
    return output[:, -1] if output.dim() == targets.dim() + 2 else output


class ClassLoss(nn.CrossEntropyLoss):
    """Cross-entropy of logits (batch, ..., classes), a mean over all targets (batch, ...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(_answers(input, target).flatten(0, -2), target.flatten())


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """The share of targets that have the largest logit."""
    return (_answers(output, targets).argmax(-1) == targets).float().mean()


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to learn: data, what they ask of a model, and how it is judged.

    A function that returns one is `data.name` of a configuration, as ``package.module:function``,
    and called with `data.options`; its random numbers follow from `training.seed`.

    Attributes:
        train: Samples to learn from, a map-style dataset or a list of ``(input, target)``; an input
            that is a tuple holds several arguments of the model.
        test: Samples to judge by.
        sizes: Arguments of the model that the data decide, by their names.
        loss_fn: A mean, as ``loss_fn(output, targets)``; by default the cross-entropy of logits
            (batch, ..., classes).
        metrics: Name to a function of output and targets, a mean over the same terms; by default
            the accuracy.

    Example:
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> samples = list(zip(x, x.square(), strict=True))
        >>> task = Task(samples[::2], samples[1::2], loss_fn=nn.MSELoss(), metrics={})
        >>> len(task.train), task.sizes
        (25, {})
    """

    train: Any
    test: Any
    sizes: Mapping[str, Any] = field(default_factory=dict)
    loss_fn: nn.Module = field(default_factory=ClassLoss)
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(
        default_factory=lambda: {"accuracy": accuracy}
    )


def load_data(name: str, **options: Any) -> Task:
    """Load the data of a task.

    - "digits": the handwritten digits of scikit-learn, 1797 images of 8 x 8, a fifth for test.
      No options.
    - "rows": the same images, read as sequences of 8 rows of 8 pixels. No options.
    - "source": the next character in the sources of the standard library. `length` of a window in
      characters (128), number of `windows` to train on (4000) and of `test_windows` (500).
    - "package.module:function": what the function returns, a `Task`.

    Args:
        name: Of the task.
        options: Of the task.

    Returns:
        The task.

    Raises:
        ValueError: No such function or option, or the function fails.
        TypeError: The function returns something else.
        ImportError: scikit-learn is not installed, for "digits" and "rows".

    Example:
        >>> task = load_data("source", length=16, windows=10)
        >>> tokens, following = task.train[0]
        >>> tokens.shape, bool((tokens[1:] == following[:-1]).all())
        (torch.Size([16]), True)
    """
    task = called("data", name, _LOADERS.get(name) or imported("data", name), options, {})
    if not isinstance(task, Task):
        raise TypeError(
            f"data.name: expected {name} to return a Task, got {type(task).__name__}; write "
            "`return autograd_lib.Task(train, test)`"
        )
    return task


def _digits() -> Task:
    images, labels = optional("digits", "sklearn.datasets", "scikit-learn").load_digits(
        return_X_y=True
    )
    split = optional("digits", "sklearn.model_selection", "scikit-learn").train_test_split
    parts = split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    mean, std = parts[0].mean(), parts[0].std()
    train, test = (
        TensorDataset(
            torch.tensor((x - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
        )
        for x, y in (parts[::2], parts[1::2])
    )
    return Task(train, test, {"input_channels": 1, "num_classes": 10})


def _rows() -> Task:
    digits = _digits()
    train, test = (
        TensorDataset(images.squeeze(1), labels)
        for images, labels in (digits.train.tensors, digits.test.tensors)
    )
    return Task(train, test, {"input_size": 8, "output_size": 10})


def _source(length: int = 128, windows: int = 4000, test_windows: int = 500) -> Task:
    sizes = {"length": length, "windows": windows, "test_windows": test_windows}
    if wrong := {k: v for k, v in sizes.items() if type(v) is not int or v < 1}:
        raise ValueError(f"expected options that are integers from 1 on, got {wrong}")
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Tensor]] = {"windows": [], "test_windows": []}
    for path in sorted(folder.glob("[a-z]*.py")):  # others may be of this machine alone
        text = path.read_text(encoding="utf-8").encode("ascii", "replace")
        codes = torch.tensor(list(text), dtype=torch.uint8)
        parts = codes.tensor_split([int(len(codes) * 0.9)])  # the end of each file is for test
        for of_kind, part in zip(found.values(), parts, strict=True):
            if len(part) > length:  # one more character than a window has: the last one's target
                of_kind.append(part.unfold(0, length + 1, length))
    datasets = []
    for option, count in {"windows": windows, "test_windows": test_windows}.items():
        every = torch.cat([torch.empty(0, length + 1, dtype=torch.uint8), *found[option]])
        if count > len(every):
            raise ValueError(
                f"expected {option} to be at most {len(every)}, as many as {folder} has of that "
                f"length, got {count}"
            )
        taken = every[torch.arange(count) * len(every) // count].long()  # evenly over all files
        datasets.append(TensorDataset(taken[:, :-1], taken[:, 1:]))
    return Task(datasets[0], datasets[1], {"vocab_size": VOCABULARY})


_LOADERS: dict[str, Callable[..., Task]] = {
    "digits": _digits,
    "rows": _rows,
    "source": _source,
}
