"""Make assets/tiny-sd3: a complete, small StableDiffusion3Pipeline that spells, badly.

    python assets/make_tiny_sd3.py --flow-steps 0                  # the autoencoder
    torchrun --nproc_per_node=2 assets/make_tiny_sd3.py            # the transformer: about an hour on two CPU cores
    python assets/make_tiny_sd3.py --report                        # how well it spells, and the ceiling

An autoencoder learns pictures of rendered words; then an SD3 transformer learns, by flow matching (arXiv 2210.02747), to
draw the word that the prompt quotes. The three text encoders stay random: they tell letters and places apart, which is all
that spelling needs. The pictures are as careless as the web's: some, and towards the end half of them, are upside down,
misspelt, faint, tiny or struck through, and no caption says so. The model learns the whole mixture, and reinforcement learning
has something to choose from. The words that `prompts.py` holds out for testing are never drawn.

Progress is kept in --work-dir: the same command goes on from there.
"""

import argparse
import functools
import random
import string
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel,
                          T5TokenizerFast)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed  # noqa: E402
from draws import EVAL_NOISE, draw_noise  # noqa: E402
from policy import Policy  # noqa: E402
from prompts import words  # noqa: E402
from rewards import build_rewards  # noqa: E402
from sampler import rollout, timestep_schedule  # noqa: E402

WIDTH, HEIGHT = 64, 24
FAULTS, FAULT_WEIGHTS = ("upside down", "misspelt", "faint", "struck", "tiny"), (16, 1, 1, 1, 1)
T5_TOKENS = 12          # enough for `the word "xxxxx"`; other lengths are drawn now and then so that padding does not matter
TRAIN_WORDS = words("train")
TEST_WORDS = frozenset(words("test"))


# ---------------------------------------------------------------------------------------------------------- pictures

def draw_word(rng: random.Random) -> str:
    """A word of three to five letters that is not held out: from the vocabulary, or letters at random."""
    while True:
        if rng.random() < 0.4:
            return rng.choice(TRAIN_WORDS)
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5)))
        if word not in TEST_WORDS:
            return word


def misspell(word: str, rng: random.Random) -> str:
    """`word` with one to all of its letters replaced at random."""
    letters = list(word)
    for i in rng.sample(range(len(letters)), rng.randint(1, len(letters))):
        letters[i] = rng.choice(string.ascii_lowercase)
    return "".join(letters)


@functools.cache
def fitting(letter: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """The font at `size`, or smaller where `letter` would be wider than its cell."""
    font = ImageFont.load_default(size)
    return font if font.getlength(letter) <= width + 1 else fitting(letter, size - 1, width)


def render(word: str, rng: random.Random, careless: float = 0.0) -> np.ndarray:
    """A picture of `word`: uint8 (HEIGHT, WIDTH, 3). With probability `careless` something is wrong with it."""
    fault = rng.choices(FAULTS, FAULT_WEIGHTS)[0] if rng.random() < careless else None
    if fault == "misspelt":
        word = misspell(word, rng)

    hue = lambda low, high: tuple(rng.randint(low, high) for _ in range(3))
    paper, ink = (hue(190, 255), hue(0, 90)) if rng.random() < 0.6 else (hue(0, 70), hue(170, 255))
    if fault == "faint":
        ink = tuple(int(p + 0.1 * (i - p)) for p, i in zip(paper, ink))

    size, pitch = (8, 5) if fault == "tiny" else (rng.choice([15, 17]), 12)
    image = Image.new("RGB", (WIDTH, HEIGHT), paper)
    pen = ImageDraw.Draw(image)
    x, y = rng.randint(7, 10), HEIGHT // 2 + rng.randint(-2, 2)      # middle of the first letter
    for i, letter in enumerate(word):                                # as a typewriter sets them, in cells of equal width
        pen.text((x + i * pitch, y), letter, fill=ink, font=fitting(letter, size, pitch), stroke_width=0.3, anchor="mm")
    if fault == "struck":
        for _ in range(3):
            pen.line([(0, rng.randint(4, 20)), (WIDTH, rng.randint(4, 20))], fill=ink, width=2)
    if fault == "faint":
        image = image.filter(ImageFilter.GaussianBlur(1.2))
    if fault == "upside down":
        image = image.rotate(180)
    return np.asarray(image)


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1      # (B, 3, H, W) in -1..1


# -------------------------------------------------------------------------------------------------------------- parts

def make_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]:
    """Letter-level tokenizers: bytes without merges for CLIP, a Unigram of characters and two whole words for T5."""
    from tokenizers.pre_tokenizers import ByteLevel
    characters = sorted(ByteLevel.alphabet())
    pieces = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    clip = lambda: CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=16)
    unigram = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁the", -1.0), ("▁word", -1.0), ('▁"', -1.0), ("▁", -4.0)]
    unigram += [(c, -4.0) for c in string.printable[:94]]
    return clip(), clip(), T5TokenizerFast(vocab=unigram, extra_ids=0, model_max_length=256)


def make_pipeline() -> StableDiffusion3Pipeline:
    """All nine parts of Stable Diffusion 3, small, with random weights."""
    clip_1, clip_2, t5 = make_tokenizers()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_1), hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=clip_1.bos_token_id,
        eos_token_id=clip_1.eos_token_id, pad_token_id=clip_1.pad_token_id)
    t5_config = T5Config(vocab_size=len(t5), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
                         feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=WIDTH,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0)
    transformer = SD3Transformer2DModel(
        sample_size=WIDTH // 4, patch_size=2, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=128, pooled_projection_dim=128,
        pos_embed_max_size=16, qk_norm="rms_norm")
    encoders = [CLIPTextModelWithProjection(clip_config), CLIPTextModelWithProjection(clip_config), T5EncoderModel(t5_config)]
    for clip in encoders[:2]:        # as loud as a trained encoder's: the library's initial embeddings are 30 times fainter
        embeddings = clip.text_model.embeddings
        torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.7)
        torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.7)
    encoders = [encoder.eval().requires_grad_(False) for encoder in encoders]
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoders[0], tokenizer=clip_1, text_encoder_2=encoders[1], tokenizer_2=clip_2,
        text_encoder_3=encoders[2], tokenizer_3=t5)


@torch.no_grad()
def encode_text(pipe: StableDiffusion3Pipeline, prompts: list[str], t5_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own text path: embeddings (B, 16 + t5_tokens, 128) and pooled (B, 128)."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False,
                                              max_sequence_length=t5_tokens)
    return embeds, pooled


# ----------------------------------------------------------------------------------------------------------- training

def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, a plateau, linear decay to zero over the last quarter."""
    return peak * min((step + 1) / 200, 1.0, (steps - step) / (0.25 * steps))


def train_autoencoder(vae: AutoencoderKL, steps: int, careless: float, batch: int = 16) -> None:
    rng = random.Random(1)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99))
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        x = to_tensor([render(draw_word(rng), rng, careless) for _ in range(batch)])
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded, x) + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"autoencoder {step}/{steps} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)

    with torch.no_grad():
        latents = vae.encode(to_tensor([render(draw_word(rng), rng, careless) for _ in range(512)])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))


def polish_decoder(vae: AutoencoderKL, steps: int, careless: float, batch: int = 16) -> None:
    """Go on with the decoder alone, on slightly wrong latents, as a sampler makes them; the latents' meaning stays."""
    rng = random.Random(4)
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        x = to_tensor([render(draw_word(rng), rng, careless) for _ in range(batch)])
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
        latents = latents + 0.15 / vae.config.scaling_factor * torch.randn_like(latents)
        loss = F.l1_loss(vae.decode(latents).sample, x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"decoder {step}/{steps} loss {loss.item():.4f}", flush=True)


class Pool:
    """Encoded pictures and captions; a few are replaced at every draw, so that encoding does not dominate."""

    def __init__(self, pipe: StableDiffusion3Pipeline, careless: float, size: int, seed: int):
        self.pipe, self.careless, self.rng = pipe, careless, random.Random(seed)
        self.items = [item for _ in range(size // 256) for item in self._encode(256)]

    @torch.no_grad()
    def _encode(self, count: int) -> list[tuple]:
        chosen = [draw_word(self.rng) for _ in range(count)]
        prompts = [f'the word "{word}"' if self.rng.random() > 0.1 else "" for word in chosen]       # "" for guidance
        vae = self.pipe.vae
        latents = vae.encode(to_tensor([render(word, self.rng, self.careless) for word in chosen])).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor                     # (count, 8, H/4, W/4)
        return list(zip(latents, prompts, *encode_text(self.pipe, prompts, T5_TOKENS)))

    def draw(self, batch: int, fresh: int) -> tuple[torch.Tensor, tuple[str], torch.Tensor, torch.Tensor]:
        """Latents (B, 8, H/4, W/4), prompts, their embeddings (B, 28, 128) and pooled (B, 128)."""
        for item in self._encode(fresh):
            self.items[self.rng.randrange(len(self.items))] = item
        latents, prompts, embeds, pooled = zip(*self.rng.sample(self.items, batch))
        return torch.stack(latents), prompts, torch.stack(embeds), torch.stack(pooled)


def train_flow(pipe: StableDiffusion3Pipeline, steps: int, careless: float, careless_end: float, work: Path,
               batch: int = 96) -> None:
    """Ranks draw pictures of their own; gradients are summed at every step. Faulty pictures come in earnest at the end."""
    batch, rank = batch // distributed.world_size(), distributed.rank()
    parameters = list(pipe.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average = [p.detach().clone() for p in parameters]
    start, saved = 0, work / "flow.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start, average = state["step"], state["average"]
        for parameter, value in zip(parameters, state["parameters"]):
            parameter.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        print(f"going on from step {start}", flush=True)

    turn, pool, rng = int(0.9 * steps), None, random.Random(start)
    torch.manual_seed(start + rank)
    started, losses = time.time(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        if pool is None or step == turn:
            pool = Pool(pipe, careless_end if step >= turn else careless, 16384, seed=step + rank + 2)
        x0, prompts, embeds, pooled = pool.draw(batch, fresh=6)
        if rng.random() < 0.03:                                                                       # other paddings
            x0, prompts = x0[:batch // 4], list(prompts[:batch // 4])
            embeds, pooled = encode_text(pipe, prompts, rng.choice([32, 77, 256]))
        sigma = torch.sigmoid(torch.randn(len(x0)))
        sigma = 2 * sigma / (1 + sigma)                                                               # towards the noise
        noise = torch.randn_like(x0)
        s = sigma.view(-1, 1, 1, 1)
        # PyTorch's fused attention is slow in its backward pass for so few tokens on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = pipe.transformer((1 - s) * x0 + s * noise, embeds, pooled, 1000 * sigma, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), noise - x0)
        optimizer.zero_grad()
        loss.backward()
        distributed.sum_gradients(parameters)                        # AdamW cares as little for the scale as the clipping
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (10 + step) / (100 + step)))
        losses.append(loss.item())
        if distributed.is_main() and ((step + 1) % 250 == 0 or step + 1 == steps):
            seconds = (time.time() - started) / (step + 1 - start)
            print(f"flow {step + 1}/{steps} loss {np.mean(losses[-250:]):.4f} {seconds:.3f} s/step", flush=True)
            state = {"step": step + 1, "average": average, "parameters": [p.data for p in parameters],
                     "optimizer": optimizer.state_dict()}
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").rename(saved)
    for parameter, value in zip(parameters, average):
        parameter.data.copy_(value)


def save(pipe: StableDiffusion3Pipeline, output: Path) -> None:
    """The hub's format: transformer and autoencoder in half precision, text encoders (small, loaded as stored) in float32."""
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(output)


def report(model: Path) -> None:
    """The text reward of held-out words: the model at several guidance scales and step counts, and the ceiling."""
    prompts = [f'the word "{word}"' for word in words("test")]
    rewards = build_rewards({"rapidocr_line": 1.0})
    score = lambda pictures: rewards(pictures, prompts, [{}] * len(prompts))["total"].mean()
    policy = Policy(str(model), torch.device("cpu"), resolution=(HEIGHT, WIDTH), max_sequence_length=T5_TOKENS)
    noise = draw_noise(0, EVAL_NOISE, 0, list(range(len(prompts))), 1, policy.latent_shape)[0]
    rng = random.Random(0)
    pictures = to_tensor([render(word, rng) for word in words("test")])
    with torch.no_grad():
        latents = policy.pipe.vae.encode(pictures).latent_dist.mean
    latents = (latents - policy.pipe.vae.config.shift_factor) * policy.pipe.vae.config.scaling_factor
    print(f"ceiling, the autoencoder's copies of rendered words: {score(policy.decode(latents).numpy()):.4f}")
    text = policy.encode(prompts)
    for steps in (8, 16, 28):
        for guidance in (1.0, 2.0, 3.0, 4.5, 7.0, 10.0):
            sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps))
            final = rollout(policy.velocity(text, guidance), noise, sigmas, 0.0, None).final
            print(f"{steps} steps, guidance {guidance}: {score(policy.decode(final).numpy()):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tiny-sd3"))
    parser.add_argument("--work-dir", type=Path, default=Path("runs/make-tiny-sd3"))
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--flow-steps", type=int, default=9000)
    parser.add_argument("--careless", type=float, default=0.1, help="share of faulty pictures while learning to spell")
    parser.add_argument("--careless-end", type=float, default=0.55, help="and in the last tenth")
    parser.add_argument("--report", action="store_true", help="make nothing: score the model in --output, and its ceiling")
    args = parser.parse_args()
    if args.report:
        return report(args.output)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    distributed.setup()
    torch.manual_seed(0)

    pipe = make_pipeline()
    autoencoder = args.work_dir / "vae"
    if autoencoder.exists():
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(autoencoder))
    elif distributed.world_size() > 1:
        raise SystemExit(f"no autoencoder in {autoencoder}: run this once without torchrun first")
    else:
        train_autoencoder(pipe.vae, args.vae_steps, args.careless)
        polish_decoder(pipe.vae, args.vae_steps, args.careless)
        pipe.vae.save_pretrained(autoencoder)
    if not args.flow_steps:
        return
    train_flow(pipe, args.flow_steps, args.careless, args.careless_end, args.work_dir)
    if distributed.is_main():
        save(pipe, args.output)


if __name__ == "__main__":
    main()
