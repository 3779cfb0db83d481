"""Write a small, randomly initialised AST checkpoint, for tests and demonstrations.

It has the real model's input (1024 frames of 128 mel bins) and file layout, and takes a few
megabytes and milliseconds. Its embeddings mean nothing, but they differ between clips enough for a
linear probe to tell simple classes of sound apart.

    python tools/small_ast.py FOLDER [--seed 0] [--hidden-size 64] [--max-length 1024]
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["save_small_ast"]

# Wide enough for the pooled output to follow the input (the default of 0.02 lets a random model
# of this size forget it), narrow enough that the softmax doesn't pick single tokens.
_INITIALIZER_RANGE = 0.1


def save_small_ast(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    intermediate_size: int | None = None,
    initializer_range: float = _INITIALIZER_RANGE,
    max_length: int = 1024,
    sample_rate: int = 16000,
) -> Path:
    """Save a small `ASTModel` and its `ASTFeatureExtractor` with `save_pretrained`.

    Args:
        folder: Where to; made if it doesn't exist.
        seed: The same seed and sizes give the same weights.
        hidden_size: Length of the pooled embedding; a multiple of `num_attention_heads`.
        num_hidden_layers: Transformer layers.
        num_attention_heads: Heads per layer.
        intermediate_size: Width of each layer's feed-forward part; None takes twice `hidden_size`.
        initializer_range: Standard deviation of the weights.
        max_length: Frames that the model takes, at 10 ms each: 1024 as published, 128 for quick
            tests, which then see only the first 1.28 s of a clip.
        sample_rate: Sample rate of the waveforms it takes, in Hz.

    Returns:
        The folder.
    """
    import torch
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel
    from transformers.utils import logging

    config = ASTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size or 2 * hidden_size,
        max_length=max_length,
        initializer_range=initializer_range,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = ASTModel(config)
        # transformers starts these at zero, which makes every token's query the same.
        tokens = model.embeddings
        for parameter in (tokens.cls_token, tokens.distillation_token, tokens.position_embeddings):
            parameter.normal_(std=initializer_range)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    ASTFeatureExtractor(sampling_rate=sample_rate, max_length=max_length).save_pretrained(folder)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small random AST checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-hidden-layers", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024, help="frames of 10 ms")
    arguments = parser.parse_args()
    print(save_small_ast(**vars(arguments)))


if __name__ == "__main__":
    main()
