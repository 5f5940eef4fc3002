"""The subjects of a comparison: a run, tag, commit, patch or overrides as an experiment to train with any seed.

The code of each is unpacked into a temporary folder, as for `reproduce`, so the checkout may be edited meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.config.fields import FIELDS, flat
from utils.config.loader import ConfigLoader, LoadedConfig
from utils.config.settings import Config
from utils.errors import UserError, nearest
from utils.experiments.compare import identity
from utils.experiments.recorded_code import (
    ReproductionError,
    apply_patch,
    code_of_its_own,
    recorded_code,
    recorded_patch,
    unpack_commit,
)
from utils.experiments.reproduce import UNTRACKED, first_weights_flags, flags_of, settings_flags
from utils.files import expand_home, read_bytes, real_path
from utils.runs.code import CodeReader, GitFacts, open_repo
from utils.runs.find import moved_path, resolve_runs
from utils.runs.identity import TRAJECTORY_KEYS, code_identity, corpus_of, origin_of
from utils.runs.index import IndexedRun, read_run, resolved_setting
from utils.runs.origin import PINNED_KEYS, recorded_config
from utils.runs.run import RunError
from utils.runs.trust import require_trust

OVERRIDE = re.compile(r"(?:--)?([A-Za-z][\w-]*)=(.*)", re.DOTALL)
NEXT_OVERRIDE = re.compile(r"[\s,]+(?=(?:--)?[A-Za-z][\w-]*=)")
PATCH_ENDINGS = (".patch", ".diff")
SUBJECT_HELP = "RUN or tag, commit, FILE.patch, or settings: learning_rate=3e-3,dropout=0.1"
COMPARED_KEYS = TRAJECTORY_KEYS - {"seed"}
CHOSEN_HERE = ("seed", "runs_dir", "run_tag")
FROM_FILES = ("default", "configs/")  # how the sources of those settings begin that belong to the code


@dataclass(frozen=True)
class Code:
    """A commit and the uncommitted changes on top of it.

    commit: None for the project folder as it is.
    patch: the uncommitted changes.
    """

    commit: str | None
    patch: bytes
    name: str


@dataclass(frozen=True)
class Experiment:
    """Code and configuration, without a seed.

    project: the folder with its train.py.
    loaded: the resulting configuration.
    code: commit and hash of the uncommitted changes, as in the record of a run; (None, None) if git does not know it.
    patch: the uncommitted changes.
    run: the run that gives the configuration and the first weights; None: the configuration is configs/ of the code.
    overrides: settings on top of that configuration.
    """

    name: str
    project: Path
    loaded: LoadedConfig
    code: tuple[str | None, str | None] = (None, None)
    patch: bytes = b""
    run: IndexedRun | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The values, in JSON types, of the settings that decide the numbers, except for the seed."""
        values = {key: value for key, value in _plain(self.loaded.config).items() if key in (*COMPARED_KEYS, "dataset")}
        if self.run is not None:
            pins = {key: resolved_setting(self.run, key) for key in PINNED_KEYS if key not in self.overrides}
            values |= {key: value for key, value in pins.items() if value is not None}
        return values

    @functools.cached_property
    def config_key(self) -> str:
        """A hash of everything that decides the numbers, except for code and seed."""
        start = [corpus_of(self.run), origin_of(self.run)] if self.run is not None else []
        return hash_of([self.settings, start])

    @functools.cached_property
    def key(self) -> str:
        """A hash of everything that decides the numbers, except for the seed."""
        return hash_of([self.config_key, *self.code])

    @property
    def dataset(self) -> str:
        """The setting `dataset`: the name of a dataset, or a path."""
        return str(self.settings["dataset"])

    @property
    def text_of(self) -> IndexedRun | None:
        """The run on whose text it must be trained; None: on whatever text the dataset has."""
        return None if "dataset" in self.overrides else self.run

    @property
    def source(self) -> Code:
        return Code(self.code[0], self.patch, f"the code of {self.name}")

    def is_of(self, run: IndexedRun) -> bool:
        """Whether a run in the index belongs to this experiment."""
        if run.record.get("experiment") == self.key:
            return True
        if not run.settings or code_identity(run) != self.code:
            return False
        if self.run is not None and not self.overrides:
            return repr(identity(run)) == repr(identity(self.run))
        if origin_of(run) != (origin_of(self.run) if self.run else None):
            return False
        settings, defaults = dict(self.settings), _plain(Config())
        dataset = str(settings.pop("dataset"))
        if not f"/{run.settings.get('dataset')}".endswith(f"/{dataset}"):  # a file is recorded with its whole path
            return False
        recorded = {key: run.settings.get(key, defaults[key]) for key in settings}
        return all(value in (recorded[key], resolved_setting(run, key)) for key, value in settings.items())

    def flags(self, root: Path, runs_dir: Path, seed: int) -> Iterator[str]:
        """The flags of train.py for one seed."""
        if self.run is not None:
            yield from first_weights_flags(self.run)
            yield from settings_flags(self.run, root)
        else:
            data, dataset = self.loaded.config.data, self.loaded.config.data.dataset
            if (root / dataset).exists():
                dataset = str(root / dataset)
            places = {"dataset": dataset, **{k: root / getattr(data, k) for k in ("corpora_dir", "datasets_dir")}}
            yield from flags_of({**UNTRACKED, **places})
        tag = re.sub(r"[^\w.-]+", "-", self.name)[:50].strip("-.") or "gate"
        yield from flags_of(
            {**self.overrides, "runs_dir": real_path(runs_dir), "run_tag": f"{tag}-{seed}", "seed": seed}
        )

    def git_facts(self) -> GitFacts:
        return GitFacts(commit=self.code[0], dirty=bool(self.patch), patch=self.patch)


def _plain(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(flat(config), default=str))
    return values


def hash_of(value: Any) -> str:
    """The SHA-256 of a value, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Subjects:
    """Makes experiments from the words of a command line.

    Args:
        root: the project folder.
        folder: an empty folder for their code.
        trusted: allow the code of runs that were made elsewhere to run.
    """

    def __init__(self, root: Path, runs_dir: Path, folder: Path, trusted: bool = False) -> None:
        self.root, self.runs_dir, self.folder, self.trusted = root, runs_dir, folder, trusted
        self._trees = 0
        self._unpacked: dict[tuple[str, bytes], tuple[Path, tuple[str | None, str | None]]] = {}

    def pair(self, candidate: str, baseline: str, both: str | None = None) -> tuple[Experiment, Experiment]:
        """The two experiments of a comparison: (candidate, baseline).

        A commit, patch or overrides are a change of the other experiment if that is a run. If neither is a run, the
        baseline is a change of the checkout, and the candidate a change of the baseline.

        Args:
            both: settings of both, if neither is a run.

        Raises:
            UserError: a word names nothing known, or its code or configuration is not available.
        """
        runs = [self._runs(word) for word in (candidate, baseline)]
        if both is not None and any(runs):
            raise UserError("--set is for commits, patches and settings: a run has its own configuration")
        if runs[1]:
            base = self._of_runs(baseline, runs[1])
        else:
            start = self._of_runs(candidate, runs[0]) if runs[0] else self.checkout(both)
            base = self._changed(start, baseline)
        return (self._of_runs(candidate, runs[0]) if runs[0] else self._changed(base, candidate)), base

    def one(self, word: str) -> Experiment:
        """The experiment of a run, or of a commit, a patch or overrides as a change of the checkout."""
        runs = self._runs(word)
        return self._of_runs(word, runs) if runs else self._changed(self.checkout(), word)

    def checkout(self, settings: str | None = None) -> Experiment:
        """The project folder as it is now, with configs/ and `settings`."""
        data = ConfigLoader(self.root).load().config.data
        kept = (self.runs_dir, self.root / data.corpora_dir, self.root / data.datasets_dir)
        facts = CodeReader(self.root, excluded=kept).git_facts()
        if facts.commit is None:
            base = Experiment("checkout", self.root, ConfigLoader(self.root).load())
        else:
            base = self._of_code("checkout", facts.commit, facts.patch)
        return self._overridden(base, settings) if settings else base

    def variant(self, base: Experiment, code: Code, settings: Mapping[str, Any], name: str) -> Experiment:
        """`base` with other code and with some settings.

        Raises:
            UserError: the configuration is not valid, or the code is not available.
        """
        project, identity_of_code = base.project, base.code
        if (code.commit, code.patch) != (base.code[0], base.patch):
            if code.commit is None:
                raise UserError(f"{code.name} is not known to git")
            if (code.commit, code.patch) not in self._unpacked:
                found = self._of_code(name, code.commit, code.patch, configure=False)
                self._unpacked[code.commit, code.patch] = found.project, found.code
            project, identity_of_code = self._unpacked[code.commit, code.patch]
        overrides = {**base.overrides, **settings}
        if base.run is not None:
            recorded = recorded_config(base.run.path, ConfigLoader(self.root))
            loaded = ConfigLoader(project).load_onto(recorded, (), _as_given(overrides))
        else:
            loaded = ConfigLoader(project).load((), _as_given(overrides))
        return replace(
            base,
            name=name,
            project=project,
            loaded=loaded,
            code=identity_of_code,
            patch=code.patch,
            overrides=overrides,
        )

    def _runs(self, word: str) -> list[IndexedRun]:
        """The runs that a word names; none if it names no run, or reads as a patch or overrides."""
        if OVERRIDE.fullmatch(word) or word.endswith(PATCH_ENDINGS):
            return []
        try:
            return [read_run(path.absolute()) for path in resolve_runs(word, self.runs_dir)]
        except RunError:
            return []

    def _of_runs(self, name: str, runs: list[IndexedRun]) -> Experiment:
        first = runs[0]
        if not first.settings or not first.record.get("resolved"):
            raise UserError(f"{first.id}: {first.problem or 'it ended before its first step'}")
        if len({repr(identity(run)) for run in runs if run.settings}) > 1:
            raise UserError(
                f"{name}: its runs differ in more than the seed (experiments.py compare {name} says in what): name one"
            )
        require_trust(first.path, self.root, code_of_its_own(first, self.root, "recorded"), self.trusted)
        place = self._new_tree()
        place.mkdir()
        project, _ = recorded_code(first, self.root, place)
        patch = recorded_patch(first)
        loaded = recorded_config(first.path, ConfigLoader(self.root))
        return Experiment(name, project, loaded, code_identity(first), patch, first)

    def _changed(self, base: Experiment, word: str) -> Experiment:
        """`base` with the overrides or the patch that `word` names, or at the commit that it names."""
        if OVERRIDE.fullmatch(word):
            return self._overridden(base, word)
        if word.endswith(PATCH_ENDINGS):
            path = Path(expand_home(word))
            try:
                return self._with_code(base, path.stem, base.code[0], self._whole_patch(base, path))
            except ReproductionError as error:
                reason = str(error).rpartition("cannot be applied: ")[2]
                raise UserError(f"{path} cannot be applied to the code of {base.name}: {reason}") from None
        return self._with_code(base, word, self._commit(word), b"")

    def _overridden(self, base: Experiment, word: str) -> Experiment:
        given = {**_as_given(base.overrides), **parse_overrides(word)}
        if base.run is not None:
            recorded = recorded_config(base.run.path, ConfigLoader(self.root))
            loaded = ConfigLoader(base.project).load_onto(recorded, (), given)
        else:
            loaded = ConfigLoader(base.project).load((), given)
        values = _plain(loaded.config)
        return replace(base, name=word, loaded=loaded, overrides={key: values[key] for key in given})

    @staticmethod
    def _whole_patch(base: Experiment, path: Path) -> bytes:
        """The uncommitted changes of `base`, followed by the patch in a file."""
        try:
            patch = read_bytes(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if base.code[0] is None:
            raise UserError(f"{path}: a patch is applied to a commit, and git does not know the code of {base.name}")
        if not patch.strip():
            raise UserError(f"{path}: the patch is empty")
        return base.patch + patch

    def _with_code(self, base: Experiment, name: str, commit: str | None, patch: bytes) -> Experiment:
        """`base` with other code: it keeps the settings of its command line, and configs/ come with the code.

        A run that began with the weights of another run keeps its whole configuration.
        """
        assert commit is not None
        if base.run is None or origin_of(base.run) is not None:
            changed = self._of_code(name, commit, patch, base.overrides)
            return replace(changed, run=base.run, loaded=base.loaded) if base.run else changed
        return self._of_code(name, commit, patch, chosen_settings(base))

    def _of_code(
        self,
        name: str,
        commit: str,
        patch: bytes,
        overrides: Mapping[str, Any] | None = None,
        *,
        configure: bool = True,
    ) -> Experiment:
        """A commit with a patch and its own configs/; the latter are not read if `configure` is False."""
        tree = self._new_tree()
        project = unpack_commit(commit, self.root, tree)
        if patch:
            apply_patch(patch, tree, tree.with_suffix(".patch"))
        overrides = overrides or {}
        loader = ConfigLoader(project)
        loaded = loader.load((), _as_given(overrides)) if configure else LoadedConfig.from_config(Config())
        code = (commit, hashlib.sha256(patch).hexdigest() if patch else None)
        return Experiment(name, project, loaded, code, patch, None, overrides)

    def _new_tree(self) -> Path:
        self._trees += 1
        return self.folder / f"tree_{self._trees}"

    def _commit(self, word: str) -> str:
        import git

        if not word.startswith("-"):
            with contextlib.suppress(git.GitError, OSError, ValueError), open_repo(self.root) as repo:
                return str(repo.git.rev_parse("--verify", "--quiet", f"{word}^{{commit}}"))
        try:
            resolve_runs(word, self.runs_dir)
        except RunError as error:
            raise UserError(f"{error}, nor a commit of that name; expected {SUBJECT_HELP}") from None
        raise AssertionError(f"{word} is a run")


def parse_overrides(word: str) -> dict[str, str]:
    """The settings in "learning_rate=3e-3,dropout=0.1", by name.

    Raises:
        UserError: an unknown setting, or one that the comparison itself sets.
    """
    given: dict[str, str] = {}
    for part in NEXT_OVERRIDE.split(word.strip()):
        match = OVERRIDE.fullmatch(part)
        key = match.group(1).replace("-", "_") if match else part
        if match is None or key not in FIELDS:
            raise UserError(f"{part}: unknown setting {key}{nearest(key, FIELDS)}")
        if key in CHOSEN_HERE:
            raise UserError(f"{part}: seeds and names of the runs are chosen by the comparison")
        given[key] = match.group(2)
    return given


def _as_given(values: Mapping[str, Any]) -> dict[str, str | bool]:
    """Convert settings to the values that the loader takes from a command line."""
    return {
        key: value if isinstance(value, bool) else next(flags_of({key: value})).partition("=")[2]
        for key, value in values.items()
    }


def chosen_settings(base: Experiment) -> dict[str, Any]:
    """The settings that the command line of a run has set on top of configs/, and those that "auto" resolved to."""
    values = _plain(base.loaded.config)
    chosen = {
        key: values[key]
        for key in (*sorted(COMPARED_KEYS), "dataset")
        if not base.loaded.source(key).startswith(FROM_FILES)
    }
    if base.run is not None:
        chosen |= {key: value for key in PINNED_KEYS if (value := resolved_setting(base.run, key)) is not None}
        if "dataset" in chosen:
            chosen["dataset"] = moved_path(chosen["dataset"], Path.cwd())
    return chosen
