"""Whole runs through the command line on a tiny model: what they leave, and what is made of it."""

import json

import jax
import numpy as np
import pytest
from runs import by_transformers, close, GENERATE, refused, root as root, without_java as without_java
from training import optax_promotes as optax_promotes

import lora_jax
from experiments import config as configs, tasks
from experiments.command_line import main
from experiments.config import Decode
from experiments.decoding.decoder import Decoder, generate
from experiments.progress import read_metrics
from experiments.reports import card, figures, page as pages
from experiments.running import beside, finish
from lora_jax.interop import hf, loralib, peft


# The run that all of them look at.
pytestmark = pytest.mark.slow


def test_a_finished_work_directory(root):
    done = root / "done"
    names = {path.name for path in done.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "provenance.jsonl",
        "checkpoints",
        "adapter",
        "merged",
        "predictions.txt",
        "report.md",
        "figures",
    } <= names
    assert not {name for name in names if name.endswith(".tmp")}
    assert json.loads((done / "config.json").read_text()) == configs.to_json(configs.load(root / "tiny.json"))
    assert len((done / "predictions.txt").read_text().splitlines()) == GENERATE["held_out"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 4, 8]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert lines[1]["lr"] == 0, "the first step has rate 0"
    assert (done / "figures" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    page = (done / "report.md").read_text()
    assert "Samples (beam search, width 3, test inputs)" in page
    assert "Published: BLEU 70.4" in page and "merged result of base.json" in page
    facts = json.loads((done / "report.json").read_text())
    assert facts["comparison"]["max_difference"] < 1e-4
    in_pytorch = facts["comparison"]["pytorch"]
    assert in_pytorch is None or (in_pytorch["max_difference"] < 1e-4 and not in_pytorch["keys"])
    assert all(f" {word} |" in page or f"| {word}" in page for word in ("command", "data", "commit, date"))
    assert (done / "base" / "report.md").is_file(), "the base was run first"


def test_the_report_says_what_only_the_training_loss_has(root, tmp_path, monkeypatch):
    """A validation loss below it would otherwise look like a mistake."""
    config, facts = (
        configs.load(root / "tiny.json", ["train.label_smoothing=0.1"]),
        json.loads((root / "done" / "report.json").read_text()),
    )
    words = "with label smoothing 0.1 and dropout 0.1"
    assert (
        f"The training loss is that of each batch, {words}. The validation loss is without"
        in pages.render(config, facts)
    )
    labels = []
    monkeypatch.setattr(figures, "_plot", lambda curves, *_: labels.extend(curves))
    figures.draw(read_metrics(root / "done" / "metrics.jsonl"), config, tmp_path / "loss.png")
    assert labels == [f"training, {words}", "validation"]
    assert "training loss is that" not in (root / "done" / "base" / "report.md").read_text()


def test_the_report_says_how_large_the_quantised_base_is(root):
    """Beside the base as it was read. Full fine-tuning holds none of it frozen."""
    whole = json.loads((root / "done" / "base" / "report.json").read_text())
    assert whole["bytes"]["frozen"] == 0 < whole["bytes"]["base"]
    config = configs.load(root / "tiny.json", ["quantize=int8"])
    facts = json.loads((root / "done" / "report.json").read_text())
    facts["bytes"] = {"base": 9_000_000, "frozen": 3_000_000, "delta": 1_000_000}
    said = "| sizes | base 9.00 MB, stored in int8 as 3.00 MB, what trains 1.00 MB |"
    assert said in pages.render(config, facts)
    del facts["bytes"]["frozen"]
    assert "| sizes | base 9.00 MB, what trains 1.00 MB |" in pages.render(config, facts)


def test_a_sample_without_a_text_is_seen_to_be_one(root):
    config = configs.load(root / "tiny.json")
    facts = json.loads((root / "done" / "report.json").read_text())
    facts["samples"] = [{"input": "name : A", "before": "", "after": "A .", "references": []}]
    assert "- before: (nothing)\n- after: A .\n" in pages.render(config, facts)


def test_a_run_says_what_it_does_once_it_is_trained(root, tmp_path, capsys):
    """Each stage that takes time begins with a line; the base decodes nothing that nobody asked for."""
    config = configs.load(root / "tiny.json", ["decode.before=false", "decode.shown=0"])
    directory = root / "done" / "merged"
    model, params = hf.load(directory)
    words = by_transformers(directory)
    prompts = tasks.prepare(config.data, tasks.read(config.data, root / "done" / "data"), words).prompts
    said = []
    decoder = Decoder.create(config, model, words, prompts)
    found = finish.predict(decoder, None, params, tmp_path, said.append)
    assert said == ["decoding with the merged model: 4 of 4 test inputs, 32 at a time", "scoring the texts"]
    assert found["samples"] == [] and list(found["scores"]) == ["after"]


def test_the_adapter_beside_the_merged_model(root):
    """In PEFT's format, on the base that its config names; nothing is there where nothing is adapted."""
    done = root / "done"
    file = done / "adapter" / "adapter_model.safetensors"
    facts, page = json.loads((done / "report.json").read_text()), (done / "report.md").read_text()
    assert facts["adapter"] == {
        "bytes": file.stat().st_size,
        "merged_bytes": (done / "merged" / "model.safetensors").stat().st_size,
        "missing": None,
    }
    assert "`adapter/` is what was trained, in PEFT's format: a file of " in page
    named = json.loads((done / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((done / "base" / "merged").resolve()), "found from any directory"
    model, params = hf.load(named)
    frozen, delta = peft.load(done / "adapter", model, params)
    assert lora_jax.count(delta) == facts["trainable"]
    close(lora_jax.merge(frozen, delta), hf.load(done / "merged")[1])
    assert not (done / "base" / "adapter").exists()
    assert "There is no `adapter/`: the method is Full" in (done / "base" / "report.md").read_text()


def test_the_adapter_comes_with_a_card(root):
    """The base in the header is a name on the hub or nothing: the hub takes no paths."""
    done = root / "done"
    page = (done / "adapter" / "README.md").read_text()
    facts = json.loads((done / "report.json").read_text())
    header, body = page.removeprefix("---\n").split("\n---\n", 1)
    assert header.splitlines() == ["library_name: peft", "tags: [lora_jax]"]
    base = str((done / "base" / "merged").resolve())
    assert f"- Base: `{base}`, " in body and f'hf.load("{base}")' in body
    assert "# tiny" in body and "LoRA(rank=2, alpha=4" in body and facts["prompt"]["text"] in body
    config = configs.load(root / "tiny.json")
    online = {**facts, "base": {**facts["base"], "name": "someone/model"}}
    assert card.render(config, online, []).startswith("---\nbase_model: someone/model\nlibrary_name: peft\n")
    drawn = {**facts, "base": {**facts["base"], "name": None}}
    assert "is in no file" in card.render(config, drawn, [])


def test_the_report_says_how_a_prompt_is_written(root):
    """The text gives the very tokens that the model was trained on, and those that end an answer."""
    done, config = root / "done", configs.load(root / "tiny.json")
    facts, page = json.loads((done / "report.json").read_text()), (done / "report.md").read_text()
    words = by_transformers(done / "merged")
    first = tasks.prepare(config.data, tasks.read(config.data, done / "data"), words).prompts[0]
    text = facts["prompt"]["text"]
    assert tuple(words(text)["input_ids"]) == first.ids and text == f"{first.text}<|endoftext|>"
    assert f"```\n{text}\n```" in page and 'ends at `"<|endoftext|>"` or `"\\n"`' in page
    assert "## The prompt" not in (done / "base" / "report.md").read_text(), "it was trained on plain text"


def test_the_merged_model_pads_cuts_and_continues(root):
    words = by_transformers(root / "done" / "merged")
    assert words.model_max_length == 160 and words.pad_token == "<|endoftext|>"
    found = words(["a", "a house by the lake " * 100], padding=True, truncation=True, return_tensors="np")
    assert found["input_ids"].shape == (2, 160) and found["attention_mask"][0].sum() == 1
    written = json.loads((root / "done" / "merged" / "generation_config.json").read_text())
    end = words.eos_token_id
    assert written == {
        **{"bos_token_id": end, "eos_token_id": [end, *words("\n")["input_ids"]], "pad_token_id": end},
        **{"do_sample": False, "max_new_tokens": 4, "num_beams": 3, "length_penalty": 0.9},
    }
    base = json.loads((root / "done" / "base" / "merged" / "generation_config.json").read_text())
    assert base == {"bos_token_id": end, "eos_token_id": [end], "pad_token_id": end}, "it has no prompts"


@pytest.mark.parametrize("section", [{"end": True}, {"sample": {"temperature": 1e-4, "top_k": 3}}])
def test_transformers_continues_as_the_run_did(root, torch, tmp_path, section):
    """With what is beside the model and no argument: greedily, until a token that the answers have, and drawn
    so coldly that it is the same.
    """
    import transformers

    done, chance = root / "done", np.random.default_rng(0)
    model, params = hf.load(done / "merged")
    # After eight steps the model repeats one token.
    params["h"] = jax.tree.map(
        lambda leaf: leaf + chance.normal(0, 3, leaf.shape).astype(leaf.dtype), params["h"]
    )
    config = configs.load(root / "tiny.json")
    words = by_transformers(done / "merged")
    prompts = tasks.prepare(config.data, tasks.read(config.data, done / "data"), words).prompts
    if "end" in section:
        (freely,) = generate(model, params, [prompts[0].ids], Decode(max_tokens=12), end=(0,))
        section = {"end": [next(token for token in freely if token != freely[0])]}
    config = configs.load(root / "tiny.json", ["decode=" + json.dumps({"max_tokens": 12, **section})])
    decoder = Decoder.create(config, model, words, prompts)
    hf.save(tmp_path / "merged", model, params, source=done / "merged")
    (tmp_path / "merged" / "generation_config.json").unlink()
    beside.write(tmp_path / "merged", decoder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged", padding_side="left")
    texts = [f"{prompt.text}<|endoftext|>" for prompt in prompts]
    inputs = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = theirs.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    assert 1 < len(found[0]) <= 12
    for row in found:
        while row and row[-1] == words.pad_token_id:
            row.pop()
        if row[-1:] == section.get("end"):  # which the run does not keep
            row.pop()
    texts = words.batch_decode(found, clean_up_tokenization_spaces=False)
    assert [" ".join(text.split("\n\n")[0].split()) for text in texts] == decoder.texts(params)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_and_convert_find_the_base_from_another_directory(root, torch, tmp_path, monkeypatch, capsys):
    library = pytest.importorskip("peft")
    done, ids = (root / "done").resolve(), np.arange(12)[None]
    merged, params = hf.load(done / "merged")
    expected = merged.apply({"params": params}, ids)
    monkeypatch.chdir(tmp_path)
    model = library.AutoPeftModelForCausalLM.from_pretrained(str(done / "adapter")).eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(ids)).logits.numpy(), expected, atol=1e-4)
    assert main(["convert", str(done / "adapter"), "out", "--to", "hf"]) == 0, capsys.readouterr().err
    close(hf.load(tmp_path / "out")[1], params)


def test_the_report_scores_and_weighs(root, capsys):
    """The scores are those of the files beside the report, and the costs are those of this model."""
    done = root / "done"
    facts, page = json.loads((done / "report.json").read_text()), (done / "report.md").read_text()
    capsys.readouterr()
    for when, file in (("after", "predictions.txt"), ("before", "predictions_before.txt")):
        assert main(["score", "e2e", "--refs", str(done / "references.txt"), "--hyps", str(done / file)]) == 0
        assert json.loads(capsys.readouterr().out) == facts["scores"][when]
        files = [
            "--refs",
            done / "references.txt",
            "--hyps",
            done / file,
            "--contexts",
            done / "contexts.txt",
        ]
        assert main(["score", "e2e", *map(str, files)]) == 0
        named = {name: facts["values"][when][name] for name in ("values", "all_values")}
        assert json.loads(capsys.readouterr().out) == facts["scores"][when] | named
    assert facts["values"]["people"]["all_values"] == 1, "its texts are made of the records"
    assert "## Values named" in page and (done / "figures" / "values.png").is_file()
    assert "| base, untouched |" in page and "| published | 70.4 | - |" in page
    ours, full = facts["cost"]["this run"], facts["cost"]["full fine-tuning"]
    for method, cost in ((facts["trainable"], ours), (facts["base"]["parameters"], full)):
        assert cost["trained parameters"] == method
        assert 8 * method < cost["optimiser bytes"] < 8 * method + 64, "two float32 moments, and counters"
    assert ours["FLOPs"] < full["FLOPs"] and ours["bytes"] < full["bytes"]
    base = 4 * facts["base"]["parameters"]
    assert facts["bytes"] == {"base": base, "frozen": base, "delta": 4 * facts["trainable"]}
    assert main(["report", str(done)]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert row.count("|") == head.count("|") == 16 and f"{100 * facts['scores']['after']['BLEU']:.2f}" in row


def test_the_predictions_are_those_of_the_base_and_of_the_merged_model(root):
    done, config = root / "done", configs.load(root / "tiny.json")
    for directory, file in (("base/merged", "predictions_before.txt"), ("merged", "predictions.txt")):
        model, params = hf.load(done / directory)
        words = by_transformers(done / directory)
        splits = tasks.prepare(config.data, tasks.read(config.data, done / "data"), words)
        texts = Decoder.create(config, model, words, splits.prompts).texts(params)
        assert (done / file).read_text().splitlines() == texts
    assert (done / "predictions.txt").read_text() != (done / "predictions_before.txt").read_text()


def test_the_base_stays_and_the_merged_model_moves(root):
    _, base = hf.load(root / "done" / "base" / "merged")
    _, merged = hf.load(root / "done" / "merged")
    moved = jax.tree.map(lambda one, two: not np.array_equal(one, two), base, merged)
    assert moved["h"]["0"]["attn"]["c_attn"].pop("kernel")
    assert not any(jax.tree.leaves(moved))
    width = base["h"]["0"]["attn"]["c_attn"]["kernel"].shape[0]
    difference = np.asarray(
        merged["h"]["0"]["attn"]["c_attn"]["kernel"] - base["h"]["0"]["attn"]["c_attn"]["kernel"]
    )
    assert not difference[:, width : 2 * width].any(), "the key block is not adapted"


def test_export_and_report(root, tmp_path, capsys, monkeypatch):
    assert (
        main(["export", "--workdir", str(root / "done"), "--to", str(tmp_path / "out"), "--format", "hf"])
        == 0
    )
    exported, merged = (hf.load(directory)[1] for directory in (tmp_path / "out", root / "done" / "merged"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, exported, merged)))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "not empty" in refused(
        capsys, monkeypatch, "export", "--workdir", root / "done", "--to", tmp_path / "out", "--format", "hf"
    )
    assert "no finished run" in refused(
        capsys, monkeypatch, "export", "--workdir", tmp_path, "--to", tmp_path / "new", "--format", "hf"
    )
    runs = [str(root / "done"), str(root / "done" / "base")]
    assert main(["report", *runs, "--figure", str(tmp_path / "losses.png")]) == 0
    table = capsys.readouterr().out
    assert "| tiny |" in table and "| tiny_base |" in table
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "no finished run" in refused(capsys, monkeypatch, "report", tmp_path)


def test_export_of_the_adapter(root, tmp_path, capsys, monkeypatch):
    done, (model, merged) = root / "done", hf.load(root / "done" / "merged")
    _, params = hf.load(done / "base" / "merged")
    arguments = ["export", "--workdir", done, "--format"]
    assert main([*map(str, arguments), "peft", "--to", str(tmp_path / "adapter")]) == 0
    close(lora_jax.merge(*peft.load(tmp_path / "adapter", model, params)), merged)
    assert main([*map(str, arguments), "loralib", "--to", str(tmp_path / "adapter.pt")]) == 0
    assert (
        f"wrote {tmp_path / 'adapter.pt'}; its lora_alpha is 4, which the file does not hold"
        in capsys.readouterr().out
    )
    close(lora_jax.merge(*loralib.load(tmp_path / "adapter.pt", model, params, alpha=4)), merged)
    assert main(["convert", str(done / "adapter"), str(tmp_path / "again"), "--to", "hf"]) == 0, (
        "the base is found beside it"
    )
    close(hf.load(tmp_path / "again")[1], merged)

    assert "nothing is overwritten" in refused(
        capsys, monkeypatch, *arguments, "loralib", "--to", tmp_path / "adapter.pt"
    )
    assert "must be a file .pt or .bin" in refused(
        capsys, monkeypatch, *arguments, "loralib", "--to", tmp_path / "new"
    )
    assert "is a finished run: pass its adapter" in refused(
        capsys, monkeypatch, "convert", done, tmp_path / "new", "--to", "hf"
    )
    line = refused(
        capsys,
        monkeypatch,
        "export",
        "--workdir",
        done / "base",
        "--format",
        "peft",
        "--to",
        tmp_path / "new",
    )
    assert "has no adapter/: the method is Full" in line
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.md").write_text("")
    (old / "report.json").write_text("{}")
    line = refused(
        capsys, monkeypatch, "export", "--workdir", old, "--format", "loralib", "--to", tmp_path / "new.pt"
    )
    assert "has no adapter/: it was finished by a version that wrote none" in line
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.pt").exists()


def test_pytorch_reads_the_export(root, torch):
    import transformers

    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        root / "done" / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, params = hf.load(root / "done" / "merged")
    ids = np.arange(12)[None]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours.apply({"params": params}, ids), theirs, atol=1e-5)
