"""Run any training script with SSR installed: `python -m ssr_deepspeed.run SCRIPT [ARGS]`.

The script is unchanged; SSR acts where its DeepSpeed configuration has an `"ssr"` block. Works
under the launchers:

    torchrun --nproc-per-node 8 -m ssr_deepspeed.run pretrain.py --deepspeed_config ds.json
    deepspeed --module ssr_deepspeed.run pretrain.py ...
    accelerate launch -m ssr_deepspeed.run pretrain.py ...

`-m MODULE` runs a module in place of a script.
"""

from __future__ import annotations

import os
import runpy
import sys

from ssr_deepspeed.hosts.engine import install

_USAGE = "usage: python -m ssr_deepspeed.run (SCRIPT | -m MODULE) [ARGS]"


def main(arguments: list[str] | None = None) -> None:
    """Install SSR and run the script or module that the arguments name, as `__main__`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # DeepSpeed's launcher puts the script's --local_rank in front of the script's name.
    launcher_words = []
    while words and words[0].startswith("--local_rank"):
        launcher_words += [words.pop(0)] if "=" in words[0] else [words.pop(0), words.pop(0)]
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return
    as_module = words[:1] == ["-m"]
    words = words[1:] if as_module else words
    if not words or words[0].startswith("-"):
        sys.exit(_USAGE)
    target, rest = words[0], words[1:] + launcher_words
    if not as_module and not os.path.isfile(target):
        sys.exit(f"ssr_deepspeed.run: there is no script {target!r} in {os.getcwd()}\n{_USAGE}")
    install()
    sys.argv = [target, *rest]
    if as_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main()
