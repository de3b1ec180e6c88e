"""What the data of a training takes on disks, and how fast it must be read."""

import math
from dataclasses import dataclass

__all__ = ["Data"]

# Of a caption in the index of a shard, see docs/captions.md: key, offset, length and checksum.
INDEX_BYTES = 16 + 8 + 4 + 8
HALF, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Data:
    """Pictures with a caption each, which ``minimagen-fast encode-captions`` has encoded.

    Attributes:
        pictures: How many there are.
        bytes_per_picture: Of a picture's file, on average.
        tokens: Of a caption, on average.
        width: Dimensions of a token's encoding.
        max_tokens: Tokens that captions would be padded to.
    """

    pictures: int
    bytes_per_picture: float
    tokens: float
    width: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"--captions must be at least 1, got {self.pictures}")
        if not 0 < self.bytes_per_picture < math.inf:
            raise ValueError(f"--bytes-per-picture must be positive and finite, got {self.bytes_per_picture}")
        if not 0 < self.tokens <= self.max_tokens:
            raise ValueError(
                f"--tokens-per-caption must lie in (0, {self.max_tokens}], the most that are kept; got {self.tokens}"
            )

    @property
    def bytes_per_caption(self) -> float:
        """Packed, in half precision."""
        return self.tokens * self.width * HALF + INDEX_BYTES

    @property
    def captions(self) -> float:
        """Bytes of all captions, packed."""
        return self.pictures * self.bytes_per_caption

    @property
    def padded_captions(self) -> float:
        """Bytes of all captions, padded, in float32."""
        return float(self.pictures) * self.max_tokens * self.width * FLOAT32

    @property
    def pictures_bytes(self) -> float:
        """Bytes of all pictures."""
        return self.pictures * self.bytes_per_picture

    def read_per_second(self, images_per_second: float) -> float:
        """Bytes to read in a second for so many images."""
        return images_per_second * (self.bytes_per_picture + self.bytes_per_caption)
