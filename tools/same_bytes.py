"""Check that a change of the sources does not change the files that `requant convert` writes.  Needs: pip install '.[test]', git

    python tools/same_bytes.py HEAD                                # compare the working tree with the last commit, all cases
    python tools/same_bytes.py 3a759ad --only "resnet20_cifar10 --form int8" --keep /tmp/outputs --jobs 2
    python tools/same_bytes.py v0.1.0 --models DIR --expect expected.txt

The old commit and the working tree (with untracked files, without ignored ones) are each installed in a separate environment, with
the same versions of the required packages.  Environments are kept in .venv/same_bytes, under a hash of their contents, and deleted
after a week without use.  Both versions convert every model in models/, and three models in --models (default: $REQUANT_MODELS), in
every form with and without calibration; then the bytes are compared.

A line of --expect identifies an intended difference by the first words of its line, and gives the reason; it is not counted:

    resnet56_cifar10 --form int8   # the ranges of activations changed

The exit code is 0 if everything is the same, 1 if something differs, and 2 if the comparison is not possible.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

ROOT = Path(__file__).parents[1]
STORE = ROOT / ".venv" / "same_bytes"
INSTALLED = ("requant_onnx", "setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in")  # sources of the installed version
WEEK = 7 * 24 * 3600
OTHERS = ("resnet56_cifar10", "silero_vad", "rapidocr_cls")
AUDIO = "silero_vad"  # does not take images
CALIBRATE = {AUDIO: f"{AUDIO}.npz", "rapidocr_cls": "noise:48x192"}  # the other models declare their image size
FEEDS, SAMPLES = 32, 512
FORMS, BITS = ("qdq", "folded", "int8"), ("8", "4", "3")
SIZE_PERCENT = 15
SHOWN = 3  # number of facts shown per difference
REFUSED = (2, 3)  # exit codes of errors in a sentence, and of results that are not written


class ComparisonError(Exception):
    """The comparison is impossible.  Its text is one sentence."""


@dataclass(frozen=True)
class Version:
    """An installed state of the sources.  name: old or new."""

    name: str
    environment: Path

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    @property
    def packages(self) -> str:
        """The names and versions of the packages, one per line."""
        return (self.environment / "packages.txt").read_text("utf-8")

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of its processes, with a separate cache."""
        own = {"XDG_CACHE_HOME": str(self.environment / "cache")}
        return {**os.environ, **own}


@dataclass(frozen=True)
class Case:
    """A model and the options of its conversion."""

    model: Path
    options: tuple[str, ...]

    @property
    def label(self) -> str:
        return " ".join([self.model.stem, *self.options])

    @property
    def folder(self) -> str:
        """The name of the directory for its outputs."""
        return self.label.replace(" --", "-").replace(" ", "_").replace(":", "_")


@dataclass(frozen=True)
class Outcome:
    """The result of a version for a case.  said: last line of its error output."""

    code: int
    said: str
    path: Path

    @property
    def text(self) -> str:
        return f"{self.path.stat().st_size:,} bytes" if self.code == 0 else f"exit code {self.code} ({self.said})"


class Kind(Enum):
    """The kind of outcome of a case."""

    SAME = "same"
    DIFFERENT = "different"
    EXPECTED = "expected"
    REFUSED = "refused by both"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case, with a description."""

    case: Case
    kind: Kind
    text: str


@dataclass(frozen=True)
class Expected:
    """An intended difference.  words: first words of the case's line."""

    words: tuple[str, ...]
    reason: str

    def covers(self, case: Case) -> bool:
        return tuple(case.label.split())[: len(self.words)] == self.words


def git(*arguments: str) -> bytes:
    """The output of git.  Raises ComparisonError."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise ComparisonError(
            f"git {arguments[0]} failed ({_last_line(done.stderr)}); check the commit, and that {ROOT} is a clone"
        )
    return done.stdout


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def extract_commit(commit: str, folder: Path) -> None:
    """Extract the sources of a commit.  Raises ComparisonError."""
    found = git("rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=BytesIO(git("archive", "--format=tar", found))) as archive:
        archive.extractall(folder, filter="data")


def copy_tree(folder: Path) -> None:
    """Copy the current sources: tracked and untracked files, except ignored and deleted ones."""
    for name in git("ls-files", "-coz", "--exclude-standard").decode("utf-8", "surrogateescape").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # deleted just now
                shutil.copyfile(ROOT / name, folder / name)


def hash_of(sources: Path) -> str:
    """A hash of the installed sources and this Python version."""
    digest = hashlib.sha256(sys.version.encode())
    for top in INSTALLED:
        within = sorted((sources / top).rglob("*")) if (sources / top).is_dir() else [sources / top]
        for path in within:
            if path.is_file():
                data = path.read_bytes()
                digest.update(f"{path.relative_to(sources)} {len(data)} ".encode("utf-8", "surrogateescape"))
                digest.update(data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked_store() -> Iterator[None]:
    """Prevent other runs from installing or deleting environments."""
    STORE.mkdir(parents=True, exist_ok=True)
    with open(STORE / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def installed(name: str, sources: Path) -> Version:
    """The version in its environment, created if missing.  Raises ComparisonError when it cannot be installed."""
    version = Version(name, STORE / hash_of(sources))
    with locked_store():
        if not (version.environment / "packages.txt").exists():
            print(f"installing the {name} version in {version.environment}", flush=True)
            _install(version, sources)
        os.utime(version.environment)
        for other in STORE.iterdir():
            if other.is_dir() and other.stat().st_mtime < time.time() - WEEK:
                shutil.rmtree(other)
    return version


def _install(version: Version, sources: Path) -> None:
    """Install, and write packages.txt last: without it an environment is incomplete.  All use the packages of the first one."""
    pins = STORE / "constraints.txt"
    _run_install(version, [sys.executable, "-m", "venv", "--clear", str(version.environment)])
    pip = [str(version.python), "-I", "-m", "pip", "--disable-pip-version-check"]
    known = ["--constraint", str(pins)] if pins.exists() else []
    _run_install(version, [*pip, "install", "--quiet", *known, str(sources)])
    packages = _run_install(version, [*pip, "freeze", "--exclude", "requant_onnx"])
    for path in (version.environment / "packages.txt", *(() if known else (pins,))):
        path.write_bytes(packages)


def _run_install(version: Version, command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False, cwd=STORE)
    if done.returncode:
        raise ComparisonError(
            f"the {version.name} version cannot be installed ({_last_line(done.stderr)}); "
            f"where it needs other versions of packages, delete {STORE}"
        )
    return done.stdout


def versions_of(commit: str) -> tuple[Version, Version]:
    """The old and the new version.  Raises ComparisonError."""
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old", Path(folder) / "new"
        extract_commit(commit, old)
        copy_tree(new)
        made = installed("old", old), installed("new", new)
    if made[0].environment == made[1].environment:
        print("note: both versions have the same sources, so this only shows that a second run gives the same bytes")
    if made[0].packages != made[1].packages:
        changed = sorted(set(made[0].packages.splitlines()) ^ set(made[1].packages.splitlines()))
        print(f"note: the versions run with different packages: {', '.join(changed)}")
    return made


def models_of(folder: Path | None) -> list[Path]:
    """Our models, then the others.  Raises ComparisonError when one is missing."""
    ours = sorted((ROOT / "models").glob("*.onnx"))
    if not ours:
        raise ComparisonError(f"there is no model in {ROOT / 'models'}; check the clone")
    if folder is None:
        raise ComparisonError(f"the directory of {', '.join(OTHERS)} is unknown; give --models DIR, or set REQUANT_MODELS")
    others = [folder.absolute() / f"{name}.onnx" for name in OTHERS]
    missing = [path.name for path in others if not path.is_file()]
    if missing:
        raise ComparisonError(f"{folder} lacks {', '.join(missing)}; give the directory that contains them as --models DIR")
    return [*ours, *others]


def cases_of(model: Path) -> list[Case]:
    """The cases of a model: every form at every width; the paper's recipe; bits chosen for a size."""
    calibrated = ("--calibrate", CALIBRATE.get(model.stem, "noise"), "--calibrate-limit", "64")
    options: list[tuple[str, ...]] = []
    for form, bits in itertools.product(FORMS, BITS):
        plain = ("--form", form, "--bits", bits)
        options += [(*plain, *calibrated)] if form == "int8" else [plain, (*plain, *calibrated)]
    size = str(model.stat().st_size * SIZE_PERCENT // 100)
    chosen = ("--bits", "auto", "--size", size, "--form", "folded")
    options += [("--bits", "4", "--recipe", "paper"), chosen, (*chosen, *calibrated)]
    return [Case(model, own) for own in options]


def write_feeds(model: Path, path: Path) -> None:
    """Write random inputs by name, one per row; free sizes become 1, those of audio SAMPLES."""
    random, feeds = np.random.default_rng(0), {}
    for item in onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).get_inputs():
        if item.type == "tensor(int64)":  # the sampling rate
            feeds[item.name] = np.full((FEEDS, *item.shape[1:]), 16_000, np.int64)
        else:
            free = SAMPLES if len(item.shape) == 2 else 1
            sizes = [size if isinstance(size, int) else free for size in item.shape[1:]]
            feeds[item.name] = random.normal(scale=0.1, size=(FEEDS, *sizes)).astype(np.float32)
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **feeds)


def convert(version: Version, case: Case, work: Path, outputs: Path) -> Outcome:
    """Run a version in a directory without sources of either version."""
    path = outputs / case.folder / version.name / f"{case.model.stem}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [str(version.python), "-I", "-m", "requant_onnx", "convert", "--quiet", str(case.model), str(path), *case.options]
    done = subprocess.run(command, capture_output=True, check=False, cwd=work, env=version.variables)
    return Outcome(done.returncode, _last_line(done.stderr), path)


def judge(case: Case, old: Outcome, new: Outcome, expected: Sequence[Expected]) -> Verdict:
    """Compare both outcomes of a case.  REFUSED means that both report an error in a sentence; if both crash, they differ."""
    if old.code == new.code and new.code in REFUSED:
        later = "" if old.said == new.said else f"; now: {new.said}"
        return Verdict(case, Kind.REFUSED, f"refused by both: {old.said}{later}")
    if old.code == new.code == 0 and _sha256(old.path) == _sha256(new.path):
        return Verdict(case, Kind.SAME, f"{old.text}, same")
    facts = differences(old.path, new.path) if old.code == new.code == 0 else []
    found = f"old {old.text}, new {new.text}" + "".join(f"; {fact}" for fact in facts[:SHOWN])
    reasons = [item.reason for item in expected if item.covers(case)]
    if reasons:
        return Verdict(case, Kind.EXPECTED, f"{found}, expected: {reasons[0]}")
    return Verdict(case, Kind.DIFFERENT, f"{found}, DIFFERENT")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(old: Path, new: Path) -> list[str]:
    """The differences between two models, one sentence per part."""
    before, after = parts_of(onnx.load(old)), parts_of(onnx.load(new))
    facts = []
    for name in before:
        one, two = before[name], after[name]
        changed = [key for key in {**one, **two} if one.get(key) != two.get(key)]
        if changed:
            facts.append(f"{name} differ ({len(changed)} of {len({**one, **two})}, the first is '{changed[0]}')")
        elif list(one) != list(two):
            facts.append(f"the order of {name} differs")
    return facts or ["the same in another encoding"]


def parts_of(model: onnx.ModelProto) -> dict[str, dict[str, bytes]]:
    """The parts of a model: part -> name -> content."""
    graph = model.graph
    named = {"initializers": graph.initializer, "inputs": graph.input, "outputs": graph.output, "value_info": graph.value_info}
    return {
        "metadata_props": {item.key: item.value.encode() for item in model.metadata_props},
        "opset_import": {item.domain: str(item.version).encode() for item in model.opset_import},
        "nodes": {f"{node.op_type} {' '.join(node.output)}": _bytes_of(node) for node in graph.node},
        **{name: {item.name: _bytes_of(item) for item in items} for name, items in named.items()},
        "functions": {item.name: _bytes_of(item) for item in model.functions},
    }


def _bytes_of(item: onnx.NodeProto | onnx.TensorProto | onnx.ValueInfoProto | onnx.FunctionProto) -> bytes:
    return bytes(item.SerializeToString(deterministic=True))


def read_expected(path: Path | None) -> list[Expected]:
    """The intended differences.  Raises ComparisonError when the file is missing or a line is invalid."""
    try:
        lines = [] if path is None else path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ComparisonError(f"cannot read {path} ({error})") from None
    found = []
    for line in lines:
        words, _, reason = line.partition("#")
        if words.strip() and not reason.strip():
            raise ComparisonError(f"the line '{line.strip()}' of {path} gives no reason; write it as MODEL OPTIONS # REASON")
        if words.strip():
            found.append(Expected(tuple(words.split()), reason.strip()))
    return found


def compare(cases: Sequence[Case], versions: Sequence[Version], args: argparse.Namespace) -> Iterator[Verdict]:
    """The verdicts, in the order of the cases."""
    expected = read_expected(args.expect)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(folder)
        outputs = work / "outputs" if args.keep is None else args.keep.absolute()
        for model in {case.model for case in cases if case.model.stem == AUDIO}:
            write_feeds(model, work / CALIBRATE[AUDIO])

        def verdict(case: Case) -> Verdict:
            old, new = (convert(version, case, work, outputs) for version in versions)
            found = judge(case, old, new, expected)
            if args.keep is None:
                shutil.rmtree(outputs / case.folder)
            return found

        yield from pool.map(verdict, cases)


def summary(counts: Mapping[Kind, int], expects: bool) -> str:
    kinds = (Kind.SAME, Kind.DIFFERENT, *((Kind.EXPECTED,) if expects else ()), Kind.REFUSED)
    return ", ".join(f"{counts[kind]} {kind.value}" for kind in kinds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("REQUANT_MODELS")
    parser.add_argument("old", metavar="OLD_COMMIT", help="commit to which the working tree is compared")
    parser.add_argument("--models", type=Path, default=Path(folder) if folder else None, help="directory of further models")
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="run only cases whose model and options contain this")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="number of parallel cases (default: 1)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep the outputs here, in one directory per case")
    parser.add_argument("--expect", metavar="FILE", type=Path, help="file of intended differences, see above")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    counts: Counter[Kind] = Counter()
    try:
        cases = [case for model in models_of(args.models) for case in cases_of(model) if args.only in case.label]
        if not cases or args.jobs < 1:
            raise ComparisonError(f"no case contains '{args.only}' in its line" if args.jobs >= 1 else "--jobs must be 1 or more")
        unused = set(() if args.only else read_expected(args.expect))
        for found in compare(cases, versions_of(args.old), args):
            counts[found.kind] += 1
            unused -= {item for item in unused if found.kind is Kind.EXPECTED and item.covers(found.case)}
            print(f"{found.case.label}: {found.text}", flush=True)
    except ComparisonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for item in sorted(unused, key=lambda item: item.words):
        print(f"note: '{' '.join(item.words)}' was expected to differ, but does not")
    print(summary(counts, args.expect is not None))
    return 1 if counts[Kind.DIFFERENT] else 0


if __name__ == "__main__":
    sys.exit(main())
