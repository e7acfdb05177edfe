"""A run small enough for tests, on real speeches."""

from ssr_deepspeed.pretrain.config import RunConfig


def tiny_run(cache, *, ssr=None, model=None, data=None, deepspeed=None, **settings):
    """A `RunConfig` of a model with 4 experts; keyword arguments override single keys.

    Args:
        cache: the folder of the fixture of that name.
    """
    return RunConfig.from_dict(
        {
            "model": {
                "layers": 2,
                "width": 32,
                "heads": 2,
                "experts": 4,
                "expert_width": 32,
                "ep_size": 2,
                **(model or {}),
            },
            "data": {
                "source": f"{cache}/speeches",
                "sequence_length": 64,
                "cache": cache,
                "heldout": 0.1,
                **(data or {}),
            },
            "deepspeed": {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
                "zero_optimization": {"stage": 1},
                "ssr": {"rule": "ssr", "probability": 0.5, "noise": {"scale": 0.1}, **(ssr or {})},
                **(deepspeed or {}),
            },
            "steps": 8,
            "log_every": 1,
            "eval_sequences": 16,
            **settings,
        },
        path="",
    )
