"""An `nn.ModuleList` whose element type a type checker knows; torch's own gives plain modules.

While the program runs, `ModuleListOf` is `nn.ModuleList` itself: the same key names, the same behaviour when compiled.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import nn

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleListOf(nn.ModuleList, Generic[M]):
        def __init__(self, modules: Iterable[M] | None = None) -> None: ...

        @overload
        def __getitem__(self, idx: slice) -> "ModuleListOf[M]": ...

        @overload
        def __getitem__(self, idx: int) -> M: ...

        def __getitem__(self, idx: int | slice) -> Any: ...

        def __iter__(self) -> Iterator[M]: ...

else:
    ModuleListOf = nn.ModuleList
