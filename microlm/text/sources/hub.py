"""Datasets of Hugging Face (`hf:`) and ModelScope (`ms:`) → records, by their own libraries (extra 'hub').

Enters: `owner/dataset` or a local folder in that format, and a split. Leaves: records and drops, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from microlm.core.errors import UserError
from microlm.text.read import Drop, Fault, Record, check_strings, parse_object

_SAVED = ("state.json", "dataset_dict.json")  # what `Dataset.save_to_disk` leaves


def read_dataset(kind: str, name: str, split: str) -> Iterator[Record | Drop]:
    """The rows of a dataset as records, each fault a Drop; what the library refuses is a UserError."""
    rows = iter(_huggingface(name, split) if kind == "hf" else _modelscope(name, split))
    label = Path(name).name if Path(name).exists() else name
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as e:  # the library raises its own kinds while it streams
            raise _refused(kind, name, split, e) from e
        number += 1
        place = f"{label}:{split}:{number}"
        try:
            yield parse_object(check_strings(_plain(row)), place)
        except Fault as fault:
            yield Drop(fault.reason, place, fault.detail)


def _huggingface(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise _missing("hf", name) from None
    try:
        if any((Path(name) / saved).exists() for saved in _SAVED):
            held = datasets.load_from_disk(name)
            rows: Iterable[Mapping[str, Any]] = (
                held[split] if isinstance(held, datasets.DatasetDict) else held
            )
            return rows
        loaded: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split=split, streaming=True)
        return loaded
    except Exception as e:
        raise _refused("hf", name, split, e) from e


def _modelscope(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise _missing("ms", name) from None
    try:
        rows: Iterable[Mapping[str, Any]] = MsDataset.load(name, split=split)
        return rows
    except Exception as e:
        raise _refused("ms", name, split, e) from e


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the columns that are null here: tables give every row every column."""
    return {k: v for k, v in row.items() if v is not None}


def _missing(kind: str, name: str) -> UserError:
    return UserError(f"data.source '{kind}:{name}': needs the extra 'hub': pip install 'microlm[hub]'")


def _refused(kind: str, name: str, split: str, error: Exception) -> UserError:
    first = (str(error).splitlines() or [""])[0][:200]
    return UserError(
        f"data.source '{kind}:{name}:{split}': cannot be loaded ({type(error).__name__}: {first});"
        " check the name, the split and the network"
    )
