"""Data that come with Python and scikit-learn, nothing downloaded: three tasks to train on.

Each is the same at every call. The source text is that of the Python that runs: another version
has other sources, and results a little different.
"""

from __future__ import annotations

import importlib
import inspect
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from autograd_lib.core.names import nearest

# Large, varied, and in every CPython from 3.11 on; one that a distribution leaves out is skipped.
_MODULES = (
    *("argparse", "ast", "asyncio/base_events", "asyncio/unix_events", "bdb", "calendar"),
    *("collections/__init__", "configparser", "csv", "ctypes/util", "dataclasses", "difflib"),
    *("dis", "doctest", "email/_header_value_parser", "email/message", "enum", "fractions"),
    *("ftplib", "functools", "gettext", "http/client", "http/cookiejar", "http/server"),
    *("imaplib", "inspect", "ipaddress", "json/decoder", "locale", "logging/__init__"),
    *("logging/handlers", "mailbox", "mimetypes", "multiprocessing/managers", "optparse", "os"),
    *("pdb", "pickle", "pickletools", "platform", "plistlib", "random", "shutil", "smtplib"),
    *("socket", "ssl", "statistics", "subprocess", "tarfile", "textwrap", "threading"),
    *("tokenize", "traceback", "typing", "unittest/case", "unittest/mock", "urllib/parse"),
    *("urllib/request", "uuid", "weakref", "xml/dom/minidom", "xml/etree/ElementTree", "_pyio"),
)
_HELD_OUT = 0.1  # of each file, its end
# One code for each printable ASCII character, newline and tab, and the last for any other.
_CHARACTERS = "\n\t" + "".join(sorted(set(string.printable) - set(string.whitespace))) + " "
VOCABULARY = len(_CHARACTERS) + 1
_CODES = {character: code for code, character in enumerate(_CHARACTERS)}


@dataclass(frozen=True)
class Task:
    """What there is to learn: data, what they ask of a model, and how it is judged.

    Attributes:
        train: Samples to learn from.
        test: Samples to judge by.
        sizes: Arguments of the model that the data decide.
        loss_fn: A mean, as `loss_fn(output, targets)`.
        metrics: Name to a function of output and targets, a mean over the same terms.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    sizes: dict[str, int]
    loss_fn: nn.Module
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]]


class SequenceCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits (batch, seq, classes) at each position, a mean over all."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1), target.flatten())


class LastCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits (batch, seq, classes) at the last position."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input[:, -1], target)


def load_data(name: str, **options: Any) -> Task:
    """Load the data of a task.

    - "digits": the handwritten digits of scikit-learn, 1797 images of 8 x 8, a fifth for test.
      No options.
    - "rows": the same images, read as sequences of 8 rows of 8 pixels. No options.
    - "source": the next character in the sources of the standard library. `length` of a window in
      characters (128), number of `windows` to train on (4000) and of `test_windows` (500).

    Args:
        name: Of the task.
        options: Of the task.

    Returns:
        The task.

    Raises:
        ValueError: No such option, or an option is out of its range.
        ImportError: scikit-learn is not installed, for "digits" and "rows".
        FileNotFoundError: This Python has no sources of its standard library.

    Example:
        >>> task = load_data("source", length=16, windows=10)
        >>> tokens, following = task.train[0]
        >>> tokens.shape, bool((tokens[1:] == following[:-1]).all())
        (torch.Size([16]), True)
    """
    known = inspect.signature(_LOADERS[name]).parameters
    check_options("data", f"data {name!r}", options, known)
    for key, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"data.options.{key}: expected an integer from 1 on, got {value!r}")
    return _LOADERS[name](**options)


def check_options(section: str, owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name in the options of a section that their owner does not know."""
    known = list(known)
    for name in names:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(
                f"{section}.options.{name}: {owner} has no such option, expected {expected}"
                f"{nearest(name, known)}"
            )


def _digits() -> Task:
    train, test = _images()
    sizes = {"input_channels": 1, "num_classes": 10}
    return Task(train, test, sizes, nn.CrossEntropyLoss(), {"accuracy": accuracy})


def _rows() -> Task:
    train, test = (
        TensorDataset(images.squeeze(1), labels)
        for images, labels in (part.tensors for part in _images())
    )
    metrics = {"accuracy": lambda output, targets: accuracy(output[:, -1], targets)}
    return Task(train, test, {"input_size": 8, "output_size": 10}, LastCrossEntropy(), metrics)


def _images() -> list[TensorDataset]:
    """The digits, shape (N, 1, 8, 8), to learn from and to judge by."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
        selection = importlib.import_module("sklearn.model_selection")
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    mean, std = float(parts[0].mean()), float(parts[0].std())
    return [
        TensorDataset(
            torch.tensor((x - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8),
            torch.tensor(y, dtype=torch.int64),
        )
        for x, y in (parts[::2], parts[1::2])
    ]


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """The share of targets that have the largest logit."""
    return (output.argmax(-1) == targets).float().mean()


def _sources() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for name in _MODULES if (path := folder / f"{name}.py").is_file()]
    if not paths:
        raise FileNotFoundError(
            f"data: expected the sources of the standard library in {folder}, found none of "
            f"{len(_MODULES)}; this Python comes without them, use data.name: digits"
        )
    return (path.read_text(encoding="utf-8") for path in paths)


def _encode(text: str) -> Tensor:
    other = VOCABULARY - 1
    return torch.tensor([_CODES.get(c, other) for c in text], dtype=torch.uint8)


class _Windows(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of one long text: `length` characters, and those that follow each of them."""

    def __init__(self, codes: Tensor, starts: Tensor, length: int) -> None:
        self.codes, self.starts, self.length = codes, starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.starts[index])
        window = self.codes[start : start + self.length + 1].long()
        return window[:-1], window[1:]


def _source(length: int = 128, windows: int = 4000, test_windows: int = 500) -> Task:
    texts = [_encode(text) for text in _sources()]
    starts: dict[str, list[Tensor]] = {"windows": [], "test_windows": []}
    offset = 0
    for text in texts:
        cut = int(len(text) * (1 - _HELD_OUT))
        # A window has one more character than its length; so many begin in each part.
        starts["windows"].append(torch.arange(offset, offset + cut - length, length))
        starts["test_windows"].append(
            torch.arange(offset + cut, offset + len(text) - length, length)
        )
        offset += len(text)
    codes = torch.cat(texts)
    train, test = (
        _Windows(codes, _spread(option, torch.cat(starts[option]), count), length)
        for option, count in {"windows": windows, "test_windows": test_windows}.items()
    )
    loss_fn = SequenceCrossEntropy()
    return Task(train, test, {"vocab_size": VOCABULARY}, loss_fn, {"accuracy": accuracy})


def _spread(option: str, found: Tensor, count: int) -> Tensor:
    """Take so many, evenly over all files."""
    if count > len(found):
        raise ValueError(
            f"data.options.{option}: expected at most {len(found)}, as many as the sources have "
            f"of that length, got {count}"
        )
    return found[torch.arange(count) * len(found) // count]


_LOADERS: dict[str, Callable[..., Task]] = {
    "digits": _digits,
    "rows": _rows,
    "source": _source,
}
