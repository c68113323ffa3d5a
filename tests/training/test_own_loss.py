"""The model's own loss: batches that are mappings, divided by labels, or refused by name."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import TiedLanguageModel
from handwritten import NETS
from loops import assert_same, configured, everything
from torch import Tensor, nn

from autograd_lib import AutogradTrainingSystem, derivative_tower
from autograd_lib.training.step import move

Batch = dict[str, Any]


def system_of(
    model: nn.Module, loss_fn: Any = None, size: int | None = None, **options: Any
) -> AutogradTrainingSystem:
    sections = {"performance": {} if size is None else {"micro_batch": size}}
    config = configured(**sections | options.pop("config", {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return AutogradTrainingSystem(model, optimizer, loss_fn, config, **options)


def gradient(model: nn.Module) -> Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([g.to_dense().flatten() for g in found])


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def doubled(batch: Batch) -> Batch:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }


# --- models of transformers


def architecture(name: str, **config: Any) -> tuple[nn.Module, Batch]:
    """In float64 and without dropout, on three samples whose labels are very uneven."""
    pytest.importorskip("transformers")
    from architectures import ARCHITECTURES  # noqa: PLC0415

    model, batch = ARCHITECTURES[name]()
    for key, value in config.items():
        setattr(model.config, key, value)
        if hasattr(model, key):
            setattr(model, key, value)
    model.eval().double()
    batch = {k: torch.cat([v, v[:1].flip(-1)]) for k, v in batch.items()}
    if batch["labels"].dim() > 1:
        batch["labels"][0, 2:] = -100
    return model, doubled(batch)


# Double precision has no grouped product.
DIVIDED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("gpt2", "llama", "bert", "t5", "bart", "vit", "whisper")},
    "mixtral": {"output_router_logits": False, "_experts_implementation": "eager"},
}


@pytest.mark.parametrize("name", DIVIDED)
def test_micro_batches_have_the_gradient_of_the_whole_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # decoders compute their loss in float32
    model, batch = architecture(name, **DIVIDED[name])
    loss = model(**batch).loss
    loss.backward()
    expected = gradient(model)
    model.zero_grad()
    for i in range(3):  # what equal weights make of it
        (model(**{k: v[i : i + 1] for k, v in batch.items()}).loss / 3).backward()
    naive = apart(gradient(model), expected)
    assert naive < 1e-12 if name == "vit" else naive > 0.2
    for size in (None, 1, 2):
        system = system_of(model, size=size)
        torch.testing.assert_close(system.train_step(batch), loss.detach())
        assert apart(gradient(model), expected) < 1e-12
        parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
        assert system.evaluate(parts)["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_a_dict_of_a_tokenizer_goes_through_fit() -> None:
    transformers = pytest.importorskip("transformers")
    model, batch = architecture("gpt2")
    system = AutogradTrainingSystem(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    encoded = transformers.BatchEncoding(batch)
    rows = system.fit([encoded, (encoded, None)], 5, [encoded])
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] - 0.1
    assert rows[-1]["validation_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert isinstance(encoded["labels"], Tensor)  # what came is left as it was
    assert system.monitor is not None
    assert len(system.monitor.history["step"]) == 10


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_peft_train_as_by_hand() -> None:
    peft = pytest.importorskip("peft")
    states = []
    for kind in ("hand", "system", "unwatched", "micro-batches"):
        model, batch = architecture("gpt2")
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, lora).double()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        if kind == "hand":
            for _ in range(3):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
        else:
            config = configured(
                performance={"micro_batch": 1} if kind == "micro-batches" else {},
                monitoring={"enabled": kind != "unwatched"},
                training={"max_nonfinite": 0 if kind == "unwatched" else 3},
            )
            system = AutogradTrainingSystem(model, optimizer, config=config)
            system.fit([batch], 3)
        states.append([p.detach() for p in trained])
    hand, watched, unwatched, divided = states
    assert all(map(torch.equal, hand, watched))
    assert all(map(torch.equal, hand, unwatched))
    for a, b in zip(divided, hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accumulated_ctc_needs_a_count() -> None:
    """A mean over samples, each divided by the length of its target."""
    model, batch = architecture("wav2vec2")
    model(**batch).loss.backward()
    expected = gradient(model)
    system = system_of(model, size=1)
    message = r"^train_step: the own loss of Wav2Vec2ForCTC cannot be divided .*: it ends in Mean"
    with pytest.raises(ValueError, match=message):
        system.train_step(batch)
    system = system_of(model, size=1, count=lambda batch: len(batch["labels"]))
    system.train_step(batch)
    assert apart(gradient(model), expected) < 1e-12


def test_terms_beside_the_labels_are_refused() -> None:
    model, batch = architecture("mixtral", _experts_implementation="eager")
    system = system_of(model, size=1)
    message = r"own loss of MixtralForCausalLM cannot be divided .* it ends in Add.*leave micro_b"
    with pytest.raises(ValueError, match=message):
        system.train_step(batch)
    loss = system_of(model).train_step(batch)  # whole it is what the model says
    assert loss.item() == pytest.approx(model(**batch).loss.item())


def test_a_contrastive_loss_is_refused() -> None:
    pytest.importorskip("transformers")
    from architectures import ARCHITECTURES  # noqa: PLC0415

    model, batch = ARCHITECTURES["clip"]()
    model.eval()
    system = system_of(model, size=1)
    before = everything(system)
    message = r"^train_step: how much .* the batch has no labels; .* contrastive loss, as CLIP's, c"
    with pytest.raises(ValueError, match=message):
        system.train_step(batch)
    assert_same(everything(system), before)
    loss = model(**batch).loss.item()
    assert system_of(model).train_step(batch).item() == pytest.approx(loss)
    assert system.evaluate([batch])["loss"] == pytest.approx(loss)


def test_derivatives_of_the_own_loss() -> None:
    model, batch = architecture("bert")
    tower = system_of(model).compute_higher_order_gradients(UserDict(batch), order=2)
    assert tower.values[0].item() == pytest.approx(model(**batch).loss.item())
    model.zero_grad()
    model(**batch).loss.backward()
    step, weights = 1e-5, dict(model.named_parameters())
    for name, p in weights.items():
        torch.testing.assert_close(
            tower[0][name], torch.zeros_like(p) if p.grad is None else p.grad
        )
    slopes = []
    for sign in (1, -1):
        moved = {name: p + sign * step * tower.direction[name] for name, p in weights.items()}
        model.zero_grad()
        torch.func.functional_call(model, moved, kwargs=batch).loss.backward()
        slopes.append(gradient(model))
    product = torch.cat([tower[1][n].flatten() for n, p in weights.items() if p.grad is not None])
    assert apart(product, (slopes[0] - slopes[1]) / (2 * step)) < 1e-6


# --- models of one's own


class Labelled(nn.Module):
    """Returns its loss in one of the forms that people give it."""

    def __init__(self, form: str = "mapping", loss: Callable[..., Tensor] = F.cross_entropy):
        super().__init__()
        self.inner, self.form, self.loss = TiedLanguageModel(), form, loss

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        logits = self.inner(tokens)
        loss = self.loss(logits.flatten(0, -2), labels.flatten())
        if self.form == "attribute":
            return type("Output", (), {"loss": loss, "logits": logits})()
        forms = {"mapping": {"loss": loss}, "tuple": (loss, logits), "scalar": loss}
        return {**forms, "second": (logits, loss), "none": {"scores": logits}}[self.form]


def labelled(form: str = "mapping", loss: Any = F.cross_entropy) -> tuple[Labelled, Batch]:
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 11, (2, 4, 3))
    labels[0, 1:] = -100
    return Labelled(form, loss).double(), {"tokens": tokens, "labels": labels}


@pytest.mark.parametrize("form", ["mapping", "attribute", "tuple", "scalar"])
def test_where_a_loss_is_found(form: str) -> None:
    model, batch = labelled(form)
    twin = labelled()[0]
    loss = twin(**batch)["loss"]
    loss.backward()
    for size in (None, 1):
        assert system_of(model, size=size).train_step(batch).item() == pytest.approx(loss.item())
        assert apart(gradient(model), gradient(twin)) < 1e-12
    tower = derivative_tower(model, None, batch, order=1)
    torch.testing.assert_close(tower.values[0], loss.detach())


@pytest.mark.parametrize(("form", "came"), [("second", "tuple"), ("none", r"dict of scores")])
def test_where_no_loss_is_found(form: str, came: str) -> None:
    model, batch = labelled(form)
    system = system_of(model)
    before = everything(system)
    message = rf"^train_step: without loss_fn, expected the model's output .*, got {came}; give"
    with pytest.raises(ValueError, match=message):
        system.train_step(batch)
    assert_same(everything(system), before)
    with pytest.raises(ValueError, match=r"^evaluate: without loss_fn"):
        system.evaluate([batch])
    with pytest.raises(ValueError, match=r"^derivative_tower: without loss_fn"):
        derivative_tower(model, None, batch)


class TwoLosses(nn.Linear):
    """Returns a part of its loss first, or the whole of it."""

    def __init__(self, form: str) -> None:
        super().__init__(3, 1, dtype=torch.float64)
        self.form = form

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        first, second = y.square().mean(), y.abs().mean()
        forms = {
            "sum": (first + 0.5 * second, second),
            "read": (first, second.detach()),
            "apart": (first, second),
            "split": torch.stack([first, second]).unbind(),  # two outputs of one operation
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["sum", "read", "apart", "split"])
def test_a_second_loss_in_a_tuple_is_not_left_out(form: str) -> None:
    torch.manual_seed(0)
    model, x = TwoLosses(form), torch.randn(4, 3).double()
    system = system_of(model)
    if form in ("sum", "read"):
        (expected,) = torch.autograd.grad(model(x)[0], model.weight)
        system.train_step({"x": x})
        torch.testing.assert_close(model.weight.grad, expected)
        return
    message = r"^train_step: without loss_fn, expected one loss, got a tuple .* output\[1\]`$"
    with pytest.raises(ValueError, match=message):
        system.train_step({"x": x})
    assert model.weight.grad is None
    with torch.no_grad():
        expected = sum(model(x))
    system = system_of(model)
    system.loss_fn = lambda output, _: output[0] + output[1]
    assert system.train_step({"x": x}).item() == pytest.approx(expected.item())


def test_targets_that_no_loss_takes() -> None:
    model, batch = labelled()
    message = r"got a pair with targets, which the model is not given; give the model what its loss"
    with pytest.raises(ValueError, match=message):
        system_of(model).train_step(batch, batch["labels"])
    with pytest.raises(ValueError, match=message):
        derivative_tower(model, None, batch, batch["labels"])


INPUTS: dict[str, Callable[[Batch], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "UserDict": UserDict,
    "NumPy": lambda batch: UserDict({k: v.numpy() for k, v in batch.items()}),
    "pair": lambda batch: (UserDict(batch), None),
    "positional": lambda batch: (tuple(batch.values()), None),
    "list": lambda batch: [list(batch.values()), None],
}


@pytest.mark.parametrize("form", INPUTS)
def test_forms_of_a_batch_with_its_loss_inside(form: str) -> None:
    model, batch = labelled()
    loss = model(**batch)["loss"].item()
    given = INPUTS[form](batch)
    (row,) = system_of(model).fit([given], 1)
    assert row["loss"] == pytest.approx(loss)
    if form in ("positional", "list"):  # nothing says which one holds the labels
        with pytest.raises(ValueError, match="how much a batch weighs beside others is not known"):
            system_of(model, size=1).fit([given], 1)
        options = {"count": lambda _: 1.0}
        assert system_of(model, **options).evaluate([given])["loss"] == pytest.approx(loss)
    else:
        (row,) = system_of(model, size=1).fit([given], 1)
        assert row["loss"] == pytest.approx(loss)
    assert system_of(model).evaluate([given])["loss"] == pytest.approx(loss)


def test_a_given_loss_takes_the_batch_and_so_do_metrics_and_count() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TiedLanguageModel().double()

        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            return self.inner(tokens)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())

    _, batch = labelled()
    torch.manual_seed(0)
    model = Logits()
    expected = loss(model(**batch), batch)
    expected.backward()
    right = gradient(model)
    options = {
        "count": lambda batch: (batch["labels"] != -100).sum(),
        "metrics": {"first": lambda _, batch: batch["tokens"][0, 0]},
    }
    system = system_of(model, loss, 1, **options)
    assert system.train_step(batch).item() == pytest.approx(expected.item())
    assert apart(gradient(model), right) < 1e-12
    found = system.evaluate([UserDict(batch)])
    assert found == pytest.approx({"loss": expected.item(), "first": batch["tokens"][0, 0].item()})
    pair = ({"tokens": batch["tokens"], "labels": batch["labels"]}, batch["labels"])
    token_loss = lambda logits, labels: F.cross_entropy(logits.flatten(0, -2), labels.flatten())  # noqa: E731
    assert system_of(model, token_loss).train_step(*pair).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_a_loss_of_pytorch_beside_a_mapping_says_what_to_write(loss_fn: nn.Module) -> None:
    model, batch = labelled()
    system = system_of(model, loss_fn)
    message = (
        r"^train_step: a batch that is a mapping goes to loss_fn whole, and .*Loss\(\) takes t"
    )
    with pytest.raises(TypeError, match=message):
        system.train_step(batch)
    assert system.step == 0


OWN: dict[str, Callable[[Any, Any], Tensor]] = {
    "attribute": lambda output, _: output.loss,
    "mapping": lambda output, _: output["loss"],
    "tuple": lambda output, _: output[0],
    "scalar": lambda output, _: output,
}


@pytest.mark.parametrize("form", OWN)
def test_a_loss_fn_that_returns_the_own_loss_is_not_divided_by_samples(form: str) -> None:
    model, batch = labelled(form)
    expected = system_of(model).train_step(batch)
    assert_same(system_of(model, OWN[form]).train_step(batch), expected)
    with pytest.raises(
        ValueError, match=r"^train_step: loss_fn returns the model's own loss, whic"
    ):
        system_of(model, OWN[form], 1).train_step(batch)
    count = lambda batch: (batch["labels"] != -100).sum()  # noqa: E731
    found = system_of(model, OWN[form], 1, count=count).train_step(batch)
    torch.testing.assert_close(found, expected)


SEEN: dict[str, tuple[Any, str | None]] = {
    "classes": (F.cross_entropy, None),
    "cast": (lambda x, y: F.cross_entropy(x, y).float(), None),
    "a sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), "it ends in NllLoss"),
    "weighted": (
        lambda x, y: F.cross_entropy(x, y, weight=torch.arange(11.0, dtype=x.dtype)),
        r"it is a mean over [\d.]+ terms, the batch has [13] labels",
    ),
    "shifted": (lambda x, y: F.cross_entropy(x[:-1], y[1:]), "it is a mean over 0 terms"),
    "smoothed": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), "it ends in Add"),
    "two": (lambda x, y: F.cross_entropy(x, y) + x.square().mean(), "it ends in Add"),
}


@pytest.mark.parametrize("kind", SEEN)
def test_what_the_graph_says_of_a_loss(kind: str) -> None:
    loss, why = SEEN[kind]
    model, batch = labelled(loss=loss)
    model(**batch)["loss"].backward()
    expected = gradient(model)
    system = system_of(model, size=1)
    if why is None:
        system.train_step(batch)
        assert apart(gradient(model), expected) < (1e-6 if kind == "cast" else 1e-12)
        return
    with pytest.raises(ValueError, match=rf"own loss of Labelled cannot be divided .*{why}"):
        system.train_step(batch)
    assert system.step == 0
    system_of(model).train_step(batch)  # whole it is the model's business
    assert apart(gradient(model), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_labels_are_rounded_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (3, 5003))
    labels = tokens.clone()
    labels[1, 301:] = -100
    model = Labelled().to(dtype)
    loss = model(tokens, labels)["loss"].item()
    found = system_of(model, size=1).train_step({"tokens": tokens, "labels": labels})
    assert found.item() == pytest.approx(loss, rel=1e-2)
    weighted = system_of(Labelled(loss=SEEN["weighted"][0]).to(dtype), size=1)
    with pytest.raises(ValueError, match="it is a mean over"):
        weighted.train_step({"tokens": tokens, "labels": labels})


class Regression(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(3, 2).double(), loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.layer(x), labels)


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits]
)
def test_losses_of_numbers_are_means_over_all_of_them(loss: Any) -> None:
    torch.manual_seed(0)
    model, batch = Regression(loss), {"x": torch.randn(5, 3), "labels": torch.rand(5, 2)}
    batch = doubled(batch)
    model(**batch).backward()
    expected = gradient(model)
    system_of(model, size=2).train_step(batch)
    assert apart(gradient(model), expected) < 1e-12


def test_the_graph_of_a_compiled_model_says_nothing() -> None:
    model, batch = labelled()
    model.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="it is compiled, so that nobody sees"):
        system_of(model, size=1).train_step(batch)
    count = lambda batch: (batch["labels"] != -100).sum()  # noqa: E731
    expected = labelled()[0](**batch)["loss"]
    found = system_of(model, size=1, count=count).train_step(batch)
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("performance", [{}, {"precision": "bf16"}, {"precision": "fp16"}])
@pytest.mark.parametrize("size", [None, 1])
def test_steps_are_those_of_a_loop_by_hand(performance: dict[str, Any], size: int | None) -> None:
    """With autocast, scaler and clipping: the recipes of PyTorch, the sum over all labels."""
    model, batch = labelled()
    twin = labelled()[0].float()
    model.float()
    precision = performance.get("precision", "fp32")
    sections = {"performance": {**performance, "micro_batch": size}, "training": {"clip_norm": 0.1}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    system = AutogradTrainingSystem(model, optimizer, config=configured(**sections))
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cuts = [slice(i, i + (size or 4)) for i in range(0, 4, size or 4)]
    for _ in range(4):
        system.train_step(batch)
        other.zero_grad()
        for cut in cuts:
            part = {k: v[cut] for k, v in batch.items()}
            share = (part["labels"] != -100).sum() / (batch["labels"] != -100).sum()
            if share:
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = twin(**part)["loss"]
                scaler.scale(loss * share.item() if size else loss).backward()
        scaler.unscale_(other)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        scaler.step(other)
        scaler.update()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert size or torch.equal(a, b)


# --- what is not divided


@pytest.mark.parametrize("name", NETS)
def test_nets_by_hand_are_divided_rightly_or_not_at_all(name: str) -> None:
    model, batch = NETS[name]()
    model.eval()
    model(**batch)["loss"].backward()
    expected = gradient(model)
    system_of(model).train_step(batch)
    assert_same(gradient(model), expected)
    words = {
        "tagger": "cannot be divided .* it ends in Mean",
        "message_passing": "to divide a batch, expected tensors",
        "recommender": "how much a batch weighs beside others is not known",
        "mixture_of_experts": "cannot be divided .* it ends in Add",
    }
    if name == "unet":  # without batch statistics
        system_of(model, size=1).train_step(batch)
        assert apart(gradient(model), expected) < 1e-5
        return
    with pytest.raises(ValueError, match=words[name]):
        system_of(model, size=1).train_step(batch)
    if name in ("recommender", "tagger"):  # whose means are over samples
        system_of(model, size=2, count=lambda batch: len(next(iter(batch.values())))).train_step(
            batch
        )
        assert apart(gradient(model), expected) < 1e-5


def test_lists_with_an_entry_for_each_sample_are_not_cut() -> None:
    """Boxes of two objects in each of two images look like tensors of two samples."""
    model, batch = labelled()
    count = lambda _: 1.0  # noqa: E731
    entries = [{"boxes": torch.zeros(4, 4)} for _ in range(4)]
    features = [torch.zeros(4, 2), torch.zeros(4, 3)]
    seen = []

    def forward(tokens: Tensor, labels: Tensor, extra: Any) -> Any:
        seen.append(extra)
        return Labelled.forward(model, tokens, labels)

    model.forward = forward  # type: ignore[method-assign]
    for extra in (entries, ["a", "b", "c", "d"]):
        system_of(model, count=count).train_step({**batch, "extra": extra})
        message = (
            r"^train_step: to divide a batch of 4 samples, expected tensors, got a list with an"
        )
        with pytest.raises(ValueError, match=message):
            system_of(model, size=2, count=count).train_step({**batch, "extra": extra})
    seen.clear()
    system_of(model, size=2).train_step({**batch, "extra": features})
    assert [[tuple(t.shape) for t in extra] for extra in seen] == [[(2, 2), (2, 3)]] * 2


# --- loaders


def test_a_loader_that_gives_none_is_named() -> None:
    model, batch = labelled()
    system = system_of(model)
    message = r"^the loader gives None for a batch; expected a mapping or a pair .*collate_fn"
    with pytest.raises(ValueError, match=message):
        system.fit([batch, None, batch], 1)
    assert (system.step, system.epoch) == (1, 0)
    with pytest.raises(ValueError, match=r"^the validation loader gives None for a batch"):
        system.evaluate([batch, None])


def test_an_exhausted_validation_is_named() -> None:
    def generate() -> Iterator[Batch]:
        yield batch

    model, batch = labelled()
    system = system_of(model)
    with pytest.raises(ValueError, match=r"^the validation loader of rank 0 gives no batch; "):
        system.fit([batch], 2, generate())
    assert system.epoch == 1


def test_packed_sequences_are_inputs_too() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x: nn.utils.rnn.PackedSequence, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.rnn(x)[1][0], labels)

    torch.manual_seed(0)
    x = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (4, 2)])
    batch, model = {"x": x, "labels": torch.tensor([0, 3])}, Packed()
    moved = move(batch, torch.device("meta"))
    assert moved["x"].data.is_meta
    assert moved["labels"].is_meta
    assert system_of(model).train_step(batch).item() == pytest.approx(model(**batch).item())
    np.testing.assert_allclose(system_of(model).evaluate([batch])["loss"], model(**batch).item())
