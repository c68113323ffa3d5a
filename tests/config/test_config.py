"""Records of options: what they accept, what becomes of them in files, what they do."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from string import ascii_letters

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import yaml
from cases import DEVICES, mlp
from ruamel.yaml import YAML
from torch import nn
from torch._dynamo.utils import counters

from autograd_lib.config import (
    AutogradConfig,
    DataConfig,
    DistributedConfig,
    FeaturesConfig,
    ModelConfig,
    MonitoringConfig,
    OptimizerConfig,
    Settings,
    SystemConfig,
    TrainingConfig,
    load_config,
)
from autograd_lib.config.reading import config_yaml

PLAN = {"layers": ["save", ["recompute", "save", ["selective"]]], "head": "recompute"}
FULL = Settings("bf16", 4, PLAN, "channels_last", True)


class Counted(nn.Module):
    """A linear layer that counts how often its forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).tanh()


def test_defaults_are_the_plain_step():
    assert asdict(Settings()) == {
        "precision": "fp32",
        "micro_batch": None,
        "checkpoint": {},
        "memory_format": "contiguous_format",
        "compile": False,
    }


def test_compared_by_value():
    assert Settings("bf16", checkpoint={"a": ["save"]}) == Settings(
        "bf16", checkpoint={"a": ("save",)}
    )
    assert replace(FULL) == FULL
    assert hash(FULL) == hash(replace(FULL))
    for change in [
        {"precision": "fp16"},
        {"micro_batch": 5},
        {"checkpoint": {}},
        {"memory_format": "contiguous_format"},
        {"compile": False},
    ]:
        assert replace(FULL, **change) != FULL
    with pytest.raises(FrozenInstanceError):
        FULL.compile = False


def test_keeps_nothing_of_the_mapping_it_was_given():
    plan = {"a": ["save", "save"]}
    settings = Settings(checkpoint=plan)
    plan["a"][0] = "recompute"
    plan["b"] = "save"
    assert settings.checkpoint == {"a": ("save", "save")}


@pytest.mark.parametrize("settings", [Settings(), FULL])
def test_survives_yaml_and_json(settings):
    assert Settings(**yaml.safe_load(yaml.safe_dump(asdict(settings)))) == settings
    assert Settings(**json.loads(json.dumps(asdict(settings)))) == settings
    assert eval(repr(settings)) == settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (Settings(), "fp32"),
        (Settings("fp16", 3), "fp16, micro-batch 3"),
        (Settings(memory_format="channels_last", compile=True), "fp32, channels last, compiled"),
        (Settings(checkpoint={"a": "save"}), "fp32"),
        (Settings(checkpoint={"a": "recompute"}), "fp32, 1 of 1 blocks recomputed"),
        (
            Settings(checkpoint={"a": ["save", "selective", ["save", "save"], "recompute"]}),
            "fp32, 3 of 5 blocks recomputed, 1 of 5 blocks recomputed selectively",
        ),
        (FULL, "bf16, micro-batch 4, channels last, 4 of 5 blocks recomputed, compiled"),
    ],
)
def test_text(settings, text):
    assert str(settings) == text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, ValueError, "expected precision to be 'fp32' or 'bf16' or 'fp16'"),
        ({"precision": ["fp32"]}, ValueError, r"got \['fp32'\]"),
        ({"memory_format": "nhwc"}, ValueError, "'channels_last', got 'nhwc'"),
        ({"compile": 1}, TypeError, "expected compile to be True or False, got 1"),
        ({"compile": "yes"}, TypeError, "compile to be True or False, got 'yes'"),
        ({"micro_batch": 0}, ValueError, "micro_batch to be an integer >= 1 or None, got 0"),
        ({"micro_batch": 2.0}, TypeError, "micro_batch to be an integer >= 1 or None, got 2.0"),
        ({"micro_batch": True}, TypeError, "micro_batch to be an integer >= 1 or None, got True"),
        (
            {"checkpoint": ["save"]},
            TypeError,
            r"checkpoint to be a mapping of names .* got \['save'\]",
        ),
        (
            {"checkpoint": {1: "save"}},
            TypeError,
            "checkpoint to be a mapping with strings as keys, got {1",
        ),
        ({"checkpoint": {"a": "drop"}}, ValueError, r"checkpoint\.a to be 'save', .* got 'drop'"),
        (
            {"checkpoint": {"a": ["save", ["no"]]}},
            ValueError,
            r"checkpoint\.a\.1\.0 to be 'save', .* got 'no'",
        ),
        (
            {"checkpoint": {"a": ["save", []]}},
            ValueError,
            r"checkpoint\.a\.1 to be 'save', .* got \(\)",
        ),
        ({"checkpoint": {"a": None}}, ValueError, r"checkpoint\.a to be 'save', .* got None"),
    ],
)
def test_wrong_values_are_named(options, error, message):
    with pytest.raises(error, match=f"Settings: .*{message}"):
        Settings(**options)


# apply


@pytest.mark.parametrize("device", DEVICES)
def test_memory_format_touches_parameters_of_four_dimensions_only(device):
    model = nn.ModuleDict(
        {"wide": nn.Conv2d(3, 8, 5), "point": nn.Conv2d(6, 4, 1), "deep": nn.Conv3d(2, 3, 2)}
    ).to(device)
    model.register_buffer("image", torch.zeros(1, 3, 4, 4, device=device))
    before = {name: (p, p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    assert Settings(memory_format="channels_last").apply(model) is model
    for name, p in model.named_parameters():
        same, values, strides = before[name]
        assert p is same
        assert torch.equal(p, values)
        if p.dim() == 4:
            _, c, h, w = p.shape  # of a 1 x 1 kernel too, whose strides decide the layout
            assert p.stride() == (c * h * w, 1, w * c, c)
        else:
            assert p.stride() == strides
    assert model.image.stride() == (48, 16, 4, 1)
    Settings().apply(model)
    assert all(p.stride() == before[name][2] for name, p in model.named_parameters())


def test_checkpoint_plan_is_applied():
    torch.manual_seed(0)
    model = nn.Sequential(*(Counted() for _ in range(4)))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    names = list(model.state_dict())
    Settings(checkpoint={"": ["save", ["save", "save"], "recompute"]}).apply(model)
    for block in model:
        block.calls = 0
    model(x).sum().backward()
    assert [block.calls for block in model] == [1, 2, 2, 2]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    assert list(model.state_dict()) == names


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(ValueError, match="no module 'layers'"):
        FULL.apply(mlp())


@pytest.fixture
def eager_backend(monkeypatch):
    """Dynamo without Inductor, which takes seconds even for a line."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    yield counters["stats"]
    torch.compiler.reset()


@pytest.mark.parametrize("make", [mlp, lambda: nn.Linear(8, 8), Counted])
def test_compile_compiles_classes_of_torch_too(eager_backend, make):
    """`module.compile()` of 2.13 does nothing for them; once it does, drop `compile_module`."""
    model = make()
    width = next(model.parameters()).shape[1]
    x = torch.randn(3, width)
    expected = model(x)
    assert Settings(compile=True).apply(model) is model
    torch.testing.assert_close(model(x), expected)
    assert eager_backend["unique_graphs"] == 1
    assert not isinstance(model, torch._dynamo.eval_frame.OptimizedModule)


def test_upstream_compile_method_skips_modules_of_torch(eager_backend):
    model = mlp()
    model.compile()
    model(torch.randn(3, 8))
    assert eager_backend["unique_graphs"] == 0  # fails once upstream mends it


# of Dynamo itself, when it traces the input of a block that is another one's output
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_with_a_plan_each_block_is_compiled(eager_backend):
    torch.manual_seed(0)
    model = nn.Sequential(*(Counted() for _ in range(3)))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    Settings(checkpoint={"": ["save", "recompute", "save"]}, compile=True).apply(model)
    assert model._compiled_call_impl is None
    model(x).sum().backward()
    assert eager_backend["unique_graphs"] >= 1
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_precision_and_micro_batch_are_left_to_the_step():
    model = mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    Settings("bf16", micro_batch=2).apply(model)
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model(torch.randn(1, 8)).dtype is torch.float32


# AutogradConfig

SPECIFIED = """\
autograd_system:
  enable_gradients: true
  gradient_monitoring:
    enabled: true
    save_gradient_history: true
  
  advanced_features:
    higher_order_gradients: true
    custom_gradients: true
    gradient_checkpointing: false
"""  # noqa: W293 - verbatim, a line of blanks included
SECTIONS = {
    SystemConfig: "autograd_system",
    MonitoringConfig: "autograd_system.gradient_monitoring",
    FeaturesConfig: "autograd_system.advanced_features",
    Settings: "autograd_system.performance",
    DataConfig: "data",
    ModelConfig: "model",
    OptimizerConfig: "optimizer",
    TrainingConfig: "training",
    DistributedConfig: "distributed",
}
DEFAULTS = {
    "autograd_system": {
        "enable_gradients": True,
        "gradient_monitoring": {
            "enabled": True,
            "save_gradient_history": True,
            "every": 1,
            "history": 1000,
            "explode_above": 1000.0,
            "vanish_below": 1e-8,
        },
        "advanced_features": {
            "higher_order_gradients": True,
            "custom_gradients": False,
            "gradient_checkpointing": False,
        },
        "performance": asdict(Settings()),
    },
    "data": {"name": "digits", "batch_size": 64, "workers": 0, "options": {}},
    "model": {"name": "cnn", "options": {}},
    "optimizer": {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.01,
        "options": {},
        "schedule": "constant",
        "warmup": 0.0,
    },
    "training": {
        "epochs": 10,
        "seed": 0,
        "device": "auto",
        "clip_norm": None,
        "max_nonfinite": 3,
        "directory": None,
        "save_every": 0,
    },
    "distributed": {"strategy": "ddp", "find_unused_parameters": False},
}


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def problems(source, overrides=()) -> list[str]:
    """Return the lines of the error, without the name of the file that begins each."""
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(source, overrides)
    assert type(caught.value) is ValueError
    name = "configuration" if isinstance(source, dict) else str(source)
    return [line.removeprefix(f"{name}: ") for line in str(caught.value).split("\n")]


def test_defaults():
    assert asdict(AutogradConfig()) == DEFAULTS


def test_the_specified_file_loads(write):
    expected = deepcopy(DEFAULTS)
    expected["autograd_system"]["advanced_features"]["custom_gradients"] = True
    assert asdict(load_config(write(SPECIFIED))) == expected
    assert load_config(str(write(SPECIFIED))) == load_config(write(SPECIFIED))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "---\n...\n",
        "\ufeff{}",
        "training:\nmodel:\n  options:\n",
        "autograd_system: {performance: {checkpoint: }, advanced_features: ~}",
    ],
)
def test_what_is_empty_is_all_defaults(write, text):
    assert load_config(write(text)) == AutogradConfig()


def test_every_section_is_read(write):
    text = """\
autograd_system:
  enable_gradients: false
  gradient_monitoring: {every: 5, explode_above: .inf, vanish_below: 0}
  performance:
    precision: bf16
    micro_batch: 8
    checkpoint: {blocks: [save, [recompute, save]]}
data: {name: source, batch_size: 32, options: {length: 64}}
model: {name: transformer, options: {d_model: 32, heads: [1, 2], deep: {er: null}}}
optimizer: {name: sgd, lr: 1e-1, options: {momentum: 0.9}, schedule: cosine, warmup: .05}
training: {epochs: 0, seed: -1, device: 'cuda:1', clip_norm: 1, directory: "runs/ä"}
distributed: {strategy: fsdp2, find_unused_parameters: true}
"""
    read = load_config(write(text))
    expected = AutogradConfig(
        SystemConfig(
            False,
            MonitoringConfig(every=5, explode_above=float("inf"), vanish_below=0.0),
            performance=Settings("bf16", 8, {"blocks": ("save", ("recompute", "save"))}),
        ),
        DataConfig("source", 32, options={"length": 64}),
        ModelConfig("transformer", {"d_model": 32, "heads": [1, 2], "deep": {"er": None}}),
        OptimizerConfig("sgd", 0.1, options={"momentum": 0.9}, schedule="cosine", warmup=0.05),
        TrainingConfig(epochs=0, seed=-1, device="cuda:1", clip_norm=1, directory="runs/ä"),
        DistributedConfig("fsdp2", True),
    )
    assert read == expected
    assert hash(read) == hash(expected)
    assert read.model.options["heads"] == (1, 2)
    assert type(read.training.clip_norm) is type(expected.training.clip_norm) is float
    assert load_config(asdict(read)) == load_config(json.loads(json.dumps(asdict(read)))) == read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("+1.", 1.0),
        ("-.INF", float("-inf")),
        ("010", 10),
        ("0o17", 15),
        ("0xfF", 255),
        ("-7", -7),
        ("1:30", "1:30"),
        ("no", "no"),
        ("ON", "ON"),
        ("TRUE", True),
        ("Null", None),
        ("~", None),
        ("'3'", "3"),
        ("|\n      a\n      b\n", "a\nb\n"),
        ("[[1], {}]", ((1,), {})),
    ],
)
def test_values_are_of_yaml_1_2(write, text, value):
    read = load_config(write(f"model:\n  options:\n    value: {text}")).model.options["value"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "autograd_system: {gradient_monitoring: {enabled: 'yes'}}",
            ["autograd_system.gradient_monitoring.enabled: expected true or false, got 'yes'"],
        ),
        ("training: {epochs: '3'}", ["training.epochs: expected an integer >= 0, got '3'"]),
        ("training: {epochs: true}", ["training.epochs: expected an integer >= 0, got true"]),
        ("training: {epochs: 3.0}", ["training.epochs: expected an integer >= 0, got 3.0"]),
        ("training: {epochs: }", ["training.epochs: expected an integer >= 0, got null"]),
        ("training: {epochs: -1}", ["training.epochs: expected an integer >= 0, got -1"]),
        ("training: {epochs: [1]}", ["training.epochs: expected an integer >= 0, got [1]"]),
        (
            "training: {seed: 18446744073709551616}",
            ["training.seed: expected an integer of 64 bits, got 18446744073709551616"],
        ),
        ("optimizer: {lr: 0}", ["optimizer.lr: expected a number > 0, got 0"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr: expected a number > 0, got nan"]),
        ("optimizer: {lr: false}", ["optimizer.lr: expected a number > 0, got false"]),
        ("optimizer: {warmup: 1}", ["optimizer.warmup: expected a number >= 0 and < 1, got 1"]),
        (
            "optimizer: {name: AdamV}",
            [
                "optimizer.name: expected a class of torch.optim (adafactor, muon, adadelta, "
                "adagrad, adam, adamax, adamw, asgd, lbfgs, nadam, radam, rmsprop, rprop, sgd, "
                "sparseadam), as in the line `name: adamw`, got 'AdamV'"
            ],
        ),
        (
            "model: {options: [1]}",
            ["model.options: expected a mapping of names to values, got [1]"],
        ),
        ("model: cnn", ["model: expected a mapping with keys of name, options, got 'cnn'"]),
        (
            "- training",
            [
                "expected a mapping with keys of autograd_system, data, model, optimizer, "
                "training, distributed, got ['training']"
            ],
        ),
        (
            "autograd_system: {performance: {micro_batch: 0}}",
            ["autograd_system.performance.micro_batch: expected an integer >= 1 or null, got 0"],
        ),
        (
            "autograd_system: {performance: {checkpoint: {a: [save, drop]}}}",
            [
                "autograd_system.performance.checkpoint.a.1: expected 'save', 'selective' or "
                "'recompute', or a list of these, got 'drop'"
            ],
        ),
        # a record that compares its fields
        (
            "autograd_system: {advanced_features: {gradient_checkpointing: true},"
            " performance: {checkpoint: {a: save}}}",
            [
                "autograd_system: expected advanced_features.gradient_checkpointing or "
                "performance.checkpoint, got both; choose one, the first for each block of the "
                "model, the second for a plan of your own"
            ],
        ),
        # unknown keys
        ("training: {epoch: 3}", ["training.epoch: unknown key; did you mean 'epochs'?"]),
        ("TRAINING: {}", ["TRAINING: unknown key; did you mean 'training'?"]),
        ("model: {x y: 1}", ["model.'x y': unknown key; known here are name, options"]),
        (
            "autograd_system: {performance: {amp: true}}",
            [
                "autograd_system.performance.amp: unknown key; known here are precision, "
                "micro_batch, checkpoint, memory_format, compile"
            ],
        ),
        # what YAML knows and a configuration does not
        (
            "training:\n  seed: 1\n  seed: 2",
            [
                'not plain YAML: found duplicate key "seed" with value "2" (original value: "1") '
                "in line 3, column 3"
            ],
        ),
        (
            "autograd_system: {performance: {checkpoint: {0: save}}}",
            [
                "autograd_system.performance.checkpoint: expected a mapping with strings as keys, "
                "got {0: 'save'}"
            ],
        ),
        (
            "model: {options: {a: [{[1]: 2}]}}",
            ["model.options.a.0: expected a mapping with strings as keys, got {(1,): 2}"],
        ),
        (
            "model: {options: {a: 2001-12-14}}",
            [
                "model.options.a: expected a string, a number, true, false, null, a list or a "
                "mapping, got datetime.date(2001, 12, 14)"
            ],
        ),
        ("0: 1", ["0: unknown key; known here are " + ", ".join(DEFAULTS)]),
        *(
            (f"# one\n{text}", ["not plain YAML: an anchor, alias or tag in line 2"])
            for text in [
                "model: {options: {a: !x 2}}",
                "training: {epochs: !!int 3}",
                "training: !!python/object:os.system {}",
                "a: &a [*a]",
                "[&a [1], *a]",
            ]
        ),
        # bombs: by aliases, by merged keys, by depth
        (
            "- &a [1]\n"
            + "".join(f"- &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopq")),
            ["not plain YAML: an anchor, alias or tag in line 1"],
        ),
        (
            "a: &a {k: 1}\n"
            + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in pairwise(ascii_letters)),
            ["not plain YAML: an anchor, alias or tag in line 1"],
        ),
        (
            "model: {options: {a: " + 50 * "[" + 50 * "]" + "}}",
            ["model.options.a: expected at most 40 levels, got [[[[[[[...]]]]]]]"],
        ),
        (
            f"training: {{seed: {5000 * '1'}}}",
            [
                "not plain YAML: Exceeds the limit (4300 digits) for integer string conversion: "
                "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit"
            ],
        ),
        # not YAML
        (
            "training: {",
            [
                "not plain YAML: expected the node content, but found '<stream end>' in line 1, "
                "column 12"
            ],
        ),
        ("a: 1\n---\nb: 1", ["not plain YAML: but found another document in line 2, column 1"]),
        (
            "a:\n\t- 1",
            [
                "not plain YAML: found character '\\t' that cannot start any token in line 2, "
                "column 1"
            ],
        ),
        (
            "a: 1\nb: \0",
            [
                "not plain YAML: unacceptable character #x0000: special characters are not allowed "
                'in "<unicode string>", position 8'
            ],
        ),
        ('a: "\\U99999999"', ["not plain YAML: Python int too large to convert to C int"]),
    ],
)
def test_what_is_wrong_is_said(write, text, lines):
    path = write(text)
    assert problems(path) == lines
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).split("\n"))


def test_all_problems_are_said_at_once(write):
    text = "training: {epoch: 1, seed: x, lr: 2}\nmodle: {}\ndata: {batch_size: 0}\na: 1"
    said = problems(write(text))
    assert {line.split(": ")[0] for line in said} == {
        *("training.epoch", "training.seed", "training.lr", "modle", "data.batch_size", "a"),
    }
    assert len(said) == 6


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load_config(tmp_path)
    assert problems(write(b"a: \xff")) == [
        "'utf-8' codec can't decode byte 0xff in position 3: invalid start byte"
    ]
    with pytest.raises(ValueError, match="embedded null byte"):
        load_config("a\0b")


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ({}, "a.b=3", "expected overrides to be a sequence of 'key=value', got 'a.b=3'"),
    ],
)
def test_arguments_of_other_types(source, overrides, message):
    with pytest.raises(TypeError, match=f"load_config: {message}"):
        load_config(source, overrides)


def test_a_mapping_is_checked_like_a_file():
    nested: dict = {}
    nested["a"] = nested
    assert problems({"training": {"epochs": "3"}}) == [
        "training.epochs: expected an integer >= 0, got '3'"
    ]
    assert problems({1: {}})[0].startswith("1: unknown key; known here are autograd_system, ")
    assert problems({"model": {"options": {"a": {1}}}}) == [
        "model.options.a: expected a string, a number, true, false, null, a list or a mapping, "
        "got {1}"
    ]
    (said,) = problems({"model": {"options": nested}})
    assert said.startswith("model.options.a: expected at most 40 levels, got {'a'")
    source = {"model": {"options": {"a": [1]}}, "training": None}
    before = deepcopy(source)
    read = load_config(source, ["model.options.b=2"])
    assert source == before
    source["model"]["options"]["a"][0] = 5
    assert read.model.options == {"a": (1,), "b": 2}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        (" training.epochs = 3 ", "training.epochs", 3),
        ("optimizer.lr=1e-2", "optimizer.lr", 0.01),
        ("training.clip_norm=null", "training.clip_norm", None),
        ("training.clip_norm=", "training.clip_norm", None),
        ("training.directory=a=b", "training.directory", "a=b"),
        ("training.device=cuda:0", "training.device", "cuda:0"),
        ("model.options.channels=[16,16]", "model.options", {"kept": 1, "channels": (16, 16)}),
        ("model.options={a: {b: c}}", "model.options", {"a": {"b": "c"}}),
        ("model.options=", "model.options", {}),
        ("model.options.a.b=1", "model.options", {"kept": 1, "a.b": 1}),
        ("data.options.a=1", "data.options", {"a": 1}),
        ("training={seed: 5}", "training", TrainingConfig(seed=5)),
        ("training=", "training", TrainingConfig()),
        (
            "autograd_system.performance.checkpoint.layers.0=[save, recompute]",
            "autograd_system.performance.checkpoint",
            {"layers.0": ("save", "recompute")},
        ),
    ],
)
def test_overrides(override, path, value):
    source = {"training": {"epochs": 7, "clip_norm": 2.0}, "model": {"options": {"kept": 1}}}
    read = load_config(source, [override])
    assert attrgetter(path)(read) == value
    rest = load_config(source)
    names = path.split(".")
    for name in [name for name in DEFAULTS if name != names[0]]:
        assert getattr(read, name) == getattr(rest, name)


def test_the_last_override_counts():
    assert load_config({}, ["training.seed=1", "training.seed=2"]).training.seed == 2
    read = load_config({}, ["training.seed=1", "training={epochs: 2}", "training.save_every=3"])
    assert read.training == TrainingConfig(epochs=2, save_every=3)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.epochs=x", "training.epochs: expected an integer >= 0, got 'x'"),
        ("training={epochs: x}", "training.epochs: expected an integer >= 0, got 'x'"),
        ("training.epoch=3", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("training={epoch: 3}", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("epochs=3", "epochs: unknown key; known here are " + ", ".join(DEFAULTS)),
        ("training.epochs.x=3", "training.epochs: expected no key below, got 'x'"),
        ("training", "expected 'key=value'"),
        ("", "expected 'key=value'"),
        (
            "model.name=",
            "model.name: expected 'cnn' or 'transformer' or 'rnn', or a function of yours as in "
            "the line `name: package.module:function`, got null",
        ),
        (
            "data.batch_size=[",
            "data.batch_size: not plain YAML: expected the node content, but found "
            "'<stream end>' in line 1, column 2",
        ),
        (
            "data.batch_size={a: 1, a: 2}",
            'data.batch_size: not plain YAML: found duplicate key "a" with value "2" (original '
            'value: "1") in line 1, column 8',
        ),
        (
            "training.directory=!x y",
            "training.directory: not plain YAML: an anchor, alias or tag in line 1",
        ),
    ],
)
def test_overrides_are_named(write, override, text):
    assert problems(write(""), ["training.seed=1", override]) == [f"override {override!r}: {text}"]


def test_an_override_does_not_hide_a_mistake_of_the_file(write):
    path = write("training: 3")
    assert problems(path, ["training.epochs=3"])[0].startswith("training: expected a mapping")


# records made in Python


@pytest.mark.parametrize(
    ("record", "options", "error", "message"),
    [
        (AutogradConfig, {"data": {}}, TypeError, "data to be a DataConfig, got {}"),
        (
            SystemConfig,
            {"enable_gradients": 1},
            TypeError,
            "enable_gradients to be True or False, got 1",
        ),
        (SystemConfig, {"performance": None}, TypeError, "to be a Settings, got None"),
        (MonitoringConfig, {"every": 0}, ValueError, "every to be an integer >= 1, got 0"),
        (MonitoringConfig, {"history": 0}, ValueError, "history to be an integer >= 1"),
        (MonitoringConfig, {"vanish_below": -1}, ValueError, "to be a number >= 0, got -1"),
        (FeaturesConfig, {"custom_gradients": None}, TypeError, "to be True or False, got None"),
        (DataConfig, {"name": "mnist"}, ValueError, "or 'source', or a function of .* got"),
        (DataConfig, {"batch_size": 0}, ValueError, "batch_size to be an integer >= 1"),
        (DataConfig, {"batch_size": 1.0}, TypeError, "an integer >= 1, got 1.0"),
        (DataConfig, {"workers": -1}, ValueError, "workers to be an integer >= 0"),
        (ModelConfig, {"options": []}, TypeError, "mapping of names to values, got "),
        (
            ModelConfig,
            {"options": {1: 2}},
            TypeError,
            "options to be a mapping with strings as keys, got {1: 2}",
        ),
        (
            ModelConfig,
            {"options": {"a": nn.ReLU}},
            TypeError,
            r"options\.a to be a string, a number, .*, got <class",
        ),
        (OptimizerConfig, {"lr": 0}, ValueError, "lr to be a number > 0, got 0"),
        (OptimizerConfig, {"lr": float("inf")}, ValueError, "lr to be a number > 0"),
        (OptimizerConfig, {"lr": "1"}, TypeError, "lr to be a number > 0, got '1'"),
        (OptimizerConfig, {"weight_decay": -1}, ValueError, "weight_decay to be a number"),
        (OptimizerConfig, {"warmup": 1.0}, ValueError, ">= 0 and < 1, got 1.0"),
        (OptimizerConfig, {"schedule": "step"}, ValueError, "'linear' or 'cosine', got"),
        (OptimizerConfig, {"schedule": None}, ValueError, "'linear' or 'cosine', got None"),
        (OptimizerConfig, {"name": "Optimizer"}, ValueError, "a class of torch.optim .* got 'Opt"),
        (OptimizerConfig, {"name": None}, ValueError, "a class of torch.optim .* got None"),
        (ModelConfig, {"name": "a.b"}, ValueError, "package.module:function`, got 'a.b'"),
        (ModelConfig, {"name": "a b:c"}, ValueError, "package.module:function`, got 'a b:c'"),
        (ModelConfig, {"name": ":c"}, ValueError, "package.module:function`, got ':c'"),
        (ModelConfig, {"name": "a:"}, ValueError, "package.module:function`, got 'a:'"),
        (TrainingConfig, {"epochs": -1}, ValueError, "epochs to be an integer >= 0"),
        (TrainingConfig, {"epochs": True}, TypeError, "epochs to be an integer >= 0"),
        (TrainingConfig, {"seed": 2**64}, ValueError, "seed to be an integer of 64 bits"),
        (
            TrainingConfig,
            {"device": torch.device("cpu")},
            TypeError,
            "device to be a string, got device",
        ),
        (TrainingConfig, {"clip_norm": 0.0}, ValueError, "a number > 0 or None, got 0.0"),
        (TrainingConfig, {"max_nonfinite": -1}, ValueError, "max_nonfinite to be an int"),
        (TrainingConfig, {"directory": Path()}, TypeError, "a string or None, got "),
        (TrainingConfig, {"save_every": -1}, ValueError, "save_every to be an integer"),
        (DistributedConfig, {"strategy": "fsdp"}, ValueError, "'ddp' or 'fsdp2', got 'fsdp'"),
        (
            SystemConfig,
            {
                "advanced_features": FeaturesConfig(gradient_checkpointing=True),
                "performance": FULL,
            },
            ValueError,
            "gradient_checkpointing or performance.checkpoint, got both; choose one",
        ),
    ],
)
def test_records_refuse_wrong_values(record, options, error, message):
    with pytest.raises(error, match=rf"^{record.__name__}: expected .*{message}") as caught:
        record(**options)
    assert type(caught.value) is error


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_seeds_are_those_of_torch(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TrainingConfig(seed=seed).seed)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_other_seeds_are_refused_by_torch_too(seed):
    with pytest.raises(ValueError, match="64 bits"):
        TrainingConfig(seed=seed)
    with pytest.raises((RuntimeError, ValueError)):
        torch.manual_seed(seed)


def test_options_are_copied_and_plain():
    options = {"a": [1, {"b": [2]}], "c": np.float64(0.5), "d": np.str_("e")}
    record = ModelConfig(options=options)
    options["a"][1]["b"][0] = 3
    assert record.options == {"a": (1, {"b": (2,)}), "c": 0.5, "d": "e"}
    assert [type(value) for value in record.options.values()] == [tuple, float, str]
    assert hash(record) == hash(ModelConfig())
    with pytest.raises(FrozenInstanceError):
        record.name = "rnn"
    cyclic: dict = {}
    cyclic["a"] = cyclic
    with pytest.raises(ValueError, match=r"options\.a to be at most 40 levels, got {'a'"):
        ModelConfig(options=cyclic)


# printing


def test_the_default_file_is_complete_and_explained(write):
    text = config_yaml(AutogradConfig(), comments=True)
    assert load_config(write(text)) == AutogradConfig()
    assert YAML(typ="safe", pure=True).load(text) == DEFAULTS
    lines = text.splitlines()
    assert max(map(len, lines)) < 100
    keys = [i for i, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert len(keys) == sum(len(fields(record)) for record in [AutogradConfig, *SECTIONS])
    for i in keys:
        comment, key = lines[i - 1], lines[i]
        assert comment.lstrip().startswith("# ")
        assert len(comment) - len(comment.lstrip()) == len(key) - len(key.lstrip())
    comments = " ".join(line.strip(" #") for line in lines if line.lstrip().startswith("#"))
    assert "null for no clipping" in comments
    assert not {"None", "True", "False", "`"} & set(comments.replace("`", " ` ").split())


TEXT = st.text(max_size=12) | st.sampled_from(
    ["", ":0", "1e3", "no", "null", "0o7", "a: b", "#", "- a"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OPTIONS = st.dictionaries(TEXT, VALUES, max_size=3)
CONFIGS = st.builds(
    AutogradConfig,
    st.builds(
        SystemConfig,
        st.booleans(),
        st.builds(MonitoringConfig, explode_above=st.floats(1, 1e300)),
        performance=st.builds(
            Settings,
            st.sampled_from(["fp32", "bf16"]),
            st.none() | st.integers(1, 9),
            st.dictionaries(TEXT, st.sampled_from(["save", ["save", ["recompute"]]]), max_size=2),
        ),
    ),
    model=st.builds(ModelConfig, options=OPTIONS),
    optimizer=st.builds(
        OptimizerConfig,
        lr=st.floats(0, 1e9, exclude_min=True),
        options=OPTIONS,
        warmup=st.floats(0, 1, exclude_max=True),
    ),
    training=st.builds(
        TrainingConfig,
        clip_norm=st.none() | st.integers(1, 5),
        directory=st.none() | TEXT,
        seed=st.integers(-(2**63), 2**64 - 1),
    ),
)
FUZZ = hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@FUZZ
@hypothesis.given(CONFIGS)
def test_what_is_printed_loads_as_it_was(write, record):
    text = config_yaml(record)
    assert load_config(write(text)) == record
    assert len(text.splitlines()) == len(config_yaml(AutogradConfig()).splitlines())


# whatever a file holds


def loads_or_says(path: Path, overrides=()) -> None:
    """Load a file; only a ValueError may come, and each of its lines names its source."""
    try:
        loaded, problem = load_config(path, overrides), None
    except ValueError as error:
        loaded, problem = None, error
    if problem is None:
        assert isinstance(loaded, AutogradConfig)
    else:
        assert type(problem) is ValueError
        sources = (f"{path}: ", "override ") if overrides else f"{path}: "
        assert all(line.startswith(sources) for line in str(problem).split("\n"))


KEYS = [
    name for record in [AutogradConfig, *SECTIONS] for name in DEFAULTS | record.__annotations__
]
TREES = st.recursive(
    VALUES, lambda inner: st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=4)
)


@FUZZ
@hypothesis.given(st.dictionaries(st.sampled_from(KEYS) | TEXT, TREES, max_size=5))
def test_random_trees(write, tree):
    loads_or_says(write(yaml.safe_dump(tree)))
    loads_or_says(write(json.dumps(tree)))


def _with_values(tree: dict) -> st.SearchStrategy:
    """Trees of the right keys, of which some values are any value."""
    values = {
        name: VALUES | (_with_values(value) if isinstance(value, dict) else st.just(value))
        for name, value in tree.items()
    }
    return st.fixed_dictionaries({}, optional=values)


@FUZZ
@hypothesis.given(_with_values(DEFAULTS))
def test_random_values(write, tree):
    loads_or_says(write(json.dumps(tree).replace("Infinity", ".inf")))


PIECES = st.sampled_from([*"{}[]:,-&*!|>'\"%@`#?\n\t \0", "\n---\n", "&a ", "*a", "!!set ", "<<: "])


@FUZZ
@hypothesis.given(
    st.sampled_from([SPECIFIED, config_yaml(AutogradConfig(), comments=True)]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), PIECES | TEXT), min_size=1, max_size=6),
)
def test_mutated_files(write, text, edits):
    for place, cut, piece in edits:
        i = int(place * len(text))
        text = text[:i] + piece + text[i + cut :]
    loads_or_says(write(text))


@FUZZ
@hypothesis.given(st.binary(max_size=200) | st.lists(PIECES | TEXT, max_size=40).map("".join))
def test_random_bytes(write, content):
    loads_or_says(write(content))


@FUZZ
@hypothesis.given(
    st.lists(
        st.builds(
            "{}={}".format,
            st.lists(st.sampled_from(KEYS) | TEXT, max_size=4).map(".".join),
            TEXT | st.lists(PIECES | TEXT, max_size=8).map("".join),
        )
        | TEXT,
        max_size=3,
    )
)
def test_random_overrides(write, overrides):
    loads_or_says(write(SPECIFIED), overrides)


@pytest.mark.parametrize("package", ["ruamel.yaml", "pydantic"])
def test_the_missing_packages_are_named(monkeypatch, write, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install pydantic ruamel\.yaml$"):
        load_config(write(""))


def test_a_mapping_of_right_values_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    tree = {"training": {"epochs": 3}, "model": {"options": {"a": [1]}}, "data": None}
    expected = AutogradConfig(model=ModelConfig(options={"a": [1]}), training=TrainingConfig(3))
    assert load_config(tree) == expected
    with pytest.raises(ImportError, match="pip install"):
        load_config({"training": {"epoch": 3}})
