"""Compare what two commits compute, bit for bit: a script for changes that must change no value, not a test.

    python tests/compare_commits.py HEAD~1                # a commit, and the working tree this file lies in
    python tests/compare_commits.py v0.1 --new ../other   # and another working tree of the repository

The old commit is checked out into a temporary folder. Then both trees do the same side by side, one thread
each, on a text made here: prepare it, train (topographic, control, two ranks), export, analyse; two to four
minutes on two cores. A line for each thing compared says "same", or "DIFFERENT" with where and by how much.
Exit code: 0 all is the same; 1 not, or a command failed; 2 a mistake in the command line. Command lines and
files are all that this script knows of either tree: it imports no module of ours.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
PREPARE = "prepare_fineweb.py --source text --out_dir data --val_fraction 0.2 --shard_size 10000 --num_proc 1"
TRAIN = (
    "train.py configs/debug.yaml --train_data_dir data/train --val_data_dir data/val --val_tokens 4096 "
    f"--per_device_batch_size 4 --batch_size 8 --max_steps {STEPS} --eval_every 10 --log_every 1 "
    "--save_every 10 --device cpu"
)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
RUNS = {
    "topographic": f"{TRAIN} --run_name topographic",
    "control": f"{TRAIN} --run_name control --topo.loss none --model.dropout 0.1",  # whose draws count, too
    "two-ranks": f"{TORCHRUN} {TRAIN} --run_name two-ranks",
}
EXPORT = "export.py out/topographic"
ANALYSES = {  # by the name of their results
    "topography": "-m evals.topography out/topographic --no_figures",
    "contrasts-own": "-m evals.contrasts out/topographic --stimuli own.csv --conditions a b --no_figures",
    "activations": "-m evals.activations out/topographic --stimuli own.csv --no_figures",
}

# Where a tree's words differ from those above: (a file by which it is known, word, its words for it).
SPELLINGS: list[tuple[str, str, str]] = []

# All that two runs of one commit may differ in, and so is left out: what depends on time, commit or machine.
CLOCK = {"tokens_per_s", "memory_gb", "eta_s", "mfu"}  # fields of metrics.jsonl
CIRCUMSTANCES = {"written", "code"}  # fields of an analysis' JSON: time; commit, and whether it was changed
CARD = ("- Code: ", "- Started ")  # lines of an exported README.md: commit, and whether it was changed; time


class Side(NamedTuple):
    """One of the two that are compared."""

    name: str  # old or new
    code: Path  # its working tree
    folder: Path  # where its commands run: the paths that they are given, and record, are relative

    def words(self, command: str) -> list[str]:
        """The command in the words of this tree, with the full names of its scripts and configs."""
        own = {word: its_word for file, word, its_word in SPELLINGS if (self.code / file).exists()}
        words = " ".join(own.get(word, word) for word in command.split()).split()
        return [str(self.code / w) if w.endswith((".py", ".yaml")) else w for w in words]

    def environment(self) -> dict[str, str]:
        """One thread, modules and a cache of its own, no Hub, and no ranks but torchrun's."""
        left_out = ("PYTHON", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        modules = os.pathsep.join([str(self.folder / "site"), str(self.code)])
        own = {"PYTHONPATH": modules, "XDG_CACHE_HOME": str(self.folder / "cache")}
        return env | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class CommandFailed(Exception):
    """A command ended with an error, so that there is nothing left to compare."""


def compare(old: Side, new: Side) -> int:
    """Do everything on both sides; return how many things are different."""
    c = Comparison(old, new)
    c.run(PREPARE)
    c.folder("data", "*/*.bin", read_shard)
    c.file("data/manifest.json", read_json)
    for name, command in RUNS.items():
        c.run(command)
        c.file(f"out/{name}/metrics.jsonl", read_metrics)
        c.file(f"out/{name}/config.yaml", read_yaml, settings="")
        checkpoint = f"out/{name}/checkpoints/step-{STEPS:06d}"
        c.file(f"{checkpoint}/model.safetensors", load_file)
        c.file(f"{checkpoint}/optimizer.pt", read_optimizer)
        c.file(f"{checkpoint}/state.json", read_json, settings="")
    c.run(EXPORT)
    c.folder("out/topographic/hf", "**/*", read_exported)
    for name, command in ANALYSES.items():
        c.run(command)
        c.file(f"out/topographic/evals/{name}.json", read_analysis, settings="protocol.")
        c.file(f"out/topographic/evals/{name}.safetensors", load_file)
    print(f"{c.n_same} things are the same, {c.n_different} are different")
    return c.n_different


class Comparison:
    """Runs commands on both sides, and prints how what they leave compares."""

    def __init__(self, old: Side, new: Side) -> None:
        self.sides = (old, new)
        self.n_same = self.n_different = 0

    def run(self, command: str) -> None:
        """Run a command on both sides at once, a process each."""
        processes: list[subprocess.Popen] = []
        t0 = time.monotonic()
        try:
            for side in self.sides:
                processes.append(start(side, command))
            codes = [process.wait() for process in processes]
        finally:
            stop(processes)
        print(f"-- {command} ({time.monotonic() - t0:.0f} s)", flush=True)
        for side, code in zip(self.sides, codes, strict=True):
            if code:
                last = (side.folder / "output.txt").read_text(errors="replace").splitlines()[-5:]
                raise CommandFailed("\n".join([f"on the {side.name} side it ended with {code}:", *last]))

    def file(self, path: str, read: Callable[[Path], Any], settings: str | None = None) -> None:
        """Compare a file as `read` reads it.

        Settings, its keys that begin with `settings`, may be there on the new side alone: that is only said.
        """
        missing = [side.name for side in self.sides if not (side.folder / path).is_file()]
        if missing:
            return self.say(path, [f"missing: {', '.join(missing)}"])
        found = dict(differences(*(read(side.folder / path) for side in self.sides)))
        for where in [where for where, how in found.items() if how == ADDED]:
            if settings is not None and where.startswith(settings):
                print(f"only in new: {path}: {where}")
                del found[where]
        self.say(path, [f"{where}: {how}" for where, how in found.items()])

    def folder(self, folder: str, pattern: str, read: Callable[[Path], Any]) -> None:
        """Compare every file of this pattern that either side has."""
        there = {
            path.relative_to(side.folder).as_posix()
            for side in self.sides
            for path in (side.folder / folder).glob(pattern)
            if path.is_file()
        }
        for path in sorted(there) or [f"{folder}/{pattern}"]:
            self.file(path, read, settings="" if path.endswith(".yaml") else None)

    def say(self, path: str, found: list[str]) -> None:
        self.n_same, self.n_different = self.n_same + (not found), self.n_different + bool(found)
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        print(f"DIFFERENT: {path}: {'; '.join(found[:3])}{more}" if found else f"same: {path}", flush=True)


def start(side: Side, command: str) -> subprocess.Popen:
    """Start a command; what it prints goes to output.txt, and Ctrl-C to us alone."""
    with open(side.folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *side.words(command)],
            cwd=side.folder,
            env=side.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs: politely, as torchrun then ends its workers, and then by force."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- differences -------------------------------------------------------------------------------------------

ADDED, REMOVED = "only in new", "only in old"


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Where two values are not the same to the bit, and how."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{where}.{key}" if where else str(key)
            if key in old and key in new:
                yield from differences(old[key], new[key], place)
            else:
                yield place, REMOVED if key in old else ADDED
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield where, f"{len(old)} -> {len(new)} items"
        for i, pair in enumerate(zip(old, new, strict=False)):
            yield from differences(*pair, f"{where}[{i}]")
    elif isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            yield where, f"{old.dtype} {old.shape} -> {new.dtype} {new.shape}"
        elif old.tobytes() != new.tobytes():
            yield where, by_how_much(old, new)
    elif repr(old) != repr(new):  # which tells 1 from 1.0 and 0.0 from -0.0, and takes nan for itself
        if isinstance(old, str) and isinstance(new, str):
            same = max(0, len(os.path.commonprefix([old, new])) - 20)
            yield where, f"{old[same : same + 50]!r} -> {new[same : same + 50]!r}"
        else:
            numbers = all(isinstance(value, int | float) for value in (old, new))
            yield where, f"{old!r:.60} -> {new!r:.60}" + (f" (by {abs(new - old):.2g})" if numbers else "")


def by_how_much(old: np.ndarray, new: np.ndarray) -> str:
    old_bits, new_bits = (np.atleast_1d(x).view(f"V{x.itemsize}") for x in (old, new))
    at = np.argwhere(old_bits != new_bits)
    a, b = (np.atleast_1d(x)[tuple(at.T)] for x in (old, new))
    largest = np.abs(b.astype(float) - a.astype(float)).max()
    return f"{len(at)} of {old.size} by up to {largest:.2g}, first {at[0].tolist()}: {a[0]} -> {b[0]}"


# ---- reading -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> dict[str, list[str]]:
    return {"line": path.read_bytes().decode().split("\n")}


def read_shard(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "tokens": np.fromfile(path, dtype="<u2", offset=1024)}


def read_metrics(path: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in read_lines(path)["line"] if line]
    return {"record": [{k: v for k, v in record.items() if k not in CLOCK} for record in records]}


def read_optimizer(path: Path) -> Any:
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return plain(torch.load(path, map_location="cpu", weights_only=True))


def read_analysis(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(path).items() if key not in CIRCUMSTANCES}


def read_exported(path: Path) -> dict[str, Any]:
    """A file of an exported folder, every byte of it, but for what CLOCK and CARD name, and for settings."""
    if path.name == "metrics.jsonl":
        return read_metrics(path)
    if path.name == "training_config.yaml":
        return read_yaml(path)
    if path.name == "README.md":
        return {"line": [line for line in read_lines(path)["line"] if not line.startswith(CARD)]}
    if path.suffix in (".json", ".txt"):
        return read_lines(path)
    return {"sha256": sha256(path)} | (load_file(path) if path.suffix == ".safetensors" else {})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what both sides start from ----------------------------------------------------------------------------

WORDS = """the of and to in that it is was for on as with by at from this which be are not have one units
sheet cortex map layer neuron model learns token loss smooth neighbour distance pattern language word sentence
reads writes grows bright quiet river stone garden winter morning letter music ocean signal memory""".split()
PHRASES = (
    "units that fire together lie together",
    "the cortex is a sheet of neurons",
    "In the end, it's 3.14 times as long;",
    "caf\u00e9 na\u00efve \u6f22\u5b57 \U0001f9e0 <|endoftext|>",
    "\n\n    for i in range(10):\n        print(i)\n",
)
# An environment may have this package installed from another working tree, whose modules no side may borrow.
SITE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""


def write_inputs(folder: Path) -> None:
    """A text of some 30,000 tokens, so that a second epoch begins within 30 steps, and items to contrast."""
    draw = random.Random(0)

    def sentence() -> str:
        words = draw.choices(WORDS, k=draw.randint(4, 16)) + [draw.choice(PHRASES)] * draw.randint(0, 1)
        return " ".join(words).capitalize() + "."

    def document() -> str:
        return " ".join(sentence() for _ in range(draw.randint(1, 40)))

    for name in ("text", "site"):
        (folder / name).mkdir(parents=True)
    rows = "".join(json.dumps({"id": f"<urn:{i}>", "text": document()}) + "\n" for i in range(90))
    (folder / "text" / "documents.jsonl").write_text(rows, encoding="utf-8")
    (folder / "text" / "notes.txt").write_text("\n\n".join(document() for _ in range(4)), encoding="utf-8")
    with open(folder / "own.csv", "w", newline="", encoding="utf-8") as file:
        items = [(f"{sentence()} {condition}", condition) for _ in range(12) for condition in "abc"]
        csv.writer(file).writerows([("item", "condition"), *items])
    (folder / "site" / "sitecustomize.py").write_text(SITE)


def copy_vocabulary(cache: Path) -> None:
    """GPT-2's vocabulary from the user's cache; where it is not there, each side fetches it for itself."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "topogpt")
    (cache / "topogpt").mkdir(parents=True)
    for path in (users / "vocab.bpe", users / "encoder.json"):
        if path.is_file():
            shutil.copy(path, cache / "topogpt")


# ---- the command line --------------------------------------------------------------------------------------


def git(tree: Path, *arguments: str) -> str | None:
    """What git prints, None where it fails."""
    done = subprocess.run(["git", "-C", tree, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@contextlib.contextmanager
def temporary_folder(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def checked_out(tree: Path, commit: str, folder: Path) -> Iterator[Path]:
    """A working tree of a commit, which is gone afterwards."""
    try:
        if git(tree, "worktree", "add", "--detach", str(folder), commit) is None:
            raise CommandFailed(f"git worktree add {folder} {commit}")
        yield folder
    finally:
        git(tree, "worktree", "remove", "--force", "--force", str(folder))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="compare_commits.py", description="Compare what two commits compute."
    )
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("--new", type=Path, default=ROOT, help="a working tree; default: that of this file")
    parser.add_argument("--keep", action="store_true", help="keep what the commands wrote, and say where")
    args = parser.parse_args()
    new = args.new.resolve()
    if git(new, "rev-parse", "--show-toplevel") != str(new):
        parser.error(f"--new {args.new} is not the top of a working tree of git")
    commit = git(new, "rev-parse", "--verify", "--quiet", f"{args.old}^{{commit}}")
    if commit is None:
        parser.error(f"OLD = {args.old} is no commit of {new}")
    changed = ", with changes" if git(new, "status", "--porcelain") else ""
    head = git(new, "rev-parse", "--short=12", "HEAD")
    print(f"old: {commit[:12]}; new: {new} ({head}{changed})", flush=True)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with temporary_folder(args.keep) as folder, checked_out(new, commit, folder / "code") as code:
            sides = Side("old", code, folder / "old"), Side("new", new, folder / "new")
            for side in sides:
                write_inputs(side.folder)
                copy_vocabulary(side.folder / "cache")
            return 1 if compare(*sides) else 0
    except CommandFailed as failure:
        print(f"FAILED: {failure}", flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
