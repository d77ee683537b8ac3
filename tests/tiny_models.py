"""Small pipelines with random weights, of diffusers' and transformers' own classes, saved in the hub's format."""

import importlib.util
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, DiffusionPipeline, FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel, QwenImagePipeline, QwenImageTransformer2DModel,
    ZImagePipeline, ZImageTransformer2DModel)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config, Mistral3ForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer,
    Qwen3Config, Qwen3ForCausalLM)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# What Qwen's template does to one message: thinking is left empty where it is not enabled.
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


def qwen_tokenizer(word: str = "") -> Qwen2Tokenizer:
    """Bytes without merges. word: one more token."""
    tokens = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.add_tokens([word] if word else [])
    tokenizer.chat_template = CHAT
    return tokenizer


def save_pipeline(pipe: DiffusionPipeline, directory: Path, louder: tuple[str, ...]) -> str:
    """Save it, with those of the transformer's matrices made three times as large: text and time then matter."""
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if parameter.ndim == 2 and any(word in name for word in louder):
                parameter *= 3
    pipe.save_pretrained(directory)
    return str(directory)


def save_qwen_image(directory: Path) -> str:
    torch.manual_seed(0)
    # The pipeline drops 34 tokens, its instruction to the language model, so here too it has as many.
    instruction = "color, shape, size, texture, quantity, text, spatial relationships of the objects and background:"
    tokenizer = qwen_tokenizer("e by detailing the " + instruction)
    encoder = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, max_position_embeddings=2048, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32))
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1])
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=128, max_shift=0.9, shift_terminal=0.02)
    return save_pipeline(QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=Qwen2_5_VLForConditionalGeneration(encoder).eval(),
        tokenizer=tokenizer, transformer=transformer), directory, ("txt_in",))


def flux2_parts(guidance_embeds: bool) -> dict:
    """The autoencoder, whose batch norm has seen something, the network and the scheduler."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 3)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds)
    return dict(vae=vae, transformer=transformer,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))


SMALL_ENCODER = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                     max_position_embeddings=2048, bos_token_id=0, eos_token_id=0)


def save_flux2_klein(directory: Path, is_distilled: bool = False) -> str:
    """Its language model has 28 layers, because the pipeline takes the hidden states of layers 9, 18 and 27."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(**SMALL_ENCODER, num_hidden_layers=28, vocab_size=len(tokenizer))).eval()
    return save_pipeline(Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, is_distilled=is_distilled,
                                            **flux2_parts(guidance_embeds=False)), directory, ("context_embedder",))


def save_flux2_dev(directory: Path) -> str:
    """Its tokenizer is the hub's PixtralProcessor. Without torchvision, which that needs, the tokenizer in it stands for it."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(SYSTEM_MESSAGE)
    tokenizer.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}"
                               "{% endfor %}")
    processor = tokenizer
    if importlib.util.find_spec("torchvision"):
        from transformers import PixtralImageProcessor, PixtralProcessor
        processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=tokenizer.chat_template)
    text = dict(SMALL_ENCODER, model_type="mistral", num_hidden_layers=30, vocab_size=len(tokenizer))
    vision = dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                  image_size=32, patch_size=16)
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("[IMG]")))
    return save_pipeline(Flux2Pipeline(text_encoder=encoder.eval(), tokenizer=processor, **flux2_parts(True)), directory,
                         ("context_embedder", "guidance_embedder"))


def save_z_image(directory: Path) -> str:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(**SMALL_ENCODER, num_hidden_layers=3, vocab_size=len(tokenizer))).eval()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.5, shift_factor=0.1)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64])
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return save_pipeline(ZImagePipeline(
        text_encoder=encoder, tokenizer=tokenizer, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0)), directory, ("cap_embedder",))
