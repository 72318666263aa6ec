"""Checkpoints of several processes: what is resumed, on how many ranks, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import difference
from distributed_launch import run
from helpers import classifier, dataset, loss_of
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.checkpoint.file import digest
from opacus_ac.checkpoint.many_processes import _read_text, _tensors
from opacus_ac.zeroth_order import Pruning, Stages, ZerothOrderSettings

SAVES = ["2:save_fsdp", "2:save_ddp"]
RESUMES = ["1:resume_ddp", "2:resume_fsdp", "2:resume_fsdp_of_ddp", "3:resume_fsdp", "3:resume_ddp"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[Any]]:
    return run([*SAVES, *RESUMES], tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SAVES, *RESUMES])
def test_a_resumed_run_is_the_uninterrupted_one(results, case):
    expected = results["2:save_fsdp"][0]
    for got in results[case]:
        assert difference(got["weights"], expected["weights"]) < 1e-12
        assert difference(got["average"], expected["average"]) < 1e-12
        assert [step["bound"] for step in got["steps"]] == [step["bound"] for step in expected["steps"]]
        assert got["taken"] == 6
        assert got["history"] == expected["history"]
        assert (got["middle"], got["epsilon"]) == (expected["middle"], expected["epsilon"])
        assert 0 < got["middle"] < got["epsilon"] < 10


# ---------------------------------------------------------------- one process: what is in it, and what is refused


def made(model: nn.Module | None = None, ledger: Path | None = None, **options: Any) -> tuple[Any, ...]:
    model = classifier() if model is None else model
    engine = PrivacyEngine(ledger=ledger, accountant=options.pop("accountant", "vrdp"))
    inner = options.pop("inner", torch.optim.AdamW)
    arguments = {"noise_multiplier": 1.0, "noise_generator": torch.Generator().manual_seed(2), **options}
    private = engine.make_private(
        module=model,
        optimizer=inner(model.parameters(), lr=1e-3),
        data_loader=DataLoader(dataset(), batch_size=16),
        **arguments,
    )
    return engine, *private


def losses_of(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def trained(folder: Path, **options: Any) -> tuple[Any, ...]:
    engine, model, optimizer, loader = made(**options)
    for batch in loader:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    engine.save_checkpoint(path=folder, module=model, optimizer=optimizer, folder=True)
    return engine, model, optimizer, loader


def test_a_checkpoint_is_one_text_and_tensors_and_holds_no_stream(tmp_path):
    engine, _, optimizer, _ = trained(tmp_path / "run")
    saved = _read_text(tmp_path / "run")
    assert saved["version"] == 2
    assert saved["step"]["mechanism"] == {"noise_multiplier": 1.0, "stream": {}, "statistics_stream": {}}
    assert saved["step"]["policy"]["bound"] == optimizer.max_grad_norm
    assert saved["accountant"]["history"] == engine.accountant.history
    assert "generator" not in json.dumps(saved)
    content = b"".join(f.read_bytes() for f in (tmp_path / "run").iterdir())
    state = optimizer.mechanism.stream.state_dict()["generator"].numpy().tobytes()
    assert state[100:140] not in content  # of the generator's 5 kB
    assert not [f for f in tmp_path.iterdir() if f.name != "run"]


def test_loading_continues_the_run_and_its_account(tmp_path):
    engine, model, optimizer, _ = trained(tmp_path / "run")
    other, copy, resumed, _ = made(classifier(seed=9))
    other.load_checkpoint(path=tmp_path / "run", module=copy, optimizer=resumed)
    assert difference(dict(copy.named_parameters()), dict(model.named_parameters())) == 0
    assert resumed.max_grad_norm == optimizer.max_grad_norm
    assert resumed.steps_taken == optimizer.steps_taken == 4
    assert other.get_epsilon(1e-3) == engine.get_epsilon(1e-3)
    other.load_checkpoint(path=tmp_path / "run", module=copy, optimizer=resumed)  # what it knows is not charged twice
    assert other.get_epsilon(1e-3) == engine.get_epsilon(1e-3)
    engine.load_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
    assert other.get_epsilon(1e-3) == engine.get_epsilon(1e-3)


REFUSED = {
    "model": ({"model": nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double()}, "of another model: "),
    "noise": ({"noise_multiplier": 2.0}, "noise_multiplier = 1.0, this run has 2.0"),
    "policy": ({"clip_policy": "geometric"}, "clip_policy = 'percentile'"),
    "average": ({"ema_decay": None}, "another ema_decay"),
    "control": ({"lr_control": False}, "another lr_control"),
    "accountant": ({"accountant": "vpld"}, "accounted by 'vrdp', this engine uses 'vpld'"),
    "ledger": ({"ledger": True}, "without a ledger"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(tmp_path, case):
    trained(tmp_path / "run")
    options, words = REFUSED[case]
    if "ledger" in options:
        options = {"ledger": tmp_path / "ledger"}
    engine, model, optimizer, _ = made(**options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        engine.load_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.steps_taken == 0
    assert engine.get_epsilon(1e-3) == 0


def test_folders_and_optimizers_that_do_not_fit_are_refused(tmp_path):
    engine, model, optimizer, _ = trained(tmp_path / "run")
    (tmp_path / "none").mkdir()
    run = {"module": model, "optimizer": optimizer}
    with pytest.raises(ValueError, match=r"run exists: give each checkpoint a folder"):
        engine.save_checkpoint(path=tmp_path / "run", folder=True, **run)
    with pytest.raises(ValueError, match=r"none is no folder that save_checkpoint wrote"):
        engine.load_checkpoint(path=tmp_path / "none", **run)
    for other, changed in ((PrivacyEngine(), {}), (engine, {"optimizer": None}), (made()[0], {})):
        with pytest.raises(ValueError, match=r"not the one that this engine made private last"):
            other.save_checkpoint(path=tmp_path / "other", folder=True, **{**run, **changed})
        with pytest.raises(ValueError, match=r"not the one that this engine made private last"):
            other.load_checkpoint(path=tmp_path / "run", **{**run, **changed})
    with pytest.raises(ValueError, match=r"trains parameters that are not in this model"):
        engine.save_checkpoint(path=tmp_path / "other", folder=True, module=classifier(), optimizer=optimizer)
    assert not (tmp_path / "other").exists()


class Scheduler:
    def state_dict(self) -> dict[str, Any]:
        return {}


NOT_IN_A_FOLDER = {
    "checkpoint_dict": {"checkpoint_dict": {"note": 5}},
    "module_state_dict_kwargs": {"module_state_dict_kwargs": {"keep_vars": True}},
    "torch_save_kwargs": {"torch_save_kwargs": {"pickle_protocol": 4}},
    "noise_scheduler": {"noise_scheduler": Scheduler()},
    "path must name one": {"path": BytesIO()},
}


@pytest.mark.parametrize("words", NOT_IN_A_FOLDER)
def test_what_a_folder_has_no_place_for_is_refused_and_nothing_is_written(tmp_path, words):
    engine, model, optimizer, _ = made()
    options = {"path": tmp_path / "run", "module": model, "optimizer": optimizer, **NOT_IN_A_FOLDER[words]}
    with pytest.raises(ValueError, match=words):
        engine.save_checkpoint(folder=True, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["module_load_dict_kwargs", "torch_load_kwargs", "noise_scheduler"])
def test_what_cannot_be_read_from_a_folder_is_refused_and_nothing_is_loaded(tmp_path, words):
    trained(tmp_path / "run")
    engine, model, optimizer, _ = made()
    with pytest.raises(ValueError, match=words):
        engine.load_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer, **{words: {}})
    assert optimizer.steps_taken == len(engine.accountant) == 0


def as_version_1(folder: Path, model: nn.Module, optimizer: Any) -> Path:
    """Write what a folder holds as the first version of this package did, under another name."""
    saved = _read_text(folder)
    names = saved.pop("trained")
    step, tensors = saved["step"], {}
    if step["ema"] is not None:
        step["ema"] = step["ema"]["updates"]
        tensors["ema"] = dict(zip(names, optimizer.ema.average, strict=True))
    if "zeroth_order" in step:
        step["zeroth_order"] |= {"indices": None, "anchor": None, "trained": names}
        kept = optimizer.coordinates.state_dict()
        tensors["zeroth_order"] = {
            f"{kind}.{name}": tensor
            for kind, values in kept.items()
            for name, tensor in zip(names, values or [None] * len(names), strict=True)
            if tensor is not None
        }
    text = json.dumps({**saved, "version": 1})
    state = {**_tensors(model, optimizer), **tensors, "privacy": text}
    dcp.save(state, checkpoint_id=folder.parent / "old")
    return folder.parent / "old"


STAGES = ZerothOrderSettings(
    num_directions=3, pruning=Pruning(ratio=0.5, score="magnitude"), stages=Stages(first=2, proximal=0.1)
)
OF_VERSION_1 = {
    "gradients": {},
    "no average": {"ema_decay": None, "lr_control": False},
    "forward only": {"zeroth_order": STAGES, "clip_policy": "fixed", "inner": torch.optim.SGD},
    "forward only, all coordinates": {"zeroth_order": ZerothOrderSettings(ema_decay=0.9), "clip_policy": "fixed"},
}


@pytest.mark.parametrize("run", OF_VERSION_1)
def test_a_folder_of_version_1_is_read(tmp_path, run):
    engine, model, optimizer, loader = made(**OF_VERSION_1[run])
    for batch in loader:
        optimizer.zero_grad()
        losses = partial(losses_of, model, batch)
        if optimizer.forward_only:
            optimizer.step(losses)
        else:
            losses().mean().backward()
            optimizer.step()
    engine.save_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer, folder=True)
    other, copy, resumed, _ = made(classifier(seed=9), **OF_VERSION_1[run])
    other.load_checkpoint(path=as_version_1(tmp_path / "run", model, optimizer), module=copy, optimizer=resumed)
    assert difference(dict(copy.named_parameters()), dict(model.named_parameters())) == 0
    assert other.get_epsilon(1e-3) == engine.get_epsilon(1e-3)
    of_streams = {"stream", "statistics_stream"}
    mine, theirs = ({**o.state_dict()["opacus_ac"]} for o in (resumed, optimizer))
    for state in (mine, theirs):
        state["mechanism"] = {k: v for k, v in state["mechanism"].items() if k not in of_streams}
    assert digest(mine) == digest(theirs)


def test_a_folder_of_version_1_with_other_trained_weights_is_refused(tmp_path):
    _, model, optimizer, _ = trained(tmp_path / "run")
    old = as_version_1(tmp_path / "run", model, optimizer)
    partly = classifier()
    partly[0].requires_grad_(False)
    engine, _, frozen, _ = made(partly)
    with pytest.raises(ValueError, match=r"trained other parameters \(4, this one 2\)"):
        engine.load_checkpoint(path=old, module=partly, optimizer=frozen)
    assert frozen.steps_taken == 0


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("opacus_ac.checkpoint.many_processes.VERSION", 3)
    trained(tmp_path / "run")
    monkeypatch.undo()
    engine, model, optimizer, _ = made()
    with pytest.raises(ValueError, match=r"version 3 of the checkpoint, this package reads 1 and 2"):
        engine.load_checkpoint(path=tmp_path / "run", module=model, optimizer=optimizer)
