"""Registered corpora, text files and folders; each fault in one is an error that names the file."""

from __future__ import annotations

import hashlib
import http.server
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from data import load_corpus
from utils.config.settings import DataConfig
from utils.corpora import source_files, sources
from utils.corpora.sources import CorpusError, find_source
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"

# ---------------------------------------------------------------------------- reading


def test_pydocs_is_the_language_reference_of_this_python(tmp_path: Path) -> None:
    text = find_source("pydocs", tmp_path).read()
    assert 300_000 < len(text) < 1_000_000
    assert topics["lambda"] in text
    assert text == find_source("pydocs", tmp_path).read()


def test_a_file_is_read_unchanged_but_for_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffZeile\r\nübergroß 😀".encode())
    assert find_source(str(path), tmp_path).read() == "Zeile\r\nübergroß 😀"  # without the byte order mark


def test_the_notes_on_a_folder_describe_what_is_read_skipped_and_split(tmp_path: Path) -> None:
    names = ["a.py", "b.py", "c/d.md", "e.js", "f.c", "g.C", "h.rs", "i.bin", "y.html", ".hidden.c", "z"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * 99)
    source = find_source(str(tmp_path), tmp_path)
    read, cut, other = source.notes(0.3)
    assert read == (
        f"{tmp_path}: 5 files read (2 .py, 1 .md, 1 .html, 1 without a suffix), "
        "5 files of other kinds skipped (2 .c, 1 .js, 1 .rs, 1 .bin)"
    )
    assert cut == (
        "the validation split is the last 30% of this text, whose files are sorted by path; it begins near y.html "
        "(1 .html, 1 without a suffix)"
    )
    assert other == "only the validation split has files without a suffix: val/loss is about another kind of text"
    assert list(find_source(str(tmp_path / "a.py"), tmp_path).notes(0.3)) == []
    assert list(find_source("pydocs", tmp_path).notes(0.3)) == []


def test_json_lines_that_are_learned_as_a_text_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"text": "a"}\n')
    (note,) = find_source(str(path), tmp_path).notes(0.1)
    assert note == (
        f"{path}: learned as a text, with its braces and names of fields: python prepare.py {path} --out NAME makes a "
        "dataset of the documents in it"
    )


def test_the_files_that_a_folder_skips_are_reported(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("to be or not to be\n" * 20)
    (tmp_path / "texts" / "two.go").write_text("package main")
    said: list[str] = []
    for _ in range(2):  # the second time the corpus is encoded already
        load_corpus(DataConfig(dataset=str(tmp_path / "texts")), 8, tmp_path, report=said.append)
    assert said[:2] == said[2:]
    assert "1 file read (1 .txt), 1 file of other kinds skipped (1 .go)" in said[0]


def test_a_folder_is_its_text_files_in_path_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name in ("b.txt", "a/z.md", "a/b.py", "c", ".git/config.txt", "a/.cache/deep/x.py", "a/.env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"[{name}]")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden.txt").write_text("hidden")
    assert find_source(str(folder), tmp_path).read() == "[a/b.py]\n[a/z.md]\n[b.txt]\n[c]"


def test_linked_folders_are_read_once_even_if_links_form_a_cycle(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for name in ("texts/b.txt", "texts/z/old.txt", "elsewhere/book.txt", "elsewhere/.git/config.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"[{name}]")
    (folder / "a").symlink_to(elsewhere)
    (folder / "current").symlink_to(folder / "z")
    (elsewhere / "back").symlink_to(folder)
    assert find_source(str(folder), tmp_path).read() == "[elsewhere/book.txt]\n[texts/b.txt]\n[texts/z/old.txt]"


@pytest.mark.parametrize("files", [[], ["picture.png"], [".hidden.txt"]])
def test_a_folder_without_text_files_is_an_error(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("x")
    with pytest.raises(CorpusError, match="texts: no text files"):
        find_source(str(folder), tmp_path).read()


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
def test_an_empty_corpus_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"empty\.txt: the corpus is empty"):
        find_source(str(path), tmp_path).read()


def test_a_binary_file_is_an_error_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"\x7fELF\x02\0\0")
    with pytest.raises(CorpusError, match=r"program: a binary file \(NUL at byte 5\)"):
        find_source(str(path), tmp_path).read()


def test_a_file_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"one\ntwo\nna\xefve\n")
    with pytest.raises(CorpusError, match=r"latin1\.txt:3: not UTF-8 text \(byte 10 is 0xef\)"):
        find_source(str(path), tmp_path).read()


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    (folder / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(CorpusError, match=r"bad\.txt:1: not UTF-8"):
        find_source(str(folder), tmp_path).read()


@pytest.mark.parametrize(
    ("dataset", "hint"),
    [
        ("shakespere", "did you mean shakespeare?"),
        ("pydoc", "did you mean pydocs?"),
        ("no/such/file.txt", "no such file or folder; expected pydocs, shakespeare, arithmetic, another dataset made"),
        ("x" * 300, "no such file or folder; expected pydocs, "),  # longer than a file name may be
        ("~no-such-user-here/text.txt", "no-such-user-here"),
        ("arithmetic", "training generates its problems"),
    ],
)
def test_an_unknown_dataset_is_an_error_that_lists_the_datasets(dataset: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        find_source(dataset, tmp_path).read()
    assert dataset in str(caught.value)
    assert hint in str(caught.value)
    assert isinstance(caught.value, UserError)


READ_WITHOUT_RIGHTS = """
import encodings.utf_8_sig, os, sys
from pathlib import Path
from data import load_corpus
from utils.config.settings import DataConfig
from utils.corpora import sources
if os.geteuid() == 0:  # root may read everything: become nobody
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for dataset in sys.argv[1:]:
    try:
        print(repr(sources.find_source(dataset, Path("corpora")).read()))
    except sources.CorpusError as error:
        print(error)
    except Exception as error:
        print("not a CorpusError:", repr(error))
"""


@pytest.fixture(scope="module")
def answers_without_rights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The results of reading readable and unreadable places, in a process that is not root."""
    folder = tmp_path_factory.mktemp("rights")
    folder.chmod(0o755)
    for name in ("readable.txt", "unreadable.txt", "closed/inside.txt", "open/unreadable/inside.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    (folder / "open" / "readable.txt").write_text("text")
    for name in ("unreadable.txt", "closed", "open/unreadable"):
        (folder / name).chmod(0)
    places = ["readable.txt", "unreadable.txt", "closed/inside.txt", "closed", "open"]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{READ_WITHOUT_RIGHTS}", *places]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    for name in ("unreadable.txt", "closed", "open/unreadable"):
        (folder / name).chmod(0o755)
    assert done.returncode == 0, done.stderr
    return dict(zip(places, done.stdout.splitlines(), strict=True))


def test_readable_text_is_read_without_rights(answers_without_rights: dict[str, str]) -> None:
    assert answers_without_rights["readable.txt"] == "'text'"


@pytest.mark.parametrize("place", ["unreadable.txt", "closed/inside.txt", "closed", "open"])
def test_an_unreadable_place_is_an_error(answers_without_rights: dict[str, str], place: str) -> None:
    answer = answers_without_rights[place]
    assert answer.startswith(place)
    assert answer.endswith("cannot be read: Permission denied")


# ------------------------------------------------------------------------ shakespeare


@pytest.fixture
def small_play(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make PLAY pass for Tiny Shakespeare."""
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)


@pytest.mark.usefixtures("small_play", "no_download")
def test_shakespeare_comes_from_the_folder_in_workbench_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(PLAY)
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    assert find_source("shakespeare", tmp_path / "corpora").read() == PLAY.decode()
    assert not (tmp_path / "corpora").exists()


@pytest.mark.usefixtures("small_play", "no_download")
def test_shakespeare_comes_from_the_corpora_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(PLAY)
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "nowhere"))
    assert find_source("shakespeare", tmp_path).read() == PLAY.decode()


@pytest.mark.usefixtures("no_download")
def test_shakespeare_with_another_sha256_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(PLAY)
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"tinyshakespeare\.txt: not Tiny Shakespeare: sha256 .* not 86c4e6aa9db7"):
        find_source("shakespeare", tmp_path / "corpora").read()


class _Answer(http.server.BaseHTTPRequestHandler):
    """Answers with the status, body and announced length of its server."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, LocalServer)
        server.requests += 1
        self.send_response(server.status)
        self.send_header("Content-Length", str(len(server.body) + server.missing))
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *_args: object) -> None:
        pass


class LocalServer(http.server.HTTPServer):
    status, body, missing, requests = 200, PLAY, 0, 0


@pytest.fixture
def public_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """A local server in place of the public address of Tiny Shakespeare."""
    server = LocalServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("small_play")
def test_shakespeare_is_downloaded_once(public_server: LocalServer, tmp_path: Path) -> None:
    corpora = tmp_path / "new" / "corpora"
    assert [find_source("shakespeare", corpora).read() for _ in range(3)] == [PLAY.decode()] * 3
    assert public_server.requests == 1
    assert [path.name for path in corpora.iterdir()] == ["tinyshakespeare.txt"]


def test_a_download_with_other_content_is_an_error_and_not_kept(public_server: LocalServer, tmp_path: Path) -> None:
    public_server.body = b"<html>Please log in</html>"
    with pytest.raises(CorpusError, match=r"127\.0\.0\.1.*not Tiny Shakespeare"):
        find_source("shakespeare", tmp_path).read()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_play")
@pytest.mark.parametrize(("status", "missing"), [(404, 0), (500, 0), (200, 10)])
def test_a_failed_download_says_what_to_do(
    public_server: LocalServer, status: int, missing: int, tmp_path: Path
) -> None:
    public_server.status, public_server.missing = status, missing
    with pytest.raises(CorpusError, match=r"cannot be downloaded .*put tinyshakespeare\.txt into .*WORKBENCH_DATA"):
        find_source("shakespeare", tmp_path).read()
    assert list(tmp_path.iterdir()) == []


def test_without_a_connection_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", "http://127.0.0.1:1/input.txt")  # nothing listens there
    with pytest.raises(CorpusError, match=r"cannot be downloaded \(.*refused.*\); put tinyshakespeare\.txt into"):
        find_source("shakespeare", tmp_path).read()


@pytest.mark.usefixtures("small_play", "public_server")
def test_a_download_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpora").write_text("a file where the folder should be")
    with pytest.raises(CorpusError, match="corpora"):
        find_source("shakespeare", tmp_path / "corpora").read()


def test_the_folder_of_datasets_is_not_the_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, `import datasets` finds the folder datasets/ beside the scripts, which has no functions."""
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    with pytest.raises(CorpusError, match="pip install datasets"):
        source_files._downloaded("someone/texts", "someone/texts", None)


def test_a_memory_error_is_not_reported_as_a_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_words: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(MemoryError):
        source_files._downloaded("org/name", "org/name", None)
