"""Tiny models of `transformers`, built without a download, each with a batch that has its loss.

They need `transformers`: `pytest.importorskip("transformers")` before importing this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Any]
ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {}

_VOCABULARY, _LENGTH, _SAMPLES = 48, 6, 2
_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def architecture(
    name: str,
) -> Callable[[Callable[[], tuple[nn.Module, Batch]]], Callable[[], tuple[nn.Module, Batch]]]:
    """Enter into the table a function that makes a model and a batch; its seed is fixed."""

    def enter(make: Callable[[], tuple[nn.Module, Batch]]) -> Callable[[], Any]:
        def seeded() -> tuple[nn.Module, Batch]:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model, batch = make()
            return model.train(), batch

        ARCHITECTURES[name] = seeded
        return seeded

    return enter


def _tokens(length: int = _LENGTH) -> Tensor:
    return torch.randint(3, _VOCABULARY, (_SAMPLES, length))


def _padded() -> Batch:
    """Two texts, of which the second one ends early, and their tokens as labels."""
    tokens, mask = _tokens(), torch.ones(_SAMPLES, _LENGTH, dtype=torch.int64)
    mask[1, 4:] = 0
    tokens = tokens * mask
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _config(kind: Any, **options: Any) -> Any:
    return kind(vocab_size=_VOCABULARY, **options)


@architecture("gpt2")
def gpt2() -> tuple[nn.Module, Batch]:
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
    config = _config(hf.GPT2Config, **sizes, bos_token_id=1, eos_token_id=2)
    return hf.GPT2LMHeadModel(config), _padded()


@architecture("llama")
def llama() -> tuple[nn.Module, Batch]:
    config = _config(hf.LlamaConfig, **_ENCODER, num_key_value_heads=1, use_cache=False)
    return hf.LlamaForCausalLM(config), _padded()


@architecture("mixtral")
def mixtral() -> tuple[nn.Module, Batch]:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True}
    config = _config(hf.MixtralConfig, **_ENCODER, **experts, num_key_value_heads=1)
    config.use_cache = False
    return hf.MixtralForCausalLM(config), _padded()


@architecture("bert")
def bert() -> tuple[nn.Module, Batch]:
    config = _config(hf.BertConfig, **_ENCODER, max_position_embeddings=16)
    return hf.BertForMaskedLM(config), _padded()


@architecture("t5")
def t5() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = _config(hf.T5Config, **sizes, pad_token_id=0, decoder_start_token_id=1)
    config.use_cache = False
    return hf.T5ForConditionalGeneration(config), _padded()


@architecture("bart")
def bart() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 16, "max_position_embeddings": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    config = _config(hf.BartConfig, **sizes, **_SPECIAL, use_cache=False)
    return hf.BartForConditionalGeneration(config), _padded()


@architecture("vit")
def vit() -> tuple[nn.Module, Batch]:
    config = hf.ViTConfig(**_ENCODER, image_size=8, patch_size=4, num_labels=3)
    batch = {"pixel_values": torch.randn(_SAMPLES, 3, 8, 8), "labels": torch.tensor([0, 2])}
    return hf.ViTForImageClassification(config), batch


@architecture("whisper")
def whisper() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 8}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    config = _config(hf.WhisperConfig, **sizes, **_SPECIAL, max_target_positions=16)
    config.use_cache = False
    batch = {"input_features": torch.randn(_SAMPLES, 8, 16), "labels": _padded()["labels"]}
    return hf.WhisperForConditionalGeneration(config), batch


@architecture("clip")
def clip() -> tuple[nn.Module, Batch]:
    text = {**_ENCODER, "vocab_size": _VOCABULARY, "max_position_embeddings": 16}
    text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**_ENCODER, "image_size": 8, "patch_size": 4}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    batch = _padded()
    del batch["labels"]
    pixels = torch.randn(_SAMPLES, 3, 8, 8)
    return hf.CLIPModel(config), {**batch, "pixel_values": pixels, "return_loss": True}


@architecture("detr")
def detr() -> tuple[nn.Module, Batch]:
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    sizes = {"d_model": 16, "num_queries": 4, "num_labels": 3}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    config = hf.DetrConfig(
        **sizes, use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone
    )
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.2, 0.2]])
    labels = [{"class_labels": torch.tensor([i, 2]), "boxes": boxes} for i in range(_SAMPLES)]
    return hf.DetrForObjectDetection(config), {
        "pixel_values": torch.randn(_SAMPLES, 3, 32, 32),
        "labels": labels,
    }


@architecture("wav2vec2")
def wav2vec2() -> tuple[nn.Module, Batch]:
    layers = {"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 2)}
    config = _config(
        hf.Wav2Vec2Config,
        **_ENCODER,
        **layers,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,  # chance that no dropout module announces
        mask_time_prob=0.0,
        pad_token_id=0,
    )
    config.ctc_loss_reduction, config.ctc_zero_infinity = "mean", True
    labels = _tokens(4)
    labels[1, 3] = -100
    return hf.Wav2Vec2ForCTC(config), {"input_values": torch.randn(_SAMPLES, 200), "labels": labels}
