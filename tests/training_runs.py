"""Small trainings that the tests of training run: pictures in memory, tiny U-Nets, interruptions at will."""

from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from minimagen_fast import checkpoint
from minimagen_fast.Imagen import Imagen
from minimagen_fast.ranks import Ranks
from minimagen_fast.snapshots import Snapshots
from minimagen_fast.training import (
    MinimagenCollator,
    MinimagenTrain,
    create_directory,
    get_minimagen_parser,
)
from minimagen_fast.Unet import BaseTest, SuperTest


class Pictures(Dataset):
    """Random pictures in memory; those in `missing` could not be had."""

    def __init__(self, number=8, size=16, missing=(), seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.missing = missing
        self.items = [
            {
                "image": torch.rand(3, size, size, generator=generator),
                "encoding": torch.randn(1, 3, 512, generator=generator),
                "mask": torch.ones(1, 3, dtype=torch.bool),
            }
            for _ in range(number)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return None if index in self.missing else dict(self.items[index])


def make_imagen(stages=1, **options):
    torch.manual_seed(0)
    smallest = {"dim_mults": (1,), "num_resnet_blocks": 0}
    unets = [BaseTest(**smallest), SuperTest(lowres_cond=True, **smallest)][:stages]
    settings = {"text_encoder_name": "t5_small", "image_sizes": (8, 16)[:stages], "timesteps": 25}
    return Imagen(unets, **{**settings, **options})


class Adapting(Imagen):
    """Learns a layer of its own, and has one that is frozen."""

    def __init__(self):
        torch.manual_seed(0)
        unet = BaseTest(dim_mults=(1,), num_resnet_blocks=0)
        super().__init__(unet, text_encoder_name="t5_small", image_sizes=8, timesteps=25)
        self.adapter, self.frozen = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512).requires_grad_(False)

    def forward(self, images, *, text_embeds, **options):
        return super().forward(images, text_embeds=self.adapter(self.frozen(text_embeds)), **options)


class Run:
    """What MinimagenTrain needs, at a size that trains in no time; the same every time it is made."""

    def __init__(self, folder, stages=1, data=None, valid=None, imagen=None, optimizer="adam", loader=None, **args):
        self.folder = Path(folder)
        self.imagen = make_imagen(stages) if imagen is None else imagen
        kinds = {
            "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
            "fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        }
        self.optimizer = kinds[optimizer](self.imagen.parameters())
        data = Pictures() if data is None else data
        valid = Pictures(2, seed=2) if valid is None else valid
        options = {"batch_size": 2, "shuffle": True, "collate_fn": MinimagenCollator("cpu"), **(loader or {})}
        self.train_loader = DataLoader(data, **options)
        self.valid_loader = DataLoader(valid, batch_size=2, collate_fn=MinimagenCollator("cpu")) if len(valid) else []
        self.args = Namespace(**{**vars(get_minimagen_parser().parse_args([])), "EPOCHS": 1, **args})

    def train(self, timestamp="1", timeout=60, **options):
        torch.manual_seed(7)
        result = MinimagenTrain(
            timestamp,
            self.args,
            list(self.imagen.unets),
            self.imagen,
            self.train_loader,
            self.valid_loader,
            create_directory(self.folder),
            self.optimizer,
            timeout,
            **{"progress": False, **options},
        )
        assert result is None
        return self

    @property
    def weights(self):
        return {name: value.detach().clone() for name, value in self.imagen.state_dict().items()}

    @property
    def log(self):
        return (self.folder / "training_progess.txt").read_text()

    def file(self, name):
        return checkpoint.load(self.folder / name)


def identical(one, other):
    """Whether two nested states are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


def state_of(directory):
    """All that is in the newest checkpoint of a training directory."""
    saved = Snapshots(Path(directory) / "checkpoints", Ranks()).newest()
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved.tensors().items()}
    saved.read_into(tensors, Ranks())
    return {**saved.values, "own": saved.own, "tensors": tensors}


class Interruption(Exception):
    pass


def interrupt_at(epoch, batch, error=Interruption):
    def callback(step):
        if (step.epoch, step.batch) == (epoch, batch):
            raise error("now")

    return callback
