"""Programs written for minimagen run unchanged: their imports, their surroundings, a whole training and generation."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from picture_server import serving
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DROPIN = ("-m", "minimagen_fast.dropin")
DOCUMENTED = ("Imagen", "Unet", "diffusion_model", "layers", "helpers", "t5", "training", "generate")


def run(*words, cwd: Path, path: tuple[Path, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    """Runs Python in `cwd`; minimagen_fast is found wherever that is, installed or not."""
    search = os.pathsep.join(map(str, (*path, ROOT)))
    variables = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=240
    )


def output(*words, **options) -> str:
    done = run(*words, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(folder: Path, text: str, name: str = "program.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def other_minimagen(tmp_path) -> Path:
    """A folder with an installed package minimagen that is not ours."""
    package = tmp_path / "site" / "minimagen"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("other = True\n")
    (package / "Unet.py").write_text("other = True\n")
    return package.parent


IMPORTS = f"""
import importlib, pickle, sys
import minimagen, minimagen_fast
from minimagen.Unet import Unet, Base
from minimagen import Imagen, Unet as unet_module

assert minimagen is minimagen_fast
for name in {DOCUMENTED!r}:
    module = importlib.import_module("minimagen." + name)
    assert module is importlib.import_module("minimagen_fast." + name), name
    assert getattr(minimagen, name) is module and module.__spec__.name == module.__name__ == "minimagen_fast." + name
    assert importlib.util.find_spec("minimagen." + name).origin == module.__file__
assert unet_module is sys.modules["minimagen_fast.Unet"] and unet_module.Unet is Unet
assert Imagen is minimagen_fast.Imagen
assert pickle.loads(pickle.dumps(Base)) is Base
assert pickle.loads(b"cminimagen.Unet\\nBase\\n.") is Base, "a pickle that was made with minimagen"
# It takes longer than all else together.
assert "torch._dynamo" not in sys.modules
print("same", len(pickle.dumps(Base)))
"""


def test_every_documented_module_is_the_same_object(tmp_path, other_minimagen):
    done = output(*DROPIN, script(tmp_path, IMPORTS), cwd=tmp_path, path=(other_minimagen,))
    assert done.startswith("same ")


def test_the_first_line_does_the_same(tmp_path, other_minimagen):
    program = script(tmp_path, "import minimagen_fast.dropin\n" + IMPORTS)
    assert output(program, cwd=tmp_path, path=(other_minimagen,)).startswith("same ")


def test_importing_it_is_light(tmp_path):
    loaded = output(
        "-c",
        "import minimagen_fast.dropin, minimagen, sys; print(*(m.split('.')[0] for m in sys.modules))",
        cwd=tmp_path,
    ).split()
    assert "minimagen" in loaded and not {"torch", "numpy", "PIL", "transformers"} & set(loaded)


def test_an_imported_minimagen_is_not_replaced(tmp_path, other_minimagen):
    done = run("-c", "import minimagen\nimport minimagen_fast.dropin", cwd=tmp_path, path=(other_minimagen,))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: minimagen has already been imported from ")
    assert str(other_minimagen) in last and "import minimagen_fast.dropin" in last


@pytest.mark.parametrize("name", ["minimagen.nowhere", "minimagen.helpers.nowhere"])
def test_an_unknown_module_is_named(tmp_path, name):
    program = (
        f"import minimagen_fast.dropin\ntry:\n    import {name}\nexcept ModuleNotFoundError as e:\n    print(e.name, e)"
    )
    name_given, message = output("-c", program, cwd=tmp_path).split(" ", 1)
    assert name_given == name and f"No module named '{name}'" in message


def test_an_error_within_a_module_comes_out_as_it_is(tmp_path):
    """A dependency that is missing must not look like a missing minimagen."""
    program = "import sys; sys.modules['torch'] = None\nimport minimagen_fast.dropin\nimport minimagen.Unet"
    last = run("-c", program, cwd=tmp_path).stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ") and "torch" in last and "minimagen" not in last


SURROUNDINGS = """# -*- coding: latin-1 -*-
import atexit, inspect, os, sys, threading

def here():
    return sys.modules["__main__"].here is here

atexit.register(lambda: print("at exit", here()))
print(sys.argv, sys.path[0], __file__, __name__, __package__, __spec__, __doc__, os.getcwd(), type(__builtins__))
print(here(), "main" in repr(sys.modules["__main__"]), inspect.getsource(here), "\xe9".encode())
threading.Timer(0.1, lambda: print("thread", here())).start()
"""


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "sys.exit(3)",
        "sys.exit('a message')",
        "raise SystemExit",
        "os._exit(7)",
        "def inner():\n    raise OSError(2)\ntry:\n    inner()\nexcept OSError as e:\n    raise KeyError(1) from e",
        "raise KeyboardInterrupt",
        "assert False, 'no'",
        "def broken(:",
        "sys.excepthook = lambda *error: print('mine', error[0].__name__)\n1 / 0",
    ],
)
def test_a_program_runs_as_with_plain_python(tmp_path, ending):
    (tmp_path / "programs").mkdir()
    program = tmp_path / "programs" / "program.py"
    program.write_bytes((SURROUNDINGS + ending).encode("latin-1"))
    for words in (["programs/program.py", "-m", "--", "-h", "a b"], [program]):
        plain, ours = run(*words, cwd=tmp_path), run(*DROPIN, *words, cwd=tmp_path)
        assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_a_program_that_is_not_there(tmp_path):
    plain, ours = run("nowhere.py", cwd=tmp_path), run(*DROPIN, "nowhere.py", cwd=tmp_path)
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr) and ours.returncode == 2


def test_usage(tmp_path):
    for words in ([], ["--unknown"], ["-m"]):
        done = run(*DROPIN, *words, cwd=tmp_path)
        assert done.returncode == 2 and "minimagen_fast.dropin SCRIPT [ARGS...]" in done.stderr
    assert "minimagen_fast.dropin SCRIPT [ARGS...]" in output(*DROPIN, "--help", cwd=tmp_path)


def test_a_module_in_place_of_a_script(tmp_path):
    script(tmp_path, "import minimagen, sys; print(minimagen.__name__, __name__, sys.argv[1:])", "program.py")
    assert output(*DROPIN, "-m", "program", "-x", cwd=tmp_path) == "minimagen_fast __main__ ['-x']\n"


LATE = """
import atexit, sys, threading

def here():
    return sys.modules["__main__"].here is here

atexit.register(lambda: print("at exit", here()))
threading.Timer(0.1, lambda: print("thread", here())).start()
print(sys.argv, __name__, __spec__.name, type(__builtins__).__name__)
"""


def test_what_a_module_leaves_running_finds_it(tmp_path):
    script(tmp_path, LATE)
    plain, ours = (output(*words, "-m", "program", "-x", cwd=tmp_path) for words in ([], DROPIN))
    assert ours == plain and "thread True\nat exit True\n" in ours


def test_modules_by_the_other_name_in_place_of_a_script(tmp_path):
    assert "usage: minimagen-fast" in output(*DROPIN, "-m", "minimagen", "--help", cwd=tmp_path)
    done = run(*DROPIN, "-m", "minimagen.nowhere", cwd=tmp_path)
    assert done.returncode == 1 and "No module named minimagen.nowhere" in done.stderr


WORKERS = """
import multiprocessing, sys
import minimagen

class Thing:
    pass

def work(thing):
    import minimagen.helpers
    assert type(thing) is Thing
    return minimagen.helpers.__name__

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(work, [Thing()]))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind(tmp_path, method):
    # A stand-in for minimagen_fast.helpers, which imports torch: this is about who finds what, and three times faster.
    package = tmp_path / "site" / "minimagen_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text("")
    (package / "dropin.py").write_bytes((ROOT / "minimagen_fast" / "dropin.py").read_bytes())
    program = script(tmp_path, WORKERS)
    assert output(*DROPIN, program, method, cwd=tmp_path, path=(package.parent,)) == "['minimagen_fast.helpers']\n"
    program = script(tmp_path, "import minimagen_fast.dropin\n" + WORKERS)
    assert output(program, method, cwd=tmp_path, path=(package.parent,)) == "['minimagen_fast.helpers']\n"


# A training as the documentation of minimagen shows it: its imports, its calls, its order.
TRAIN = """
import os
from datetime import datetime

import torch.utils.data
from torch import optim

from minimagen.Imagen import Imagen
from minimagen.Unet import Unet, Base, Super, BaseTest, SuperTest
from minimagen.generate import load_minimagen, load_params
from minimagen.t5 import get_encoded_dim
from minimagen.training import (
    ConceptualCaptions, MinimagenTrain, create_directory, get_default_args, get_minimagen_dl_opts, get_minimagen_parser,
    get_model_params, get_model_size, load_restart_training_parameters, load_testing_parameters, save_training_info,
)

device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
args = load_testing_parameters(get_minimagen_parser().parse_args())

timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")
training_dir = create_directory(f"./training_{timestamp}")

train_dataset, valid_dataset = ConceptualCaptions(args, smalldata=True)
options = {**get_minimagen_dl_opts(device), "batch_size": args.BATCH_SIZE, "num_workers": args.NUM_WORKERS}
train_dataloader = torch.utils.data.DataLoader(train_dataset, **options)
valid_dataloader = torch.utils.data.DataLoader(valid_dataset, **options)

unets_params = [get_default_args(BaseTest), get_default_args(SuperTest)]
unets = [Unet(**unet_params).to(device) for unet_params in unets_params]
imagen_params = dict(
    image_sizes=(int(args.IMG_SIDE_LEN / 2), args.IMG_SIDE_LEN),
    timesteps=args.TIMESTEPS,
    cond_drop_prob=0.15,
    text_encoder_name=args.T5_NAME,
)
imagen = Imagen(unets=unets, **imagen_params).to(device)

unets_params = [{**get_default_args(Unet), **params} for params in unets_params]
imagen_params = {**get_default_args(Imagen), **imagen_params}
save_training_info(args, timestamp, unets_params, imagen_params, get_model_size(imagen), training_dir)

optimizer = optim.Adam(imagen.parameters(), lr=args.OPTIM_LR)
MinimagenTrain(
    timestamp, args, unets, imagen, train_dataloader, valid_dataloader, training_dir, optimizer, timeout=30
)
"""

GENERATE = """
from argparse import ArgumentParser
from minimagen.generate import load_minimagen, sample_and_save

parser = ArgumentParser()
parser.add_argument("-d", "--TRAINING_DIRECTORY", dest="TRAINING_DIRECTORY", help="where the training went", type=str)
args = parser.parse_args()

captions = ["a happy dog", "a sad cat"]
sample_and_save(captions, training_directory=args.TRAINING_DIRECTORY)

minimagen = load_minimagen(args.TRAINING_DIRECTORY)
sample_and_save(captions[:1], minimagen=minimagen, save_directory="again")
"""

# In place of the package that would fetch the list of addresses and captions.
DATASETS = """
import json

class Split:
    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["image_url"])

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}

    def select(self, indices):
        return Split({name: [column[index] for index in indices] for name, column in self.columns.items()})

def load_dataset(name):
    assert "conceptual_captions" in name, name
    with open(__file__.replace("datasets.py", "rows.json")) as file:
        return {split: Split(columns) for split, columns in json.load(file).items()}
"""


def save_small_t5(folder: Path) -> None:
    """A T5 like t5-small, 512 wide, but of one layer and with random weights."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from minimagen_fast.tiny_t5 import embedded_t5_directory

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded_t5_directory() / name).read_bytes())
    words = len(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=words, d_model=512, num_layers=1, num_heads=2, d_ff=64)).save_pretrained(folder)


def test_the_documented_training_and_generation(tmp_path, other_minimagen):
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    script(fakes, DATASETS, "datasets.py")
    save_small_t5(tmp_path / "t5-small")
    train, generate = script(tmp_path, TRAIN, "train.py"), script(tmp_path, GENERATE, "generate.py")

    with serving() as server:
        names = ["rgb", "jpeg", "grey", "missing", "palette"] * 4
        rows = {
            "image_url": [server.url + name for name in names],
            "caption": [f"a picture of {name} number {i}" for i, name in enumerate(names)],
        }
        (fakes / "rows.json").write_text(json.dumps({"train": rows, "validation": rows}))
        surroundings = {"path": (fakes, other_minimagen), "NO_PROXY": "127.0.0.1"}
        output(*DROPIN, train, "--CHCKPT_NUM", 3, "-vn", 2, cwd=tmp_path, **surroundings)
        assert {"rgb", "jpeg", "grey", "palette"} <= set(server.requests)

    (directory,) = tmp_path.glob("training_*")
    (timestamp,) = re.findall(r"training_(\d{8}_\d{6})$", directory.name)
    for index in (0, 1):
        assert (directory / "state_dicts" / f"unet_{index}_state_{timestamp}.pth").is_file()
        assert (directory / "tmp" / f"unet_{index}_tmp.pth").is_file()
        params = json.loads((directory / "parameters" / f"unet_{index}_params_{timestamp}.json").read_text())
        assert params["dim"] == 8
    assert json.loads((directory / "parameters" / f"imagen_params_{timestamp}.json").read_text())["image_sizes"] == [
        64,
        128,
    ]
    arguments = (directory / "parameters" / f"training_parameters_{timestamp}.txt").read_text()
    assert "--T5_NAME=t5_small\n" in arguments and "--CHCKPT_NUM=3\n" in arguments
    progress = (directory / "training_progess.txt").read_text()
    losses = [float(x) for x in re.findall(r"\d+\.\d+", progress.partition("Epoch 2 ")[2])]
    assert losses and all(0 < loss < 10 for loss in losses)

    output(*DROPIN, generate, "-d", directory.name, cwd=tmp_path, **surroundings)
    (images,) = tmp_path.glob("generated_images_*")
    assert (images / "captions.txt").read_text() == "a happy dog\na sad cat\n"
    assert (images / "imagen_training_directory.txt").read_text() == directory.name
    for path in (images, tmp_path / "again"):
        with Image.open(path / "generated_images" / "image_0.png") as image:
            assert image.size == (128, 128) and len(set(image.convert("L").tobytes())) > 20
    assert (images / "generated_images" / "image_1.png").is_file()
    assert not (tmp_path / "again" / "imagen_training_directory.txt").exists()


def test_objects_travel_between_the_two_names(tmp_path):
    """What a program saved under one name is read by one that uses the other."""
    saved = script(
        tmp_path, "import minimagen.Unet as u, pickle\npickle.dump(u.SuperTest, open('class.pkl', 'wb'))", "save.py"
    )
    output(*DROPIN, saved, cwd=tmp_path)
    from minimagen_fast.Unet import SuperTest

    assert pickle.loads((tmp_path / "class.pkl").read_bytes()) is SuperTest
