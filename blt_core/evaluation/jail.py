"""Runs a Python program where it can do no harm. A program of its own: nothing of blt-core is here.

    python -I -S jail.py < REQUEST        REQUEST: a JSON object {program, nonce, memory, processes,
                                          file_bytes, seconds, isolated}

Writes the nonce to stdout if the program ran to its end, and nothing otherwise. Exit status 3: the
system gives no namespaces; stderr says which step failed.

isolated: first, as a user without rights, new user, mount, process, network and IPC namespaces. Of
the files only the system's programs and the interpreter's are there, read-only; /tmp is new and
small, /dev has what gives or takes bytes, /proc shows these processes alone. There is no network,
and when the first process ends, the kernel ends all others. The user is never root, which is exempt
from bounds on processes; the bound counts those of the namespace (Linux 5.14 or later), threads and
the three of this program included.

The nonce is in the frame of a thread that waits for the program's end: a program that exits early,
or writes whatever it likes to whatever is open, does not give it. What opens the gate for that
thread is in no frame below which the program runs, and what looks into other threads, or through
all objects, is refused. A program that is written against this very file could still read the
memory of its own process, by addresses.
"""

from __future__ import annotations

import _thread
import collections
import ctypes
import json
import os
import resource
import signal
import sys
from functools import partial
from typing import Any

NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30)
BIND, RECURSIVE, PRIVATE = 1 << 12, 1 << 14, 1 << 18
NO_SUID, NO_DEV, NO_EXEC, READ_ONLY = 2, 4, 8, 1
DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
DEATH_SIGNAL, DUMPABLE, NO_NEW_PRIVILEGES, DROP_BOUNDING = 1, 4, 38, 24
NOBODY = 65534
REFUSED = 3
#: What is at the top of a system that programs need; all other folders there are hidden.
SYSTEM = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "nix", "gnu"}
#: Folders that are replaced.
REPLACED = {"tmp", "proc", "dev"}
#: Devices that give or take bytes and nothing else.
DEVICES = ("null", "zero", "full", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):  # noqa: N818 -- says what happened
    """The system does not give what isolation needs."""


def call(what: str, name: str, *arguments: object) -> None:
    """A function of libc that returns 0; Refused with its error otherwise."""
    encoded = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*encoded) != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(
    source: str, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    """Mount; Refused if it fails."""
    call(f"mounting {target}", "mount", source, target, kind, ctypes.c_ulong(flags), options)


def enter_namespaces(*, root: bool) -> None:
    """New mount, process, network and IPC namespaces, by root itself or in a new user namespace."""
    kinds = NEW_NS | NEW_PID | NEW_NET | NEW_IPC
    if root:
        call("new namespaces", "unshare", ctypes.c_int(kinds))
    else:
        enter_user_namespace(kinds)


def enter_user_namespace(others: int = 0) -> None:
    """A new user namespace, in which the user is called root, and which has bounds of its own."""
    user, group = os.geteuid(), os.getegid()
    call("a new user namespace", "unshare", ctypes.c_int(NEW_USER | others))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def become_nobody() -> None:
    """Root is exempt from bounds on processes, so it becomes a user without rights."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # What belongs to root alone, such as /proc/self of a process that was root, is ours again.
    call("becoming a plain user", "prctl", DUMPABLE, 1, 0, 0, 0)
    enter_user_namespace()


def change_root(bytes_of_tmp: int) -> None:
    """A read-only view of what programs need, with /tmp, /dev and /proc of its own."""
    mount("none", "/", None, RECURSIVE | PRIVATE)
    python, new, kept = os.path.realpath(sys.base_prefix), "/tmp/jail", "/tmp/python"
    small = f"size={bytes_of_tmp},mode=1777"
    here = os.open(python, os.O_PATH | os.O_DIRECTORY)  # it may lie below /tmp
    mount("tmpfs", "/tmp", "tmpfs", NO_SUID | NO_DEV, small)
    os.mkdir(new)
    os.mkdir(kept)
    mount(f"/proc/self/fd/{here}", kept, None, BIND | RECURSIVE)
    os.close(here)
    mount("/", new, None, BIND | RECURSIVE)
    set_read_only(new, AT_RECURSIVE)
    mount("tmpfs", f"{new}/tmp", "tmpfs", NO_SUID | NO_DEV, small)
    for name in os.listdir(new):
        path = f"{new}/{name}"
        if name in SYSTEM | REPLACED or os.path.islink(path) or not os.path.isdir(path):
            continue
        mount("tmpfs", path, "tmpfs", NO_SUID | NO_DEV, "size=64k,mode=0755")
        if lies_below(python, f"/{name}"):
            expose(kept, new + python)
        set_read_only(path)
    if lies_below(python, "/tmp"):
        expose(kept, new + python)
    make_devices(f"{new}/dev", small)
    mount("proc", f"{new}/proc", "proc", NO_SUID | NO_DEV | NO_EXEC)
    os.chdir(new)
    if PIVOT_ROOT is None or libc.syscall(PIVOT_ROOT, b".", b".") != 0:
        raise Refused("changing the root folder failed")
    call("leaving the old root", "umount2", ".", DETACH)
    os.chdir("/tmp")


def make_devices(folder: str, small: str) -> None:
    """A /dev with a few devices, and shared memory."""
    mount("tmpfs", folder, "tmpfs", NO_SUID, "size=64k,mode=0755")
    for name in DEVICES:
        os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY))
        mount(f"/dev/{name}", f"{folder}/{name}", None, BIND)
    os.mkdir(f"{folder}/shm")
    mount("tmpfs", f"{folder}/shm", "tmpfs", NO_SUID | NO_DEV, small)
    set_read_only(folder, kinds=READ_ONLY | NO_SUID)


def set_read_only(path: str, flags: int = 0, kinds: int = READ_ONLY | NO_SUID | NO_DEV) -> None:
    """Nothing can be written below a mount, nor, with AT_RECURSIVE, below those in it."""
    attributes = (ctypes.c_uint64 * 4)(kinds, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size) != 0:
        raise Refused(f"read-only files: {os.strerror(ctypes.get_errno())}")


def expose(kept: str, path: str) -> None:
    """The interpreter's own files, where its folder was hidden."""
    os.umask(0o022)
    os.makedirs(path)
    mount(kept, path, None, BIND | RECURSIVE)
    set_read_only(path, AT_RECURSIVE)


def lies_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    folder = os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def drop_rights() -> None:
    """No capability is left, and none can be had again, nor in a namespace below this one."""
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    for number in range(64):
        if libc.prctl(DROP_BOUNDING, number, 0, 0, 0) != 0:
            break
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("dropping capabilities", "capset", header, (ctypes.c_uint32 * 6)())
    call("giving up rights", "prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    # Last, since a change of rights undoes it: if the process outside is killed, all here is.
    call("a bond with the parent", "prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def set_limits(request: dict[str, Any]) -> None:
    """Bounds on memory, time, files and processes."""
    seconds = int(request["seconds"]) + 1
    for name, limit in (
        ("RLIMIT_AS", request["memory"]),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_FSIZE", request["file_bytes"]),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", request["processes"]),
    ):
        if limit is not None:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (least, least))


def hide() -> None:
    """Refuse what looks into other threads and interpreters, or at objects not given to it.

    By an audit hook, which nothing can remove, nor reach: no variable holds it, and what it refuses
    is in its code.
    """

    def refuse(event: str, arguments: Any) -> None:
        if event in (
            "sys._current_frames",
            "sys._current_exceptions",
            "sys.settrace",
            "sys.setprofile",
            "sys.monitoring.register_callback",
            "gc.get_objects",
            "gc.get_referrers",
            "gc.get_referents",
            "cpython.PyInterpreterState_New",
        ) or (event == "import" and arguments[0] in ("_testcapi", "_testinternalcapi")):
            raise RuntimeError(f"{event} is not for programs in the sandbox")

    sys.addaudithook(refuse)
    # Libraries set back what nobody has set.
    sys.settrace, sys.setprofile = unless_none(sys.settrace), unless_none(sys.setprofile)


def unless_none(setter: Any) -> Any:
    """The setter of a function, which does nothing for None."""

    def call_it(function: Any) -> None:
        if function is not None:
            setter(function)

    return call_it


def run(request: dict[str, Any]) -> None:
    """Run a program, and exit; if it came to its end, the nonce is written first."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    try:
        # A loop in C calls what is made in one expression: no variable of a frame holds the locks.
        collections.deque(map(partial.__call__, steps(request)), 0)
    except BaseException:
        os._exit(1)


def steps(request: dict[str, Any]) -> list[Any]:
    """What is called in turn, until one raises: the program, and what vouches for its end.

    Nothing of it is left in the request.
    """
    code = compile(request.pop("program"), "<program>", "exec", dont_inherit=True)
    gate, done = _thread.allocate_lock(), _thread.allocate_lock()
    gate.acquire()
    done.acquire()
    nonce = request.pop("nonce").encode()
    _thread.start_new_thread(vouch, (gate, done, request.pop("results"), nonce))
    # A main module of its own: this one is nothing to it.
    main = sys.modules["__main__"] = type(sys)("__main__")
    program = partial(exec, code, vars(main))
    return [program, partial(gate.release), partial(done.acquire), partial(os._exit, 0)]


def vouch(gate: Any, done: Any, results: int, nonce: bytes) -> None:
    """Write the nonce, which nothing but this thread's frame holds, once the gate is open."""
    with gate:
        os.write(results, nonce)
    done.release()


def supervise(request: dict[str, Any]) -> None:
    """Fork the program, and wait for its end, or for that of its time."""
    libc.prctl(DUMPABLE, 0, 0, 0, 0)  # nobody reads the memory of this process
    request["results"] = os.dup(1)
    child = os.fork()
    if child == 0:
        hide()
        run(request)
    signal.signal(signal.SIGALRM, lambda *_: end(request["isolated"]))
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    while os.wait()[0] != child:
        pass
    end(request["isolated"])


def end(isolated: bool) -> None:  # noqa: FBT001 -- one question
    """End this process, and with it all that the program has left behind."""
    if not isolated:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    """Read the request, isolate, run."""
    libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    request = json.load(sys.stdin)
    try:
        if not request["isolated"]:
            # Without a user namespace the bound counts all processes of the user.
            set_limits({**request, "processes": None})
            supervise(request)
            return
        root = os.geteuid() == 0
        enter_namespaces(root=root)
        inner = os.fork()
        if inner == 0:
            try:
                change_root(request["file_bytes"] * 4)
                if root:
                    become_nobody()
                set_limits(request)
                drop_rights()
            except (Refused, OSError) as error:
                sys.stderr.write(str(error))
                sys.stderr.flush()
                os._exit(REFUSED)
            supervise(request)
        _, status = os.waitpid(inner, 0)
        # The kernel may end it for want of memory, which is the program's fault.
        sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0)
    except (Refused, OSError) as error:
        sys.stderr.write(str(error))
        sys.exit(REFUSED)


main()
