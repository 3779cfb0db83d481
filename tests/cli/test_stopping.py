"""How the command line takes a signal at an awkward moment."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os, signal, sys, time, weakref
from lmdbcache.cli.stopping import StopSignals

stop = StopSignals()
stop.install()

def interrupt(*_):
    os.kill(os.getpid(), signal.{name})
    for _ in range(100):
        pass

try:
{body}
    time.sleep(100)
    print("lost")
except KeyboardInterrupt:
    print("stopped")
stop.finish()
os.kill(os.getpid(), signal.{name})
time.sleep(0.2)
sys.exit(stop.exit_code)
"""
BODIES = {
    "anywhere": "    interrupt()",
    "finalizer": "    class A:\n        def __del__(self): interrupt()\n    A()",
    "weak reference": (
        "    class A: pass\n    a = A()\n    r = weakref.ref(a, interrupt)\n    del a"
    ),
    "finalize": "    class A: pass\n    a = A()\n    weakref.finalize(a, interrupt)\n    del a",
    "fork": (
        "    os.register_at_fork(before=interrupt)\n    pid = os.fork()\n"
        "    if pid == 0: os._exit(0)\n    os.waitpid(pid, 0)"
    ),
    "import": (
        "    open('slow.py', 'w').write('import __main__; __main__.interrupt()')\n    import slow"
    ),
}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", BODIES)
def test_no_signal_is_lost(moment, name, tmp_path):
    """Python drops exceptions in finalizers and fork hooks; the stop comes right after them."""
    code = START.format(name=name, body=BODIES[moment])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '')\n{code}"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.stdout == "stopped\n", result.stderr
    assert result.stderr == ""
    assert result.returncode == (130 if name == "SIGINT" else 143)


def test_ignored_signals_stay_ignored(tmp_path):
    """Under nohup, or in the background of a script, Ctrl-C does nothing."""
    code = (
        "import os, signal\nfrom lmdbcache.cli.stopping import StopSignals\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nStopSignals().install()\n"
        "os.kill(os.getpid(), signal.SIGINT)\nprint('on')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout == "on\n"
