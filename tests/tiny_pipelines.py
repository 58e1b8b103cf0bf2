"""Pipelines of diffusers' own classes with tiny random networks, and tiny text encoders with tokenizers of letters."""

from __future__ import annotations

import diffusers
import pytest
import torch

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def vae(channels=4):
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    )


def unconditional(pipeline, scheduler):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return pipeline(unet, scheduler)


def conditional_unet(**options):
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        **options,
    )


def stable_diffusion(pipeline, scheduler, text=None):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    parts = {
        "vae": vae(),
        "unet": conditional_unet(),
        **(text or {"text_encoder": None, "tokenizer": None}),
        "scheduler": scheduler,
    }
    return pipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sdxl(pipeline, scheduler, text=None):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=6 * 2 + 8,
        use_linear_projection=True,
    )
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return pipeline(vae=vae(), unet=unet, scheduler=scheduler, **(text or dict.fromkeys(names)))


def dit(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return diffusers.DiTPipeline(transformer.eval(), vae().eval(), scheduler)


def sd3(pipeline, scheduler, text=None):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return pipeline(transformer=transformer, vae=vae(), scheduler=scheduler, **(text or dict.fromkeys(NAMES)))


def flux(scheduler, text=None, *, distilled=False):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[2, 2, 4],
        guidance_embeds=distilled,
    )
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return diffusers.FluxPipeline(transformer=transformer, vae=vae(), scheduler=scheduler, **(text or dict.fromkeys(names)))


def controlled(scheduler):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = conditional_unet()
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    for parameter in control.controlnet_down_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {"vae": vae(), "unet": unet, "controlnet": control, "text_encoder": None, "tokenizer": None, "scheduler": scheduler}
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def image_to_video(scheduler):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    decoder = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4, sample_size=16
    )
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        intermediate_size=8,
        patch_size=8,
    )
    encoder = transformers.CLIPVisionModelWithProjection(config)
    reader = transformers.CLIPImageProcessor(crop_size=16, size=16)
    return diffusers.StableVideoDiffusionPipeline(decoder, encoder, unet, scheduler, reader)


def video(scheduler, text=None):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 0.9, 1.1, 0.8],
    )
    parts = text or {"tokenizer": None, "text_encoder": None}
    return diffusers.WanPipeline(**parts, vae=decoder, scheduler=scheduler, transformer=transformer)


# ---- text --------------------------------------------------------------------------------------------------------------------------

LETTERS = [chr(code) for code in range(33, 127)]
LENGTH = 16


def clip_tokenizer():
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=LENGTH)


def clip(width, *, projection=None):
    """A text encoder of this width, with a projection to that width if there is one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        **({} if projection is None else {"projection_dim": projection}),
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()


def t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def t5(*, multilingual=False):
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    options = {"vocab_size": len(LETTERS) + 4, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return (UMT5EncoderModel(UMT5Config(**options)) if multilingual else T5EncoderModel(T5Config(**options))).eval()


def text_parts(family):
    """Tokenizers and encoders for one of the pipelines above, with random weights that tell prompts apart."""
    torch.manual_seed(1)
    made = {
        "stable_diffusion": lambda: {"tokenizer": clip_tokenizer(), "text_encoder": clip(8)},
        "sdxl": lambda: {
            "tokenizer": clip_tokenizer(),
            "text_encoder": clip(4),
            "tokenizer_2": clip_tokenizer(),
            "text_encoder_2": clip(4, projection=8),
        },
        "sd3": lambda: {
            "tokenizer": clip_tokenizer(),
            "text_encoder": clip(4, projection=4),
            "tokenizer_2": clip_tokenizer(),
            "text_encoder_2": clip(4, projection=4),
            "tokenizer_3": t5_tokenizer(),
            "text_encoder_3": t5(),
        },
        "flux": lambda: {
            "tokenizer": clip_tokenizer(),
            "text_encoder": clip(8),
            "tokenizer_2": t5_tokenizer(),
            "text_encoder_2": t5(),
        },
        "video": lambda: {"tokenizer": t5_tokenizer(), "text_encoder": t5(multilingual=True)},
    }[family]()
    for part in made.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    return made
