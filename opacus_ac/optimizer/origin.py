"""Which draw the gradients of a step come from: what went through the model, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opacus_ac.sampling.delivery import Delivery, Sight, tensors_of
from opacus_ac.sampling.plan import SamplingPlan


class Origin:
    """Follows the forward passes of a model to the step that uses their gradients.

    Guarantees:
        A forward pass counts when a backward pass has reached its output, so that one that the loop leaves out does
        not, and two whose losses are added up do.
    """

    def __init__(self) -> None:
        self._sights: list[Sight] = []
        self._running: list[Sight] = []
        self.is_stand_in = False
        """Whether the gradients in hand are of a stand-in, also of one that was used before: they belong to nobody that
        was drawn."""

    def enter(self, plan: SamplingPlan, inputs: Any) -> bool:
        """Note what a forward pass runs on; return whether it is another batch than that of all passes before."""
        sight = plan.see(list(tensors_of(inputs)))
        known = next((s for s in self._sights if s.same(sight)), None)
        if known is None:
            self._sights.append(sight)
        self._running.append(known or sight)
        return known is None and not any(s.confirmed for s in self._sights)

    def leave(self, output: Any) -> None:
        """Note the output of the forward pass that was entered last; None where it failed."""
        if not self._running:
            return
        sight = self._running.pop()
        if output is None:
            return
        nodes = {node for tensor in tensors_of(output) for node in _nodes(tensor)}
        sight.confirmed = sight.confirmed or not nodes  # nothing tells then
        for node in nodes:
            node.register_prehook(lambda _gradients: sight.confirm())

    def given_up(self) -> bool:
        """Forget passes from before gradients were cleared that had no backward pass; return whether there were any."""
        older = [s for s in self._sights if s.is_older and not s.confirmed]
        if self._running or not older:
            return False
        self._sights = [s for s in self._sights if s not in older]
        return True

    def gradients_cleared(self) -> bool:
        """Forget the passes whose gradients are gone, and return whether there were no others.

        The backward pass of others may follow.
        """
        gone = [s for s in self._sights if s.confirmed]
        self._sights = [s for s in self._sights if not s.confirmed]
        for sight in self._sights:
            sight.is_older = True
        return bool(gone) and not self._sights

    def forget(self) -> None:
        """Forget all passes: what comes next belongs to another physical batch."""
        self._sights, self._running = [], []

    def delivery(self, plan: SamplingPlan) -> Delivery | None:
        """Return the unused delivery that the gradients in hand come from; None where their origin is unknown.

        Raises:
            ValueError: they come from several draws, or a record may be in them twice.
        """
        sights = [s for s in self._sights if s.confirmed] or self._sights
        self.is_stand_in = False
        if not sights:  # the model was called by its parts, or not at all
            return plan.in_hand
        if len(sights) > 1:
            raise ValueError(
                "gradients of more than one batch went into one step: a record that was drawn twice would count twice, "
                "at the price of one draw. Call optimizer.zero_grad() and optimizer.step() once for every batch of the "
                "loader; for larger batches choose the batch_size of the loader, for less memory "
                "max_physical_batch_size in make_private. Rows that are not the loader's count as a batch: add them to "
                "the dataset"
            )
        (sight,) = sights
        if sight.repeats:
            raise ValueError(
                "two rows of a batch of unknown origin are the same, and one record in it twice would count twice. "
                "Take the batches from the loader that make_private returned"
            )
        if sight.is_part:
            raise ValueError(
                "a physical batch is used by itself, which belongs to a logical batch of another run, or of one of "
                "several passes that took turns: which records it has depends on the other records that were drawn "
                "with it, so that one record more would move two. Take the batches from the loader that make_private "
                "returned last, and finish one pass before the next begins"
            )
        found = sight.delivery
        self.is_stand_in = found is not None and found.draw.records == 0
        if found is None or not found.used:
            return found
        if found.draw.part or not found.draw.last:
            raise ValueError(
                "a physical batch is used again, whose records are in the sums of its logical batch already, or were. "
                "Take one step for every batch of the loader, in its order"
            )
        return None


def _nodes(tensor: Tensor) -> list[Any]:
    """Return the nodes of the graph that a gradient of the tensor comes through, whatever is done to it in place."""
    if not tensor.requires_grad:
        return []
    tensors = [tensor] if tensor._base is None else [tensor, tensor._base]
    return [t.grad_fn for t in tensors if t.grad_fn is not None]
