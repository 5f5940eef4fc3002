"""The program lm-workbench: `lm-workbench train --run-tag a` is `python train.py --run-tag a`, from any folder."""

from __future__ import annotations

import difflib
import os
import sys

from lm_workbench import CODE

NAMES = ("train", "inference", "evaluate", "experiments", "prepare", "profile", "weights", "sweep", "serve")
SCRIPTS = {name: CODE / f"{'profile_model' if name == 'profile' else name}.py" for name in NAMES}
USAGE = f"usage: lm-workbench {'|'.join(name for name in NAMES if SCRIPTS[name].is_file())} [ARGUMENT ...]"


def main() -> int:
    """Replace this process by the script that the first argument names; return 2 for a mistake."""
    if "_ARGCOMPLETE" in os.environ:
        return complete()
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{USAGE}\nlm-workbench COMMAND --help lists the flags of a command.")
        return 0
    if name not in SCRIPTS or not SCRIPTS[name].is_file():
        near = difflib.get_close_matches(name, NAMES, n=1)
        print(
            f"error: unknown command {name!r}{f'; did you mean {near[0]}?' if near else ''} ({USAGE})", file=sys.stderr
        )
        return 2
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(SCRIPTS[name]), *words])


def complete() -> int:
    """Answer a completion request of argcomplete: complete the name of a command; its script completes the rest."""
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = line.split()[1:]
    if words and words[0] in SCRIPTS and (len(words) > 1 or line[-1].isspace()):
        os.environ["_ARGCOMPLETE"] = "2"  # number of words that stand for the program
        os.execv(sys.executable, [sys.executable, str(SCRIPTS[words[0]])])
    fitting = [name for name in NAMES if name.startswith(words[-1] if words else "") and SCRIPTS[name].is_file()]
    os.write(8, os.environ.get("_ARGCOMPLETE_IFS", "\013").join(fitting).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
