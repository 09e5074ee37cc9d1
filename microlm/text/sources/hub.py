"""Datasets of Hugging Face (`hf:`) and ModelScope (`ms:`) → blocks of rows, by their own code (extra 'hub').

Enters: `owner/dataset` with split and revision, or a local folder in their format. Their libraries read the
variables for mirrors, tokens and caches themselves (HF_ENDPOINT, HF_HOME, MODELSCOPE_ENDPOINT …).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlm.core.errors import UserError
from microlm.text.sources.tables import BATCH_ROWS, Table, pack_batches

if TYPE_CHECKING:
    import pyarrow as pa

_SAVED = ("state.json", "dataset_dict.json")  # what `Dataset.save_to_disk` leaves
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Dataset:
    """`owner/dataset[/config][:split][@revision]`, or `FOLDER[:split]`; an empty revision is the newest."""

    kind: str
    name: str
    config: str = ""
    split: str = "train"
    revision: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it names a folder of this machine."""
        return Path(self.name).expanduser().exists()

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{self.kind}:{self.name}{config}:{self.split}" + (
            f"@{self.revision}" if self.revision else ""
        )


def parse_dataset(kind: str, place: str) -> Dataset:
    """The parts of what stands behind `hf:` or `ms:`."""
    name, _, split = place.partition(":")
    if Path(name).expanduser().exists():
        return Dataset(kind, str(Path(name).expanduser()), "", split or "train")
    place, _, revision = place.partition("@")
    name, _, split = place.partition(":")
    owner, _, rest = name.partition("/")
    dataset, _, config = rest.partition("/")
    return Dataset(kind, f"{owner}/{dataset}" if dataset else owner, config, split or "train", revision)


def read_dataset(dataset: Dataset) -> Iterator[Table]:
    """The blocks of a dataset; what the library refuses is a UserError."""
    label = f"{Path(dataset.name).name if dataset.is_local else dataset.name}:{dataset.split}"
    for table, _ in pack_batches(_batches(dataset), label):
        yield table


@cache
def pinned(dataset: Dataset) -> str:
    """What the revision stands for now: a commit of Hugging Face, a digest of the files of ModelScope."""
    if _COMMIT.fullmatch(dataset.revision):
        return dataset.revision
    try:
        if dataset.kind == "hf":
            from huggingface_hub import HfApi

            info = HfApi().dataset_info(dataset.name, revision=dataset.revision or None)
            return str(info.sha)
        from modelscope_hub import HubApi

        files = HubApi().list_repo_files(dataset.name, "dataset", revision=dataset.revision or None)
        listed = sorted(f"{f.path}\0{f.size}\0{f.sha256}" for f in files)
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()
    except ImportError:
        raise _missing(dataset) from None
    except Exception as e:  # the libraries raise their own kinds, and those of their HTTP clients
        raise _refused(dataset, e) from e


def _batches(dataset: Dataset) -> Iterator[pa.RecordBatch]:
    try:
        rows = _open(dataset)
        for table in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
            yield from table.combine_chunks().to_batches()
    except UserError:
        raise
    except Exception as e:  # the library raises its own kinds while it streams
        raise _refused(dataset, e) from e


def _open(dataset: Dataset) -> Any:
    """The rows of the split, streamed from the folder or from the hub at the pinned commit."""
    try:
        import datasets
    except ImportError:
        raise _missing(dataset) from None
    folder = dataset.name if dataset.is_local else ""
    if dataset.kind == "ms" and not folder:
        folder = _snapshot(dataset)
    if any((Path(folder) / saved).exists() for saved in _SAVED if folder):
        held = datasets.load_from_disk(folder)
        return held[dataset.split] if isinstance(held, datasets.DatasetDict) else held
    revision = None if folder else pinned(dataset)
    return datasets.load_dataset(
        folder or dataset.name, dataset.config or None, split=dataset.split, revision=revision, streaming=True
    )


def _snapshot(dataset: Dataset) -> str:
    """The folder into which ModelScope fetches a dataset; what is there already is not fetched again."""
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        raise _missing(dataset) from None
    return str(dataset_snapshot_download(dataset.name, revision=dataset.revision or None))


def _missing(dataset: Dataset) -> UserError:
    return UserError(f"data.source '{dataset}': needs the extra 'hub': pip install 'microlm[hub]'")


def _refused(dataset: Dataset, error: Exception) -> UserError:
    first = (str(error).splitlines() or [""])[0][:200]
    return UserError(
        f"data.source '{dataset}': cannot be loaded ({type(error).__name__}: {first});"
        " check the name, the split, the revision and the network"
    )
