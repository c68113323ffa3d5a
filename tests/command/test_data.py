"""The three tasks: what they hold, that they are the same each time, and that labels are true."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets

from autograd_lib.command.build import build, make_loaders, make_schedule, pick_device
from autograd_lib.command.data import ClassLoss, Task, load_data
from autograd_lib.config import AutogradConfig, OptimizerConfig, load_config

SMALL = {
    "digits": {},
    "rows": {},
    "source": {"length": 32, "windows": 50, "test_windows": 20},
}
MODELS = {
    "digits": {"name": "cnn", "options": {"channels": [8, 8]}},
    "source": {"name": "transformer", "options": {"d_model": 8, "num_layers": 1}},
    "rows": {"name": "rnn", "options": {"hidden_size": 8}},
}


@pytest.fixture(scope="module", params=SMALL)
def task(request: pytest.FixtureRequest) -> tuple[str, Task]:
    return request.param, load_data(request.param, **SMALL[request.param])


def config_of(name: str, **sections: dict) -> AutogradConfig:
    data = {"name": name, "options": SMALL[name], "batch_size": 10, **sections.pop("data", {})}
    training = {"device": "cpu", **sections.pop("training", {})}
    return load_config({"data": data, "model": MODELS[name], "training": training, **sections})


# Data


def test_data_are_the_same_at_every_call(task: tuple[str, Task]) -> None:
    name, first = task
    second = load_data(name, **SMALL[name])
    for part in ("train", "test"):
        one, two = getattr(first, part), getattr(second, part)
        assert len(one) == len(two) > 0
        for i in range(len(one)):
            for a, b in zip(one[i], two[i], strict=True):
                assert torch.equal(a, b)


def test_digits_are_standardized_by_the_training_part_and_stratified() -> None:
    task = load_data("digits")
    images, labels = task.train.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert abs(images.mean().item()) < 1e-6
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert 0 < abs(task.test.tensors[0].mean().item()) < 0.1  # not by its own mean
    assert task.sizes == {"input_channels": 1, "num_classes": 10}
    counts = [torch.bincount(part.tensors[1], minlength=10) for part in (task.train, task.test)]
    assert (counts[0] / len(task.train) - counts[1] / len(task.test)).abs().max() < 0.002


def test_digits_are_all_of_scikit_learn_s_each_once() -> None:
    task = load_data("digits")
    original, labels = datasets.load_digits(return_X_y=True)
    found = torch.cat([task.train.tensors[0], task.test.tensors[0]]).flatten(1).numpy()
    # Both scaled to [0, 1] by the least and the largest pixel, which a shift and a scale keep.
    scaled = (found - found.min()) / (found.max() - found.min()) * 16
    both = np.concatenate([task.train.tensors[1], task.test.tensors[1]])
    rows = sorted(map(tuple, np.column_stack([scaled.round(), both]).astype(int).tolist()))
    assert rows == sorted(map(tuple, np.column_stack([original, labels]).astype(int).tolist()))


def test_source_is_text_and_targets_are_what_follows() -> None:
    task = load_data("source", length=50, windows=200, test_windows=30)
    tokens, following = task.train[7]
    assert tokens.shape == following.shape == (50,)
    assert tokens.dtype == following.dtype == torch.int64
    assert torch.equal(tokens[1:], following[:-1])
    assert task.sizes == {"vocab_size": 128}
    everything = torch.cat([task.train[i][0] for i in range(len(task.train))])
    assert 0 <= everything.min() <= everything.max() < 128
    assert everything.bincount().argmax() == ord(" ")  # the commonest character of Python
    library = (Path(ast.__file__).parent / "abc.py").read_text(encoding="utf-8")
    assert bytes(task.train[0][0].tolist()).decode("ascii") == library[:50]


def of_files(monkeypatch: pytest.MonkeyPatch, folder: Path, **texts: str) -> None:
    """Sources of the standard library that are these."""
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})


def test_a_character_outside_ascii_is_a_question_mark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_files(monkeypatch, tmp_path, a="aé\n" + 99 * "x")
    task = load_data("source", length=4, windows=1, test_windows=1)
    assert bytes(task.train[0][0].tolist()) == b"a?\nx"


def test_windows_to_learn_from_and_to_judge_by_have_no_character_in_common(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Each line has a number of its own, and the length of a window.
    lines = [f"{number:07}\n" for number in range(2000)]
    of_files(monkeypatch, tmp_path, a="".join(lines[:800]), b="".join(lines[800:]), c="short")
    task = load_data("source", length=8, windows=1798, test_windows=198)
    for part, expected in (
        (task.train, [(0, 720), (800, 1880)]),
        (task.test, [(720, 800), (1880, 2000)]),
    ):
        tokens, following = part.tensors
        text = [bytes(row).decode("ascii") for row in tokens.tolist()]
        # Of each file and part all but the last one, whose last target is not there.
        assert text == [line for begin, end in expected for line in lines[begin : end - 1]]
        assert torch.equal(following[:-1, -1], tokens[1:, 0])
    few = load_data("source", length=8, windows=31, test_windows=1)
    numbers = np.array([int(bytes(row)) for row in few.train.tensors[0].tolist()])
    assert (np.diff(numbers) > 50).all()  # evenly over all files


def test_more_windows_than_there_are_is_an_error_with_their_number() -> None:
    with pytest.raises(
        ValueError, match=r"source failed: .* expected windows to be at most \d+, .* got 9"
    ):
        load_data("source", windows=9_000_000)


def test_rows_are_the_images_from_top_to_bottom() -> None:
    images, rows = load_data("digits"), load_data("rows")
    assert rows.sizes == {"input_size": 8, "output_size": 10}
    for part in ("train", "test"):
        (whole, labels), (sequence, same) = (getattr(t, part).tensors for t in (images, rows))
        assert sequence.shape == (len(labels), 8, 8)
        assert torch.equal(whole[:, 0], sequence)
        assert torch.equal(labels, same)


def test_rows_are_judged_after_the_last_one() -> None:
    task = load_data("rows")
    logits, targets = torch.randn(5, 8, 10), torch.tensor([3, 1, 4, 1, 5])
    logits[0, -1, 3] = logits[1, -1, 1] = logits[2, 0, 4] = 99.0
    logits[2:, -1, 0] = 50.0
    expected = [-logits[b, -1].log_softmax(0)[targets[b]] for b in range(5)]
    found = task.loss_fn(logits, targets)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)
    assert task.metrics["accuracy"](logits, targets).item() == pytest.approx(2 / 5)


def test_the_loss_and_the_accuracy_of_text_are_over_all_positions() -> None:
    logits, targets = torch.randn(3, 5, 4), torch.randint(0, 4, (3, 5))
    places = [(b, s) for b in range(3) for s in range(5)]
    expected = [-logits[b, s].log_softmax(0)[targets[b, s]] for b, s in places]
    found = ClassLoss()(logits, targets)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)
    right = sum(logits[b, s].argmax() == targets[b, s] for b, s in places)
    accuracy = load_data("source", **SMALL["source"]).metrics["accuracy"]
    assert accuracy(logits, targets).item() == pytest.approx(float(right) / len(places))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("source", {"window": 3}, r"data\.options\.window: the options of source .* are "
         r"length, windows, test_windows; did you mean 'windows'\?"),
        ("digits", {"length": 3}, r"data\.options\.length: the options of .* are none$"),
        ("source", {"length": 0}, r"integers from 1 on, got {'length': 0}"),
        ("source", {"length": True}, r"integers from 1 on, got {'length': True}"),
        ("source", {"windows": "3"}, r"^data: source failed: .* 1 on, got {'windows': '3'}"),
    ],
)  # fmt: skip
def test_errors_name_the_path_and_the_nearest(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(name, **options)


def test_without_scikit_learn_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn \("):
        load_data("digits")


def test_without_sources_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=f"windows to be at most 0, as many as {tmp_path} has"):
        load_data("source")


# Building a run


@pytest.mark.parametrize("name", SMALL)
def test_a_run_trains(name: str) -> None:
    run = build(config_of(name))
    inputs, targets = next(iter(run.train))
    losses = [run.system.train_step(inputs, targets).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert set(run.system.evaluate(run.test)) == {"loss", "accuracy"}


def test_a_run_is_the_same_at_every_build() -> None:
    states = []
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before
        run = build(config_of("digits"))
        run.system.fit(run.train, 1)
        states.append(run.system.module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("epoch", [0, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(epoch: int) -> None:
    config = config_of("source", data={"batch_size": 12})
    task = load_data("source", **SMALL["source"])

    def batches(rank: int, processes: int) -> list[set[tuple[int, ...]]]:
        train, _ = make_loaders(config, task, rank, processes)
        train.sampler.set_epoch(epoch)
        return [{tuple(row) for row in tokens.tolist()} for tokens, _ in train]

    alone = batches(0, 1)
    assert [len(batch) for batch in alone] == [12] * 4  # 50 windows: the last two are left out
    for processes in (2, 3, 4):
        shares = [batches(rank, processes) for rank in range(processes)]
        assert [set().union(*step) for step in zip(*shares, strict=True)] == alone
        assert all(len(share) == 12 // processes for shared in shares for share in shared)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    task = load_data("source", **SMALL["source"])

    def order(seed: int, epoch: int) -> list[list[int]]:
        train, _ = make_loaders(config_of("source", training={"seed": seed}), task, 0, 1)
        train.sampler.set_epoch(epoch)
        return [tokens.flatten().tolist() for tokens, _ in train]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_every_test_sample_is_in_one_process() -> None:
    task = load_data("source", length=32, windows=50, test_windows=23)
    loaders = [make_loaders(config_of("source"), task, rank, 2)[1] for rank in range(2)]
    found = [tokens for loader in loaders for tokens, _ in loader]
    assert [len(batch) for batch in found] == [5, 5, 2, 5, 5, 1]
    expected = [task.test[i][0] for i in range(23)]
    assert sorted(torch.cat(found).tolist()) == sorted(torch.stack(expected).tolist())


def test_loaders_leave_the_global_generator_alone() -> None:
    run = build(config_of("digits"))
    before = torch.get_rng_state()
    list(run.train)
    list(run.test)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_learning_rate_follows_its_formula(schedule: str, warmup: float) -> None:
    steps, largest, warm = 40, 0.3, round(40 * warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=largest)
    scheduler = make_schedule(
        OptimizerConfig(lr=largest, schedule=schedule, warmup=warmup), optimizer, steps
    )
    found = []
    for _ in range(steps + 2):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    share = np.clip((np.arange(steps + 2) - warm) / (steps - warm), 0, 1)
    shapes = {
        "constant": np.ones(steps + 2),
        "linear": 1 - share,
        "cosine": np.cos(np.pi * share / 2) ** 2,
    }
    expected = largest * shapes[schedule]
    expected[:warm] = largest * np.arange(1, warm + 1) / max(warm, 1)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (scheduler is None) == (schedule == "constant" and not warmup)


def test_options_and_features_reach_what_they_are_for() -> None:
    run = build(
        config_of(
            "source",
            optimizer={"name": "sgd", "lr": 0.5, "options": {"momentum": 0.7}},
            autograd_system={"advanced_features": {"custom_gradients": True}},
        )
    )
    group = run.system.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.7, 0.01)
    assert run.system.module.embedding.embedding_dim == 8
    assert type(run.system.module.blocks[0].activation) is not torch.nn.GELU
    plain = build(config_of("source"))
    assert type(plain.system.module.blocks[0].activation) is torch.nn.GELU
    # The RNN has no such Functions, and trains all the same.
    build(config_of("rows", autograd_system={"advanced_features": {"custom_gradients": True}}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "cnn"}}, r"model\.name: 'cnn' does not fit data\.name 'source'; what "
         r"fits is cnn on digits, rnn on rows, transformer on source"),
        ({"model": {"name": "transformer", "options": {"d_modle": 8}}},
         r"model\.options\.d_modle: the options of transformer .* are d_model, .*;"
         r" did you mean 'd_model'\?"),
        ({"model": {"name": "transformer"}}, r"model\.options: missing a required argument: "
         "'d_model'"),
        ({"model": {"name": "transformer", "options": {"d_model": 8, "vocab_size": 3}}},
         r"model\.options\.vocab_size: the options of transformer that nothing "
         "else sets are d_model, num_layers"),
        ({"model": {"name": "transformer", "options": {"d_model": 8, "custom_gradients": True}}},
         r"model\.options\.custom_gradients: .* that nothing else sets are d_model"),
        ({"model": {"name": "transformer", "options": {"d_model": -8}}},
         r"model: transformer failed: RuntimeError: .* negative dimension -8"),
        ({"optimizer": {"options": {"beta": 1}}}, r"optimizer\.options\.beta: the options of adamw "
         r"that nothing else sets are betas, eps, .*; did you mean 'betas'\?"),
        ({"optimizer": {"options": {"lr": 1}}}, r"optimizer\.options\.lr: .* nothing else sets"),
        ({"optimizer": {"options": {"betas": [2, 0.9]}}}, r"optimizer: adamw failed: .*Invalid"),
        ({"data": {"batch_size": 51}}, r"data\.batch_size: expected at most 50, .* got 51"),
        ({"training": {"device": "gpu"}}, r"training\.device: expected a device that works here, "
         r"got 'gpu' \(Expected one of cpu"),
        ({"training": {"device": "cuda:77"}}, r"training\.device: expected a device that works "
         r"here, got 'cuda:77'"),
    ],
)  # fmt: skip
def test_a_build_that_cannot_be_says_what_to_change(sections: dict, message: str) -> None:
    base = {
        "data": {"name": "source", "options": SMALL["source"], "batch_size": 10},
        "model": MODELS["source"],
        "training": {"device": "cpu"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}}
    if "model" in sections:
        merged["model"] = sections["model"]
    with pytest.raises(ValueError, match=message):
        build(load_config(merged))


def test_a_batch_is_a_multiple_of_the_processes() -> None:
    task = load_data("digits")
    with pytest.raises(
        ValueError, match=r"multiple of the number of processes, 4, got 10; .*batch_size=12$"
    ):
        make_loaders(config_of("digits"), task, 0, 4)


def test_auto_is_a_device_that_is_there() -> None:
    there = torch.accelerator.is_available()
    assert pick_device("auto").type == (
        torch.accelerator.current_accelerator().type if there else "cpu"
    )
