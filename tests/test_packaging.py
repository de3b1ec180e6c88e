"""The package works from a bare checkout, an editable install, a wheel and an sdist, and holds what it should.

Everything is built and installed from a copy of the checkout, without a network: by the setuptools of the running
environment, into new environments that borrow its other packages.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minimagen_fast

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("Imagen", "Unet", "diffusion_model", "layers", "helpers", "t5", "training", "generate", "kernels")

IMPORT_ALL = f"""
import importlib, importlib.util, minimagen_fast
for name in {MODULES!r}:
    importlib.import_module("minimagen_fast." + name)
print(minimagen_fast.__file__, importlib.util.find_spec("kernels") is not None)
"""


def run(*words, cwd: Path) -> str:
    # Without PYTHONPATH: it would lend the checkout to every environment below.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """What ``pip`` does to build, but with the setuptools that is here."""
    target.mkdir(exist_ok=True)
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", program, cwd=source)
    (built,) = target.iterdir()
    return built


class Environment:
    """A new virtual environment that sees the packages of the running one after its own."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python, self.command = scripts / "python", scripts / "minimagen-fast"
        self.packages = Path(
            run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        )
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        # A path file adds folders at the end, and does not run the path files in them: an editable install of the
        # checkout in the running environment has no effect here.
        (self.packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")

    def install(self, *what) -> None:
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *offline, *what, cwd=self.packages)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout, symlink included, since building leaves traces."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for name in ("minimagen_fast", "kernels", "tests", ".ci"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel") / "built")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.install(wheel)
    return environment


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {
        f"{package}/{path.name}": path.read_bytes()
        for package in ("minimagen_fast", "minimagen_fast/kernels")
        for path in (ROOT / package).glob("*.py")
    }
    assert contents(wheel) == expected
    assert len([name for name in expected if "/kernels/" in name]) > 1


def test_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert "minimagen-fast = minimagen_fast.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("minimagen_fast", minimagen_fast.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    required = metadata.get_all("Requires-Dist")
    always = {re.split(r"[^a-z_]", line)[0] for line in required if "extra ==" not in line}
    assert always == set(
        "torch triton transformers sentencepiece protobuf einops pillow tqdm numpy safetensors huggingface_hub".split()
    )
    assert any(line.startswith("triton") and "platform_system" in line for line in required)
    extras = {"xformers", "data", "tensorboard", "report", "test", "bench", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path, members=members)
    (unpacked,) = {member.name.split("/")[0] for member in members}
    assert all(member.isreg() or member.isdir() for member in members), "no links"
    names = {member.name.partition("/")[2] for member in members if member.isreg()}
    assert {"LICENSE", "README.md", "constraints.txt", "CHANGELOG.md", "tests/conftest.py", ".ci/run"} <= names
    assert not any(name.startswith("kernels/") for name in names)
    assert contents(build("wheel", tmp_path / unpacked, tmp_path / "wheel")) == contents(wheel)


def test_the_installed_wheel(installed, source, tmp_path):
    place = installed.packages / "minimagen_fast" / "__init__.py"
    assert run(installed.python, "-c", IMPORT_ALL, cwd=tmp_path).split() == [str(place), "False"]
    # At the root of the checkout, where Python puts the working directory first and so takes the checkout; -I leaves
    # that out (-P, which does nothing else, is new in Python 3.11).
    assert run(installed.python, "-I", "-c", IMPORT_ALL, cwd=source).split() == [str(place), "False"]


def test_the_installed_command(installed, source):
    """The console script is not in the working directory, so it takes the installed package everywhere."""
    version = f"minimagen_fast {minimagen_fast.__version__}"
    assert run(installed.command, "--version", cwd=source).strip() == version
    assert run(installed.python, "-m", "minimagen_fast", "--version", cwd=installed.packages).strip() == version


def test_a_bare_checkout(source, tmp_path):
    environment = Environment(tmp_path / "environment")
    place = source / "minimagen_fast" / "__init__.py"
    assert run(environment.python, "-c", IMPORT_ALL, cwd=source).split()[0] == str(place)


def test_an_editable_install(source, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install("--editable", source)
    place = source / "minimagen_fast" / "__init__.py"
    assert run(environment.python, "-c", IMPORT_ALL, cwd=tmp_path).split() == [str(place), "False"]


def test_transformers_works_at_the_root_of_the_checkout(source):
    """It looks for a package ``kernels`` that is not ours, but has our name, and finds ours there."""
    program = "import minimagen_fast.kernels; from transformers import T5EncoderModel; print(T5EncoderModel.__name__)"
    assert run(sys.executable, "-c", program, cwd=source).strip() == "T5EncoderModel"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_constraints_fit_the_requirements(wheel, python):
    """Whatever the package asks for, extras included, has one exact version on every Python, and one that will do."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    here = {"python_version": python, "platform_system": "Linux"}
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate(here)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins), "no package twice"
    for requirement in map(Requirement, required):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
