"""Random draws of a batch, taken apart: what a record draws depends on that record, the moment and a key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opacus_ac._bytes import raw_bytes

_IN_PLACE = frozenset(
    ("bernoulli_", "uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_")
)
_NEW = frozenset(
    (
        *("native_dropout", "bernoulli", "rand_like", "randn_like", "randint_like", "normal", "poisson"),
        *("multinomial", "rrelu_with_noise", "_fused_dropout", "rand", "randn", "randint", "exponential"),
    )
)
"""Operations that may be taken apart into those of single records, where the records come first."""

_key: tuple[int, bytes] = (0, b"")


def process_key() -> bytes:
    """Return 64 secret bytes of this process; a forked one has its own."""
    global _key
    if _key[0] != os.getpid():
        _key = (os.getpid(), os.urandom(64))
    return _key[1]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors with at least one dimension in arguments, in their order."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def record_digests(tensors: list[Tensor], key: bytes | None = None) -> list[bytes]:
    """Return a digest of each record: of its rows in all tensors that have as many rows as the first.

    Args:
        tensors: inputs, ``[B, ...]`` each.
        key: of the digest; that of the process without one.

    >>> one, two, other = record_digests([torch.tensor([[1, 2], [1, 2], [3, 4]])])
    >>> one == two, one == other
    (True, False)
    """
    if not tensors:
        return []
    records = tensors[0].shape[0]
    found = [hashlib.blake2b(key=key or process_key(), digest_size=32) for _ in range(records)]
    for tensor in tensors:
        if tensor.shape[0] != records or not tensor.numel() or tensor.layout != torch.strided:
            continue
        for digest, row in zip(found, raw_bytes(tensor).reshape(records, -1), strict=True):
            digest.update(row.data)
    return [digest.digest() for digest in found]


class RecordMasks(TorchDispatchMode):
    """While active, draws what is random for each record from a generator that is seeded by the record.

    Args:
        tensors: the inputs of the model, of which the first one tells the number of records.
        moment: number of the step and of the forward pass within it.
        digests: those of the records, where they are known.
        key: what the draws depend on; that of the process without one.

    Attributes:
        used: whether anything was drawn.
        joint: whether anything was drawn for all records together, from the secret state. That happens to tensors whose
            first dimension is not the records, to what a kernel draws by itself, and inside a checkpointed part of the
            model (it is computed again in the backward pass, from the secret state that was kept for it).
    """

    def __init__(
        self,
        tensors: list[Tensor],
        moment: tuple[int, int],
        digests: list[bytes] | None = None,
        key: bytes | None = None,
    ) -> None:
        super().__init__()
        self._tensors, self._moment, self._key = tensors, moment, key
        self._records = len(digests) if digests is not None else tensors[0].shape[0] if tensors else 0
        self._digests = digests
        self._calls = 0
        self.used = self.joint = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func):
            return func(*args, **kwargs)
        return self._draw(func, args, kwargs)

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls += 1
        name = func.overloadpacket.__name__
        rows = _rows_of(args)
        device = _device_of(args, kwargs)
        apart = (
            (name in _IN_PLACE or name in _NEW)
            and self._records > 0
            and rows is not None
            and rows > 0
            and rows % self._records == 0
            and kwargs.get("generator") is None
            and device.type in ("cpu", "cuda")
            and not _is_recomputed()
        )
        if not apart:
            # Many kernels are able to draw and were not asked to: what they leave of the state tells.
            before = _generator(device).get_state() if device.type in ("cpu", "cuda") else None
            result = func(*args, **kwargs)
            if before is None or not torch.equal(before, _generator(device).get_state()):
                self.used = self.joint = True
            return result
        self.used = True
        assert rows is not None
        return self._by_record(func, args, kwargs, name in _IN_PLACE, rows, device)

    def _by_record(self, func: Any, args: Any, kwargs: Any, in_place: bool, rows: int, device: torch.device) -> Any:
        generator, each = _generator(device), rows // self._records
        before = generator.get_state()
        own = _cut(args, each, rows, self._records)
        kept = {name: _cut((value,), each, rows, self._records)[0] for name, value in kwargs.items()}
        parts = []
        try:
            for record, seed in enumerate(self._seeds()):
                generator.manual_seed(seed)
                parts.append(func(*(a[record] for a in own), **{name: value[record] for name, value in kept.items()}))
        finally:
            generator.set_state(before)
        if in_place:
            return args[0]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def of(self, first: int, count: int) -> RecordMasks:
        """Return what draws for some of the records alone what this one drew for them in the batch."""
        return RecordMasks([], self._moment, self._known()[first : first + count], self._key)

    def _known(self) -> list[bytes]:
        if self._digests is None:
            self._digests = record_digests(self._tensors, self._key)
        return self._digests

    def _seeds(self) -> Iterator[int]:
        """Yield a seed per record, which depends on its content and the number of the call."""
        key = self._key or process_key()
        moment = repr((*self._moment, self._calls)).encode()
        for digest in self._known():
            seed = hashlib.blake2b(digest + moment, key=key, digest_size=8).digest()
            yield int.from_bytes(seed, "little", signed=True)


_RANDOM: dict[Any, bool] = {}


def _is_random(func: Any) -> bool:
    known = _RANDOM.get(func)
    if known is None:
        tagged = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
        known = _RANDOM[func] = tagged or name in _IN_PLACE
    return known


def _is_recomputed() -> bool:
    """Whether the code that runs now is checkpointed, with or without re-entry.

    Then it may run again in the backward pass, where no mode is active.
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _rows_of(args: tuple[Any, ...]) -> int | None:
    """Return the first dimension of what is drawn; None where it has none."""
    if args and isinstance(args[0], Tensor):
        plain = type(args[0]) in (Tensor, nn.Parameter)
        return args[0].shape[0] if plain and args[0].dim() else None
    sizes = [a for a in args if isinstance(a, list | tuple)]
    return int(sizes[0][0]) if sizes and len(sizes[0]) else None


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    if args and isinstance(args[0], Tensor):
        return args[0].device
    device = kwargs.get("device")
    return torch.device("cpu") if device is None else torch.device(device)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


def _cut(args: tuple[Any, ...], each: int, rows: int, records: int) -> list[Any]:
    """Return each argument as it is for each record.

    A tensor of ``rows`` rows is split into parts of ``each`` rows; a size gets another first number.
    """
    sized = not (args and isinstance(args[0], Tensor))
    found: list[Any] = []
    for value in args:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
            found.append(value.split(each))
        elif sized and isinstance(value, list | tuple):
            found.append([[each, *value[1:]]] * records)
            sized = False
        else:
            found.append([value] * records)
    return found
