"""The report of a sweep: the importance of settings, and pictures that need no network."""

from __future__ import annotations

import re
from collections.abc import Callable

from utils.sweeps.folder import Sweep
from utils.sweeps.report import write_report
from utils.sweeps.space import Dimension, Space
from utils.sweeps.study import Study, Work


def test_the_report_has_standalone_pages_and_the_importance_of_unconditional_settings(
    make_sweep: Callable[..., Sweep],
) -> None:
    optimizer = Dimension("optimizer_name", "choice", ("adamw", "muon"))
    momentum = Dimension("momentum", "range", (0.8, 0.99), when={"optimizer_name": ("muon",)})
    space = Space((Dimension("learning_rate", "log", (1e-4, 1e-1)), optimizer, momentum))
    sweep = make_sweep(space=space)
    study = Study(sweep)
    for number in range(8):
        work = study.claim(8)
        assert isinstance(work, Work)
        study.finish(number, 1.0 + number)
        work.release()
    assert any("momentum" in trial.params for trial in study.trials())
    importance, files = write_report(sweep, study)
    assert {*importance} == {"learning_rate", "optimizer_name"}
    assert [path.name for path in files] == ["parallel.html", "parallel.png", "slice.html", "slice.png"]
    for path in files[::2]:
        page = path.read_text(encoding="utf-8")
        assert "<title>lr: val/loss and the settings of each trial</title>" in page
        assert 'name="viewport"' in page
        assert "default-src 'none'" in page
        assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1::2])
