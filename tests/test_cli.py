"""The command line: what it prints is true, what it draws is there, and wrong words get one clear line."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import lowprec as lp
from lowprec import chart, doctor, reference, ruler, studies, tables
from lowprec.cli import app
from lowprec.formats import BLOCK_NAMES, NAMES

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "1-4-3",
    "e4m3fn",
    "e5m2",
    "e4m3fnuz",
    "p3109_k8p4",
    "1-0-7",
    "e2m1fn",
    "1-4-3:subnormals=off",
    "1-7-0",
    "1-1-1:specials=p3109",
]
LARGE = ["bf16", "fp16", "tf32", "fp32", "1-8-0", "p3109_k16p9", "1-0-15"]


def call(*words: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)})


def fails(result: Result, code: int, *parts: str) -> None:
    """One line on stderr that says so, nothing on stdout, no traceback."""
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert all(part in result.stderr for part in parts), result.stderr


def number(text: str) -> Fraction:
    """Read back what `tables.product` wrote."""
    significand, _, power = text.rpartition("2^") if "2^" in text else (text, "", "0")
    return Fraction(significand.rstrip("·") or "1") * Fraction(2) ** int(power)


def test_version() -> None:
    assert call("--version").stdout == f"lowprec {lp.__version__}\n"


def test_without_a_command_it_lists_them() -> None:
    output = call().output
    assert all(command in output for command in ("doctor", "formats", "study"))


# Formats.


@pytest.mark.parametrize("width", [80, 120])
def test_formats_are_listed_whole(width: int) -> None:
    result = call("formats", width=width)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert max(map(len, lines)) <= width
    assert "…" not in result.stdout
    for name, fmt in NAMES.items():
        row = [line.split() for line in lines if line.split()[:1] == [name]]
        if name.startswith("p3109"):
            assert not row
        else:
            assert [str(fmt.bits), str(fmt.bias), str(fmt.emax)] == row[0][2:5]
            assert [tables.product(fmt.min_normal or 0), tables.product(fmt.min_subnormal or 0), fmt.specials] == row[
                0
            ][6:]
            assert math.isclose(float(row[0][5]), fmt.max, rel_tol=6e-3)


def test_all_lists_every_name() -> None:
    words = {line.split()[0] for line in call("formats", "--all", width=120).stdout.splitlines() if line.strip()}
    assert set(NAMES) <= words


def test_block_formats_are_listed_with_the_bits_that_they_take() -> None:
    rows = {line.split()[0]: line.split() for line in call("formats", width=120).stdout.splitlines() if line.strip()}
    assert set(BLOCK_NAMES) <= set(rows)
    assert rows["mxfp6_e3m2"][1:] == ["e3m2fn", "32", "e8m0", "6.25"]
    assert rows["nvfp4"][1:] == ["e2m1fn", "16", "e4m3fn", "4.5"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mxfp4", ["32 elements", "4.25", "e8m0", "floor(log2 amax)", "elements: e2m1fn"]),
        ("mxint8", ["two's complement", "elements: 1-0-7:specials=fnuz"]),
        ("nvfp4", ["16 elements", "4.5", "amax / (6 · tensor scale)", "amax / (6 · 448)"]),
        ("bfp8/16x16:rule=ceil", ["16x16 elements", "8.03125", "nothing saturates"]),
        ("bfp6/tensor", ["the whole tensor", "6: 6"]),
    ],
)
def test_a_block_format_shows_its_blocks_and_its_elements(name: str, said: list[str]) -> None:
    output = call("formats", name, width=120).stdout
    assert [words for words in said if words not in output] == []


def test_a_block_format_is_drawn_by_its_elements(tmp_path: Path) -> None:
    assert call("formats", "mxfp4", "--png", str(tmp_path / "x.png")).exit_code == 0
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", SMALL)
def test_every_code_is_listed_with_its_value(name: str) -> None:
    fmt = lp.format(name)
    listed = {}
    for line in call("formats", name).stdout.splitlines():
        codes = [int(word, 16) for word in re.findall(r"\b0x[0-9a-f]{2}\b", line)]
        rest = re.sub(r"\b0x[0-9a-f]{2}\b", "", line).split()
        for code in codes:
            assert code not in listed
            listed[code] = rest
            check_row(fmt, code, rest)
    assert sorted(listed) == list(range(2 * fmt.sign_code))


def check_row(fmt: lp.FloatFormat, code: int, words: list[str]) -> None:
    """One row of the table: sign, fields of the code, value, decimal, kind."""
    value = reference.decode(code, fmt)
    fields = [width for width in (fmt.ebits, fmt.mbits) if width]
    assert words[0] in ("s", str(code >> (fmt.bits - 1)))
    assert [len(word) for word in words[1 : 1 + len(fields)]] == fields
    assert int("".join(words[1 : 1 + len(fields)]), 2) == code & (fmt.sign_code - 1)
    shown = words[1 + len(fields)].lstrip("±+-")
    assert words[-1] == tables.kind(fmt, code)
    if math.isnan(value):
        assert (shown, words[-1]) == ("NaN", "NaN")
    elif math.isinf(value):
        assert (shown, words[-1]) == ("∞", "infinity")
    else:
        assert number(shown) == abs(Fraction(value))
        assert (words[-1] == "zero") == (value == 0)
        assert (words[-1] == "normal") == (fmt.min_normal is not None and abs(value) >= fmt.min_normal)


@pytest.mark.parametrize("name", LARGE)
def test_binades_of_large_formats_add_up(name: str) -> None:
    fmt = lp.format(name)
    rows = [line.split() for line in call("formats", name, "--all").stdout.splitlines() if " .. 0x" in line]
    assert sum(int(row[2].replace(",", "")) for row in rows) == fmt.max_code
    for first, below, _, spacing, low, _, high, kind in rows:
        assert number(first) == Fraction(fmt.magnitude(int(low, 16)))
        assert number(below) == reference.grid(fmt, (int(high, 16) | fmt.mantissa_mask) + 1)
        if low != high:
            assert number(spacing) == Fraction(fmt.magnitude(int(low, 16) + 1)) - number(first)
        assert kind == tables.kind(fmt, int(low, 16))


def test_the_middle_binades_are_left_out() -> None:
    output = call("formats", "bf16").stdout
    assert f"{254 + 1 - 16} binades more" in output
    assert output.count(" .. 0x") == 16


@pytest.mark.parametrize("name", [*SMALL, *LARGE, *NAMES])
def test_finite_values_are_counted(name: str) -> None:
    fmt = lp.format(name)
    if fmt.bits <= 16:
        assert tables.finite_values(fmt) == len(fmt.values())
    if fmt.bits <= 8:
        nans = sum(math.isnan(reference.decode(code, fmt)) for code in range(2 * fmt.sign_code))
        assert (f"{nans} NaN" in tables.special_codes(fmt)) == (nans > 0)


@given(st.floats(min_value=0, allow_infinity=False, width=32))
def test_numbers_are_shown_exactly_or_marked(x: float) -> None:
    assert number(tables.product(x)) == Fraction(x)
    exact = not tables.decimal(x).startswith("≈ ")
    assert (Fraction(tables.decimal(x).removeprefix("≈ ")) == Fraction(x)) == exact


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_number_lines_mark_every_value(name: str, width: int) -> None:
    fmt = lp.format(name)
    heading, marks, labels = (text.plain for text in ruler.near_zero(fmt, width))
    values = ruler.magnitudes(fmt)
    columns = values[values <= ruler.detail(fmt)] / float(number(heading.rpartition(" ")[2]))
    assert {i for i, mark in enumerate(marks) if mark != " "} == {0, *columns.astype(int).tolist()}
    assert max(len(marks), len(labels)) <= width
    _, marks, labels = (text.plain for text in ruler.whole_range(fmt, width))
    assert max(len(marks), len(labels)) <= width
    assert marks[0] != " "
    assert marks[-1] != " "
    for label in re.finditer(r"\S+", labels):
        assert number(label[0]) > 0


def test_marks_of_a_small_format() -> None:
    _, marks, labels = (text.plain for text in ruler.near_zero(lp.format("e2m1fn"), 40))
    assert marks == "│ │ ┃ │ ┃   │   ┃       │"
    assert labels == "0   1   2^1     2^2"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("e4m3f", "did you mean e4m3fn"),
        ("nope", "there are e4m3fn, e5m2"),
        ("P3109_k8p40", "p3109_k8p4"),
        ("1-9-99", "at most 32 bits"),
    ],
)
def test_an_unknown_format_is_one_line(name: str, part: str) -> None:
    result = call("formats", "1-4-3", name)
    fails(result, 2, part)
    assert result.stderr.count("\n") == 1


# Pictures.


@pytest.mark.parametrize("names", [["1-4-3"], ["fp32"], ["1-5-2", "1-4-3", "1-3-4"], SMALL], ids=" ".join)
def test_pictures_are_drawn(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    result = call("formats", *names, "--png", str(path))
    assert result.exit_code == 0
    assert result.stdout.endswith(f"picture: {path}\n")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 2000
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == (0, 114, 178)).all(axis=-1).sum() > 1000, "the blue of normal values"


def test_pictures_differ_and_repeat(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "again.png")]
    for path, name in zip(paths, ["1-4-3", "1-3-4", "1-4-3"], strict=True):
        chart.draw_formats({name: lp.format(name)}, path)
    first, other, again = (path.read_bytes() for path in paths)
    assert first == again != other


def test_the_style_stays_inside() -> None:
    before = dict(matplotlib.rcParams)
    with chart.style():
        assert matplotlib.rcParams["savefig.dpi"] == 200
    assert dict(matplotlib.rcParams) == before


def test_a_picture_that_cannot_be_saved_is_one_line(tmp_path: Path) -> None:
    fails(call("formats", "1-4-3", "--png", str(tmp_path / "missing" / "x.png")), 1, "No such file or directory")
    fails(call("formats", "--png", "x.png"), 2, "needs the name of a format")
    with pytest.raises(ValueError, match="at least one format"):
        chart.draw_formats({}, tmp_path / "x.png")


@pytest.mark.parametrize("name", [name for name in SMALL if name != "1-1-1:specials=p3109"])
def test_relative_spacing_is_that_of_the_values(name: str) -> None:
    fmt = lp.format(name)
    exponents, spacing = chart.Line(name, fmt).relative_spacing()
    values = [Fraction(value) for value in fmt.values() if value > 0]
    for value, after in itertools.pairwise(values):
        k = math.frexp(float(value))[1] - 1
        assert (after - value) / Fraction(2) ** k == Fraction(2) ** int(spacing[exponents.index(k)])


# Doctor.


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return doctor.examine()


def test_doctor_says_what_is(facts: dict[str, Any]) -> None:
    assert facts["ok"]
    assert facts["torch"] == torch.__version__
    assert set(facts["kernels"]) >= {"quantize", "encode", "decode", "draw_seed"}
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert all(check["ok"] and check["values"] > 10_000 for check in facts["self_check"])
    loaded = facts["libraries"]["cpu"] == "loaded"
    assert facts["kernels"]["quantize"]["cpu"] == ("compiled" if loaded else "eager twin")
    if not torch.cuda.is_available():
        assert {places["cuda"] for places in facts["kernels"].values()} == {"no device"}


@pytest.mark.parametrize("width", [80, 120])
def test_doctor_prints_it(facts: dict[str, Any], width: int) -> None:
    console = Console(width=width, highlight=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        doctor.show(facts, console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for part in (
        facts["torch"],
        *facts["kernels"],
        facts["devices"][0]["name"],
        "equal the reference",
        *facts["libraries"].values(),
    ):
        assert part in text


def test_kernels_are_asked_of_the_dispatcher() -> None:
    library = torch.library.Library("lowprec_doctor", "FRAGMENT")
    library.define("op(Tensor x) -> Tensor")
    assert doctor._kernel("lowprec_doctor::op", "CPU") == "none"
    library.impl("op", lambda x: x, "CompositeExplicitAutograd")
    assert doctor._kernel("lowprec_doctor::op", "CPU") == "eager twin"
    library.impl("op", lambda x: x, "CPU")
    assert doctor._kernel("lowprec_doctor::op", "CPU") == "compiled"
    assert doctor._kernel("lowprec_doctor::op", "CUDA") == "eager twin"


@pytest.mark.parametrize("name", ["quantize", "encode", "decode"])
def test_doctor_finds_a_wrong_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., torch.Tensor] = getattr(doctor, name)

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = right(*args, **kwargs).clone()
        result[-8] += 1
        return result

    monkeypatch.setattr(doctor, name, wrong)
    result = call("doctor", "--json")
    [check, *_] = json.loads(result.stdout)["self_check"]
    assert result.exit_code == 1
    assert not check["ok"]
    assert check["verdict"].startswith(name)
    assert "the reference" in check["verdict"]


def test_doctor_survives_a_library_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "encode", broken)
    result = call("doctor", width=120)
    assert result.exit_code == 1
    assert "WRONG  cpu: failed: no kernel image is available" in result.stdout
    assert "do not trust" in result.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOWPREC_EAGER": "1", "libraries": {"cpu": "off: LOWPREC_EAGER is set"}}, "LOWPREC_EAGER is set"),
        ({"libraries": {"cpu": "not compiled"}}, "same bits, slower. To compile: `make build`"),
        ({"libraries": {"cpu": "failed to load: undefined symbol"}}, "does not load"),
        ({"libraries": {"cpu": "loaded", "cuda": "not compiled"}, "devices": [{}, {}]}, "There is a GPU"),
        ({"libraries": {"cpu": "loaded"}, "ok": False}, "do not trust"),
        ({"libraries": {"cpu": "loaded"}}, ""),
    ],
)
def test_advice_is_plain(change: Mapping[str, Any], words: str) -> None:
    facts = {"LOWPREC_EAGER": None, "devices": [{}], "libraries": {}, "ok": True, **change}
    advice = list(doctor.advice(facts))
    assert len(advice) == bool(words)
    assert words in "".join(advice)


# Studies.


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A study that notes how it was called, and raises what the test puts at the front of that list."""
    calls: list[Any] = []

    def run(name: str, options: dict[str, str], **rest: Any) -> Path:
        error = calls.pop() if calls else None
        calls.append((name, options, rest))
        if error is not None:
            raise error
        return Path(rest["out"])

    monkeypatch.setattr(studies, "names", lambda: [("width", "Does width help?")], raising=False)
    monkeypatch.setattr(studies, "run", run, raising=False)
    return calls


def test_studies_are_listed(study: list[Any]) -> None:
    assert call("study", "list").stdout.split() == ["width", "Does", "width", "help?"]


def test_words_reach_the_study(study: list[Any]) -> None:
    assert call("study", "width", "--quick", "seeds=3", "data=a=b").exit_code == 0
    rest = {"out": Path("runs/width-quick"), "quick": True, "resume": False, "engine": "local"}
    assert study == [("width", {"seeds": "3", "data": "a=b"}, rest)]


def test_folders_of_studies(study: list[Any]) -> None:
    call("study", "width", "--resume")
    call("study", "width", "--out", "elsewhere")
    assert study[-1][2]["out"] == Path("elsewhere")
    study.clear()
    call("study", "width", "--resume")
    assert study[0][2] == {"out": Path("runs/width"), "quick": False, "resume": True, "engine": "local"}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["widht"], "unknown study 'widht': did you mean width?"),
        (["other"], "unknown study 'other': there are width"),
        (["width", "seeds"], "expected key=value, got 'seeds'"),
        (["width", "=3"], "expected key=value, got '=3'"),
        (["width", "a=1", "a=2"], "a is given twice: '1' and '2'"),
        (["width", "--engine", "ray"], "engine 'ray' is not available in this version"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], part: str, study: list[Any]) -> None:
    fails(call("study", *words), 2, part)
    assert study == []


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ValueError("widths must be even"), 2, "error: widths must be even\n"),
        (
            FileNotFoundError(2, "No such file or directory", "text.xz"),
            2,
            "error: text.xz: No such file or directory\n",
        ),
        (
            OSError(28, "No space left on device", "runs/width/cells.json"),
            1,
            "error: runs/width/cells.json: No space left",
        ),
        (OSError("a worker was killed"), 1, "error: a worker was killed\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
    ],
)
def test_failures_of_a_study_are_explained(error: Exception, code: int, part: str, study: list[Any]) -> None:
    study.append(error)
    result = call("study", "width")
    fails(result, code, part)
    assert ("lowprec study width --resume" in result.stderr) == (code == 1)


def test_ctrl_c_says_how_to_go_on(study: list[Any]) -> None:
    study.append(KeyboardInterrupt())
    result = call("study", "width", "--quick", "--out", "my runs", "seeds=3")
    assert result.exit_code == 130
    assert "lowprec study width --quick --out 'my runs' --resume\n" in result.stderr


def test_faults_of_the_program_keep_their_traceback(study: list[Any]) -> None:
    study.append(RuntimeError("shapes do not match"))
    assert isinstance(call("study", "width").exception, RuntimeError)


# As a process.


def test_formats_wait_for_nothing_else() -> None:
    script = (
        "import sys\n"
        "from lowprec.cli import app\n"
        "app(['formats', '1-4-3'], standalone_mode=False)\n"
        "print(sorted({'matplotlib', 'lowprec.studies', 'transformers'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "1.875?2^8" in done.stdout, "a terminal without a character gets a question mark"


def test_doctor_without_compiled_kernels() -> None:
    env = {**os.environ, "LOWPREC_EAGER": "1"}
    command = [sys.executable, "-m", "lowprec", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["LOWPREC_EAGER"] == "1"
    assert set(facts["libraries"].values()) == {"off: LOWPREC_EAGER is set"}
    assert {places["cpu"] for places in facts["kernels"].values()} == {"eager twin"}
    assert facts["ok"]
