"""What runs in the sandbox can harm nobody, and cannot claim to have passed."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from blt_core.errors import DataError
from blt_core.evaluation import sandbox
from blt_core.evaluation.sandbox import Sandbox, make_sandbox
from tests.tasks.namespaces import needs_namespaces

SECONDS = 3.0

PASSING = {
    "nothing": "",
    "a test": "def f(x):\n    return x + 1\nassert f(1) == 2",
    "modules": "import decimal, hashlib, math, random, re, sqlite3\nassert math.pi > 3",
    "its own files": "open('/tmp/x', 'w').write('a')\nassert open('/tmp/x').read() == 'a'",
    "an empty folder": "import os\nassert os.listdir('/tmp') == os.listdir('.') == []",
    "output": "import sys\nprint('x' * 10**6)\nsys.stderr.write('y' * 10**6)",
    "an attempt on its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "threads": "import threading\nfor _ in range(5):\n    threading.Thread(target=print).start()",
    "shared memory": "import multiprocessing\nmultiprocessing.Lock()\nmultiprocessing.Value('i')",
    "its own tests": """
import doctest
def f(x):
    '''
    >>> f(1)
    2
    '''
    return x + 1
assert doctest.testmod().attempted == 1
""",
    "a process": "import subprocess\nassert subprocess.run(['true']).returncode == 0",
}
#: Programs that must not pass; {canary} is a file of the user, {port} a port that is listened on.
ATTACKS = {
    "a failing test": "assert 1 == 2",
    "no Python": "def f(:",
    "a name in an annotation": "def f(x: Nothing):\n    pass",
    "an early exit": "import os\nos._exit(0)",
    "a polite exit": "import sys\nsys.exit(0)",
    "a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "a fork bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "many processes": """
import os, time
for _ in range(20):
    if os.fork() == 0:
        time.sleep(60)
""",
    "many threads": """
import threading, time
for _ in range(50):
    threading.Thread(target=time.sleep, args=(60,)).start()
""",
    "no end": "while True:\n    pass",
    "a sleep": "import time\ntime.sleep(60)",
    "a detached child": """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
os._exit(0)
""",
    "endless output": "while True:\n    print('x' * 1000)",
    "an endless file": """
with open('/tmp/x', 'wb') as file:
    while True:
        file.write(b'x' * 10**6)
""",
    "many files": """
for n in range(100):
    open(f'/tmp/{{n}}', 'wb').write(b'x' * (1 << 23))
""",
    "much memory": "x = bytearray(4 << 30)",
    "deleting": "import os\nos.remove({canary!r})",
    "overwriting": "open({canary!r}, 'w').write('gone')",
    "deleting all": "import shutil\nshutil.rmtree('/')",
    "a new file": "import os\nopen(os.path.join(os.path.dirname({canary!r}), 'new'), 'w')",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "a name": "import socket\nsocket.getaddrinfo('pypi.org', 443)",
    "the environment": "import os\nassert os.environ['BLT_CANARY']",
    "the parent's environment": """
import os
assert b'BLT' in open(f'/proc/{{os.getppid()}}/environ', 'rb').read()
""",
    "the parent's memory": "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "other processes": "import os\nassert {pid!r} in os.listdir('/proc')",
    "another user": "import os\nos.setuid(12345)",
    "a terminal": "import os\nassert os.listdir('/dev/pts')",
    "files of others": "import os\nassert os.listdir('/var') or os.path.exists({canary!r})",
    "a user of its own": """
import ctypes, os
pid = os.fork()
if pid == 0:
    os._exit(0 if ctypes.CDLL(None).unshare(1 << 28) == 0 else 1)
assert os.waitpid(pid, 0)[1] == 0
""",
    "a flood of results": """
import os, threading
for n in range(3, 64):
    try:
        while True:
            os.write(n, b'x' * 100_000)
    except OSError:
        pass
os._exit(0)
""",
    "arguments of threads": """
import os, threading
for thread in threading.enumerate():
    for value in getattr(thread, '_args', ()):
        for n in range(3, 64):
            try:
                os.write(n, value)
            except (OSError, TypeError):
                pass
os._exit(0)
""",
    "a mount": "import ctypes\nassert ctypes.CDLL(None).umount2(b'/tmp', 2) == 0",
    "all descriptors": """
import os
for n in range(64):
    try:
        os.write(n, b'passed')
        os.write(n, b'.')
    except OSError:
        pass
os._exit(0)
""",
    "locks of the frames above": """
import os, sys, time
frame = sys._getframe()
while frame:
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        if hasattr(value, 'release'):
            value.release()
    frame = frame.f_back
time.sleep(0.5)
os._exit(0)
""",
    "locks of a traceback": """
import os, time
try:
    1 / 0
except ZeroDivisionError as error:
    frame = error.__traceback__.tb_frame
while frame:
    for value in [*frame.f_locals.values()]:
        if hasattr(value, 'release'):
            value.release()
    frame = frame.f_back
time.sleep(0.5)
os._exit(0)
""",
    "what lies about": """
import gc, os, sys
found, frame = [], sys._getframe()
while frame:
    found += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
found += sys.argv + [*os.environ.values()]
texts = {{x if isinstance(x, bytes) else x.encode() for x in found if isinstance(x, (str, bytes))}}
for text in texts:
    for n in range(64):
        try:
            os.write(n, text)
        except OSError:
            pass
os._exit(0)
""",
}


#: A program goes on with this, in which `found` may be anything: it opens all locks, and exits.
OPEN_LOCKS = """
for value in found:
    if type(value).__name__ == 'lock':
        try:
            value.release()
        except RuntimeError:
            pass
import os, time
time.sleep(2)
os._exit(0)
"""
#: What is refused in the sandbox, and would give the locks otherwise.
LOOKS = {
    "frames of other threads": """
import sys, time
while len(sys._current_frames()) < 2:
    time.sleep(0.01)
found = []
for frame in sys._current_frames().values():
    found += frame.f_locals.values()
""",
    "all objects": """
import gc
found = [x for each in gc.get_objects() for x in gc.get_referents(each)]
""",
    "who refers to a class": """
import gc, functools
found = [getattr(getattr(each, 'func', None), '__self__', None)
         for each in gc.get_referrers(functools.partial)]
""",
    "another interpreter": '''
found = []
try:
    import _xxsubinterpreters as other
except ImportError:
    import _interpreters as other
other.run_string(other.create(), """
import sys, time
while len(sys._current_frames()) < 2:
    time.sleep(0.01)
for frame in sys._current_frames().values():
    for value in [*frame.f_locals.values()]:
        if hasattr(value, "release"):
            value.release()
""")
''',
}
#: On the way to a list or a function that refuses, if one were in reach.
DISARMING = """
import sys
frames, frame = [], sys._getframe()
while frame:
    frames.append(frame)
    frame = frame.f_back
for value in [x for each in frames for names in (each.f_locals, each.f_globals)
              for x in list(names.values())]:
    if isinstance(value, set):
        value.clear()
    if getattr(getattr(value, '__code__', None), 'co_argcount', 0) == 2:
        value.__code__ = (lambda event, arguments: None).__code__
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.setenv("BLT_CANARY", "BLT")
    path = tmp_path / "canary"
    path.write_text("alive")
    # Whoever the program runs as, only the sandbox stands between it and this file.
    path.chmod(0o666)
    yield path
    assert path.read_text() == "alive"
    assert [each.name for each in path.parent.iterdir()] == ["canary"]
    assert os.environ["BLT_CANARY"] == "BLT"


@pytest.fixture
def jail(tmp_path_factory, monkeypatch) -> Path:
    """A jail of this test alone, for others may run theirs at the same time."""
    own = tmp_path_factory.mktemp("jail") / "jail.py"
    own.write_bytes(Path(sandbox._JAIL).read_bytes())
    monkeypatch.setattr(sandbox, "_JAIL", own)
    return own


def processes_of(jail: Path) -> list[str]:
    """The processes that run a jail, or were forked there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if bytes(jail) in line:
                found.append(entry.name)
    return found


@needs_namespaces
@pytest.mark.parametrize("name", PASSING)
def test_a_program_that_comes_to_its_end_passes(name):
    assert Sandbox(seconds=20).passes(PASSING[name])


@needs_namespaces
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails_and_leaves_nothing(name, canary, jail):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = ATTACKS[name].format(canary=str(canary), port=port, pid=str(os.getpid()))
        began = time.monotonic()
        assert not Sandbox(seconds=SECONDS).passes(program)
        assert time.monotonic() - began < SECONDS + 2
        while processes_of(jail) and time.monotonic() - began < SECONDS + 2:
            time.sleep(0.05)
        assert not processes_of(jail)


@needs_namespaces
@pytest.mark.parametrize("name", LOOKS)
def test_what_looks_for_what_vouches_is_refused_and_would_find_it(name, canary, jail, monkeypatch):
    program = LOOKS[name] + OPEN_LOCKS
    began = time.monotonic()
    assert not Sandbox(seconds=SECONDS).passes(program)
    assert not Sandbox(seconds=SECONDS).passes(DISARMING + program)
    assert time.monotonic() - began < 2 * (SECONDS + 2)
    assert not processes_of(jail)
    assert canary.read_text() == "alive"
    source = Path(sandbox._JAIL).read_text()
    assert source.count("        hide()\n") == 1
    bare = jail.with_name("bare.py")
    bare.write_text(source.replace("        hide()\n", ""))
    monkeypatch.setattr(sandbox, "_JAIL", bare)
    assert Sandbox(seconds=20).passes(program)


@needs_namespaces
def test_without_a_sandbox_the_attacks_would_work(canary):
    """The attacks are none that would fail anywhere."""
    unsafe = Sandbox(seconds=SECONDS, isolated=False)
    assert unsafe.passes(f"assert open({str(canary)!r}).read() == 'alive'")
    assert unsafe.passes(f"import os\nassert {str(os.getpid())!r} in os.listdir('/proc')")
    assert unsafe.passes(f"open({str(canary)!r}, 'a').write('')")
    assert not unsafe.passes("import os\nos._exit(0)")


def test_nothing_runs_unless_it_is_allowed(monkeypatch):
    with pytest.raises(DataError, match=r"\n  fix: add --allow-code-execution"):
        make_sandbox(allowed=False, unsafe=False, seconds=1)
    with pytest.raises(DataError, match=r"\n  fix: add --allow-code-execution"):
        make_sandbox(allowed=False, unsafe=True, seconds=1)
    reasons = {True: "new namespaces: Operation not permitted", False: ""}
    monkeypatch.setattr(sandbox, "why_not", lambda isolated=True: reasons[isolated])
    with pytest.raises(DataError, match=r"(?s)new namespaces: Operation .*--unsafe-no-sandbox"):
        make_sandbox(allowed=True, unsafe=False, seconds=1)
    assert not make_sandbox(allowed=True, unsafe=True, seconds=1).isolated
