"""Tables as text and as HTML: how every report of the library prints itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Row = Sequence[str]

_SHOWN = 60  # a report on thousands of parameters shows the first and the last of them


class Table:
    """A mixin for reports: printed they are a text table, in a notebook an HTML table.

    A subclass defines `_table`; one without rows prints its title alone.
    """

    def _table(self) -> tuple[str, Row, Sequence[Row]]:
        """Return the title (one line or several), the header, and the rows."""
        raise NotImplementedError

    def _notes(self) -> Sequence[str]:
        """Return the sentences that stand below the table: what a report has as `notes`."""
        return getattr(self, "notes", ())

    def __repr__(self) -> str:
        return "\n".join([text_table(*self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        return html_table(*self._table()) + notes


def _shorten(rows: Sequence[Row], width: int) -> list[Row]:
    if len(rows) <= _SHOWN:
        return list(rows)
    half = _SHOWN // 2
    gap = [f"… {len(rows) - 2 * half} more …", *[""] * (width - 1)]
    return [*rows[:half], gap, *rows[-half:]]


def readable_bytes(count: int) -> str:
    """Write a number of bytes with its unit: B, KiB, MiB or GiB."""
    power = min(max(count.bit_length() - 1, 0) // 10, 3)
    return f"{count / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def text_table(title: str, header: Row, rows: Sequence[Row]) -> str:
    """Align `rows` under `header`: the first column to the left, the others to the right.

    Without rows the title stands alone.
    """
    if not rows:
        return title
    lines = [header, *_shorten(rows, len(header))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([title, *aligned])


def html_table(title: str, header: Row, rows: Sequence[Row]) -> str:
    """The same table as HTML, with the title as its caption."""
    if not rows:
        return f"<p>{escape(title)}</p>"
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in _shorten(rows, len(header))
    )
    return (
        f'<table class="report"><caption>{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
