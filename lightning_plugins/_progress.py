"""The bar of work that takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_plugins._processes import rank


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    title: str,
    total: int | None = None,
    show: bool | None = None,
    delay: float = 3.0,
) -> tqdm:
    """Return ``items`` behind a bar, or with ``total`` a bar to call ``update()`` on and to close.

    Args:
        items: to go through.
        title: of the bar.
        total: number of updates, where it does not follow from ``items``.
        show: None shows it on a terminal once it has taken ``delay`` seconds, and leaves log files alone; True shows it
            at once and everywhere, False never. Of several processes only the first shows one.
        delay: in seconds.
    """
    # While Lightning's own bar is on the screen, rich catches what is written and makes a line of each refresh. Written
    # past it, this bar stands in the place of that one's last line until that one is drawn again.
    file = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    disable = None if show is None else not show
    if rank():
        disable = True
    if items is not None:
        total = _length(items) if total is None else total
        items = iter(items)  # tqdm would ask loaders for a length that they do not have
    return tqdm(
        items,
        desc=title,
        total=total,
        file=file,
        disable=disable,
        delay=0 if show else delay,
        leave=False,
        miniters=0,  # so that update(0) draws it again
    )


def _length(items: Any) -> int | None:
    try:
        return len(items)
    except (TypeError, NotImplementedError):
        return None
