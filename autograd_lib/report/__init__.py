"""What the book's pages show beside prose: records of measurements, and the style of figures.

`record` reads what a script of `benchmarks/` measured. The figures' style is Matplotlib's own kind
of file: ``plt.style.use("autograd_lib.report.book")``.
"""

from autograd_lib.report.stored import RECORDS, Record, record, this_environment

__all__ = ["RECORDS", "Record", "record", "this_environment"]
