"""Splitting a patch into its files, whatever their names and lines look like."""

from __future__ import annotations

from utils.runs.patch import added_lines, file_of, parts_of_patch, patched_files

PLAIN = b"""diff --git a/new b/x.py b/new b/x.py
index 0123456..789abcd 100644
--- a/new b/x.py
+++ b/new b/x.py
@@ -1,2 +1,2 @@
 kept
-old
+diff --git a/x b/x
"""
QUOTED = rb"""diff --git "a/\303\274.py" "b/\303\274.py"
new file mode 100644
--- /dev/null
+++ "b/\303\274.py"
@@ -0,0 +1 @@
+u
\ No newline at end of file
"""


def test_a_patch_is_split_before_each_file_and_nowhere_else() -> None:
    assert parts_of_patch(PLAIN + QUOTED) == [PLAIN, QUOTED]
    assert parts_of_patch(b"") == []


def test_file_names_with_spaces_and_escaped_bytes_are_decoded() -> None:
    assert [file_of(part) for part in (PLAIN, QUOTED)] == ["new b/x.py", "ü.py"]


def test_the_lines_of_a_file_exclude_its_header() -> None:
    lines = {"new b/x.py": [" kept", "-old", "+diff --git a/x b/x"], "ü.py": ["+u"]}
    assert patched_files(PLAIN + QUOTED) == lines
    assert added_lines(PLAIN) == b"diff --git a/x b/x"
