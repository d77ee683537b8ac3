"""Small pipelines with random weights, of diffusers' and transformers' own classes, saved in the hub's format."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, QwenImagePipeline,
    QwenImageTransformer2DModel)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# What Qwen's template does to one message: thinking is left empty where it is not enabled.
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


def qwen_tokenizer(word: str = "") -> Qwen2Tokenizer:
    """Bytes without merges. word: one more token."""
    tokens = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:3]})
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
