"""Pictures that can be told apart, and files of them in every layout that is read."""

import io
import json
import tarfile

import numpy as np
import torch
from picture_server import encoded
from PIL import Image

from minimagen_fast.t5 import register_text_encoder


def _encode(captions, max_length, device):
    lengths = torch.tensor([min(len(caption.split()) + 1, max_length) for caption in captions])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return mask[:, :, None].float().expand(-1, -1, 5).contiguous(), mask


register_text_encoder("word_count", _encode, 5)
OPTIONS = dict(encoder_name="word_count", max_length=8, side_length=4)


def shade(number: int) -> bytes:
    """A grey picture, its left half lighter by one, whose grey says which one it is."""
    pixels = np.full((6, 8, 3), number, np.uint8)
    pixels[:, :4] += 1
    return encoded(Image.fromarray(pixels))


def number_of(image: torch.Tensor) -> int:
    """The number that :func:`shade` was given."""
    return int(float(image.mean()) * 255)


def tar_bytes(members, **options) -> bytes:
    """A tar file of (name, content) and of finished ``TarInfo``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pairs(numbers, as_json=False):
    """The members of a tar file of these pictures."""
    for number in numbers:
        yield f"{number:04d}.png", shade(number)
        if as_json:
            yield f"{number:04d}.json", json.dumps({"caption": f"picture {number}", "width": 8}).encode()
        else:
            yield f"{number:04d}.txt", f"picture {number}\n".encode()


def write_tars(folder, number_of_files, size, first=0):
    """Tar files of `size` pictures each, numbered on from `first`."""
    folder.mkdir(exist_ok=True, parents=True)
    files = []
    for file in range(number_of_files):
        start = first + file * size
        path = folder / f"{file:03d}.tar"
        path.write_bytes(tar_bytes(pairs(range(start, start + size), as_json=file % 2 == 1)))
        files.append(str(path))
    return files


def rows(numbers, image="image", caption="caption"):
    """Columns of a table of these pictures."""
    return {image: [shade(number) for number in numbers], caption: [f"picture {number}" for number in numbers]}
