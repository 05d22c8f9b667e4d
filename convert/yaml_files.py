"""Config files of the reference: YAML and `a.b=c` overrides -> {"a.b": value}.

Nothing in a file is run: tags of Python objects are refused.
"""

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from minigpt4_jax.errors import ConfigError, InputError

NAME = r"[A-Za-z0-9_+-]+"
OPTION = rf"{NAME}(?:\.{NAME})*="


class Loader(yaml.SafeLoader):
    """YAML as the reference reads it: `1e-4` is a number, a key stands once.

    Aliases are refused: a few lines of them stand for gigabytes, or for themselves.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="an alias (*name); write its value out", problem_mark=mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} a second time",
                    problem_mark=key.start_mark,
                )
            if isinstance(key.value, Hashable):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a number with an exponent; OmegaConf, and we, do not.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read(path: Path, options: Iterable[str] = ()) -> dict[str, Any]:
    """Every value of a file by its dotted key, after the options, of which the last wins.

    An empty section is a key with the value None.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {values!r:.60}, want keys and values")
    flat = flatten(values)
    for option in split(options):
        key, _, value = option.partition("=")
        new = leaves(key, _parse(value, f"--options {key}"))
        above = {key[:i] for i, c in enumerate(key) if c == "."}
        for old in [k for k in flat if k.startswith(f"{key}.") or k in {*above, key}]:
            if old in above and flat[old] is not None:
                raise InputError(f"--options {key}: {old} is {flat[old]!r}, no section")
            del flat[old]
        flat |= new
    return flat


def split(options: Iterable[str]) -> list[str]:
    """`a.b=1 c.d=2` and `a.b=1,c.d=2` as two options; a value may hold commas."""
    parts = [p for o in options for p in re.split(rf"[\s,]+(?={OPTION})", o.strip())]
    for part in parts:
        if not re.match(OPTION, part):
            raise InputError(f"--options: got {part!r}, want a.b=c")
    return parts


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key; an empty mapping is a leaf, None."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if not re.fullmatch(NAME, str(name)):
            raise ConfigError(f"{prefix}{name!r}: want a key of letters, digits, _ + -")
        flat |= leaves(f"{prefix}{name}", value)
    return flat


def leaves(key: str, value: Any) -> dict[str, Any]:
    """The same of what one key holds."""
    if isinstance(value, dict) and value:
        return flatten(value, f"{key}.")
    return {key: None if value == {} else value}


def number(values: Mapping[str, Any], key: str) -> float:
    """The value as a number; a string that spells one, as a quoted `1e-4`, is cast."""
    value = values[key]
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key}: got {value!r}, want a number") from error


def whole(values: Mapping[str, Any], key: str) -> int:
    """The value as an integer; 4.0 is one."""
    value = number(values, key)
    if not value.is_integer():
        raise ConfigError(f"{key}: got {values[key]!r}, want a whole number")
    return values[key] if isinstance(values[key], int) else int(value)


def truth(values: Mapping[str, Any], key: str) -> bool:
    """The value, which must be true or false: the reference takes "False" for true."""
    if not isinstance(values[key], bool):
        raise ConfigError(f"{key}: got {values[key]!r}, want true or false")
    return values[key]


def _parse(text: bytes | str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: cannot read {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML ({text})") from error
