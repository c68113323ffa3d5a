"""Where PyTorch's documentation treats a name: its addresses follow from a few rules.

PyTorch gives most functions and classes a page of their own, `generated/NAME.html`; some modules
are one page, with an anchor for each name. What follows neither rule is not linked, and neither is
what PyTorch does not document: a dead link is worse than none.
"""

from __future__ import annotations

import importlib
import re

DOCS = "https://docs.pytorch.org/docs/stable/"
SHORT = {"nn": "torch.nn", "F": "torch.nn.functional", "autograd": "torch.autograd"}
# Modules whose documented functions, or whose classes, have pages of their own.
OF_FUNCTIONS = {
    "torch",
    "torch.cuda",
    "torch.func",
    "torch.linalg",
    "torch.nn.functional",
    "torch.nn.utils",
}
OF_CLASSES = {"torch.nn", "torch.optim"}
# What has a docstring there, but no page.
UNLISTED = re.compile(
    r"_.*|(has|handle|import|init|merge|parse|unify|unsafe)_.*|.*_(copy|with_indices)"
    r"|as_strided_scatter|boolean_dispatch|celu_|conv_tbc|current_solver_handle|empty_permuted"
    r"|is_inference|multi_head_attention_forward|(native_)?channel_shuffle|nonzero_static"
    r"|quantize_per_tensor_dynamic|rearrange|selu_|thread_safe_generator|to_dlpack|use_mem_pool"
    r"|wait|while_loop|Container|CrossMapLRN2d|NLLLoss2d|RNNCellBase"
)
# Modules whose pages bear their own name, not that of the module one imports from: `nn.Parameter`.
OF_DEFINITION = {"torch.cuda.memory", "torch.nn.modules.flatten", "torch.nn.parameter"}
# Modules of which some names have pages of their own, and no rule says which.
SOME = {
    "torch": "Event Generator Stream enable_grad no_grad",
    "torch.Tensor": "backward detach detach_ grad is_leaf register_hook requires_grad retain_grad"
    " register_post_accumulate_grad_hook",
    "torch.autograd": "backward grad",
    "torch.autograd.forward_ad": "dual_level make_dual unpack_dual",
    "torch.autograd.functional": "hessian hvp jacobian jvp vhp vjp",
    "torch.compiler": "reset",
    "torch.nn.attention": "sdpa_kernel",
    "torch.nn.parallel": "DistributedDataParallel",
}
# The page that treats several names, each at its anchor.
ANCHORS = {
    "torch": ("amp", "autocast"),
    "torch.amp": ("amp", "custom_bwd custom_fwd"),
    "torch.autograd": ("autograd", "Function detect_anomaly set_detect_anomaly"),
    "torch.autograd.graph": (
        "autograd",
        "GradientEdge allow_mutation_on_saved_tensors disable_saved_tensors_hooks"
        " get_gradient_edge register_multi_grad_hook save_on_cpu saved_tensors_hooks",
    ),
    "torch.distributed.fsdp": ("distributed.fsdp.fully_shard", "FSDPModule fully_shard"),
    "torch.library": (
        "library",
        "custom_op opcheck register_autocast register_autograd register_fake register_kernel"
        " register_vmap triton_op wrap_triton",
    ),
    "torch.optim": ("optim", "Optimizer"),
    "torch.special": (
        "special",
        "digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammainc gammaincc gammaln i0 i0e i1"
        " i1e log1p log_ndtr log_softmax logit logsumexp multigammaln ndtr ndtri polygamma psi"
        " sinc softmax xlog1py xlogy zeta",
    ),
    "torch.utils.benchmark": ("benchmark_utils", "Compare Measurement Timer"),
    "torch.utils.checkpoint": (
        "checkpoint",
        "CheckpointPolicy SelectiveCheckpointContext checkpoint checkpoint_sequential"
        " create_selective_checkpoint_contexts set_checkpoint_debug_enabled",
    ),
}
# Modules, and names that PyTorch documents under another.
OTHERS = {
    "torch.OutOfMemoryError": "generated/torch.cuda.OutOfMemoryError.html",
    "torch.Tensor": "tensors.html",
    "torch.amp": "amp.html",
    "torch.amp.GradScaler": "amp.html#gradient-scaling",
    "torch.amp.autocast": "amp.html#torch.autocast",
    "torch.autograd": "autograd.html",
    "torch.autograd.gradcheck": "generated/torch.autograd.gradcheck.gradcheck.html",
    "torch.autograd.gradgradcheck": "generated/torch.autograd.gradcheck.gradgradcheck.html",
    "torch.cuda.OutOfMemoryError": "generated/torch.cuda.OutOfMemoryError.html",
    "torch.distributed": "distributed.html",
    "torch.func": "func.html",
    "torch.inference_mode": "generated/torch.autograd.grad_mode.inference_mode.html",
    "torch.nn.modules.module.Module": "generated/torch.nn.Module.html",
    "torch.set_grad_enabled": "generated/torch.autograd.grad_mode.set_grad_enabled.html",
    "torch.utils.checkpoint": "checkpoint.html",
}
PLACES = {
    **OTHERS,
    **{f"{m}.{n}": f"generated/{m}.{n}.html" for m, names in SOME.items() for n in names.split()},
    **{f"{m}.{n}": f"{p}.html#{m}.{n}" for m, (p, names) in ANCHORS.items() for n in names.split()},
}


def address(name: str) -> str | None:
    """Return the address of the page that treats `torch.something`, or None.

    >>> address("torch.func.vmap")
    'https://docs.pytorch.org/docs/stable/generated/torch.func.vmap.html'
    >>> address("torch.func.vamp")
    """
    first, dot, rest = name.partition(".")
    name = SHORT.get(first, first) + dot + rest
    place = PLACES.get(name) or own_page(name)
    return place and DOCS + place


def own_page(name: str) -> str | None:
    """Return where the page is that the rules give a name, or None."""
    module, _, last = name.rpartition(".")
    found = named(name)
    home = getattr(found, "__module__", None) or ""
    if home in OF_DEFINITION and module in {"torch.cuda", "torch.nn"}:
        return f"generated/{home}.{last}.html"
    copied = module == "torch" and found is named(f"torch.nn.functional.{last}")  # torch.conv1d
    listed = module in (OF_CLASSES if isinstance(found, type) else OF_FUNCTIONS)
    documented = callable(found) and found.__doc__ and home.startswith("torch")
    if not listed or not documented or copied or UNLISTED.fullmatch(last):
        return None
    return f"generated/{name}.html"


def named(name: str) -> object:
    """Return what this PyTorch calls so, or None."""
    found: object = importlib.import_module("torch")
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found
