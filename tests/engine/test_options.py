"""Every option is stated once: the engine, the Trainer, the command line and the page of options read one list."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.cli.finetune import light_parser
from opacus_ac.engine import (
    ClippingOptions,
    PerformanceOptions,
    PrivateOptions,
    ReleaseOptions,
    SamplingOptions,
    UpdateOptions,
)
from opacus_ac.engine.options import OPACUS_NAMES, OPTIONS, EngineNames, OptionNames
from opacus_ac.integrations import PrivacyArguments

GROUPS = (ClippingOptions, ReleaseOptions, SamplingOptions, UpdateOptions, PerformanceOptions)
HALF = PrivateOptions(clipping=ClippingOptions(target_clip_rate=0.5))


def arguments(**changes: Any) -> dict[str, Any]:
    model = torch.nn.Linear(4, 2)
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    given = {"module": model, "optimizer": torch.optim.AdamW(model.parameters()), "data_loader": DataLoader(data, 8)}
    return {**given, **changes}


def make(**changes: Any) -> Any:
    return PrivacyEngine().make_private(**arguments(noise_multiplier=1.0, **changes))[1]


def plan(**changes: Any) -> Any:
    target = {"target_epsilon": 8.0, "target_delta": 1e-3, "steps": 2}
    return PrivacyEngine().make_private_with_epsilon(**arguments(**target, **changes))[1]


# ---- grouped, or by name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [make, plan])
def test_options_in_groups_and_by_name_are_the_same(call):
    options = PrivateOptions(
        clipping=ClippingOptions(target_clip_rate=0.5, clip_policy="geometric"),
        release=ReleaseOptions(loss_bound=5.0),
        sampling=SamplingOptions(dataset_size=40),
        update=UpdateOptions(ema_decay=None, normalize=False),
    )
    grouped = call(options=options)
    mixed = call(options=dataclasses.replace(options, update=PrivateOptions().update), ema_decay=None, normalize=False)
    flat = call(
        target_clip_rate=0.5, clip_policy="geometric", loss_bound=5.0, dataset_size=40, ema_decay=None, normalize=False
    )
    for made in (grouped, mixed, flat):
        assert (made.policy.name, made.policy.target_clip_rate) == ("geometric", 0.5)
        assert made.statistics.loss_bound == 5.0
        assert made.plan.sizes.dataset_size == 40
        assert (made.ema, made.normalize) == (None, False)
        assert made.mechanism.noise_multiplier == grouped.mechanism.noise_multiplier


@pytest.mark.parametrize("call", [make, plan])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"target_clip_rat": 0.5}, TypeError, "no argument 'target_clip_rat': did you mean 'target_clip_rate'"),
        ({"max_grad_nrm": 1.0}, TypeError, "did you mean 'max_grad_norm'"),
        ({"zzz": 1}, TypeError, r"no argument 'zzz'. docs/options.md"),
        ({"options": HALF, "target_clip_rate": 0.7}, TypeError, r"'target_clip_rate' is given by name, and options="),
        ({"options": HALF, "preset": "paper"}, TypeError, r"PrivateOptions\(clipping=...\) decides it too"),
        (
            {"options": PrivateOptions(zeroth_order="mezo"), "zeroth_order": "aggzo"},
            TypeError,
            "'zeroth_order' is given",
        ),
        ({"options": {"target_clip_rate": 0.5}}, TypeError, "is no PrivateOptions"),
        ({"target_clip_rate": 1.0}, ValueError, "target_clip_rate must lie strictly between 0 and 1"),
    ],
)
def test_what_is_unknown_said_twice_or_out_of_range_is_refused(call, given, error, message):
    with pytest.raises(error, match=message):
        call(**given)


@pytest.mark.parametrize(
    ("group", "name", "bad", "good"),
    [
        (ClippingOptions, "target_clip_rate", (0.0, 1.0, -1.0, "half"), (0.5,)),
        (ClippingOptions, "preset", ("best", ""), (None, "paper")),
        (ReleaseOptions, "histogram_weight", (-1.0, float("nan"), "1"), (None, 0.0, 0.2)),
        (ReleaseOptions, "loss_bound", (0.0, -1.0, float("inf")), (None, 5.0)),
        (ReleaseOptions, "loss_weight", (0.0, -1.0, float("nan")), (None, 0.2)),
        (SamplingOptions, "max_batch_size", (0, 1.5, True), (None, 1)),
        (SamplingOptions, "dataset_size", (0, 10.5), (None, 10)),
        (PerformanceOptions, "max_physical_batch_size", (0, 2.5), (None, 4)),
    ],
)
def test_ranges(group, name, bad, good):
    for value in bad:
        with pytest.raises(ValueError, match=name):
            group(**{name: value})
    for value in good:
        assert getattr(group(**{name: value}), name) == value


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HALF.clipping.target_clip_rate = 0.9


# ---- one list ------------------------------------------------------------------------------------------------------


def test_the_names_of_the_engine_are_those_of_the_list():
    """No option is in two groups, has no text, or another type by name than in its group."""
    found = [field for group in GROUPS for field in dataclasses.fields(group)]
    assert [field.name for field in found] + ["zeroth_order"] == list(OPTIONS)
    assert {one.name: one.type for one in OPTIONS.values()} == {
        name: kind.__forward_arg__ for name, kind in OptionNames.__annotations__.items()
    }
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert field.metadata["help"]
            assert f"{field.name}: {field.metadata['help']}." in group.__doc__


def test_the_signature_has_the_names_of_opacus_and_no_option():
    signature = inspect.signature(PrivacyEngine.make_private).parameters
    optional = {name: p for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    assert set(optional) == OPACUS_NAMES | {"options"}
    assert not set(signature) & set(OPTIONS)
    assert signature["named"].annotation == "Unpack[OptionNames]"
    assert {name: p.annotation for name, p in optional.items() if name != "options"} == {
        name: kind.__forward_arg__ for name, kind in EngineNames.__annotations__.items() if name in OPACUS_NAMES
    }
    text = inspect.getdoc(PrivacyEngine.make_private)
    assert all(group.__name__ in text for group in (PrivateOptions, *GROUPS))


#: Where the Trainer and the command line have another default than ``make_private``, and are documented to.
OTHER_DEFAULTS = {"loss_bound": 10.0, "sampling": "poisson"}


def test_the_trainer_has_the_defaults_and_texts_of_the_list():
    signature = inspect.signature(PrivacyEngine.make_private).parameters
    shared = [field for field in dataclasses.fields(PrivacyArguments) if field.name in OPTIONS]
    assert len(shared) == 10
    for field in shared:
        assert field.default == OTHER_DEFAULTS.get(field.name, OPTIONS[field.name].default), field.name
        if field.name != "sampling":  # whose kinds there are fewer
            assert field.metadata["help"].startswith(OPTIONS[field.name].help)
    for field in dataclasses.fields(PrivacyArguments):
        if field.name in OPACUS_NAMES:
            assert field.default == signature[field.name].default, field.name


def test_the_command_line_shows_the_texts_of_the_list():
    actions = {action.dest: action.help for action in reversed(light_parser()._actions)}
    for field in dataclasses.fields(PrivacyArguments):
        assert actions[field.name] == field.metadata["help"]
    assert actions["clip_policy"] == OPTIONS["clip_policy"].help
    assert actions["target_clip_rate"] == OPTIONS["target_clip_rate"].help + " (default 0.9, with classes 0.3)"
    assert OPTIONS["fused_step"].help.split(":")[0] in " ".join(light_parser().format_help().split())


def test_the_page_has_the_tables_of_the_list():
    script = runpy.run_path(str(ROOT / "docs" / "options_table.py"))
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert script["page"](text) == text, "run python docs/options_table.py --write"
    assert all(f"| `{name}` | " in text for name in OPTIONS)
    assert script["page"](text.replace("`0.999`", "`0.99`")) == text


def test_reading_the_list_loads_no_torch():
    code = (
        "import sys, opacus_ac.engine.options, opacus_ac.integrations.finetune.arguments; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- no second default ---------------------------------------------------------------------------------------------

#: Layers that can read the list, and so state no default of an option; those below may have one, the same.
READERS = {"engine", "audit", "tensorboard", "integrations", "cli"}
#: (where, name) of defaults that are others, on purpose.
OTHERS = {
    ("PrivacyArguments", "sampling"),  # the Trainer draws for itself
    ("PrivacyArguments", "loss_bound"),  # the Trainer logs a loss
    ("DataArguments", "max_rows_per_user"),  # with --group_by only, which has to have some number
    ("RawPercentilePolicy", "target_clip_rate"),  # the published constant
    ("ZerothOrderSettings", "ema_decay"),  # a paper's choice
}


def defaults(tree: ast.AST, where: str = "") -> Iterator[tuple[str, str, ast.expr]]:
    """Yield (class or function, name, value) of defaults: of parameters, fields, and of ``.get("name", value)``."""
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, ast.ClassDef):
            inside = node.name
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and line.value is not None:
                    yield inside, ast.unparse(line.target), line.value
        elif isinstance(node, ast.FunctionDef):
            inside = where or node.name
            given = node.args
            with_default = [*given.posonlyargs, *given.args][-len(given.defaults) or None :] if given.defaults else []
            for argument, value in [
                *zip(with_default, given.defaults, strict=True),
                *zip(given.kwonlyargs, given.kw_defaults, strict=True),
            ]:
                if value is not None:
                    yield inside, argument.arg, value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            name, *value = node.args
            if isinstance(name, ast.Constant) and value:
                yield where, str(name.value), value[0]
        yield from defaults(node, inside)


def second(text: str, room: str) -> list[tuple[str, str]]:
    """Defaults of options that a file states again, or in a lower room, differently."""
    found = []
    for where, name, value in defaults(ast.parse(text)):
        if name not in OPTIONS or (where, name) in OTHERS or ast.unparse(value) == f"shared({name!r})":
            continue
        reads = isinstance(value, ast.Call) and ast.unparse(value).startswith(f"shared({name!r}, note=")
        same = isinstance(value, ast.Constant) and value.value == OPTIONS[name].default
        if not reads and (room in READERS or (OPTIONS[name].default is not None and not same)):
            found.append((where, name))
    return found


FILES = sorted((ROOT / "opacus_ac").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "opacus_ac").parts[0]


def test_no_default_is_stated_twice():
    found = {
        str(path.relative_to(ROOT)): second(path.read_text(encoding="utf-8"), room(path))
        for path in FILES
        if path.name != "options.py"
    }
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("def make(*, a, target_clip_rate=0.9): ...", "engine", [("make", "target_clip_rate")]),
        ("def make(target_clip_rate=0.9): ...", "optimizer", []),
        ("def make(x, target_clip_rate=0.8): ...", "optimizer", [("make", "target_clip_rate")]),
        ("class A:\n    ema_decay: float = 0.999", "integrations", [("A", "ema_decay")]),
        ("class A:\n    ema_decay: float = shared('ema_decay', note='0')", "integrations", []),
        ("class A:\n    ema_decay: float = shared('ema_decay', default=0.9)", "integrations", [("A", "ema_decay")]),
        ("def f(**k):\n    return k.get('lr_control', True)", "engine", [("f", "lr_control")]),
    ],
)
def test_a_second_default_is_found(text, where, found):
    assert second(text, where) == found
