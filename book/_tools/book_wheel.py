"""The library's wheel, built with the book, for readers to download."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.wheel import WheelBuilder
from sphinx.application import Sphinx
from sphinx.config import Config

ROOT = Path(__file__).parents[2]


def offer_wheel(app: Sphinx, config: Config) -> None:
    """Build the wheel, and give pages a link to it and the commands that install it.

    A wheel that is the same stays in place: Sphinx reads the pages that link to it anew whenever
    the file is newer.
    """
    folder = Path(app.outdir).parent / "wheel"
    with tempfile.TemporaryDirectory() as fresh:
        builder = WheelBuilder(str(ROOT))
        built = Path(next(builder.build(directory=fresh, versions=["standard"])))
        wheel = folder / built.name
        if not wheel.exists() or wheel.read_bytes() != built.read_bytes():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shutil.copyfile(built, wheel)
    path = Path(os.path.relpath(wheel, app.srcdir)).as_posix()
    commands = [
        "# the library, torch and NumPy",
        f"pip install ./{wheel.name}",
        "# and what `autograd-lib train digits_cnn` needs",
        f"pip install './{wheel.name}[train]'",
        "# and what every chapter needs",
        f"pip install './{wheel.name}[chapters]'",
    ]
    config.myst_substitutions |= {
        "wheel": f"{{download}}`{wheel.name} </{path}>`",
        "install_wheel": "\n".join(["```bash", *commands, "```"]),
    }


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the function above to the build."""
    app.connect("config-inited", offer_wheel)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
