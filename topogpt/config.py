"""YAML and command line -> frozen dataclass.

    cfg = parse(TrainConfig, sys.argv[1:])      # [file.yaml] [--flag value] [--topo.weight 2.5]

The YAML file is flattened into arguments placed before the user's, so tyro types and checks both and the
command line wins. Neither this nor settings.py imports torch, so that `--help` and mistakes answer at once.
"""

import collections
import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from topogpt.errors import UserError

Config = TypeVar("Config")


MAX_BYTES = 150_000  # of a file; the settings of a run are 3000, and a list of shards may be longer
MAX_DEPTH = 8  # of its sections and lists
MAX_LINE = 290  # characters of a message
MAX_DIGITS = 15  # of a whole number: beyond, it is none to JSON, YAML and float


def parse(cls: type[Config], argv: list[str], *, prog: str | None = None) -> Config:
    """Build `cls` from `[file.yaml] [--flag value ...]`; raise UserError on unknown keys and wrong values.

    A field without a default is given by its place, not by a flag; a class with such fields takes no file.
    Prints the help and exits with code 0 where `--help` is among the arguments.
    """
    try:
        return parse_all(cls, argv, prog)
    except UserError as error:
        if len(line := str(error)) <= MAX_LINE:
            raise
        raise UserError(f"{line[: MAX_LINE - 105]} ... {line[-100:]}") from None


def parse_all(cls: type[Config], argv: list[str], prog: str | None) -> Config:
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
    for group in groups:
        check_values(group, known)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            arguments = [a for group in groups for a in group.arguments]
            return tyro.cli(cls, args=arguments, prog=prog, use_underscores=True, config=by_place())
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            explain(groups, known)
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


def check_values(given: Given, known: dict[str, dataclasses.Field]) -> None:
    """Refuse what can be no text of a person's, and whole numbers that are too long."""
    flag, joined, value = given.arguments[0].partition("=")
    values = given.arguments if not is_flag(flag) else [value] * bool(joined) + given.arguments[1:]
    field = known.get(flag.removeprefix("--").replace("-", "_"))
    whole = field is not None and (field.type is int or set(get_args(field.type)) & {int})
    for text in values:
        if re.search("[\0\ud800-\udc7f\udd00-\udfff]", text):  # the others are bytes of a file's name
            raise UserError(f"{given.where}: {flag} holds NUL or half a character; correct {text!r}")
        if whole and re.fullmatch(rf"[-+]?\d{{{MAX_DIGITS + 1},}}", text.replace("_", "")):
            raise UserError(
                f"{given.where}: {flag} must be a whole number of at most {MAX_DIGITS} digits, not {text}"
            )


def explain(groups: list[Given], known: dict[str, dataclasses.Field]) -> None:
    """Raise a UserError for the first flag whose value tyro does not take, in a class of its own."""
    import tyro

    for where, arguments in groups:
        if not is_flag(arguments[0]):
            continue
        flag, joined, value = arguments[0].partition("=")
        values = [value] * bool(joined) + arguments[1:]
        name = flag.removeprefix("--").replace("-", "_")
        kind = known[name].type if name in known else bool
        if kind is bool and values:
            name = name.replace("no_", "")
            raise UserError(
                f"{where}: {flag} takes no value, but got {' '.join(values)}; use --{name} or --no_{name}"
            )
        if kind is bool or (kind is str and len(values) == 1):
            continue  # without a look, which takes milliseconds
        try:
            alone = dataclasses.make_dataclass("Alone", [("value", kind)])
            tyro.cli(alone, args=[f"--value{joined}{value}", *arguments[1:]], console_outputs=False)
        except SystemExit:
            given = " ".join(values) or "nothing"
            raise UserError(f"{where}: {flag} must be {describe_type(kind)}, not {given}") from None


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
    key = f"{key:.100}"
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
        settings = load_yaml(path)
    except FileNotFoundError:
        there = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(str(path), there, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "give the path of a YAML file"
        raise UserError(f"config file {path} does not exist; {hint}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from None
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise UserError(f"config file {path} must hold `key: value` lines, not a {type(settings).__name__}")
    where = f"config file {path}"
    return [Given(where, arguments) for arguments in flatten(settings, where, known)]


def load_yaml(path: Path) -> Any:
    """What a file holds, numbers as they are written; raises OSError, ValueError or YAMLError, and soon."""
    import yaml

    loader = text_loader()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is a pipe or a device, no file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it holds more than {MAX_BYTES:,} bytes; name many shards by a folder or a glob")
    text, depth = data.decode("utf-8"), 0
    for event in yaml.parse(text, Loader=loader):  # building what is nested too deep ends in a crash
        starts = isinstance(event, yaml.CollectionStartEvent)
        depth += starts - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} deep")
    return yaml.load(text, Loader=loader)


def flatten(
    settings: dict, where: str, known: dict[str, dataclasses.Field], prefix: str = ""
) -> Iterator[list[str]]:
    """The arguments that stand for each setting."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        is_section = any(k.startswith(f"{name}.") for k in known)
        if name.count(".") > MAX_DEPTH:
            raise UserError(f"{where}: {name} nests too deep: an alias (*) may stand inside what it names")
        if isinstance(value, dict) and (is_section or name not in known):
            yield from flatten(value, where, known, f"{name}.")
            continue
        if is_section:
            if value is not None:  # a section whose keys are all commented out
                problem = f"must be a section of keys, such as {name}.{{...}}"
                raise UserError(f"{where}: {name} = {shown(value)} {problem}")
            continue
        check_known(name, known, where=where)
        kind = known[name].type
        optional = type(None) in get_args(kind)
        if kind is bool and isinstance(value, bool):
            head, dot, tail = name.rpartition(".")
            yield [f"--{name}" if value else f"--{head}{dot}no_{tail}"]
        elif get_origin(kind) is tuple and isinstance(value, list):
            for item in value:
                check_scalar(item, kind, f"{where}: an item of {name}")
                if is_flag(item):
                    raise UserError(
                        f"{where}: an item of {name} is {item}, and would be a flag; write ./{item}"
                    )
            yield [f"--{name}", *value]
        elif kind is bool or isinstance(value, bool | list | dict) or (value is None and not optional):
            quote = "; without quotes" if kind is bool else ""
            quote = "; put it in quotes" if isinstance(value, bool) else quote
            raise UserError(f"{where}: {name} must be {describe_type(kind)}, not {shown(value)}{quote}")
        else:
            if value is not None:
                check_scalar(value, kind, f"{where}: {name}")
            yield [f"--{name}={value}"]


def check_scalar(value: Any, kind: Any, what: str) -> None:
    """Refuse what is no text, and numbers that mean one thing to YAML and another to a reader."""
    if not isinstance(value, str):
        raise UserError(f"{what} must be text or a number, not {shown(value)}; put it in quotes")
    kinds = {kind, *get_args(kind)}
    if kinds & {int, float} and re.fullmatch(r"[-+]?0[\d_]+", value):
        raise UserError(
            f"{what} must be a number, not {value}, which YAML takes for octal; write it without 0"
        )


def shown(value: Any) -> str:
    """A value in a message; an alias may make a list of a few bytes enormous."""
    sizes = {list: "a list", dict: "a section", type(None): "nothing"}
    return sizes.get(type(value)) or repr(value)


def first_sentence(box: str) -> str:
    """The message inside tyro's box, as one line."""
    lines = [line.strip("│|╭╮╰╯ \n") for line in box.splitlines()][1:]
    body = []
    for line in lines:
        if set(line) <= set("─-╰╯"):
            break
        body.append(line)
    return " ".join(body) or "could not be understood; see --help"


def text_loader() -> type:
    """Safe YAML that refuses a key given twice, and reads numbers, dates and odd booleans as text.

    What a number is then depends on the setting, not on how YAML 1.1 takes 1:30, 010 or 2026-01-01.
    """
    import yaml

    class TextLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                problem = f"key {collections.Counter(keys).most_common(1)[0][0]} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep=deep)

        def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool | str:
            text = self.construct_scalar(node)
            return self.bool_values.get(text.lower(), text)

    for kind in ("int", "float", "timestamp"):
        TextLoader.add_constructor(f"tag:yaml.org,2002:{kind}", TextLoader.construct_scalar)
    TextLoader.add_constructor("tag:yaml.org,2002:bool", TextLoader.construct_yaml_bool)
    return TextLoader


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; lists as tuples."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = tuple(value) if isinstance(value, list) else value
    return found


def to_yaml(cfg: object) -> str:
    """The resolved settings as YAML that `parse` reads back."""
    import yaml

    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}
    return yaml.safe_dump(plain, sort_keys=False)
