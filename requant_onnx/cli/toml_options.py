"""Options of a command from a TOML file (https://toml.io), and the TOML file that reproduces a run.

bits = 4                       # as --bits 4
form = "folded"
mean = [0.485, 0.456, 0.406]   # as --mean 0.485,0.456,0.406
force = true                   # as --force

[convert.layer]                # as --layer 'head.*=bits:8' --layer 'stem*=float'
"head.*" = { bits = 8 }
"stem*" = "float"

[validate]                     # only for this command; options above the tables apply to every command that has them
data = "images:val"
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant_onnx.errors import ConfigError
from requant_onnx.rules import LayerRule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_IN_FILES = ("help", "help-all", "config", "json", "html", "csv", "quiet", "verbose")


def read_options(path: Path, command: str, parsers: Mapping[str, argparse.ArgumentParser]) -> dict[str, Any]:
    """The options of a command from a file, as argparse stores them.  Raises ConfigError if the file is unreadable or invalid.

    parsers: parsers of all commands, by name.  Options and tables of other commands are ignored.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read '{path}' ({error.strerror or error}); check the path") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"'{path}' is not TOML ({error}); see requant help files for the format") from None
    known = _options(parsers[command])
    anywhere = {**{name: action for parser in parsers.values() for name, action in _options(parser).items()}, **known}
    shared = {key: value for key, value in content.items() if not isinstance(value, dict) or key == "layer"}
    strange = sorted(content.keys() - shared.keys() - parsers.keys())
    if strange:
        raise ConfigError(f"'{path}' has a table '{strange[0]}', which is not a command; the commands are {', '.join(parsers)}")
    named = [*_named(path, shared, anywhere), *_named(path, content.get(command, {}), known)]
    return {known[name].dest: _value(path, known[name], value) for name, value in named if name in known}


def options_of(given: Mapping[str, str], command: str, parsers: Mapping[str, argparse.ArgumentParser]) -> dict[str, Any]:
    """The options of a command by long name, as argparse stores them."""
    known = _options(parsers[command])
    return {known[name].dest: _value(Path("--for"), known[name], value) for name, value in given.items()}


def write_options(args: argparse.Namespace) -> str:
    """The text of a file that reproduces a run: the options that were given."""
    lines = []
    for name, action in _options(args.parser).items():
        value = getattr(args, action.dest)
        if isinstance(value, list):
            lines.append(f"{name} = [{', '.join(_quoted(str(each)) for each in value)}]")
        elif value not in (None, False):
            lines.append(f"{name} = {'true' if value is True else _quoted(str(value))}")
    return "".join(f"{line}\n" for line in lines)


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options by long name, without the leading dashes."""
    named = {text[2:]: action for action in parser._actions for text in action.option_strings if text.startswith("--")}
    return {name: action for name, action in named.items() if name not in NOT_IN_FILES}


def _named(path: Path, table: dict[str, Any], known: dict[str, argparse.Action]) -> list[tuple[str, Any]]:
    named = [(key.replace("_", "-"), value) for key, value in table.items()]
    for name, _ in named:
        if name in NOT_IN_FILES:
            raise ConfigError(f"'{path}' sets '{name}', which is only allowed on the command line, as --{name}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else "see --help"
            raise ConfigError(f"'{path}' sets '{name}', which is not an option here; {hint}")
    return named


def _value(path: Path, option: argparse.Action, value: Any) -> Any:
    """A TOML value in the form in which the command line has it: text, except for switches."""
    if option.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"'{path}' sets '{option.dest}' to {value!r}; it takes true or false")
        return value
    if isinstance(value, dict) and option.dest == "layer":
        return [str(LayerRule.of(pattern, settings)) for pattern, settings in value.items()]
    values = value if isinstance(value, list) else [value]
    if isinstance(value, bool) or not values or not all(isinstance(item, str | int | float) for item in values):
        raise ConfigError(f"'{path}' sets '{option.dest}' to {value!r}; it takes a text, a number, or a list of them")
    if isinstance(option, argparse._AppendAction):
        return [str(item) for item in values]
    return _parsed(path, option, ",".join(str(item) for item in values))


def _parsed(path: Path, option: argparse.Action, text: str) -> Any:
    """The value of a text, checked as argparse checks it on the command line."""
    try:
        value = option.type(text) if callable(option.type) else text
    except argparse.ArgumentTypeError:
        value = None
    if option.choices is not None and value not in option.choices:
        choices = [str(choice) for choice in option.choices]
        near = difflib.get_close_matches(text, choices, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices)}"
        raise ConfigError(f"'{path}' sets '{option.option_strings[-1][2:]}' to '{text}', which is not one of its choices; {hint}")
    return value


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else {"\\": "\\\\", '"': '\\"'}.get(c, c) for c in text)
    return f'"{escaped}"'
