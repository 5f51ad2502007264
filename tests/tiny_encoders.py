"""Tiny real bases of the classic tasks, written on the spot: BERT, a vision transformer, two image nets, T5."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMAGE_SIZE = 32
IMAGE_BASES = ("vit", "resnet", "efficientnet")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_bert_tokenizer(folder: Path) -> None:
    """BERT's [CLS] text [SEP] pair [SEP] with type ids; a word is its letters, a, ##b, ##c."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = {token: at for at, token in enumerate([*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1000))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(str(folder))  # fmt: skip


def write_bert(folder: Path, *, labels: Sequence[str] = (), seed: int = 0, **config: Any) -> Path:
    """A random BERT of two layers, 64 wide, with its pooler; with `labels` one that classified texts before."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    settings = {
        "vocab_size": len(_SPECIAL) + 2 * len(string.ascii_letters + string.digits + string.punctuation),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **_named(labels),
        **config,
    }
    _write(folder, BertForSequenceClassification if labels else BertModel, BertConfig(**settings), seed)
    write_bert_tokenizer(folder)
    return folder


def write_t5(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A random T5 of two layers a side, 64 wide; its tokens are bytes, and </s> ends every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<pad>", "</s>", "<unk>"]
    settings = {
        "vocab_size": len(control) + len(alphabet),
        "d_model": 64,
        "d_kv": 32,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **config,
    }
    _write(folder, T5ForConditionalGeneration, T5Config(**settings), seed)
    backend = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate([*control, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in control])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder


def write_image_base(
    folder: Path, kind: str, *, labels: Sequence[str] = ("cat", "dog"), seed: int = 0, **config: Any
) -> Path:
    """A random image classifier: `vit`, or `resnet` or `efficientnet` with batch norms that have seen some numbers."""
    import transformers

    settings: dict[str, dict[str, Any]] = {
        "vit": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE_SIZE, "patch_size": 16,
        },
        "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        "efficientnet": {
            "image_size": IMAGE_SIZE, "width_coefficient": 0.1, "depth_coefficient": 1.0, "in_channels": [32, 16],
            "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
            "expand_ratios": [1, 6], "depthwise_padding": [], "hidden_dim": 128,
        },
    }  # fmt: skip
    classes = {"vit": "ViT", "resnet": "ResNet", "efficientnet": "EfficientNet"}
    chosen = getattr(transformers, f"{classes[kind]}Config")(**settings[kind], **_named(labels), **config)
    _write(folder, getattr(transformers, f"{classes[kind]}ForImageClassification"), chosen, seed)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )
    return folder


def write_photographs(folder: Path, labels: Sequence[str] = ("left", "right"), each: int = 6, seed: int = 0) -> Path:
    """A folder of small noisy pictures for each label; in the pictures of each another part is bright."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(seed)
    for at, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            picture = draw.integers(0, 60, (IMAGE_SIZE, IMAGE_SIZE, 3))
            width = IMAGE_SIZE // len(labels)
            picture[:, at * width : (at + 1) * width] += 150
            Image.fromarray(picture.astype("uint8")).save(folder / label / f"{index}.png")
    return folder


def _named(labels: Sequence[str]) -> dict[str, Any]:
    names = dict(enumerate(labels))
    return {"id2label": names, "label2id": {label: at for at, label in names.items()}} if labels else {}


def _write(folder: Path, kind: Any, config: Any, seed: int) -> None:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    model.save_pretrained(str(folder))
