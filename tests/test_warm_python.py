"""The warm interpreter ends, prints and is stopped like the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from warm_python import WarmPython

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")
SCRIPT = """
import os, signal, sys
print(sys.argv[1:], os.getcwd(), os.environ["WORD"], sys.stdin.read(), "torch" in sys.modules, __name__)
print("later", file=sys.stderr)
os.write(int(sys.argv[1]), b"beyond")
sys.exit(3)
"""


def test_a_script_gets_its_arguments_folder_environment_and_descriptors(
    warm_python: WarmPython, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    reader, writer = os.pipe()
    done = subprocess.run(
        [warm_python.path, "script.py", str(writer)],
        cwd=tmp_path,
        env={**os.environ, "WORD": "ü"},
        input="typed",
        capture_output=True,
        text=True,
        pass_fds=[writer],
    )
    os.close(writer)
    with os.fdopen(reader) as beyond:
        assert beyond.read() == "beyond"
    assert done.stdout == f"{[str(writer)]} {tmp_path} ü typed True __main__\n"
    assert (done.returncode, done.stderr) == (3, "later\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_script_and_its_parent(signum: signal.Signals, warm_python: WarmPython) -> None:
    code = f"import os; os.kill(os.getpid(), {int(signum)})"
    assert subprocess.run([warm_python.path, "-c", code]).returncode == -signum
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([warm_python.path, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert pid != process.pid
        process.send_signal(signum)
        assert process.wait(timeout=60) == -signum
        assert process.stdout.read() == b""  # the script, the last holder of the pipe, has ended too


def test_the_real_interpreter_runs_if_a_fork_would_differ(warm_python: WarmPython) -> None:
    code = "import sys; print('torch' in sys.modules, sys.stdout.encoding)"
    env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([warm_python.path, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False ascii\n"


CHILD = """
import os, signal, sys
own = os.getpid()
if (forked := os.fork()) == 0:
    os._exit(os.getpid() == own)
print("torch" in sys.modules, own, os.waitpid(forked, 0)[1] == 0, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
print("later")
"""
PARENT = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-u", "child.py"], stdout=subprocess.PIPE, text=True)
printed, _ = process.communicate()
print(printed == f"{sys.argv[1]} {process.pid} True\\n", process.returncode)
"""


@pytest.mark.parametrize("warm", [True, False])
def test_processes_of_a_script_are_forked_on_request(warm: bool, warm_python: WarmPython, tmp_path: Path) -> None:
    """A forked child has the process id by which its parent knows it, and ends that process when it kills itself."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "WARM_CHILDREN": "1" if warm else ""}
    command = [warm_python.path, "parent.py", str(warm)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"True -{int(signal.SIGKILL)}\n"
