"""The widget that shows controls: native inputs with names for screen readers and keyboards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from lora_theory.explorer.controls import Control

__all__ = ["Panel"]

_HERE = Path(__file__).parent


class Panel(anywidget.AnyWidget):
    """Controls and their values as text; a change on either side reaches the other.

    Args:
        controls: what is shown. titles: of their groups; a group without one has no frame.
        values: of all controls.
        changed: called with all values after each change by the user.

    Example:
        >>> from lora_theory.explorer.controls import CONTROLS
        >>> panel = Panel(CONTROLS[:1], {}, {"tokens": "2"}, print)
        >>> panel.values = {"tokens": "3"}  # as the page does
        {'tokens': '3'}
    """

    _esm = _HERE / "panel.js"
    _css = _HERE / "panel.css"
    controls: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    titles = traitlets.Dict().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    #: What is wrong with a value, beside its control: {"name": …, "text": …}, or empty.
    fault = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        controls: Sequence[Control],
        titles: Mapping[str, str],
        values: Mapping[str, str],
        changed: Callable[[dict[str, str]], None],
    ) -> None:
        plain = [control.to_dict() for control in controls]
        super().__init__(controls=plain, titles=dict(titles), values=dict(values), fault={})
        self.observe(lambda change: changed(change["new"]), names="values")
