"""Attributes that a part of an object keeps."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Of(Generic[T]):
    """An attribute that reads and writes the attribute of a part.

    Args:
        part: the name of the part.
        name: the attribute's name there; None for the same.
    """

    def __init__(self, part: str, name: str | None = None) -> None:
        self._part, self._given = part, name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = self._given or name

    @overload
    def __get__(self, instance: None, owner: type) -> Of[T]: ...

    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(getattr(instance, self._part), self._name)

    def __set__(self, instance: Any, value: T) -> None:
        setattr(getattr(instance, self._part), self._name, value)
