"""Hooks that keep the input of a module and the gradient at its output, for every use of a trainable parameter.

While a module with trainable parameters of its own runs, its parameters do not require a gradient. So autograd skips
their weight gradients (the larger half of the memory of a backward pass, and a third of its work), and computes only
the gradient at the input. Autograd itself keeps the input. So gradient checkpointing, offloading and the check for
changes in place work for it as for any other saved tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from opacus_ac.grad_sample.folded_rows import FoldedRows
from opacus_ac.grad_sample.one_backward import experts
from opacus_ac.grad_sample.one_backward.graph_nodes import keep, pass_on_watched, pass_several, watch_output
from opacus_ac.grad_sample.one_backward.inert import inert
from opacus_ac.grad_sample.one_backward.shared import Shared
from opacus_ac.grad_sample.one_backward.sharing import Sharing
from opacus_ac.grad_sample.one_backward.states import NO_STATES, Place, States, attributes, replaced
from opacus_ac.grad_sample.one_backward.use import (
    Call,
    Tracked,
    Use,
    autocast_of,
    in_the_second_dimension,
    records_first,
)
from opacus_ac.grad_sample.one_backward.watched_passes import WatchedPasses
from opacus_ac.grad_sample.one_backward.windows import Windows
from opacus_ac.grad_sample.precision import exact
from opacus_ac.grad_sample.sharded_parameters import ShardedParameters


class _Before(NamedTuple):
    """What a module that is run again had before a call."""

    buffers: list[tuple[int, int]]
    attributes: dict[Place, Any]


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Return what changes when a buffer of a module is replaced or written."""
    return [(id(buffer), buffer._version) for buffer in module.buffers()]


class Capture:
    """Adds hooks to a model, and delivers each use of a module with the gradient at its output.

    Args:
        model: the model. Only hooks are added to it.
        tracked: the modules to watch. A module object is watched once, even if it is in several places.
        deliver: called in the backward pass with each use and the gradient at its output.
        on_forward: called when a tracked module starts in a forward pass (not in a recomputation).
        flattening: modules that take ``[B, T, d]`` and pass ``[B T, d]``, record after record, to modules inside.
        folded: parts of the model that run each record as several rows.

    Guarantees:
        Nothing is kept for a module that is in evaluation mode or runs without gradients. ``requires_grad`` has its
        original value whenever no forward pass is running, even after an exception. A parameter that is used outside of
        the watched modules gets an ordinary ``.grad``, by which such a use is found.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Iterable[Tracked],
        deliver: Callable[[Use, Tensor], None],
        on_forward: Callable[[], None],
        flattening: Iterable[nn.Module] = (),
        folded: FoldedRows | None = None,
    ) -> None:
        self._deliver, self._on_forward = deliver, on_forward
        self._tracked = {id(t.module): t for t in tracked}
        self._model_id = id(model)
        self._shards = ShardedParameters(model, self._tracked.values())
        self._flattening = list(flattening)
        self._folded = folded or FoldedRows()
        self._passes = 0
        self._watched = WatchedPasses(() if self._shards.any else self._tracked.values(), self._share_parameter)
        self._windows = Windows(model, self._watched.note)
        self._sharing = Sharing(model.buffers(), self._watched.is_constant, self._windows.rows_of_a_record)
        self._paused = False
        self._shapes: dict[int, tuple[int, int] | None] = {}
        self._before_call: dict[int, _Before] = {}
        # Inside of experts the rows are sorted by expert, so nothing there has the records one after the other.
        within = {
            id(inner) for e in model.modules() if experts.is_experts(e) for inner in e.modules() if inner is not e
        }
        self._outer = {id(i): id(m) for m in self._flattening for i in m.modules() if id(i) not in within}
        self._running: list[tuple[int, list[nn.Parameter]]] = []
        self._token = torch.zeros((), requires_grad=True)
        self._handles: list[RemovableHandle] = []
        try:
            self._attach(model)
        except BaseException:
            self.remove()
            raise

    def _attach(self, model: nn.Module) -> None:
        self._handles.append(model.register_forward_pre_hook(self._start, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end, prepend=True, always_call=True))
        self._handles += self._windows.attach()
        for module in self._flattening:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
        for item in self._tracked.values():
            self._handles.append(item.module.register_forward_pre_hook(self._before))
            # The first hook of the module, because a rule describes the output before other hooks change it.
            self._handles.append(
                item.module.register_forward_hook(self._after, prepend=True, with_kwargs=True, always_call=True)
            )

    @property
    def paused(self) -> bool:
        """Whether forward passes are ignored."""
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self._paused = self._watched.paused = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        # A copy of the model has the hooks, too. They do not know its modules, and do nothing.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The hooks of a pickled model do nothing.
        return inert, ()

    def remove(self) -> None:
        """Remove all hooks and restore ``requires_grad``. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self.restore()

    def watches(self, module: nn.Module) -> bool:
        """Say whether calls of exactly this module object are watched."""
        return id(module) in self._tracked

    def restore(self) -> None:
        """Restore ``requires_grad`` after an interrupted forward pass."""
        self._windows.forget()
        while self._running:
            self._switch_on(*self._running.pop())

    def _switch_on(self, key: int, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.requires_grad = True
        if self._tracked[key].is_experts:
            experts.unwatch(self._tracked[key].module)

    def _watching(self, module: nn.Module) -> Tracked | None:
        tracked = self._tracked.get(id(module))
        watched = tracked is not None and module.training and torch.is_grad_enabled() and not self.paused
        return tracked if watched else None

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) == self._model_id and module.training and torch.is_grad_enabled() and not self.paused:
            self._passes += 1
            self._windows.forget()
            self._watched.start(sys._getframe(1), self._sharing.start((args, kwargs)))

    def _end(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) == self._model_id:
            self._watched.end(self._sharing.undecided)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()), None)
        shape = states.shape if isinstance(states, Tensor) and states.dim() == 3 else None
        # Kept after the call, because a recomputation may run modules inside without the hooks of this module.
        self._shapes[id(module)] = None if shape is None else (shape[0], shape[1])

    def _before(self, module: nn.Module, _args: Any) -> None:
        tracked = self._watching(module)
        if tracked is None:
            return
        if torch._C._current_graph_task_id() == -1:
            self._on_forward()
        off = [p for p in self._shards.now(tracked) if p.requires_grad]
        for parameter in off:
            parameter.requires_grad = False
        self._running.append((id(module), off))
        if tracked.keep_output:
            self._before_call[id(module)] = _Before(_versions(module), attributes(module))
        if tracked.is_experts:
            experts.watch(module, lambda product, output: self._product(tracked, product, output))

    def _leave(self, module: nn.Module) -> bool:
        """Restore the module's parameters. Returns whether it was watched and any of them is trained."""
        own = id(module)
        off: list[nn.Parameter] = []
        if self._running and self._running[-1][0] != own and all(key != own for key, _ in self._running):
            return False
        key = None
        while self._running and key != own:
            key, off = self._running.pop()
            self._switch_on(key, off)
        if key != own:
            return False
        if off:
            return True
        switched = {id(p) for _, outer in self._running for p in outer}  # tied weights in nested modules
        return any(id(p) in switched for p in self._shards.now(self._tracked[own]))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = self._before_call.pop(id(module), None)
        if not self._leave(module) or output is None:  # the output is None if the forward raised
            return None
        tracked = self._tracked[id(module)]
        if tracked.is_experts:
            return None  # each product was recorded separately
        states, kept = (NO_STATES, []) if before is None else self._changed(tracked, before)
        if tracked.keep_output and not isinstance(output, Tensor):
            call, tensors = Call.of(args, kwargs)
            return self._after_several(tracked, call, [*tensors, *kept], output, states)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ValueError(
                f"{tracked.path or 'the model'} ({type(module).__name__}) returns {type(output).__name__}, and a "
                "per-sample gradient needs one floating-point tensor with the records first. Split the module so that "
                "its parameters are in layers that return one, or freeze it"
            )
        call, tensors = Call.of(args, kwargs)
        batch = self._folded.batch(module, self._sharing.batch)
        shared = self._sharing.of(tracked, tensors, output, batch, self._watched.is_constant(output))
        if shared is not None:
            tensors = shared.inputs(tensors)
        if tracked.keep_output:  # what comes next may change the output in place
            tensors = [*tensors, *kept, output.clone() if shared is None else shared.kept(output)]
        second = frozenset[int]()
        if shared is None and tracked.is_time_first:
            second = in_the_second_dimension(tracked, tensors, ())
        use = self._use(tracked, call, records_first(tensors, second), output.device)
        use.second, use.states = second, states
        if shared is not None:
            use.is_shared = True
            return shared.value.again(
                pass_on_watched(self._token, shared.value.records(), lambda gradient: self._arrive(use, gradient))
            )
        turned = range(int(bool(second) and output.dim() == 3))

        def arrive(gradient: Tensor) -> None:
            self._arrive(use, *records_first((gradient,), turned))

        watched = watch_output(self._token, output, arrive)
        self._watched.note(output if watched is None else watched)
        return watched

    def _use(self, tracked: Tracked, call: Call, tensors: Iterable[Tensor], device: torch.device) -> Use:
        tensors = list(tensors)
        bare = frozenset(i for i, t in enumerate(tensors) if isinstance(t, Shared) and not t.has_batch_of_one)
        # Detached, because the graph must not hold itself.
        kept = keep(self._token, *(t.records().detach() if isinstance(t, Shared) else t.detach() for t in tensors))
        flattened = self._shapes.get(self._outer.get(id(tracked.module), 0))
        autocast = autocast_of(device.type)
        folded = self._windows.now or self._folded.of(tracked.module)
        return Use(tracked.path, tracked.module, call, kept, autocast, self._passes, flattened, folded, bare=bare)

    def _share_parameter(self, tracked: Tracked, name: str, parameter: nn.Parameter) -> Shared | None:
        """Return a parameter that is used outside of its module, with a copy per record; None without a batch."""
        if not self._sharing.batch[0]:
            return None
        path = f"{tracked.path}.{name}" if tracked.path else name
        kept = keep(self._token)
        use = Use(path, tracked.module, Call([], [], None), kept, nullcontext(), self._passes, parameter=parameter)
        rows = parameter.detach().expand(self._sharing.batch[0], *parameter.shape)
        rows = pass_on_watched(self._token, rows, lambda gradient: self._arrive(use, gradient))
        return Shared.of(rows, self._sharing.known)

    def _share_returned(self, tracked: Tracked, leaves: list[Any]) -> None:
        """Put a shared value in the place of each own parameter that a module returns, for others to use."""
        names = {id(p): name for name, p in tracked.module.named_parameters()}
        trained = {id(p) for p in self._shards.now(tracked)}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, nn.Parameter) and id(leaf) in trained and id(leaf) in names:
                shared = self._share_parameter(tracked, names[id(leaf)], leaf)
                leaves[place] = leaf if shared is None else shared

    def _changed(self, tracked: Tracked, before: _Before) -> tuple[States, list[Tensor]]:
        """Return the states that a call has replaced, and refuse a module whose buffers it has changed."""
        if before.buffers != _versions(tracked.module):
            raise ValueError(
                f"{tracked.path or 'the model'} ({type(tracked.module).__name__}) changes its buffers in the forward "
                "pass, which would publish statistics of the data. Register a rule with register_rule, or freeze it"
            )
        return replaced(tracked.module, before.attributes)

    def _after_several(self, tracked: Tracked, call: Call, tensors: list[Tensor], output: Any, states: States) -> Any:
        """Note a call that returned several tensors, of which the floating-point ones carry gradients."""
        leaves, spec = tree_flatten(output)
        floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        places = [i for i in floats if not isinstance(leaves[i], nn.Parameter)]
        self._share_returned(tracked, leaves)
        if not places and len(floats):
            return tree_unflatten(leaves, spec)
        if not places:
            raise ValueError(
                f"{tracked.path or 'the model'} ({type(tracked.module).__name__}) returns {type(output).__name__} "
                "without a floating-point tensor, so no gradient comes back to it. Freeze it"
            )
        outputs = [leaves[place] for place in places]
        second = in_the_second_dimension(tracked, tensors, outputs)
        use = self._use(tracked, call, records_first([*tensors, *outputs], second), outputs[0].device)
        use.second, use.states = second, states

        def arrive(gradients: tuple[Tensor | None, ...]) -> None:
            use.gradients = gradients = records_first(gradients, {i - len(tensors) for i in second})
            self._arrive(use, next(g for g in gradients if g is not None))

        records = [o.records() if isinstance(o, Shared) else o for o in outputs]
        for place, output, passed in zip(places, outputs, pass_several(arrive, self._token, *records), strict=True):
            leaves[place] = output.again(passed) if isinstance(output, Shared) else passed
            self._watched.note(passed)
        return tree_unflatten(leaves, spec)

    def _product(self, tracked: Tracked, product: experts.Product, output: Tensor) -> Tensor:
        """Note one product of rows with the stacked weights of experts."""
        tensors = [product.inputs, product.tokens]
        use = self._use(tracked, Call([], [], None), tensors, output.device)
        use.product = product.without_tensors()
        watched = watch_output(self._token, output, lambda gradient: self._arrive(use, gradient))
        output = output if watched is None else watched
        self._watched.note(output)
        return output

    def _arrive(self, use: Use, gradient: Tensor) -> None:
        if use.kept is None:
            raise ValueError(
                f"two backward passes ran through one use of {use.path}, so its records would count twice: add the "
                "losses and call backward() once. For a penalty on gradients (torch.autograd.grad in the loss), "
                "penalize differences of the model's outputs at two close inputs, which needs one backward pass"
            )
        self._shards.gather(use.module)
        with exact():
            self._deliver(use, gradient)


def is_captured(model: nn.Module) -> bool:
    """Say whether ``model``, or a part of it, has hooks of a :class:`Capture`."""
    owners = (getattr(h, "__self__", None) for m in model.modules() for h in m._forward_pre_hooks.values())
    watched = [o for o in owners if isinstance(o, Capture)]
    return any(capture.watches(m) for capture in watched for m in model.modules())
