"""Fetch the public stimuli that the analyses know, each file checked by SHA-256; once there, never again.

python -m evals.fetch                     # into data/stimuli; or --stimuli_dir FOLDER
python -m evals.fetch --list              # addresses, SHA-256 and papers, to put the files there by hand
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.files import sha256, write_bytes
from topogpt.retry import PASSING, status, with_retries
from topogpt.terminal import say

CONNECT_SECONDS, READ_SECONDS = 10, 60
TRIES = 4  # of each address


class Source(NamedTuple):
    address: str
    sha256: str
    paper: str  # whose items they are


TOPOLM = (  # TopoLM's authors; the repository has no licence file
    "https://raw.githubusercontent.com/epflneuroailab/topolm/"
    "46b56532d160434b3bce4694fbe9044531b03b85/eval/stimuli/"
)
BRAIN_SCORE = (  # Brain-Score; the repository is under the MIT licence
    "https://raw.githubusercontent.com/brain-score/language/0e0bb4a2d8df5d3c30fe26ec4528f27a188e1cdc/"
    "brainscore_language/data/fedorenko2010_localization/"
)
TABLE = {  # path inside the folder -> where it comes from
    "moseley2014.csv": Source(
        f"{TOPOLM}moseley_stimuli.csv",
        "7eea4f91bc2aab6f4da8ea1d0216a81a55a6306965fb262faf68405e9e1fec3f",
        "Moseley & Pulvermueller 2014, Brain and Language 132",
    ),
    "elli_hauptman2024.csv": Source(
        f"{TOPOLM}elli_stimuli.csv",
        "0580996e3b638929d0132df0c5e9b6349112fcdc7f9fb1592dce7907627a0bf2",
        "Hauptman et al. 2024, bioRxiv 2023.08.23.552701",
    ),
    "fedorenko_profiles.csv": Source(
        f"{TOPOLM}fedorenko_stimuli.csv",
        "faa08f344b219a69a273b1c7390e2ddb09f4982bd5d39a24a831fabe5f26b19d",
        "conditions of Fedorenko et al. 2010, Journal of Neurophysiology 104",
    ),
} | {
    f"fedorenko2010_localizer/{name}.csv": Source(
        f"{BRAIN_SCORE}{name}.csv", sha256, "Fedorenko et al. 2010, Journal of Neurophysiology 104"
    )
    for name, sha256 in {
        "langloc_fmri_run1_stim_set1": "6a545fd8033bcddeaf465a6013f65ed511a2aaf537e493a83cb2515989d8316f",
        "langloc_fmri_run1_stim_set2": "d480f698da43ce58a579230dc93145a287da0c0a21266628dee725dc247766b4",
        "langloc_fmri_run1_stim_set3": "cfcd11f6e7879b4b5d038ec16946e8a685527d6f7f176aca5d6565a266a8c4d4",
        "langloc_fmri_run1_stim_set4": "04dfcd8ceef370ed71d2a065d05d833d7c6028d4a4f87afaf8455b204eb8bd5a",
        "langloc_fmri_run1_stim_set5": "4ded965faa4af50afb3ea47ce7df270957d2c27035a7d6c4a6c7e71ff48a2641",
        "langloc_fmri_run2_stim_set1": "39c1c98a856b87a0f927d907a736f00d0631ba37a70768ffcad4eea70a810509",
        "langloc_fmri_run2_stim_set2": "aaad394e427c603d932cef9a072c4046f24b72ad354898cc2d5382267f601a2a",
        "langloc_fmri_run2_stim_set3": "f62ad8c191478278365d664dc111c7bfd6cfe5590bea6f16bc27f86ec2f54f7b",
        "langloc_fmri_run2_stim_set4": "4f03100af15982eeba419bcd457f0a2d4f10ae08d61c5c49cc4f8ad97ec1719a",
        "langloc_fmri_run2_stim_set5": "e52ca8c5cd341fcb8fbc7841c584c4d4e162fa4b3405e1178ccdbb4eec07fe4b",
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Fetch the public stimuli: python -m evals.fetch."""

    stimuli_dir: str = "data/stimuli"  # the folder they are put into
    list: bool = False  # only list path, address, SHA-256 and paper of each file


def fetch(folder: Path) -> None:
    """Bring every file of TABLE into the folder; one that is there and intact is kept, without a socket."""
    for name, source in TABLE.items():
        path = folder / name
        found = sha256_of(path)
        if found != source.sha256:
            if found:
                say(f"{path} is damaged (SHA-256 {found}, not {source.sha256}); fetching it again")
            write(path, download(source, folder))
        say(f"{path}  {'there already' if found == source.sha256 else 'fetched'}")
    say(f"the stimuli lie in {folder}")


def sha256_of(path: Path) -> str | None:
    """Of the file's content; None where there is no file."""
    try:
        return sha256(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; move it away, or choose another --stimuli_dir"
        ) from None


def download(source: Source, folder: Path) -> bytes:
    """The content of an address, tried again where that may help, and refused unless its SHA-256 fits."""
    import requests  # comes with tiktoken

    def get() -> bytes:
        response = requests.get(source.address, timeout=(CONNECT_SECONDS, READ_SECONDS))
        response.raise_for_status()
        return response.content

    def in_words(error: Exception) -> str:
        if status(error):
            return f"status {status(error)}"
        cause = getattr(error.args[0], "reason", error) if error.args else error  # without the address again
        return " ".join(str(cause).split())[:200]

    def may_pass(error: Exception) -> bool:
        return isinstance(error, requests.RequestException) and (status(error) or 503) in PASSING

    name = Path(source.address).name
    try:
        content = with_retries(name, get, tries=TRIES, may_pass=may_pass, say=say, in_words=in_words)
    except requests.RequestException as error:  # no connection, too slow, cut off, or a refusal
        raise could_not(source, in_words(error), folder) from None
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise could_not(source, f"what came has SHA-256 {found}, not {source.sha256}", folder)
    return content


def could_not(source: Source, reason: str, folder: Path) -> UserError:
    return UserError(
        f"{source.address} could not be fetched ({reason}); put the files into {folder} by hand: "
        "`python -m evals.fetch --list` lists their names and addresses"
    )


def write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another --stimuli_dir") from None


def main(argv: list[str]) -> None:
    cfg = parse(FetchConfig, argv, prog="python -m evals.fetch")
    if not cfg.list:
        return fetch(Path(cfg.stimuli_dir))
    for name, source in TABLE.items():
        say(f"{name}  {source.address}  {source.sha256}  ({source.paper})")


if __name__ == "__main__":
    run_main(main)
