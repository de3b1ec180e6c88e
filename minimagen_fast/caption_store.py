"""Reading pre-encoded captions, and where data sets get their captions' encodings from."""

from __future__ import annotations

import shlex
import warnings
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch

from .caption_format import (
    MANIFEST,
    DamagedShard,
    EncoderIdentity,
    Key,
    Shard,
    encoder_content,
    encoder_name,
    read_json,
)
from .files import file_fault, size_fault
from .shared_counts import SharedCounts
from .t5 import t5_encode_text


class CaptionStore:
    """The captions that ``minimagen-fast encode-captions`` has encoded into a folder.

    Shards are mapped into memory when they are first needed, so that a store of any size costs next to nothing to open,
    and processes on one machine share what they have read. A store may be used by several threads, pickled, and used
    in processes that were forked or spawned.

    Args:
        directory: The folder.

    Attributes:
        encoder: What the captions were encoded with, a :class:`.caption_format.EncoderIdentity`.

    Raises:
        FileNotFoundError: if there is no finished store in it.
        ValueError: if its manifest is damaged or of another version.
        DamagedShard: if a shard is missing or not as long as it should be (a ValueError, which names it).
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()
        path = self.directory / MANIFEST
        if not path.is_file():
            unfinished = any(self.directory.glob("captions-*.json"))
            raise FileNotFoundError(
                f"{self.directory} holds no pre-encoded captions: there is no {MANIFEST}. "
                + ("They are not all encoded: run the same" if unfinished else "Make them with")
                + f" `minimagen-fast encode-captions --OUT {shlex.quote(str(self.directory))}`"
                + (" again" if unfinished else "")
            )
        manifest = read_json(path)
        try:
            self.encoder = EncoderIdentity(**manifest["encoder"])
            self._number: int = manifest["captions"]
            self._shards: list[dict[str, Any]] = manifest["shards"]
            self._first_keys: list[Key] = [(high, low) for high, low in (each["first_key"] for each in self._shards)]
            for shard in self._shards:
                file = self.directory / shard["file"]
                if (fault := size_fault(file, shard["bytes"])) is not None:
                    raise DamagedShard(file, fault)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it and encode again") from error
        # Filled without a lock, which a fork might copy while it is held: opening a shard twice does no harm.
        self._open: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # mapped memory does not travel

    def __len__(self) -> int:
        return self._number

    def __contains__(self, caption: object) -> bool:
        return isinstance(caption, str) and self._find(caption) is not None

    def get(self, caption: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The encoding of a caption, as :func:`.t5.t5_encode_text` gives it for this caption alone.

        Returns:
            The encoding, float32 of shape (1, n, width), and its mask, bool of shape (1, n), on the CPU and free to be
            changed; or None if the caption is not in the store.

        Raises:
            DamagedShard: if it is not what was written (a ValueError, which names the shard).
        """
        found = self._find(caption)
        if found is None:
            return None
        shard, place = found
        rows = shard.rows(place).float()[None]
        mask = torch.ones(rows.shape[:2], dtype=torch.bool)
        if rows.shape[1] == 0:  # an encoder found nothing in it: one place that holds nothing stands for that
            return rows.new_zeros(1, 1, self.encoder.width), mask.new_zeros(1, 1)
        return rows, mask

    def check_encoder(self, name: str, max_length: int) -> None:
        """See that captions were encoded with the text encoder that is wanted; needs none of its files.

        Raises:
            ValueError: if they were not.
        """
        if (self.encoder.name, self.encoder.max_length) != (encoder_name(name), max_length):
            raise ValueError(
                f"the captions in {self.directory} were encoded with {self.encoder.name}, at most"
                f" {self.encoder.max_length} tokens, but {encoder_name(name)}, at most {max_length} tokens, is wanted:"
                " give the same T5_NAME and MAX_NUM_WORDS, or encode them again into another folder"
            )

    def check_content(self, name: str) -> None:
        """See that the text encoder's files here are those that the captions were encoded with; loads the encoder.

        Raises:
            ValueError: if they are not.
        """
        content = encoder_content(name)
        if content != self.encoder.content:
            raise ValueError(
                f"the captions in {self.directory} were encoded with another {self.encoder.name} (files"
                f" {self.encoder.content[:12]}) than the one here (files {content[:12]}): use its files, or encode the"
                " captions again into another folder"
            )

    def verify(self) -> None:
        """Read everything and compare it with the checksums.

        Raises:
            DamagedShard: if something is not what was written (a ValueError, which names the shard).
        """
        for shard in self._shards:
            path = self.directory / shard["file"]
            if (fault := file_fault(path, shard["bytes"], shard["sha256"])) is not None:
                raise DamagedShard(path, fault)

    def _find(self, caption: str) -> tuple[Shard, int] | None:
        key = self.encoder.key(caption)
        number = bisect_right(self._first_keys, key) - 1
        if number < 0:
            return None
        shard = self._open.get(number)
        if shard is None:
            entry = self._shards[number]
            shard = Shard(self.directory / entry["file"], self.encoder, entry["captions"], entry["tokens"])
            self._open[number] = shard
        place = shard.find(key)
        return None if place is None else (shard, place)


class CaptionEncodings:
    """Encodings of captions from a store, or from the text encoder if there is none or a caption is not in it.

    The text encoder is only loaded when it is needed. Captions that are not in the store are counted, and the first of
    them is warned of.

    Args:
        store: Pre-encoded captions, if any.
        name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        max_length: Tokens after which a caption is cut off.

    Attributes:
        device: Where captions that are not in the store are encoded, see :func:`.t5.t5_encode_text`.

    Raises:
        ValueError: if the captions in the store were encoded otherwise.
    """

    def __init__(self, store: CaptionStore | None, name: str, max_length: int):
        self.device: torch.device | str | None = None
        if store is not None:
            store.check_encoder(name, max_length)
        self.store, self.name, self.max_length = store, name, max_length
        self._counts = SharedCounts(["not stored"])
        self._checked_content = False

    @property
    def not_stored(self) -> int:
        """How often a caption was asked for that is not in the store, by worker processes too; 0 without a store."""
        return self._counts.as_dict().get("not stored", 0)

    def encoded_as(self, name: str, max_length: int) -> CaptionEncodings:
        """The same by another text encoder or with another limit; what is not in the store is counted together.

        Raises:
            ValueError: if the captions in the store were encoded otherwise.
        """
        other = CaptionEncodings(self.store, name, max_length)
        other.device, other._counts = self.device, self._counts
        return other

    def __call__(self, caption: str, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoding, float32 of shape (1, n, dim), and the mask, bool of shape (1, n), of a caption.

        Args:
            caption: The caption.
            device: Where to encode it if it is not in the store; the attribute by default.
        """
        if self.store is not None:
            found = self.store.get(caption)
            if found is not None:
                return found
            self._not_in_store(self.store, caption)
        return t5_encode_text([caption], self.name, self.max_length, device=self.device if device is None else device)

    def _not_in_store(self, store: CaptionStore, caption: str) -> None:
        if not self._checked_content:
            store.check_content(self.name)
            self._checked_content = True
        if self._counts.add("not stored") == 1:
            warnings.warn(
                f"the caption {caption[:80]!r} is not in {store.directory}: it is encoded with {self.name} now, as all"
                " others that are not there will be, which takes time and memory",
                stacklevel=3,
            )
