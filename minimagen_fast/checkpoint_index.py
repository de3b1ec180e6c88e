"""The index of a sharded checkpoint, read without running code.

``torch.distributed.checkpoint`` keeps its index, ``.metadata``, as a pickle, and a pickle may call anything. This one
may call what such an index is made of and nothing else. Whoever reads weights from a folder that others made asks here
first; the tensors themselves torch reads with ``weights_only=True``.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = ["read_index"]

INDEX = ".metadata"
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    (_FILES, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # Where it was saved; from Python 3.13 on under another name.
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint.

    Args:
        folder: The folder that ``torch.distributed.checkpoint`` has written.

    Raises:
        ValueError: The index is missing, damaged, or holds anything but the description of tensors.
    """
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
        entries = index.state_dict_metadata
        if others := [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]:
            raise pickle.UnpicklingError(f"{others[0]} is no tensor")
        return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()}  # type: ignore[union-attr]
    # What a damaged pickle raises is any of these.
    except (
        pickle.UnpicklingError,
        EOFError,
        OSError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} cannot be read as the index of a checkpoint ({error}): it is damaged, or was made to run code. Use"
            " another checkpoint or exported weights"
        ) from error
