"""Write a checkpoint as a folder that stock transformers loads, prove that it does, and push it to the Hub.

    python export.py out/topolm                                  # -> out/topolm/hf
    python export.py out/topolm --checkpoint step-500 --dtype bfloat16 --out topolm-bf16
    python export.py out/topolm --push_to_hf                     # as YOU/topolm
    python export.py out/topolm --push_to_hf USER/NAME --private
    python export.py out/topolm/hf --push_to_hf USER/NAME        # push, or complete a push, later
    python export.py out/child --sparse                          # beside it masks and values of a pruned run
    python export.py out/itp --push_to_hf USER/itp               # a connectome: --connectome USER/itp

The folder is a GPT2LMHeadModel, or an ArceeForCausalLM if positions are rotary (no remote code), with its
tokenizer, the positions of its units and a model card. Before it gets its name it is loaded with
transformers, and its logits, its greedy text and its tokens are compared with ours.
"""

from dataclasses import fields
from pathlib import Path

from topogpt.config import parse
from topogpt.errors import UserError, run_main
from topogpt.runs.folder import check_there
from topogpt.settings import ExportConfig
from topogpt.sharing import wirings
from topogpt.sharing.export import export
from topogpt.sharing.push import PushFailed, full_name, later, push
from topogpt.terminal import say


def main(argv: list[str]) -> None:
    cfg = parse(ExportConfig, optional_value(argv), prog="export.py")
    source = Path(cfg.run)
    if cfg.private and cfg.push_to_hf is None:
        raise UserError("private = True has no effect without --push_to_hf; add that, or leave --private out")
    check_there(source)
    if (source / "topography.json").is_file() or (source.name == "hf" and wirings.is_connectome(source)):
        return push_exported(cfg, source)
    repo_id = trouble = None
    if cfg.push_to_hf is not None:
        try:
            repo_id = full_name(cfg.push_to_hf or source.resolve().name)
        except PushFailed as error:
            trouble = error  # the folder is worth having all the same
    if wirings.is_connectome(source):
        check_no_effect(cfg, "a connectome", ("out",))
        folder = wirings.export(source, cfg.out, repo_id)
        say(f"exported the connectome {source}: {folder}")
    else:
        more = {"repo_id": repo_id, "vocab_dir": cfg.vocab_dir, "sparse": cfg.sparse, "say": say}
        folder = export(source, cfg.checkpoint, cfg.out, cfg.dtype, **more)
    if trouble:
        raise PushFailed(f"{trouble}; the folder is complete: {later(folder, 'USER/NAME', cfg.private)}")
    if repo_id:
        say(f"pushed: {push(folder, repo_id, cfg.private, say=say)}")


def push_exported(cfg: ExportConfig, folder: Path) -> None:
    """Push a folder that was exported before."""
    if not cfg.push_to_hf:
        raise UserError(
            f"run {folder} is exported already; push it with --push_to_hf USER/NAME, or give a run"
        )
    check_no_effect(cfg, "an exported folder")
    say(f"pushed: {push(folder, full_name(cfg.push_to_hf), cfg.private, say=say)}")


def check_no_effect(cfg: ExportConfig, what: str, but: tuple[str, ...] = ()) -> None:
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.name not in ("run", "push_to_hf", "private", *but) and value != f.default:
            raise UserError(f"{f.name} = {value} has no effect on {what}; give a run, or leave it out")


def optional_value(argv: list[str]) -> list[str]:
    """Give a bare --push_to_hf an empty value: one before a flag, an existing folder (RUN) or the end."""
    out = []
    for i, arg in enumerate(argv):
        bare = arg.replace("-", "_") == "__push_to_hf"
        following = argv[i + 1] if i + 1 < len(argv) else "-"
        out.append(f"{arg}=" if bare and (following.startswith("-") or Path(following).is_dir()) else arg)
    return out


if __name__ == "__main__":
    run_main(main)
