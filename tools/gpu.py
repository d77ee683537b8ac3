"""What only a GPU can show, proved on one within ten minutes and without a network.

    python -m tools.gpu [--only NAME ...] [--out DIR] [--limit SECONDS]
    python -m tools.gpu --smoke      on a CPU, with the bundled model: shows that this program itself works

Sections run in the order of what they are worth. One is skipped if less time is left than it needs, and the
last line says how to run it. Results are printed as they come and kept in DIR/gpu.json, beside those that
other sections had there, and what the trainers said in DIR/logs.txt. The large models have random weights.
"""

import argparse
import collections
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import distributed
from config import PRESETS
from harness.batches import choose_batches
from harness.program import run_as_program
from pipelines import check_model
from policy import Policy, to_device, to_host
from prompts import load_prompts
from sampler import Trajectory, replay, rollout, timestep_schedule
from tools.floor import PIECES, network_calls, synchronize
from tools.measure import Check, make_policy, network_speed

SECTIONS: dict[str, tuple[float, Callable]] = {}           # name -> seconds that it needs, what it does
# The lines of a trainer that are noted.
SPOKEN = ("before the first update", "warning", "error", "epoch ", "eval/total", "continuing", "to go on")


def section(name: str, needs: float) -> Callable:
    def add(function: Callable) -> Callable:
        SECTIONS[name] = needs, function
        return function
    return add


# ---- the machine -------------------------------------------------------------------------------------------

@section("machine", 5)
def machine(check: Check, name: str) -> None:
    on_gpu = check.device.type == "cuda"
    check.note(name, device=torch.cuda.get_device_name() if on_gpu else "CPU", torch=torch.__version__,
               cudnn=torch.backends.cudnn.version(), nccl=str(torch.cuda.nccl.version()) if on_gpu else None,
               diffusers=diffusers.__version__, transformers=transformers.__version__, peft=peft.__version__)
    ones = [torch.nn.Parameter(torch.ones(5, device=check.device)) for _ in range(2)]
    distributed.broadcast_parameters(ones)
    distributed.sum_gradients(ones)
    check.note(name, sum_of_gradients=[p.grad.sum().item() for p in ones],
               objects=distributed.gather_objects("a"))


# ---- the laws, on a full network ---------------------------------------------------------------------------

def largest_deviation(policy: Policy, trajectory: Trajectory, prompts: list[str], guidance: float,
                      samples: list[int], grad: bool = True) -> float:
    """The largest |ratio - 1| at the first, middle and last trained step, in a batch of these samples."""
    velocity = policy.velocity(policy.encode([prompts[i] for i in samples]), guidance)

    def deviation(step: int) -> float:           # a function, so that its graph is freed before the next
        rows = trajectory.rows(step, samples)
        with torch.set_grad_enabled(grad):
            log_prob, _, _ = replay(velocity, rows)
        return (log_prob.detach() - rows.log_prob).expm1().abs().max().item()

    steps = len(trajectory.log_probs)
    return max(map(deviation, {0, steps // 2, steps - 1}))


def sample(check: Check, policy: Policy, images: int, steps: int, trained: int,
           guidance: float) -> tuple[Callable[[], Trajectory], list[str]]:
    """A function that draws the same images whenever it is called, and their prompts."""
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    prompts = [f'the word "{words[i % len(words)]}"' for i in range(images)]
    sigmas = timestep_schedule(steps, **policy.schedule_arguments(steps), dtype=policy.compute_dtype)
    noise = torch.randn(steps + 1, images, *policy.latent_shape, generator=torch.Generator().manual_seed(1),
                        dtype=policy.compute_dtype)
    noise = to_device(noise, check.device)

    def draw() -> Trajectory:
        velocity = policy.velocity(policy.encode(prompts), guidance)
        return rollout(velocity, noise[0], sigmas, 0.7, noise[1:], rule="flow_sde", num_trained=trained)

    return draw, prompts


def check_laws(check: Check, name: str, dtype: str, sampling: dict,
               network: dict) -> tuple[Policy, Trajectory, list[str]]:
    """Ratios with other kernels and batches; repetition; the reference; decoding; copies between threads."""
    policy, images, guidance = make_policy(check, dtype, **network), sampling["images"], sampling["guidance"]
    weights = sum(p.numel() for p in policy.pipe.transformer.parameters())
    check.note(name, loaded=round(time.time() - check.started), weights=weights)
    draw, prompts = sample(check, policy, **sampling)
    everyone, transformer = list(range(images)), policy.pipe.transformer
    for cudnn in (False,) if check.smoke else (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        memory, _ = check.peak(draw)
        seconds, trajectory = check.timed(draw)

        def deviation(samples: list[int], grad: bool = True) -> float:
            return largest_deviation(policy, trajectory, prompts, guidance, samples, grad)

        found = {"finite": bool(trajectory.final.isfinite().all()), "rollout s": round(seconds, 2),
                 "peak GiB": memory, "same batch": deviation(everyone),
                 "without gradients": deviation(everyone, False), "reversed": deviation(everyone[::-1]),
                 "half of it": deviation(everyone[:images // 2]), "one image": deviation(everyone[:1])}
        if not network.get("gradient_checkpointing"):
            transformer.enable_gradient_checkpointing()
            found["checkpointed"] = deviation(everyone)
            transformer.disable_gradient_checkpointing()
        check.note(name, **{f"max |ratio - 1|, cuDNN's attention {'on' if cudnn else 'off'}": found})
        check.require(name, "the ratio of the same batch is exactly 1", cudnn or found["same batch"] == 0)

    fresh = fresh_adapter_is_the_reference(policy, trajectory, prompts, guidance)
    check.note(name, rollout_repeats=torch.equal(draw().final, trajectory.final),
               fresh_adapter_is_the_reference=fresh)
    memory, pictures = check.peak(lambda: policy.decode(trajectory.final))
    seconds, _ = check.timed(lambda: policy.decode(trajectory.final), 3)
    check.note(name, decode_seconds_an_image=round(seconds / images, 4), decode_peak_gib=memory,
               copies_that_arrived_wrong=count_wrong_copies(pictures))
    return policy, trajectory, prompts


def fresh_adapter_is_the_reference(policy: Policy, trajectory: Trajectory, prompts: list[str],
                                   guidance: float) -> bool:
    """Whether the network with an adapter of zeros and the one without it compute the same bits."""
    kept = {p: p.detach().clone() for name, p in policy.network.named_parameters() if "lora_B" in name}
    for p in kept:
        p.data.zero_()
    text, x = policy.encode(prompts), trajectory.latents[0]
    sigma = trajectory.sigmas[0].expand(len(x))
    with torch.no_grad():
        velocity = policy.velocity(text, guidance)(x, sigma)
        same = torch.equal(velocity, policy.reference_velocity(text, guidance)(x, sigma))
    for p, value in kept.items():
        p.data.copy_(value)
    return same


def count_wrong_copies(pictures: Tensor, times: int = 20) -> int:
    """How many copies to the host are wrong that another thread waits for while this one goes on."""
    wrong = 0
    for _ in range(times):
        wait_for_copies, arrived = to_host(pictures), []
        thread = threading.Thread(target=lambda: arrived.extend(wait_for_copies()))
        thread.start()
        pictures.add(1)
        torch.randn(2**24, device=pictures.device)
        thread.join()
        wrong += not torch.equal(arrived[0], pictures.cpu())
    return wrong


@section("sd35m float16", 120)
def sd35m_float16(check: Check, name: str) -> None:
    policy, trajectory, prompts = check_laws(check, name, "float16", check.sampling, check.network)
    guidance, on_cpu = check.sampling["guidance"], check.smoke
    network_speed(check, name, policy, guidance, (1, 2) if on_cpu else (1, 2, 4, 8, 12, 16))
    policy.pipe.transformer.enable_gradient_checkpointing()
    network_speed(check, f"{name}, checkpointed", policy, guidance, (2,) if on_cpu else (8, 32))
    policy.pipe.transformer.disable_gradient_checkpointing()
    sizes = dict(groups_per_epoch=2, group_size=4) if on_cpu else {}
    config = replace(PRESETS["tiny_ocr" if on_cpu else "sd35m_ocr"], rollout_batch=0, train_batch=0,
                     dtype="float16", **sizes)
    train_prompts = load_prompts(config.prompts, "train")
    seconds, config = check.timed(lambda: choose_batches(policy, train_prompts, config))
    check.note(name, chosen_batches=(config.rollout_batch, config.train_batch), choosing_s=round(seconds, 1))
    loss_scales(check, name, policy, trajectory, prompts[:2], guidance)


def loss_scales(check: Check, name: str, policy: Policy, trajectory: Trajectory, prompts: list[str],
                guidance: float) -> None:
    """The error of float16's gradients against float32's, by kind of layer, at loss scales from 2^16 on.

    The loss is a mean over the 576 x 9 rows of an update of sd35m_ocr.
    """
    rows = trajectory.rows(len(trajectory.log_probs) // 2, [0, 1])
    text = policy.encode(prompts)

    def gradients(scale: float, text) -> dict[str, Tensor]:
        log_prob, _, _ = replay(policy.velocity(text, guidance), rows)
        (log_prob.sum() * scale).backward()
        found = {layer: p.grad.double().cpu() / scale for layer, p in policy.network.named_parameters()
                 if p.requires_grad}
        policy.network.zero_grad()
        return found

    exponents = (16, 24, 26, 28, 30, 32, 34)
    found = {exponent: gradients(2.0**exponent / 5184, text) for exponent in exponents}
    again = gradients(2.0**24 / 5184, text)
    check.note(name, backward_repeats=all(torch.equal(again[layer], g) for layer, g in found[24].items()))
    policy.network.float()
    policy.dtype = torch.float32
    truth = gradients(1.0, tuple(part.float() for part in text))
    for exponent in exponents:
        error, size = collections.Counter(), collections.Counter()
        for layer, expected in truth.items():
            for kind in ("all", layer.split(".attn.")[-1].split(".lora")[0].rpartition(".ff")[-1]):
                error[kind] += float((found[exponent][layer] - expected).square().sum())
                size[kind] += float(expected.square().sum())
        relative = {kind: round((error[kind] / size[kind])**0.5, 4) for kind in size if size[kind]}
        check.note(name, **{f"gradients' error at 2^{exponent}": relative})


# ---- the trainer, as a user starts it ----------------------------------------------------------------------

@section("first command", 40)
def first_command(check: Check, name: str) -> None:
    """The README's command, cut short, and its preset of the other objective."""
    words = check.run_words[1:] if check.smoke else ["--epochs", "6", "--eval-every", "6", *check.to_here]
    for preset in ("tiny_ocr", "tiny_ocr_awm"):
        process = check.start(preset, [preset, *words, "--run-name", preset])
        check.finish(name, preset, process, 90, *SPOKEN)


@section("kill and resume", 130)
def kill_and_resume(check: Check, name: str) -> None:
    """A killed run goes on after its last whole epoch, and one that is told to stop saves first."""
    words = [*check.run_words, "--run-name", "killed"]
    first = check.start("killed", words)
    saved = check.runs / "killed" / "checkpoints" / "epoch_00001"
    came = check.wait_for(first, saved.exists, 100)
    os.kill(first.pid, signal.SIGKILL)                     # the launcher, with which its worker must end
    check.wait("killed", first, 20)
    check.note(name, first_epoch_saved=came, lines=check.said("killed", *SPOKEN))
    second = check.start("resumed", words)
    check.wait_for(second, lambda: check.said("resumed", "epoch 2/3:"), 90)
    second.send_signal(signal.SIGTERM)
    asked = time.time()
    code = check.wait("resumed", second, 60)
    check.note(name, code=code, seconds_after_sigterm=round(time.time() - asked, 1),
               resumed=check.said("resumed", *SPOKEN))
    check.require(name, "it goes on, and saves when it is told to stop", bool(
        check.said("resumed", "continuing after epoch 1") and check.said("resumed", "is saved")))


@section("compiled bench", 240)
@section("bench", 110)
def bench(check: Check, name: str) -> None:
    """An epoch; compiled, in turns with it as it is."""
    log, compiled = name.replace(" ", "_"), name == "compiled bench"
    if compiled and check.smoke:
        return check.note(name, skipped="takes minutes on a CPU")
    model = ["tiny_ocr"] if check.smoke else ["sd35m_ocr_1gpu", "--model", "random:sd35m"]
    words = [*model, "--group-size", "4", "--groups-per-epoch", "2", "--updates-per-epoch", "1",
             "--rollout-batch", "8", "--train-batch", "8", "--rewards", "jpeg_compressibility", "1",
             *check.to_here]
    words += ["--", *words, "--compile"] * compiled
    own = ["--rounds", "2", "--ranks", "1", "--json", str(check.out / f"{log}.json")]
    process = check.start(log, [*words, *own], program="tools.bench")
    check.finish(name, log, process, 330 if compiled else 140)


# ---- levers: what a network call costs with each on and off ------------------------------------------------

@section("levers", 30)
def levers(check: Check, name: str) -> None:
    policy = make_policy(check, "float16", **check.network)
    images, guidance = check.sampling["images"], check.sampling["guidance"]

    def measure(lever: str) -> None:
        calls = network_calls(policy, ["a"] * images, guidance)
        for call in calls.values():
            call()                                         # warm
        check.note(name, **{lever: {f"{PIECES[piece]} ms": round(1e3 * check.timed(call, 5)[0], 1)
                                    for piece, call in calls.items()}})

    measure("as trained")
    torch.backends.cuda.enable_cudnn_sdp(True)
    measure("cuDNN's attention")
    torch.backends.cuda.enable_cudnn_sdp(False)
    with disable_input_dtype_casting(policy.network):
        measure("without the adapter's input cast")
    for piece, call in network_calls(policy, ["a"] * images, guidance).items():
        # Where the time goes, by operation.
        activities = [ProfilerActivity.CPU] if check.smoke else [ProfilerActivity.CUDA, ProfilerActivity.CPU]
        with profile(activities=activities, acc_events=True) as profiled:
            call()
            synchronize(check.device)
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        operations = {event.key: round(event.self_device_time_total / 1e3, 2) for event in events
                      if event.key.startswith("aten::") and event.self_device_time_total}
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        longest = dict(list(operations.items())[:16])
        check.note(name, **{f"profile, {PIECES[piece]}": {"launches": launches, "ms": longest}})


@section("compile with cuDNN's attention", 110)
@section("compile", 110)
def compiled_network(check: Check, name: str) -> None:
    """Seconds of a compiled network's calls, and the ratio, which must be 1 without cuDNN's attention."""
    if check.smoke:
        return check.note(name, skipped="takes minutes on a CPU")
    cudnn = name != "compile"
    torch._dynamo.reset()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    images, guidance = check.sampling["images"], check.sampling["guidance"]
    policy = make_policy(check, "float16", compile=True, **check.network)
    draw, prompts = sample(check, policy, **check.sampling)
    first, trajectory = check.timed(draw)
    seconds, trajectory = check.timed(draw)
    check.note(name, first_rollout_s=round(first, 1), rollout_s=round(seconds, 2))
    deviation = largest_deviation(policy, trajectory, prompts, guidance, list(range(images)))
    check.note(name, **{"max |ratio - 1|": deviation})
    check.require(name, "the ratio is exactly 1", cudnn or deviation == 0)
    for piece, call in network_calls(policy, ["a"] * images, guidance).items():
        first, _ = check.timed(call)
        seconds, _ = check.timed(call, 5)
        check.note(name, **{PIECES[piece]: {"first s": round(first, 1), "ms": round(1e3 * seconds, 1)}})


# ---- other networks, ranks and precisions ------------------------------------------------------------------

def other_family(check: Check, name: str) -> None:
    """The laws and the speed of a family's smallest model that a card holds, checkpointed."""
    if check.smoke:
        return check.note(name, skipped="too large for a CPU")
    model = f"random:{name.split()[0]}"
    preset = PRESETS[check_model(model).preset]
    policy, *_ = check_laws(
        check, name, "bfloat16", dict(images=4, steps=6, trained=5, guidance=preset.guidance_scale),
        dict(model=model, targets=preset.lora_targets, rank=64, length=preset.max_sequence_length,
             gradient_checkpointing=True))
    network_speed(check, name, policy, preset.guidance_scale, (4, 16))


section("flux bfloat16", 60)(other_family)
section("sd35m bfloat16", 45)(
    lambda check, name: check_laws(check, name, "bfloat16", check.sampling, check.network))
for smallest in ("z_image", "flux2_klein_4b", "qwen_image"):
    section(f"{smallest} bfloat16", 60)(other_family)


TWO_RANKS = """import os, runpy, sys, torch.distributed as dist
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
init = dist.init_process_group
dist.init_process_group = lambda backend=None, **where: init("gloo", **where)
sys.path[:0], sys.argv[0] = [os.getcwd()], "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@section("two ranks", 50)
def two_ranks(check: Check, name: str) -> None:
    """Two processes on one GPU. They meet over gloo, because NCCL's ranks do not share a GPU."""
    program = check.runs / "two_ranks.py"
    program.write_text(TWO_RANKS)
    words = check.run_words if check.smoke else ["--epochs", "2", *check.to_here]
    process = check.start("two", [*words, "--run-name", "two"], program=str(program), ranks=2)
    check.finish(name, "two", process, 80, *SPOKEN)


@section("tiny in half precision", 180)
def tiny_in_half_precision(check: Check, name: str) -> None:
    """The bundled recipe ends with about the same score in each precision; all three run at once."""
    words = check.run_words if check.smoke else ["tiny_ocr", *check.to_here]
    dtypes = ("bfloat16", "float16") if check.smoke else ("float32", "bfloat16", "float16")
    processes = {dtype: check.start(dtype, [*words, "--dtype", dtype, "--run-name", dtype])
                 for dtype in dtypes}
    for dtype, process in processes.items():
        check.finish(name, dtype, process, 600, *SPOKEN)


# ---- program -----------------------------------------------------------------------------------------------

def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(SECTIONS), default=list(SECTIONS),
                        help=f"sections to run: {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    parser.add_argument("--smoke", action="store_true", help="small sizes, on a CPU, without a limit")
    given = parser.parse_args()
    try:
        device = distributed.own_device()
        if device.type != "cuda" and not given.smoke:
            raise ValueError("no GPU here: --smoke runs on a CPU")
        check = Check(device, given.out.absolute(), given.limit, given.smoke)
        distributed.setup()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name, (needs, function) in SECTIONS.items():
        if name in given.only:
            check.run(name, needs, function)
    print(f"done in {time.time() - check.started:.0f} s", flush=True)
    if check.skipped:
        names = " ".join(f'"{name}"' for name in check.skipped)
        print(f"no time was left for {len(check.skipped)} sections; run them with --only {names}", flush=True)
    distributed.shutdown()
    return int(check.failed)


if __name__ == "__main__":
    run_as_program(main)
