"""Encoding captions into a store, in one process or many, so that it can be interrupted anywhere and gone on with."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .caption_format import (
    DTYPES,
    MANIFEST,
    EncoderIdentity,
    checked_json,
    encoder_content,
    encoder_name,
    json_or_none,
    shard_path,
    store_digest,
    write_manifest,
    write_shard,
)
from .files import file_fault
from .progress import progress_bar
from .t5 import get_encoded_dim, t5_encode_text, token_counts

SHARD_SIZE = 16_384
BATCH_SIZE = 64


@dataclass(frozen=True)
class EncodingReport:
    """What :func:`encode_captions` did.

    Attributes:
        encoded: Captions that this process encoded.
        seconds: How long that took, the writing included.
        damaged: Names of the damaged shards that it made anew.
        shards_left: Shards that are still to be made by other processes; at 0 the store is complete.
        captions: Captions in the finished shards.
        bytes: Size of the finished shards.
        padded_bytes: Size of the same encodings in float32, each padded to the largest number of tokens.
    """

    encoded: int
    seconds: float
    damaged: tuple[str, ...]
    shards_left: int
    captions: int
    bytes: int
    padded_bytes: int


def encode_captions(
    captions: Iterable[str],
    directory: str | Path,
    *,
    encoder: str,
    max_length: int,
    dtype: str = "float16",
    batch_size: int = BATCH_SIZE,
    shard_size: int = SHARD_SIZE,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> EncodingReport:
    """Encode every distinct caption once into a folder that :class:`.caption_store.CaptionStore` reads.

    What is finished there stays as it is, so a run that was ended by anything goes on when it is started again, with
    any number of processes. Processes need not know of each other: each makes every `world_size`-th shard, and the one
    that finds all shards finished writes the manifest.

    Args:
        captions: The captions; every process must be given the same ones, in any order.
        directory: The folder; it is made if it is not there.
        encoder: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Tokens after which a caption is cut off.
        dtype: What encodings are rounded to: ``'float16'`` or ``'bfloat16'``.
        batch_size: Captions encoded at once, of about the same length.
        shard_size: Captions per shard.
        device: Where to encode, see :func:`.t5.t5_encode_text`.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: if an argument is out of range, there is no caption, an encoding is too large for float16, or the
            folder holds encodings of other captions, of another encoder or in shards of another size.
        OSError: if the encoder's files are nowhere to be had, or the folder cannot be written, as when the disk is
            full. Finished shards stay.
    """
    numbers = {"max_length": max_length, "batch_size": batch_size, "shard_size": shard_size, "world_size": world_size}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, for {world_size} processes, got {rank!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    content = encoder_content(encoder)  # before the width, since it fetches what there is to fetch
    identity = EncoderIdentity(encoder_name(encoder), max_length, get_encoded_dim(encoder), dtype, content)
    texts = {identity.key(caption): caption for caption in captions}
    if not texts:
        raise ValueError("there is no caption to encode")
    keys = sorted(texts)
    shards = [keys[start : start + shard_size] for start in range(0, len(keys), shard_size)]
    store = _Store(Path(directory).absolute(), identity, store_digest(identity, keys, shard_size), len(shards))
    store.directory.mkdir(parents=True, exist_ok=True)
    store.check_same()
    own = range(rank, len(shards), world_size)
    damaged = [fault for number in own if (fault := store.discard_damaged(number)) is not None]
    todo = [number for number in own if not store.record_path(number).is_file()]
    encoded, start = 0, time.perf_counter()
    with progress_bar(total=sum(len(shards[number]) for number in todo), unit=" captions", shown=progress) as bar:
        for number in todo:
            rows = _encode([texts[key] for key in shards[number]], encoder, identity, batch_size, device, bar)
            try:
                write_shard(store.directory, number, identity, store.digest, shards[number], rows)
            except OSError as error:
                raise store.not_written(error, number) from error
            encoded += len(rows)
    seconds = time.perf_counter() - start

    records = store.records()
    if len(records) == len(shards):
        write_manifest(store.directory, identity, store.digest, records)
    finished = sum(record["captions"] for record in records)
    return EncodingReport(
        encoded=encoded,
        seconds=seconds,
        damaged=tuple(damaged),
        shards_left=len(shards) - len(records),
        captions=finished,
        bytes=sum(record["bytes"] for record in records),
        padded_bytes=finished * max_length * identity.width * 4,
    )


def _encode(
    captions: list[str],
    encoder: str,
    identity: EncoderIdentity,
    batch_size: int,
    device: torch.device | str | None,
    bar: tqdm,
) -> list[torch.Tensor]:
    """Encodings of captions, each (tokens, width), rounded, on the CPU; captions of a length are encoded together."""
    lengths = token_counts(captions, encoder, identity.max_length) or [len(caption) for caption in captions]
    # The longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(captions)), key=lambda place: -lengths[place])
    rows: list[torch.Tensor] = [torch.empty(0)] * len(captions)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [captions[place] for place in places]
        encodings, mask = t5_encode_text(batch, encoder, identity.max_length, device=device, batch_size=batch_size)
        counts = mask.sum(dim=1)
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < counts[:, None]):
            raise ValueError(f"the mask of the encoder {encoder!r} has tokens after padding: it cannot be packed")
        packed = encodings[mask].to(DTYPES[identity.dtype])
        if not packed.isfinite().all():
            raise ValueError(
                f"the encoder {encoder!r} gives numbers that are not finite as {identity.dtype}:"
                + (" use bfloat16" if encodings.isfinite().all() else " it cannot be used")
            )
        for place, each in zip(places, packed.cpu().split(counts.tolist()), strict=True):
            rows[place] = each
        bar.update(len(places))
    return rows


@dataclass(frozen=True)
class _Store:
    """The folder that is being filled."""

    directory: Path
    encoder: EncoderIdentity
    digest: str
    number_of_shards: int

    def record_path(self, number: int) -> Path:
        return shard_path(self.directory, number).with_suffix(".json")

    def records(self) -> list[dict[str, Any]]:
        """Records of the finished shards, in order."""
        # Other processes take theirs away, where the shard is damaged, and write them anew.
        read = {path: json_or_none(path) for path in map(self.record_path, range(self.number_of_shards))}
        return [checked_json(path, record) for path, record in read.items() if record is not None]

    def check_same(self) -> None:
        """See that what is in the folder already belongs to what is to be made."""
        # Others have files of this name too, which would be written over when all is encoded.
        if (manifest := json_or_none(self.directory / MANIFEST)) is not None:
            checked_json(self.directory / MANIFEST, manifest)
        for path in sorted(self.directory.glob("captions-*.json")):
            record = json_or_none(path)
            if record is None:
                continue  # damaged: `discard_damaged` sees to it, or of another process, which just did
            record = checked_json(path, record)
            if record["store"] == self.digest:
                continue
            there = EncoderIdentity(**record["encoder"])
            if there != self.encoder:
                raise ValueError(
                    f"{self.directory} holds encodings by {there}; wanted are those by {self.encoder}: choose another"
                    " folder, or delete it"
                )
            raise ValueError(
                f"{self.directory} holds encodings of other captions by the same encoder, or in shards of another"
                " size: give the same data and SHARD_SIZE as before, choose another folder, or delete it"
            )

    def discard_damaged(self, number: int) -> str | None:
        """Take a shard that is not what was written for not finished, and say what is wrong with it."""
        path, record_path = shard_path(self.directory, number), self.record_path(number)
        if not record_path.is_file():
            return None
        record = json_or_none(record_path)
        fault: str | None
        if record is None:
            fault = f"its record {record_path.name} is damaged"
        else:
            fault = file_fault(path, record["bytes"], record["sha256"])
        if fault is None:
            return None
        # The record goes first: without it nobody takes the shard for finished.
        record_path.unlink()
        return f"{path}: {fault}"

    def not_written(self, error: OSError, number: int) -> OSError:
        """What to tell the user about an error in writing a shard."""
        finished = self.records()
        path = shard_path(self.directory, number)
        needed = ""
        if finished:
            each = sum(record["bytes"] for record in finished) / len(finished)
            needed = f", about {each * (self.number_of_shards - len(finished)) / 1e6:,.1f} MB,"
        free = shutil.disk_usage(self.directory).free / 1e6
        return OSError(
            f"{path} cannot be written: {error.strerror}. {len(finished)} of {self.number_of_shards} shards are"
            f" finished and stay. Make room for the others{needed} ({free:,.1f} MB are free) and run the same again: it"
            " goes on from there"
        )
