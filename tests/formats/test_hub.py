"""Published models by name: from folders, the cache and the hub, with its refusals, and without a network."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.fake_hub import COMMIT, Hub, serve_hub
from tests.tiny_export import TOKENIZER, tiny_model
from utils.errors import UserError
from utils.formats.huggingface import export_huggingface
from utils.formats.source import Source
from weights import main
from workbench import Generator, load_pretrained

NAME = "maker/tiny"
SHARD, SECOND_SHARD = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two shards."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    export_huggingface(Source("tiny", tiny_model(position="learned"), TOKENIZER), folder, shard_bytes=15_000)
    return folder


@pytest.fixture
def hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serve_hub() as hub:
        hub.models[NAME] = Path(shutil.copytree(model, tmp_path / "on the hub"))
        (hub.models[NAME] / "pytorch_model.bin").write_bytes(b"a pickle")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setitem(sys.modules, "transformers", None)  # its import takes seconds
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


def download(*flags: str) -> int:
    return main(["download", NAME, *flags])


def test_a_model_is_downloaded_once_and_found_from_then_on(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert download() == 0
    captured = capsys.readouterr()
    assert f"downloading {NAME} from {hub.url}/{NAME}" in captured.err
    folder = Path(captured.out.splitlines()[0])
    assert folder.name == COMMIT
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"} <= names
    assert "pytorch_model.bin" not in names

    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("--verify") == 0
    assert hub.asked == []
    out = capsys.readouterr().out
    for words in (
        "the cache of the hub, ",
        "9 files with the hash that the hub states",
        "GPT2LMHeadModel",
        "generates: '",
    ):
        assert words in " ".join(out.split())
    generated = Generator(*load_pretrained(NAME, device="cpu")).generate("the ").text
    assert generated == Generator(*load_pretrained(str(folder), device="cpu")).generate("the ").text


def test_a_missing_model_without_a_network_is_reported_in_one_line(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download() == 2
    error = capsys.readouterr().err
    assert f"with a network: python weights.py download {NAME}" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download() == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached" in error
    assert f"python weights.py download {NAME} --out DIR" in error
    assert error.count("\n") == 1


def test_a_folder_is_taken_first(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "maker" / "tiny")
    monkeypatch.chdir(tmp_path)
    load_pretrained(NAME, device="cpu")
    load_pretrained("other/name", local_dir=model, device="cpu")
    assert hub.asked == []


def test_a_broken_download_resumes_where_it_broke(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks[SHARD] = 5000
    assert download("--out", str(tmp_path / "out")) == 0
    assert [ranges for path, ranges in hub.asked if path.endswith(SHARD) and ranges] == ["bytes=5000-"]
    assert (tmp_path / "out" / SHARD).read_bytes() == (hub.models[NAME] / SHARD).read_bytes()


def download_until_broken(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Download until the connection breaks, then stop before a retry as Ctrl-C does."""

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", interrupted)
        assert download(*flags) == 130


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_stopped_download_resumes_where_it_was(
    place: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    flags = ("--out", str(tmp_path / "out")) if place == "folder" else ()
    hub.breaks[SHARD] = 5000
    download_until_broken(monkeypatch, *flags)
    assert not [path for path in tmp_path.rglob("*.safetensors") if "on the hub" not in path.parts]
    capsys.readouterr()
    assert download(*flags) == 0
    assert f"note: {SHARD}: 5.0 KB of 14.3 KB are already downloaded" in capsys.readouterr().err
    assert dict(hub.sent) == {
        path.name: path.stat().st_size for path in hub.models[NAME].iterdir() if path.name in hub.sent
    }
    assert not list(tmp_path.rglob("*.incomplete"))
    (found,) = [path for path in tmp_path.rglob(SHARD) if "on the hub" not in path.parts]
    assert found.read_bytes() == (hub.models[NAME] / SHARD).read_bytes()


def test_a_download_starts_again_if_the_hub_has_other_content(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.breaks[SHARD] = 5000
    download_until_broken(monkeypatch)
    path = hub.models[NAME] / SHARD
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    hub.sent.clear()
    assert download() == 0
    assert hub.sent[SHARD] == path.stat().st_size
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_damaged_part_is_refused_and_the_next_try_starts_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.breaks[SHARD] = 5000
    download_until_broken(monkeypatch)
    (part,) = tmp_path.rglob("*.incomplete")
    part.write_bytes(bytes(5000))
    assert download() == 2
    error = capsys.readouterr().err
    assert f"error: {NAME}/{SHARD}: damaged (14.3 KB): its hash is " in error
    assert "it was deleted: run the command again" in error
    assert not list(tmp_path.rglob("*.incomplete"))
    assert download() == 0


def test_a_killed_download_resumes_where_it_was(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import huggingface_hub.constants as c, sys, weights; c.DOWNLOAD_CHUNK_SIZE = 1000; weights.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "download", NAME, "--out", str(out)]
    hub.stalls[SHARD] = 12_000
    killed = subprocess.Popen(
        words,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (kept := sum(path.stat().st_size for path in out.rglob("*.incomplete"))):
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert [path.name for path in out.iterdir()] == [".cache"]
    hub.go.set()
    hub.sent.clear()
    assert download("--out", str(out)) == 0
    size = (hub.models[NAME] / SHARD).stat().st_size
    assert hub.sent[SHARD] == size - kept
    assert (out / SHARD).read_bytes() == (hub.models[NAME] / SHARD).read_bytes()


def test_a_folder_without_all_files_is_completed(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert download("--out", str(out)) == 0
    (out / SECOND_SHARD).unlink()
    hub.sent.clear()
    assert download("--out", str(out)) == 0
    assert set(hub.sent) == {SECOND_SHARD}


def test_a_full_disk_is_reported_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **others: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        assert download("--out", str(tmp_path / "out")) == 1
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}/out: No space left on device\n")
    assert download("--out", str(tmp_path / "out")) == 0


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_wrong_hash_is_refused_and_the_file_deleted(
    place: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out", str(tmp_path / "out")) if place == "folder" else ()
    hub.wrong.add(SECOND_SHARD)
    assert download(*flags) == 2
    assert "damaged" in capsys.readouterr().err
    assert not list(tmp_path.rglob(f"cache/**/{SECOND_SHARD}"))
    assert not (tmp_path / "out" / SECOND_SHARD).exists()


def test_verify_finds_a_flipped_bit(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert download("--out", str(out)) == 0
    content = bytearray((out / SHARD).read_bytes())
    content[-1] ^= 1
    (out / SHARD).write_bytes(content)
    assert download("--out", str(out), "--verify") == 2
    assert f"{SHARD}: damaged" in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["download", *flags]) == 2
    error = capsys.readouterr().err
    assert len([line for line in error.splitlines() if not line.startswith("note: ")]) == 1
    return error


def test_refusals_of_the_hub_are_explained(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"maker/other: there is no such model on {hub.url}" in refusal(capsys, "maker/other")
    assert f"{NAME} has no revision old: {hub.url}/{NAME}/commits" in refusal(capsys, NAME, "--revision", "old")
    hub.gated.add(NAME)
    assert f"{NAME} is gated: accept its conditions on {hub.url}/{NAME}" in refusal(capsys, NAME)
    hub.gated.clear()
    for path in hub.models[NAME].glob("model*"):
        path.unlink()
    assert "pytorch_model.bin only, a pickle, which can run any code" in refusal(capsys, NAME)
    (hub.models[NAME] / "pytorch_model.bin").unlink()
    assert "is not a model in safetensors" in refusal(capsys, NAME)
    for name in ("../../etc", "a/b/c", "http://x/y", "/etc", ""):
        assert "not a name of the hub" in refusal(capsys, name)


def test_an_incomplete_cache_is_completed(hub: Hub, tmp_path: Path) -> None:
    assert download() == 0
    (shard,) = (tmp_path / "cache").rglob(f"snapshots/*/{SECOND_SHARD}")
    shard.resolve().unlink()
    shard.unlink()
    assert download() == 0
    assert shard.exists()


def test_without_the_package_only_folders_are_loaded(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "need the package huggingface_hub: pip install huggingface_hub" in refusal(capsys, NAME)
    assert main(["download", str(model)]) == 0


def test_a_model_can_be_loaded_with_a_shorter_context_and_a_smaller_type(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    loaded, tokenizer = load_pretrained(str(model), device="cpu", dtype="bfloat16", context=5)
    assert capsys.readouterr().err == f"note: {model}: the folder {model}\n"
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.block_size == 5
    assert Generator(loaded, tokenizer).generate("the ").text
    with pytest.raises(UserError, match="dtype must be auto, float32, bfloat16, float16, not float8"):
        load_pretrained(str(model), dtype="float8")


def test_verify_refuses_logits_that_are_not_finite(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    assert main(["download", str(tmp_path / "model"), "--verify"]) == 2
    assert "its logits are not finite; weights.py inspect --stats shows where" in capsys.readouterr().err
