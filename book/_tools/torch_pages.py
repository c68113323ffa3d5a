"""Where PyTorch's documentation treats a name: its addresses follow from a few rules.

PyTorch gives most functions and classes a page of their own, `generated/NAME.html`; some modules
are one page, with an anchor for each name. What follows neither rule is not linked.
"""

from __future__ import annotations

import importlib

DOCS = "https://docs.pytorch.org/docs/stable/"
# Modules whose names have pages of their own.
GENERATED = {
    "torch",
    "torch.cuda",
    "torch.func",
    "torch.linalg",
    "torch.nn",
    "torch.nn.functional",
    "torch.optim",
}
# Modules that are one page.
ONE_PAGE = {
    "torch.autograd.graph": "autograd.html",
    "torch.library": "library.html",
    "torch.special": "special.html",
    "torch.utils.checkpoint": "checkpoint.html",
}
# Names whose page bears another name.
OTHERS = {
    "torch.Tensor": "tensors.html",
    "torch.autograd.Function": "autograd.html#torch.autograd.Function",
    "torch.autograd.backward": "generated/torch.autograd.backward.html",
    "torch.autograd.grad": "generated/torch.autograd.grad.html",
    "torch.autograd.gradcheck": "generated/torch.autograd.gradcheck.gradcheck.html",
    "torch.autograd.gradgradcheck": "generated/torch.autograd.gradcheck.gradgradcheck.html",
    "torch.enable_grad": "generated/torch.enable_grad.html",
    "torch.inference_mode": "generated/torch.autograd.grad_mode.inference_mode.html",
    "torch.nn.modules.module.Module": "generated/torch.nn.Module.html",
    "torch.nn.utils.clip_grad_norm_": "generated/torch.nn.utils.clip_grad_norm_.html",
    "torch.no_grad": "generated/torch.no_grad.html",
    "torch.optim.Optimizer": "optim.html#torch.optim.Optimizer",
}
SHORT = {"nn": "torch.nn", "F": "torch.nn.functional"}


def address(name: str) -> str | None:
    """Return the address of the page that treats `torch.something`, or None.

    >>> address("torch.func.vmap")
    'https://docs.pytorch.org/docs/stable/generated/torch.func.vmap.html'
    >>> address("torch.func.vamp")
    """
    first, dot, rest = name.partition(".")
    name = SHORT.get(first, first) + dot + rest
    if not name.startswith("torch."):
        return None
    if name in OTHERS:
        return DOCS + OTHERS[name]
    module, found = name.rpartition(".")[0], named(name)
    if not callable(found):
        return None
    if module in ONE_PAGE:
        return f"{DOCS}{ONE_PAGE[module]}#{name}"
    is_attribute = module == "torch" and isinstance(found, type)  # torch.dtype, torch.device
    return f"{DOCS}generated/{name}.html" if module in GENERATED and not is_attribute else None


def named(name: str) -> object:
    """Return what this PyTorch calls so, or None."""
    found: object = importlib.import_module("torch")
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found
