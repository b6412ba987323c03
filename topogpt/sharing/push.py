"""Push an exported folder to the Hugging Face Hub; run again, it completes what was interrupted.

    push("out/topolm/hf", "USER/topolm", private=True)        # -> its address, or PushFailed

The token is where the Hub's own tools look for it: HF_TOKEN, or what `hf auth login` has kept. It is never
printed. Errors that may pass (429, 5xx, timeouts, cut connections) are tried again a few times, each with a
line; what remains is one PushFailed, whose message says the command that pushes later.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from topogpt.errors import UserError, masked
from topogpt.model import connectome
from topogpt.retry import PASSING, status, with_retries
from topogpt.sharing import wirings

Result = TypeVar("Result")
Say = Callable[[str], Any]

TRIES = 4  # of each step of a push; the Hub's client tries its own requests again, too
TIMEOUTS = (15.0, 120.0, 120.0, 60.0)  # seconds to connect, read, write, and wait for a connection; a cut one
NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet"}  # packages that raise
NEEDED = ("config.json", "model.safetensors", "README.md", "topography.safetensors", "topography.json")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class PushFailed(UserError):
    """A push that did not complete; the folder is untouched, and the message says how to go on."""


def full_name(name: str, say: Say = print) -> str:
    """USER/NAME as it is; NAME becomes that of whoever is logged in."""
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name):
        raise UserError(f"push_to_hf = {name} is no name of a repository; give USER/NAME")
    if "/" in name:
        return name
    if not has_token():
        raise PushFailed(
            f"push_to_hf = {name} has no user, and none is logged in; give USER/NAME and {LOG_IN}"
        )
    from huggingface_hub import HfApi

    with reported(say):
        me = attempt("asking who is logged in", HfApi().whoami, name, "give USER/NAME", say)
    return f"{me['name']}/{name}"


def check_login(name: str) -> None:
    """Refuse to start what could not be pushed in the end; asks nobody."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "push_to_hf = True, but the Hub is switched off here (HF_HUB_OFFLINE); unset that, or leave "
            f"--push_to_hf out and push later: python export.py out/{name} --push_to_hf"
        )
    if not has_token():
        raise UserError(f"push_to_hf = True, but no token of the Hub is here; {LOG_IN}, or leave it out")


def has_token() -> bool:
    """Whether a token is set or somebody is logged in."""
    from huggingface_hub import get_token

    return get_token() is not None


def push(
    folder: str | Path, repo_id: str, private: bool = False, step: int | None = None, *, say: Say = print
) -> str:
    """Make repo_id hold the exported folder, tagged step-N, and return its address; raises PushFailed.

    A connectome is tagged generation-N. `step` is the folder's own unless given. Files of the repository that
    the folder does not have are kept.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    version = check_folder(folder) if step is None else f"step-{step}"
    remedy = f"{folder} is complete; push it later with: {later(folder, repo_id, private)}"
    if not has_token():
        raise PushFailed(f"push_to_hf = {repo_id}: no token of the Hub was found; {LOG_IN}; {remedy}")
    api = HfApi()

    def do(what: str, call: Callable[[], Result]) -> Result:
        return attempt(what, call, repo_id, remedy, say)

    with reported(say):
        create = partial(api.create_repo, repo_id, private=private or None, exist_ok=True)
        do("creating the repository", create)
        info = do("looking at the repository", lambda: api.model_info(repo_id))
        check_ours(info, folder, repo_id, private)
        content = {"folder_path": folder, "commit_message": version.replace("-", " ")}
        commit = do("uploading", partial(api.upload_folder, repo_id=repo_id, **content))
        do("tagging", lambda: tag(api, repo_id, version, commit.oid))
    return f"{api.endpoint}/{repo_id}"


def later(folder: Path, repo_id: str, private: bool) -> str:
    """The command that pushes an exported folder."""
    command = f"python export.py {shlex.quote(str(folder))} --push_to_hf {shlex.quote(repo_id)}"
    return f"{command} --private" if private else command


def tag(api: Any, repo_id: str, name: str, commit: str) -> None:
    """Point the tag to the commit; one of an earlier push of the same step is moved."""
    there = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if there.get(name) == commit:
        return
    if name in there:
        api.delete_tag(repo_id, tag=name)
    api.create_tag(repo_id, tag=name, revision=commit, exist_ok=True)


def check_folder(folder: Path) -> str:
    """Refuse what is no whole export; return the tag of its version."""
    if wirings.is_connectome(folder):
        return f"generation-{wirings.check(folder).get('generation', 0)}"
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}; give an exported folder, such as out/NAME/hf")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "topography.json").read_text(encoding="utf-8"))
        words = folder / "vocab.json"
        n_words = len(json.loads(words.read_text(encoding="utf-8"))) if words.is_file() else None
        n_vocab, step = config["vocab_size"], facts["step"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}); export it again") from None
    if n_words not in (None, n_vocab):
        raise UserError(
            f"{folder} has {n_words} words in vocab.json but vocab_size = {n_vocab} in config.json; "
            "export it again"
        )
    return f"step-{step}"


def check_ours(info: Any, folder: Path, repo_id: str, private: bool) -> None:
    """Refuse to overwrite somebody's other model, or to publish what should stay private."""
    there = {file.rfilename for file in info.siblings or ()} - {".gitattributes", "README.md"}
    if (
        there
        and not there & {"topography.json", connectome.RECORD}
        and not there <= {path.name for path in folder.iterdir()}
    ):
        raise PushFailed(
            f"push_to_hf = {repo_id} is a repository with other files ({sorted(there)[0]}), no export of "
            "ours; choose another name"
        )
    if private and info.private is False:
        raise PushFailed(
            f"push_to_hf = {repo_id} is public, but --private was asked for; choose another name, make it "
            "private on the Hub, or leave --private out"
        )


# ---- trying again --------------------------------------------------------------------------------


def attempt(what: str, call: Callable[[], Result], name: str, remedy: str, say: Say) -> Result:
    """Call until it works, a few times where the error may pass; raises PushFailed."""

    def with_cause() -> Result:
        try:
            return call()
        except RuntimeError as raised:  # the client's "Error while uploading": its cause is what went wrong
            cause = raised.__cause__ if type(raised) is RuntimeError else None
            raise (cause if isinstance(cause, Exception) else raised) from None

    def passing(error: Exception) -> bool:
        return refused(error, name) is None and may_pass(error)

    try:
        return with_retries(
            f"push: {what} failed", with_cause, tries=TRIES, may_pass=passing, say=say, in_words=in_words
        )
    except Exception as error:
        reason = refused(error, name) or f"{what} failed: {in_words(error)}"
        raise PushFailed(f"push_to_hf = {name}: {reason}; {remedy}") from None


def refused(error: Exception, name: str) -> str | None:
    """What the Hub does not allow, and what to do; None for other errors."""
    code = status(error)
    if code == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return f"the Hub does not accept the token (401); {LOG_IN}"
    if code == 403:
        return (
            f"{name} is not yours, or the token may not write to it (403); choose another name, or {LOG_IN}"
        )
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "the Hub is switched off here (HF_HUB_OFFLINE)"
    if type(error).__name__ == "HFValidationError":
        return f"no name of a repository: {in_words(error)}"
    return None


def may_pass(error: Exception) -> bool:
    if status(error) is not None:
        return status(error) in PASSING
    raised_by = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(raised_by & NETWORK) or isinstance(error, ConnectionError | TimeoutError | RuntimeError)


def in_words(error: Exception) -> str:
    """An error as part of a line: its status or kind, and the Hub's own words, without secrets."""
    text = clean(getattr(error, "server_message", None) or str(error))
    code = status(error)
    return f"{code} {text}" if code and not text.startswith(str(code)) else f"{type(error).__name__}: {text}"


def clean(text: str) -> str:
    """One line; what follows `?` in addresses may sign an upload, and the token is a secret."""
    from huggingface_hub import get_token

    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(text.split()))
    for secret in {get_token(), os.environ.get("HF_TOKEN")} - {None, ""}:
        text = text.replace(secret, "***")
    return masked(text)[:300]


class Lines(logging.Handler):
    """Passes messages of the Hub's client on, a line each."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"push: {clean(record.getMessage())}")


@contextlib.contextmanager
def reported(say: Say) -> Iterator[None]:
    """The Hub's client with time limits, with its messages as our lines, bars on a terminal alone."""
    import huggingface_hub
    from huggingface_hub import utils

    logger = logging.getLogger("huggingface_hub")
    handlers, logger.handlers = logger.handlers, [Lines(say)]
    bars = utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    set_factory = getattr(huggingface_hub, "set_client_factory", None)  # from 1.0 on
    default = getattr(utils._http, "default_client_factory", None)
    if set_factory and default:

        def with_time_limits() -> Any:
            client = default()  # which waits for ever
            client.timeout = TIMEOUTS
            return client

        set_factory(with_time_limits)
    try:
        yield
    finally:
        logger.handlers = handlers
        if not bars:
            utils.enable_progress_bars()
        if set_factory and default:
            set_factory(default)
