"""The server of the pages: its answers, and the requests that it refuses (odd names, hostile runs, other origins)."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run, training_records, write
from starlette.testclient import TestClient

import experiments
from utils.pages import routes
from utils.pages.keys import key_of
from utils.pages.routes import ASSETS, EDIT_HEADER, OPEN_PATHS, STATIC
from utils.pages.server import pages_app

LOCAL = "http://127.0.0.1:8000"
SCRIPT = "<svg onload=alert(1)>"
HOSTILE = f"{SCRIPT}'\"&\x1b[31m\u202e"
SECRET = "what lies outside of the runs"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of two runs, a run with hostile texts, one with links out of it, and a damaged one."""
    folder = tmp_path_factory.mktemp("pages") / "runs"
    write(folder.parent / "secret.txt", SECRET)
    for i in range(4):
        settings = {"learning_rate": 0.1 if i < 2 else 0.2, "seed": i}
        make_run(folder, f"run{i}", tag="g", settings=settings, metrics=training_records([3.0, 2.0 + i, 1.0 + i]))
    histogram = {"step": 1, "time": 1.0, "name": HOSTILE, "min": -1.0, "max": 1.0, "counts": [1, 2], "nonfinite": 0}
    metrics = [{"step": 1, "time": 1.0, "val/loss": 1.0, HOSTILE: 2.0}]
    samples = [{"step": 1, "time": 1.0, "text": HOSTILE}]
    logs = {"metrics": metrics, "samples": samples, "histograms": [histogram, {"step": 2, "name": 5}]}
    planted = make_run(folder, HOSTILE, tag=HOSTILE, notes={"note": HOSTILE, "tags": [HOSTILE]}, **logs)
    write(planted / "meta" / HOSTILE, "content")
    links = make_run(folder, "links")
    (links / "out.txt").symlink_to(folder.parent / "secret.txt")
    (links / "outside").symlink_to(folder.parent)
    os.mkfifo(links / "pipe")
    (folder / "damaged").mkdir()
    (folder / "elsewhere").symlink_to("/etc")
    return folder


@pytest.fixture(scope="module")
def client(runs_dir: Path) -> Iterator[TestClient]:
    with TestClient(pages_app(runs_dir), base_url=LOCAL, raise_server_exceptions=True) as client:
        yield client


def get(client: TestClient, path: str, *pairs: tuple[str, str]) -> Any:
    response = client.get(f"/runs/api/{path}", params=list(pairs))
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_pages_and_scripts_are_files_without_data_or_inline_code(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    if path.endswith(".js"):
        text = response.text
        assert not any(
            word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
        )
        assert "http://" not in text
        assert "https://" not in text
    elif not path.endswith(".css"):
        assert "<script>" not in response.text
        assert " on" not in response.text.split("<body>")[0]
        assert "style=" not in response.text


def test_the_first_page_leads_to_the_runs(client: TestClient) -> None:
    response = client.get("/", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/runs")


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_an_invalid_port_is_reported(port: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert experiments.main(["ui", "--port", port, "--runs-dir", str(tmp_path)]) == 2
    assert "--port" in capfd.readouterr().err


def test_only_the_static_files_of_the_pages_are_served(client: TestClient) -> None:
    assert {path.name for path in STATIC.iterdir()} >= set(ASSETS) - {"base.css"}
    for name in ("../routes.py", "..%2froutes.py", "table.html", "%2e%2e/keys.py", "x", "%00"):
        assert client.get(f"/runs/static/{name}").status_code == 404


def test_the_answer_about_a_run_has_the_facts_of_the_command_show(client: TestClient) -> None:
    run = get(client, "run", ("run", "run0"))
    facts = dict(run["results"]) | dict(run["provenance"])
    assert (facts["best val/loss"], facts["command"], run["status"]) == (
        "2.0000 at step 50",
        "python train.py",
        "completed",
    )
    own = {setting["key"] for setting in run["settings"] if setting["own"]}
    assert own == {"learning_rate", "seed"}
    assert len(run["settings"]) > 50
    assert "val/loss" in run["metrics"]


# Not escaped: fields of the dialog, and names that a page sends back.
RAW = ("notes", "tag", "metrics", "key", "name")


def shown_texts(value: Any) -> Iterator[str]:
    """The characters of all texts that the pages display."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in RAW:
                yield from shown_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from shown_texts(item)
    elif isinstance(value, str):
        yield from value


def test_hostile_texts_are_sent_as_json_without_control_characters(client: TestClient) -> None:
    key = key_of(HOSTILE)
    answers = [
        client.get("/runs/api/run", params={"run": key}),
        client.get("/runs/api/samples", params={"run": key}),
        client.get("/runs/api/files", params={"run": key}),
        client.get("/runs/api/compare", params=[("run", key), ("run", "run0"), ("metric", "val/loss")]),
        client.get("/runs/api/runs"),
    ]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert SCRIPT in answer.text  # as text of a JSON value
        assert not {"\x1b", "\u202e"} & set(shown_texts(answer.json()))
    (histogram,) = get(client, "histograms", ("run", key), ("name", HOSTILE))["steps"]
    assert histogram["counts"] == [1, 2]
    assert HOSTILE in [metric["name"] for metric in get(client, "metrics", ("run", key))]
    assert get(client, "histograms", ("run", "run0")) == {"names": [], "shown": [], "name": None, "steps": []}
    (curve,) = get(client, "curves", ("run", key), ("metric", HOSTILE))["curves"]
    assert curve["y"] == [2]


def test_a_file_is_sent_as_an_attachment(client: TestClient) -> None:
    listed = {file["name"]: file for file in get(client, "files", ("run", "run0"))}
    assert {"run.json", "logs/metrics.jsonl"} <= listed.keys()
    response = client.get("/runs/api/file", params={"run": "run0", "file": "run.json"})
    assert response.json()["id"] == "run0"
    assert len(response.content) == listed["run.json"]["bytes"]
    assert response.headers["content-disposition"] == "attachment; filename*=UTF-8''run.json"
    assert response.headers["content-type"] == "application/octet-stream"
    (odd,) = [file for file in get(client, "files", ("run", key_of(HOSTILE))) if "svg" in file["name"]]
    response = client.get("/runs/api/file", params={"run": key_of(HOSTILE), "file": odd["key"]})
    assert response.content == b"content"
    assert "<" not in response.headers["content-disposition"]


@pytest.mark.parametrize(
    "name",
    ["../run1/run.json", "../../secret.txt", "/etc/passwd", "out.txt", "outside/secret.txt", "pipe", "", ".", "logs",
     "logs/../run.json", "\x00", "run.json\x00", "a" * 3000, "~2e2e2f72756e312f72756e2e6a736f6e", "~zz"],
)  # fmt: skip
def test_no_request_reads_a_file_outside_its_run(client: TestClient, name: str) -> None:
    response = client.get("/runs/api/file", params={"run": "links", "file": name})
    assert response.status_code == 404
    assert SECRET not in response.text
    assert "error" in response.json()


@pytest.mark.parametrize(
    "run", ["..", "../runs/run0", "/etc", "elsewhere/passwd", "", ".", "run0\x00", "run", "x" * 3000, "~2e2e"]
)
def test_a_name_that_is_not_a_run_of_the_folder_is_not_found(client: TestClient, run: str) -> None:
    for path in ("run", "samples", "histograms", "files", "metrics"):
        response = client.get(f"/runs/api/{path}", params={"run": run})
        assert response.status_code == 404
        assert len(response.text) < 500
    assert client.get("/runs/api/curves", params={"run": run, "metric": "val/loss"}).status_code == 404


def test_entries_that_are_not_runs_are_reported_as_damaged(client: TestClient) -> None:
    for name in ("damaged", "elsewhere"):
        assert get(client, "run", ("run", name))["status"] == "damaged"
        assert get(client, "curves", ("run", name), ("metric", "val/loss"))["curves"][0]["problem"]
        assert get(client, "samples", ("run", name)) == []


def test_no_file_of_a_linked_folder_is_sent(client: TestClient) -> None:
    assert get(client, "files", ("run", "elsewhere")) == []
    assert client.get("/runs/api/file", params={"run": "elsewhere", "file": "passwd"}).status_code == 404


def test_runs_are_filtered_by_a_condition_in_sql(client: TestClient) -> None:
    assert get(client, "choose", ("where", "learning_rate > 0.15 and status = 'completed'")) == ["run2", "run3"]
    assert get(client, "choose", ("where", "id IN (SELECT run FROM metrics WHERE val_loss > 3.5)")) == ["run2", "run3"]


@pytest.mark.parametrize(
    "where",
    [
        *(
            "1; DROP TABLE runs",
            "true) UNION SELECT 'x' --",
            "COPY runs TO '/tmp/x'",
            "nope = 1",
            "'",
            "\ud800",
            "\x00",
        ),
        *("id = (SELECT content FROM read_text('/etc/passwd'))", "getenv('HOME') = ''"),
        "id IN (SELECT table_name FROM information_schema.tables)",
    ],
)
def test_a_condition_reads_only_the_runs(client: TestClient, where: str) -> None:
    response = client.get("/runs/api/choose", params={"where": where.encode("utf-8", "surrogatepass")})
    assert response.status_code in (200, 400), response.text
    assert response.status_code == 400 or response.json() == []
    assert "root:" not in response.text


def test_an_endless_condition_is_cancelled(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "WHERE_SECONDS", 0.3)
    endless = "(SELECT count(*) FROM range(100000000) a, range(100000000) b) > 0"
    response = client.get("/runs/api/choose", params={"where": endless})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "given up after 0.3 seconds")


def test_runs_are_compared_with_a_verdict(client: TestClient) -> None:
    answer = get(client, "compare", *(("run", f"run{i}") for i in range(4)))
    (verdict,) = answer["comparison"]["verdicts"]
    assert verdict["kind"] == "too few seeds"
    assert len(answer["comparison"]["groups"]) == 2
    rows = {row["name"]: row["values"] for section in answer["diff"]["sections"] for row in section["rows"]}
    assert rows["learning_rate"] == ["0.1", "0.1", "0.2", "0.2"]
    results = {row["name"]: row["values"][0] for row in answer["diff"]["results"]}
    assert (results["best val loss"], results["last val loss"], results["last train loss"]) == (
        "2.0000",
        "2.5000",
        "2.2500",
    )
    assert client.get("/runs/api/compare", params={"run": "run0"}).status_code == 400


def test_invalid_parameters_of_a_chart_are_reported(client: TestClient) -> None:
    for bad in (
        {"smooth": "1"},
        {"smooth": "nan"},
        {"points": "-1"},
        {"x": "age"},
        {"start": "inf"},
        {"metric": "step"},
        {"metric": ""},
    ):
        response = client.get("/runs/api/curves", params={"run": "run0", "metric": "val/loss", **bad})
        assert response.status_code == 400
        assert response.json()["error"]["message"]
    assert (
        client.get("/runs/api/curves", params=[("metric", "val/loss"), *([("run", "run0")] * 201)]).status_code == 400
    )


# ------------------------------------------------------------------------------------------------ changing notes


def edit(client: TestClient, body: Any, **headers: str) -> Any:
    return client.post("/runs/api/edit", json=body, headers={EDIT_HEADER: "1", **headers})


def test_notes_are_read_only_by_default(client: TestClient, runs_dir: Path) -> None:
    before = (runs_dir / "run0" / "notes.json").read_bytes()
    assert edit(client, {"run": "run0", "note": "x"}).status_code in (404, 405)
    assert get(client, "runs")["edit"] is False
    assert (runs_dir / "run0" / "notes.json").read_bytes() == before


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[TestClient]:
    make_run(tmp_path, "a", notes={"tags": ["old", "kept"]})
    with TestClient(pages_app(tmp_path, edit=True), base_url=LOCAL) as client:
        yield client


def test_notes_can_be_changed_from_a_page_of_the_server(editor: TestClient, tmp_path: Path) -> None:
    version = get(editor, "runs")["version"]
    change = {"run": "a", "note": HOSTILE, "add_tags": ["new"], "remove_tags": ["old"], "pinned": True, "tag": "t"}
    response = edit(editor, change, Origin=LOCAL, **{"Sec-Fetch-Site": "same-origin"})
    assert response.status_code == 200, response.text
    notes = json.loads((tmp_path / "a" / "notes.json").read_text())
    assert notes == {"tags": ["kept", "new"], "note": HOSTILE, "pinned": True}
    assert [row[0] for row in get(editor, "runs", ("since", version))["rows"]] == ["a"]
    assert get(editor, "run", ("run", "a"))["notes"]["note"] == HOSTILE


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://example.com"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"}, {EDIT_HEADER: ""},
     {"Sec-Fetch-Site": "cross-site"}, {"Host": "example.com"}],
)  # fmt: skip
def test_a_page_of_another_origin_changes_nothing(editor: TestClient, tmp_path: Path, headers: dict[str, str]) -> None:
    before = (tmp_path / "a" / "notes.json").read_bytes()
    assert edit(editor, {"run": "a", "note": "x"}, **headers).status_code == 403
    assert (tmp_path / "a" / "notes.json").read_bytes() == before


def test_a_full_disk_is_reported_to_the_page(editor: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.files.os.fsync", no_space)
    response = edit(editor, {"run": "a", "note": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["message"].endswith("a/notes.json: No space left on device")


def no_space(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_form_of_another_page_cannot_change_notes(editor: TestClient) -> None:
    body = json.dumps({"run": "a", "note": "x"})
    response = editor.post("/runs/api/edit", content=body, headers={"Content-Type": "text/plain"})
    assert response.status_code in (400, 403, 422)


@pytest.mark.parametrize(
    "body",
    [
        *([], {}, {"run": "b"}, {"run": "../a"}, {"run": "a", "path": "x"}, {"run": "a", "tag": "../x"}),
        *({"run": "a", "note": 5}, {"run": "a", "note": "x" * 100_001}),
        *({"run": "a", "add_tags": [""]}, {"run": "a", "add_tags": ["x"] * 101}),
    ],
)
def test_invalid_changes_of_notes_are_refused(editor: TestClient, tmp_path: Path, body: Any) -> None:
    before = (tmp_path / "a" / "notes.json").read_bytes()
    response = edit(editor, body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["message"]
    assert (tmp_path / "a" / "notes.json").read_bytes() == before
