"""Put on a process's path, this kills it at a seam: TUNER_DIE_AT="METHOD:COUNT".

METHOD is `rename` (a checkpoint directory gets its final name), `symlink` (the link `best` is
switched), or a method of tuner by its dotted path; the process dies when it is called for the
COUNTth time, before it runs (`MODULE.CLASS.METHOD`) or after (`MODULE.CLASS.METHOD+`). TUNER_DIE_IN
names a word of the command line of the process that is meant.
"""

import importlib.abc
import importlib.util
import os
import pathlib
import signal
import sys

_at = os.environ.get("TUNER_DIE_AT", "")
_marker = pathlib.Path(os.environ.get("TUNER_DIE_MARKER", os.devnull))


def _lethal(original, count, *, after):
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after or calls < count else None
        if calls == count:
            _marker.write_text(_at)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return dying


class _Patcher(importlib.abc.MetaPathFinder):
    """Patches a class of a module once the module is imported."""

    def __init__(self, module, cls, method, count, after):
        self.module, self.cls, self.method, self.count, self.after = module, cls, method, count, after

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            cls = getattr(module, self.cls)
            setattr(cls, self.method, _lethal(getattr(cls, self.method), self.count, after=self.after))

        spec.loader.exec_module = exec_module
        return spec


if _at and os.environ.get("TUNER_DIE_IN", "") in sys.orig_argv and not _marker.exists():
    _where, _, _number = _at.rpartition(":")
    _after = _where.endswith("+")
    _where = _where.rstrip("+")
    if _where == "rename":
        pathlib.Path.rename = _lethal(pathlib.Path.rename, int(_number), after=False)
    elif _where == "symlink":
        pathlib.Path.symlink_to = _lethal(pathlib.Path.symlink_to, int(_number), after=False)
    else:
        _module, _class, _method = _where.rsplit(".", 2)
        sys.meta_path.insert(0, _Patcher(_module, _class, _method, int(_number), _after))
