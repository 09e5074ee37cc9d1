"""Tables → blocks of rows. Enters: CSV and TSV (cells may hold line ends), Parquet, batches of Arrow.

Leaves: `Rows` and `Table`, about 8 MB each; a row is an object whose keys are the columns.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlm.core.errors import UserError
from microlm.text.read import Drop, shown
from microlm.text.sources import packed
from microlm.text.sources.files import suffix
from microlm.text.sources.jsonl import BLOCK_BYTES
from microlm.text.sources.packed import Broken, unpacked
from microlm.text.sources.shapes import KNOWN

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CELL_CHARS = 8 << 20
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a CSV file with the line on which each begins; `fault` is what follows them."""

    label: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, list[str] | Drop], ...]
    fault: Drop | None = None
    consumed: int = 0
    expected: str = "text"
    task: str = ""

    def objects(self) -> Iterator[tuple[str, dict[str, Any] | Drop]]:
        """`(file:line, row)`, or the drop of a row that does not fit the header."""
        for number, row in self.rows:
            place = f"{self.label}:{number}"
            yield place, row if isinstance(row, Drop) else dict(zip(self.columns, row, strict=True))
        if self.fault:
            yield self.fault.place, self.fault


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as Arrow's bytes; `number` is the first row's, `fault` what follows them."""

    label: str
    number: int
    data: bytes
    fault: Drop | None = None
    consumed: int = 0
    expected: str = "text"
    task: str = ""

    def objects(self) -> Iterator[tuple[str, dict[str, Any] | Drop]]:
        """`(file:row, row)`, or the drop of a row whose bytes are not UTF-8."""
        import pyarrow as pa

        number = self.number
        for batch in pa.ipc.open_stream(self.data) if self.data else ():
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for row in _to_rows(batch.slice(start, BATCH_ROWS)):
                    place = f"{self.label}:{number}"
                    bad = Drop("invalid_utf8", place, "a text of the row is not UTF-8")
                    yield place, bad if row is None else row
                    number += 1
        if self.fault:
            yield self.fault.place, self.fault


def _to_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in _to_rows(batch.slice(i, 1))]


def read_csv(path: Path, label: str) -> Iterator[Rows]:
    """The blocks of a CSV or TSV file; its first row names the columns."""
    csv.field_size_limit(MAX_CELL_CHARS)  # of the module: the standard library has no limit per reader
    lines = _DecodedLines(path)
    columns, reader = _open_csv(path, lines)
    rows: list[tuple[int, list[str] | Drop]] = []
    begun = gone = 0
    fault = None
    while True:
        number = lines.number + 1
        place = f"{label}:{number}"
        lines.fault = None
        try:
            row = next(reader)
            rows.append((number, _checked(row, len(columns), lines.fault, place)))
        except StopIteration:
            break
        except csv.Error as e:
            rows.append(
                (number, Drop("bad_row", place, f"the row cannot be told apart ({e}); mend its quotes"))
            )
        except Broken as e:
            fault = Drop(e.reason, place, str(e))
            break
        if lines.size - begun >= BLOCK_BYTES:
            yield Rows(label, columns, tuple(rows), None, lines.at - gone)
            rows, begun, gone = [], lines.size, lines.at
    yield Rows(label, columns, tuple(rows), fault, path.stat().st_size - gone)


def _open_csv(path: Path, lines: _DecodedLines) -> tuple[tuple[str, ...], Iterator[list[str]]]:
    """The columns and a reader that stands behind them; the delimiter is told by the first line."""
    try:
        first = next(lines, "")
        counts = {d: first.count(d) for d in (("\t",) if suffix(path) == ".tsv" else (",", ";", "\t"))}
        delimiter = max(counts, key=lambda d: counts[d])

        def again() -> Iterator[str]:
            yield first
            yield from lines

        reader = csv.reader(again(), delimiter=delimiter)
        columns = tuple(name.strip() for name in next(reader, []))
    except Broken as e:
        raise UserError(f"{path}: {e}") from None
    except csv.Error as e:
        raise UserError(f"{path}: the header row cannot be read ({e}); mend its quotes") from None
    if not columns or lines.fault:
        raise UserError(f"{path}: has no header row of text; name the columns in the first line")
    if not set(columns) & KNOWN:
        found = ", ".join(shown(name) for name in columns[:5])
        raise UserError(
            f"{path}: its header row is '{found}'; expected a column 'text', 'instruction', 'messages',"
            " 'conversations' or 'chosen': rename it, or add a header row"
        )
    return columns, reader


def _checked(row: list[str], width: int, fault: tuple[str, str] | None, place: str) -> list[str] | Drop:
    if fault:
        return Drop(fault[0], place, fault[1])
    if not row:
        return Drop("empty_line", place, "the line is empty")
    if len(row) != width:
        return Drop("bad_row", place, f"the row has {len(row)} cells, the header {width}; mend its quotes")
    return row


class _DecodedLines(Iterator[str]):
    """The lines of a file as text; `fault` names what is wrong with a line that went by."""

    def __init__(self, path: Path) -> None:
        self.number = self.size = self.at = 0  # lines, their bytes, bytes of the file
        self.fault: tuple[str, str] | None = None
        self._lines = self._split(path)

    def __next__(self) -> str:
        line = next(self._lines)
        self.size += len(line)
        if self.number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        self.number += 1
        if b"\0" in line:
            self.fault = ("nul_byte", "the row holds a NUL byte")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.fault = ("invalid_utf8", "the row is not UTF-8")
            return line.decode("utf-8", "replace")

    def _split(self, path: Path) -> Iterator[bytes]:
        held: list[bytes] = []
        size = quotes = 0
        for piece, self.at in unpacked(path):
            *ended, rest = piece.split(b"\n")
            for part in ended:
                yield self._whole([*held, part, b"\n"], size + len(part) + 1, quotes + part.count(b'"'))
                held, size, quotes = [], 0, 0
            size += len(rest)
            quotes += rest.count(b'"')
            held = [*held, rest] if size <= packed.MAX_LINE_BYTES else []
        if size:
            yield self._whole(held, size, quotes)

    def _whole(self, parts: list[bytes], size: int, quotes: int) -> bytes:
        if size <= packed.MAX_LINE_BYTES:
            return b"".join(parts)
        limit = packed.MAX_LINE_BYTES >> 20
        self.fault = ("line_too_long", f"the line has {size >> 20} MiB, the limit is {limit} MiB; cut it")
        return b'"' * (quotes % 2) + b"\n"  # leaves a quote as open or closed as it was


def read_parquet(path: Path, label: str) -> Iterator[Table]:
    """The blocks of a Parquet file, row group by row group in constant memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: is not a whole Parquet file ({_first_line(e)}); fetch it again") from None
    size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
    gone, fault = 0, None
    batches = file.iter_batches(batch_size=BATCH_ROWS)

    def sound() -> Iterator[pa.RecordBatch]:
        nonlocal fault
        try:
            yield from batches
        except (pa.ArrowException, OSError) as e:
            fault = f"the Parquet data is damaged ({_first_line(e)}); fetch the file again"

    with file:
        number = 1
        for table, count in pack_batches(sound(), label):
            number = table.number + count
            at = size * (number - 1) // rows
            yield Table(label, table.number, table.data, None, at - gone)
            gone = at
    broken = Drop("damaged_file", f"{label}:{number}", fault) if fault else None
    if broken or gone < size:
        yield Table(label, number, b"", broken, size - gone)


def pack_batches(batches: Iterable[pa.RecordBatch], label: str) -> Iterator[tuple[Table, int]]:
    """Batches of Arrow in blocks with their numbers of rows; a block has one schema."""
    held: list[pa.RecordBatch] = []
    size, number = 0, 1
    for batch in batches:
        if held and (size >= BLOCK_BYTES or batch.schema != held[0].schema):
            yield _packed(held, label, number)
            number += sum(b.num_rows for b in held)
            held, size = [], 0
        held.append(batch)
        size += batch.nbytes
    if held:
        yield _packed(held, label, number)


def _packed(batches: list[pa.RecordBatch], label: str, number: int) -> tuple[Table, int]:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return Table(label, number, sink.getvalue().to_pybytes()), sum(b.num_rows for b in batches)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:150]
