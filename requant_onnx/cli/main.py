"""The command line, requant COMMAND: exit codes and errors.  commands.py has the commands."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from requant_onnx.cli import commands
from requant_onnx.cli.crash import report_crashes
from requant_onnx.cli.many import run_convert_many
from requant_onnx.cli.options import parser_of
from requant_onnx.cli.parser import parse
from requant_onnx.cli.terminal import until_pipe_is_closed
from requant_onnx.cli.topics import run_help
from requant_onnx.errors import INTERRUPTED, INTERRUPTED_MESSAGE, ConvertedError, QualityError, RequantError
from requant_onnx.runtime.sessions import use_custom_ops, use_provider


def run() -> int:
    """Run the command line of this process: `main`, with a message if native code crashes."""
    report_crashes()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0 on success, or, after printing the error, 3 for a model that is already converted or a conversion below
    the required quality, 4 for a validation that failed its gate, 130 after Ctrl-C, and 2 for any other error.
    """
    parser = parser_of(
        convert=commands.run_convert,
        convert_many=run_convert_many,
        validate=commands.run_validate,
        report=commands.run_report,
        compare=commands.run_compare,
        inspect=commands.run_inspect,
        explain=commands.run_explain,
        restore=commands.run_restore,
        show_topic=run_help,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of weights that the terminal cannot show
    try:
        args = parse(parser, arguments)
        use_custom_ops(*([args.custom_ops] if isinstance(args.custom_ops, str) else args.custom_ops or []))
        use_provider(getattr(args, "provider", None))
        with until_pipe_is_closed():  # commands print at their end, when the files are written
            args.run(args)
    except KeyboardInterrupt:
        print(INTERRUPTED_MESSAGE, file=sys.stderr)
        return INTERRUPTED
    except (RequantError, OSError, MemoryError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return error.code if isinstance(error, QualityError) else 3 if isinstance(error, ConvertedError) else 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory; calibrate with fewer images, or use a machine with more memory"
    if isinstance(error, RequantError) or not isinstance(error, OSError):
        return str(error)
    where = f"'{error.filename}'" if error.filename else "standard output"  # a path that cannot be accessed, or a full disk
    return f"cannot use {where} ({error.strerror}); check the path and its permissions"
