"""Formats rows of text as a table with aligned columns."""


def aligned(head: list[str], rows: list[list[str]]) -> str:
    """Return a table as text: columns of numbers are aligned right, other columns left, with two spaces between."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    right = [bool(rows) and all(row[column][:1].isdigit() for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) if number else cell.ljust(width)
                               for cell, width, number in zip(row, widths, right, strict=True)).rstrip()
                     for row in table)
