"""What every pipeline is: components (`Composite`), places and precision (`Placed`), a progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kandinsky22.errors import InputError
from kandinsky22.models.feature_cache import CachesFeatures
from kandinsky22.pipelines.composite import Composite
from kandinsky22.runtime.compile import Compiles
from kandinsky22.runtime.placement import Placed
from kandinsky22.runtime.quantize import Quantizes


class DiffusionPipeline(Composite, Placed, CachesFeatures, Compiles, Quantizes):
    """Base of all pipelines; `DiffusionPipeline.from_pretrained` gives the one that a checkpoint names."""

    def __init__(self) -> None:
        super().__init__()
        self._progress_bar_config: dict[str, Any] = {}

    def _settings_of(self, other: Composite, prefix: str) -> None:
        super()._settings_of(other, prefix)
        if isinstance(other, DiffusionPipeline):
            self._progress_bar_config = dict(other._progress_bar_config)
            self._feature_caching = other._feature_caching

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for all progress bars; without `disable`, bars show when standard error is a terminal."""
        self._progress_bar_config = options

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar around `iterable`, or one of `total` steps that is advanced by hand."""
        from tqdm.auto import tqdm

        if (iterable is None) == (total is None):
            raise InputError("progress_bar: pass either an iterable or total=")
        return tqdm(iterable, total=total, **{"disable": None, **self._progress_bar_config})

    def __repr__(self) -> str:
        parts = [f"  {name}: {type(component).__name__}" for name, component in self.components.items()]
        origin = f" from {self.origin}" if self.origin else ""
        return "\n".join([f"{type(self).__name__}{origin}", *parts])
