"""Promises about copies: a file named here works in an empty directory, with nothing else of the project beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    """`run(files, code)`: copy `files` into an empty directory, run `code` there alone, and return what it prints."""

    def run(files, code, **environment):
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "REWARD_TOKEN")}
        ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean | environment, text=True,
                             capture_output=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    return run


ALONE = """
import os, sys
import numpy as np, rewards
assert os.path.samefile(os.path.dirname(rewards.__file__), "."), rewards.__file__
images = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
prompts, metadata = ['the word "cat"'] * 5, [{}] * 5
"""

OWN = """
import pathlib
pathlib.Path("mine.py").write_text("def brightness(images, prompts, metadata):\\n    return images.mean((1, 2, 3))\\n")
weighted = rewards.build_rewards({"jpeg_compressibility": 1.0, "mine:brightness": 0.5})
scores = weighted(images, prompts, metadata)
assert (scores["mine:brightness"] == images.mean((1, 2, 3)).astype("float32")).all()
assert np.allclose(scores["total"], scores["jpeg_compressibility"] + 0.5 * scores["mine:brightness"])
rewards.check_reward_weights({"jpeg_compressibility": 1.0, "geneval": 1.0}, {"geneval": "http://x"})
print(sorted({"engines", "torch", "transformers", "httpx2", "fastapi"} & set(sys.modules)))
"""


def test_rewards_alone_scores_jpeg_and_a_function_of_ones_own(run):
    assert run(["rewards.py"], ALONE + OWN) == "[]"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the real server of jpeg_incompressibility, started from the whole project."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, ROOT / "rewards.py", "serve", "jpeg_incompressibility", "--port", "0"]
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
    wait_until(lambda: "\n" in log.read_text() or process.poll() is not None, 60)
    yield re.search(r"http://\S+:\d+", log.read_text())[0]
    process.kill()
    process.wait()


SERVED = """
served = rewards.build_rewards({"jpeg_incompressibility": 1.0}, urls={"jpeg_incompressibility": os.environ["URL"]}, batch=2)
here = rewards.build_rewards({"jpeg_incompressibility": 1.0})
print((served(images, prompts, metadata)["total"] == here(images, prompts, metadata)["total"]).all())
"""


def test_rewards_alone_asks_a_served_reward(run, server):
    assert run(["rewards.py"], ALONE + SERVED, URL=server) == "True"


ENGINES = {
    "engines/ocr.py": """
from engines import ocr
reward = ocr.rapidocr_line(threads=2)
print(rewards.Rewards({"text": 1.0}, {"text": reward})(images, prompts, metadata)["total"].shape)
""",
    "engines/clip.py": """
from engines import clip
try:
    clip.pickscore(device="cpu", batch=4, model="no/such/directory")
except ValueError as error:
    print("no/such/directory" in str(error) and "\\n" not in str(error))
""",
    "engines/judges.py": """
from engines import judges
assert judges.parse_score("Final Score: 4", judges.UNIFIED_SCORE) == 4
try:
    judges.unifiedreward(url="")
except ValueError as error:
    print("vllm serve" in str(error))
""",
    "engines/geneval.py": """
from engines import geneval
seen = [geneval.Detection("cat", 0.9, (0, 0, 9, 9))]
print(geneval.geneval_score(seen, {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}))
try:
    geneval.geneval(model="no/such/directory")
except ValueError as error:
    print("no/such/directory" in str(error) and "\\n" not in str(error))
""",
    "engines/pickled.py": """
import pickle
from engines import pickled
print(pickled.read_plain_pickle(pickle.dumps({"scores": [np.float64(0.5)]})))
""",
    "engines/servers.py": """
nobody = ["http://127.0.0.1:9", "http://127.0.0.1:9/other"]
try:
    rewards.build_rewards({"any": 1.0}, urls={"any": nobody}, deadline=0.5)(images, prompts, metadata)
except rewards.RewardError as error:
    print("none of the 2 servers" in str(error))
""",
    "engines/serve.py": """
from engines import serve
app = serve.make_app("jpeg_incompressibility", rewards.build_reward("jpeg_incompressibility"))
print([route.path for route in app.routes if route.path in ("/score", "/health")])
""",
}  # fmt: skip

PRINTS = {"engines/ocr.py": "(5,)", "engines/clip.py": "True", "engines/judges.py": "True",
          "engines/geneval.py": "(1.0, 1.0, 1.0)\nTrue", "engines/pickled.py": "{'scores': [0.5]}",
          "engines/servers.py": "True", "engines/serve.py": "['/score', '/health']"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_rewards_and_any_one_engine_work_together(run, engine):
    assert run(["rewards.py", engine], ALONE + ENGINES[engine], HF_HUB_OFFLINE="1") == PRINTS[engine]


def test_there_is_a_promise_for_every_engine():
    assert set(ENGINES) == {f"engines/{file.name}" for file in ROOT.glob("engines/*.py")} - {"engines/__init__.py"}


def test_every_factory_takes_plain_keywords_alone():
    import inspect

    from rewards import REGISTRY, import_reward

    for name, where in REGISTRY.items():
        parameters = inspect.signature(import_reward(name)).parameters.values()
        if where.startswith("engines."):
            assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in parameters)
