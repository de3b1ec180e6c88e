"""Files of pre-encoded captions: what stands in them, how they are written and how they are checked.

A store is a folder of shards, ``captions-00000.safetensors`` and so on, each with a small record beside it,
``captions-00000.json``, and one ``manifest.json``, which is written when all are there. `docs/captions.md` has the
format in a table. A shard is finished once its record is there; shard, record and manifest each take their name only
when they are whole and on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import file_digest, replace_file

FORMAT, VERSION = "minimagen_fast captions", 1
MANIFEST = "manifest.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Key = tuple[int, int]


@dataclass(frozen=True)
class EncoderIdentity:
    """What the encodings in a store come from and how they are kept; it is part of every caption's key.

    Attributes:
        name: Name of the text encoder, see `encoder_name`.
        max_length: Tokens after which captions were cut off.
        width: Dimensions of an encoding.
        dtype: ``'float16'`` or ``'bfloat16'``.
        content: Digest of the encoder's files, see `encoder_content`; empty for an encoder without files.
    """

    name: str
    max_length: int
    width: int
    dtype: str
    content: str

    def key(self, caption: str) -> Key:
        """The 128 bits by which a caption is found, as two signed 64-bit numbers; keys are ordered as such pairs."""
        text = caption.encode("utf-8", "replace")  # what the text encoders read, lone surrogates and all
        digest = hashlib.sha256(self._prefix + text).digest()
        return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:16], "little", signed=True)

    @property
    def _prefix(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode() + b"\n"

    def __str__(self) -> str:
        content = f", files {self.content[:12]}" if self.content else ""
        return f"{self.name}, captions of at most {self.max_length} tokens, {self.dtype}{content}"


def encoder_name(name: str) -> str:
    """The name of a text encoder without the folders (or organisation) before it, which differ between machines.

    A documented T5 goes by its documented name even if its hub id was given.
    """
    from .t5 import T5_VERSIONS

    by_handle = {version.get("handle"): known for known, version in T5_VERSIONS.items()}
    if name in by_handle and not os.path.isdir(name):
        return by_handle[name]
    return os.path.basename(os.path.abspath(os.path.expanduser(name)))


def encoder_content(name: str) -> str:
    """A digest of an encoder's files, which are loaded for it; empty for an encoder without files."""
    from .t5 import encoder_files
    from .tiny_t5 import TINY_T5_NAME, embedded_t5_directory

    if name == TINY_T5_NAME:
        # Named after what its files follow from. They name versions of libraries, which change nothing.
        return embedded_t5_directory().name.rpartition("-")[2]
    files = encoder_files(name)
    if not files:
        return ""
    listing = [[file.name, file_digest(file)] for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def store_digest(encoder: EncoderIdentity, keys: Sequence[Key], shard_size: int) -> str:
    """Digest of everything that decides what the shards of a store hold.

    Args:
        encoder: The encoder.
        keys: All keys, in order.
        shard_size: Captions per shard.
    """
    digest = hashlib.sha256(f"{VERSION}\n{shard_size}\n".encode() + encoder._prefix)
    digest.update(torch.tensor(keys, dtype=torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def shard_path(directory: Path, number: int) -> Path:
    """Where shard `number`, from 0, of a store lies."""
    return directory / f"captions-{number:05d}.safetensors"


# Writing


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small file of a store, see `replace_file`."""
    replace_file(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_shard(
    directory: Path, number: int, encoder: EncoderIdentity, store: str, keys: Sequence[Key], rows: list[torch.Tensor]
) -> dict[str, Any]:
    """Write a shard, then its record.

    Args:
        directory: The store.
        number: Number of the shard.
        encoder: The encoder.
        store: What `store_digest` gave.
        keys: Keys of the captions, in order.
        rows: Encodings, each of shape (tokens, width) and of the encoder's dtype, on the CPU.

    Returns:
        The record.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    path = shard_path(directory, number)
    _remove_unfinished(path)
    lengths = torch.tensor([len(each) for each in rows])
    tensors = {
        "key": torch.tensor(keys, dtype=torch.int64).T.contiguous(),
        "offset": lengths.cumsum(0) - lengths,
        "length": lengths.to(torch.int32),
        "crc32": torch.tensor([zlib.crc32(_bytes(each)) for each in rows]),
        "rows": torch.cat(rows),
    }
    # One entry only: several come in any order, and the same captions should give the same bytes.
    content = save(tensors, metadata={"format": f"{FORMAT} {VERSION}"})
    record = {
        "format": FORMAT,
        "version": VERSION,
        "store": store,
        "encoder": asdict(encoder),
        "shard": number,
        "captions": len(rows),
        "tokens": int(lengths.sum()),
        "first_key": list(keys[0]),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    replace_file(path, content)
    write_json(path.with_suffix(".json"), record)
    return record


def write_manifest(directory: Path, encoder: EncoderIdentity, store: str, shards: list[dict[str, Any]]) -> None:
    """Write the manifest of a store from the records of all its shards, unless it says so already."""
    columns = ("captions", "tokens", "first_key", "bytes", "sha256")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "store": store,
        "encoder": asdict(encoder),
        "captions": sum(shard["captions"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": [
            {"file": shard_path(directory, shard["shard"]).name, **{name: shard[name] for name in columns}}
            for shard in shards
        ],
    }
    path = directory / MANIFEST
    _remove_unfinished(path)
    while json_or_none(path) != manifest:
        try:
            write_json(path, manifest)
        except FileNotFoundError:
            # Processes that share the work can get here at once: another one took our unfinished file for a left one.
            if not directory.is_dir():
                raise


def _remove_unfinished(path: Path) -> None:
    # What a run that was killed left of this file and of those beside it that differ in the suffix.
    for left in path.parent.glob(f".{path.stem}.*.part"):
        left.unlink(missing_ok=True)


# Reading


def read_json(path: Path) -> dict[str, Any]:
    """Read a small file of a store.

    Raises:
        ValueError: if it is damaged, of another format or of a newer version.
    """
    return checked_json(path, json_or_none(path))


def checked_json(path: Path, value: Any) -> dict[str, Any]:
    """What was read from a small file of a store, if it can be used.

    Raises:
        ValueError: as :func:`read_json`.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(
            f"{path} is damaged or not a file of pre-encoded captions: delete it, or name another folder, and encode"
            " again"
        )
    if value.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {value.get('version')!r} of the format, but this package reads version {VERSION}:"
            " update the package, or encode the captions again into another folder"
        )
    return value


def json_or_none(path: Path) -> Any:
    """What a JSON file says; None if it is none, or is not there (any more)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError):  # UnicodeDecodeError is a ValueError too
        return None


class DamagedShard(ValueError):
    """A shard of a store is not what was written. The message names it."""

    def __init__(self, path: Path, fault: str):
        super().__init__(path, fault)  # both, so that it can be pickled on its way out of a worker process
        self.path, self.fault = path, fault

    def __str__(self) -> str:
        return (
            f"the shard {self.path} of pre-encoded captions is damaged: {self.fault}. Run the same"
            " `minimagen-fast encode-captions` again: it makes damaged shards anew and leaves the others"
        )


class Shard:
    """A shard's captions, mapped into memory: only what is asked for is read.

    Args:
        path: The shard.
        encoder: What it was encoded with.
        captions: How many captions it holds.
        tokens: How many tokens they have together.

    Raises:
        DamagedShard: if its header does not say so.
    """

    def __init__(self, path: Path, encoder: EncoderIdentity, captions: int, tokens: int):
        self.path = path
        expected = {
            "key": (torch.int64, (2, captions)),
            "offset": (torch.int64, (captions,)),
            "length": (torch.int32, (captions,)),
            "crc32": (torch.int64, (captions,)),
            "rows": (DTYPES[encoder.dtype], (tokens, encoder.width)),
        }
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # views of the mapped file
        except SafetensorError as error:
            raise DamagedShard(path, str(error)) from error
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != expected:
            raise DamagedShard(path, "its tensors are not those in the manifest")
        self._rows = tensors.pop("rows")
        index = {name: tensor.numpy() for name, tensor in tensors.items()}
        self._high, self._low = index["key"]
        self._offset, self._length, self._crc32 = index["offset"], index["length"], index["crc32"]

    def find(self, key: Key) -> int | None:
        """Place of a caption in the shard, or None."""
        high, low = key
        place = int(self._high.searchsorted(high))
        while place < len(self._high) and self._high[place] == high:
            if self._low[place] == low:
                return place
            place += 1
        return None

    def rows(self, place: int) -> torch.Tensor:
        """The encoding of the caption at a place, (tokens, width), as it is stored: not to be changed.

        Raises:
            DamagedShard: if it is not what was written.
        """
        start = int(self._offset[place])
        stop = start + int(self._length[place])
        if not 0 <= start <= stop <= len(self._rows):
            raise DamagedShard(self.path, f"the index of caption {place} leads out of it")
        rows = self._rows[start:stop]
        if zlib.crc32(_bytes(rows)) != self._crc32[place]:
            raise DamagedShard(self.path, f"the encoding of caption {place} is not what was written")
        return rows


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
