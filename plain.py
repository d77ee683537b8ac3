"""Flow-GRPO (arXiv 2505.05470) on one page, one image and one denoising step at a time: python plain.py
Time runs from sigma = 1 (noise) to sigma = 0 (data): x_sigma = (1 - sigma) x_0 + sigma eps, v = eps - x_0.
Departures from the paper: a group shares its steps before a window, and the window alone is stochastic and
trained, because first steps would learn one background for all (with WINDOW, FIRST = 7, (0, 0) they do);
the epoch's standard deviation divides advantages, as in the authors' code; there is no guidance."""
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from tqdm import tqdm
from rewards import build_rewards

SEED, EPOCHS, GROUPS, K, UPDATES = 1, 9, 24, 8, 4    # of an epoch: prompts, samples of each, updates
T, WINDOW, FIRST = 8, 3, (2, 4)      # denoising steps; stochastic, trained ones; bounds of the first of these
NOISE_LEVEL, CLIP_RANGE, BETA = 0.9, 2e-3, 0.0       # a of eq. 9, e of eq. 5, weight of eq. 10 (0: left out)
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM, LATENT = 1.2e-3, 1e-4, 1.0, (1, 8, 6, 16)      # LATENT: 1 C H W
LAYERS = r"transformer_blocks.+(to_[qkv]|_out\.0|add_out|proj|net\.2|linear)"     # the blocks' linear layers
WORDS = """seed pace moth news kiwi hand toad knit cart mind onyx inch diary feast fever fact room fizz tax
    nab brisk rice fed dial oar five flex wig quick jelly foot hood ewe open dome topic villa gold zoo quad
    door ivy not fold herb yawn boat upon pub ark level quiet fun mail work pan hawk age jar spa white veil
    surf igloo led axe face motor brush goal pony ash tutor metal cook slice wand toxic plum got""".split()
# Stable Diffusion 3's schedule is an even grid, shifted by sigma -> 3 sigma / (1 + 2 sigma).
SIGMAS = [3 * sigma / (1 + 2 * sigma) for sigma in np.linspace(1, 3e-3 / 1.002, T).tolist()] + [0.0]  # T + 1

def load(dtype=torch.float32):
    """The pipeline with an adapter, and its optimizer. The network with its adapter off is the reference."""
    torch.manual_seed(SEED)
    pipe = StableDiffusion3Pipeline.from_pretrained("assets/tiny-sd3", dtype=dtype)
    lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=LAYERS)
    pipe.transformer = get_peft_model(pipe.transformer, lora)               # this freezes all other weights
    return pipe, torch.optim.AdamW(pipe.transformer.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

def encode(pipe, prompt):                                                   # (1, L, D), pooled (1, P)
    return pipe.encode_prompt(*[prompt] * 3, do_classifier_free_guidance=False, max_sequence_length=12)[::2]

def policy(pipe, text, x, k, a):
    """The Gaussian of step k from latents x (1, C, H, W) to x'. With a = 0, its mean is the ODE's step."""
    sigma, D = SIGMAS[k], SIGMAS[k] - SIGMAS[k + 1]
    v = pipe.transformer(x, *text, torch.tensor([1000 * sigma], dtype=x.dtype), return_dict=False)[0]
    # s = a sqrt(sigma / (1 - sigma)), with the second sigma below at sigma = 1, because s diverges there
    s = a * (sigma / (1 - (SIGMAS[1] if k == 0 else sigma))) ** 0.5
    # mean = x (1 - s^2 D / (2 sigma))
    #      - v (1 + s^2 (1 - sigma) / (2 sigma)) D     (eq. 9)
    mean = (x * (1 - s**2 * D / (2 * sigma))
            - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * D)
    return torch.distributions.Normal(mean, s * D**0.5, validate_args=False)

def finish(pipe, text, x, first):
    """The image (1, 24, 64, 3) that the ODE's steps from `first` on, and the decoder, make of latents x."""
    for k in range(first, T):
        x = policy(pipe, text, x, k, a=0).mean
    x = pipe.vae.decode(x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample / 2 + 0.5
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()

def epoch(pipe, optimizer, reward, prompts, first_steps, starts, noise):
    """The mean reward. prompts, first_steps: G. starts: (G, 1, C, H, W). noise: (G, K, S, 1, C, H, W)."""
    samples, r = [], []
    for prompt, first, start, eps in zip(tqdm(prompts, "sample", leave=False), first_steps, starts, noise):
        with torch.no_grad():
            text, images = encode(pipe, prompt), []
            for k in range(first):                      # The group shares the ODE's steps before its window.
                start = policy(pipe, text, start, k, a=0).mean
            # Each sample takes stochastic steps of its own, because only these have log-probs.
            for i in range(K):
                x, steps = start, []
                for k in range(first, first + WINDOW):
                    pi = policy(pipe, text, x, k, NOISE_LEVEL)
                    x_next = pi.mean + pi.stddev * eps[i, k - first]
                    steps.append((k, x, x_next, pi.log_prob(x_next).mean()))         # averaged over C H W
                    x = x_next
                images.append(finish(pipe, text, x, first + WINDOW))
                samples.append((text, steps))
        r.append(reward(np.concatenate(images), [prompt] * K, [{}] * K)["total"])   # (K), 1 - edits / letters
    # A = (r - mean(r of the group)) / (std(r) + 1e-4)     (eq. 4)
    r = torch.tensor(np.stack(r), dtype=torch.float64)      # (G, K)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)).clamp(-5, 5).flatten().float()
    # Each update replays the steps of its share of the samples with gradients, which add up.
    for update in range(UPDATES):
        mine = list(zip(samples, A))[update::UPDATES]
        for (text, steps), A_i in tqdm(mine, "update", leave=False):
            for k, x, x_next, old_log_prob in steps:
                pi = policy(pipe, text, x, k, NOISE_LEVEL)
                # rho = pi(x' | x) / pi_old(x' | x)
                rho = (pi.log_prob(x_next).mean() - old_log_prob).exp()
                # loss = max(-A rho, -A clip(rho, 1 - e, 1 + e))     (eq. 5)
                loss = torch.maximum(-A_i * rho, -A_i * rho.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
                if BETA:
                    with torch.no_grad(), pipe.transformer.disable_adapter():
                        reference = policy(pipe, text, x, k, NOISE_LEVEL)
                    # KL = mean((mean - mean_ref)^2) / (2 std^2)     (eq. 10)
                    loss = loss + BETA * ((pi.mean - reference.mean) ** 2 / (2 * pi.variance)).mean()
                (loss / (len(mine) * WINDOW)).backward()
        torch.nn.utils.clip_grad_norm_(pipe.transformer.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return r.mean().item()

@torch.no_grad()
def evaluate(pipe, reward):                                 # the last 32 words, held out, from the same noise
    prompts, g = [f'the word "{word}"' for word in WORDS[-32:]], torch.Generator().manual_seed(0)
    images = [finish(pipe, encode(pipe, prompt), torch.randn(LATENT, generator=g), 0) for prompt in prompts]
    return reward(np.concatenate(images), prompts, [{}] * 32)["total"].mean(), np.concatenate(images)

def main():
    torch.set_num_threads(1)                                                # one image is too small to share
    (pipe, optimizer), reward = load(), build_rewards({"rapidocr_line": 1.0})
    score, before = evaluate(pipe, reward)
    for _ in (bar := tqdm(range(EPOCHS), f"held-out score {score:.3f}; epochs")):
        prompts = [f'the word "{WORDS[i]}"' for i in torch.randperm(len(WORDS) - 32)[:GROUPS]]
        first_steps = torch.randint(FIRST[0], FIRST[1] + 1, (GROUPS,)).tolist()
        starts, noise = torch.randn(GROUPS, *LATENT), torch.randn(GROUPS, K, WINDOW, *LATENT)
        bar.write(f"reward {epoch(pipe, optimizer, reward, prompts, first_steps, starts, noise):.3f}")
    trained, after = evaluate(pipe, reward)
    print(f"held-out score: {score:.3f} before training, {trained:.3f} after. plain.png shows both.")
    pairs = np.pad(np.concatenate([before, after], 1), ((0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
    Image.fromarray(pairs.reshape(-1, 8, 52, 68, 3).swapaxes(1, 2).reshape(-1, 8 * 68, 3)).save("plain.png")

if __name__ == "__main__":
    main()
