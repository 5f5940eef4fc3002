"""The HTML report: its content, and its behaviour in headless Chromium.

A screenshot of every page is kept below tmp_path, or in the folder named by WORKBENCH_SCREENSHOTS.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fake_runs import RESOLVED, indexed, make_run, record_of, training_records, write
from playwright.sync_api import Browser, Page, expect

from utils.experiments.report import write_report
from utils.runs.index import IndexedRun, read_run

pytestmark = pytest.mark.xdist_group("browser")  # with --dist loadgroup Chromium is started once

PATCH = """diff --git a/model.py b/model.py
--- a/model.py
+++ b/model.py
@@ -1 +1 @@
-x = 1
+x = 2 if a < b else '</pre>'
"""
MARKUP = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\""
SIZES = {"desktop": (1280, 900), "phone": (375, 812)}


def records(steps: int, floor: float) -> list[dict[str, Any]]:
    """A training of `steps` updates with an evaluation every 50."""
    made = []
    for step in range(steps + 1):
        place = {"step": step, "time": 1000.0 + step / 4, "tokens": 768 * step}
        loss = floor + 3 * math.exp(-step / 120)
        if step % 50 == 0:
            made.append({**place, "val/loss": loss + 0.1, "train/eval_loss": loss})
        made.append({**place, "train/loss": loss + 0.08 * math.sin(step * 12.9898)})
    return made


def two_runs(runs_dir: Path) -> list[IndexedRun]:
    """A baseline, and a run that differs in settings, code and fate, with markup in its texts."""
    paths = [
        make_run(
            runs_dir,
            "20260131_142501_baseline",
            tag="baseline",
            metrics=records(600, 1.4),
            samples=[{"step": s, "time": 1.0, "text": f"It was {s} o'clock in the cold and silent"} for s in (0, 600)],
            notes={"note": "the one to beat"},
            argv=["train.py", "--run-tag", "baseline"],
        ),
        make_run(
            runs_dir,
            "20260131_150212_wide_high-rate",
            tag="wide_high-rate",
            settings={"learning_rate": 0.003, "n_embd": 192},
            metrics=records(450, 1.25),
            samples=[{"step": 450, "time": 2.0, "text": f"\n\n{MARKUP}\n" + "unbroken" * 60}],
            notes={"note": f"{MARKUP}\nwith a second line", "tags": ["keep", "<b>bold</b>"]},
            patch=PATCH,
            status="interrupted",
            exit_reason="asked to stop",
            git={"commit": "d" * 40, "branch": "wider", "dirty": True, "remote": "https://example.org/repo.git"},
            argv=["train.py", "--run-tag", "wide_high-rate", "--learning-rate", "0.003"],
            parent={"run": "20260131_142501_baseline", "step": 100, "relation": "fork"},
            resumes=[
                {"time": "2026-01-31T15:00:00.000+00:00", "step": 200, "argv": [], "before": {"status": "crashed"}}
            ],
        ),
    ]
    return [read_run(path) for path in paths]


def report(runs: list[IndexedRun], tmp_path: Path) -> str:
    out = tmp_path / "report.html"
    write_report(runs, out, ROOT)
    return out.read_text(encoding="utf-8")


def without_scripts(page: str) -> str:
    return re.sub(r"(?s)<script>.*?</script>", "", page)


def test_the_table_has_a_row_for_each_run(tmp_path: Path) -> None:
    page = without_scripts(report(two_runs(tmp_path), tmp_path))
    for text in ("completed", "interrupted", "asked to stop", "2.0000", "2.5000", "cccccccccc", "with changes", "10 s"):
        assert text in page
    assert "the one to beat" in page


def test_texts_of_runs_are_escaped(tmp_path: Path) -> None:
    page = report(two_runs(tmp_path), tmp_path)
    assert MARKUP not in page
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 2  # the note and the sample
    assert page.count("<script>") == page.count("</script>") == 2  # plotly, and what draws with it


def test_names_of_runs_do_not_end_the_script(tmp_path: Path) -> None:
    run = indexed(tmp_path, "run", tag="</script><b>&", metrics=training_records([2.0, 1.0]))
    page = report([run], tmp_path)
    assert page.count("</script>") == 2
    assert "</script><b>" not in page


def test_runs_with_several_seeds_are_groups_with_mean_band_and_verdict(tmp_path: Path) -> None:
    runs = [
        indexed(
            tmp_path,
            f"{tag}-{seed}",
            tag=tag,
            settings={"seed": seed, "n_embd": width},
            metrics=training_records([4.0, last + seed / 100]),
        )
        for tag, width, last in (("small", 32, 3.0), ("wide", 64, 2.0))
        for seed in (1, 2, 3)
    ]
    text = report(runs, tmp_path)
    groups = text[text.index('id="groups"') : text.index('id="curves"')]
    for words in (
        "small",
        "wide",
        "3.0200",
        "2.0200",
        "0.0100",
        "worse by 1.0000",
        "wide differs from small: n_embd 64, not 32",
    ):
        assert words in groups
    data = json.loads(re.search(r"const data = (.*);\n", text).group(1))  # type: ignore[union-attr]
    assert [(one["name"], one["row"], one["members"]) for one in data["bands"]] == [
        ("small: mean of 3", 0, [0, 1, 2]),
        ("wide: mean of 3", 0, [3, 4, 5]),
    ]
    of_steps = data["bands"][0]["axes"]["step"]
    assert of_steps["x"] == [0, 10]
    assert [of_steps[key][1] for key in ("mean", "low", "high")] == pytest.approx([3.02, 3.01, 3.03])
    assert 'id="groups"' not in report(runs[::3], tmp_path)  # one seed each


def test_a_mean_is_of_the_runs_that_the_table_of_groups_counts(tmp_path: Path) -> None:
    runs = [
        indexed(tmp_path, f"run-{seed}", settings={"seed": seed}, metrics=training_records([4.0, seed, 2.0]))
        for seed in (1, 2, 3)
    ]
    early = training_records([9.0, 9.0])
    runs.append(indexed(tmp_path, "early", status="diverged", settings={"seed": 4}, metrics=early))
    text = report(runs, tmp_path)
    assert '<td class="number">3 of 4</td>' in text
    (band,) = json.loads(re.search(r"const data = (.*);\n", text).group(1))["bands"]  # type: ignore[union-attr]
    assert (band["name"], band["members"]) == ("run-1: mean of 3", [0, 1, 2, 3])
    assert (band["axes"]["step"]["x"], band["axes"]["step"]["mean"]) == ([0, 10, 20], [4.0, 2.0, 2.0])


def test_each_mean_has_a_colour_of_its_own(tmp_path: Path) -> None:
    runs = [
        indexed(tmp_path, f"{width}-{seed}", settings={"seed": seed, "n_embd": width}, metrics=training_records([3, 2]))
        for width, seeds in ((32, 4), (64, 4), (96, 3), (128, 1))
        for seed in range(seeds)
    ]
    data = json.loads(re.search(r"const data = (.*);\n", report(runs, tmp_path)).group(1))  # type: ignore[union-attr]
    color_of = {trace["run"]: trace["color"] for trace in data["traces"]}
    colors = {band["name"]: band["color"] for band in data["bands"]}
    assert len({*colors.values(), color_of[11]}) == 4  # there are eight colours: run 8 has that of run 0
    assert list(colors.values()) == [color_of[0], color_of[4], color_of[9]]


def test_runs_with_different_tokenizers_are_judged_by_bits_per_byte(tmp_path: Path) -> None:
    runs = [
        indexed(
            tmp_path,
            f"{tag}-{seed}",
            tag=tag,
            settings={"seed": seed},
            metrics=[
                {**record, "val/bits_per_byte": bits + seed / 100}
                for record in training_records([4.0, loss + seed / 100])
            ],
            summary={"val/loss": loss, "val/bits_per_byte": bits},
            resolved=RESOLVED | {"tokenizer_hash": tag},
        )
        for tag, loss, bits in (("bytes", 2.0, 3.0), ("words", 4.0, 2.0))
        for seed in (1, 2, 3)
    ]
    text = report(runs, tmp_path)
    groups = text[text.index('id="groups"') : text.index('id="curves"')]
    for words in ("mean val/bits_per_byte", "val/loss is per token", "worse by 1.0000"):
        assert words in groups
    assert len(json.loads(re.search(r"const data = (.*);\n", text).group(1))["bands"]) == 2  # type: ignore[union-attr]


def test_differences_of_settings_code_and_losses_are_shown(tmp_path: Path) -> None:
    page = without_scripts(report(two_runs(tmp_path), tmp_path))
    for text in ("learning_rate", "n_embd", "0.003", "192", "code", "commit", "d" * 40, "patch (sha256)"):
        assert text in page
    assert "first difference at step 0: val/loss" in page
    assert '<span class="added">++x = 2 if a &lt; b else &#39;&lt;/pre&gt;&#39;</span>' in page


def test_a_single_run_is_shown_with_its_settings(tmp_path: Path) -> None:
    page = without_scripts(report(two_runs(tmp_path)[1:], tmp_path))
    assert "<h1>wide_high-rate</h1>" in page
    assert "Settings that differ from the defaults" in page
    assert "What differs" not in page
    assert re.search(r"learning_rate</th><td class=\"value\">0.003</td><td class=\"quiet\">code", page)


def test_the_origin_of_a_run_is_shown(tmp_path: Path) -> None:
    page = without_scripts(report(two_runs(tmp_path), tmp_path))
    for text in (
        "train.py --run-tag wide_high-rate --learning-rate 0.003",
        "https://example.org/repo.git",
        "run 20260131_142501_baseline, step 100, relation fork",
        "<dt>started</dt><dd>2026-01-31 14:25:01 UTC</dd>",
        "<dt>ended</dt><dd>2026-01-31 14:25:11 UTC</dd>",
        "at step 200, 2026-01-31 15:00:00 UTC; the run was crashed",
        RESOLVED["corpus_hash"],
        "python: 3.11.2 (CPython)",
    ):
        assert text in page


def test_that_no_run_has_a_sample_is_said_once(tmp_path: Path) -> None:
    runs = [indexed(tmp_path, name, metrics=training_records([3.0, 2.0])) for name in ("a", "b")]
    assert report(runs, tmp_path).count("a sample in its log") == 1
    one = make_run(tmp_path, "c", samples=[{"step": 10, "time": 1.0, "text": "a text"}])
    assert report([*runs, read_run(one)], tmp_path).count("No sample in its log") == 2


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = without_scripts(report(two_runs(tmp_path), tmp_path))
    assert not re.search(r"<(link|img|iframe|object|embed)\b|<[^>]*\bsrc=|@import|url\(", page)
    assert "default-src 'none'" in page
    assert list(tmp_path.glob(".*")) == []  # no temporary file is left


def test_runs_that_cannot_be_read_are_shown_with_their_problem(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "no_record" / "run.json", "{")
    torn = make_run(tmp_path, "torn_log", metrics=training_records([3.0, 2.0]), last_step=None)
    write(torn / "logs" / "metrics.jsonl", '{"step": 0, "val/loss": 1\n{"step"\n')
    odd = make_run(tmp_path, "odd_record", metrics=training_records([3.0, 2.0]))
    write(odd / "run.json", record_of("odd_record", git="a text", resolved=[1], summary={"val/loss": {}}, resumes=[1]))
    bare = make_run(tmp_path, "bare")
    for name in ("meta/full_config.json", "meta/config_sources.json", "meta/env.txt", "logs/samples.jsonl"):
        (bare / name).unlink()
    write(bare / "logs" / "metrics.jsonl", '{"val/loss": 1}\n')
    sample = make_run(tmp_path, "odd_sample", metrics=training_records([3.0, 2.0]), samples=[{"text": "no step"}])
    names = ["empty", "no_record", torn.name, odd.name, bare.name, sample.name, "missing"]
    page = without_scripts(report([read_run(tmp_path / name) for name in names], tmp_path))
    for name in names:
        assert re.search(rf'<p class="problem"><strong>{name}</strong>: \S', page), name
    for name in names:
        report([read_run(tmp_path / name)], tmp_path)


def test_values_that_are_not_finite_are_counted_below_the_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", metrics=training_records([3.0, "nan", 2.0, "inf"]))
    assert "2 values are not finite and not drawn." in without_scripts(report([read_run(run)], tmp_path))
    diverged = make_run(tmp_path, "diverged", metrics=training_records(["nan", "nan"]))
    page = report([read_run(diverged)], tmp_path)
    assert "No loss of these runs is finite." in page
    assert "None of these runs has logged a loss." not in page


def test_facts_of_a_run_are_shown_in_words(tmp_path: Path) -> None:
    page = re.sub("<[^>]+>", "", without_scripts(report([indexed(tmp_path, "run")], tmp_path)))
    assert re.search(r"uncommitted changes\s*no", page)
    assert "Every setting has its default." in page
    (tmp_path / "run" / "meta" / "full_config.json").unlink()
    assert "The settings are not known." in report([read_run(tmp_path / "run")], tmp_path)


def test_without_curves_the_page_is_small(tmp_path: Path) -> None:
    page = report([indexed(tmp_path, "run")], tmp_path)
    assert "None of these runs has logged a loss." in page
    assert "<script" not in page
    assert len(page) < 30_000


def test_long_curves_are_thinned_and_infinite_values_left_out(tmp_path: Path) -> None:
    losses = [{"step": i, "time": i / 10, "tokens": i, "train/loss": 2 + i % 5} for i in range(30_000)]
    run = indexed(tmp_path, "run", metrics=[*losses, *training_records(["nan", 2.0, "inf"])])
    page = report([run], tmp_path)
    found = re.search(r"const data = (.*);\n", page)
    assert found
    data = json.loads(found.group(1))
    lengths = {trace["row"]: len(trace["y"]) for trace in data["traces"]}
    assert lengths == {0: 1, 1: pytest.approx(2000, rel=0.1)}
    assert data["axes"] == {"step": "step", "tokens": "tokens of training", "time": "time of training (min)"}


# ------------------------------------------------------------------------------------------------ in a browser


class Visit:
    """The report in a new page, with its requests, console messages and errors."""

    def __init__(self, browser: Browser, path: Path, size: str, scheme: str) -> None:
        width, height = SIZES[size]
        phone = {"is_mobile": True, "has_touch": True} if size == "phone" else {}
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **phone)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.devtools = self.context.new_cdp_session(self.page)
        self.devtools.on("Network.requestWillBeSent", lambda event: self.requests.append(event["request"]["url"]))
        self.devtools.send("Network.enable")
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        expect(self.page.locator("#chart .scatterlayer .js-line").first).to_be_visible()

    def move(self, x: float, y: float) -> None:
        self.devtools.send("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def beyond(self) -> list[str]:
        """Requests for anything outside this page."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs and a damaged one."""
    folder = tmp_path_factory.mktemp("report")
    write(folder / "runs" / "20260130_090000_lost" / "run.json", "{")
    runs = [*two_runs(folder / "runs"), read_run(folder / "runs" / "20260130_090000_lost")]
    write_report(runs, folder / "report.html", ROOT)
    return folder / "report.html"


Visitor = Callable[[str, str], Visit]


@pytest.fixture
def visit(browser: Browser, made: Path) -> Iterator[Visitor]:
    visits = []

    def start(size: str = "desktop", scheme: str = "light") -> Visit:
        visits.append(Visit(browser, made, size, scheme))
        return visits[-1]

    yield start
    for made_visit in visits:
        assert made_visit.beyond() == []
        assert made_visit.complaints == []
        made_visit.context.close()


def keep_picture(page: Page, tmp_path: Path, name: str, whole: bool = True) -> None:
    pictures = Path(os.environ.get("WORKBENCH_SCREENSHOTS", tmp_path))
    pictures.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=pictures / f"{name}.png", full_page=whole, animations="disabled")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_draws_its_curves_and_fits(size: str, scheme: str, visit: Visitor, tmp_path: Path) -> None:
    visited = visit(size, scheme)
    page = visited.page
    lines = page.locator("#chart .scatterlayer .js-line")
    expect(lines).to_have_count(4)  # train and val of two runs
    assert all(len(line.get_attribute("d") or "") > 50 for line in lines.all())
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) == (scheme == "dark")
    for text in page.locator("#chart .legendtext").all_text_contents():
        assert text in ("baseline", "wide_high-rate")
    keep_picture(page, tmp_path, f"report_{size}_{scheme}")


@pytest.mark.slow
def test_a_phone_shows_the_loss_beside_the_name_and_hints_at_scrolling(visit: Visitor) -> None:
    page = visit("phone", "light").page
    row = page.locator("#runs tbody tr").first
    assert row.locator("th > span.fixed").first.bounding_box()["height"] < 30  # type: ignore[index]
    box = row.locator("td").first.bounding_box()
    assert box
    assert box["x"] + box["width"] <= SIZES["phone"][0]
    assert row.locator("td").first.inner_text() == "2.0000\nstep 50"
    assert "gradient" in page.locator("#runs .scroll").evaluate("place => getComputedStyle(place).backgroundImage")


@pytest.mark.slow
def test_hovering_shows_the_values(visit: Visitor, tmp_path: Path) -> None:
    visited = visit("desktop", "light")
    page = visited.page
    chart = page.locator("#chart")
    chart.scroll_into_view_if_needed()
    box = page.locator("#chart .xy .nsewdrag, #chart .nsewdrag").first.bounding_box()
    assert box
    tip = page.locator("#chart .hoverlayer .legend")
    for attempt in range(100):  # the chart answers after a while, and not while it is laid out
        visited.move(box["x"] + (0.5 + attempt % 2 / 50) * box["width"], box["y"] + box["height"] / 2)
        page.wait_for_timeout(100)
        if text := " ".join(tip.all_text_contents()):
            break
    assert re.search(r"step: \d+", text)
    assert re.search(r"baseline : \d\.\d{4}", text)
    assert re.search(r"wide_high-rate : \d\.\d{4}", text)
    keep_picture(page, tmp_path, "report_hover", whole=False)


@pytest.mark.slow
def test_the_axis_can_be_switched(visit: Visitor) -> None:
    page = visit("desktop", "dark").page
    title = page.locator("#chart .xtitle")
    expect(title).to_have_text("step")
    for axis, label in (("tokens", "tokens of training"), ("time", "time of training (s)"), ("step", "step")):
        page.get_by_label(axis, exact=True).check()
        expect(title).to_have_text(label)
    ends = page.evaluate("Object.entries(data.traces[0].x).map(([axis, x]) => [axis, x.at(-1)])")
    assert dict(ends) == {"step": 600, "tokens": 768 * 600, "time": 150.0}


@pytest.mark.slow
def test_colours_follow_the_scheme_while_the_page_is_open(visit: Visitor) -> None:
    page = visit("desktop", "light").page
    title = page.locator("#chart .xtitle")
    light = title.evaluate("title => getComputedStyle(title).fill")
    page.emulate_media(color_scheme="dark")
    expect(title).not_to_have_css("fill", light)


@pytest.mark.slow
def test_texts_of_runs_are_not_markup_in_the_browser(visit: Visitor) -> None:
    page = visit("desktop", "light").page
    assert page.locator("main img").count() == page.locator("main script").count() == 0
    expect(page.locator("#samples pre").nth(1)).to_contain_text(MARKUP)
    expect(page.locator("#runs .note").nth(1)).to_contain_text("<b>bold</b>")
    expect(page.locator("#runs .problem")).to_contain_text("20260130_090000_lost")
