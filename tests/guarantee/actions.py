"""What a person can do with the package, as small actions on a world of runs; each is followed by the checks of the reference."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from reference import (
    DELTA,
    RECORDS,
    Book,
    Injected,
    Model,
    NoiseTally,
    OutOfDraws,
    Reference,
    Rows,
    Violation,
    fail,
    name_of,
    record_losses,
    watched,
)
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.errors import PrivacyBudgetExceeded

SITES = (
    "forward", "backward", "late backward", "hook", "fsync", "before charge", "after charge", "before noise", "after noise", "in statistics",
    "factors", "before accumulate", "after accumulate", "observe", "before inner", "after inner", "policy update",
    "step pre hook", "step post hook",
)  # fmt: skip
"""Where a sequence can ask for an exception."""

REFUSALS = (ValueError, RuntimeError, PrivacyBudgetExceeded, OSError, Injected, StopIteration)
"""What an action may raise; anything else is a crash."""


class Telling(torch.optim.Optimizer):
    """An inner optimizer that tells its run what it is about to do."""

    run: Run | None = None

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        # torch.distributed.checkpoint makes the state of an optimizer by a step of zero gradients at learning rate zero.
        empty = all(
            g["lr"] == 0 and not any(p.grad.any() for p in g["params"] if p.grad is not None) for g in self.param_groups
        )
        if self.run is None or empty:
            return super().step(closure)
        self.run.before_inner()
        fail(self.run.reference, "before inner")
        super().step(closure)
        self.run.expected = self.run.weights()
        fail(self.run.reference, "after inner")
        return None


class TellingSGD(Telling, torch.optim.SGD):
    """SGD, whose step is a function of the last release."""


class TellingAutoAdam(Telling, AutoAdam):
    """AutoAdam, whose step is a function of all releases and of their noise."""


INNER: dict[str, Callable[[list[Tensor]], Any]] = {
    "sgd": lambda parameters: TellingSGD(parameters, lr=1e-3),
    "auto": lambda parameters: TellingAutoAdam(parameters, lr=1e-3, steps=6),
}


@dataclass
class Held:
    """A batch that the loop has in hand, and the draw that it is from (0 for none)."""

    x: Tensor
    y: Tensor
    draw: int


@dataclass
class Saved:
    """A checkpoint, a file or a folder, and what was true when it was written."""

    data: bytes | str
    book: Book
    config: dict[str, Any]
    weights: dict[str, Tensor]


@dataclass
class Run:
    """One model made private, with what its loop holds."""

    reference: Reference
    config: dict[str, Any]
    book: Book
    engine: Any
    bare: Model
    model: Any = None
    optimizer: Any = None
    loader: Any = None
    inner: Any = None
    iterators: dict[int, Iterator[Any]] = field(default_factory=dict)
    held: Held | None = None
    kept: list[Held] = field(default_factory=list)
    last_draw: int = 0
    expected: dict[str, Tensor] = field(default_factory=dict)
    began_with: float = 0.0
    size: float = 3.0
    hooked: bool = False
    adapter_was_in: bool = False  # as the gradients in hand were computed
    fresh: Held | None = None  # what the loader handed out last

    def check_target(self) -> None:
        """Hold what is stated after a release against the target."""
        target = self.config["target"]
        stated = self.engine.get_epsilon(DELTA) if target else 0.0
        if target and stated > target * (1 + 1e-9):
            raise Violation("target", f"a step was taken, and epsilon is {stated:.4f} of a target of {target:g}")

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of all tensors of the model."""
        return {name: tensor.clone() for name, tensor in self.bare.state_dict().items()}

    def follows_releases(self, charged: float) -> bool:
        """Whether noise or rates of a release may follow from releases before it.

        Args:
            charged: noise multiplier of its charge; more noise than a charge that was fixed beforehand changes nothing.
        """
        changed = self.optimizer.noise_multiplier != self.began_with and charged != self.began_with
        return changed or self.config["schedule"] == "function"

    def before_inner(self) -> None:
        """Hold the gradients that the inner optimizer is about to apply against what was released."""
        self.check_weights("before the inner step")
        released = self.reference.releases[-1].outputs if self.reference.releases else {}
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                noised = released.get(name_of(parameter))
                if noised is None or not torch.equal(noised.reshape(-1), parameter.grad.reshape(-1)):
                    raise Violation(
                        "raw", f"the inner optimizer applies a gradient of {name_of(parameter)} that was not released"
                    )

    def check_weights(self, when: str) -> None:
        """Raise when a tensor of the model moved otherwise than by an inner step."""
        for name, tensor in self.bare.state_dict().items():
            if not torch.equal(tensor, self.expected[name]):
                raise Violation("moved", f"{name} moved {when}")


class World:
    """Runs over one dataset, and the actions on them.

    Args:
        config: settings of the first run, as :func:`draw_config` draws them.
        tally: moments of the noise.
        frozen: reference of an earlier run of the same sequence, for a neighbouring dataset.
        without: the record that the neighbouring dataset lacks.
        seed: of the draws.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tally: NoiseTally | None = None,
        frozen: Reference | None = None,
        without: int | None = None,
        seed: int = 0,
    ) -> None:
        self.reference = Reference(tally or NoiseTally(), frozen, without, seed)
        self.config = config
        self.folder = tempfile.TemporaryDirectory() if config["ledger"] else None
        self.folders = tempfile.TemporaryDirectory()  # of checkpoints
        self.ledger = None if self.folder is None else str(Path(self.folder.name) / "ledger")
        self.ledger_book = Book(self.ledger)
        self.runs: list[Run] = []
        self.active = 0
        self.saved: list[Saved] = []
        self.outcomes: list[str] = []
        self.errors: list[str] = []
        self.history: list[Any] = []
        self.ended = False

    @property
    def run(self) -> Run:
        """The run that actions are about."""
        return self.runs[self.active]

    @contextmanager
    def open(self) -> Iterator[World]:
        """Watch the package, and build the first run."""
        with warnings.catch_warnings(), watched(self.reference):
            warnings.simplefilter("ignore")
            self.runs.append(self._build(self.config))
            self.reference.runs = self.runs
            yield self
        self.folders.cleanup()
        if self.folder is not None:
            self.folder.cleanup()

    # ------------------------------------------------------------ building

    def _build(
        self, config: dict[str, Any], engine: Any = None, book: Book | None = None, bare: Model | None = None
    ) -> Run:
        if engine is None:
            engine = PrivacyEngine(accountant=config["accountant"], ledger=self.ledger)
            book = self.ledger_book if self.ledger else Book()
        assert book is not None
        if bare is None:
            bare = Model()
            bare.adapter.requires_grad_(config["adapter"] == "trained")
        run = Run(self.reference, config, book, engine, bare)
        run.size = config["batch_size"]
        parameters = [bare.rows.weight] + ([bare.adapter.weight] if config["adapter"] != "absent" else [])
        run.inner = INNER[config["inner"]](parameters)
        schedule = {"none": None, "list": [3.0, 2.0, 4.0], "function": lambda step: run.size}[config["schedule"]]
        settings: dict[str, Any] = {
            "max_grad_norm": config["C"], "grad_sample_mode": config["mode"], "sampling": config["sampling"],
            "max_physical_batch_size": config["physical"], "batch_size_schedule": schedule, "loss_reduction": config["reduction"],
            "lr_control": config["lr_control"], "ema_decay": None,
        }  # fmt: skip
        policy = config["policy"]
        settings |= {"clipping": policy} if policy in ("flat", "automatic") else {"clip_policy": policy}
        if config["sampling"] == "truncated_poisson":
            settings["max_batch_size"] = 4
        self.reference.left_out = config["left_out"]
        collate = leaving_out(config["left_out"]) if config["left_out"] else None
        loader = DataLoader(Rows(), batch_size=config["batch_size"], shuffle=True, collate_fn=collate)
        common = {"module": bare, "optimizer": run.inner, "data_loader": loader}
        if config["target"]:
            made = engine.make_private_with_epsilon(
                **common, target_epsilon=config["target"], target_delta=DELTA, steps=6, **settings
            )
        else:
            made = engine.make_private(**common, noise_multiplier=config["noise"], **settings)
        run.model, run.optimizer, run.loader = made
        run.began_with = run.optimizer.noise_multiplier
        run.inner.run = run
        run.expected = run.weights()
        self._wire(run)
        return run

    def _wire(self, run: Run) -> None:
        """Put the points of failure into the parts of a run."""
        optimizer, reference = run.optimizer, self.reference

        def around(owner: Any, name: str, before: str | None, after: str | None) -> None:
            original = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                if before is not None:
                    fail(reference, before)
                result = original(*args, **kwargs)
                if after is not None:
                    fail(reference, after)
                return result

            setattr(owner, name, call)

        around(optimizer, "charge", "before charge", "after charge")
        around(optimizer.source, "accumulate", "before accumulate", "after accumulate")
        around(optimizer.policy, "factors", None, "factors")
        around(optimizer.policy, "update", None, "policy update")
        around(optimizer.statistics, "observe", None, "observe")
        optimizer.attach_step_hook(lambda _: fail(reference, "hook"))

        def before(*_: Any) -> None:
            fail(reference, "step pre hook")
            run.before_inner()  # what torch's hooks find is released

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_: fail(reference, "step post hook"))

    # ------------------------------------------------------------ actions

    def do(self, name: str, *args: Any) -> None:
        """Do an action, whatever comes of it, and check what is true after every action."""
        if self.ended:
            return
        self.history.append((name, *args))
        charged = self.run.book.charged(self.run.engine.accountant)
        releases = len(self.reference.releases)
        outcome = "done"
        try:
            getattr(self, name)(*args)
        except OutOfDraws:
            self.ended = True
            outcome = "end"
        except Violation:
            raise
        except REFUSALS as error:
            outcome = type(error).__name__
            self.errors.append(repr(error)[:300])
            refused = isinstance(error, ValueError | PrivacyBudgetExceeded) and len(self.reference.releases) == releases
            one_step = (
                name in ("step", "again", "old", "accumulate") and not self.run.hooked
            )  # a hook runs after the charge
            if refused and one_step and self.run.book.charged(self.run.engine.accountant) != charged:
                raise Violation("refusal", f"charged, and then refused: {error}") from error
        except Exception as error:
            raise Violation("crash", repr(error)) from error
        self.outcomes.append(f"{name}:{outcome}")
        self.reference.close()
        if len(self.reference.releases) > releases:
            self.run.check_target()
        for run in self.runs:
            run.check_weights(f"in {name}")

    def iterate(self, which: int, kind: str) -> None:
        """Start a pass: through the loader, a loader around its sampler, or Opacus's memory manager."""
        run = self.run
        if kind == "foreign":
            loader: Any = DataLoader(
                run.loader.dataset, batch_sampler=run.loader.batch_sampler, collate_fn=run.loader.collate_fn
            )
        elif kind == "manager" and not self.config["left_out"]:  # a part of left-out records has no draw's number
            loader = BatchMemoryManager(
                data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer
            ).__enter__()
        else:
            loader = run.loader
        run.iterators[which] = iter(loader)

    def take(self, which: int) -> None:
        """Take the next batch of a pass that was started; without one, start one."""
        run = self.run
        if which not in run.iterators:
            self.iterate(which, self.config["loop"])
        drawn = len(self.reference.draws)
        try:
            x, y = next(run.iterators[which])
        except StopIteration:
            del run.iterators[which]
            return
        empty = [d.number for d in self.reference.draws if not d.records]
        is_stand_in = float(x[0, -1]) == 0  # of no draw
        now = len(self.reference.draws)
        draw = (now if now > drawn else empty[-1]) if is_stand_in else int(y[0])
        run.held = run.fresh = Held(x, y, draw)

    def leave(self, which: int, close: bool) -> None:
        """Break out of a pass."""
        iterator = self.run.iterators.pop(which, None)
        if iterator is not None and close and hasattr(iterator, "close"):
            iterator.close()

    def keep(self) -> None:
        """Keep the batch in hand for later."""
        if self.run.held is not None:
            self.run.kept = [*self.run.kept[-2:], self.run.held]

    def take_kept(self) -> None:
        """Take the oldest kept batch in hand again."""
        if self.run.kept:
            self.run.held = self.run.kept[0]

    def copy_held(self) -> None:
        """Replace the batch in hand by a copy."""
        if self.run.held is not None:
            self.run.held = Held(self.run.held.x.clone(), self.run.held.y.clone(), self.run.held.draw)

    def by_hand(self, records: tuple[int, ...]) -> None:
        """Take a batch that was put together from the dataset by hand."""
        rows = [self.run.loader.dataset[i] for i in records if i != self.reference.without]
        self.run.held = Held(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]), 0)

    def backward(self, zero: bool) -> None:
        """Run the batch in hand forward and backward."""
        run = self.run
        if zero:
            run.optimizer.zero_grad()
        if run.held is None or self._passes_for_fresh(run.held):
            return
        run.bare.late = lambda _: fail(self.reference, "late backward")
        outputs = run.model(run.held.x)
        fail(self.reference, "forward")
        outputs.register_hook(lambda _: fail(self.reference, "backward"))
        losses = record_losses(outputs, run.held.y)
        run.last_draw = run.held.draw
        run.adapter_was_in = run.bare.adapter.weight.requires_grad and any(
            run.bare.adapter.weight is p for p in run.optimizer.params
        )
        (losses.mean() if self.config["reduction"] == "mean" else losses.sum()).backward()

    def _passes_for_fresh(self, held: Held) -> bool:
        """Whether other rows are about to be used in the place of as many that were just handed out.

        The package cannot tell them from those rows, transformed; the documents say that this is up to the user.
        """
        fresh = self.run.fresh
        if held.draw or fresh is None:
            return False
        return len(fresh.x) == len(held.x) or not self.reference.draws[fresh.draw - 1].records

    def step(self) -> None:
        """Call ``optimizer.step()``."""
        self.run.optimizer.step()

    def zero(self) -> None:
        """Call ``optimizer.zero_grad()``."""
        self.run.optimizer.zero_grad()

    def cycle(self, which: int) -> None:
        """Take a step as people should: the whole logical batch, each physical batch followed by ``step``."""
        run = self.run
        before = run.optimizer.steps_taken
        for _ in range(2 * RECORDS):
            self.take(which)
            if which not in run.iterators:
                return
            self.backward(True)
            run.optimizer.step()
            if run.optimizer.steps_taken != before:
                return

    def again(self, zero: bool) -> None:
        """Run the batch in hand forward and backward, and step: once more, or after something went wrong."""
        self.backward(zero)
        self.run.optimizer.step()

    def old(self) -> None:
        """Take a step on a kept batch."""
        self.take_kept()
        self.again(True)

    def accumulate(self, which: int, batches: int) -> None:
        """Run several batches forward and backward, without clearing in between, and step."""
        self.run.optimizer.zero_grad()
        for _ in range(batches):
            self.take(which)
            self.backward(False)
        self.run.optimizer.step()

    def fail_at(self, site: str) -> None:
        """Let the next call that comes by ``site`` raise."""
        self.reference.failing = site

    def noise(self, value: float | None) -> None:
        """Set the noise multiplier; None sets it back."""
        self.run.optimizer.noise_multiplier = self.run.began_with if value is None else value

    def bound(self, value: float) -> None:
        """Set C."""
        self.run.optimizer.max_grad_norm = value

    def batch_size(self, value: float) -> None:
        """Let the schedule function say another batch size."""
        self.run.size = value

    def hook_changes_noise(self, factor: float) -> None:
        """Attach a step hook that changes the noise, as Opacus's schedulers do."""
        optimizer, reference = self.run.optimizer, self.reference
        self.run.hooked = True

        def change(_: Any) -> None:
            fail(reference, "hook")
            optimizer.noise_multiplier = optimizer.noise_multiplier * factor

        optimizer.attach_step_hook(change)

    def freeze(self, frozen: bool) -> None:
        """Freeze the adapter, or let it train."""
        self.run.bare.adapter.requires_grad_(not frozen)

    def add_adapter(self) -> None:
        """Give the adapter to the optimizer, if it does not have it."""
        adapter = self.run.bare.adapter.weight
        if all(adapter is not p for group in self.run.optimizer.param_groups for p in group["params"]):
            self.run.optimizer.add_param_group({"params": [adapter]})

    def save(self) -> None:
        """Write a checkpoint."""
        run, file = self.run, BytesIO()
        path: Any = file
        if len(self.reference.draws) % 2:  # either kind, by what does not change the sequences
            path = str(Path(self.folders.name) / str(len(self.history)))
        run.engine.save_checkpoint(path=path, module=run.bare, optimizer=run.optimizer, folder=path is not file)
        self.saved.append(Saved(file.getvalue() or path, run.book.copy(), run.config, run.weights()))

    def load(self, new: bool) -> None:
        """Load the last checkpoint: into the same engine, or into new objects."""
        if not self.saved:
            return
        saved = self.saved[-1]
        if new:
            self._replace(self._build(saved.config))
        run = self.run
        path = BytesIO(saved.data) if isinstance(saved.data, bytes) else saved.data
        run.engine.load_checkpoint(path=path, module=run.bare, optimizer=run.optimizer)
        run.book.merge(saved.book, run.engine.accountant)
        run.expected = saved.weights

    def _replace(self, run: Run) -> None:
        self.runs[self.active] = run

    def detach(self) -> None:
        """Take the hooks off and make the same model private again, with the same engine."""
        run = self.run
        run.engine.detach(run.model)
        again = self._build(run.config, run.engine, run.book, run.bare)
        again.kept = run.kept
        self._replace(again)

    def second(self) -> None:
        """Make another model private on the same ledger, at times with other batches; later actions are about either."""
        if self.ledger and len(self.runs) < 2:
            size = 5 - self.config["batch_size"] if len(self.history) % 2 else self.config["batch_size"]
            self.runs.append(self._build({**self.config, "batch_size": size}))
            self.active = len(self.runs) - 1

    def switch(self) -> None:
        """Go on with the other run."""
        self.active = (self.active + 1) % len(self.runs)

    def kill(self, site: str) -> None:
        """Let a step die at ``site``, lose all objects, and start anew from the ledger and the last checkpoint."""
        self.reference.failing = site
        with suppress(*REFUSALS):
            self.cycle(0)
        self.reference.failing = None
        self.reference.close()
        if self.saved:
            self.load(True)
        elif self.ledger:
            self._replace(self._build(self.config))

    # ------------------------------------------------------------ reports

    def report(self, tight: bool) -> None:
        """Hold what the engine says against what was released."""
        run = self.run
        if self.reference.frozen is not None:
            return
        truth = run.book.epsilon()
        spent = run.engine.get_epsilon(DELTA)
        stated = run.engine.privacy_report(DELTA, tight=tight).epsilon
        for said, name in ((spent, "get_epsilon"), (stated, "the report")):
            if said < truth - 1e-6:
                raise Violation("epsilon", f"{name} says {said:.4f}, and what was released is at least {truth:.4f}")
        if tight and run.book.adaptive and stated < spent - 1e-6:
            raise Violation(
                "adaptive", f"the report says {stated:.4f} of an adaptive run, its Renyi bound is {spent:.4f}"
            )
        if not tight and stated < run.book.reported - 1e-6:
            raise Violation("falls", f"the report says {stated:.4f}, and said {run.book.reported:.4f} before")
        if not tight:
            run.book.reported = stated


def draw_config(rng: random.Random) -> dict[str, Any]:
    """Draw the settings of a run."""
    sampling = rng.choice(["poisson", "poisson", "truncated_poisson", "fixed_size", "shuffled"])
    plain = sampling != "shuffled"
    schedule = rng.choice(["none"] * 4 + ["list", "function"]) if plain else "none"
    physical = rng.choice([None, None, None, 1, 2, 3])
    loop = rng.choice(["own"] * 4 + ["foreign", "manager"]) if physical is None and schedule == "none" else "own"
    config = {
        "mode": rng.choice(["bk", "bk", "hooks", "functorch"]),
        "sampling": sampling, "schedule": schedule, "physical": physical, "loop": loop,
        "policy": rng.choice(["flat", "percentile", "geometric", "automatic"]),
        "ledger": rng.random() < 0.4,
        "target": rng.choice([None] * 6 + [8.0]),
        "noise": rng.choice([0.7, 1.0, 2.0]),
        "C": rng.choice([0.5, 1.0, 8.0]),
        "batch_size": rng.choice([2, 3]),
        "reduction": rng.choice(["mean", "sum"]),
        "lr_control": rng.random() < 0.5,
        "adapter": rng.choice(["trained", "trained", "frozen", "absent"]),
    }  # fmt: skip
    left_out = draw_left_out(copy.deepcopy(rng), config)
    others = random.Random(str(rng.getstate()))  # of its own, so that earlier seeds keep their sequences
    inner = others.choice(["sgd", "sgd", "auto"])
    filters = config["target"] and schedule == "function"
    # Left alone, it becomes "vrdp" where a function may follow releases under a target.
    accountant = others.choice(["vrdp", None] if filters else ["vrdp", "vpld"])
    return {**config, "left_out": left_out, "inner": inner, "accountant": accountant}


def draw_left_out(rng: random.Random, config: dict[str, Any]) -> frozenset[int]:
    """Draw the records that the collate function leaves out; the first one makes stand-ins."""
    if config["physical"] is not None or config["loop"] == "manager" or rng.random() < 0.75:
        return frozenset()
    return frozenset(rng.sample(range(1, RECORDS), rng.choice([1, 3, 7])))


def leaving_out(records: frozenset[int]) -> Callable[[list[tuple[Tensor, Tensor]]], Any]:
    """Return a collate function that leaves records out."""

    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        kept = [row for row in rows if int(row[0][:RECORDS].argmax()) not in records]
        return default_collate(kept) if kept else None

    return collate


def _records(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.sample(range(RECORDS), rng.choice([2, 3])))


ACTIONS: dict[str, tuple[int, Callable[[random.Random], tuple[Any, ...]]]] = {
    "cycle": (14, lambda r: (r.choice([0, 0, 0, 1]),)),
    "again": (10, lambda r: (r.random() < 0.7,)),
    "old": (3, lambda r: ()),
    "accumulate": (3, lambda r: (r.choice([0, 0, 1]), r.choice([2, 3]))),
    "take": (7, lambda r: (r.choice([0, 0, 0, 1]),)),
    "backward": (5, lambda r: (r.random() < 0.7,)),
    "step": (4, lambda r: ()),
    "fail_at": (8, lambda r: (r.choice(SITES),)),
    "iterate": (2, lambda r: (r.choice([0, 1]), r.choice(["own", "own", "foreign", "manager"]))),
    "leave": (3, lambda r: (r.choice([0, 1]), r.random() < 0.5)),
    "keep": (4, lambda r: ()),
    "take_kept": (2, lambda r: ()),
    "copy_held": (1, lambda r: ()),
    "by_hand": (1, lambda r: (_records(r),)),
    "zero": (2, lambda r: ()),
    "noise": (3, lambda r: (r.choice([None, 0.5, 1.5]),)),
    "bound": (2, lambda r: (r.choice([0.25, 2.0]),)),
    "batch_size": (2, lambda r: (r.choice([1, 2, 4]),)),
    "hook_changes_noise": (1, lambda r: (r.choice([0.5, 0.9]),)),
    "freeze": (3, lambda r: (r.random() < 0.5,)),
    "add_adapter": (1, lambda r: ()),
    "save": (2, lambda r: ()),
    "load": (2, lambda r: (r.random() < 0.5,)),
    "detach": (1, lambda r: ()),
    "second": (2, lambda r: ()),
    "switch": (2, lambda r: ()),
    "kill": (1, lambda r: (r.choice(SITES),)),
    "report": (3, lambda r: (r.random() < 0.1,)),
}
"""Actions by name: how often they are drawn, and their arguments."""


def draw_sequence(seed: int, length: int = 14) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Return the settings and actions of sequence number ``seed``."""
    rng = random.Random(seed)
    names, weights = list(ACTIONS), [weight for weight, _ in ACTIONS.values()]
    config = draw_config(rng)
    return config, [(name, *ACTIONS[name][1](rng)) for name in rng.choices(names, weights, k=length)]


def play(
    config: dict[str, Any],
    actions: list[tuple[Any, ...]],
    seed: int = 0,
    tally: NoiseTally | None = None,
    frozen: Reference | None = None,
    without: int | None = None,
) -> World:
    """Run a sequence and return the world at its end; the last action is a report.

    Raises:
        Violation: something does not hold.
    """
    torch.manual_seed(seed)
    world = World(config, tally, frozen, without, seed)
    with world.open():
        for action in actions:
            world.do(*action)
        world.do("report", world.run.book.adaptive)
    return world


def violation_of(config: dict[str, Any], actions: list[tuple[Any, ...]], seed: int = 0) -> Violation | None:
    """Play a sequence and return what does not hold, if anything."""
    try:
        play(config, actions, seed)
    except Violation as violation:
        return violation
    return None


def shrink(config: dict[str, Any], actions: list[tuple[Any, ...]], seed: int, kind: str) -> list[tuple[Any, ...]]:
    """Leave out actions as long as the rest still shows a violation of ``kind``."""
    place = 0
    while place < len(actions):
        shorter = actions[:place] + actions[place + 1 :]
        violation = violation_of(config, shorter, seed)
        if violation is not None and violation.kind == kind:
            actions = shorter
        else:
            place += 1
    return actions
