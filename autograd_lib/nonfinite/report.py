"""What made the first NaN or Inf of a step, as a report."""

from __future__ import annotations

import linecache
import sys
from typing import NamedTuple

from autograd_lib.nonfinite.values import Operand
from autograd_lib.report.tables import text_table

OUTSIDE = "it came from outside the model"
UNLINKED = "no observed operation carries it there"
BLANK = "no observed operation wrote to this memory"


class NonFinite(NamedTuple):
    """Where the first NaN of a step came from, or the Inf that became one.

    Prints as a short report. What does not apply is empty.

    Attributes:
        phase: "parameter" (buffers too), "input", "forward" or "backward".
        kind: "nan" or "inf": what the culprit made or held; "spike" for gradients that are finite,
            but far larger than before.
        module: Qualified name of the module in whose code it happened, "" outside any.
        op: ATen name of the forward operation, such as "aten.log.default"; the class's name if
            the backward of a custom Function failed; for a parameter or an input the operation
            in which it surfaced.
        backward_op: ATen name of the backward operation, in phase "backward" only.
        location: "file:line" of the innermost frame outside PyTorch, in a notebook
            "Cell In[n]:line". In phase "backward" that of the forward operation, or the line
            inside a custom Function's backward.
        inputs: What the culprit was given, or the culprit itself if it is a parameter or an
            input: `name`, `shape`, `dtype`, `min`, `max` of each tensor.
        name: Of the parameter, the buffer, the argument: one of `model`'s, or of `op`'s for what
            came from outside the model, such as a target.
        detail: What followed, or what the report cannot know.
        source: The lines of code around `location`.
        place: `location` as Python has it: the name of the file and the line.
    """

    phase: str
    kind: str = ""
    module: str = ""
    op: str = ""
    backward_op: str = ""
    place: tuple[str, int] = ("", 0)
    inputs: tuple[Operand, ...] = ()
    name: str = ""
    detail: str = ""
    location: str = ""
    source: tuple[str, ...] = ()

    # The observer makes many of these, without a kind, to say where an operation runs. What takes
    # reading files is added to the one that is reported.

    def _also(self, detail: str) -> NonFinite:
        """The same with one more thing to tell."""
        return self._replace(detail="; ".join(filter(None, [self.detail, detail])))

    def _located(self) -> NonFinite:
        """The same with the lines of code around the place."""
        file, line = self.place
        if not file:
            return self
        around = [(n, linecache.getline(file, n).rstrip()) for n in range(line - 1, line + 2)]
        source = (f"{'>' if n == line else ' '} {n:>4}  {text}" for n, text in around if text)
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        cell = None if shell is None else shell.compile.format_code_name(file)
        return self._replace(location=f"{' '.join(cell or [file])}:{line}", source=tuple(source))

    def _is_unmade(self) -> bool:
        """Whether no operation is known to have made it."""
        return self.phase in ("forward", "backward") and (not self.op or BLANK in self.detail)

    def _title(self) -> str:
        kind = {"nan": "NaN", "inf": "Inf", "spike": "Spike"}[self.kind]
        if self.op and OUTSIDE in self.detail:
            return f"{kind} in argument {self.name!r} of {self.op}"
        if self.phase in ("parameter", "input"):
            return f"{kind} in {self.phase} {self.name!r}"
        if not self.op:
            return f"{kind} in {self.phase}"
        by = f"{self.backward_op}, for {self.op}" if self.backward_op else self.op
        return f"{kind} made in {self.phase} by {by}"

    def __repr__(self) -> str:
        given = self.phase in ("parameter", "input")
        facts = [
            ("module", self.module),
            ("surfaced in", self.op) if given else ("parameter", self.name),
            ("location", self.location),
            ("note", self.detail),
        ]
        lines = [self._title(), *(f"{key:<12}{value}" for key, value in facts if value)]
        rows = [
            [name, str(shape), str(dtype).removeprefix("torch."), f"{low:.4g}", f"{high:.4g}"]
            for name, shape, dtype, low, high in self.inputs
        ]
        title = "\n".join([*lines, *(f"    {line}" for line in self.source)])
        return text_table(title, ["inputs", "shape", "dtype", "min", "max"], rows)
