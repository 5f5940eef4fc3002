"""The layers of the design: a module imports from its own layer or a lower one, and layer 0 knows no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDS = (  # what experiments.py and profile_model.py --compare are made of
    "run_index run_sql run_diff run_tables log_comparison comparison provenance pruning notes plotting report"
    " html_page operator_costs profile_record profile_tables profile_picture"
)
LAYERS = {
    0: "errors files config config_loader cli run_manager run_log metadata signals console resume early_stopping"
    " curves checkpoint_folder promotion seal process",
    1: "device distributed flops roofline phases first_order linear attention kv_cache gelu lean sampling text_stream"
    " request_text adamw muon optim histograms step_buffer flight_recorder system_metrics tracking checkpoint "
    + RECORDS,
    2: "evaluation generation quantization scoring generation_stats generator prompt_file interactive export profiling"
    " memory_profile generation_speed"
    " profile_assembly run_profiler train_state checkpointing training gates start finish result callbacks monitor"
    " preflight reproduction sweep batch_size lr_range model_info completion_table completion_page",
}
LAYER_OF = {f"utils.{name}": layer for layer, names in LAYERS.items() for name in names.split()}
WITHOUT_TORCH = {name for name, layer in LAYER_OF.items() if layer == 0} | {
    f"utils.{name}" for name in [*RECORDS.split(), "reproduction"]
}
BESIDE = ("model", "data", "tokenizer")  # beside layer 1
NOT_BESIDE = ("utils.run_manager", "utils.run_log", "utils.metadata", "utils.tracking")  # runs and trackers

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py")]
}
UTILS = sorted(name for name in SOURCES if name.startswith("utils."))
SCRIPTS = sorted(name for name in SOURCES if "." not in name and name not in ("utils", *BESIDE))


def imports(name: str) -> set[str]:
    """Modules that a module imports anywhere, in a function or for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in SOURCES else node.module for full in names}
    return found


def home(name: str) -> str:
    """The module of LAYERS that a module belongs to: utils.tracking.aim -> utils.tracking."""
    return ".".join(name.split(".")[:2])


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", UTILS)
def test_every_module_of_utils_has_a_layer(name: str) -> None:
    assert home(name) in LAYER_OF, "give it a layer in LAYERS and in docs/architecture.md"


@pytest.mark.parametrize("name", UTILS)
def test_a_module_imports_from_its_own_layer_or_a_lower_one(name: str) -> None:
    layer = LAYER_OF[home(name)]
    for imported in imports(name):
        if imported.startswith("utils."):
            assert LAYER_OF[home(imported)] <= layer, f"{name} (layer {layer}) imports {imported}"
        if top(imported) in BESIDE:
            assert layer >= 1, f"{name} (layer 0) imports {imported}"
        assert top(imported) not in SCRIPTS, f"{name} imports the script {imported}"
        assert top(imported) not in ("tests", "benchmarks")


@pytest.mark.parametrize("name", BESIDE)
def test_model_data_and_tokenizer_know_no_run_tracker_or_script(name: str) -> None:
    for imported in imports(name):
        if imported.startswith("utils."):
            assert LAYER_OF[home(imported)] <= 1, f"{name} imports {imported}"
        assert home(imported) not in NOT_BESIDE, f"{name} imports {imported}"
        assert top(imported) not in (*SCRIPTS, "aim", "tensorboard"), f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH & set(UTILS)))
def test_nothing_in_layer_0_mentions_torch_or_numpy(name: str) -> None:
    assert not {"torch", "numpy", "aim", "tensorboard", "safetensors"} & {top(imported) for imported in imports(name)}


def test_layer_0_and_the_scripts_can_be_imported_where_torch_is_not() -> None:
    modules = sorted(WITHOUT_TORCH & set(UTILS)) + ["train", "inference", "profile_model", "experiments"]
    code = "import importlib, sys; sys.modules.update(torch=None, numpy=None, aim=None, tensorboard=None)\n"
    code += f"for name in {modules!r}: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_whole_design_is_seen() -> None:
    """The rules above mean nothing if the files are not found."""
    assert {"utils.config", "utils.training", "utils.tracking.aim", "utils.tracking"} <= set(UTILS)
    assert set(BESIDE) <= set(SOURCES)
    assert {"train", "inference", "profile_model"} <= set(SCRIPTS)
    assert "utils.config" in imports("utils.optim")
    assert "torch" in {top(imported) for imported in imports("model")}
