"""Rows of text in columns."""


def aligned(head: list[str], rows: list[list[str]]) -> str:
    """Numbers to the right, words to the left, two spaces between."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    right = [bool(rows) and all(row[column][:1].isdigit() for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) if number else cell.ljust(width)
                               for cell, width, number in zip(row, widths, right, strict=True)).rstrip()
                     for row in table)
