"""Links to PyTorch's documentation: only to what it treats, and where it does."""

from __future__ import annotations

import doctest
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
import torch_pages

BOOK = Path(__file__).resolve().parents[1] / "book"
DOCS = "https://docs.pytorch.org/docs/stable/"
# Looked up in the pages of PyTorch 2.13 as they are published.
PUBLISHED = {
    "F.linear_cross_entropy": "generated/torch.nn.functional.linear_cross_entropy.html",
    "F.mse_loss": "generated/torch.nn.functional.mse_loss.html",
    "F.scaled_dot_product_attention": (
        "generated/torch.nn.functional.scaled_dot_product_attention.html"
    ),
    "autograd.Function": "autograd.html#torch.autograd.Function",
    "nn.Flatten": "generated/torch.nn.modules.flatten.Flatten.html",
    "nn.Linear": "generated/torch.nn.Linear.html",
    "nn.Parameter": "generated/torch.nn.parameter.Parameter.html",
    "nn.parallel.DistributedDataParallel": (
        "generated/torch.nn.parallel.DistributedDataParallel.html"
    ),
    "torch.OutOfMemoryError": "generated/torch.cuda.OutOfMemoryError.html",
    "torch.Tensor.backward": "generated/torch.Tensor.backward.html",
    "torch.Tensor.grad": "generated/torch.Tensor.grad.html",
    "torch.amp.GradScaler": "amp.html#gradient-scaling",
    "torch.amp.autocast": "amp.html#torch.autocast",
    "torch.autocast": "amp.html#torch.autocast",
    "torch.autograd.forward_ad.dual_level": "generated/torch.autograd.forward_ad.dual_level.html",
    "torch.autograd.functional.hessian": "generated/torch.autograd.functional.hessian.html",
    "torch.autograd.grad": "generated/torch.autograd.grad.html",
    "torch.autograd.gradcheck": "generated/torch.autograd.gradcheck.gradcheck.html",
    "torch.autograd.graph.saved_tensors_hooks": (
        "autograd.html#torch.autograd.graph.saved_tensors_hooks"
    ),
    "torch.compile": "generated/torch.compile.html",
    "torch.cuda.memory_allocated": "generated/torch.cuda.memory.memory_allocated.html",
    "torch.cuda.synchronize": "generated/torch.cuda.synchronize.html",
    "torch.distributed": "distributed.html",
    "torch.einsum": "generated/torch.einsum.html",
    "torch.func": "func.html",
    "torch.func.hessian": "generated/torch.func.hessian.html",
    "torch.inference_mode": "generated/torch.autograd.grad_mode.inference_mode.html",
    "torch.library.custom_op": "library.html#torch.library.custom_op",
    "torch.linalg.vector_norm": "generated/torch.linalg.vector_norm.html",
    "torch.nn.utils.clip_grad_norm_": "generated/torch.nn.utils.clip_grad_norm_.html",
    "torch.no_grad": "generated/torch.no_grad.html",
    "torch.optim.AdamW": "generated/torch.optim.AdamW.html",
    "torch.save": "generated/torch.save.html",
    "torch.special.log_ndtr": "special.html#torch.special.log_ndtr",
    "torch.utils.checkpoint": "checkpoint.html",
    "torch.utils.checkpoint.checkpoint": "checkpoint.html#torch.utils.checkpoint.checkpoint",
    "torch.vmap": "generated/torch.vmap.html",
}
WITHOUT_PAGE = {
    "another library's": "numpy.linalg.norm",
    "copy of F.conv1d": "torch.conv1d",
    "imported there by chance": "torch.cuda.lru_cache",
    "a method of something else": "model.forward",
    "an attribute's type": "torch.dtype",
    "misspelled class": "nn.Nope",
    "misspelled at the top": "torch.nope",
    "misspelled": "torch.autograd.grda",
    "no name but a module": "torch.utils",
    "of a submodule that is not treated": "torch.utils.flop_counter.FlopCounterMode",
    "plain word": "compare",
    "private function": "torch._assert_async",
    "private": "torch._C._nn.linear",
    "torch itself": "torch",
    "undocumented function": "torch.relu",
    "undocumented variant": "torch.detach_copy",
    "value": "torch.float32",
    "with nothing after the dot": "torch.",
}


def names_in_the_book() -> set[str]:
    texts = [page.read_text(encoding="utf-8") for page in BOOK.rglob("*.md")]
    for chapter in BOOK.glob("*.ipynb"):
        cells = nbformat.read(chapter, as_version=4).cells
        texts += [cell.source for cell in cells if cell.cell_type == "markdown"]
    code = [span for text in texts for span in re.findall(r"`([^`\n]+)`", text)]
    return {
        found[0] for span in code if (found := re.match(r"(torch|nn|F|autograd)(\.\w+)+", span))
    }


def test_examples() -> None:
    assert doctest.testmod(torch_pages) == (0, 2)


@pytest.mark.parametrize(("name", "page"), PUBLISHED.items(), ids=str)
def test_a_name_leads_to_its_page(name: str, page: str) -> None:
    assert torch_pages.address(name) == DOCS + page


@pytest.mark.parametrize("name", WITHOUT_PAGE.values(), ids=WITHOUT_PAGE)
def test_what_has_no_page_is_not_linked(name: str) -> None:
    assert torch_pages.address(name) is None


def test_every_linked_name_exists_in_torch() -> None:
    linked = {name for name in names_in_the_book() if torch_pages.address(name)}
    assert "torch.no_grad" in linked
    for name in linked | set(torch_pages.PLACES):
        first, _, rest = name.partition(".")
        assert pkgutil.resolve_name(f"{torch_pages.SHORT.get(first, first)}.{rest}") is not None
