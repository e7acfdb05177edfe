"""SSR in processes whose command line nobody can touch: `SSR_DEEPSPEED_AUTOLOAD=1` in the environment.

torch calls this module's `autoload`, an entry point of group `torch.backends`, at the end of `import torch`, in
every process of an environment where the package is installed. Without the variable it does nothing. With it, it
imports nothing either: SSR is installed when the first DeepSpeed engine is built.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "SSR_DEEPSPEED_AUTOLOAD"
_ENGINE = "deepspeed.runtime.engine"


def autoload() -> None:
    """Have SSR installed by the first engine of this process, if the environment asks for it.

    Never raises: an exception here would break `import torch`.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked == "1":
        if _ENGINE in sys.modules:
            _install_at_first_engine(sys.modules[_ENGINE])
        else:
            sys.meta_path.insert(0, _WhenImported())
    elif asked not in ("", "0"):
        print(f"SSR: {VARIABLE}={asked!r} is ignored; allowed: 0 and 1", file=sys.stderr, flush=True)


class _WhenImported(MetaPathFinder):
    """Finds DeepSpeed's engine as others would, once, and stays in the way of nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndThen(spec.loader)
        return spec


class _AndThen(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _install_at_first_engine(module)


def _install_at_first_engine(module: ModuleType) -> None:
    """Not before: DeepSpeed is only half imported when its engine is."""
    engine = module.DeepSpeedEngine
    original = engine.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from ssr_deepspeed.hosts.engine import equip, install

        if vars(engine)["__init__"] is __init__:
            engine.__init__ = original
        # Else another plugin has wrapped this: it stays, and `install` wraps it for the engines to come.
        first = install()
        original(self, *args, **kwargs)
        if first:
            equip(self)

    __init__.ssr_replaces = original  # type: ignore[attr-defined]
    engine.__init__ = __init__
