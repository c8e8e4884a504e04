"""The benchmarks measure what they say: structure, ratios and counted work; never a time."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dgrad
from benchmarks import choosing, device, growth, measuring, one_variable, run, settings, sweep
from benchmarks.__main__ import PARTS, main
from benchmarks.growth import Point
from benchmarks.plain import COMPILED, PLAIN, plain_steps
from benchmarks.settings import Settings
from dgrad.config import configure
from dgrad.kernels import code_sweeps as sweeps
from dgrad.kernels import cpu
from dgrad.training.run_directory import Run
from dgrad.vae import reconstruction

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def _main(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _results(out: Path) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]
    return parts


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The report of a quick run on invented images; growth has a test of its own."""
    out = tmp_path_factory.mktemp("benchmarks")
    arguments = ("--quick", "--latents", "3x4,2x2", "--device", "cpu", "--compile", "off")
    assert _main("steps", "library", "sweep", "deep", "support", "refined", "naive", *arguments, "--out", out) == 0
    assert not list(out.glob("*unfinished*"))
    yield out


@pytest.mark.slow
def test_the_report_has_every_part_and_every_plot(quick: Path) -> None:
    text = (quick / "report.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        "steps",
        "library",
        "sweep",
        "deep",
        "support",
        "refined",
        "naive",
    ]
    shown = [line.split("(")[-1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert sorted(shown) == sorted(path.name for path in quick.glob("*.png"))
    assert shown
    for name in shown:
        assert (quick / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_machine_is_described(quick: Path) -> None:
    for part in _results(quick).values():
        machine = part["machine"]
        assert machine["torch"] == torch.__version__
        assert machine["threads"] == torch.get_num_threads()
        assert machine["dgrad"] == dgrad.__version__
        assert machine["processor"]
        assert part["data"] == "invented"


def _contests(figures: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """Every table of contestants inside a part's figures."""
    if isinstance(figures, dict):
        if any(isinstance(row, dict) and "ratios" in row for row in figures.values()):
            yield figures
        else:
            for inner in figures.values():
                yield from _contests(inner)


@pytest.mark.slow
def test_ratios_are_quotients_of_the_medians_beside_them(quick: Path) -> None:
    contests = [rows for part in _results(quick).values() for rows in _contests(part["figures"])]
    # steps of two models, sweeps, deep of three likelihoods, refined, naive, of two latents each; one case of support;
    # of the library README's lines for two latents and three cases more
    assert len(contests) == 2 * 2 + 2 + 3 * 2 + 2 + 2 + 1 + 5
    for rows in contests:
        for row in rows.values():
            assert row["least"] <= row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
            assert row["rounds"] == 3
            assert row["ratios"]
            for reference, ratio in row["ratios"].items():
                assert ratio == row["median"] / rows[reference]["median"]
                assert row["least_ratios"][reference] == row["least"] / rows[reference]["least"]


@pytest.mark.slow
def test_every_estimator_that_fits_is_timed_beside_the_plain_step(quick: Path) -> None:
    for latents in _results(quick)["steps"]["figures"].values():
        assert list(latents) == ["3x4", "2x2"]
        for rows in latents.values():
            assert set(rows) == {"plain autograd", "gumbel-softmax", "direct-rb", "rloo"}
    binary_only = Settings(latents=("3x4",), quick=True, compile="off", estimators=("arm",))
    with_arm = PARTS["steps"].measure(binary_only)
    assert set(with_arm["linear"]["3x4"]) == {"plain autograd", "gumbel-softmax"}


@pytest.mark.slow
def test_steps_json_is_what_the_tables_of_choosing_read(
    quick: Path,
    train: Callable[..., Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = json.loads((quick / "steps.json").read_text(encoding="utf-8"))
    expected = {"device", "machine", "python", "torch", "dgrad", "data", "compile", "threads", "rounds", "steps"}
    assert set(steps) == expected
    assert set(steps["steps"]["3x4"]) == {"gumbel-softmax", "direct-rb", "rloo"}
    figures = _results(quick)["steps"]["figures"]["linear"]["3x4"]
    assert steps["steps"]["3x4"]["rloo"]["median_ratio"] == figures["rloo"]["ratios"]["gumbel-softmax"]
    train("compare/rloo-seed0")
    arguments = ["choosing", str(tmp_path / "compare"), "--steps", str(quick / "steps.json")]
    monkeypatch.setattr("sys.argv", arguments)
    choosing.main()
    ratio = steps["steps"]["3x4"]["rloo"]["median_ratio"]
    assert f"| {ratio:.2f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_join_those_that_are_there_already(tmp_path: Path) -> None:
    arguments = ("--quick", "--latents", "2x3", "--device", "cpu", "--out", tmp_path)
    assert _main("naive", *arguments) == 0
    first = _results(tmp_path)["naive"]
    assert _main("sweep", *arguments) == 0
    assert _results(tmp_path)["naive"] == first
    assert set(_results(tmp_path)) == {"naive", "sweep"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stepz",), "unknown part 'stepz'"),
        (("run",), "run needs MNIST"),
        (("device", "--device", "cpu"), "device needs a CUDA device; got cpu"),
        (("sweep", "--latents", "20y10"), "20y10"),
        (("steps", "--estimators", "direkt"), "unknown estimator 'direkt'"),
        (("steps", "--data-root", __file__), "MNIST could not be downloaded"),
        (("steps", "--estimators", ","), "got none"),
        (("sweep", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(*arguments, "--out", tmp_path / "out") > 0
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1]", "no JSON", '{"parts": {"naive": {"figures": {"2x3": {"naive": {}}}}}}'])
def test_a_results_file_of_something_else_is_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    assert _main("sweep", "--quick", "--out", tmp_path) == 2
    assert "no results.json of these benchmarks" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == content


# Measuring


def test_an_interrupted_part_goes_on_with_the_cases_that_are_missing(tmp_path: Path) -> None:
    measured: list[str] = []

    def case(name: str) -> dict[str, float]:
        measured.append(name)
        if measured.count("second") == 1:
            raise KeyboardInterrupt("stopped")
        return {name: 1.0}

    unfinished = Settings(unfinished=tmp_path / "cases.json")
    assert unfinished.kept("first", lambda: case("first")) == {"first": 1.0}
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        unfinished.kept("second", lambda: case("second"))
    assert unfinished.kept("first", lambda: case("first")) == {"first": 1.0}
    assert unfinished.kept("second", lambda: case("second")) == {"second": 1.0}
    assert measured == ["first", "second", "second"]
    assert Settings().kept("first", lambda: case("first")) == {"first": 1.0}


def test_the_time_of_the_processor_leaves_out_waiting() -> None:
    waiting, working = (
        measuring.seconds_of(lambda: time.sleep(0.05), CPU, of_processor=of_processor) for of_processor in (True, False)
    )
    assert waiting < 0.04 < working


@pytest.mark.slow
def test_the_plain_step_under_torch_compile_is_the_same_step() -> None:
    images = (torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    if not cpu.available():
        pytest.skip("there is no C++ compiler here")
    plain, compiled = plain_steps(images, 2, 3, [], compiled=True).items()
    assert (plain[0], compiled[0]) == (PLAIN, COMPILED)
    plain[1]()
    compiled[1]()


def test_contestants_take_turns() -> None:
    order: list[str] = []
    actions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measuring.take_turns(actions, 4, CPU, warm_up=2)
    assert order == list("abc") * 6
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_what_is_slow_takes_fewer_turns_but_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: `slow` takes 10 seconds, `quick` one."""
    clock = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def spend(seconds: float) -> Callable[[], None]:
        def action() -> None:
            clock[0] += seconds

        return action

    actions = {"slow": spend(10), "quick": spend(1)}
    times = measuring.take_turns(actions, 8, CPU, warm_up=0, seconds_each=5)
    assert times == {"slow": [10.0] * 3, "quick": [1.0] * 6}


@pytest.mark.slow
@pytest.mark.processes
def test_peak_memory_finds_what_was_allocated_and_freed() -> None:
    """In a new process, as growth measures.

    Linux counts resident pages in batches: within 1 MiB; 4 MiB for what else the process does.
    """
    megabytes = 64
    script = f"""
import torch
from benchmarks.measuring import peak_memory
def action():
    torch.ones({megabytes} * 2**18).sum()
    return torch.ones(2**18)
torch.ones(10).sum()
print(peak_memory(action, torch.device("cpu")))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert (megabytes - 1) * 2**20 <= int(done.stdout) <= (megabytes + 4) * 2**20


# Growth


def test_growth_measures_each_point_and_skips_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        Point("code", 4, "grouped", "2x2", batch=2),
        Point("code", 100, "grouped", "10x10", batch=2),
        Point("code", 200, "grouped", "20x10", batch=2),
        Point("code", 8, "mlp", "2x4", batch=2, hidden=5),
        Point("code", 2**60, "mlp", "2x4", batch=2**60, hidden=5),
    ]
    monkeypatch.setattr(growth, "points", lambda device, sizes: iter(points))
    monkeypatch.setattr(growth, "LONGEST", float("inf"))
    monkeypatch.setattr(growth, "in_new_process", lambda *_: 3 * 2**20)
    figures = growth.measure(Settings(rounds=3))
    lines = figures["code"]["points"]
    assert [line.get("skipped") for line in lines] == [None, None, None, None, "would not fit in memory"]
    assert all(line["memory"] == 3 * 2**20 and line["seconds"]["rounds"] == 3 for line in lines[:4])
    second, third = (line["seconds"]["median"] for line in lines[1:3])
    assert figures["code"]["exponents"]["grouped"] == pytest.approx(math.log2(third / second))
    monkeypatch.setattr(growth, "LONGEST", 0.0)
    lines = growth.measure(Settings(rounds=3))["code"]["points"]
    assert [("skipped" in line) for line in lines] == [False, True, True, False, True]
    assert PARTS["growth"].tables(figures)[0].lines[4][1] == "would not fit in memory"
    assert [plot.name for plot in PARTS["growth"].plots(figures)] == ["growth-time", "growth-memory"]


@pytest.mark.slow
@pytest.mark.processes
def test_growth_measures_memory_in_a_process_of_its_own() -> None:
    """A batch of 1,000 at 20x10 may take 256 MiB at most, the target of docs/performance.md."""
    point = Point("batch", 1000, "grouped", "20x10", batch=1000)
    used = measuring.in_new_process("benchmarks.growth", json.dumps(asdict(point)), "cpu")
    assert 1000 * 200 * 4 <= used < growth.TARGET_BYTES  # it holds its result, at least


@pytest.mark.slow
@pytest.mark.processes
def test_a_point_that_fails_says_why() -> None:
    assert "error" in measuring.in_new_process("benchmarks.growth", "{}", "cpu")


@pytest.mark.parametrize("form", ["compiled", "grouped", "exact", "mlp"])
def test_the_points_of_growth_are_the_right_sweeps(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the form that it is named after."""
    taken: list[str] = []

    def watch(module: Any, name: str, label: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: taken.append(label) or original(*args, **kwargs))

    watch(cpu.LinearCodes, "sweep", "compiled")
    watch(sweeps, "_grouped_change", "grouped")
    watch(sweeps, "_exact_change", "exact")
    watch(reconstruction, "difference_sweep", "mlp")
    if form == "compiled" and not cpu.available():
        pytest.skip("there is no compiler")
    point = Point("code", 6, form, "2x3", batch=2, hidden=5 if form == "mlp" else 0)
    assert growth.sweep_of(point, CPU)().shape == (1, 2, 2, 3)
    assert taken == [form]


# The sweep's work


class _Counter(TorchDispatchMode):
    """Counts what torch really does to float tensors: operations by kind, and bytes read and written."""

    EACH: ClassVar = {  # for every number of the result
        "add": ["additions"],
        "sub": ["additions"],
        "sub_": ["additions"],
        "mul": ["multiplications"],
        "addcmul": ["multiply_adds"],
        "softplus": ["exponentials", "logarithms"],
        "sigmoid_": ["exponentials"],
        "log_": ["logarithms"],
        **{name: ["additions"] for name in ("abs", "neg_", "clamp_min", "add_")},
        "index": [],
        "embedding": [],
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys([*sweep.Work.__dataclass_fields__, "others"], 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("empty", "new_empty", "_unsafe_view") or not isinstance(result, Tensor):
            return result
        read = sum(each.numel() for each in args if isinstance(each, Tensor) and each.is_floating_point())
        if name in self.EACH:
            for kind in self.EACH[name]:
                self.counts[kind] += result.numel()
        elif name == "sum":
            self.counts["additions"] += read
        elif name == "prod":
            self.counts["multiplications"] += read - result.numel()
        else:
            self.counts["others"] += result.numel()
        if name in ("index", "embedding"):
            read = result.numel()  # it reads what it takes, not all that there is
        if result.is_floating_point():
            self.counts["bytes"] += 4 * (read + result.numel())
        return result


def _counted(form: str, batch: int, n: int, k: int, pixels: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(settings, "SHAPE", (1, 1, pixels))
    action = sweep.forms(f"{n}x{k}", batch, CPU)[form]
    with _Counter() as counter:
        action()
    return counter.counts


@pytest.mark.slow
@pytest.mark.parametrize("form", ["difference", "exact", "grouped"])
def test_the_work_of_a_form_is_what_torch_does(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not grow with the batch, the values and the pixels at once drops out of the differences; nothing of
    it is uncounted.
    """
    monkeypatch.setattr(sweeps, "NUMBERS_AT_ONCE", 2**30)  # in one part
    n = 3
    corners = list(itertools.product((2, 5), (3, 7), (8, 24)))
    kinds = dict.fromkeys([*sweep.Work.__dataclass_fields__, "others"], 0.0)
    counted, stated = dict(kinds), dict(kinds)
    for batch, k, pixels in corners:
        sign = (-1) ** ((batch == 2) + (k == 3) + (pixels == 8))
        for kind, number in _counted(form, batch, n, k, pixels, monkeypatch).items():
            counted[kind] += sign * number
        for kind, number in asdict(sweep.work(form, batch, n, k, pixels)).items():
            stated[kind] += sign * number
    assert counted == pytest.approx(stated)
    assert stated["bytes"] == sweep.PER_PIXEL[form].bytes * (5 - 2) * n * (7 - 3) * (24 - 8)


def _by_hand(form: str, batch: int, n: int, k: int, pixels: int) -> tuple[Tensor, dict[str, float]]:
    """The naive and the compiled form pixel by pixel, and what they did."""
    model, codes, images = settings.sweep_problem(f"{n}x{k}", batch, CPU)
    first = model.decoder.first
    assert isinstance(first, torch.nn.Linear)
    table = first.weight.detach().double().T.unflatten(0, (n, k)).tolist()
    bias, x = first.bias.tolist(), images.flatten(1).tolist()
    own = codes[0].argmax(-1).tolist()
    result = torch.zeros(batch, n, k, dtype=torch.float64)
    counts = dict.fromkeys(["matrix_multiply_adds", *sweep.Work.__dataclass_fields__], 0.0)

    def logits(example: int, values: list[int]) -> list[float]:
        return [bias[d] + sum(table[row][value][d] for row, value in enumerate(values)) for d in range(pixels)]

    for example, row, value in itertools.product(range(batch), range(n), range(k)):
        chosen = own[example]
        changed = [*chosen[:row], value, *chosen[row + 1 :]]
        if form == "naive":
            loss = 0.0
            for d, a in enumerate(logits(example, changed)):
                counts["matrix_multiply_adds"] += n * k
                counts["exponentials"] += 1
                counts["logarithms"] += 1
                softplus = math.log1p(math.exp(a))
                counts["multiply_adds"] += 1
                counts["additions"] += 1
                loss += softplus - x[example][d] * a
            result[example, row, value] = loss
            continue
        counts["matrix_multiply_adds"] += pixels  # x . W
        base = logits(example, chosen)
        loss = sum(math.log1p(math.exp(a)) - x[example][d] * a for d, a in enumerate(base))
        weights, before = table[row][value], table[row][chosen[row]]
        if value != chosen[row]:
            product = 1.0
            for d, a in enumerate(base):
                p, q = 1 / (1 + math.exp(a)), 1 / (1 + math.exp(-a)) / math.exp(before[d])
                counts["multiply_adds"] += 1
                counts["multiplications"] += 1
                product *= p + q * math.exp(weights[d])
            counts["logarithms"] += 1
            loss += math.log(product)
        linear = sum(x[example][d] * (weights[d] - before[d]) for d in range(pixels))
        result[example, row, value] = loss - linear
    return result, counts


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("form", ["naive", "compiled"])
def test_the_work_of_the_other_forms_is_that_of_their_formulas(form: str, n: int, k: int) -> None:
    batch = 2
    losses, counts = _by_hand(form, batch, n, k, settings.PIXELS)
    torch.testing.assert_close(sweep.forms(f"{n}x{k}", batch, CPU)["naive"]().double(), losses, rtol=1e-5, atol=1e-3)
    stated = asdict(sweep.work(form, batch, n, k, settings.PIXELS))
    stated["matrix_multiply_adds"] = sweep.matrix_multiply_adds(form, batch, n, k, settings.PIXELS)
    assert {kind: number for kind, number in counts.items() if kind != "bytes"} == pytest.approx(
        {kind: number for kind, number in stated.items() if kind != "bytes"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["naive", "difference", "exact", "grouped"])
def test_the_matrix_products_of_a_form_are_those_that_torch_does(form: str) -> None:
    action = sweep.forms("3x4", 5, CPU)[form]
    with FlopCounterMode(display=False) as counter:
        action()
    assert counter.get_total_flops() == 2 * sweep.matrix_multiply_adds(form, 5, 3, 4, settings.PIXELS)


def test_every_form_is_the_same_sweep() -> None:
    """But for the exact one, which has a weight of its own."""
    forms = sweep.forms("3x4", 5, CPU)
    truth = forms.pop("naive")()
    forms.pop("exact")
    assert set(forms) >= {"difference", "grouped"}
    for form in forms.values():
        torch.testing.assert_close(form()[0], truth, rtol=1e-5, atol=1e-3)


def test_shares_are_times_at_the_peaks_over_the_time() -> None:
    done = sweep.Work(multiply_adds=6, additions=2, exponentials=5, logarithms=3, bytes=40)
    peak = {"matrix": 20.0, "elementwise": 4.0, "exponentials": 10.0, "logarithms": 1.0, "memory": 8.0}
    shares = sweep.shares(done, 12, 10.0, peak)
    assert shares == {
        "multiply_adds": (12 + 8) / 20 / 10,
        "elementwise": (12 / 20 + 8 / 4 + 5 / 10 + 3 / 1) / 10,
        "bytes": 40 / 8 / 10,
    }


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(("target", "reached"), [(1000.0, True), (0.0, False)])
def test_a_run_says_whether_it_reached_the_target(target: float, reached: bool) -> None:
    given = Settings(data={"dataset": "digits"}, estimators=("gumbel-softmax", "rloo"), seconds=1e-9, compile="off")
    figures = run.measure(given, target=target)
    for row in figures["estimators"].values():
        assert row["steps"] == run.STEPS == 100
        assert row["curve"] == [(row["seconds"], row["best"])]
        assert row["reached"] == (row["seconds"] if reached else None)
    (table,) = run.tables(figures)
    assert [line[1] == "not reached" for line in table.lines] == [not reached] * 2
    assert (f"{1:.2f}" in [line[2] for line in table.lines]) is reached
    (plot,) = run.plots(figures)
    plot.draw(Path("run.png"))
    assert Path("run.png").stat().st_size > 0


@pytest.mark.slow
def test_a_run_goes_on_until_its_steps_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STEPS", 1000)
    monkeypatch.setattr(Settings, "training", lambda self, name, latent: configure({"estimator": name, "steps": 30}))
    figures = run.measure(Settings(estimators=("rloo",)), target=0.0)
    assert figures["estimators"]["rloo"]["steps"] == 30


# A CUDA device: what of it can be tried without one


@pytest.mark.slow
def test_the_parts_of_device_measure_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "TUNINGS", {"kernel as it is": {}, "no such": {"NO_SUCH_CONSTANT": 1}})
    given = Settings(data={"dataset": "digits"}, quick=True, compile="off")
    parts = {"steps": device.step_times, "sweep": device.sweep_times, "seeds": device.seed_times}
    figures = {name: {"3x4": part(given, "3x4")} for name, part in parts.items()}
    json.dumps(figures, allow_nan=False)
    steps = figures["steps"]["3x4"]
    assert list(steps) == [name + how for name in ("gumbel-softmax", "direct-rb") for how in ("", ", eager")]
    assert not any(row["recorded"] for row in steps.values())
    sweeps = figures["sweep"]["3x4"]
    assert set(sweeps) == {device.TORCH, "kernel as it is", "no such"}
    assert "NO_SUCH_CONSTANT" in sweeps["no such"]["problem"]
    assert 0 < sweeps[device.TORCH]["error"] < 1e-2
    assert list(figures["seeds"]["3x4"]) == ["1", "2"]
    tables = device.tables(figures)
    assert [len(table.lines) for table in tables] == [4, 3, 2]
    for table in tables:
        assert {len(line) for line in table.lines} == {len(table.columns)}
    for plot in device.plots(figures):
        plot.draw(Path(f"{plot.name}.png"))
        assert Path(f"{plot.name}.png").stat().st_size > 0


@pytest.mark.slow
def test_a_bunch_is_shared_out_over_its_steps_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn takes 8 seconds here, whatever is done in it."""
    monkeypatch.setattr(device, "take_turns", lambda actions, *_, **__: {name: [8.0, 8.0] for name in actions})
    given = Settings(data={"dataset": "digits"}, quick=True, compile="off")
    assert {row["median"] for row in device.step_times(given, "3x4").values()} == {4.0}
    assert [row["median"] for row in device.seed_times(given, "3x4").values()] == [4.0, 2.0]


def test_every_tuning_names_constants_of_the_kernel() -> None:
    source = (ROOT / "dgrad/kernels/triton_sweep.py").read_text(encoding="utf-8")
    for constants in device.TUNINGS.values():
        for name in constants:
            assert f"\n{name} = " in source


def test_tuning_is_undone() -> None:
    triton_sweep = pytest.importorskip("dgrad.kernels.triton_sweep", reason="needs Triton")
    with pytest.raises(RuntimeError, match="stop here"), device._tuned({"WARPS": 2}):
        assert triton_sweep.WARPS == 2
        raise RuntimeError("stop here")
    assert triton_sweep.WARPS == 4


@pytest.mark.parametrize("start", one_variable.STARTS)
def test_a_mixture_is_fitted_as_well_as_that_which_drew_the_images(start: str) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.where(torch.rand(4, 30, generator=generator) < 0.5, 0.1, 0.9)
    drawn = torch.bernoulli(truth[torch.randint(4, (4000,), generator=generator)], generator=generator)
    train, test = drawn[:3000], drawn[3000:]
    by_hand = [truth.where(image == 1, 1 - truth).prod(1).mean().log() for image in test]
    best = one_variable.negative_log_likelihood(test, truth)
    assert best == pytest.approx(-float(torch.stack(by_hand).mean()), rel=1e-4)
    fitted = [one_variable.fit(train, 4, generator.manual_seed(seed), one_variable.STARTS[start]) for seed in range(5)]
    means = min(fitted, key=lambda means: one_variable.negative_log_likelihood(train, means))
    assert one_variable.negative_log_likelihood(test, means) == pytest.approx(best, abs=0.1)
    one_value = one_variable.fit(train, 1, generator, one_variable.STARTS[start])
    assert one_variable.negative_log_likelihood(test, one_value) > best + 1


def test_one_variable_prints_a_row_for_each_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", "digits", "--values", "3", "5", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["one_variable", *arguments])
    one_variable.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        [latent, start, seed] for latent in ("1x3", "1x5") for start in one_variable.STARTS for seed in ("0", "1")
    ]
    assert all(0 < float(figure) < 64 * math.log(2) for row in rows for figure in row[3:])


@pytest.mark.parametrize("arguments", [["--dataset", "mnits"], ["--values", "0"], ["--seeds", "0"]])
def test_one_variable_refuses_what_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["one_variable", *arguments])
    with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
        one_variable.main()
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mnits" in captured.err or "1 or more" in captured.err
