"""Token sets → packed batches, in an order that depends on the seed and the number of the row only."""

from microlm.train.batches.batch import IGNORE, Batch, document_mask
from microlm.train.batches.interface import Rows, Stream
from microlm.train.batches.rows import PackedRows, held_out_rows
from microlm.train.batches.spans import TooLong
from microlm.train.batches.stream import BatchStream

__all__ = [
    "IGNORE",
    "Batch",
    "BatchStream",
    "PackedRows",
    "Rows",
    "Stream",
    "TooLong",
    "document_mask",
    "held_out_rows",
]
