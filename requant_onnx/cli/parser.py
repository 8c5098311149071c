"""The parser of the command line: one-sentence errors, and a --help in groups by purpose."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from requant_onnx.cli.goals import GOALS
from requant_onnx.cli.toml_options import options_of, read_options
from requant_onnx.errors import ConfigError

AIM = "what the file is for"
SIZE = "how small the file has to be"
QUALITY = "how good (finds the smallest file that keeps a target; exit code 3 if none does)"
INPUTS = "what the model is calibrated on"
DATA = "what the models are compared on"
LAYERS = "settings of single layers"
OUTPUT = "what is written and printed"
METHOD = "the quantization method"
REFINING = "how calibration inputs are used"
INTEGERS = "integer kernels, for --form int8"
RUNNING = "where and how models run"
HIDDEN = (METHOD, REFINING, INTEGERS, RUNNING)
"""Titles of groups that only --help-all shows."""
CHOSEN = frozenset(("bits", "target_sqnr", "time_limit"))
FRAMES = (frozenset(["resize", "crop"]), frozenset(["fit"]), frozenset(["letterbox"]), frozenset(["stretch"]))
RIVALS: dict[str, frozenset[str]] = {
    "size": frozenset(["target_sqnr"]),
    "target_sqnr": frozenset(["size"]),
    "max_drop": CHOSEN | {"min_agreement"},
    "min_agreement": CHOSEN | {"max_drop"},
    **{name: frozenset[str]().union(*FRAMES) - own for own in FRAMES for name in own},
}
"""For each option, those with which it cannot be given, by name."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, like every other error, and whose options lie in titled groups."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._titled: dict[str, argparse._ArgumentGroup] = {}

    def titled(self, title: str) -> argparse._ArgumentGroup:
        """The group of a title, made if there is none yet."""
        if title not in self._titled:
            self._titled[title] = self.add_argument_group(title)
        return self._titled[title]

    def format_help(self) -> str:
        """The usual options in their groups, and how many others there are."""
        return self._help(HIDDEN)

    def format_full_help(self) -> str:
        """All options in their groups."""
        return self._help(())

    def _help(self, hidden: Sequence[str]) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self._short_usage(), self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            if group.title in hidden:
                continue
            formatter.start_section("files" if group is self._positionals and self._titled else group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        count = sum(len(group._group_actions) for group in self._action_groups if group.title in hidden)
        formatter.add_text(f"{count} more options: {self.prog} --help-all" if count else None)
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _short_usage(self) -> str | None:
        """The usage with positional arguments only, because the groups list the options; None if there are no groups."""
        names = [str(action.metavar) for action in self._get_positional_actions()]
        return " ".join(["%(prog)s", *names, "[options]"]) if self._titled else None

    def error(self, message: str) -> NoReturn:
        """Print an error and exit with code 2.  Raises ConfigError for a bad value of an option, whose message is a sentence."""
        sentence = re.sub(r"^argument [^:]+: (?=--)", "", message)
        if sentence != message:
            raise ConfigError(sentence)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class FullHelp(argparse.Action):
    """--help-all: print all options and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and exit, as argparse calls it."""
        assert isinstance(parser, Parser)
        parser._print_message(parser.format_full_help(), sys.stdout)
        parser.exit()


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, which overrides --config and a goal; `args.from_file` names their options that are not overridden.

    Raises ConfigError when that file is not valid.
    """
    args = _parse(parser, arguments)
    commands = commands_of(parser)
    name = next(name for name, command in commands.items() if command is args.parser)
    from_file = {} if args.config is None else read_options(args.config, name, commands)
    goal = getattr(args, "goal", None) or from_file.get("goal")
    if goal is not None:
        from_file = {**_without_rivals(options_of(GOALS[goal].options, name, commands), from_file), **from_file}
    if from_file:
        given = {name for name, value in vars(args).items() if value not in (None, False)}
        from_file = _without_rivals(from_file, given)
        args.parser.set_defaults(**from_file)
        args = _parse(parser, arguments)
        from_file = {name: value for name, value in from_file.items() if name not in given}
    args.from_file = frozenset(from_file)
    return args


def _without_rivals(options: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The options, by name, without those that exclude one that was given where it counts more."""
    return {name: value for name, value in options.items() if RIVALS.get(name, frozenset()).isdisjoint(given)}


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args, strange = parser.parse_known_args(arguments)
    if strange:
        near = difflib.get_close_matches(strange[0].partition("=")[0], args.parser._option_string_actions, 1)
        if not strange[0].startswith("-"):
            args.parser.error(f"the argument '{strange[0]}' is unexpected; put a value with spaces in quotes")
        args.parser.error(f"'{strange[0]}' is not an option of this command" + (f"; did you mean '{near[0]}'?" if near else ""))
    return args


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0].choices)
