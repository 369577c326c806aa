"""The terminal of ``bgtasks top``. It only draws: every question to a process is asked in another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final

from bgtasks.errors import WatchError, missing_extra
from bgtasks.watch._top_poll import Look, Lost, Poller, Question
from bgtasks.watch._top_tables import KEPT, SPARKS, TABLES, Column, Figures, Row, bars
from bgtasks.watch._viewer import ask_all, asked_to_end, clean, numbered_tasks

try:
    from rich.text import Text
    from textual.app import App, ComposeResult
    from textual.binding import Binding, BindingType
    from textual.message import Message
    from textual.widgets import DataTable, Footer, Input, Static, TabbedContent, TabPane
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("textual", "rich"):
        raise
    raise missing_extra("top", "textual", "run bgtasks top") from error

# Below the check for the extra, which it needs, too.
from bgtasks.watch import _top_screens as screens

__all__ = ["Top"]

# From this width on, in characters, all columns are shown.
WIDE: Final = 120
# And from this width on, all rates that are kept.
WIDEST: Final = 180
# More rows would be drawn slowly, and nobody reads them.
MOST_ROWS: Final = 300
# Seconds.
BETWEEN_DRAWS: Final = 0.2


class Found(Message):
    """What a thread found out."""

    def __init__(self, handle: Callable[[], object]) -> None:
        super().__init__()
        self.handle = handle


class Top(App[None]):
    """The terminal.

    Args:
        pid: the process to show; None for all watched processes of the user.
        interval: seconds between two looks.

    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
        #summary { height: 1; background: $primary; color: $text; padding: 0 1; }
        #filter { display: none; height: 1; border: none; padding: 0 1; }
        TabbedContent { height: 1fr; }
        TabPane { padding: 0; }
        DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        # With priority: otherwise the next keys, if they come at once, would reach the table before the entry is open.
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("s", "sort", "Sort"),
        Binding("p", "pause", "Pause"),
        Binding("C", "cancel", "CANCEL"),
        Binding("A", "cancel_name", "CANCEL NAME"),
        Binding("escape", "clear", "Clear the filter", show=False),
        *(
            Binding(str(number), f"table('{name}')", table.title, show=False)
            for number, (name, table) in enumerate(TABLES.items(), 1)
        ),
    ]

    def __init__(self, pid: int | None, interval: float) -> None:
        super().__init__()
        # Over ssh, a line that slides is many writes.
        self.animation_level = "none"
        self._poller = Poller(pid, interval, self._deliver)
        self._figures = Figures()
        self._filter = ""
        self._orders = {name: table.first for name, table in TABLES.items()}
        self._rows: dict[str, Row] = {}
        self._is_paused = False
        self._is_stale = False
        # The columns that a table has now.
        self._shown: dict[str, list[str]] = {}

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        yield Static(id="summary")
        with TabbedContent(id="tabs"):
            for number, (name, table) in enumerate(TABLES.items(), 1):
                with TabPane(f"{number} {table.title}", id=name):
                    yield DataTable[Text](id=f"table-{name}", cursor_type="row")
        yield Input(placeholder="a part of the name; Enter keeps it, Esc clears it", id="filter")
        yield Footer()

    def on_mount(self) -> None:
        """Start to ask."""
        self._table().focus()
        self._draw()
        self._poller.start()
        self.set_interval(BETWEEN_DRAWS, self._draw_if_stale)

    def on_unmount(self) -> None:
        """Stop asking."""
        self._poller.stop()

    # -- what the threads find out --------------------------------------------------------------------------------

    def _deliver(self, found: Look | Lost) -> None:
        """Pass on what a process answered; runs in its thread."""
        self.post_message(Found(lambda: self._take(found)))

    def on_found(self, message: Found) -> None:
        """Use what a thread found out."""
        message.handle()

    def _take(self, found: Look | Lost) -> None:
        if isinstance(found, Look):
            self._figures.add(found)
        elif found.error is None:
            self._figures.remove(found.pid)
        else:
            self._figures.miss(found.pid, found.error)
        self._is_stale = True

    def _ask(self, then: Callable[[list[dict[str, Any]]], object], pid: int | None, do: str, **request: Any) -> None:
        """Ask in a thread, and call ``then`` with the answers here."""

        def run() -> None:
            try:
                answers, errors = ask_all(pid, do, **request)
            except WatchError as error:
                answers, errors = [], [str(error)]
            self.post_message(Found(lambda: self._use(then, answers, errors)))

        threading.Thread(target=run, name="bgtasks-top-ask", daemon=True).start()

    def _use(
        self, then: Callable[[list[dict[str, Any]]], object], answers: list[dict[str, Any]], errors: Iterable[str]
    ) -> None:
        for error in errors:
            self.notify(clean(error), severity="error", markup=False)
        if answers:
            then(answers)

    # -- drawing --------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> str:
        """The name of the table that is shown."""
        return self.query_one("#tabs", TabbedContent).active or "tasks"

    def _table(self) -> DataTable[Text]:
        return self.query_one(f"#table-{self._current}", DataTable)

    def _columns(self) -> list[tuple[int, Column]]:
        is_wide = self.size.width >= WIDE
        columns = TABLES[self._current].columns
        return [(index, column) for index, column in enumerate(columns) if is_wide or not column.is_wide]

    def _draw_if_stale(self) -> None:
        """Draw what the processes answered since the last time, together."""
        if self._is_stale and not self._is_paused:
            self._draw()

    def _draw(self) -> None:
        """Draw the summary and the table that is shown; the cursor stays on its row."""
        self._is_stale = False
        state = "".join((f" · filter: {clean(self._filter)}" * bool(self._filter), " · paused" * self._is_paused))
        summary = self.screen_stack[0].query_one("#summary", Static)
        summary.update(Text(self._figures.summary() + state, no_wrap=True, overflow="ellipsis"))
        name = self._current
        order = self._orders[name]
        table = self._table()
        columns = self._columns()
        titles = [column.title + " ▾" * (index == order) for index, column in columns]
        if self._shown.get(name) != titles:
            table.clear(columns=True)
            for (_, column), title in zip(columns, titles, strict=True):
                table.add_column(Text(title, justify="right" if column.is_number else "left"))
            self._shown[name] = titles
        sparks = KEPT if self.size.width >= WIDEST else SPARKS
        rows = self._figures.rows(name, self._filter, order, sparks)[:MOST_ROWS]
        self._fill(table, rows, [column for _, column in columns])

    def _fill(self, table: DataTable[Text], rows: list[Row], columns: list[Column]) -> None:
        selected, index, top = self._selected_key(), table.cursor_row, table.scroll_y
        table.clear()
        self._rows = {row["key"]: row for row in rows}
        for key, row in self._rows.items():
            cells = (Text(column.text(row), justify="right" if column.is_number else "left") for column in columns)
            table.add_row(*cells, key=key)
        # Where the task has ended, the cursor stays in its place.
        index = table.get_row_index(selected) if selected in self._rows else min(index, len(rows) - 1)
        table.move_cursor(row=max(index, 0), scroll=False)
        table.scroll_to(y=top, animate=False)

    def _selected_key(self) -> str:
        table = self._table()
        if not table.is_valid_row_index(table.cursor_row):
            return ""
        return str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)

    def on_resize(self) -> None:
        """Show more columns, or fewer."""
        self._draw()

    def on_tabbed_content_tab_activated(self) -> None:
        """Show the figures of another table; its keys are read, unless a filter is being typed."""
        if not self.query_one("#filter", Input).display:
            self.screen.set_focus(self._table())
        self._draw()

    # -- keys -----------------------------------------------------------------------------------------------------

    def action_table(self, name: str) -> None:
        """Show another table."""
        self.query_one("#tabs", TabbedContent).active = name

    def action_sort(self) -> None:
        """Sort by the next column that can be sorted by."""
        orders = TABLES[self._current].orders
        now = self._orders[self._current]
        self._orders[self._current] = orders[(orders.index(now) + 1) % len(orders)]
        self._ask_for_tasks()
        self._draw()

    def action_pause(self) -> None:
        """Keep what is shown, or go on."""
        self._is_paused = not self._is_paused
        self._draw()

    def action_filter(self) -> None:
        """Let the user enter a part of the name; while it is entered, a slash is a part of it."""
        entry = self.query_one("#filter", Input)
        if entry.has_focus:
            entry.insert_text_at_cursor("/")
            return
        entry.display = True
        # Not entry.focus(), which takes effect later: the next keys may have been typed already.
        self.screen.set_focus(entry)

    def action_clear(self) -> None:
        """Remove the filter."""
        self.query_one("#filter", Input).value = ""
        self._close_filter()

    def on_input_changed(self) -> None:
        """Filter while the user types."""
        self._use_filter()

    def on_input_submitted(self) -> None:
        """Keep the filter."""
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).display = False
        self.screen.set_focus(self._table())
        # The keys before this one may not have been reported yet.
        self._use_filter()

    def _use_filter(self) -> None:
        text = self.query_one("#filter", Input).value
        if text != self._filter:
            self._filter = text
            self._ask_for_tasks()
            self._is_stale = True

    def _ask_for_tasks(self) -> None:
        """Have the processes filter and sort: they have more tasks than they send."""
        sort = TABLES["tasks"].columns[self._orders["tasks"]].sort or "age"
        self._poller.change(Question(self._filter or None, sort))

    # -- one row --------------------------------------------------------------------------------------------------

    def on_data_table_row_selected(self) -> None:
        """Show the stack of a task, or the histogram of a name."""
        row = self._rows.get(self._selected_key())
        if row is None:
            return
        if self._current == "tasks":
            self._ask(lambda answers: self._show_stack(row, answers), row["pid"], "stack", id=row["id"])
        elif self._current == "names":
            self._ask(lambda answers: self._show_histogram(row, answers), row["pid"], "histograms", name=row["name"])
        elif self._current == "loops" and row["last_block"]:
            stack = [clean(line) for line in row["last_block"]["stack"]]
            self.push_screen(screens.Details(f"{row['pid']}: last blocked by {clean(row['blocker'])}, at", stack))

    def _show_stack(self, row: Row, answers: list[dict[str, Any]]) -> None:
        title = f"{row['id']} {clean(row['name'])}: the outermost frame first"
        self.push_screen(screens.Details(title, [clean(line) for line in answers[0]["stack"]]))

    def _show_histogram(self, row: Row, answers: list[dict[str, Any]]) -> None:
        width = min(max(self.size.width - 36, 10), 100)
        lines = []
        for histograms in answers[0]["histograms"]:
            for kind, title in (("duration", "from start to end"), ("wait", "from creation to the first step")):
                lines += [title, *bars(histograms[kind], width), ""]
        self.push_screen(screens.Details(f"{row['pid']}: {clean(row['name'])}", lines[:-1]))

    def action_cancel(self) -> None:
        """Ask whether to cancel a task, or all tasks of a name in a process."""
        row = self._rows.get(self._selected_key())
        if row is not None and self._current == "tasks":
            self._confirm(f"task {row['id']} {clean(row['name'])}", row["pid"], id=row["id"])
        elif row is not None and self._current == "names":
            self._confirm(f"named {clean(row['name'])} of process {row['pid']}", row["pid"], name=row["name"])

    def action_cancel_name(self) -> None:
        """Ask whether to cancel all tasks of a name, in all processes."""
        row = self._rows.get(self._selected_key())
        if row is not None and self._current in ("tasks", "names"):
            self._confirm(f"named {clean(row['name'])} of all processes", None, name=row["name"])

    def _confirm(self, what: str, pid: int | None, **request: Any) -> None:
        def ask(answers: list[dict[str, Any]]) -> None:
            count = sum(answer["matching"] for answer in answers)
            if not count:
                self.notify(f"{what}: no live task", severity="warning", markup=False)
                return
            question = f"Cancel {what}?" if "id" in request else f"Cancel {numbered_tasks(count)} {what}?"
            self.push_screen(screens.Question(question), cancel)

        def cancel(is_confirmed: bool | None) -> None:
            if is_confirmed:
                self._ask(tell, pid, "cancel", **request, confirmed=True)

        def tell(answers: list[dict[str, Any]]) -> None:
            self.notify(asked_to_end(answers), markup=False)

        self._ask(ask, pid, "cancel", **request)
