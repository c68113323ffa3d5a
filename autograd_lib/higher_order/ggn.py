"""Products with the Gauss-Newton and the Fisher matrix of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from autograd_lib.core.batches import call, read_batch, targets_of
from autograd_lib.higher_order.inputs import (
    Inputs,
    check_tensor,
    dense,
    follow,
    tensors_of,
    trainable,
)
from autograd_lib.higher_order.operators import linearized_hvp, pulled_back

__all__ = ["fisher_product", "ggn_product"]

Named = dict[str, Tensor]


def ggn_product(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any
) -> Callable[[Inputs], Named]:
    r"""Return the function $v \mapsto G v$ of the generalized Gauss-Newton matrix.

    $G = J^\top (\nabla_z^2 \ell)\, J$ with $J$ the Jacobian of the model's outputs $z$ and $\ell$
    the loss as a function of them (Schraudolph 2002, "Fast curvature matrix-vector products for
    second-order gradient descent"). It leaves out the curvature of the model itself, so that it is
    positive semi-definite wherever the loss is convex in the outputs. For cross-entropy and the
    squared error it is the Fisher matrix too (Martens 2020, "New insights and perspectives on the
    natural gradient method").

    The model runs once, as for `linearize_hvp`; a product costs two backward passes, however many
    are taken.

    Args:
        model: a module; its parameters that require a gradient are meant, shared ones once. Its
            parameters, gradients, buffers and mode stay as they are.
        loss_fn: `loss_fn(outputs, targets)` is the loss, a scalar, whatever its reduction. Of a
            batch that is a mapping it is given all: `loss_fn(outputs, batch)`.
        batch: a pair (inputs, targets) or a mapping of the model's arguments.

    Returns:
        A function of one dict with a tensor for each of those parameters, by name. It returns a
        dict like it, detached. `torch.func.vmap` over it takes several vectors at a time.

    Raises:
        TypeError: if `loss_fn` is None, or returns no tensor.
        ValueError: if the loss is not a scalar, or one that the model has computed itself; if no
            parameter requires a gradient, or, when called, `v` is not like the parameters.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> product = ggn_product(model, nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> product({"weight": torch.tensor([[1.0, 0.0]])})  # X^T X v, as 2 / N is 1
        {'weight': tensor([[10., 14.]])}
    """
    if not callable(loss_fn):
        raise TypeError(
            "ggn_product: expected loss_fn to compute the loss from the model's outputs, for its "
            f"curvature in them is needed, got {loss_fn!r}"
        )

    def head(output: Any, targets: Any) -> tuple[Named, Callable[[Inputs], Any]]:
        flat, spec = tree_flatten(output)
        places = [i for i, z in enumerate(flat) if isinstance(z, Tensor) and z.requires_grad]

        def loss_of(heads: Named) -> Tensor:
            values = [heads.get(str(i), z) for i, z in enumerate(flat)]
            loss = loss_fn(tree_unflatten(values, spec), targets)
            if any(loss is z for z in heads.values()):
                raise ValueError(
                    "ggn_product: loss_fn returned an output of the model, a loss that is not "
                    "computed from outputs; expected, for instance, lambda output, batch: "
                    "F.cross_entropy(output.logits, batch['labels'])"
                )
            return loss

        outputs = {str(i): flat[i] for i in places}
        return outputs, linearized_hvp("ggn_product", loss_of, outputs)

    return _products("ggn_product", model, batch, head)


def fisher_product(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any
) -> Callable[[Inputs], Named]:
    r"""Return the function $v \mapsto F v$ of the empirical Fisher matrix.

    $F = \frac{1}{N} \sum_n g_n g_n^\top$ with $g_n$ the gradient of the n-th loss. With targets
    drawn from the model's own predictions it estimates the Fisher matrix, from those of the
    data it differs (Kunstner, Balles & Hennig 2019, "Limitations of the empirical Fisher
    approximation for natural gradient descent").

    Args:
        model: as for `ggn_product`.
        loss_fn: `loss_fn(outputs, targets)` are the losses of the N samples, a vector, as by
            `functools.partial(F.cross_entropy, reduction="none")`.
        batch: as for `ggn_product`.

    Returns:
        A function like that of `ggn_product`.

    Raises:
        TypeError: if `loss_fn` returns no tensor.
        ValueError: if it returns no vector; if no parameter requires a gradient, or, when called,
            `v` is not like the parameters.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> product = fisher_product(model, lambda y, _: y[:, 0], (x, None))  # gradients x_n
        >>> product({"weight": torch.tensor([[1.0, 0.0]])})
        {'weight': tensor([[5., 7.]])}
    """

    def head(output: Any, targets: Any) -> tuple[Named, Callable[[Any], Any]]:
        losses = check_tensor("fisher_product", loss_fn(output, targets))
        if losses.ndim != 1:
            raise ValueError(
                "fisher_product: expected loss_fn to return a vector, the loss of each sample, got "
                f"the shape {tuple(losses.shape)}; give it reduction='none'"
            )
        return {"loss": losses}, lambda u: {"loss": u["loss"] / len(losses)}

    return _products("fisher_product", model, batch, head)


def _products(
    operation: str,
    model: nn.Module,
    batch: Any,
    head: Callable[[Any, Any], tuple[Named, Callable[[Inputs], Any]]],
) -> Callable[[Inputs], Named]:
    """Products with $J^T C J$, for outputs and a product with C that `head` returns."""
    parameters, batch = trainable(operation, model), read_batch(operation, batch)
    leaves = {k: p.detach().requires_grad_() for k, p in parameters.items()}
    state = leaves | {k: buffer.clone() for k, buffer in model.named_buffers()}
    inputs = list(leaves.values())
    # J^T u is linear in u: its derivative there is J, and one more backward a product with J.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output = call(lambda *args, **options: functional_call(model, state, args, options), batch)
        outputs, curvature = head(output, targets_of(batch))
        z = list(outputs.values())
        u = [torch.zeros_like(t, requires_grad=True) for t in z]
        pulled = torch.autograd.grad(z, inputs, u, create_graph=True, materialize_grads=True)
        push, pull = pulled_back([dense(t) for t in pulled], u), pulled_back(z, inputs)

    def product(v: Inputs) -> Named:
        pushed = push(tensors_of(follow(operation, parameters, v)))
        curved = curvature(dict(zip(outputs, pushed, strict=True)))
        return dict(zip(parameters, pull(tensors_of(curved)), strict=True))

    return product
