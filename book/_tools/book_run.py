"""Chapters are executed side by side before Sphinx reads them, each in an empty folder of its own.

MyST-NB executes a page when it reads it, one after the other. Here what its cache lacks is put in
beforehand. A chapter that fails is left to MyST-NB, which executes it again and reports the error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import book_site
import nbformat
import psutil
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def tie_cache_to_library(app: Sphinx, config: Config) -> None:
    """Give the notebooks' cache a name that changes with the library and the versions.

    The cache looks at a notebook's cells alone: without this, a chapter would keep showing what an
    older library printed.
    """
    digest = hashlib.sha256(json.dumps([book_site.versions(), book_site.device()]).encode())
    library = book_site.ROOT / "autograd_lib"
    for path in sorted(path for path in library.rglob("*.*") if path.suffix != ".pyc"):
        digest.update(path.read_bytes())
    caches = Path(app.outdir).parent / ".jupyter_cache"
    current = caches / digest.hexdigest()[:16]
    for old in caches.glob("*"):
        if old.is_dir() and old != current:
            shutil.rmtree(old)
    config.nb_execution_cache_path = str(current)


def execute_chapters(app: Sphinx, env: BuildEnvironment, names: list[str]) -> None:
    """Fill the cache with the chapters that are about to be read and that it does not hold."""
    if app.config.nb_execution_mode != "cache":
        return
    cache = get_cache(app.config.nb_execution_cache_path)
    notebooks = {}
    for path in (Path(app.env.doc2path(name)) for name in names):
        if path.suffix == ".ipynb":
            notebook = nbformat.read(path, as_version=4)
            try:
                cache.match_cache_notebook(notebook)
            except KeyError:
                notebooks[path] = notebook
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        runs = {
            pool.submit(_execute, notebook, app.config.nb_execution_timeout): path
            for path, notebook in notebooks.items()
        }
        for done, run in enumerate(as_completed(runs), 1):
            path, (seconds, cpu, error) = runs[run], run.result()
            text = f"failed: {error}" if error else f"{seconds:.0f} s, {cpu:.0f} s of CPU"
            logger.info("executed %s (%d of %d): %s", path.stem, done, len(runs), text)
            if not error:
                data = {"execution_seconds": seconds}
                bundle = CacheBundleIn(notebooks[path], str(path), data=data)
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def _execute(notebook: nbformat.NotebookNode, timeout: int) -> tuple[float, float, str]:
    """Execute in place; return seconds, seconds of CPU, and the first line of an error."""
    used, error, start = 0.0, "", time.perf_counter()

    def note_cpu(**_: Any) -> None:
        nonlocal used
        times = psutil.Process(client.km.provisioner.pid).cpu_times()
        used = times.user + times.system + times.children_user + times.children_system

    with TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            record_timing=False,  # or the cache would not know the cells again
            resources={"metadata": {"path": empty}},
            extra_arguments=["--log-level=ERROR"],  # of the kernel's own messages
            on_cell_executed=note_cpu,
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
            error = type(failure).__name__
    return time.perf_counter() - start, used, error


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the functions above to the build."""
    app.connect("config-inited", tie_cache_to_library)
    app.connect("env-before-read-docs", execute_chapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
