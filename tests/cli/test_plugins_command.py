"""`dgrad plugins`, `plugins check` and `plugins new`: wrong plugins, and a new one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import run_with_output

import dgrad
from dgrad.registry import Registry, load_plugin, registry

ROOT = Path(__file__).parents[2]
HOOK = "import dgrad\n@dgrad.hookimpl\ndef dgrad_register_estimators(register):\n    {body}\n"
GOOD = HOOK.format(body="from dgrad_plugins.estimators import ESTIMATORS; register({name!r}, ESTIMATORS['rloo'])")
BIASED = """
import dgrad
from dgrad_plugins.estimators import ESTIMATORS

class Wrong(ESTIMATORS["rloo"]):
    def estimate(self, layer, logits, objective, *, generator=None):
        estimate = super().estimate(layer, logits, objective, generator=generator)
        return dgrad.Estimate(loss=dgrad.add_gradient(estimate.loss, 2 * estimate.loss), codes=estimate.codes)

@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("wrong", Wrong)
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command in this process and returns (exit code, stdout, stderr); what it loads is forgotten."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return run_with_output(capsys, *arguments)

    yield run
    for plugin in registry().plugins[1:]:
        registry().remove(plugin.module)
        sys.modules.pop(plugin.name, None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """`install(distribution, text)`: a distribution of one module, as pip leaves it, and a registry that finds it."""

    @functools.cache
    def fresh() -> Registry:
        result = Registry()
        result.load_entry_points()
        return result

    monkeypatch.setattr("dgrad.registry.registry", fresh)
    site = Path("site").absolute()
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = []

    def install(distribution: str, text: str) -> None:
        module = distribution.replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(text)
        _publish(site, distribution, distribution, module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def _publish(site: Path, distribution: str, name: str, module: str) -> None:
    metadata = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(f"[dgrad]\n{name} = {module}\n")


# Listing


def test_installed_plugins_are_shown_and_broken_ones_with_the_reason(
    command: Command, install: Callable[[str, str], None]
) -> None:
    install("toy-good", GOOD.format(name="toy-good"))
    install("toy-import", "import gpu_magic")
    install("toy-argument", HOOK.replace("(register)", "(registrar)").format(body="pass"))
    install("toy-unknown", HOOK.replace("estimators", "estimatros").format(body="pass"))
    install("toy-failing", HOOK.format(body="1 / 0"))
    install("toy-exit", "raise SystemExit(3)")
    install("toy-nothing", HOOK.format(body="register('toy', None)"))
    install("toy-again", HOOK.format(body="register('toy', print); register('toy', print)"))
    reasons = {
        "toy-import": "ModuleNotFoundError: No module named 'gpu_magic'",
        "toy-argument": "registrar",
        "toy-unknown": "dgrad_register_estimatros",
        "toy-failing": "ZeroDivisionError",
        "toy-exit": "SystemExit: 3",
        "toy-nothing": "dgrad_register_estimators registers 'toy' as None; expected a name and a class or function",
        "toy-again": "dgrad_register_estimators registers 'toy' twice",
    }
    code, out, err = command("plugins", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["toy-good"]["registers"]["estimators"] == ["toy-good"]
    assert (rows["toy-good"]["version"], rows["toy-good"]["left_out"]) == ("1.2", None)
    assert "direct" in rows["builtin"]["registers"]["estimators"]
    for name, reason in reasons.items():
        assert reason in rows[name]["left_out"], name
        assert not any(rows[name]["registers"].values())
        (line,) = [line for line in err.splitlines() if repr(name) in line]
        assert line.startswith(f"warning: plugin {name!r} of distribution {name!r} is left out: ")
    ours = [line for line in err.splitlines() if "toy-" in line]
    assert len(ours) == len(reasons), "one line each, and no line of source"
    out = command("plugins")[1]
    assert "left out: ModuleNotFoundError: No module named 'gpu_magic'" in out
    assert "toy-good" in command("estimators")[1], "the others go on"


def test_names_claimed_twice_are_shown_with_the_remedy(command: Command, install: Callable[[str, str], None]) -> None:
    install("toy-first", GOOD.format(name="toy"))
    install("toy-second", GOOD.format(name="toy"))
    install("toy-bold", GOOD.format(name="rloo"))
    both = "estimator 'toy' is claimed by toy-first (toy-first) and toy-second (toy-second); uninstall one of them"
    bold = (
        "estimator 'rloo' is claimed by dgrad (builtin) and toy-bold (toy-bold); uninstall toy-bold, "
        "or have it register another name"
    )
    code, out, err = command("plugins")
    assert (code, err) == (0, "")
    for line in (both, bold):
        assert f"claimed twice: {line}" in out.splitlines()
    rows = {row["name"]: row for row in json.loads(command("plugins", "--json")[1])}
    assert rows["toy-first"]["claimed_twice"] == [both]
    assert rows["builtin"]["claimed_twice"] == [bold]
    assert command("plugins", "check", "toy") == (2, "", f"error: {both}\n")
    assert command("train", "--estimator", "rloo")[2] == f"error: {bold}\n"
    assert "direct" in command("estimators")[1]


@pytest.mark.parametrize(
    ("hook", "name", "options"),
    [
        ("estimator", "rloo", ["--estimator", "rloo"]),
        ("latent", "categorical", ["--latent", "3x4"]),
        ("dataset", "digits", []),
        ("model", "linear", []),
    ],
)
def test_a_name_that_a_file_claims_too_names_the_option(
    command: Command, hook: str, name: str, options: list[str]
) -> None:
    Path("toy_claims.py").write_text(
        f"import dgrad\n@dgrad.hookimpl\ndef dgrad_register_{hook}s(register):\n    register({name!r}, print)\n"
    )
    code, _, err = command("train", "--plugin", "toy_claims.py", *options)
    assert code == 2
    assert err == (
        f"error: {hook} {name!r} is claimed by dgrad (builtin) and --plugin toy_claims.py; "
        "register another name there, or leave out --plugin toy_claims.py\n"
    )
    assert [path.name for path in Path().iterdir()] == ["toy_claims.py"]


def test_one_module_behind_two_entry_points_is_one_plugin(
    command: Command, install: Callable[[str, str], None]
) -> None:
    install("toy-one", GOOD.format(name="toy"))
    _publish(Path("site"), "toy-two", "toy-two", "toy_one")
    rows = {row["name"]: row for row in json.loads(command("plugins", "--json")[1])}
    reasons = [rows[name]["left_out"] for name in ("toy-one", "toy-two")]
    assert sorted(map(bool, reasons)) == [False, True]
    assert "is the same module as" in "".join(filter(None, reasons))
    assert command("estimators", "--json")[0] == 0
    assert "toy" in [row["name"] for row in json.loads(command("estimators", "--json")[1])]


def test_a_damaged_metadata_file_stops_nothing(command: Command, install: Callable[[str, str], None]) -> None:
    install("toy-damaged", GOOD.format(name="toy"))
    (metadata,) = Path("site").glob("*.dist-info")
    (metadata / "METADATA").unlink()
    code, out, _ = command("plugins")
    assert code == 0
    assert "builtin" in out


# Checking


def test_check_prints_a_table_and_succeeds(command: Command) -> None:
    code, out, err = command("plugins", "check", "rloo", "--set", "samples=2", "--latent", "1x2")
    assert (code, err) == (0, "")
    header, *rows, last = out.splitlines()
    assert header.split() == ["check", "result", "detail"]
    assert any(row.startswith("unbiased ") and " passed " in row for row in rows)
    assert last.startswith("rloo: ")
    assert " 0 failed in " in last


def test_check_exits_with_1_where_a_check_fails(command: Command) -> None:
    Path("toy_wrong.py").write_text(BIASED)
    code, out, err = command("plugins", "check", "wrong", "--plugin", "toy_wrong.py", "--latent", "1x2", "--json")
    result = json.loads(out)
    failed = {row["check"]: row for row in result["checks"] if row["result"] == "failed"}
    assert (code, err) == (1, "")
    assert result["passed"] is False
    assert "unbiased" in failed
    assert "by enumeration" in failed["unbiased"]["detail"]


def test_check_takes_a_latent_too(command: Command) -> None:
    code, out, err = command("plugins", "check", "2x3", "--json")
    result = json.loads(out)
    assert (code, err, result["latent"], result["passed"]) == (0, "", "2x3", True)
    assert {"sample", "mean", "derivatives"} <= {row["check"] for row in result["checks"] if row["result"] == "passed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rlooo"], "unknown estimator 'rlooo'; did you mean 'rloo'?"),
        (["rloo", "--set", "samples=1"], "samples must be a whole number of at least 2; got 1"),
        (["rloo", "--set", "sample=2"], "unknown hyper-parameter of rloo 'sample'; did you mean 'samples'?"),
        (["rloo", "--set", "samples"], "--set expects NAME=VALUE"),
        (["rloo", "--latent", "5"], "cannot read '5'"),
        (["exact", "--latent", "20x10"], "20x10 has 1e+20; expected at most 4096"),
        (["2x3", "--latent", "2x3"], "2x3 is a latent; got --latent, which belongs to an estimator: leave it out"),
        (["pairs:x"], "cannot read 'x'; expected pairs:BITS with whole numbers of at least 1"),
        (["rloo", "--plugin", "nowhere.py"], "no plugin file 'nowhere.py'"),
        ([], "Missing argument 'NAME'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_check_refuses_in_one_line(command: Command, arguments: list[str], message: str) -> None:
    code, out, err = command("plugins", "check", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_options_of_the_group_come_before_the_command(command: Command) -> None:
    Path("toy_early.py").write_text(GOOD.format(name="early"))
    assert command("plugins", "--plugin", "toy_early.py", "check", "early", "--latent", "1x2")[0] == 0
    assert (
        "--json goes behind the command: dgrad plugins check ... --json"
        in command("plugins", "--json", "check", "rloo")[2]
    )


# Beginning a plugin


def _files(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not {"__pycache__", ".pytest_cache", ".ruff_cache"} & set(path.parts)
    }


def test_the_example_is_what_the_command_writes(command: Command) -> None:
    code, out, _ = command("plugins", "new", "weighted-rloo", "--out", "new")
    assert code == 0
    assert _files(Path("new")) == _files(ROOT / "examples" / "plugin")
    assert "dgrad train --estimator weighted-rloo" in out
    assert command("plugins", "new", "weighted-rloo")[0] == 0
    assert _files(Path("dgrad-weighted-rloo")) == _files(Path("new"))


@pytest.mark.processes
@pytest.mark.parametrize("name", ["a", "estimator", "none", "x2-4y", "abcdefghi-klmnopqrstu-wxyz1234"])
def test_what_is_written_is_clean_under_any_name(command: Command, name: str) -> None:
    assert command("plugins", "new", name, "--out", "new")[0] == 0
    assert not any("$" in text for text in _files(Path("new")).values())
    for arguments in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "new"]
        result = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.processes
def test_a_new_plugin_passes_its_own_tests(command: Command) -> None:
    assert command("plugins", "new", "toy-new", "--out", "new")[0] == 0
    path = [str(ROOT / part) for part in (".", "plugins", "cli", "export")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(pytest_, cwd="new", env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def test_a_new_plugin_is_found_once_installed_and_trains(
    command: Command, install: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("plugins", "new", "toy-found", "--out", "new")[0] == 0
    project = tomllib.loads(Path("new/pyproject.toml").read_text())["project"]
    ((name, module),) = project["entry-points"]["dgrad"].items()
    _publish(Path("site"), project["name"], name, module)
    monkeypatch.syspath_prepend(Path("new/src").absolute())
    from dgrad import registry as home

    home.registry.cache_clear()  # as in a new process
    rows = {row["name"]: row for row in json.loads(command("plugins", "--json")[1])}
    assert rows["toy-found"]["registers"]["estimators"] == ["toy-found"]
    assert rows["toy-found"]["distribution"] == "dgrad-toy-found"
    train = ["train", "--estimator", "toy-found", "--latent", "3x4", "--epochs", "1", "--quiet"]
    code, out, err = command(*train, "--set", "weight=linear:0:1")
    assert code == 0
    assert err.startswith("warning: the code has collapsed")  # after one epoch
    assert out.startswith("test bound")
    code, _, err = command("plugins", "new", "toy-found")
    assert "an estimator named 'toy-found' is registered already" in err
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        del sys.modules[loaded]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "expected small letters, digits and single hyphens")
            for name in ("Mine", "my_own", "a--b", "-a", "", "2x")
        ),
        ("a" * 31, "at most 30"),
        ("rloo", "an estimator named 'rloo' is registered already"),
        ("plugins", "a module named 'dgrad_plugins' is installed already"),
    ],
)
def test_names_that_cannot_be_are_refused(command: Command, name: str, message: str) -> None:
    code, out, err = command("plugins", "new", "--out", "new", "--", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(Path().iterdir()) == []


def test_what_is_in_the_way_stays(command: Command) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    Path("file").write_text("x")
    for out, message in (("thesis", "thesis is not empty"), ("file", "file is a file"), ("file/in", "file is a file")):
        code, _, err = command("plugins", "new", "toy", "--out", out)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert {path.name for path in Path().iterdir()} == {"thesis", "file"}
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.txt"]


def test_an_empty_directory_is_filled_where_it_stands(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert command("plugins", "new", "toy", "--out", ".")[0] == 0
    assert {path.name for path in Path().iterdir()} == {"README.md", "pyproject.toml", "src", "tests"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_full_disk_leaves_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch, exists: bool, method: str
) -> None:
    if exists:
        Path("new").mkdir()
    real, calls = getattr(Path, method), []

    def full(path: Path, *arguments: object, **keywords: object) -> object:
        calls.append(path)
        if len(calls) == (3 if method == "write_text" else 1 + exists):
            raise OSError(28, "No space left on device", str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, method, full)
    code, _, err = command("plugins", "new", "toy", "--out", "new")
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left on device" in err
    assert [path.name for path in Path().iterdir()] == ["new"] * exists
    assert not exists or list(Path("new").iterdir()) == []


def test_loading_a_plugin_remembers_that_it_was_not_installed(command: Command) -> None:
    Path("toy_loaded.py").write_text(GOOD.format(name="loaded"))
    plugin = load_plugin("toy_loaded.py")
    assert (plugin.installed, plugin.origin) == (False, "toy_loaded.py")
    assert "loaded" in dgrad.estimators()
