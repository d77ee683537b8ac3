"""How fast `rapidocr` (detection and recognition) is as a server's reward, against the same reward in this process.

    python -m proofs.remote_throughput [images] [threads]
    python -m proofs.remote_throughput servers          a slow reward on 1, 2 and 4 servers instead

One run: local and remote take turns, several rounds of the same images, each a scene of 512 x 512 with two lines of
text. Both have the same number of CPU cores for their engines; the remote one encodes, sends and decodes besides, which
the CPU time shows on a machine that has other work too. The slow reward sleeps 0.2 seconds a picture, so its servers
share no core.
"""

import contextlib

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rewards import build_rewards  # noqa: E402

WORDS = "river stone lamp bread cloud tiger green house north paper".split()


def scene(i):
    noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((512, 512)).point(lambda value: 128 + value // 2)
    text = f"{WORDS[i % 10]}\n{WORDS[i // 10 % 10]}"
    ImageDraw.Draw(image).text((256, 256), text, "black", ImageFont.load_default(70), "mm", align="center")
    return np.asarray(image), f'a sign that says "{text.replace(chr(10), " ")}"'


def cpu_seconds(*processes):
    """What these processes have computed so far, by Linux's own count."""
    fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def slow(images, prompts, metadata):
    time.sleep(0.2 * len(images))
    return images[:, 0, 0, 0]


@contextlib.contextmanager
def served(name, count, *flags):
    """`count` servers of a reward: their URLs, and their processes."""
    command = [sys.executable, ROOT / "rewards.py", "serve", name, "--port", "0", *flags]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(count)]
    try:
        yield [server.stdout.readline().split()[3].rstrip(":") for server in servers], servers
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def several(count=48, rounds=3):
    """Throughput of `slow` on several servers, in batches of 16 pictures, against what one could do at best."""
    name = "proofs/remote_throughput.py:slow"
    numbers = np.arange(count, dtype=np.uint8)
    batch = np.broadcast_to(numbers[:, None, None, None], (count, 64, 64, 3)).copy(), [""] * count, [{}] * count
    for servers in (1, 2, 4):
        with served(name, servers) as (urls, _):
            reward = build_rewards({name: 1.0}, urls={name: urls}, batch=16)
            reward(*(part[:1] for part in batch))                                               # warm-up
            rates = []
            for _ in range(rounds):
                started = time.perf_counter()
                assert reward(*batch)["total"].tolist() == numbers.tolist()
                rates.append(count / (time.perf_counter() - started))
        print(f"{servers} servers: {', '.join(f'{rate:.2f}' for rate in rates)} images a second "
              f"({5 * servers} without any cost)", flush=True)


def main(count=48, threads=1, rounds=3):
    images, prompts = zip(*map(scene, range(count)))
    batch = np.stack(images), list(prompts), [{}] * count
    with served("rapidocr", 1, "--threads", str(threads)) as ((url,), (server,)):
        rewards = {"local": build_rewards({"rapidocr": 1.0}, threads=threads),
                   "remote": build_rewards({"rapidocr": 1.0}, urls={"rapidocr": url})}
        scores = {name: reward(*(part[:8] for part in batch)) for name, reward in rewards.items()}      # warm-up
        rates, cpu = {name: [] for name in rewards}, dict.fromkeys(rewards, 0.0)
        for _ in range(rounds):
            for name, reward in rewards.items():
                started, before = time.perf_counter(), cpu_seconds(os.getpid(), server.pid)
                scores[name] = reward(*batch)["total"]
                rates[name].append(count / (time.perf_counter() - started))
                cpu[name] += (cpu_seconds(os.getpid(), server.pid) - before) / (rounds * count)
    assert scores["local"].tolist() == scores["remote"].tolist()
    for name, values in rates.items():
        print(f"{name}: {', '.join(f'{rate:.2f}' for rate in values)} images a second, {1000 * cpu[name]:.0f} ms of CPU time "
              f"an image, mean score {scores[name].mean():.3f}")
    local, remote = (statistics.median(rates[name]) for name in ("local", "remote"))
    print(f"remote / local: {remote / local:.3f} (medians; {threads} threads)")


if __name__ == "__main__":
    several() if sys.argv[1:] == ["servers"] else main(*map(int, sys.argv[1:]))
