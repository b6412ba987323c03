"""Preparation from the Hub: what is downloaded and recorded, what goes wrong there, and streamed datasets.

pytest tests/text/test_hub_sources.py
"""

import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
from texts import ROOT, arguments, bytes_of, check_against_naive, make_documents, run, write_parquet

import prepare_fineweb
from topogpt import retry
from topogpt.errors import UserError
from topogpt.text import hub_sources


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    texts.small_units(monkeypatch)


class Refusal(OSError):
    """As huggingface_hub raises them."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"{status} from the Hub")
        self.response = types.SimpleNamespace(status_code=status, headers=headers)


class Hub:
    """Three parquet files under two commits, and a list of what goes wrong next."""

    def __init__(self, folder: Path) -> None:
        self.documents = make_documents(600)
        self.paths = {}
        for i in range(3):
            path = write_parquet(folder / f"{i}.parquet", self.documents[200 * i : 200 * i + 200])
            self.paths[f"sample/10BT/{i:03d}_00000.parquet"] = path
        self.commit = "a" * 40
        self.troubles: list[Exception | str] = []
        self.downloads: list[tuple[str, str]] = []

    def dataset_info(self, repo, *, revision):
        if self.troubles:
            raise self.troubles.pop(0)
        return types.SimpleNamespace(sha=self.commit)

    def list_repo_tree(self, repo, folder, **options):
        entry = types.SimpleNamespace
        yield entry(path=f"{folder}/README.md", size=3, lfs=None)
        for name, path in reversed(self.paths.items()):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            yield entry(path=name, size=path.stat().st_size, lfs=entry(sha256=sha256))

    def download(self, repo, name, *, repo_type, revision, local_dir):
        trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, Exception):
            raise trouble
        data = self.paths[name].read_bytes()
        target = Path(local_dir, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data[:-10] if trouble == "cut" else data)
        self.downloads.append((revision, name))
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    hub.slept = []
    monkeypatch.setattr(retry.time, "sleep", hub.slept.append)
    return hub


def test_fineweb_is_downloaded_and_tokenised_with_its_commit_recorded(tmp_path, hub, gpt2):
    manifest = run(tmp_path / "out")
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)
    assert manifest["source"]["dataset"] == "HuggingFaceFW/fineweb-edu"
    assert manifest["source"]["config"] == "sample-10BT"
    assert manifest["source"]["revision"] == "a" * 40
    assert {revision for revision, _ in hub.downloads} == {"a" * 40} and len(hub.downloads) == 3
    assert len(list((tmp_path / "out" / "source").rglob("*.parquet"))) == 3


def test_delete_source_deletes_each_downloaded_file(tmp_path, hub, gpt2):
    manifest = run(tmp_path / "out", "--delete_source")
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_trouble_with_the_hub_is_waited_out_as_the_server_asks(tmp_path, hub, gpt2):
    hub.troubles = [Refusal(429, **{"Retry-After": "17"}), ConnectionError("reset")]
    hub_list = hub.list_repo_tree
    hub.list_repo_tree = lambda *args, **options: (
        hub.troubles.extend([Refusal(503), "cut"]) or hub_list(*args, **options)
    )
    manifest = run(tmp_path / "out")
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)
    assert hub.slept[:2] == [17, 4] and len(hub.slept) == 4


def test_a_hub_that_refuses_or_is_not_there_is_one_line_with_remedies(tmp_path, hub):
    hub.troubles = [Refusal(401)]
    with pytest.raises(UserError, match="cannot be had from the Hub.*401.*--source PATH.*HF_ENDPOINT"):
        run(tmp_path / "out")
    assert not hub.slept
    hub.troubles = [ConnectionError("no route\nto host")] * 3
    with pytest.raises(UserError, match="after 3 tries .ConnectionError: no route to host"):
        run(tmp_path / "out")


def test_a_restart_keeps_the_commit_and_the_finished_files(tmp_path, hub, gpt2, monkeypatch):
    assert run(tmp_path / "undisturbed")["source"]["revision"] == "a" * 40
    good = hub.paths["sample/10BT/002_00000.parquet"]
    monkeypatch.setattr(hub_sources, "TRIES", 1)
    download, hub.downloads = hub.download, []

    def fail_at_the_third(repo, name, **options):
        if name.endswith("002_00000.parquet"):
            raise Refusal(404)
        return download(repo, name, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail_at_the_third)
    with pytest.raises(UserError, match=r"file 3 of 3, sample/10BT/002_00000.parquet .* 404"):
        run(tmp_path / "out", "--delete_source")
    assert good.exists() and len(hub.downloads) == 2
    hub.commit = "b" * 40
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    run(tmp_path / "out", "--delete_source")
    names = [name[-17:] for _, name in hub.downloads]
    assert names.count("002_00000.parquet") == 1 and names.count("000_00000.parquet") == 1
    assert {revision for revision, _ in hub.downloads} == {"a" * 40}
    expected = {
        name: h for name, h in bytes_of(tmp_path / "undisturbed").items() if not name.startswith("source")
    }
    assert {
        name: h for name, h in bytes_of(tmp_path / "out").items() if not name.startswith("source")
    } == expected


def test_max_tokens_downloads_no_more_files_than_it_needs(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub_sources, "TOKENS_PER_BYTE", 10)  # as in this text
    manifest = run(tmp_path / "out", "--max_tokens", 1000, "--delete_source", num_proc=1)
    assert 1000 <= sum(manifest["tokens"].values()) < 1400
    assert [name for _, name in hub.downloads] == ["sample/10BT/000_00000.parquet"]
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_ranks_download_each_file_once(tmp_path, hub, gpt2, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        prepare_fineweb.main(arguments(tmp_path / "out"))
    assert sorted(name for _, name in hub.downloads) == sorted(hub.paths)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    check_against_naive(tmp_path / "out", manifest, hub.documents, gpt2)


class Dataset:
    """As `datasets` streams them."""

    def __init__(self, rows: list[dict], n_good: int | None = None) -> None:
        self.rows, self.n_good, self.n_read = rows, n_good, 0

    def skip(self, n: int):
        for i, row in enumerate(self.rows[n:], start=n):
            if i == self.n_good:
                raise ConnectionError("connection lost")
            self.n_read += 1
            yield row


@pytest.fixture
def dataset(monkeypatch, hub):
    def install(data: Dataset) -> Dataset:
        load = lambda *args, **options: data  # noqa: E731
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        return data

    return install


def test_any_dataset_is_streamed_and_continues_where_it_was_cut_off(tmp_path, dataset, gpt2):
    documents = make_documents(500)
    rows = [{"id": d.id, "text": d.text, "more": [1]} for d in documents]
    flags = ["--dataset", "some/Thing", "--config", "en", "--split", "test"]
    dataset(Dataset(rows))
    manifest = run(tmp_path / "undisturbed", *flags)
    check_against_naive(tmp_path / "undisturbed", manifest, documents, gpt2)
    assert manifest["source"] == {
        "dataset": "some/Thing",
        "config": "en",
        "split": "test",
        "revision": "a" * 40,
    }
    dataset(Dataset(rows, n_good=300))
    with pytest.raises(UserError, match="dataset = some/Thing: ConnectionError: connection lost"):
        run(tmp_path / "out", *flags)
    rest = dataset(Dataset(rows))
    run(tmp_path / "out", *flags)
    assert rest.n_read < 450
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_a_streamed_dataset_is_divided_among_ranks_and_cut_at_max_tokens(
    tmp_path, dataset, gpt2, monkeypatch
):
    documents = make_documents(500)
    dataset(Dataset([{"text": d.text, "id": d.id} for d in documents]))
    run(tmp_path / "one", "--dataset", "thing")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        prepare_fineweb.main(arguments(tmp_path / "two", "--dataset", "thing"))
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    monkeypatch.delenv("RANK")
    manifest = run(tmp_path / "few", "--dataset", "thing", "--max_tokens", 9000)
    assert 9000 <= sum(manifest["tokens"].values()) < 9400


def test_a_stream_cut_off_without_max_tokens_can_be_continued_with_it(tmp_path, dataset, gpt2):
    documents = make_documents(500)
    rows = [{"id": d.id, "text": d.text} for d in documents]
    dataset(Dataset(rows, n_good=300))
    with pytest.raises(UserError, match="connection lost"):
        run(tmp_path / "out", "--dataset", "thing")
    dataset(Dataset(rows))
    manifest = run(tmp_path / "out", "--dataset", "thing", "--max_tokens", 9000)
    assert 9000 <= sum(manifest["tokens"].values()) < 9400


def test_an_empty_dataset_is_one_line(tmp_path, dataset):
    dataset(Dataset([]))
    with pytest.raises(UserError, match="no document with text was found"):
        run(tmp_path / "out", "--dataset", "thing")


def test_mistakes_with_a_dataset_are_one_line(tmp_path, dataset, monkeypatch):
    dataset(Dataset([{"body": "x"}]))
    with pytest.raises(UserError, match="text_column = text is not in the dataset thing, which has body"):
        run(tmp_path / "out", "--dataset", "thing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package `datasets`; run `pip install"):
        run(tmp_path / "out", "--dataset", "thing")


class Server(http.server.BaseHTTPRequestHandler):
    """The few addresses of the Hub that a download takes; the first answer is 429, the first file is cut."""

    files: dict[str, bytes]
    asked: list[str]
    commit = "c" * 40
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): ...

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.headers.get('Range', '')}".strip())
        if len(self.asked) == 1:
            return self.answer(b"", 429, {"Retry-After": "0"})
        if "/revision/" in self.path:
            return self.answer(json.dumps({"id": hub_sources.FINEWEB, "sha": self.commit}).encode())
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in self.files.items()
            ]
            return self.answer(json.dumps(entries).encode())
        data = self.files[self.path.partition(f"/resolve/{self.commit}/")[2]]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.asked[-1] == "GET" and self.asked.count("GET") == 4  # after the 429 and two questions
        self.answer(data[start:], 206 if start else 200, headers | {"Accept-Ranges": "bytes"}, cut=cut)

    def answer(self, data: bytes, status: int = 200, headers: dict | None = None, cut: bool = False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


def test_a_mirror_of_the_hub_is_used_and_a_cut_download_goes_on(tmp_path, gpt2):
    documents = make_documents(400)
    path = tmp_path / "x.parquet"
    columns = {"id": [d.id for d in documents], "text": [d.text for d in documents]}
    # a client keeps what comes in 10 MB pieces
    bulk = [random.Random(i).randbytes(60_000) for i in range(400)]
    pq.write_table(pa.table(columns | {"bulk": bulk}), path)
    Server.files, Server.asked = {"sample/10BT/000_00000.parquet": path.read_bytes()}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "prepare_fineweb.py", *arguments(tmp_path / "out")]
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == Server.commit
    check_against_naive(tmp_path / "out", manifest, documents, gpt2)
    assert "GET bytes=10485760-" in Server.asked
