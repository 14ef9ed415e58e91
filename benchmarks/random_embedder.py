"""Writes a sentence-transformers model with random weights, to measure speed without real ones.

    python benchmarks/random_embedder.py --tokenizer_of MODEL_FOLDER --output FOLDER

The default shape is that of BERT-base and mpnet-base. The tokenizer is copied.
"""

import argparse
import shutil
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel

_IGNORED = shutil.ignore_patterns("*.safetensors", "*.bin", "modules.json", "1_Pooling", "2_*")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer_of", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = arguments.output / "base"
    shutil.copytree(arguments.tokenizer_of, base, ignore=_IGNORED, dirs_exist_ok=True)
    config = BertConfig(
        hidden_size=arguments.dimension,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.dimension // 64,
        intermediate_size=4 * arguments.dimension,
    )
    BertModel(config).save_pretrained(base)
    modules = [Transformer(str(base), max_seq_length=256), Pooling(arguments.dimension, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(arguments.output / "model"))


if __name__ == "__main__":
    main()
