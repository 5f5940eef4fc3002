"""--init-from hf:FOLDER starts a run from the weights, architecture and tokenizer of a published model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from data import BatchSampler, load_corpus
from tests.conftest import TINY_FLAGS
from tests.formats.conftest import make_model
from tests.tiny_export import char_tokenizer
from tokenizer import load_tokenizer
from utils.config.loader import ConfigLoader
from utils.experiments.commands import PROJECT_ROOT
from utils.files import read_json
from utils.formats.pretrained import open_pretrained
from utils.formats.source import open_source
from utils.formats.table import FormatError
from utils.inference.export import load_export
from utils.optim.schedules import learning_rate_at
from utils.runs.find import resolve_run
from utils.runs.log import read_metrics
from utils.training.start import start_of_parent
from weights import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]  # which these tests import
TEXT = "the cat sat on the mat. a dog ran to the cat and the mat ran away. " * 40
ALPHABET = sorted(set(TEXT))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, runs, and models of transformers whose tokenizers have fewer tokens than rows."""
    folder = tmp_path_factory.mktemp("finetuning")
    (folder / "text.txt").write_text(TEXT)
    for name, kind, more in (
        ("qwen", "qwen 3", {"vocab_size": 40, "max_position_embeddings": 4096}),
        ("gpt2", "gpt2", {"vocab_size": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    ):
        make_model(kind, **more).save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text(char_tokenizer(ALPHABET).huggingface())
        facts = {"tokenizer_class": "LlamaTokenizerFast", "pad_token": "a", "chat_template": "{{ messages }}"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(facts))
        (folder / name / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def run_train(work: Path, *flags: str) -> int:
    tiny = {
        key: value
        for key, value in TINY_FLAGS.items()
        if key not in ("--n-layer", "--n-head", "--n-embd", "--block-size")
    }
    argv = [part for pair in tiny.items() for part in pair]
    argv += ["--dataset", str(work / "text.txt"), "--runs-dir", str(work / "runs"), "--device", "cpu"]
    return train.main([*argv, "--no-aim-logging", "--corpora-dir", str(work / "corpora"), *flags])


def train_losses(run: Path) -> list[float]:
    return [loss for _, loss in read_metrics(run / "logs", "train/loss")]


@pytest.mark.parametrize("name", ["qwen", "gpt2"])
def test_fifty_steps_give_the_losses_of_the_same_loop_in_transformers(
    name: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--init-from", f"hf:{work / name}", "--block-size", "40", "--run-tag", f"losses-{name}")
    assert run_train(work, *flags, "--max-iters", "50", "--eval-interval", "50", "--weight-decay", "0.1") == 0
    assert f"--init-from: hf:{work / name}: the folder {work / name}" in capsys.readouterr().err
    run = resolve_run(f"losses-{name}", work / "runs")
    config = ConfigLoader(PROJECT_ROOT).load_only(run / "meta" / "full_config.json").config
    tokenizer = load_tokenizer(run / "meta" / "tokenizer.json")
    assert (tokenizer.kind, tokenizer.vocab_size, len(ALPHABET)) == ("hf", 40, len(ALPHABET))
    corpus = load_corpus(config.data, 40, work / "corpora", tokenizer)
    sampler = BatchSampler(corpus, 40, config.train.sequences, config.train.seed, torch.device("cpu"))

    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(work / name).train()
    settings = config.optimizer
    matrices = [parameter for parameter in theirs.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
    )
    losses = []
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings, 50)
        inputs, targets = sampler.train_batch(step)
        loss = torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    ours = train_losses(run)
    assert ours[0] == pytest.approx(losses[0], abs=1e-5)
    assert ours == pytest.approx(losses, abs=1e-3)
    assert losses[-1] < losses[0] - 0.5


def test_a_run_needs_the_published_model_only_at_its_start(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ("--init-from", f"hf:{work / 'moving'}", "--block-size", "16")
    shutil.copytree(work / "qwen", work / "moving")
    assert run_train(work, *flags, "--run-tag", "straight") == 0
    assert run_train(work, *flags, "--run-tag", "stopped", "--stop-at-step", "3") == 0
    straight = resolve_run("straight", work / "runs")
    record = read_json(straight / "run.json")
    start = start_of_parent(straight, record, print)  # as after a kill before the first checkpoint
    assert (start.relation, start.step) == ("init", 0)
    weights = bytearray((work / "moving" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (work / "moving" / "model.safetensors").write_bytes(weights)
    with pytest.raises(FormatError, match="not the weights that the run began with"):
        start_of_parent(straight, record, print)
    shutil.rmtree(work / "moving")
    stopped, straight = (resolve_run(tag, work / "runs") for tag in ("stopped", "straight"))
    assert train.main(["--resume", str(stopped), "--runs-dir", str(work / "runs")]) == 0
    assert train_losses(stopped) == train_losses(straight)
    assert read_json(stopped / "run.json")["parent"]["run"] == f"hf:{work / 'moving'}"

    assert run_train(work, "--init-from", str(straight), "--run-tag", "child", "--block-size", "16", *ARCHITECTURE) == 0
    child = resolve_run("child", work / "runs")
    assert main(["export", str(child), "--format", "hf"]) == 0
    capsys.readouterr()
    out = child / "artifacts" / "hf"
    config, tokenizer_config = read_json(out / "config.json"), read_json(out / "tokenizer_config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] == 4096  # training used only a part
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer_config["chat_template"] == "{{ messages }}"
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model" not in card  # a folder has no name on the hub
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ours = load_export(child / "artifacts" / "export", torch.device("cpu"))
    idx = torch.tensor([tokenizer("the cat sat on")["input_ids"]])
    assert idx[0].tolist() == ours.tokenizer.encode("the cat sat on")
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours.model(idx)[0], atol=1e-4, rtol=0)
    assert open_source(str(child), work).pretrained["name"] == "moving"


ARCHITECTURE = (
    *("--n-layer", "2", "--n-head", "4", "--n-kv-head", "2", "--n-embd", "32", "--head-dim", "16", "--ffn-dim", "48"),
    *("--position", "rope", "--norm", "rmsnorm", "--norm-eps", "1e-6", "--mlp", "swiglu", "--no-bias", "--qk-norm"),
    *("--qk-norm-weights", "--tokenizer", "hf:gone"),
)


def refusal(work: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    before = sorted((work / "runs").iterdir()) if (work / "runs").exists() else []
    assert run_train(work, *flags) == 2
    assert (sorted((work / "runs").iterdir()) if (work / "runs").exists() else []) == before
    return capsys.readouterr().err


def test_settings_that_contradict_the_model_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ("--init-from", f"hf:{work / 'gpt2'}")
    assert "are of another model: n_embd 32, not 64; fitting: --n-embd 32" in refusal(
        work, capsys, *start, "--n-embd", "64"
    )
    assert "of a model with tokenizer hf" in refusal(work, capsys, *start, "--tokenizer", "byte")
    assert "block_size 40, not 41; fitting: --block-size 40" in refusal(work, capsys, *start, "--block-size", "41")
    message = refusal(work, capsys, "--init-from", f"hf:{work / 'nothing'}")
    assert "no folder with a config.json, and not a name of the hub" in message


def test_a_shorter_context_keeps_the_first_positions(work: Path) -> None:
    flags = ("--init-from", f"hf:{work / 'gpt2'}", "--block-size", "8", "--max-iters", "1", "--learning-rate", "1e-9")
    assert run_train(work, *flags, "--run-tag", "short") == 0
    export = load_export(resolve_run("short", work / "runs") / "artifacts" / "export", torch.device("cpu"))
    whole = open_pretrained(work / "gpt2").load(torch.device("cpu"), torch.float32)
    idx = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(export.model(idx)[0], whole(idx)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("end_is_named", [True, False])
def test_the_tokenizer_of_an_export_has_its_special_tokens(end_is_named: bool, work: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "gpt2"
    shutil.copytree(work / "gpt2", model)
    facts = read_json(model / "tokenizer.json")
    facts["model"]["vocab"] |= {"<|endoftext|>": 30, "<s>": 31}
    facts["added_tokens"] = [
        {"id": place, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False} for text, place in (("<|endoftext|>", 30), ("<s>", 31))
    ]  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(facts))
    (model / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    if end_is_named:
        names = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<s>"}
        (model / "special_tokens_map.json").write_text(json.dumps(names))
    tag = f"named-{end_is_named}"
    flags = ("--init-from", f"hf:{model}", "--block-size", "8", "--max-iters", "1", "--run-tag", tag)
    assert run_train(work, *flags) == 0
    run = resolve_run(tag, work / "runs")
    assert main(["export", str(run), "--format", "hf"]) == 0
    theirs = AutoTokenizer.from_pretrained(run / "artifacts" / "hf")
    assert (theirs.eos_token, theirs.bos_token) == ("<|endoftext|>", "<s>" if end_is_named else None)
    assert theirs.model_max_length == 8
    assert theirs("the cat")["input_ids"] == load_tokenizer(run / "meta" / "tokenizer.json").encode("the cat")


def test_a_broken_model_leaves_no_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = work / "broken"
    shutil.copytree(work / "gpt2", broken)
    config: dict[str, Any] = read_json(broken / "config.json")
    (broken / "config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}))
    assert "scale_attn_by_inverse_layer_idx: expected false" in refusal(work, capsys, "--init-from", f"hf:{broken}")
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "tokenizer.json").unlink()
    assert f"{broken}: no tokenizer.json" in refusal(work, capsys, "--init-from", f"hf:{broken}")
