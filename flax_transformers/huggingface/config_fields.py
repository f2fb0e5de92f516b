"""Fields of a config.json that no family reads: kept, refused, or reported.

A family's ``to_huggingface`` writes every field that it reads. Other fields of a file are written
back unchanged if they do not affect the outputs, refused if they do, and written back with a
warning if they are unknown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from flax_transformers.errors import UserError
from flax_transformers.models.config import TransformerConfig
from flax_transformers.models.generation_settings import IN_CONFIG_JSON, OWN_FIELDS

logger = logging.getLogger(__name__)

_HARMLESS = frozenset(
    # Origin of a model, how it was run, and what it returns.
    "_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset auto_map "
    "attn_implementation transformers_version finetuning_task language base_model_tp_plan "
    "use_cache output_attentions output_hidden_states output_scores output_past return_dict "
    "return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss xla_device dtype torch_dtype "
    "gradient_checkpointing chunk_size_feed_forward pretraining_tp reference_compile is_decoder "
    "deterministic_flash_attn repad_logits_with_grad is_encoder_decoder tokenizer_class "
    "use_return_dict quantization_config directionality model_max_length unsloth_version "
    # Read by pipelines and tokenizers.
    "task_specific_params prefix label2id id2label num_labels _num_labels sep_token_id "
    "cls_token_id mask_token_id unk_token_id tokenizer_type "
    # Training only.
    "decoder_layerdrop encoder_layerdrop classif_dropout classifier_dropout hidden_dropout "
    "output_router_logits sparse_prediction sparse_pred_ignore_index initializer_cutoff_factor "
    "initializer_range initializer_factor summary_first_dropout keys_to_ignore_at_inference "
    "embd_pdrop qa_dropout summary_last_dropout sinusoidal_pos_embds "
    # Of unsupported heads.
    "n_special predict_special_tokens scalable_attention text_config text_config_dict "
    "logit_scale_init_value projection_dim "
    "summary_activation summary_proj_to_labels summary_type summary_use_proj encoder_stride "
    "pooler_act pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
    "pooler_output_size pooler_size_per_head pooler_type pooler_dropout pooler_hidden_size "
    # Redundant sizes, and fields that the originals do not read.
    "n_ctx n_positions vocab_size_or_config_json_file layer_norm_eps position_embedding_type "
    "embedding_size add_bias_logits add_final_layer_norm normalize_before normalize_embedding "
    "down_scale_factor gap_size net_structure_type num_memory_blocks "
    "static_position_embeddings extra_pos_embeddings hidden_activation sliding_window "
    "do_blenderbot_90_layernorm eos_token_ids max_sequence_length replacing_rate save_step "
    "global_attn_every_n_layers global_rope_theta local_rope_theta max_window_layers "
    "scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn "
    "add_cross_attention cross_attention_hidden_size tie_encoder_decoder feed_forward_proj "
    "rope_scaling rope_theta rope_parameters partial_rotary_factor router_jitter_noise "
    "original_max_position_embeddings use_bidirectional_attention decoder_vocab_size "
    "attention_head_size conv_act conv_groups".split()
) | {"pruned_heads", "force_bos_token_to_be_generated"}
"""Fields that do not change outputs, or that a family checks before."""


_WRITTEN_ANYWAY = {"dtype", "architectures", "model_type"}


def kept_fields(
    described: Mapping[str, Any], written: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """The fields of the config.json ``described`` that differ from ``written``, for ``hub_fields``.

    ``written`` is what the family writes of the model: "silu" for "swish". A warning names
    unknown fields. Raises UserError for fields that change the outputs.
    """
    if described.get("pruned_heads"):
        raise UserError(
            f"config.json has pruned_heads {described['pruned_heads']!r}, and models with some of "
            "their heads removed are not supported; choose the model before pruning"
        )
    known = written.keys() | _HARMLESS | OWN_FIELDS | IN_CONFIG_JSON | aliases.keys()
    if unknown := sorted(name for name in described.keys() - known if described[name] is not None):
        logger.warning(
            "config.json has fields that are not known here: %s; they are written back as they "
            "are, and change nothing that the model computes here",
            ", ".join(unknown),
        )
    kept = {
        name: json.dumps(value)
        for name, value in described.items()
        if name not in _WRITTEN_ANYWAY and not (name in written and written[name] == value)
    }
    return tuple(sorted(kept.items()))


def with_kept(
    written: Mapping[str, Any],
    config: TransformerConfig,
    aliases: Mapping[str, str],
    read: Callable[[Mapping[str, Any]], TransformerConfig],
) -> dict[str, Any]:
    """The config.json that a family writes, with the ``hub_fields`` of the config.

    If the model is unchanged, all are written as they were. Otherwise the family's values win, and
    aliases follow them. ``read`` is
    the family's reader.
    """
    kept = {name: json.loads(text) for name, text in config.hub_fields}
    for name in kept:
        if name in aliases:
            kept[name] = written[aliases[name]]
        elif name in ("num_labels", "_num_labels"):
            kept[name] = len(written["id2label"])
    if kept and read({**written, **kept}) == read(written):
        return {**written, **kept}
    return {**kept, **written}
