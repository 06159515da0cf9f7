"""CSV files in and out, read and written by pandas, every cell as the text it is.

pandas is imported at the first table: it takes half a second, and most commands read and write none.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

MAX_COMMAS = 50_000  # of a file; pandas takes 0.07 ms for every column of a first line that is nothing else
_PREFIX = "Error tokenizing data. C error: "


def parse(text: str) -> pandas.DataFrame:
    """A row per line that is not blank, the header included, columns numbered; short rows end in empty cells. Nothing is guessed:
    `NA`, `1e5` and `007` stay what they are, and columns of one name stay apart. Raises ValueError where a row is longer than the
    first, a quote is not closed, or there are too many commas."""
    import pandas

    if text.count(",") > MAX_COMMAS:
        raise ValueError(f"it has more than {MAX_COMMAS:,} commas")
    try:
        return pandas.read_csv(io.StringIO(text), header=None, index_col=False, dtype=str, keep_default_na=False, na_filter=False)
    except pandas.errors.EmptyDataError:
        return pandas.DataFrame()
    except pandas.errors.ParserError as error:
        raise ValueError(str(error).removeprefix(_PREFIX).strip()) from None


def write(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """The text of a table; None is an empty cell, everything else is written as `str` says it."""
    import pandas

    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return pandas.DataFrame(cells, columns=list(header), dtype=object).to_csv(index=False, lineterminator="\n")
