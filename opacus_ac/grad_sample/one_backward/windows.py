"""Windows of an image: layers that cut each record into K parts, which a part of the layer gets as rows ``[B K, ...]``.

Which layers do so is known from their source and not from sizes. In each of them, the windows of a record stand one
after the other.

References:
    Liu et al., arXiv 2103.14030 (shifted windows); Li et al., arXiv 2203.16527 (plain backbones with windows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_ac.grad_sample.broadcast import tensors_in
from opacus_ac.grad_sample.folded_rows import Fold
from opacus_ac.grad_sample.module_replay import written_type
from opacus_ac.grad_sample.one_backward.inert import inert
from opacus_ac.grad_sample.registry import ClassT, require_module_class

# Layers of transformers, and their parts that get the windows. What else a part gets belongs to the windows, too (the
# mask of shifted windows).
_PARTS: dict[tuple[str, str], tuple[str, ...]] = {
    (f"transformers.models.{source}", layer): tuple(parts.split())
    for source, layer, parts in (
        ("clap.modeling_clap", "ClapAudioLayer", "attention"),
        ("donut.modeling_donut_swin", "DonutSwinLayer", "attention"),
        ("florence2.modeling_florence2", "Florence2VisionWindowAttention", "qkv proj"),
        ("got_ocr2.modeling_got_ocr2", "GotOcr2VisionLayer", "attn"),
        ("maskformer.modeling_maskformer_swin", "MaskFormerSwinLayer", "attention"),
        ("sam.modeling_sam", "SamVisionLayer", "attn"),
        ("sam2.modeling_sam2", "Sam2MultiScaleBlock", "attn"),
        ("sam3.modeling_sam3", "Sam3ViTLayer", "attention"),
        ("sam_hq.modeling_sam_hq", "SamHQVisionLayer", "attn"),
        ("swin.modeling_swin", "SwinLayer", "attention"),
        ("swin2sr.modeling_swin2sr", "Swin2SRLayer", "attention"),
        ("swinv2.modeling_swinv2", "Swinv2Layer", "attention"),
        ("vitdet.modeling_vitdet", "VitDetLayer", "attention"),
    )
}
_REGISTERED: dict[type[nn.Module], tuple[str, ...]] = {}


def register_windows(cls: ClassT, *parts: str) -> ClassT:
    """Register a layer that cuts each record into windows, and hands them to parts of it as further rows.

    The layer takes ``[B, ...]``, and its parts take ``[B K, ...]``: the K windows of the first record, then those of
    the second. K may differ between calls. Mode "bk" needs to know such a layer.

    Args:
        cls: the class of the layer. Its first tensor has the records as first dimension.
        parts: names of the submodules that get the windows in their first tensor, such as ``"attention"``.

    Returns:
        ``cls``.

    Raises:
        TypeError: If ``cls`` is not a module class.
        ValueError: If no part is named.

    Guarantees:
        If the windows stand in another order, the first batch is refused, because a record's gradient is then not the
        one that it gets alone.
    """
    require_module_class(cls)
    if not parts:
        raise ValueError(f"name the parts of {cls.__name__} that get windows: register_windows(cls, 'attention')")
    _REGISTERED[cls] = parts
    return cls


def _parts_of(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the parts that get windows, each after the layer that hands the windows to it."""
    found = []
    for module in model.modules():
        cls = written_type(module)
        for name in _REGISTERED.get(cls) or _PARTS.get((cls.__module__, cls.__qualname__), ()):
            try:
                found.append((module, module.get_submodule(name)))
            except AttributeError:
                raise ValueError(
                    f"{cls.__name__} has no part {name}, which was registered to get its windows: name a submodule in "
                    "register_windows"
                ) from None
    return found


class Windows:
    """Tells in which part of a layer the rows are windows, while that part runs.

    Args:
        model: the model.
        note: called with the tensors that such a part gets.
    """

    def __init__(self, model: nn.Module, note: Callable[[Iterable[Tensor]], None]) -> None:
        self._note = note
        self._parts = _parts_of(model)
        self._layer = {id(part): id(layer) for layer, part in self._parts}
        self._layers = set(self._layer.values())
        self._records: dict[int, int] = {}
        self._running: list[tuple[int, Fold]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Windows:
        return self  # a copy of the model has the hooks, too, and they know none of its modules

    def __reduce__(self) -> tuple[Any, ...]:
        return inert, ()

    def attach(self) -> list[RemovableHandle]:
        """Add the hooks to the layers and their parts."""
        handles: list[RemovableHandle] = []
        for layer, part in self._parts:
            handles.append(layer.register_forward_pre_hook(self._start, with_kwargs=True))
            handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(part.register_forward_hook(self._end, always_call=True))
        return handles

    def forget(self) -> None:
        """Forget what an interrupted forward pass has left."""
        self._running.clear()

    @property
    def now(self) -> Fold | None:
        """The records and windows of the part that runs now; None outside of all of them."""
        return self._running[-1][1] if self._running else None

    def rows_of_a_record(self) -> int:
        """Return how many rows a record has here: K inside of windows, and 1 elsewhere."""
        return self._running[-1][1].rows if self._running else 1

    def _start(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Kept after the call, because a recomputation may run the part without its layer.
        if id(layer) in self._layers:
            self._records[id(layer)] = len(tensors_in((args, kwargs))[0])

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        records = self._records.get(self._layer.get(id(part), 0))
        if records is None:
            return
        given = tensors_in((args, kwargs))
        if not records or len(given[0]) % records:
            raise ValueError(
                f"{type(part).__name__} gets {len(given[0])} windows of {records} records, so it is not clear which "
                "record they are of. Give it as many windows of each record, or freeze its parameters"
            )
        self._note(given)
        self._running.append((id(part), Fold(records, len(given[0]) // records, windows=True)))

    def _end(self, part: nn.Module, _args: Any, _output: Any) -> None:
        if any(running == id(part) for running, _ in self._running):
            while self._running.pop()[0] != id(part):
                pass
