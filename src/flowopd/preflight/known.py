"""Shapes of published models, from the config.json of their parts, for planning before anything is downloaded."""

from collections.abc import Mapping
from typing import Any

_SD3 = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "sample_size": 128,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM: Mapping[str, Any] = {
    **_SD3,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
"""Shapes of stabilityai/stable-diffusion-3.5-medium, from its transformer/config.json."""

SD35_LARGE: Mapping[str, Any] = {
    **_SD3,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
"""Shapes of stabilityai/stable-diffusion-3.5-large, from its transformer/config.json."""

SHIFTED = {"shift": 3.0, "num_train_timesteps": 1000}
"""The scheduler of Stable Diffusion 3.5, of Z-Image with another shift."""

_CLIP = {"max_position_embeddings": 77, "vocab_size": 49408}
_AROUND: Mapping[str, Mapping[str, Any]] = {  # the same in every model of the family, from their config.json
    "scheduler": SHIFTED,
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        **_CLIP,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        **_CLIP,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "text_encoder_3": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}
Z_IMAGE: Mapping[str, Any] = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
"""Shapes of Tongyi-MAI/Z-Image and of its Turbo."""

_QWEN3_4B: Mapping[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
_QWEN3_8B: Mapping[str, Any] = {**_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288}
QWEN_IMAGE: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
"""Shapes of Qwen/Qwen-Image."""

_QWEN_VL_7B: Mapping[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}
_QWEN_SHIFTED: Mapping[str, Any] = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}
FLUX_1: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""Shapes of black-forest-labs/FLUX.1-dev."""

FLUX_2_KLEIN_4B: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
"""Shapes of black-forest-labs/FLUX.2-klein-4B, and of its base."""

FLUX_2_KLEIN_9B: Mapping[str, Any] = {
    **FLUX_2_KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
"""Shapes of black-forest-labs/FLUX.2-klein-9B, and of its base."""

_FLUX_SHIFTED: Mapping[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
KNOWN: Mapping[str, Mapping[str, Mapping[str, Any]]] = (
    {
        f"stabilityai/stable-diffusion-3.5-{size}": {"transformer": transformer, **_AROUND}
        for size, transformer in {"medium": SD35_MEDIUM, "large": SD35_LARGE, "large-turbo": SD35_LARGE}.items()
    }
    | {
        f"Tongyi-MAI/{name}": {
            "transformer": Z_IMAGE,
            "vae": _AROUND["vae"],
            "scheduler": SHIFTED | {"shift": shift},
            "text_encoder": _QWEN3_4B,
        }
        for name, shift in {"Z-Image": 6.0, "Z-Image-Turbo": 3.0}.items()
    }
    | {
        f"Qwen/{name}": {
            "transformer": QWEN_IMAGE,
            "vae": {"base_dim": 96, "z_dim": 16, "temperal_downsample": [False, True, True]},
            "scheduler": _QWEN_SHIFTED,
            "text_encoder": _QWEN_VL_7B,
        }
        for name in ("Qwen-Image", "Qwen-Image-2512")
    }
    | {
        "black-forest-labs/FLUX.1-dev": {
            "transformer": FLUX_1,
            "vae": _AROUND["vae"],
            "scheduler": _FLUX_SHIFTED,
            "text_encoder": _AROUND["text_encoder"],
            "text_encoder_2": _AROUND["text_encoder_3"],
        }
    }
    | {
        f"black-forest-labs/FLUX.2-klein-{name}": {
            "transformer": FLUX_2_KLEIN_9B if "9B" in name else FLUX_2_KLEIN_4B,
            "vae": {"block_out_channels": [128, 256, 512, 512]},
            "scheduler": _FLUX_SHIFTED,
            "text_encoder": _QWEN3_8B if "9B" in name else {**_QWEN3_4B, "tie_word_embeddings": True},
        }
        for name in ("4B", "base-4B", "9B", "base-9B")
    }
)
"""Configs by part, for planning before anything is downloaded."""
