"""Language models, speech and pairs: transformers, x-transformers, peft."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from zoo_networks.entry import (
    BATCH,
    CLASSES,
    TOKENS,
    WORDS,
    Item,
    Network,
    classed_texts,
    classes,
    next_words,
    normal,
    padding,
    tagged_texts,
    texts,
    translated,
    whole,
)

SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEY_VALUE = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
IMPLEMENTATIONS = {"attn_implementation", "experts_implementation"}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def hugging(name: str, config: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    """Return a maker of `transformers.NAME`, of a small configuration."""

    def build() -> nn.Module:
        made = getattr(importlib.import_module("transformers"), name)
        settings = made.config_class(**{**config, **more})
        for key in IMPLEMENTATIONS & more.keys():
            setattr(settings, f"_{key}", more[key])
        return made(settings)

    return build


def _t(
    name: str,
    item: Callable[[int], Item],
    config: dict[str, Any] = SMALL,
    title: str = "",
    **more: Any,
) -> Network:
    return Network(title or name, "transformers", hugging(name, config, **more), item)


GPT2 = {
    "vocab_size": WORDS, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 24, "n_inner": 24,
    "num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DISTIL = {
    "vocab_size": WORDS, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24,
    "max_position_embeddings": 24, "num_labels": CLASSES,
}  # fmt: skip
T5 = {
    "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
CLIP_PART = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def _clip_pairs(seed: int) -> Item:
    u = {**texts(seed), "pixel_values": normal(seed, BATCH, 3, 16, 16)}
    return u, {"logits_per_image": whole(seed, BATCH, BATCH)}


def _sounds(seed: int) -> Item:
    return {"input_values": normal(seed, BATCH, 400)}, {"logits": classes(seed)}


def _spectra(seed: int) -> Item:
    u = {
        "input_features": normal(seed, BATCH, 8, 32),
        "decoder_input_ids": whole(seed, WORDS, BATCH, TOKENS),
    }
    return u, {"logits": whole(seed + 60, WORDS, BATCH, TOKENS)}


def _series(seed: int) -> Item:
    return {"past_values": normal(seed, BATCH, 32, 2)}, {
        "prediction_outputs": normal(seed + 9, BATCH, 4, 2)
    }


TRANSFORMERS = (
    _t("GPT2LMHeadModel", next_words, GPT2, **UNTIED),
    _t("GPT2LMHeadModel", next_words, GPT2, "GPT2LMHeadModel, tied"),
    _t("GPT2LMHeadModel", next_words, GPT2, "GPT2LMHeadModel, eager", **UNTIED,
       attn_implementation="eager"),
    _t("GPT2ForSequenceClassification", classed_texts, GPT2),
    _t("GPTNeoXForCausalLM", next_words, **UNTIED),
    _t("GPTJForCausalLM", next_words, {**GPT2, "rotary_dim": 4}, **UNTIED),
    _t("OPTForCausalLM", next_words, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, **UNTIED),
    _t("BloomForCausalLM", next_words, {**SMALL, "n_layer": 3, "n_head": 2}, **UNTIED),
    _t("LlamaForCausalLM", next_words, KEY_VALUE, **UNTIED),
    _t("LlamaForSequenceClassification", classed_texts, KEY_VALUE),
    _t("MistralForCausalLM", next_words, {**KEY_VALUE, "sliding_window": 4}, **UNTIED),
    _t("Qwen2ForCausalLM", next_words, KEY_VALUE, **UNTIED),
    _t("Qwen3ForCausalLM", next_words, KEY_VALUE, **UNTIED),
    _t("Gemma2ForCausalLM", next_words, KEY_VALUE, **UNTIED),
    _t("PhiForCausalLM", next_words, {**SMALL, "num_key_value_heads": 2}, **UNTIED),
    _t("MixtralForCausalLM", next_words, {**KEY_VALUE, "num_local_experts": 2}, **UNTIED,
       experts_implementation="eager"),
    _t("MambaForCausalLM", next_words, {**SMALL, "state_size": 4}, **UNTIED),
    _t("BertForSequenceClassification", classed_texts),
    _t("BertForTokenClassification", tagged_texts),
    _t("BertForMaskedLM", next_words, SMALL, "BertForMaskedLM, tied"),
    _t("RobertaForSequenceClassification", classed_texts),
    _t("DistilBertForSequenceClassification", classed_texts, DISTIL),
    _t("AlbertForSequenceClassification", classed_texts, {**SMALL, "embedding_size": 8}),
    _t("ElectraForTokenClassification", tagged_texts, {**SMALL, "embedding_size": 8}),
    _t("DebertaV2ForSequenceClassification", classed_texts, {**SMALL, "relative_attention": True,
       "pos_att_type": ["c2p", "p2c"]}),
    _t("MPNetForSequenceClassification", classed_texts),
    _t("XLNetForSequenceClassification", classed_texts, {"vocab_size": WORDS, "d_model": 16,
       "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": CLASSES}),
    _t("FNetForSequenceClassification", lambda n: (
        {"input_ids": texts(n)["input_ids"]}, {"logits": classes(n)}), {**SMALL,
        "tpu_short_seq_length": TOKENS}),
    _t("T5ForConditionalGeneration", translated, T5),
    _t("BartForConditionalGeneration", translated, BART, "BartForConditionalGeneration, tied"),
    _t("WhisperForConditionalGeneration", _spectra, {**BART, "num_mel_bins": 8,
       "max_source_positions": 16, "max_target_positions": 24},
       "WhisperForConditionalGeneration, tied"),
    _t("Wav2Vec2ForSequenceClassification", _sounds, {**SMALL, "conv_dim": [8, 8],
       "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
       "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
       "classifier_proj_size": 8, "mask_time_prob": 0.0, "layerdrop": 0.0}),
    _t("CLIPModel", _clip_pairs, {
        "text_config": {**CLIP_PART, "vocab_size": WORDS, "max_position_embeddings": 24,
                        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        "vision_config": {**CLIP_PART, "image_size": 16, "patch_size": 8},
        "projection_dim": 8}),
    _t("PatchTSTForPrediction", _series, {"num_input_channels": 2, "context_length": 32,
       "patch_length": 8, "patch_stride": 8, "d_model": 16, "num_hidden_layers": 2,
       "num_attention_heads": 2, "ffn_dim": 24, "prediction_length": 4, "loss": "mse"}),
)  # fmt: skip


def _decoder() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=3, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=WORDS, max_seq_len=TOKENS, attn_layers=layers)


def _encoder() -> nn.Module:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=16, depth=3, heads=2, attn_dim_head=8, use_rmsnorm=True, ff_glu=True)
    return TransformerWrapper(num_tokens=WORDS, max_seq_len=TOKENS, attn_layers=layers)


def _continuous() -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(dim=16, depth=3, heads=2, attn_dim_head=8)
    return ContinuousTransformerWrapper(
        dim_in=5, dim_out=CLASSES, max_seq_len=TOKENS, attn_layers=layers
    )


def _patches() -> nn.Module:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=16, depth=3, heads=2, attn_dim_head=8)
    return ViTransformerWrapper(
        image_size=16, patch_size=8, num_classes=CLASSES, attn_layers=layers
    )


def _windows(seed: int) -> Item:
    words = whole(seed, WORDS, BATCH, TOKENS + 1)
    return words[:, :-1], words[:, 1:]


def _masked_windows(seed: int) -> Item:
    u = {"x": whole(seed, WORDS, BATCH, TOKENS), "mask": padding(seed).bool()}
    return u, whole(seed + 1, WORDS, BATCH, TOKENS)


X_TRANSFORMERS = (
    Network("TransformerWrapper(Decoder)", "x_transformers", _decoder, _windows),
    Network("TransformerWrapper(Encoder), mask", "x_transformers", _encoder, _masked_windows),
    Network(
        "ContinuousTransformerWrapper", "x_transformers", _continuous,
        lambda n: (normal(n, BATCH, TOKENS, 5), whole(n, CLASSES, BATCH, TOKENS)),
    ),
    Network(
        "ViTransformerWrapper", "x_transformers", _patches,
        lambda n: (normal(n, BATCH, 3, 16, 16), classes(n)),
    ),
)  # fmt: skip


def adapted(base: Callable[[], nn.Module], **settings: Any) -> Callable[[], nn.Module]:
    """Return a maker of a network that peft has given LoRA adapters."""

    def build() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(base(), LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **settings))

    return build


PEFT = (
    Network(
        "LoRA on LlamaForCausalLM", "peft",
        adapted(hugging("LlamaForCausalLM", KEY_VALUE, **UNTIED),
                target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        next_words,
    ),
    Network(
        "LoRA on GPT2LMHeadModel, tied", "peft",
        adapted(hugging("GPT2LMHeadModel", GPT2), target_modules=["c_attn"],
                init_lora_weights=False, fan_in_fan_out=True),
        next_words,
    ),
    Network(
        "LoRA on BertForSequenceClassification", "peft",
        adapted(hugging("BertForSequenceClassification", SMALL), task_type="SEQ_CLS",
                init_lora_weights=False),
        classed_texts,
    ),
)  # fmt: skip

LANGUAGE = (*TRANSFORMERS, *X_TRANSFORMERS, *PEFT)
