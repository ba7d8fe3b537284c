"""`report` of several runs: the paper's numbers beside ours, studies, and pictures. The runs are files in the
form in which `run` leaves them, with numbers of the test's own.
"""

import itertools
import json
import statistics
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import config as configs
from experiments.command_line import main
from experiments.reports import figures, finished, page, words
from experiments.running import memory


_REPOSITORY = Path(__file__).resolve().parent.parent
_CONFIGS = _REPOSITORY / "experiments" / "configs"
_RUN = _REPOSITORY / "experiments" / "results" / "e2e_smollm2" / "lora_r8"
_MB = 1_000_000


def write(directory, config, scores, *, trainable=1000, seconds=0.5, seed=0, peak=None, evaluations=()):
    """A finished run of the config of that name. `evaluations`: steps, and what was found."""
    directory.mkdir(parents=True)
    loaded = configs.load(_CONFIGS / f"{config}.json", [f"seed={seed}"])
    numbers = {"steps": 40, "first_valid_loss": 2.0, "valid_loss": 0.5, "median_seconds_per_step": seconds}
    facts = {
        "trainable": trainable,
        "scores": {"after": scores} if scores else {},
        "numbers": numbers,
        "comparison": {"max_difference": 1e-5},
        "examples": {"train": 320, "valid": 8, "test": 8},
        **({} if peak is None else {"peak_memory": peak}),
    }
    lines = [{"step": step, "valid_loss": 0.7, **found} for step, found in evaluations]
    (directory / "config.json").write_text(json.dumps(configs.to_json(loaded)), "utf-8")
    (directory / "report.json").write_text(json.dumps(facts), "utf-8")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (directory / "report.md").write_text("", "utf-8")
    return str(directory)


def cells(printed):
    """The rows of a printed table, by the words of its head."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in printed.splitlines()
        if line.startswith("|")
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, instead of their files."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: found.append(figure))
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- a line each --------------------------------------------------------------------------------------------


def test_the_published_number_stands_beside_ours(tmp_path, capsys):
    """Of every metric that the paper has; another row has a dash, and the first metric of its own."""
    ours = {"BLEU": 0.7012, "NIST": 8.8, "METEOR": None, "ROUGE_L": 0.71, "CIDEr": 2.5}
    runs = [
        write(tmp_path / "paper", "e2e_gpt2_medium", ours),
        write(tmp_path / "none", "glue/minilm_lora_mrpc", {"accuracy": 0.8, "F1": 0.9}),
    ]
    assert main(["report", *runs]) == 0
    paper, none = cells(capsys.readouterr().out)
    assert (paper["BLEU after"], paper["BLEU published"]) == ("70.12", "70.4")
    assert (paper["CIDEr after"], paper["CIDEr published"]) == ("2.5000", "2.53")
    assert (paper["METEOR after"], paper["METEOR published"]) == ("-", "46.8")
    assert (none["BLEU published"], none["accuracy after"], paper["accuracy after"]) == ("-", "80.00", "-")
    assert "accuracy published" not in paper and "F1 after" not in paper
    assert paper["examples/s"] == "16.0" and none["examples/s"] == "64.0"


def test_no_published_row_no_column(capsys):
    assert main(["report", str(_RUN)]) == 0
    (row,) = cells(capsys.readouterr().out)
    assert not any("published" in name or "memory" in name for name in row)


def test_peak_memory_is_shown_where_it_is_known(tmp_path, capsys):
    config = "glue/minilm_lora_rte"
    runs = [
        write(tmp_path / "cpu", config, {"accuracy": 0.6}, peak={"process": 812 * _MB, "device": None}),
        write(tmp_path / "gpu", config, {"accuracy": 0.6}, peak={"process": 3 * _MB, "device": 9 * _MB}),
        write(tmp_path / "older", config, {"accuracy": 0.6}),
    ]
    assert main(["report", *runs]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row["peak memory of the process"] for row in rows] == ["812.00 MB", "3.00 MB", "-"]
    assert [row["peak memory of the device"] for row in rows] == ["-", "9.00 MB", "-"]
    loaded = configs.load(_CONFIGS / "e2e_smollm2_lora_r8.json")
    facts = finished.facts(_RUN)
    assert "peak memory" not in page.render(loaded, facts)
    text = page.render(loaded, {**facts, "peak_memory": {"process": 812 * _MB, "device": None}})
    assert "| peak memory | 812.00 MB of the process, when training had ended |" in text


def test_the_page_of_an_older_report_has_its_one_commit():
    facts = finished.facts(_RUN)
    assert "processes" not in facts
    text = page.render(configs.load(_CONFIGS / "e2e_smollm2_lora_r8.json"), facts)
    assert f"| commit, date | {facts['commit']}, {facts['date']} |" in text


def test_the_peak_of_this_process(monkeypatch, tmp_path):
    """Linux counts it apart from what a parent had; elsewhere `getrusage` does, and some devices do."""
    assert memory.peak()["process"] > 16 * _MB and memory.peak()["device"] is None
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t9000 kB\nVmHWM:\t  2048 kB\nVmRSS:\t1024 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    assert memory.peak()["process"] == 2048 * 1024
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nowhere")
    assert memory.peak()["process"] > 16 * _MB
    counts = [{"peak_bytes_in_use": 7, "bytes_in_use": 1}, {"peak_bytes_in_use": 9}, None]
    devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in counts]
    monkeypatch.setattr(memory.jax, "local_devices", lambda: devices)
    assert memory.peak()["device"] == 9


# --- a study ------------------------------------------------------------------------------------------------

_TASKS = {"cola": "Matthews", "mrpc": "F1"}
_STUDY = {"lora": (0.58, 0.60, 0.56), "full": (0.61,)}


@pytest.fixture
def study(tmp_path):
    """Two methods of a published study and two tasks, LoRA with three seeds; QLoRA on one task."""
    runs = []
    for method, values in _STUDY.items():
        for task, metric in _TASKS.items():
            scores = lambda value, metric=metric: (
                {"accuracy": 0.7, metric: value} if metric == "F1" else {metric: value}
            )
            for seed, value in enumerate(values):
                runs.append(
                    write(
                        tmp_path / f"{method}_{task}_{seed}",
                        f"glue/reproduction_{method}_{task}",
                        scores(value),
                        trainable=100 if task == "cola" else 90,
                        seed=seed,
                        seconds=0.5 if method == "lora" else 1.0,
                        peak={"process": 500 * _MB, "device": None},
                        evaluations=[(0, {metric: 0.0}), (10, {metric: value / 2}), (20, {metric: value})],
                    )
                )
    runs.append(write(tmp_path / "qlora", "glue/reproduction_qlora_cola", {"Matthews": 0.5}))
    return runs


def test_a_study_is_methods_by_tasks(study, capsys):
    assert main(["report", "--study", *study]) == 0
    said = capsys.readouterr().out
    rows = {row["method"]: row for row in cells(said)}
    assert list(rows) == ["LoRA", "full fine-tuning", "QLoRA"]
    lora = rows["LoRA"]
    spread = 100 * statistics.stdev(_STUDY["lora"])
    assert (
        lora["cola Matthews"]
        == f"{100 * statistics.fmean(_STUDY['lora']):.2f} ± {spread:.2f}"
        == "58.00 ± 2.00"
    )
    # MRPC's published metric, and not its first.
    assert lora["mrpc F1"] == "58.00 ± 2.00" and rows["full fine-tuning"]["mrpc F1"] == "61.00"
    assert (lora["cola Matthews, published"], lora["mrpc F1, published"]) == ("56", "92")
    assert rows["QLoRA"]["mrpc F1"] == rows["QLoRA"]["mrpc F1, published"] == "-"
    assert rows["QLoRA"]["cola Matthews, published"] == "61"
    assert lora["trained parameters"] == "90 to 100" and rows["QLoRA"]["trained parameters"] == "1,000"
    assert said.endswith("Means over 1 to 3 seeds; ± is the sample deviation.\n")


def test_a_study_that_no_paper_has(tmp_path, capsys):
    """Methods of one name are told apart by what differs."""
    runs = [write(tmp_path / "one", "e2e_smollm2_lora_r1", {"BLEU": 0.5})]
    runs += [write(tmp_path / "eight", "e2e_smollm2_lora_r8", {"BLEU": 0.6})]
    assert main(["report", "--study", *runs]) == 0
    said = capsys.readouterr().out
    one, eight = cells(said)
    assert one["method"].startswith("LoRA, rank 1") and eight["method"].startswith("LoRA, rank 8")
    assert one["e2e BLEU"] == "50.00" and "e2e BLEU, published" not in one
    assert said.endswith("Each number is of one seed.\n")
    assert main(["report", "--study", "--metric", "NIST", *runs]) == 1
    assert "has no NIST in its report: its metrics are BLEU. Leave it out, or name" in capsys.readouterr().err


def test_what_a_study_cannot_have(tmp_path, capsys):
    runs = [write(tmp_path / name, "glue/minilm_lora_rte", {"accuracy": 0.5}) for name in ("a", "b")]
    assert main(["report", "--study", *runs]) == 1
    assert (
        f"`{runs[0]}` and `{runs[1]}` are of one method, one task and one seed (0)" in capsys.readouterr().err
    )
    bare = write(tmp_path / "bare", "e2e_smollm2_full", {})
    assert main(["report", "--study", bare]) == 1
    assert f"`{bare}` has no scores in its report" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, expected",
    [
        ("glue/minilm_bitfit_cola", "BitFit"),
        ("glue/minilm_full_cola", "full fine-tuning"),
        ("glue/minilm_qlora_cola", "QLoRA"),
        ("glue/minilm_vera_cola", "VeRA"),
        ("e2e_gpt2_medium_adapter_h", "Houlsby"),
        ("e2e_gpt2_medium_top2", "training h/(22|23)/.*"),
    ],
)
def test_what_methods_are_called(config, expected):
    assert words.method(configs.to_json(configs.load(_CONFIGS / f"{config}.json"))) == expected


# --- pictures -----------------------------------------------------------------------------------------------


def test_the_metric_against_the_parameters(tmp_path, capsys, drawn):
    """A panel a task, a colour a method; published numbers are hollow, and in the units of ours."""
    runs = [
        write(tmp_path / "r8", "e2e_smollm2_lora_r8", {"BLEU": 0.61}, trainable=2_000_000),
        write(tmp_path / "r1", "e2e_smollm2_lora_r1", {"BLEU": 0.6}, trainable=300_000),
        write(tmp_path / "full", "e2e_smollm2_full", {"BLEU": 0.65}, trainable=134_000_000),
        write(tmp_path / "cola", "glue/reproduction_lora_cola", {"Matthews": 0.55}, trainable=900_000),
    ]
    assert main(["report", *runs, "--parameters", "p.png"]) == 0
    (figure,) = drawn
    e2e, cola = figure.axes
    points = [(*line.get_xdata(), *line.get_ydata(), line.get_markerfacecolor()) for line in e2e.lines]
    assert [point[:2] for point in points] == [(2_000_000, 61), (300_000, 60), (134_000_000, 65)]
    assert points[0][2] == points[1][2] != points[2][2]
    assert [text.get_text() for text in e2e.texts] == ["lora_r8", "lora_r1", "full"]
    assert [line.get_ydata()[0] for line in cola.lines] == [pytest.approx(55), 56]
    assert (e2e.get_xscale(), e2e.get_ylabel(), cola.get_ylabel()) == ("log", "BLEU (%)", "Matthews (%)")
    assert legend(figure) == ["LoRA", "full fine-tuning", "published"]
    # Of a loss too.
    assert main(["report", *runs[:3], "--parameters", "p.png", "--metric", "valid_loss"]) == 0
    assert [line.get_ydata()[0] for line in drawn[1].axes[0].lines] == [0.5] * 3
    assert main(["report", *runs, "--parameters", "p.png", "--metric", "BLEU"]) == 1
    assert f"`{runs[3]}` has no BLEU in its report" in capsys.readouterr().err


def test_the_metric_against_the_epochs(study, drawn, capsys):
    """320 examples in batches of 32 are 10 steps. A seed more is a curve of the same colour. What was found
    before the first step is only shown of a run without others.
    """
    runs = study[:-1]
    assert main(["report", *runs, "--epochs", "e.png"]) == 0
    (figure,) = drawn
    cola, mrpc = figure.axes
    assert [len(axes.lines) for axes in (cola, mrpc)] == [4, 4]
    assert cola.lines[0].get_xdata() == pytest.approx([1, 2])
    assert mrpc.lines[1].get_ydata() == pytest.approx([30, 60])
    assert all(tick == round(tick) for tick in cola.get_xticks())
    assert (cola.get_title(), cola.get_xlabel(), mrpc.get_ylabel()) == (
        "glue/cola",
        "epoch",
        "F1 (%), validation",
    )
    colours = [line.get_color() for line in cola.lines]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert legend(figure) == ["LoRA", "full fine-tuning"]
    assert main(["report", *runs, "--epochs", "e.png", "--metric", "Pearson"]) == 1
    assert (
        "has no Pearson in its evaluations, which have valid_loss, Matthews: leave" in capsys.readouterr().err
    )
    untrained = write(
        Path(runs[0]).parent / "untrained",
        "glue/minilm_lora_cola",
        {"Matthews": 0.1},
        evaluations=[(0, {"Matthews": 0.1})],
    )
    assert main(["report", untrained, "--epochs", "e.png"]) == 0
    assert drawn.pop().axes[0].lines[0].get_xydata() == pytest.approx(np.array([[0, 10]]))
    # A task that is not judged has the loss.
    assert main(["report", str(_RUN), "--epochs", "e.png"]) == 0
    assert drawn[1].axes[0].get_ylabel() == "validation loss"


def test_the_costs(study, drawn, capsys):
    runs = study[:-1]
    assert main(["report", *runs, "--costs", "c.png"]) == 0
    speed, memory_of = drawn[0].axes
    assert [bar.get_height() for bar in speed.patches] == [64, 64, 64, 32] * 2
    assert [bar.get_height() for bar in memory_of.patches] == [500] * 8
    assert [label.get_text() for label in speed.get_xticklabels()] == ["glue/cola", "glue/mrpc"]
    assert memory_of.get_ylabel() == "peak memory of the process (MB)"
    places = [round(bar.get_x() + bar.get_width() / 2) for bar in speed.patches]
    assert places == [0] * 4 + [1] * 4
    assert main(["report", *study, "--costs", "c.png"]) == 1
    assert f"`{study[-1]}` has no peak memory in its report" in capsys.readouterr().err


def test_the_pictures_are_files(study, tmp_path):
    files = [tmp_path / name for name in ("parameters.png", "epochs.png", "costs.png")]
    options = [word for file in files for word in (f"--{file.stem}", str(file))]
    assert main(["report", *study[:-1], *options]) == 0
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_names_of_near_points_do_not_cover_each_other(drawn, tmp_path):
    scores = {"lora_r8": 0.61, "lora_prefix": 0.61, "dora": 0.611, "adapter_h": 0.612, "full": 0.5}
    runs = [
        write(tmp_path / name, f"e2e_smollm2_{name}", {"BLEU": score}, trainable=2_000_000)
        for name, score in scores.items()
    ]
    assert main(["report", *runs, "--parameters", "p.png"]) == 0
    boxes = [text.get_window_extent() for text in drawn[0].axes[0].texts]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_losses_are_named_in_the_order_in_which_they_end(drawn, tmp_path):
    """The loss before training, far above the others, is left out where others follow."""
    found = {"lora_r8": (9, 2, 1), "dora": (9, 2, 1.5), "full": (9,)}
    runs = []
    for name, losses in found.items():
        lines = [(10 * place, {"valid_loss": loss}) for place, loss in enumerate(losses)]
        runs.append(write(tmp_path / name, f"e2e_smollm2_{name}", {}, evaluations=lines))
    assert main(["report", *runs, "--figure", "losses.png"]) == 0
    assert legend(drawn[0]) == ["full", "dora", "lora_r8"]
    assert [list(line.get_ydata()) for line in drawn[0].axes[0].lines] == [[9], [2, 1.5], [2, 1]]


def test_many_methods_have_a_colour_each():
    assert len(set(figures.colours_of(map(str, range(30))).values())) == 30


def test_sweeps_have_none_of_these(tmp_path, capsys):
    (tmp_path / "sweep.md").write_text("")
    for option in (["--study"], ["--metric", "BLEU"], ["--epochs", "e.png"], ["--costs", "c.png"]):
        assert main(["report", str(tmp_path), *option]) == 1
        assert f"`{option[0]}` is of runs: sweeps decode no texts" in capsys.readouterr().err
