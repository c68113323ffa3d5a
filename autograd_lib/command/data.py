"""Data that come with Python and scikit-learn, nothing downloaded: three tasks to train on.

Each is the same at every call. The two tasks on source text are of the Python that runs: another
version has other sources, and results a little different.
"""

from __future__ import annotations

import builtins
import difflib
import functools
import importlib
import inspect
import io
import keyword
import string
import sysconfig
import token
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, TensorDataset

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
CLASSES = (
    *("whitespace", "keyword", "builtin", "name"),
    *("number", "string", "comment", "operator"),
)
_IGNORED = -100  # as in `nn.CrossEntropyLoss`


@dataclass(frozen=True)
class Task:
    """What there is to learn: data, what they ask of a model, and how it is judged.

    Attributes:
        train: Samples to learn from.
        test: Samples to judge by.
        sizes: Arguments of the model that the data decide.
        loss_fn: A mean, as `loss_fn(output, targets)`.
        metrics: Name to a function of output and targets, a mean over the same terms.
        collate: Makes a batch of samples; None for PyTorch's own way.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    sizes: dict[str, int]
    loss_fn: nn.Module
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]]
    collate: Callable[[list[Any]], Any] | None = None


class SequenceCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits (batch, seq, classes), a mean over the positions that count."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1), target.flatten())


def load_data(name: str, **options: Any) -> Task:
    """Load the data of a task.

    - "digits": the handwritten digits of scikit-learn, 1797 images of 8 x 8, a fifth for test.
      No options.
    - "source": the next character in the sources of the standard library. `length` of a window in
      characters (128), number of `windows` to train on (4000) and of `test_windows` (500).
    - "highlight": the class of each character in a line of Python, as `tokenize` finds it. Number
      of `lines` to train on (4000) and of `test_lines` (1000), of at most `length` characters
      (100).

    Args:
        name: Of the task.
        options: Of the task.

    Returns:
        The task.

    Raises:
        ValueError: No such task or option, or an option is out of its range.
        ImportError: scikit-learn is not installed, for "digits".
        FileNotFoundError: This Python has no sources of its standard library.

    Example:
        >>> task = load_data("source", length=16, windows=10)
        >>> tokens, following = task.train[0]
        >>> tokens.shape, bool((tokens[1:] == following[:-1]).all())
        (torch.Size([16]), True)
    """
    if name not in _LOADERS:
        raise ValueError(
            f"data.name: expected one of {', '.join(_LOADERS)}, got {name!r}"
            f"{nearest(name, _LOADERS)}"
        )
    known = {key: p.default for key, p in inspect.signature(_LOADERS[name]).parameters.items()}
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"data.options.{key}: data {name!r} has no such option, expected "
                f"{', '.join(known) or 'none'}{nearest(key, known)}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"data.options.{key}: expected an integer from 1 on, got {value!r}")
    return _LOADERS[name](**options)


def nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """The end of an error on a name that is not known: which one may have been meant."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _digits() -> Task:
    try:
        datasets = importlib.import_module("sklearn.datasets")
        selection = importlib.import_module("sklearn.model_selection")
    except ImportError as error:
        raise ImportError(
            "data 'digits' comes with scikit-learn: pip install scikit-learn"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    mean, std = float(parts[0].mean()), float(parts[0].std())
    train_x, test_x = (
        torch.tensor((part - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8)
        for part in parts[:2]
    )
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Task(
        TensorDataset(train_x, train_y),
        TensorDataset(test_x, test_y),
        {"input_channels": 1, "num_classes": 10},
        nn.CrossEntropyLoss(),
        {"accuracy": accuracy},
    )


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """The share of targets that have the largest logit, among those that count."""
    counted = targets != _IGNORED
    return (output.argmax(-1)[counted] == targets[counted]).float().mean()


def _sources(names: Sequence[str]) -> Iterator[str]:
    folder, some = Path(sysconfig.get_paths()["stdlib"]), False
    for name in names:
        path = folder / f"{name}.py"
        if path.is_file():
            some = True
            yield path.read_text(encoding="utf-8")
    if not some:
        raise FileNotFoundError(
            f"data: expected the sources of the standard library in {folder}, found none of "
            f"{len(names)}; this Python comes without them, use data.name: digits"
        )


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
    texts = [_encode(text) for text in _sources(_MODULES)]
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


class _Lines(Dataset[tuple[Tensor, Tensor]]):
    """Lines of Python with the class of each character."""

    def __init__(self, lines: Sequence[tuple[str, bytes]]) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        text, classes = self.lines[index]
        return _encode(text), torch.tensor(list(classes))


def _highlight(lines: int = 4000, test_lines: int = 1000, length: int = 100) -> Task:
    parts: dict[str, list[tuple[str, bytes]]] = {"lines": [], "test_lines": []}
    for found in _library_lines():
        short = [line for line in found if len(line[0]) <= length]
        cut = int(len(short) * (1 - _HELD_OUT))
        parts["lines"] += short[:cut]
        parts["test_lines"] += short[cut:]
    train, test = (
        _Lines([parts[option][i] for i in _spread(option, torch.arange(len(parts[option])), count)])
        for option, count in {"lines": lines, "test_lines": test_lines}.items()
    )
    return Task(
        train,
        test,
        {"input_size": VOCABULARY, "output_size": len(CLASSES)},
        SequenceCrossEntropy(ignore_index=_IGNORED),
        {"accuracy": accuracy},
        _padded,
    )


@functools.cache  # half a second, for some megabytes
def _library_lines() -> list[list[tuple[str, bytes]]]:
    """The different lines of some files, each in the first file that has it."""
    seen: set[str] = set()  # a line that is everywhere, as `return None`, is in one part only
    files = []
    for text in _sources(_MODULES[::3]):
        fresh = []
        for line, classes in highlighted(text):
            key = line.strip()
            if len(key) > 1 and key not in seen:
                seen.add(key)
                fresh.append((line, bytes(classes)))
        files.append(fresh)
    return files


def _padded(samples: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A batch for the RNN: one-hot characters with their lengths, and targets."""
    codes, classes = [code for code, _ in samples], [target for _, target in samples]
    lengths = torch.tensor([len(c) for c in codes])
    one_hot = F.one_hot(pad_sequence(codes, batch_first=True).long(), VOCABULARY).float()
    targets = pad_sequence(classes, batch_first=True, padding_value=_IGNORED)
    return (one_hot, lengths), targets


def highlighted(source: str) -> Iterator[tuple[str, list[int]]]:
    """Yield each logical line of Python, and each comment on a line of its own, with classes.

    What is between tokens is whitespace, a backslash before a newline too. A formatted string is a
    string from end to end, as before Python 3.12, when its expressions became tokens.
    """
    physical = source.splitlines(keepends=True)
    found: list[tokenize.TokenInfo] = []
    first = 1
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        # Outside parentheses NL ends a line that holds a comment or nothing.
        alone = item.type == token.NL and all(t.type == token.COMMENT for t in found)
        if item.type == token.NEWLINE or alone:
            if found:
                yield _classified(physical[first - 1 : item.end[0]], first, found)
            found, first = [], item.start[0] + 1
        elif item.type not in _LAYOUT:
            found.append(item)


_LAYOUT = {token.NL, token.INDENT, token.DEDENT, token.ENDMARKER}


def _classified(
    physical: list[str], first: int, tokens: list[tokenize.TokenInfo]
) -> tuple[str, list[int]]:
    starts = [0]
    for line in physical:
        starts.append(starts[-1] + len(line))
    text = "".join(physical).rstrip("\n")
    classes = [0] * len(text)
    depth, before = 0, ""
    for item in tokens:
        begin, end = (starts[row - first] + column for row, column in (item.start, item.end))
        opens = token.tok_name[item.type] in ("FSTRING_START", "TSTRING_START")
        closes = token.tok_name[item.type] in ("FSTRING_END", "TSTRING_END")
        kind = "string" if depth or opens else _kind(item, before)
        if opens and not depth:
            opened = begin
        depth += opens - closes
        if closes and not depth:
            begin = opened  # with the spaces within
        classes[begin:end] = [CLASSES.index(kind)] * (end - begin)
        before = item.string
    return text, classes


def _kind(item: tokenize.TokenInfo, before: str) -> str:
    match item.type:
        case token.NAME if keyword.iskeyword(item.string):
            return "keyword"
        case token.NAME:
            # The attribute of an object is none, whatever its name.
            builtin = before != "." and hasattr(builtins, item.string)
            return "builtin" if builtin else "name"
        case token.NUMBER:
            return "number"
        case token.STRING:
            return "string"
        case token.COMMENT:
            return "comment"
    return "operator"


_LOADERS: dict[str, Callable[..., Task]] = {
    "digits": _digits,
    "source": _source,
    "highlight": _highlight,
}
