"""The screens that ``bgtasks top`` shows above its tables: a text to read, and a question."""

from __future__ import annotations

from typing import ClassVar, Final, cast

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

__all__ = ["Details", "Question"]

STYLE: Final = """
    align: center middle;
    & > * { border: round $primary; background: $surface; padding: 0 1; height: auto; max-height: 90%; }
    .keys { color: $text-muted; }
"""


class Details(ModalScreen[None]):
    """A text to read: the stack of a task, the histogram of a name."""

    DEFAULT_CSS = f"Details {{ {STYLE} & > VerticalScroll {{ width: 96%; }} }}"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "Close")]

    def __init__(self, title: str, lines: list[str]) -> None:
        super().__init__()
        self._title = title
        self._lines = lines

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        with VerticalScroll() as box:
            # A Text, because a string would be markup; the types of Textual do not say that it may be one.
            box.border_title = cast("str", Text(self._title))
            box.border_subtitle = "Esc: back"
            yield Static(Text("\n".join(self._lines)))


class Question(ModalScreen[bool]):
    """Asks before something is destroyed; only a capital Y says yes."""

    DEFAULT_CSS = f"Question {{ {STYLE} & > Vertical {{ width: 70; border: round $error; }} }}"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("Y", "yes", "Yes"), Binding("n,N,y,escape,enter,q", "no", "No")]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        with Vertical() as box:
            box.border_title = "Cancel"
            yield Static(Text(self._question))
            yield Static(Text("Y (capital): yes   n or Esc: no"), classes="keys")

    def action_yes(self) -> None:
        """Do it."""
        self.dismiss(True)

    def action_no(self) -> None:
        """Do nothing."""
        self.dismiss(False)
