"""Tables as text, as `explain`, `summary` and `merge_report` print them."""

from collections.abc import Collection, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """The header, a rule and the rows, with columns as wide as they need to be; those in `right` are numbers.

    >>> print(table(("leaf", "trains"), [("kernel", "256")], right={1}))
    leaf    trains
    --------------
    kernel     256
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    first = line(header)
    return "\n".join([first, "-" * len(first), *map(line, rows)])
