"""Run the authors' own code from a checkout of their repositories. Nothing of it is copied into this project.

Functions and classes are imported from their files. What stands inside their `main`, such as the training
step, is cut out of the syntax tree of their script and run as it is, with names of our choice around it.
"""

import ast
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

# Packages that the authors' files import and that no comparison may run, because they would load networks,
# parse the command line or send what is logged.
ALWAYS_STUBBED = ("ml_collections", "wandb", "paddleocr", "mmdet", "open_clip", "clip_benchmark")
# Packages that are used if they are installed.
STUBBED_IF_MISSING = ("absl", "pandas", "imp", "Levenshtein", "inflect", "requests")


def levenshtein(a: str, b: str) -> int:
    """Stand in for `Levenshtein.distance`, by the whole table rather than by two rows as the project does."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, row in enumerate(table[1:], 1):
        for j in range(1, len(row)):
            exchanged = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            row[j] = min(table[i - 1][j] + 1, row[j - 1] + 1, exchanged)
    return table[-1][-1]


class Settings(dict):
    """A dict whose keys are attributes: a stand-in for `ml_collections.ConfigDict`."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class StubModule(ModuleType):
    """A module in which every name is a mock."""

    __path__: list[str] = []
    __file__ = "stub.py"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"distance": levenshtein, "ConfigDict": Settings, "load_source": load_file}
        return known.get(name, MagicMock(name=name))


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for each package of `names`."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def load_file(name: str, path: str | Path) -> ModuleType:
    """Import the file at `path` as a module called `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


class RepairPosition(ast.NodeTransformer):
    """Let the reward server append the 1 of a position only where the position is right."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if ast.unparse(node) != "rewards.append(1.0)":
            return node
        guarded = ast.If(test=ast.Name("matched", ast.Load()), body=[node], orelse=[])
        return ast.copy_location(guarded, node)


@dataclass(frozen=True)
class Checkout:
    """The authors' trainer at `root`, and their reward server at `server` if it was given."""

    root: Path
    server: Path | None = None

    def has(self, path: str) -> bool:
        return (self.root / path).is_file()

    @functools.cache  # noqa: B019, because the process has one checkout
    def module(self, path: str) -> ModuleType:
        """Import a file of the trainer, such as "flow_grpo/ema.py" or "scripts/train_sd3.py"."""
        if path.startswith("flow_grpo/"):
            return importlib.import_module(path.removesuffix(".py").replace("/", "."))
        with quiet():
            return load_file(Path(path).stem, self.root / path)

    def tree(self, script: str) -> ast.Module:
        return ast.parse((self.root / script).read_text(encoding="utf-8"))

    def update_phase(self, script: str) -> CodeType:
        """Cut out of a training script's `main` what it does with an epoch's samples and their advantages.

        In the SD3 scripts that begins with the choice of samples to keep (`mask = ...`), in the FLUX scripts
        with the batch size. It ends with the loop over inner epochs.
        """
        for node in ast.walk(self.tree(script)):
            body = getattr(node, "body", None)
            loops = [k for k, part in enumerate(body if isinstance(body, list) else [])
                     if isinstance(part, ast.For) and ast.unparse(part.target) == "inner_epoch"]
            if loops:
                starts = ("mask", "(total_batch_size, num_timesteps)")
                first = next(k for k, part in enumerate(body) if isinstance(part, ast.Assign)
                             and ast.unparse(part.targets[0]) in starts)
                return compile(ast.Module(body[first:loops[0] + 1], []), f"{self.root / script}", "exec")
        raise LookupError(f"{script} has no loop over inner_epoch")

    def call_in_main(self, script: str, target: str, names: dict[str, Any]) -> Any:
        """Compute the value that a script's `main` first assigns to `target`, with `names` defined."""
        for node in ast.walk(self.tree(script)):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == target:
                return eval(compile(ast.Expression(node.value), script, "eval"), names)
        raise LookupError(f"{script} assigns nothing to {target}")

    def reward_server(self, repaired: bool) -> ModuleType:
        """Import the server's GenEval rules: as they are, or `repaired` by `RepairPosition`."""
        path = self.server / "reward_server/gen_eval.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if repaired:
            tree = ast.fix_missing_locations(RepairPosition().visit(tree))
        module = ModuleType("gen_eval")
        with warnings.catch_warnings():      # because the file turns all warnings off
            exec(compile(tree, str(path), "exec"), vars(module))
        return module

    def settings(self) -> dict[str, Settings]:
        """The authors' configurations by name, as far as they can be built."""
        found = {}
        for path in ("config/grpo.py", "config/grpo_guard.py"):
            if not self.has(path):
                continue
            module = load_file(Path(path).stem, self.root / path)
            for name, function in vars(module).items():
                if isinstance(function, type(load_file)) and function.__module__ == module.__name__:
                    with contextlib.suppress(TypeError):     # get_config takes a name
                        found[name] = function()
        return found


def open_checkout(flow_grpo: str, reward_server: str | None) -> Checkout:
    """Raises ValueError in one line unless the directories are checkouts of the authors' repositories."""
    for option, directory, file, repository in (
            ("--flow-grpo", flow_grpo, "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py", "flow_grpo"),
            ("--reward-server", reward_server, "reward_server/gen_eval.py", "reward-server")):
        if directory is not None and not (Path(directory).expanduser() / file).is_file():
            raise ValueError(f"{option} {directory!r} has no {file}: "
                             f"git clone https://github.com/yifan123/{repository}, and name that directory")
    root = Path(flow_grpo).expanduser().resolve()
    sys.meta_path.insert(0, StubFinder(ALWAYS_STUBBED))
    sys.meta_path.append(StubFinder(STUBBED_IF_MISSING))     # Python asks it last
    sys.path.append(str(root))               # at the end, because this project has a `config` too
    return Checkout(root, reward_server and Path(reward_server).expanduser().resolve())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the authors' code print nothing."""
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere), warnings.catch_warnings()):
        warnings.simplefilter("ignore")
        yield


class ReplayedNoise:
    """Stand in for diffusers' `randn_tensor`: returns the given draws one after another."""

    def __init__(self, draws: torch.Tensor):
        self.draws = iter(draws)

    def __call__(self, shape: tuple, **ignored: Any) -> torch.Tensor:
        return next(self.draws).reshape(shape)
