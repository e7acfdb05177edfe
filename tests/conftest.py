import os
import sys

# Before torch is imported anywhere, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton decides at its import whether kernels are compiled or interpreted, here on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
# One ninja for all: operators compiled by another are compiled again.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for tokenised text, shared by the session, with the ten shortest speeches in `speeches/`."""
    from ssr_deepspeed.pretrain.config import DataConfig
    from ssr_deepspeed.pretrain.text import read_documents

    folder = tmp_path_factory.mktemp("cache")
    (folder / "speeches").mkdir()
    for number, text in enumerate(sorted(read_documents(DataConfig())["text"], key=len)[:10]):
        (folder / "speeches" / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder)
