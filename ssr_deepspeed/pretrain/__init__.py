"""The pretraining command: `python -m ssr_deepspeed.pretrain`, installed as `ssr-pretrain`."""
