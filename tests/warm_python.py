"""A `python` for tests that forks scripts from a process in which torch and other slow modules are already imported.

A training of one second spends four in imports. The client, `WarmPython.path`, stands in for the interpreter on a
command line. A server forks a process that has the client's open descriptors, directory, environment, umask and
arguments, and runs the script in it. The client passes its signals on, and ends as the script does: with its exit
status, or by its signal. The server has imported no module of the project, so it serves any copy of the project. The
processes that a script starts use the real interpreter; with WARM_CHILDREN in its environment, they are forked as well.

Pictures are plotted but not rendered, which would take a third of a tiny training; a new database of Aim is a copy.

If a fork would behave differently (another user, a variable that is read when Python or a library starts, a closed
standard stream, an option of the interpreter), the client becomes the real interpreter. Tests of what a fork cannot
show use sys.executable: start and imports, the id, group and terminal of the process, and its death when the client is
killed, which follows a moment later.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

# Prefixes of environment variables that are read when the interpreter starts or a library is imported, apart from those
# `ignored` below, which training sets itself.
EARLY = (
    "PYTHON",
    "OMP_",
    "MKL_",
    "GOMP_",
    "KMP_",
    "MALLOC_",
    "LD_",
    "MPL",
    "TORCH",
    "TRITON",
    "LC_",
    "LANG",
    "TZ",
    "HOME",
)
PIXEL = base64.b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)
NEW_DATABASE = """
place="${{AIM_RUN_META_DATA_DB_URL#sqlite:///}}"
upgrade() {{ AIM_RUN_META_DATA_DB_URL="sqlite:///$1" '{python}' -m alembic -c "$config" upgrade head; }}
config="$2"
if [ -s "$place" ]; then upgrade "$place"; exit; fi
if [ ! -e '{first}' ]; then upgrade '{first}'.$$ && mv '{first}'.$$ '{first}'; fi
cp '{first}' "$place"
"""
NUMBER = struct.Struct("=q")  # a length, a process id or a wait status
PRELOADED = (  # not torch._dynamo: its triton reports leaks at the end of each process, used or not
    "PIL.PngImagePlugin",
    "aim",
    "git",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numpy",
    "pydantic",
    "rich.console",
    "rich.progress",
    "rich.table",
    "safetensors.numpy",
    "tensorboard.summary.writer.event_file_writer",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.profiler",
    "torch.utils.tensorboard",
    "tokenizers",
    "yaml",
)


def early(environment: Any) -> dict[str, str]:
    """The variables that a forked process cannot adopt after its start, and its user."""
    ignored = (
        "PYTEST",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
        "PYTHONIOENCODING",
        "GOMP_SPINCOUNT",
        "TORCHINDUCTOR_CACHE_DIR",
    )
    ignored += ("TORCHELASTIC_", "TORCH_NCCL_")  # torchrun sets them for its ranks
    found = {name: environment[name] for name in sorted(environment) if name.startswith(EARLY)}
    return {name: value for name, value in found.items() if not name.startswith(ignored)} | {"user": str(os.getuid())}


# ----------------------------------------------------------------------------------------------------------- the client


def client(address: str, python: str, server_early: dict[str, str]) -> None:
    """Run the command line of this process on the server or, failing that, by the real interpreter; does not return."""
    words = sys.argv[1:]
    fds = [int(name) for name in os.listdir("/proc/self/fd") if is_open(int(name))]
    unbuffered = words[:1] == ["-u"]  # as torchrun starts its ranks
    script = words[unbuffered:]
    runs = script and (script[0].endswith(".py") or (script[0] in ("-c", "-m") and len(script) > 1))
    if not (runs and {0, 1, 2} <= set(fds) and early(os.environ) == server_early):
        os.execv(python, [python, *words])
    task = {
        "words": script,
        "unbuffered": unbuffered,
        "python": os.path.abspath(sys.argv[0]),
        "pid": os.getpid(),
        "fds": fds,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": os.umask(0),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        text = json.dumps(task).encode()
        socket.send_fds(connection, [NUMBER.pack(len(text))], fds)
        connection.sendall(text)
        pid = receive(connection)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, lambda number, _: os.kill(pid, number))
        status = receive(connection)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def is_open(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def receive(connection: socket.socket) -> int:
    return int(NUMBER.unpack(read(connection, NUMBER.size))[0])


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (piece := connection.recv(size - len(data))):
            raise EOFError("the server of warm_python.py has ended")
        data += piece
    return data


# ----------------------------------------------------------------------------------------------------------- the server


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each client; returns the client's task in the new process. The server exits when stdin is closed."""
    import contextlib
    import selectors

    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, None)
    waiting.register(0, selectors.EVENT_READ, None)
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                task = receive_task(connection)
                if (pid := os.fork()) == 0:
                    waiting.close()
                    listener.close()
                    connection.close()
                    return task
                for fd in task["received"]:
                    os.close(fd)
                connection.sendall(NUMBER.pack(pid))
                child = os.pidfd_open(pid)
                waiting.register(child, selectors.EVENT_READ, (pid, child, connection))
                waiting.register(connection, selectors.EVENT_READ, (pid, child, connection))
            elif key.fd not in waiting.get_map():  # the client and its process were both ready
                continue
            else:
                pid, child, connection = key.data
                if key.fd != child:
                    os.kill(pid, signal.SIGKILL)  # as the client was
                _, status = os.waitpid(pid, 0)
                waiting.unregister(child)
                waiting.unregister(connection)
                os.close(child)
                with contextlib.suppress(OSError):
                    connection.sendall(NUMBER.pack(status))
                connection.close()


def receive_task(connection: socket.socket) -> dict[str, Any]:
    header, received, _, _ = socket.recv_fds(connection, NUMBER.size, 64)
    task: dict[str, Any] = json.loads(read(connection, NUMBER.unpack(header)[0]))
    return task | {"received": received}


def become(task: dict[str, Any]) -> None:
    """Run the script of a task as this process."""
    import io
    import runpy
    import types

    beyond = max(*task["fds"], *task["received"]) + 1  # move them past all of these first: the numbers may overlap
    moved = [os.dup2(fd, beyond + i) for i, fd in enumerate(task["received"])]
    for fd, number in zip(moved, task["fds"], strict=True):
        os.dup2(fd, number)
    for fd in {*task["received"], *moved} - set(task["fds"]):
        os.close(fd)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.umask(task["umask"])
    os.chdir(task["folder"])
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if task["unbuffered"]:
        raw = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    if os.environ.get("WARM_CHILDREN"):
        sys.executable = task["python"]
        if os.environ.get("WARM_CHILD"):
            take_id(task["pid"])
        os.environ["WARM_CHILD"] = "1"
    program, *words = task["words"]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if program in ("-c", "-m"):
        code, sys.argv = words[0], [program, *words[1:]]
        sys.path[:1] = ["" if program == "-c" else os.getcwd(), *folders]
        if program == "-m":
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = [program, *words]
        sys.path[:1] = [str(Path(program).resolve().parent), *folders]
        runpy.run_path(program, run_name="__main__")


def take_id(client: int) -> None:
    """Report the client's process id as our own: it is the one that the parent of the client knows."""
    own, getpid, kill = os.getpid(), os.getpid, os.kill
    os.getpid = lambda: client
    os.kill = lambda pid, number: kill(own if pid == client else pid, number)
    os.register_at_fork(after_in_child=lambda: os.__dict__.update(getpid=getpid, kill=kill))


def draw_pixels() -> None:
    """Make every PNG that matplotlib renders a single pixel."""
    from matplotlib.figure import Figure

    render = Figure.savefig

    def savefig(self: Figure, file: Any, *, format: str | None = None, **options: Any) -> None:
        if format == "png":
            file.write(PIXEL)
        else:
            render(self, file, format=format, **options)

    Figure.savefig = savefig  # type: ignore[method-assign]


@functools.cache
def copy_databases(folder: Path) -> None:
    """Make Aim's new databases copies of the first one: alembic takes two seconds to create one."""
    from aim.storage.migrations import utils

    real, script = utils.create_migration_cmd, folder / "new_database.sh"
    script.write_text(NEW_DATABASE.format(python=sys.executable, first=folder / "first.sqlite"))

    def create_migration_cmd() -> list[str]:
        command = real()
        return ["sh", str(script), "-c", command[command.index("-c") + 1]]

    utils.create_migration_cmd = create_migration_cmd


def preload(folder: Path) -> None:
    import contextlib
    import gc
    import importlib

    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        draw_pixels()
        copy_databases(folder)
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------------------------- for the tests


class WarmPython:
    """The server, and a folder `bin` that stands in for that of the virtual environment; close() ends the server."""

    def __init__(self, folder: Path) -> None:
        import subprocess

        self._server: subprocess.Popen[bytes] | None = None
        if not hasattr(os, "pidfd_open"):  # not on Linux
            self.path, self.bin = Path(sys.executable), Path(sys.executable).parent
            return
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        python, here, address = sys.executable, Path(__file__).resolve(), str(folder / "socket")
        for entry in Path(python).parent.iterdir():
            if not entry.name.startswith("python"):
                (self.bin / entry.name).symlink_to(entry)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = f"{address!r}, {python!r}, {early(environment)!r}"
        self.path = self.bin / "python"
        self.path.write_text(
            f"#!{python} -IS\nimport sys\nsys.path.insert(0, {str(here.parent)!r})\n"
            f"from {here.stem} import client\nclient({words})\n"
        )
        self.path.chmod(0o755)
        (self.bin / "python3").symlink_to("python")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._server = subprocess.Popen(
                [python, str(here), str(listener.fileno()), str(folder)],
                stdin=subprocess.PIPE,
                env=environment,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preload(Path(sys.argv[2]))
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
