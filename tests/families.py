"""Families of `transformers` at a tiny size, with the list of their blocks and a padded batch.

They need `transformers`: `pytest.importorskip("transformers")` before importing this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

_VOCABULARY, _SAMPLES, _LENGTH = 64, 4, 48
_GENERAL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_GENERAL, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": _VOCABULARY}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_PAIR = {
    **{f"{part}_layers": 3 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **{"d_model": 32, "vocab_size": _VOCABULARY, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}
_T5 = {
    **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4},
    **{"vocab_size": _VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 1},
}
_IMAGE = {"image_size": 24, "patch_size": 4, "num_labels": 3}
_SPEECH = {
    **{"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2)},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0},
    **{"ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "mask_time_prob": 0.0},
}
_MASKED, _CAUSAL = "AutoModelForMaskedLM", "AutoModelForCausalLM"
_SEQUENCE = "AutoModelForSeq2SeqLM"


@dataclass(frozen=True)
class Family:
    """How a model is made, and where its blocks are."""

    kind: str
    blocks: str
    config: str
    options: dict[str, Any]
    use_cache: bool = False

    def make(self) -> tuple[nn.Module, nn.ModuleList, dict[str, Any]]:
        """Make the model, its list of blocks, and a batch that contains labels."""
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**self.options)
        if hasattr(config, "use_cache"):
            config.use_cache = self.use_cache
        kind = getattr(hf, self.kind)
        model = kind.from_config(config) if self.kind.startswith("Auto") else kind(config)
        return model, model.get_submodule(self.blocks), _batch(model)


def _batch(model: nn.Module) -> dict[str, Any]:
    name = model.main_input_name
    if name == "pixel_values":
        images = torch.randn(_SAMPLES, 3, 24, 24)
        return {name: images, "labels": torch.arange(_SAMPLES) % 3}
    tokens, mask = _padded()
    labels = tokens.masked_fill(mask == 0, -100)
    if name == "input_features":
        return {name: torch.randn(_SAMPLES, 16, 64), "labels": labels}
    if name == "input_values":
        sound = torch.ones(_SAMPLES, 500, dtype=torch.int64)
        sound[1, 300:] = 0
        return {name: torch.randn(_SAMPLES, 500), "attention_mask": sound, "labels": labels[:, :6]}
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _padded() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, _VOCABULARY, (_SAMPLES, _LENGTH))
    mask = torch.ones_like(tokens)
    for sample in range(1, _SAMPLES):
        mask[sample, _LENGTH - 7 * sample :] = 0
    return tokens * mask, mask


def _decoder(config: str, blocks: str = "model.layers", **options: Any) -> Family:
    return Family(_CAUSAL, blocks, config, {**_GROUPED, **options})


def _encoder(config: str, blocks: str, **options: Any) -> Family:
    return Family(_MASKED, blocks, config, {**_GENERAL, **options})


FAMILIES: dict[str, Family] = {
    "gpt2": Family(_CAUSAL, "transformer.h", "GPT2Config", _GPT),
    "gpt_neo": Family(
        *(_CAUSAL, "transformer.h", "GPTNeoConfig"),
        {**_GENERAL, "num_layers": 3, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local", "global"], 1]]},
    ),
    "gptj": Family(_CAUSAL, "transformer.h", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": _decoder("GPTNeoXConfig", "gpt_neox.layers"),
    "gpt_bigcode": Family(_CAUSAL, "transformer.h", "GPTBigCodeConfig", _GPT),
    "codegen": Family(_CAUSAL, "transformer.h", "CodeGenConfig", {**_GPT, "rotary_dim": 4}),
    "opt": _decoder("OPTConfig", "model.decoder.layers", ffn_dim=64, word_embed_proj_dim=32),
    "bloom": Family(
        _CAUSAL, "transformer.h", "BloomConfig", {**_GENERAL, "n_layer": 3, "n_head": 4}
    ),
    "llama": _decoder("LlamaConfig"),
    "mistral": _decoder("MistralConfig", sliding_window=16),
    "qwen2": _decoder("Qwen2Config"),
    "qwen3": _decoder("Qwen3Config"),
    "gemma": _decoder("GemmaConfig"),
    "gemma2": _decoder("Gemma2Config", sliding_window=16),
    "gemma3": _decoder("Gemma3TextConfig", sliding_window=16),
    "phi": _decoder("PhiConfig"),
    "phi3": _decoder("Phi3Config"),
    "falcon": Family(_CAUSAL, "transformer.h", "FalconConfig", {**_GENERAL, "alibi": True}),
    "stablelm": _decoder("StableLmConfig"),
    "olmo": _decoder("OlmoConfig"),
    "olmo2": _decoder("Olmo2Config"),
    "cohere": _decoder("CohereConfig"),
    "starcoder2": _decoder("Starcoder2Config"),
    "granite": _decoder("GraniteConfig"),
    "smollm3": _decoder("SmolLM3Config"),
    "mixtral": Family(
        _CAUSAL, "model.layers", "MixtralConfig", {**_EXPERTS, "output_router_logits": True}
    ),
    "qwen2_moe": _decoder(
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "xglm": _decoder("XGLMConfig", d_model=32, num_layers=3, attention_heads=4, ffn_dim=64),
    "bert": _encoder("BertConfig", "bert.encoder.layer"),
    "roberta": _encoder("RobertaConfig", "roberta.encoder.layer"),
    "electra": _encoder("ElectraConfig", "electra.encoder.layer", embedding_size=16),
    "distilbert": _encoder(
        "DistilBertConfig",
        "distilbert.transformer.layer",
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=64,
    ),
    "deberta-v2": _encoder(
        "DebertaV2Config",
        "deberta.encoder.layer",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        max_relative_positions=32,
    ),
    "mpnet": _encoder("MPNetConfig", "mpnet.encoder.layer"),
    "camembert": _encoder("CamembertConfig", "roberta.encoder.layer"),
    "modernbert": _encoder("ModernBertConfig", "model.layers", local_attention=16),
    "albert": _encoder(
        "AlbertConfig",
        "albert.encoder.albert_layer_groups",
        embedding_size=16,
        num_hidden_groups=3,
    ),
    "vit": Family("ViTForImageClassification", "vit.layers", "ViTConfig", {**_GENERAL, **_IMAGE}),
    "beit": Family(
        "BeitForImageClassification", "beit.layers", "BeitConfig", {**_GENERAL, **_IMAGE}
    ),
    "deit": Family(
        "DeiTForImageClassification", "deit.layers", "DeiTConfig", {**_GENERAL, **_IMAGE}
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForCTC", "wav2vec2.encoder.layers", "Wav2Vec2Config", {**_GENERAL, **_SPEECH}
    ),
    "hubert": Family(
        "HubertForCTC", "hubert.encoder.layers", "HubertConfig", {**_GENERAL, **_SPEECH}
    ),
    "t5 encoder": Family(_SEQUENCE, "encoder.block", "T5Config", _T5),
    "t5": Family(_SEQUENCE, "decoder.block", "T5Config", _T5),
    "mt5": Family(_SEQUENCE, "decoder.block", "MT5Config", _T5),
    "bart encoder": Family(_SEQUENCE, "model.encoder.layers", "BartConfig", _PAIR),
    "bart": Family(_SEQUENCE, "model.decoder.layers", "BartConfig", _PAIR),
    "mbart": Family(_SEQUENCE, "model.decoder.layers", "MBartConfig", _PAIR),
    "pegasus": Family(_SEQUENCE, "model.decoder.layers", "PegasusConfig", _PAIR),
    "marian": Family(_SEQUENCE, "model.decoder.layers", "MarianConfig", _PAIR),
    "blenderbot": Family(_SEQUENCE, "model.decoder.layers", "BlenderbotConfig", _PAIR),
    "m2m_100": Family(_SEQUENCE, "model.decoder.layers", "M2M100Config", _PAIR),
    "whisper": Family(
        *("WhisperForConditionalGeneration", "model.decoder.layers", "WhisperConfig"),
        {**_PAIR, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
    ),
}

# What a plan cannot serve, and the sentence that says so.
REFUSED: dict[str, tuple[Family, str]] = {
    "one block three times": (
        _encoder("AlbertConfig", "albert.encoder.albert_layer_groups", embedding_size=16),
        r"expected the blocks to run once each, in their order, but block 0 \(AlbertLayerGroup\)",
    ),
    "layer drop": (
        Family(
            _SEQUENCE, "model.decoder.layers", "BartConfig", {**_PAIR, "decoder_layerdrop": 0.9}
        ),
        r"skipped at random \(layer drop\), set the rate to 0 first",
    ),
    "cache": (
        Family(_CAUSAL, "model.layers", "LlamaConfig", _GROUPED, use_cache=True),
        r"block 0 \(LlamaDecoderLayer\) writes into its argument .*use_cache=False",
    ),
    "cache of cross-attention": (
        Family(_SEQUENCE, "decoder.block", "T5Config", _T5, use_cache=True),
        r"block 0 \(T5Block\) writes into its argument .*use_cache=False",
    ),
}
