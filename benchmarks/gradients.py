"""Reading all gradients of a model: the library against loops over the parameters.

Two models: an MLP of 100 layers of width 64, whose 200 gradients are small, and a transformer
encoder of ten million parameters, whose gradients are large. Writes a record of each comparison to
autograd_lib/report/records/.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from autograd_lib import compare, compute_gradient_statistics, get_gradient_norms
from autograd_lib.report import RECORDS


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(100) for layer in (nn.Linear(64, 64), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)  # or the gradients would vanish
    return nn.Sequential(*layers[:-1]), torch.randn(32, 64)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(320, 8, 1280, batch_first=True)
    return nn.TransformerEncoder(layer, 8, enable_nested_tensor=False), torch.randn(8, 128, 320)


def loop_of_eight_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    statistics = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        statistics[name] = {
            "norm": grad.norm().item(),
            "mean": grad.mean().item(),
            "std": grad.std(correction=0).item(),
            "min": grad.min().item(),
            "max": grad.max().item(),
            "zero_fraction": (grad == 0).float().mean().item(),
            "nan_count": grad.isnan().sum().item(),
            "inf_count": grad.isinf().sum().item(),
        }
    return statistics


def loop_of_norms(model: nn.Module) -> dict[str, float]:
    return {name: p.grad.norm().item() for name, p in model.named_parameters()}


def foreach_norms(model: nn.Module) -> dict[str, float]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters])).tolist()
    return dict(zip(names, norms, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    for make in (mlp, encoder):
        torch.manual_seed(0)
        model, batch = make()
        model.to(options.device)
        model(batch.to(options.device)).square().mean().backward()
        for what, candidates in {
            "statistics": {
                "loop": loop_of_eight_statistics,
                "compute_gradient_statistics": compute_gradient_statistics,
            },
            "norms": {
                "loop": loop_of_norms,
                "torch._foreach_norm": foreach_norms,
                "get_gradient_norms": get_gradient_norms,
            },
        }.items():
            for candidate in candidates.values():  # the same answers first
                total = math.hypot(*loop_of_norms(model).values())
                result = candidate(model)
                entries = result.get("parameters", result)
                norms = [e["norm"] if isinstance(e, dict) else e for e in entries.values()]
                assert math.isclose(math.hypot(*norms), total, rel_tol=1e-4)
            comparison = compare(
                {name: (lambda f=f, m=model: f(m)) for name, f in candidates.items()},
                rounds=options.rounds,
                threads=options.threads,
            )
            print(f"\n{what} of {make.__name__} on {options.device}\n{comparison}", flush=True)
            suffix = "" if options.device == "cpu" else f"_{options.device}"
            comparison.to_json(RECORDS / f"gradients_{what}_{make.__name__}{suffix}.json")


if __name__ == "__main__":
    main()
