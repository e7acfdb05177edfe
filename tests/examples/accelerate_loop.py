"""A loop over `accelerate` with DeepSpeed. Nothing here knows of SSR: it acts through the "ssr" block of ds.json."""

import argparse
import itertools
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed", help="DeepSpeed's JSON file; left out where `accelerate launch` has it")
parser.add_argument("--text", default="LICENSE", help="its bytes are the data")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/accelerate")
parser.add_argument("--resume", metavar="FOLDER", help="go on from that state, such as runs/accelerate/step_10")
arguments = parser.parse_args()

accelerator = Accelerator(
    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=arguments.deepspeed) if arguments.deepspeed else None,
    # On the CPU accelerate names no backend, and every process would take itself for the only one.
    kwargs_handlers=[] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")],
)
set_seed(0)
config = Qwen3MoeConfig.from_json_file("tests/examples/model.json")
model = Qwen3MoeForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
samples = torch.tensor(list(Path(arguments.text).read_bytes())).split(128)[:-1]
model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(samples, batch_size=4, drop_last=True))
if arguments.resume:
    accelerator.load_state(arguments.resume)

endless = itertools.chain.from_iterable(itertools.repeat(batches))
for tokens in itertools.islice(endless, model.global_steps, arguments.steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {model.global_steps} loss {loss.item()}", flush=True)
    if model.global_steps % 10 == 0:
        accelerator.save_state(f"{arguments.output}/step_{model.global_steps}")
accelerator.print(type(model.module.model.layers[0].mlp.gate).__name__)
