"""Inputs and weights of the golden vectors, each made from its own name."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def fill(name: str, shape, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    values = _random(name).standard_normal(tuple(shape)) * scale + shift
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def times(name: str, batch: int, high: int) -> torch.Tensor:
    return torch.from_numpy(_random(name).randint(0, high, size=(batch,))).long()


def text(name: str, batch: int, words: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(words)[None] < (words - torch.arange(batch) % words)[:, None]
    return fill(name, (batch, words, dim)) * mask[:, :, None], mask


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), arrays(name)


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def set_weights(unet: torch.nn.Module) -> None:
    """Give a U-Net the weights of the golden vectors."""
    gains = (".gamma", "groupnorm.weight", "norm_cond.weight", "to_text_non_attn_cond.0.weight", ".g")
    state = {}
    for key, value in unet.state_dict().items():
        special = key.startswith("null_text_") or key.endswith("null_kv") or key.endswith(".g")
        if value.ndim >= 2 and not special:
            state[key] = fill(key, value.shape, (value.numel() / value.shape[0]) ** -0.5)
        elif key == "norm_cond.weight" or key.endswith(gains):
            state[key] = fill(key, value.shape, 0.1, 1.0)
        elif key.endswith(".beta"):
            state[key] = torch.zeros_like(value)
        else:
            state[key] = fill(key, value.shape, 0.1)
    unet.load_state_dict(state)
