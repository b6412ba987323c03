"""YAML and command line -> frozen dataclass.

    cfg = parse(TrainConfig, sys.argv[1:])      # [file.yaml] [--flag value] [--topo.weight 2.5]

The YAML file is flattened into arguments placed before the user's, so tyro types and checks both and the
command line wins. Neither this nor settings.py imports torch, so that `--help` and mistakes answer at once.
"""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from topogpt.errors import UserError

Config = TypeVar("Config")


def parse(cls: type[Config], argv: list[str], *, prog: str | None = None) -> Config:
    """Build `cls` from `[file.yaml] [--flag value ...]`; raise UserError on unknown keys and wrong values.

    A field without a default is given by its place, not by a flag; a class with such fields takes no file.
    Prints the help and exits with code 0 where `--help` is among the arguments.
    """
    import tyro

    known = dict(flag_names(cls))
    n_by_place = sum(f.default is f.default_factory is dataclasses.MISSING for f in known.values())
    groups: list[Given] = []
    if not n_by_place and argv and not argv[0].startswith("-"):
        groups, argv = yaml_arguments(Path(argv[0]), known), argv[1:]
    for arg in argv:
        if is_flag(arg):
            check_known(arg.partition("=")[0].removeprefix("--"), known, where="command line")
            groups.append(Given("command line", [arg]))
        elif not n_by_place and arg.endswith((".yaml", ".yml")) and Path(arg).is_file():
            raise UserError(f"command line: the config file {arg} must come first, before the flags")
        elif groups and groups[-1].where == "command line":
            groups[-1].arguments.append(arg)
        else:
            groups.append(Given("command line", [arg]))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            arguments = [a for group in groups for a in group.arguments]
            return tyro.cli(cls, args=arguments, prog=prog, use_underscores=True, config=by_place())
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            explain(cls, groups, known, ["-"] * n_by_place)
            raise UserError(f"command line: {first_sentence(said.getvalue())}") from None


def by_place() -> tuple:
    """What makes tyro take fields without a default by their place, and call them by their name."""
    import tyro

    return (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)


class Given(NamedTuple):
    """A flag with its values, and where it was given."""

    where: str
    arguments: list[str]


def is_flag(arg: str) -> bool:
    return arg.startswith("-") and arg != "-" and re.match(r"-(\.?\d|inf|nan)", arg) is None


def explain(cls: type, groups: list[Given], known: dict[str, dataclasses.Field], before: list[str]) -> None:
    """Raise a UserError for the first flag that tyro does not take on its own."""
    import tyro

    for where, arguments in groups:
        if not is_flag(arguments[0]):
            continue
        try:
            tyro.cli(
                cls, args=before + arguments, use_underscores=True, console_outputs=False, config=by_place()
            )
        except UserError:
            pass  # its value is understood; what it clashes with is another matter
        except SystemExit:
            flag, _, value = arguments[0].partition("=")
            values = ([value] if value else []) + arguments[1:]
            name = flag.removeprefix("--").replace("-", "_")
            if name not in known or known[name].type is bool:
                name = name.replace("no_", "")
                raise UserError(
                    f"{where}: {flag} takes no value, but got {' '.join(values)}; use --{name} or --no_{name}"
                ) from None
            wanted = describe_type(known[name].type)
            given = " ".join(values) or "nothing"
            raise UserError(f"{where}: {flag} must be {wanted}, not {given}") from None


def describe_type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return f"one or more of {', '.join(get_args(get_args(kind)[0]))}"
    if type(None) in get_args(kind):
        return f"{describe_type(get_args(kind)[0])} or None"
    if get_origin(kind) is tuple and get_args(kind)[0] in (int, float):
        return "one number or more"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, "one path or more")


def flag_names(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every dotted flag of a nested dataclass with its field."""
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield from flag_names(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def check_known(key: str, known: dict[str, dataclasses.Field], *, where: str) -> None:
    name = key.replace("-", "_")
    if name in ("h", "help") or name in known:
        return
    head, _, tail = name.rpartition(".")
    if tail.startswith("no_") and known.get(f"{head}.{tail[3:]}" if head else tail[3:], None) is not None:
        return
    nearest = difflib.get_close_matches(name, known, n=1)
    nearest = nearest or [k for k in known if k.rpartition(".")[2] == tail]
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help for all keys"
    raise UserError(f"{where}: unknown key {key}; {hint}")


def yaml_arguments(path: Path, known: dict[str, dataclasses.Field]) -> list[Given]:
    """Flatten a YAML file into command-line arguments; nested mappings become dotted flags."""
    import yaml

    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"command line: {path} is not a .yaml file, and no flag stands before it")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=unique_key_loader())
    except FileNotFoundError:
        there = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(str(path), there, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "give the path of a YAML file"
        raise UserError(f"config file {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from None
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise UserError(f"config file {path} must hold `key: value` lines, not a {type(settings).__name__}")
    where = f"config file {path}"
    return [Given(where, arguments) for arguments in flatten(settings, where, known)]


def flatten(
    settings: dict, where: str, known: dict[str, dataclasses.Field], prefix: str = ""
) -> Iterator[list[str]]:
    """The arguments that stand for each setting."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        is_section = any(k.startswith(f"{name}.") for k in known)
        if isinstance(value, dict) and (is_section or name not in known):
            yield from flatten(value, where, known, f"{name}.")
            continue
        if is_section:
            if value is not None:  # a section whose keys are all commented out
                problem = f"must be a section of keys, such as {name}.{{...}}"
                raise UserError(f"{where}: {name} = {value} {problem}")
            continue
        check_known(name, known, where=where)
        kind = known[name].type
        optional = type(None) in get_args(kind)
        if kind is bool and isinstance(value, bool):
            head, dot, tail = name.rpartition(".")
            yield [f"--{name}" if value else f"--{head}{dot}no_{tail}"]
        elif get_origin(kind) is tuple and isinstance(value, list):
            yield [f"--{name}", *map(str, value)]
        elif kind is bool or isinstance(value, bool | list | dict) or (value is None and not optional):
            shown = "nothing" if value is None else repr(value)
            quote = "; without quotes" if kind is bool else ""
            quote = "; put it in quotes" if isinstance(value, bool) else quote
            raise UserError(f"{where}: {name} must be {describe_type(kind)}, not {shown}{quote}")
        else:
            yield [f"--{name}={value}"]


def first_sentence(box: str) -> str:
    """The message inside tyro's box, as one line."""
    lines = [line.strip("│|╭╮╰╯ \n") for line in box.splitlines()][1:]
    body = []
    for line in lines:
        if set(line) <= set("─-╰╯"):
            break
        body.append(line)
    return " ".join(body) or "could not be understood; see --help"


def unique_key_loader() -> type:
    """Safe YAML that refuses a key given twice."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                where = node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]} is given twice", where)
            return super().construct_mapping(node, deep=deep)

    return UniqueKeyLoader


def to_yaml(cfg: object) -> str:
    """The resolved settings as YAML that `parse` reads back."""
    import yaml

    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}
    return yaml.safe_dump(plain, sort_keys=False)
