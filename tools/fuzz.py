"""Mutate real models and convert them: each run must end with a valid file, or one sentence and exit code 2 or 3.  Needs: '.[test]'

    python tools/fuzz.py --seconds 1800 --seed 1 MODEL.onnx ...     # also mutate these models, not only random CNNs
    python tools/fuzz.py --seconds 60 --seed 0                      # the run of the continuous integration
    python tools/fuzz.py --replay found/CASE                        # repeat a finding

Bytes are flipped, cut, copied and inserted; fields of the parsed message get values of other fields, or invalid values: shapes,
names, types, operators, references to data files, and cycles.  Hypothesis chooses the mutations, and shrinks findings.  Each
model is converted in another process, with bounded memory.  A finding is an exit code other than 0, 2 and 3, a message
that is not one line, a run of more than TIMEOUT seconds or MEMORY bytes, a changed input, a file left behind or written
elsewhere, an invalid output, or an output that ONNX Runtime does not run although it runs the input.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from onnx import TensorProto
from oracle import feeds_for, run
from random_models import random_model

TIMEOUT = 60.0
MAX_INPUT = 1 << 20  # limit on the values in an input for running models
MEMORY = 2 << 30
OPTIONS: tuple[list[str], ...] = (
    [],
    ["--bits", "4", "--form", "folded", "--transform", "sqrt"],
    ["--recipe", "paper", "--external-data"],
    ["--bits", "4", "--form", "int8", "--calibrate", "noise", "--calibrate-limit", "8"],
    ["--bits", "3", "--form", "folded", "--calibrate", "noise:8x8", "--calibrate-limit", "8"],
    ["--bits", "auto", "--size", "20kB"],
)
HOSTILE_INTEGERS = (0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
HOSTILE_STRINGS = ("", "x", "a/b", "../../outside", "/etc/passwd", "\0", "é\n", "%s{0}", "w" * 300, "Conv", "If", "Loop", "local")
HOSTILE_FLOATS = (0.0, -1.0, 1e30, 1e-42, float("inf"), float("nan"))
REFERENCES = ("data.bin", "../outside.bin", "/etc/passwd", "missing.bin", "link.bin", ".", "")
NUMBERS = ("0", "4", "-1", "99999999999999999999", "18446744073709551615", "x", "", "4294967296")
Step = tuple[str, int]


# ------------------------------------------------------------------------------------------------ mutations


def mutate(data: bytes, steps: list[Step]) -> bytes:
    """Apply steps on bytes and on messages in turn; if a message no longer parses, only the steps on bytes apply."""
    for kind, number in steps:
        random = Random(number)
        if kind in BYTES:
            data = BYTES[kind](data, random)
            continue
        model = onnx.ModelProto()
        with contextlib.suppress(DecodeError, ValueError):
            model.ParseFromString(data)
            MESSAGES[kind](model, random)
            data = model.SerializeToString()
    return data


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 4, 64))):
        changed[random.randrange(min(len(changed), random.choice((64, 1 << 40))))] = random.randrange(256)
    return bytes(changed)


def _cut(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + (data[start + random.randrange(64) :] if random.random() < 0.7 else b"")


def _copy(data: bytes, random: Random) -> bytes:
    start, target = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
    return data[:target] + data[start : start + random.randrange(256)] * random.choice((1, 1, 2, 100)) + data[target:]


def _put(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + random.choice((b"\xff" * 16, b"\x0a" * 200, b"\x3a\x00" * 2000, random.randbytes(8))) + data[start:]


def _fields(message: Message) -> list[tuple[Message, Any]]:
    """All fields that are set, at all depths, as (message, field)."""
    found = []
    for descriptor, value in message.ListFields():
        found.append((message, descriptor))
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value if hasattr(value, "extend") else (value,):
                found += _fields(each)
    return found


def _value(descriptor: Any, random: Random) -> Any:
    if descriptor.type == FieldDescriptor.TYPE_ENUM:
        return random.choice(descriptor.enum_type.values).number
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        return random.choice(HOSTILE_STRINGS)
    if descriptor.type == FieldDescriptor.TYPE_BYTES:
        return random.choice((b"", b"x", b"\xff" * 36, random.randbytes(random.randrange(400))))
    return random.choice(HOSTILE_FLOATS if descriptor.cpp_type in (5, 6) else (*HOSTILE_INTEGERS, *range(24)))


def _set(model: onnx.ModelProto, random: Random) -> None:
    """Change the value of a field."""
    message, descriptor = random.choice(_fields(model))
    value = getattr(message, descriptor.name)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            message.ClearField(descriptor.name)
        elif hasattr(value, "extend"):
            value[random.randrange(len(value))] = _value(descriptor, random)
        else:
            setattr(message, descriptor.name, _value(descriptor, random))


def _move(model: onnx.ModelProto, random: Random) -> None:
    """Copy a value between fields of the same type: other inputs, shapes, types, names, nodes."""
    fields = _fields(model)
    message, descriptor = random.choice(fields)
    sources = [m for m, d in fields if d is descriptor or d.full_name == descriptor.full_name]
    source, value = getattr(random.choice(sources), descriptor.name), getattr(message, descriptor.name)
    if not hasattr(value, "extend"):
        (value.CopyFrom if isinstance(value, Message) else lambda new: setattr(message, descriptor.name, new))(source)
        return
    taken = type(source[0])() if isinstance(source[0], Message) else random.choice(source)
    if isinstance(taken, Message):
        taken.CopyFrom(random.choice(source))
    at = random.randrange(len(value))
    match random.randrange(4):
        case 0:
            del value[at]
        case 1:
            value.insert(at, taken)
        case 2:
            value.append(taken)
        case _:
            value[at].CopyFrom(taken) if isinstance(taken, Message) else value.__setitem__(at, taken)


def _rename(model: onnx.ModelProto, random: Random) -> None:
    """Give an input or output of a node another tensor's name: cycles, two producers, none."""
    names = [name for node in model.graph.node for name in (*node.input, *node.output)] + ["", "nowhere"]
    node = random.choice(model.graph.node) if model.graph.node else onnx.NodeProto()
    field = random.choice((node.input, node.output))
    if field:
        field[random.randrange(len(field))] = random.choice(names)


def _weights(model: onnx.ModelProto, random: Random) -> None:
    """Set values that training does not produce."""
    floats = [item for item in model.graph.initializer if item.data_type == TensorProto.FLOAT and item.raw_data]
    if floats:
        tensor = random.choice(floats)
        values = np.frombuffer(tensor.raw_data, np.float32).copy()
        hit = slice(None) if random.random() < 0.5 else slice(random.randrange(len(values)), None, random.choice((1, 7, 10**9)))
        values[hit] = random.choice((*HOSTILE_FLOATS, 3e38, -3e38, 1e-45, 1.0))
        tensor.raw_data = values.tobytes()


def _shape(model: onnx.ModelProto, random: Random) -> None:
    """Change a shape, with the same number of values."""
    if model.graph.initializer:
        tensor = random.choice(model.graph.initializer)
        count, divisor = math.prod(tensor.dims), random.choice((1, 2, 3, 4, 9))
        dims = [count // divisor, *([divisor] if divisor > 1 else []), *[1] * random.randrange(4)]
        random.shuffle(dims)
        if math.prod(dims) == count:
            tensor.dims[:] = dims


def _declare(model: onnx.ModelProto, random: Random) -> None:
    """Change the declared size of an input, an output or an intermediate value."""
    infos = [*model.graph.input, *model.graph.input, *model.graph.output, *model.graph.value_info]
    dims = [dim for info in infos for dim in info.type.tensor_type.shape.dim]
    if dims:
        random.choice(dims).dim_value = random.choice((0, 1, -1, 3, 224, 2**20, 2**31, 2**40, 2**62))


def _attribute(model: onnx.ModelProto, random: Random) -> None:
    """Change a number in an attribute."""
    found = [item for node in model.graph.node for item in node.attribute if item.ints or item.HasField("i")]
    if found:
        attribute, value = random.choice(found), random.choice((0, 1, 2, 3, 5, -1, 100, 2**31, -(2**62)))
        if attribute.ints:
            attribute.ints[random.randrange(len(attribute.ints))] = value
        else:
            attribute.i = value


def _refer(model: onnx.ModelProto, random: Random) -> None:
    """Declare that the values of an initializer are in a file."""
    if not model.graph.initializer:
        return
    tensor = random.choice(model.graph.initializer)
    entries = {"location": random.choice(REFERENCES), "offset": random.choice(NUMBERS), "length": random.choice(NUMBERS)}
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    for key, value in entries.items():
        if random.random() < 0.7 or key == "location":
            tensor.external_data.add(key=key, value=value)


def _nest(model: onnx.ModelProto, random: Random) -> None:
    """Nest the graph inside an If inside an If ..."""
    for _ in range(random.choice((1, 3, 12, 40))):
        body = onnx.GraphProto()
        body.CopyFrom(model.graph)
        del model.graph.node[:]
        node = model.graph.node.add(op_type="If", input=["x"], output=[item.name for item in body.output])
        for name in ("then_branch", "else_branch")[: random.choice((1, 1, 2)) if body.ByteSize() < 1 << 20 else 1]:
            node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)


def _recurse(model: onnx.ModelProto, random: Random) -> None:
    """Add functions that call each other."""
    names = ["conv0", "deep", "again"][: random.randrange(1, 4)]
    for name, called in zip(names, [*names[1:], names[0]], strict=True):
        function = model.functions.add(name=name, domain="local", input=["x"], output=["z"])
        function.opset_import.add(domain="", version=18)
        function.opset_import.add(domain="local", version=1)
        for k in range(random.choice((1, 2))):
            function.node.add(op_type=called, domain="local", input=["x"], output=["z" if k == 0 else f"t{k}"])
        function.node.add(op_type="Conv", input=["x", "z"], output=["c"])
    model.graph.node.add(op_type=names[0], domain="local", input=["x"], output=["fz"])
    if not any(item.domain == "local" for item in model.opset_import):
        model.opset_import.add(domain="local", version=1)


BYTES = {"flip": _flip, "cut": _cut, "copy": _copy, "put": _put}
MESSAGES = {"set": _set, "move": _move, "rename": _rename, "refer": _refer, "nest": _nest, "recurse": _recurse,
            "weights": _weights, "shape": _shape, "declare": _declare, "attribute": _attribute}  # fmt: skip
GENTLE = (
    "set",
    "move",
    "rename",
    "weights",
    "weights",
    "shape",
    "declare",
    "declare",
    "attribute",
    "attribute",
)  # these leave most models valid enough to pass the first checks
STEPS = st.lists(st.tuples(st.sampled_from([*MESSAGES, *GENTLE, *GENTLE, *BYTES]), st.integers(0, 2**32)), min_size=1, max_size=4)


# ------------------------------------------------------------------------------------------------ one case


class Case:
    """A directory with a model, other files that an attacker may have put there, and a file outside."""

    def __init__(self, folder: Path, data: bytes) -> None:
        self.outside, self.home = folder / "outside.bin", folder / "home"
        shutil.rmtree(folder, ignore_errors=True)
        self.home.mkdir(parents=True)
        self.outside.write_bytes(b"secret" * 4000)
        (self.home / "data.bin").write_bytes(b"\x3c\x00" * 20000)
        (self.home / "link.bin").symlink_to(self.outside)
        (self.home / "in.onnx").write_bytes(data)
        self.before = self._contents()

    def _contents(self) -> dict[str, str]:
        files = [path for path in self.home.parent.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.home.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def wrong(self, code: int, message: str) -> str:
        """The violation of a run, '' if there is none."""
        after = self._contents()
        made = {name for name in after if name not in self.before}
        if any(after.get(name) != digest for name, digest in self.before.items()):
            return "changed a file"
        if code in (2, 3):
            lines = message.strip().splitlines()
            clean = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1500
            return "left files behind an error" if made else "" if clean else f"message: {message[:300]}"
        if code != 0:
            return f"exit code {code}: {message[-1500:]}"
        if not made <= {"home/out.onnx", "home/out.onnx.data"} or "home/out.onnx" not in made:
            return f"wrote {sorted(made)}"
        return self._invalid()

    def _invalid(self) -> str:
        if not _complaint(self.home / "in.onnx"):
            onnx.checker.check_model(str(self.home / "out.onnx"))
        plain = _is_plain(onnx.load(self.home / "in.onnx"))
        refused = _fails(self.home / "out.onnx", plain)
        return f"output refused by ONNX Runtime: {refused}" if refused and not _fails(self.home / "in.onnx", plain) else ""


def _complaint(path: Path) -> str:
    """The error of onnx.checker for an input, which may be converted anyway because ONNX Runtime runs it; '' if none."""
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        return str(error)
    return ""


def _fails(path: Path, plain: bool) -> str:
    """The error of onnx.checker for a model, or, if it is plain, of ONNX Runtime on random inputs; '' if none."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=plain)
        if plain:
            run(model, feeds_for(model))
    except Exception as error:
        return str(error)[:300]
    return ""


def _is_plain(model: onnx.ModelProto) -> bool:
    """Whether its declared sizes are plausible: no -1, which some exporters write for an unknown size, and none so large that
    running the model would take long.  Operators of older opsets do not check such a size; those of newer ones do."""
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return not _takes_much(model) and all(dim.dim_value >= 0 for info in infos for dim in info.type.tensor_type.shape.dim)


def _takes_much(model: onnx.ModelProto) -> bool:
    """Whether running it in ONNX Runtime may take much time and memory."""
    sizes = [math.prod(max(d.dim_value, 1) for d in item.type.tensor_type.shape.dim) for item in model.graph.input]
    pads = (n for node in model.graph.node for item in node.attribute if item.name == "pads" for n in item.ints)
    return max([*sizes, *pads], default=1) > MAX_INPUT


def work() -> None:
    """Run the other process: it reads lines with directory and options, and writes lines with the violation and the memory used."""
    from requant_onnx.cli.main import main  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY))
    for line in sys.stdin:
        folder, options = json.loads(line)
        home = Path(folder) / "home"
        case = Case.__new__(Case)
        case.outside, case.home = Path(folder) / "outside.bin", home
        case.before = case._contents()
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main(["convert", str(home / "in.onnx"), str(home / "out.onnx"), *options])
            wrong = case.wrong(code, said.getvalue())
        except BaseException:
            code, wrong = -1, traceback.format_exc()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([code, wrong, memory]), flush=True)


class Worker:
    """A process that converts, restarted when it dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self.verdicts: Counter[int] = Counter()

    def run(self, data: bytes, options: list[str]) -> str:
        Case(self.folder, data)
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(self.folder), options]) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            answer = self.process.stdout.readline() if waiting.select(TIMEOUT) else None
        if not answer:
            return self._end(answer is None)
        code, wrong, memory = json.loads(answer)
        self.verdicts[code] += 1
        if memory > MEMORY:
            self.process.kill()
            self.process.wait()
            return f"took {memory >> 20} MB of memory"
        return str(wrong)

    def _end(self, silent: bool) -> str:
        """Stop a process that is silent, or wait for one that is ending."""
        assert self.process is not None
        if silent:
            self.process.kill()
        code = self.process.wait()
        return f"no answer in {TIMEOUT:.0f} s" if silent else f"the process died ({code})"


# ------------------------------------------------------------------------------------------------ the search


class Found(Exception):  # noqa: N818
    """A case with a violation."""


def signature(wrong: str) -> str:
    """The identity of a finding: the last stack frame in requant_onnx and the error."""
    frames = [line.strip() for line in wrong.splitlines() if "requant_onnx/" in line]
    return f"{frames[-1] if frames else ''} {wrong.strip().splitlines()[-1][:80]}".strip()


def fuzz(seconds: float, first: int, models: list[Path], found: Path) -> tuple[Counter[int], dict[str, Path]]:
    """Fuzz for some seconds; return (runs by exit code, findings: signature -> directory)."""
    sources = [random_model(k).SerializeToString() for k in range(24)] + [path.read_bytes() for path in models]
    findings: dict[str, Path] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder) / "case")
        last: list[Any] = []

        def attempt(source: int, steps: list[Step], options: int) -> None:
            data = mutate(sources[source], steps)
            wrong = worker.run(data, OPTIONS[options]) if time.monotonic() < end else ""
            if wrong.startswith(("took", "no answer", "the process died")) and "--calibrate" in OPTIONS[options] and _costly(data):
                wrong = ""  # the resources for running such a model are not our concern
            if wrong and signature(wrong) not in findings:
                last[:] = [wrong, data, OPTIONS[options], steps]
                raise Found(signature(wrong))

        batch = 0
        while time.monotonic() < end:
            search = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                              phases=(Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False)  # fmt: skip
            given_case = given(st.integers(0, len(sources) - 1), STEPS, st.integers(0, len(OPTIONS) - 1))
            try:
                seed(first + batch)(search(given_case(attempt)))()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) or not last:
                    raise
                findings[signature(last[0])] = keep(found, *last)
                print(f"found: {signature(last[0])}", flush=True)
            batch += 1
        if worker.process is not None:
            worker.process.kill()
    return worker.verdicts, findings


def _costly(data: bytes) -> bool:
    model = onnx.ModelProto()
    with contextlib.suppress(DecodeError):
        model.ParseFromString(data)
    return _takes_much(model)


def keep(found: Path, wrong: str, data: bytes, options: list[str], steps: list[Step]) -> Path:
    folder = found / hashlib.sha256(data).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.onnx").write_bytes(data)
    (folder / "wrong.json").write_text(json.dumps({"options": options, "steps": steps, "wrong": wrong}, indent=1))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("found"), help="directory for findings")
    parser.add_argument("--replay", type=Path, help="directory of a finding to repeat")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    if args.replay:
        options = json.loads((args.replay / "wrong.json").read_text())["options"]
        with tempfile.TemporaryDirectory() as folder:
            wrong = Worker(Path(folder) / "case").run((args.replay / "in.onnx").read_bytes(), options)
        print(wrong or "all is well")
        return 1 if wrong else 0
    verdicts, findings = fuzz(args.seconds, args.seed, args.models, args.found)
    print(f"{verdicts.total()} runs: {verdicts[0]} converted, {verdicts[2] + verdicts[3]} refused; {len(findings)} findings")
    for text, kept in findings.items():
        print(f"{kept}: {text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
