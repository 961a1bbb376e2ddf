"""Tables, as commands print them."""

from rich.table import Table
from rich.text import Text


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Return a rich table."""
    made = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def pairs(title: str, rows: list[list[str]]) -> Table:
    """Return a table of names and values, without a header."""
    made = table(title, ["", ""], rows)
    made.show_header = False
    return made
