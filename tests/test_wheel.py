"""What pip installs: the package whole, and nothing but it. Run: pytest tests/test_wheel.py"""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import tiny

import topogpt


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds what the wheel holds, built without a network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    skip = shutil.ignore_patterns(".*", "out", "data", "build", "*.egg-info", "__pycache__", "wandb")
    shutil.copytree(tiny.ROOT, source, ignore=skip, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    command = [*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("topogpt-*.whl")
    assert wheel.name == f"topogpt-{topogpt.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site


def files_of(folder) -> set[str]:
    """Everything but caches and notes of the file system."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if "__pycache__" not in path and not path.endswith(".DS_Store")}


def test_it_holds_the_package_with_its_data_and_nothing_else(site):
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"topogpt"}
    there = files_of(site / "topogpt")
    assert "py.typed" in there and there == files_of(tiny.ROOT / "topogpt")


def test_it_works_from_another_folder(site, tmp_path):
    code = "import sys, topogpt; print(topogpt.__file__, 'torch' in sys.modules)\n"
    code += "topogpt.SpatialLoss(topogpt.positions('permuted', 144, 0, 'a'), radius=2); topogpt.load"
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout == f"{site / 'topogpt' / '__init__.py'} False\n", done.stderr
