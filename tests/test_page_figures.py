"""The figures of README.md and of the pages under docs/ are those of the benchmarks and of the runs."""

import json
import re

import pytest
from pages import PAGES, REPOSITORY

from experiments import config as configs


CONFIGS = REPOSITORY / "experiments" / "configs"


def _rows(text: str) -> set[tuple[str, ...]]:
    """The rows of all tables, with the text of a link in place of the link."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = re.findall(r"^\|(.*)\|$", plain, re.MULTILINE)
    return {tuple(cell.strip() for cell in line.split("|")) for line in lines}


def test_costs_of_methods_are_the_benchmarks():
    file = REPOSITORY / "benchmarks" / "results" / "method_cost-jax-0.10.2.json"
    measured = json.loads(file.read_text("utf-8"))["rows"]
    shown = {row[0]: row[1:] for row in _rows(PAGES["docs/cost.md"].partition("## A quantised base")[0])}
    assert {row["method"] for row in measured} == shown.keys() - {"method", "---"}
    for row in measured:
        wanted = [row["FLOPs / LoRA"], row["temporary / LoRA"]]
        assert [float(cell) for cell in shown[row["method"]]] == [round(value, 4) for value in wanted], row


def test_costs_beside_other_ways_are_the_benchmarks():
    files = (REPOSITORY / "benchmarks" / "results").glob("step_cost-jax-*.json")
    rows = [row for file in files for row in json.loads(file.read_text("utf-8"))["rows"]]
    unrolled = [row for row in rows if "scan" not in row["setting"]]
    plain = [row["FLOPs / full"] for row in unrolled if "checkpoint" not in row["setting"]]
    again = [row["FLOPs / full"] for row in unrolled if "checkpoint" in row["setting"]]
    shown = {row[0]: row[1:] for row in _rows(PAGES["docs/cost.md"])}
    by_hand, full = shown["LoRA written into the model by hand"], shown["full fine-tuning"]
    assert by_hand[0] == f"{max(row['FLOPs / handwritten'] for row in rows):.4f}"
    assert f"up to {max(row['bytes / handwritten'] for row in rows):.4f}" in by_hand[1]
    assert f"{min(plain):.2f}" == f"{max(plain):.2f}"
    assert full[0].startswith(f"{max(plain):.2f}; {min(again):.2f} to {max(again):.2f} under `checkpoint`")


def test_costs_of_counted_positions_are_the_benchmarks():
    file = REPOSITORY / "benchmarks" / "results" / "counted_positions-jax-0.10.2.json"
    rows = {(row["step"], row["counted"]): row for row in json.loads(file.read_text("utf-8"))["rows"]}
    page = PAGES["docs/cost.md"].partition("## The head where it counts")[2].partition("\n## ")[0]
    shown = {row[0]: row[1:] for row in _rows(page)}
    names = {"gpt2": "GPT-2 small", "smollm2-135m": "SmolLM2-135M"}
    for step in {step for step, _ in rows}:
        model = step.partition(", ")[0]
        wanted = [
            rows[step, share][f"{name} / all"]
            for name in ("FLOPs", "bytes", "time")
            for share in ("60%", "30%")
        ]
        assert shown[step.replace(model, names[model], 1)] == tuple(f"{value:.2f}" for value in wanted)
        assert f"{rows[step, '100%']['FLOPs / all']:.3f}" == "1.000"
    assert f"{max(row['bytes / all'] for row in rows.values()) - 1:.1%} of the bytes" in page.replace(
        "\n", " "
    )


def test_times_beside_peers_are_the_benchmarks():
    file = REPOSITORY / "benchmarks" / "results" / "peers-jax-0.10.2.json"
    lines = json.loads(file.read_text("utf-8"))["rows"]
    shown = _rows(PAGES["README.md"].partition("## Beside its peers")[2].partition("\n## ")[0])
    (head,) = (cells for cells in shown if "GPT-2 small" in cells)
    names = {"GPT-2 small": "gpt2", "SmolLM2-135M": "smollm2-135m", "RoBERTa-base": "roberta-base"}
    found = {(line["row"], line["way"]): line for line in lines}
    for way, *cells in shown - {head, ("---",) * len(head)}:
        for name, cell in zip(head[1:], cells, strict=True):
            line = found[f"{names[name]}, 8 x 64, all-linear, LoRA", way]
            if way == "lora_jax":
                assert cell == f"1 ({line['s']:.2f} s)"
            else:
                assert cell == ("" if "note" in line else f"{line['over lora_jax']:.2f}"), (way, name)
    # And the other rows, whose names are a cell.
    shown = _rows(PAGES["docs/cost.md"].partition("## Beside its peers")[2].partition("\n## ")[0])
    (head,) = (cells for cells in shown if "lora_jax" in cells)
    _, _, *ways = head
    others = {
        row.replace(model, name, 1) for name, model in names.items() for row, _ in found if model in row
    }
    others -= {f"{name}, 8 x 64, all-linear, LoRA" for name in names}
    seen = {cells[0]: cells[1:] for cells in shown - {head, ("---",) * len(head)}}
    assert seen.keys() == others
    for row, (seconds, *cells) in seen.items():
        name = next(name for name in names if row.startswith(name))
        own = {way: found[row.replace(name, names[name]), way] for way in ("lora_jax", *ways)}
        assert seconds == f"{own['lora_jax']['s']:.2f} s"
        for way, cell in zip(ways, cells, strict=True):
            assert cell == ("" if "note" in own[way] else f"{own[way]['over lora_jax']:.2f}"), (row, way)


def test_times_of_decoding_are_the_benchmarks():
    file = REPOSITORY / "benchmarks" / "results" / "decoding-jax-0.10.2.json"
    rows = {
        line["row"]: line["times"] for line in json.loads(file.read_text("utf-8"))["rows"] if "times" in line
    }
    page = PAGES["docs/cost.md"].partition("## Decoding")[2].partition("\n## ")[0]
    shown = {row[0]: row[1:] for row in _rows(page)}
    for model, name in (("gpt2", "GPT-2 small"), ("smollm2-135m", "SmolLM2-135M")):
        wanted = [
            rows[f"{model}, {count} prompts, {way}"] for way in ("greedy", "beams") for count in (1, 8, 32)
        ]
        assert shown[name] == tuple(f"{times:.2f}" for times in wanted)


def test_times_of_quantised_bases_are_the_benchmarks():
    file = REPOSITORY / "benchmarks" / "results" / "quantised_step-jax-0.10.2.json"
    lines = [
        line for line in json.loads(file.read_text("utf-8"))["rows"] if line["row"] in ("gpt2", "gpt2, scan")
    ]
    page = PAGES["docs/cost.md"].partition("## A quantised base")[2].partition("\n## ")[0]
    for name, *cells in _rows(page) - {("base", "bytes of the frozen tree", "CPU time of a step")}:
        bases = [name] if not name.startswith("GGUF") else name.removeprefix("GGUF's ").split(", ")
        if name in ("---", "float32"):
            continue
        own = [line for line in lines if line["base"] in bases]
        times = [line["CPU time over LoRA"] for line in own]
        assert cells[1] == f"{min(times):.2f} to {max(times):.2f}", name
        frozen = [next(line["frozen MB"] for line in own if line["base"] == base) for base in bases]
        assert cells[0] == ", ".join(f"{size:.0f}" for size in frozen) + " MB", name


@pytest.mark.parametrize("page", ["e2e", "webnlg", "dart"])
def test_rows_of_generation_are_the_configs(page):
    """Each names its config, with the numbers and the count of parameters that this expects."""
    text, seen = PAGES[f"docs/tables/{page}.md"], 0
    for block in re.findall(r"^\| row \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL):
        head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        for row in rows:
            config = configs.load(CONFIGS / f"{re.search(r'`(.*)`', row[-1])[1]}.json")
            assert row[0] == config.source.row
            assert [row[2:-1], head[2:-1]] == [
                list(map(str, config.source.expected.values())),
                list(config.source.expected),
            ]
            assert not row[1] or row[1] in config.source.note, row
            seen += 1
    assert seen == len([file for file in CONFIGS.glob(f"{page}_gpt2_*.json")])


@pytest.mark.parametrize("page", ["glue", "reproduction"])
def test_rows_of_labels_are_the_configs(page):
    """A cell is the first number that the config of its row and task expects, and every such config has
    one.
    """
    named, text = set(), PAGES[f"docs/tables/{page}.md"]
    for block in re.findall(r"^\| row \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL):
        head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        for name, *cells, pattern in rows:
            for task, cell in zip(head[1:-1], cells, strict=True):
                file = CONFIGS / pattern.strip("`").replace("*", task.lower().replace("-", ""))
                assert file.is_file() == bool(cell), file
                if cell:
                    source = configs.load(file).source
                    assert source.row.startswith(name) and cell == str(next(iter(source.expected.values())))
                    named.add(file)
    every = {
        file for file in (CONFIGS / "glue").glob("*.json") if configs.load(file).source.paper is not None
    }
    table = "Table 2" if page == "glue" else "Table 1"
    assert named == {file for file in every if (configs.load(file).source.table or "").startswith(table)}


def test_results_are_those_of_the_runs():
    readme = _rows(PAGES["README.md"].partition("## Results")[2].partition("## Beside")[0])
    every = _rows((REPOSITORY / "experiments" / "results" / "e2e_smollm2" / "README.md").read_text("utf-8"))
    directory = REPOSITORY / "experiments" / "results" / "e2e_smollm2"
    found = {
        path.parent.name: json.loads(path.read_text("utf-8")) for path in directory.glob("*/report.json")
    }

    def row(facts: dict, when: str) -> tuple[str, ...]:
        scores, named, after = facts["scores"][when], facts["values"][when], when == "after"
        loss = facts["numbers"]["valid_loss" if after else "first_valid_loss"]
        percent = [100 * scores[name] for name in ("BLEU", "METEOR", "ROUGE_L")]
        return (
            f"{facts['trainable'] if after else 0:,}",
            f"{loss:.3f}",
            f"{percent[0]:.1f}",
            f"{scores['NIST']:.2f}",
            f"{percent[1]:.1f}",
            f"{percent[2]:.1f}",
            f"{scores['CIDEr']:.2f}",
            f"{100 * named['values']:.1f}",
            f"{100 * named['all_values']:.1f}",
        )

    expected = {row(found["lora_r8"], "before"), *(row(facts, "after") for facts in found.values())}
    shown, chosen = (
        {cells[1:] for cells in rows if len(cells) == 10 and cells[1][:1].isdigit()}
        for rows in (every, readme)
    )
    assert shown == expected and len(chosen) == 3 and chosen <= expected
    behind = 100 * (found["full"]["scores"]["after"]["BLEU"] - found["lora_r8"]["scores"]["after"]["BLEU"])
    assert f"is {behind:.1f} BLEU behind full fine-tuning" in PAGES["README.md"].replace("\n", " ")


def test_choices_are_those_of_the_runs():
    directory = REPOSITORY / "experiments" / "results" / "e2e_smollm2"
    runs = {
        f"LoRA, rank {name.removeprefix('lora_r')}" if name.startswith("lora_r") else name: json.loads(
            (directory / name / "report.json").read_text("utf-8")
        )
        for name in ("lora_r1", "lora_r8", "lora_r64", "lora_qv", "dora", "full")
    }
    runs["LoRA, rank 8, query and value"], runs["DoRA, rank 8"] = runs.pop("lora_qv"), runs.pop("dora")
    full = runs.pop("full")
    points = lambda facts: (facts["scores"]["after"]["BLEU"], facts["values"]["after"]["all_values"])

    def row(facts: dict) -> tuple[str, ...]:
        costs = [facts["cost"][which] for which in ("this run", "full fine-tuning")]
        return (
            *(f"{100 * (ours - theirs):+.1f}" for ours, theirs in zip(points(facts), points(full))),
            *(f"{costs[0][name] / costs[1][name]:.2f}" for name in ("bytes", "FLOPs")),
        )

    shown = {cells[0]: cells[1:] for cells in _rows(PAGES["docs/methods.md"])}
    for name, facts in runs.items():
        assert shown[name] == row(facts), name
