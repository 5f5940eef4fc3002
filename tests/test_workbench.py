"""The public interface: its examples run, importing it is light, its errors are those of the command line."""

from __future__ import annotations

import contextlib
import doctest
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_FLAGS

import utils.inference.generator
import workbench
from model import LanguageModel
from tokenizer import CharTokenizer
from train import train as train_script
from utils.config.fields import SECTIONS
from utils.config.loader import ConfigLoader
from utils.runs.log import read_metrics
from utils.runs.run import read_record
from workbench import (
    Callback,
    Config,
    ModelConfig,
    Run,
    TrainConfig,
    Trainer,
    TrainingRun,
    UserError,
    create_model,
    load_config,
    load_model,
    runs,
    train,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration of a tiny experiment, and a run with the tag `baseline`."""
    folder = tmp_path_factory.mktemp("project")
    places = {"corpora_dir": "corpora", "runs_dir": "runs", "aim_repo": "."}
    settings = {name.removeprefix("--").replace("-", "_"): int(value) for name, value in TINY_FLAGS.items()}
    settings |= {"eval_iters": 1, "histogram_interval": 0, "sample_tokens": 0, "eval_interval": 100}
    settings |= {key: str(folder / name) for key, name in places.items()}
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "PROJECT_ROOT", folder)
        train(max_iters=20, run_tag="baseline", quiet=True)
    return folder


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (workbench, utils.inference.generator):
        monkeypatch.setattr(module, "PROJECT_ROOT", project)


def examples_of(name: str) -> doctest.DocTest:
    """The examples in the docstring of a public name."""
    documented = type(runs) if name == "runs" else getattr(workbench, name)
    return doctest.DocTestParser().get_doctest(documented.__doc__, {}, name, None, None)


EXAMPLES = {name: examples_of(name) for name in workbench.__all__} | {
    "workbench": doctest.DocTestParser().get_doctest(str(workbench.__doc__), {}, "workbench", None, None)
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_docstrings_give_the_output_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    test = EXAMPLES[name]
    test.globs = {"__name__": "example", "math": math} | {name: getattr(workbench, name) for name in workbench.__all__}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, clear_globs=False)
    assert runner.failures == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", workbench.__all__)
def test_every_name_has_an_example_that_uses_it(name: str) -> None:
    assert any(name in example.source for example in EXAMPLES[name].examples)


def test_importing_it_imports_neither_torch_nor_numpy() -> None:
    """Nor do creating a configuration and listing runs."""
    code = (
        "import sys, workbench; "
        "workbench.Config(train=workbench.TrainConfig(max_iters=5)); workbench.runs(); "
        "print(sorted({'torch', 'numpy', 'train'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_its_names_are_complete() -> None:
    assert dir(workbench) == sorted(workbench.__all__)
    assert {section.__name__ for section in SECTIONS.values()} <= set(workbench.__all__)
    for name in workbench.__all__:
        assert getattr(workbench, name).__name__ == name if name != "runs" else True
    with pytest.raises(AttributeError, match="has no attribute 'Generater'; did you mean Generator"):
        workbench.Generater  # noqa: B018


# ------------------------------------------------------------------------------------------ training


def test_trainers_and_tokenizers_have_a_short_repr() -> None:
    assert repr(Trainer(run_tag="base")) == "<Trainer of base: not trained yet>"
    assert repr(Trainer()) == "<Trainer: not trained yet>"
    trainer = Trainer(run_tag="base")
    trainer.results = SimpleNamespace(status="completed", run_dir=Path("runs/x"))  # type: ignore[assignment]
    assert repr(trainer) == "<Trainer of base: completed, runs/x>"
    assert repr(CharTokenizer("abc")) == "<CharTokenizer: 3 tokens>"


def test_a_training_that_raises_clears_the_results_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(max_iters=1)
    trainer.train(quiet=True)
    monkeypatch.setattr("train.train_session", lambda session: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(quiet=True)
    assert trainer.results is None


def test_keywords_mappings_and_sections_mean_the_same() -> None:
    kinds = [
        Trainer(n_layer=2, max_iters=5).config,
        Trainer({"n_layer": 2, "max_iters": 5}).config,
        Trainer({"model": {"n_layer": 2}, "train": {"max_iters": 5}}).config,
        Trainer({"model": {"n_layer": 3}}, n_layer=2, max_iters=5).config,
    ]
    assert len({config.model_dump_json() for config in kinds}) == 1
    assert kinds[0].model.n_embd == 16  # from the files


def test_making_a_model_leaves_all_random_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    first, second = (create_model(ModelConfig(n_layer=1), vocab_size=5) for _ in range(2))
    assert torch.equal(first.token_embedding.weight, second.token_embedding.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_a_config_is_used_unchanged() -> None:
    assert Trainer(Config()).config == Config()
    assert Trainer(Config(), n_layer=2).config == Config(model=ModelConfig(n_layer=2))


class Nested(Callback):
    def on_step(self, run: TrainingRun) -> None:
        with pytest.raises(UserError, match="this process is training already"):
            train(max_iters=1, quiet=True)
        with futures.ThreadPoolExecutor() as pool, pytest.raises(UserError, match="this process is training already"):
            pool.submit(train, max_iters=1, quiet=True).result()


def test_a_process_trains_one_run_at_a_time(project: Path) -> None:
    """Two at a time would draw random numbers from one stream, but be recorded as bit-exact."""
    before = len(runs())
    assert train(max_iters=2, callbacks=[f"{__name__}:Nested"], quiet=True).status == "completed"
    with pytest.raises(UserError):
        train(callbacks=[f"{__name__}:None"], quiet=True)
    assert train(max_iters=1, quiet=True).status == "completed"
    assert len(runs()) == before + 2


@contextlib.contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [torch.no_grad, torch.inference_mode, float64, lambda: torch.device("meta"), lambda: torch.autocast("cpu")],
    ids=["no_grad", "inference_mode", "float64", "device", "autocast"],
)
def test_torch_settings_made_in_a_notebook_change_no_number(setting: Callable[[], Any]) -> None:
    """Without protection, float64 gives other losses under the same record, and the others end the run as failed."""
    settings = {"max_iters": 3, "eval_interval": 1, "sample_tokens": 5, "quiet": True}
    expected = Run(train(**settings).run_dir)
    with setting():
        found = Run(train(**settings).run_dir)
    assert found.metrics("val/loss") == expected.metrics("val/loss")
    assert found.metrics("grad_norm") == expected.metrics("grad_norm")


def test_a_config_may_be_changed_by_load_config() -> None:
    assert load_config({"n_embd": 8}, Config(), n_layer=2) == Config(model=ModelConfig(n_layer=2))


def test_load_config_reads_a_file_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep.yaml").write_text("n_layer: 3\n")
    assert load_config("~/deep.yaml").model.n_layer == load_config(tmp_path / "deep.yaml").model.n_layer == 3


@pytest.mark.parametrize("make", [Trainer, create_model, train, lambda given: create_model(vocab_size=5).fit(given)])
@pytest.mark.parametrize("given", [5, [("n_layer", 2)], TrainConfig()], ids=lambda given: type(given).__name__)
def test_arguments_that_are_neither_a_config_nor_settings_are_refused(make: Any, given: Any) -> None:
    with pytest.raises(UserError, match=r"expected a Config, or settings by name \(load_config reads files\), got "):
        make(given)
    with pytest.raises(UserError, match="expected files, or settings by name, got "):
        load_config(given)


def test_settings_made_in_code_are_recorded_as_such() -> None:
    path = train(max_iters=2, quiet=True).run_dir
    sources = yaml.safe_load((path / "meta" / "config_sources.json").read_text())
    assert sources["max_iters"]["source"] == "code"
    assert sources["n_embd"]["source"].startswith("configs/tiny.yaml:")


def test_a_result_is_a_mapping() -> None:
    results = Trainer(max_iters=3).train(quiet=True)
    assert results["val_loss"] == results.val_loss == read_metrics(results.run_dir / "logs", "val/loss")[-1][1]
    assert "val_loss" in results
    assert "accuracy" not in results
    assert {**results}.keys() == results.keys() >= {"status", "steps", "train_loss", "best_val_loss", "seconds"}
    assert results.get("accuracy", 0) == 0
    with pytest.raises(KeyError, match="accuracy"):
        results["accuracy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sise": 3}, "unknown key batch_sise; did you mean batch_size?"),
        ({"train": {"batch_sise": 3}}, "unknown key batch_sise in section train; did you mean batch_size?"),
        ({"train": {"n_embd": 3}}, "n_embd belongs to section model, not train"),
        ({"max_iters": 0}, "code: max_iters: expected integer >= 1 or none, got 0"),
        ({"mlp": "gelo"}, "code: mlp: expected gelu, gelu_tanh, relu2 or swiglu, got 'gelo'; did you mean gelu?"),
        ({"seed": 1, "train": {"seed": 1}}, "seed is set twice"),
        ({"n_embd": 15}, "code: n_embd (15) must be divisible by n_head (2), or head_dim must be set"),
        ({"dataset": "no such file"}, "unknown dataset no such file"),
    ],
)
def test_a_mistake_leaves_nothing_behind(settings: dict[str, object], message: str, project: Path) -> None:
    before = list((project / "runs").iterdir())
    with pytest.raises(UserError) as caught:
        train(settings, quiet=True)
    assert str(caught.value).startswith(message)
    assert list((project / "runs").iterdir()) == before


def test_a_resume_takes_values_as_training_does(project: Path) -> None:
    first = train(max_iters=4, stop_at_step=2, quiet=True, corpora_dir=project / "corpora", keep_last=np.int64(1))
    again = workbench.resume(first.run_dir, quiet=True, keep_last=np.int64(3), runs_dir=project / "runs")
    assert (again.status, Run(again.run_dir).config.tracking.runs_dir) == ("completed", str(project / "runs"))


def test_a_resume_refuses_what_the_command_line_refuses() -> None:
    with pytest.raises(UserError, match="unknown key max_iter; did you mean max_iters"):
        workbench.resume("baseline", max_iter=40)
    with pytest.raises(UserError, match=r"baseline(_\d)? is complete \(20 steps\)"):
        workbench.resume("baseline", quiet=True)
    with pytest.raises(UserError, match="learning_rate changes the numbers of a run"):
        workbench.resume(runs.find("baseline"), learning_rate=1.0, quiet=True)
    with pytest.raises(UserError, match=r"no run basline .*; did you mean baseline"):
        workbench.resume("basline")


# ------------------------------------------------------------------------------------------ runs


def test_runs_are_listed_with_the_newest_last(project: Path) -> None:
    path = train(max_iters=2, run_tag="newest", note="why", quiet=True).run_dir
    found = runs()
    assert found[-1].path == path
    assert (found[-1].tag, found[-1].note, found[-1].problem) == ("newest", "why", None)
    assert repr(found[-1]) == f"<Run {path.name}: completed>"
    assert runs.find("latest").id == runs.find(path).id == runs.find("newest", project / "runs").id == path.name
    assert runs(project / "nowhere") == []
    with pytest.raises(UserError, match="no run other"):
        runs.find("other")


def test_a_run_gives_its_configuration_and_numbers() -> None:
    run = runs.find("baseline")
    assert (run.config.train.max_iters, run.config.model.n_embd) == (20, 16)
    assert run.metrics("val/loss") == read_metrics(run.path / "logs", "val/loss")
    assert {"train/loss", "val/loss", "lr"} <= set(run.metric_names())
    assert run.summary["val/loss"] == run.metrics("val/loss")[-1][1]
    assert run.row()["max_iters"] == 20
    with pytest.raises(UserError, match="has logged no metric val/los; did you mean val/loss"):
        run.metrics("val/los")


def test_a_damaged_run_is_no_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (run.status, run.problem, run.metrics("val/loss")) == ("damaged", "an empty folder", [])


# ------------------------------------------------------------------------------------------ models


def test_a_dataset_named_in_a_configuration_file_is_relative_to_the_project(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name in the current folder is not taken instead."""
    file = tmp_path / "own.yaml"
    file.write_text("dataset: own.txt\n")
    (tmp_path / "own.txt").write_text("to be or not to be\n" * 50)
    monkeypatch.chdir(tmp_path)
    command = ConfigLoader(project).load([file])
    with pytest.raises(UserError, match=f"unknown dataset {project}/own.txt"):
        train_script(command, quiet=True, root=project)
    (project / "own.txt").write_text("abc\n" * 50)
    (project / "configs" / "own.yaml").write_text("dataset: own.txt\n")
    try:
        assert create_model().vocab_size == 4
    finally:
        (project / "configs" / "own.yaml").unlink()


def test_a_new_model_has_the_weights_that_training_starts_from() -> None:
    state = torch.random.get_rng_state()
    model = create_model(seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    results = train(seed=5, max_iters=1, eval_interval=1, checkpoint_interval=1, learning_rate=1e-9, quiet=True)
    trained, tokenizer = load_model(results.run_dir, device="cpu")
    assert (model.vocab_size, model.tokenizer.hash()) == (trained.vocab_size, tokenizer.hash())
    for name, weights in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weights, rtol=0, atol=1e-6)


def test_fit_takes_over_the_weights_of_its_run() -> None:
    model = create_model({"n_layer": 2}, max_iters=3)
    assert isinstance(model, LanguageModel)
    results = model.fit(quiet=True)
    assert (results.status, results["steps"], runs()[-1].path) == ("completed", 3, results.run_dir)
    trained, tokenizer = load_model(results.run_dir, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert len(list(model.parameters())) == len(list(trained.parameters())) > 20
    assert (model.training, model.tokenizer.hash()) == (False, tokenizer.hash())
    request = workbench.Request(max_new_tokens=5)
    texts = [workbench.Generator(m, tokenizer).generate("The ", request).text for m in (model, trained)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["text", "path", "config", "mapping"])
def test_fit_takes_a_text_a_path_or_a_configuration(kind: str, project: Path, tmp_path: Path) -> None:
    text = "to be or not to be\nthat is the question\n" * 50
    (tmp_path / "mine.txt").write_text(text)
    model = create_model(max_iters=2, n_embd=32)
    data = {
        "text": text,
        "path": tmp_path / "mine.txt",
        "mapping": {"dataset": str(tmp_path / "mine.txt")},
        "config": Trainer(max_iters=2, n_embd=32, dataset=str(tmp_path / "mine.txt")).config,
    }[kind]
    results = model.fit(data, quiet=True, seed=3)
    assert results.status == "completed"
    assert model.vocab_size == len(set(text)) == model.token_embedding.weight.shape[0]
    config = runs()[-1].config
    assert (config.train.seed, config.model.n_embd) == (3, 32)
    assert Path(config.data.dataset).read_text() == text


def test_an_interrupted_fit_leaves_the_model_unchanged() -> None:
    model = create_model(stop_at_step=1)
    before = [parameter.clone() for parameter in model.parameters()]
    assert model.fit(quiet=True).status == "interrupted"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_made_by_its_class_fits_with_the_default_settings(project: Path) -> None:
    model = workbench.TrainableModel(ModelConfig(n_layer=1, n_embd=16, n_head=2), vocab_size=10)
    results = model.fit(max_iters=1, eval_iters=1, sample_tokens=0, runs_dir=str(project / "runs"), quiet=True)
    assert results.status == "completed"
    assert model.vocab_size > 10


def test_fit_refuses_another_architecture() -> None:
    model = create_model(vocab_size=10)
    with pytest.raises(UserError, match="the model has another n_layer: make a new one with create_model"):
        model.fit(n_layer=5)
    model.blocks[0].mlp = torch.nn.Linear(16, 16)
    with pytest.raises(UserError, match="the layers of the model were changed by hand"):
        model.fit()
    assert create_model(ModelConfig(n_layer=1), vocab_size=10).vocab_size == 10
    with pytest.raises(UserError, match="vocab_size must be at least 1, not 0"):
        create_model(vocab_size=0)


def test_a_model_is_loaded_from_a_run_or_an_export() -> None:
    run = runs.find("baseline")
    export = run.path / "artifacts" / "export"
    models = [load_model(what, device="cpu")[0] for what in ("baseline", run, run.path, export)]
    for model in models:
        assert not model.training
        torch.testing.assert_close(model.state_dict(), models[0].state_dict(), rtol=0, atol=0)
    assert load_model(device="cpu")[0].config  # the newest one
    with pytest.raises(UserError, match="no run other"):
        load_model("other")


def test_a_run_can_be_given_instead_of_its_path() -> None:
    run = runs.find("baseline")
    generator = workbench.Generator.from_run(run, device="cpu", draft=run)
    assert generator.tokenizer.hash() == load_model(run)[1].hash()
    assert runs.find(run).path == Run(run).path == run.path


def test_a_model_and_its_run_have_the_same_facts() -> None:
    facts, run = workbench.get_model_info("baseline"), runs.find("baseline")
    model, _ = load_model(run, device="cpu")
    assert facts == workbench.get_model_info(model) | {"training": facts["training"]}
    assert facts["parameters"] == read_record(run.path)["resolved"]["parameters"]
    assert sum(torch.Size(shape).numel() for shape in facts["shapes"].values()) == facts["parameters"]
    assert (facts["layers"], facts["heads"], facts["width"], facts["context"]) == (1, 2, 16, 8)
    assert facts["config"]["n_embd"] == 16
    assert facts["training"]["run"] == run.id
    assert "1 block," in facts["architecture"]
