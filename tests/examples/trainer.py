"""Hugging Face's `Trainer` with DeepSpeed. Nothing here knows of SSR: it acts through the "ssr" block of ds.json."""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed", default="tests/examples/ds.json")
parser.add_argument("--text", default="LICENSE", help="its bytes are the data")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="runs/trainer")
parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --output")
parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
arguments = parser.parse_args()

on_cpu = not torch.cuda.is_available()
if on_cpu:
    # There the Trainer names no backend, and every process would take itself for the only one.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")

set_seed(0)
config = Qwen3MoeConfig.from_json_file("tests/examples/model.json")
samples = [
    {"input_ids": tokens, "labels": tokens}
    for tokens in torch.tensor(list(Path(arguments.text).read_bytes())).split(128)[:-1]
]
settings = TrainingArguments(
    arguments.output,
    deepspeed=arguments.deepspeed,
    per_device_train_batch_size=4,
    max_steps=arguments.steps,
    learning_rate=3e-3,
    logging_steps=1,
    save_steps=10,
    eval_strategy="steps",
    eval_steps=10,
    report_to="none",
    accelerator_config={"use_configured_state": on_cpu},
)
trainer = Trainer(Qwen3MoeForCausalLM(config), settings, train_dataset=samples[8:], eval_dataset=samples[:8])
trainer.train(resume_from_checkpoint=arguments.resume)
trainer.save_model(f"{arguments.output}/final")
if trainer.is_world_process_zero():
    print(type(trainer.model.model.layers[0].mlp.gate).__name__)
