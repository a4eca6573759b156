# SPDX-License-Identifier: MIT
"""The targets without parameters: ``zero`` and ``error``. Neither reports a status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from dmlib.targets._base import Target, Words, check_extra

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, init=False)
class _Simple(Target):
    extra: tuple[str, ...] = ()

    def __init__(self, *, extra: Iterable[str] = ()) -> None:
        object.__setattr__(self, "extra", check_extra(extra))

    def _to_words(self) -> Iterable[object]:
        return self.extra

    @classmethod
    def _from_words(cls, words: Words) -> Self:
        return cls(extra=words.rest())


class Zero(_Simple):
    """
    Read as zeros; writes vanish.

    Args:
        extra: Words that dmlib does not know; for tables read from elsewhere.

    Source: kernel admin-guide, zero.
    """

    __slots__ = ()
    type_name: ClassVar[str] = "zero"


class Error(_Simple):
    """
    Fail every read and write with an I/O error.

    Args:
        extra: Words that dmlib does not know; for tables read from elsewhere. (Newer kernels take a device and an
            offset here, whose limits the target then shows.)

    Source: kernel source, dm-target.c.
    """

    __slots__ = ()
    type_name: ClassVar[str] = "error"
