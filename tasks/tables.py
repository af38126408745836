"""Tables: the bytes of a CSV or JSONL file → text → records, each with the line on which it starts.

Rows are counted as an editor counts lines: the header is line 1, and a record's row is the line on which it starts,
however many lines its quoted cells span. What the columns mean is not known here: tasks/manifest.py says it.

ManifestError   the file as a whole cannot be used
RowProblem      one record, or one column's name, is wrong; the other records are still read
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_BYTES = 64 * 2**20
MAX_ROWS = 100_000
MAX_COLUMNS = 1_000
MAX_CELL_CHARS = 10_000

CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,20}(?:\.0*)?", re.ASCII)  # spreadsheets and pandas write 50 as 50.0
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SIGNATURES = {
    b"PK\x03\x04": "an XLSX workbook or a ZIP archive: export it as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: export it as CSV (UTF-8)",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PAR1": "a Parquet file: export it as CSV",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


class ManifestError(Exception):
    """The manifest as a whole cannot be used; the message says what it looks like and what was expected.

    `line` is where that shows.
    """

    def __init__(self, message: str, *, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class RowProblem:
    """One thing that is wrong with one record, or with one column's name.

    Attributes:
        row: Line of the file on which the record starts; the header is line 1.
        column: The cell's column; None when it concerns the record as a whole.
        came: The cell as it came; None when there is no one cell.
        message: What was expected, as the end of a sentence.
        columns: The record's cells as they came; empty when they could not be told apart.
        clip_id: The clip's id, given or derived; None when the cells could not be told apart.
    """

    row: int
    column: str | None
    came: str | None
    message: str
    columns: dict[str, str] = field(default_factory=dict)
    clip_id: str | None = None

    def __str__(self) -> str:
        place = f"line {self.row}" + (f", column {self.column}" if self.column else "")
        return f"{place}: " + (f"came {shortened(self.came)!r}, " if self.came is not None else "") + self.message


class Finding(NamedTuple):
    """A RowProblem before it is known to which record it belongs."""

    column: str | None
    came: str | None
    message: str


class Record(NamedTuple):
    row: int
    cells: dict[str, str]
    findings: tuple[Finding, ...] = ()


class Table(NamedTuple):
    columns: dict[str, int]  # name → the line on which it is first named
    records: list[Record]


def read_table(data: bytes, known_names: Iterable[str], check_columns: Callable[[Sequence[str]], None]) -> Table:
    """Read the bytes of a CSV file with a header, or of JSONL with one object on each line.

    Args:
        data: The file, at most MAX_BYTES.
        known_names: Names by which a header is recognised, whatever its delimiter.
        check_columns: Asked once the columns are known, before anything is said about the rows; raises ManifestError.

    Raises:
        ManifestError: If the file as a whole cannot be used.
    """
    text = _decode(data)
    if text.lstrip().startswith("{"):
        return _read_jsonl(text, check_columns)
    return _read_csv(text, known_names, check_columns)


def parsed(text: str, kind: str) -> Any:
    """The cell's value, or None where it cannot be read as one of its kind."""
    if kind == "string":
        return text
    if kind == "boolean":
        return _BOOLEANS.get(text.lower())
    if kind == "integer":
        return int(text.partition(".")[0]) if _WHOLE_NUMBER.fullmatch(text) else None
    return float(text) if _NUMBER.fullmatch(text) else None


def normalised(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def shortened(text: str, length: int = 60) -> str:
    """`text` cut to a length that fits a message."""
    return text if len(text) <= length else text[: length - 1] + "…"


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{shortened(name)}`" for name in names)


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise ManifestError(f"has {len(data):,} bytes, expected at most {MAX_BYTES:,}")
    for signature, looks_like in _SIGNATURES.items():
        if data.startswith(signature):
            raise ManifestError(f"is not a CSV or JSONL file, it looks like {looks_like}")
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ManifestError("looks like a web page or XML, expected CSV or JSONL: is the link one to the file itself?")
    if data.count(0) * 10 > len(data):
        raise ManifestError("looks like a binary file or UTF-16 text, expected CSV or JSONL in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8", line=line
        ) from error
    if not text.strip():
        raise ManifestError("is empty, expected a header with at least the columns `reference` and `pose`")
    if text.lstrip().startswith("["):
        raise ManifestError("looks like a JSON array, expected JSONL: one object on each line, no brackets around them")
    return text


def _lines(text: str) -> Iterator[str]:
    return io.StringIO(text, newline="")


def _read_csv(text: str, known_names: Iterable[str], check_columns: Callable[[Sequence[str]], None]) -> Table:
    try:
        reader = csv.reader(_lines(text), delimiter=_delimiter(text, known_names), strict=True)
        names = next((cells for cells in reader if _is_filled(cells)), [])
    except csv.Error as error:
        raise ManifestError(f"the header is not CSV: {error}", line=max(1, reader.line_num)) from error
    header_row = max(1, reader.line_num)
    _check_header(names, check_columns, header_row)
    records: list[Record] = []
    while True:
        row = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            message = _csv_message(error, row, reader.line_num)
            records.append(Record(row, {}, (Finding(None, None, message),)))
            continue
        if _is_filled(cells):
            records.append(_csv_record(row, cells, names))
        _check_count(records)
    if not records:
        raise ManifestError("has a header and no rows", line=header_row)
    return Table(dict.fromkeys(names, header_row), records)


def _delimiter(text: str, known_names: Iterable[str]) -> str:
    """The header decides: the first of comma, semicolon and tab that parts it into names of which we know one."""
    header = next(line for line in _lines(text) if line.strip())
    known = {normalised(name) for name in known_names}
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter))
        if len(names) > 1 and any(normalised(name) in known for name in names):
            return delimiter
    return ","


def _csv_record(row: int, cells: Sequence[str], names: Sequence[str]) -> Record:
    by_name = dict(zip(names, (*cells, *[""] * len(names)), strict=False))
    if len(cells) == len(names):
        return Record(row, by_name)
    message = f"has {len(cells)} cells, expected {len(names)} as in the header"
    if len(cells) > len(names):
        message += f"; the last is {shortened(cells[-1])!r}: quote a cell that holds the separator"
        if any(cell.lstrip().startswith('"') for cell in cells):
            message += ", with no space before the quote"
    return Record(row, by_name, (Finding(None, None, message),))


def _csv_message(error: csv.Error, row: int, last_row: int) -> str:
    if "field limit" in str(error):
        return f"has a cell of more than {MAX_CELL_CHARS:,} characters, or a quote that is never closed"
    lines = f" (lines {row} to {last_row})" if last_row > row else ""
    return f"its quotes are not balanced{lines}: a quote inside a quoted cell is written twice"


def _is_filled(cells: Iterable[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _read_jsonl(text: str, check_columns: Callable[[Sequence[str]], None]) -> Table:
    columns: dict[str, int] = {}
    records: list[Record] = []
    for row, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        if not records and line.strip() == "{":
            message = "looks like JSON over several lines, expected JSONL: one whole object on each line"
            raise ManifestError(message, line=row)
        record = _json_record(row, line)
        records.append(record)
        for name in record.cells:
            columns.setdefault(name, row)
        _check_count(records)
        if len(columns) > MAX_COLUMNS:
            raise ManifestError(f"has more than {MAX_COLUMNS:,} columns", line=row)
    if not columns:
        first = records[0]
        raise ManifestError(first.findings[0].message if first.findings else "names no columns", line=first.row)
    _check_header(list(columns), check_columns, min(columns.values()))
    records = [record for record in records if record.findings or _is_filled(record.cells.values())]
    if not records:
        raise ManifestError("has no row with anything in it")
    empty = dict.fromkeys(columns, "")
    return Table(columns, [record._replace(cells=record.cells and empty | record.cells) for record in records])


class _JsonObject(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a name given twice is seen."""


def _json_record(row: int, line: str) -> Record:
    try:
        # Numbers stay as they are spelt: the results echo them, and a huge one must not become inf.
        pairs = json.loads(line, object_pairs_hook=_JsonObject, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        return Record(row, {}, (Finding(None, None, f"is not JSON: {error.msg} at character {error.pos + 1}"),))
    except RecursionError:
        return Record(row, {}, (Finding(None, None, "is not JSON that can be read: it is nested too deeply"),))
    if not isinstance(pairs, _JsonObject):
        return Record(row, {}, (Finding(None, None, "expected a JSON object with the columns' names"),))
    cells: dict[str, str] = {}
    findings: list[Finding] = []
    for raw_name, value in pairs:
        name = _encodable(raw_name)
        if name in cells:
            findings.append(Finding(name, None, "is given twice"))
        if isinstance(value, list):
            findings.append(Finding(name, None, "expected text, a number, true, false or null, not a list or object"))
        cells[name] = _json_cell(value)
        if isinstance(value, str) and cells[name] != value:
            findings.append(Finding(name, cells[name], "expected text that can be written as UTF-8"))
    return Record(row, cells, tuple(findings))


def _json_cell(value: Any) -> str:
    if value is None or isinstance(value, list):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _encodable(str(value))


def _encodable(text: str) -> str:
    """`text` with its lone surrogates, which JSON can spell and UTF-8 cannot, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode() if _SURROGATE.search(text) else text


def _check_count(records: Sequence[Record]) -> None:
    if len(records) > MAX_ROWS:
        raise ManifestError(f"has more than {MAX_ROWS:,} rows: split it", line=records[-1].row)


def _check_header(names: Sequence[str], check_columns: Callable[[Sequence[str]], None], line: int) -> None:
    try:
        _check_names(names)
        check_columns(names)
    except ManifestError as error:
        raise ManifestError(str(error), line=line) from error


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ManifestError("names no columns")
    if len(names) > MAX_COLUMNS:
        raise ManifestError(f"has {len(names):,} columns, expected at most {MAX_COLUMNS:,}")
    unnamed = [str(place) for place, name in enumerate(names, start=1) if not name.strip()]
    if unnamed:
        raise ManifestError(f"a column has no name (column {', '.join(unnamed)} of the header): name or delete it")
    if any(CONTROL_CHARACTER.search(name) or "\n" in name or "\r" in name for name in names):
        raise ManifestError("a column's name holds a line break or a control character")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(f"a column is named twice: {listed(doubled)}")
