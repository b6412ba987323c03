"""Documents of the Hugging Face Hub: a sample of FineWeb-Edu, or any dataset, streamed.

Units as in sources.py. What the Hub was asked and answered is recorded in OUT_DIR/.parts/source.json by the
first of several ranks, and then in the manifest: a run that continues takes the same commit.
"""

import errno
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from topogpt.errors import UserError
from topogpt.files import inside, read_json, sha256, write_json, write_text
from topogpt.retry import PASSING, described, status, with_retries
from topogpt.terminal import say
from topogpt.text import sources
from topogpt.text.sources import Unit, no_column, plan, slug, stamp_of

FINEWEB = "HuggingFaceFW/fineweb-edu"
TOKENS_PER_BYTE = 0.3  # of FineWeb-Edu's parquet files, at least
LOG_SECONDS = 10  # between lines about a download
TRIES = 8  # of each call to the Hub
OTHER_SOURCES = "prepare files of your own with --source PATH, or set HF_ENDPOINT to a mirror of the Hub"

Done = Callable[[Unit], Any]  # its counts, where it is tokenised


class FineWeb:
    """A sample of FineWeb-Edu: its parquet files, downloaded in threads while those before are tokenised."""

    name = "fineweb-edu"

    def __init__(self, cfg: Any, done: Done) -> None:
        config, out = cfg.config or "sample-10BT", Path(cfg.out_dir)
        if not re.fullmatch(r"sample-\d+BT", config):
            raise UserError(f"config = {config} is no sample of {FINEWEB}; give sample-10BT or sample-100BT")
        self.parts, self.folder, self.done = out / ".parts", out / "source", done
        self.delete = cfg.delete_source and cfg.max_tokens is None  # else it may be read again, to be cut
        asked = {"dataset": FINEWEB, "config": config}
        self.description = recorded(cfg, asked, lambda: list_fineweb(config, cfg.revision))
        self.files = checked(self.description.get("files"), out)
        self.plans: dict[int, list[Unit]] = {}
        sizes = [file["size"] for file in self.files]
        enough = (cfg.max_tokens or math.inf) / TOKENS_PER_BYTE
        self.n_wanted = 1 + sum(end < enough for end in list(itertools.accumulate(sizes))[:-1])  # most likely
        self.total_weight = sum(sizes)
        self.text_bytes = int(1.8 * self.total_weight)
        wanted = sizes[: self.n_wanted]
        self.download_bytes = sum(sorted(wanted)[-3:] if self.delete else wanted)

    def origin(self, index: int) -> str:
        file = self.files[index]
        return f"{self.description['revision']} {file['path']} {file['size']} {file['sha256']} {self.delete}"

    def path(self, index: int) -> Path:
        return inside(self.folder, self.files[index]["path"])

    def plan_path(self, index: int) -> Path:
        return self.parts / f"{index:05d}.units.json"

    def read_plan(self, index: int) -> list[Unit] | None:
        """The units of a file that some rank has downloaded."""
        if index not in self.plans:
            planned, path = read_json(self.plan_path(index)), self.path(index)
            if planned.get("origin") != self.origin(index):
                return None
            stamp = stamp_of(path) if path.is_file() else None
            try:
                units = [replace(Unit(**unit), path=str(path), stamp=stamp) for unit in planned["units"]]
            except (KeyError, TypeError):
                return None
            if [unit.name for unit in units] != [f"{index:05d}-{i:05d}" for i in range(len(units))]:
                return None
            self.plans[index] = units
        return self.plans[index]

    def is_done(self, index: int) -> bool:
        planned = self.read_plan(index)
        return planned is not None and all(map(self.done, planned))

    def known_units(self) -> tuple[list[Unit], bool]:
        units: list[Unit] = []
        for index in range(len(self.files)):
            planned = self.read_plan(index)
            if planned is None:
                return units, False
            units += planned
        return units, True

    def units(self, rank: int, world: int) -> Iterator[Unit]:
        """Units of this rank's files, every world-th; each is downloaded while the one before is in work."""
        mine = range(rank, len(self.files), world)
        missing = [index for index in mine if not self.is_done(index)]
        downloads: dict[int, Future] = {}
        for index in mine:
            ahead = [i for i in missing if i > index and i < self.n_wanted][:1]
            for i in [index] * (index in missing) + ahead:
                if i not in downloads:
                    downloads[i] = in_thread(self.fetch, i)
            if index in downloads:
                wait_for(downloads[index], self.folder)
                units = plan(index, downloads[index].result(), self.origin(index), "text")
                content = {"origin": self.origin(index), "units": [asdict(unit) for unit in units]}
                write_json(self.plan_path(index), content, indent=None)
            yield from self.read_plan(index)

    def fetch(self, index: int) -> Path:
        """Download one file, continuing what is there of it, and check its size and SHA-256."""
        from huggingface_hub import hf_hub_download

        file, path = self.files[index], self.path(index)
        if path.is_file() and not difference(path, file):
            return path
        path.unlink(missing_ok=True)
        what = f"file {index + 1} of {len(self.files)}, {file['path']} ({file['size'] / 1e9:.2f} GB)"
        options = {"repo_type": "dataset", "revision": self.description["revision"], "local_dir": self.folder}

        def download() -> Path:
            got = Path(hf_hub_download(FINEWEB, file["path"], **options))
            if found := difference(got, file):
                got.unlink()
                raise OSError(f"{got} {found}")
            return got

        say(f"downloading {what}")
        return ask(what, download)

    def finished(self, unit: Unit) -> None:
        if self.delete and self.is_done(int(unit.name[:5])):
            Path(unit.path).unlink(missing_ok=True)


def difference(path: Path, file: dict) -> str | None:
    """What tells a file here from the Hub's; its SHA-256 is None where the Hub does not say it."""
    if (size := path.stat().st_size) != file["size"]:
        return f"has {size} bytes, not {file['size']}"
    if file["sha256"] and (found := sha256(path)) != file["sha256"]:
        return f"has the SHA-256 {found}, not {file['sha256']}"
    return None


def checked(files: Any, out: Path) -> list[dict]:
    """The list of files of a manifest or source.json, where it is as we write it."""
    kinds = {"path": str, "size": int, "sha256": str | None}
    try:
        for file in files:
            inside(out, file["path"])
            if wrong := [key for key, kind in kinds.items() if not isinstance(file[key], kind)]:
                raise TypeError(f"{wrong[0]} = {file[wrong[0]]!r:.80}")
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{out}/.parts/source.json or {out}/manifest.json do not list files as we write them"
        raise UserError(f"{problem} ({type(error).__name__}: {error}); delete {out}") from None
    return files


def wait_for(download: Future, folder: Path) -> None:
    """Wait for a file, and say now and then how much is there of those that are under way."""
    while not wait([download], timeout=LOG_SECONDS).done:
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*.incomplete") if path.is_file())
        say(f"downloading: {n_bytes / 1e9:.2f} GB are there of what is under way")


def in_thread(function: Callable[..., Any], *args: Any) -> Future:
    """Start a call in a thread that does not keep an interrupted process alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def list_fineweb(config: str, revision: str) -> dict:
    """Commit, and name, size and SHA-256 of each parquet file."""
    from huggingface_hub import HfApi

    folder, commit = config.replace("-", "/"), find_commit(FINEWEB, revision)
    options = {"repo_type": "dataset", "revision": commit, "recursive": True}
    what = f"list of the files of {FINEWEB}, {folder}"
    tree = ask(what, lambda: list(HfApi().list_repo_tree(FINEWEB, folder, **options)))
    files = [
        {"path": entry.path, "size": entry.size, "sha256": entry.lfs.sha256 if entry.lfs else None}
        for entry in sorted(tree, key=lambda entry: entry.path)
        if entry.path.endswith(".parquet")
    ]
    checked(files, Path(folder))
    if not files:
        raise UserError(f"{FINEWEB} at {commit} has no parquet file in {folder}; choose another --revision")
    return {"revision": commit, "files": files}


class Stream:
    """Any dataset of the Hub through the package `datasets`, streamed into files of a unit each."""

    download_bytes = text_bytes = total_weight = 0  # not known

    def __init__(self, cfg: Any, done: Done) -> None:
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise UserError(
                f'dataset = {cfg.dataset} needs the package `datasets`; run `pip install ".[data]"`, or '
                "download its files and give them as --source"
            ) from None
        self.dataset, self.text_column, self.done = cfg.dataset, cfg.text_column, done
        self.parts = Path(cfg.out_dir, ".parts")
        self.name = slug(cfg.dataset.rstrip("/").split("/")[-1])
        self.delete = cfg.max_tokens is None  # else a unit may be read again, to be cut
        self.n_seen = 0  # units known to be finished
        asked = {"dataset": cfg.dataset, "config": cfg.config, "split": cfg.split}
        self.description = recorded(cfg, asked, lambda: {"revision": find_commit(cfg.dataset, cfg.revision)})

    def unit(self, index: int) -> Unit:
        name, origin = f"{index:08d}", json.dumps([self.description, self.delete])
        path = str(self.parts / f"{name}.jsonl")
        return Unit(name=name, origin=origin, path=path, text_bytes=sources.UNIT_BYTES)

    def n_units(self) -> int | None:
        """How many there are, once the stream has been read to its end."""
        end = read_json(self.parts / "stream-end.json")
        n_units = end.get("n_units") if end.get("source") == self.description else None
        return n_units if type(n_units) is int and n_units >= 0 else None

    def known_units(self) -> tuple[list[Unit], bool]:
        """All units, where the end is known, else up to the first that is not finished."""
        n_units = self.n_units()
        if n_units is not None:
            return [self.unit(i) for i in range(n_units)], True
        while self.done(self.unit(self.n_seen)):
            self.n_seen += 1
        return [self.unit(i) for i in range(self.n_seen + 1)], False

    def units(self, rank: int, world: int) -> Iterator[Unit]:
        """Every world-th unit; the stream starts behind the first units that are finished."""
        index = n_rows = 0
        while counts := self.done(self.unit(index)):
            if index % world == rank:
                yield self.unit(index)
            index, n_rows = index + 1, n_rows + counts.n_rows
        if index == self.n_units():
            return
        for lines in self.batches(n_rows):
            unit = self.unit(index)
            if index % world == rank:
                if not self.done(unit):
                    write_text(Path(unit.path), "".join(lines))
                yield unit
            index += 1
        if rank == 0:
            write_json(self.parts / "stream-end.json", {"source": self.description, "n_units": index})

    def batches(self, n_skip: int) -> Iterator[list[str]]:
        """The rows behind the first n_skip, as JSON lines with id and text alone, UNIT_BYTES at a time."""
        lines, n_bytes = [], 0
        for i, row in enumerate(self.rows(n_skip)):
            if i == 0 and self.text_column not in row:
                raise no_column(f"the dataset {self.dataset}", self.text_column, list(row))
            kept = {key: row[key] for key in ("id", self.text_column) if key in row}
            lines.append(json.dumps(kept, default=lambda value: [str(type(value))]) + "\n")
            n_bytes += len(lines[-1])
            if n_bytes >= sources.UNIT_BYTES:
                yield lines
                lines, n_bytes = [], 0
        if lines:
            yield lines

    def rows(self, n_skip: int) -> Iterator[dict]:
        import datasets

        options = {key: self.description[key] for key in ("split", "revision")}
        try:
            config = self.description["config"]
            yield from datasets.load_dataset(self.dataset, config, streaming=True, **options).skip(n_skip)
        except Exception as error:  # of many libraries, depending on the dataset
            raise UserError(
                f"dataset = {self.dataset}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
                "correct --dataset, --config, --split; what is tokenised so far is kept"
            ) from None

    def finished(self, unit: Unit) -> None:
        if self.delete:
            Path(unit.path).unlink(missing_ok=True)


# ---- asking the Hub -------------------------------------------------------------------------------------


def recorded(cfg: Any, asked: dict, find: Callable[[], dict]) -> dict:
    """What a finished or interrupted run found on the Hub for the same request, else what is found now."""
    out = Path(cfg.out_dir)
    path = out / ".parts" / "source.json"
    for there in (read_json(out / "manifest.json").get("source"), read_json(path)):
        same = isinstance(there, dict) and there.items() >= asked.items()
        if same and cfg.revision in ("main", there["revision"]):
            return there
    stale, found = path.exists(), asked | find()
    if stale:
        path.unlink(missing_ok=True)
    write_json(path, found, first=True)  # of several ranks
    return read_json(path)


def find_commit(dataset: str, revision: str) -> str | None:
    if Path(dataset).exists():
        return None  # a folder, not of the Hub
    from huggingface_hub import HfApi

    what = f"revision {revision} of the dataset {dataset}"
    return ask(what, lambda: HfApi().dataset_info(dataset, revision=revision), 3).sha


def ask(what: str, call: Callable[[], Any], tries: int | None = None) -> Any:
    """Call until it works, since any error may pass but a refusal and a full disk; raises UserError."""
    tries = tries or TRIES
    try:
        return with_retries(what, call, tries=tries, may_pass=may_pass, say=say)
    except Exception as error:  # of huggingface_hub, its HTTP library or the file system
        if is_full(error):
            raise UserError(f"{what}: no space left on the disk; free some and run again") from None
        tried = remedy = ""
        if may_pass(error):
            tried = f" after {tries} tries"
            remedy = "check the network and run the same command again to continue, "
        problem = f"cannot be had from the Hub{tried} ({described(error)})"
        raise UserError(f"{what} {problem}; {remedy}{OTHER_SOURCES}") from None


def may_pass(error: Exception) -> bool:
    refused = 400 <= (status(error) or 0) < 500 and status(error) not in PASSING
    return not (refused or is_full(error) or type(error).__name__ == "OfflineModeIsEnabled")


def is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
